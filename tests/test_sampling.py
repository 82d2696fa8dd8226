"""generate.py, what is drawn from given logits: penalty, temperature, top-k, top-p, min-p; logits that are none."""

import pytest
import torch
import transformers
from tiny import float64

from generate import sample
from model import Llama, ModelConfig


def always(logits):
    """A model that gives these logits after any text."""
    model = Llama(ModelConfig(dim=4, n_layers=1, n_heads=1, n_kv_heads=1, vocab_size=len(logits), tied=False))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1)  # so that the last state is (1, 1, 1, 1)
        model.output.weight.copy_(torch.tensor(logits)[:, None] / 4)
    return model


def test_repetition_penalty_divides_positive_logits_and_multiplies_negative_ones():
    def greedy(model, prompt, penalty):
        return model.generate([prompt], 3, temperature=0, eos_id=-1, repetition_penalty=penalty).tokens[0]

    positive = always([2.0, 1.5, 0.5, -3.0])
    assert greedy(positive, [0], 1.0) == [0, 0, 0]
    assert greedy(positive, [0], 1.6) == [1, 0, 0]  # 2 / 1.6 = 1.25 < 1.5; then 1.5 / 1.6 = 0.94 < 1.25
    assert greedy(positive, [3], 1.6) == [0, 1, 0]
    negative = always([-1.0, -1.2, -9.0, -9.0])
    assert greedy(negative, [3], 1.5) == [0, 1, 0]  # -1 * 1.5 < -1.2; then -1.2 * 1.5 < -1.5
    logps = positive.generate([[0]], 1, temperature=0, repetition_penalty=1.6, return_logps=True).logps
    assert logps[0] == pytest.approx([torch.tensor([1.25, 1.5, 0.5, -3.0]).log_softmax(0)[1].item()], abs=1e-4)


def uniform(n):
    return torch.rand(n, 1, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(), [0.1, 0.5, 0.15, 0.25]),
        (dict(temperature=0.5), [0.01 / 0.345, 0.25 / 0.345, 0.0225 / 0.345, 0.0625 / 0.345]),
        (dict(top_k=2), [0, 2 / 3, 0, 1 / 3]),
        (dict(top_k=9), [0.1, 0.5, 0.15, 0.25]),
        (dict(top_p=0.49), [0, 1, 0, 0]),
        (dict(top_p=0.7), [0, 2 / 3, 0, 1 / 3]),  # 0.5 does not reach 0.7, 0.75 does
        (dict(top_p=0.8), [0, 0.5 / 0.9, 0.15 / 0.9, 0.25 / 0.9]),
        (dict(top_p=0.7, top_k=2), [0, 2 / 3, 0, 1 / 3]),
        (dict(top_p=0.6, top_k=2), [0, 1, 0, 0]),  # of the two, one has 2 / 3
        (dict(top_p=0.6, temperature=0.5), [0, 1, 0, 0]),  # 0.25 / 0.345 = 0.72 reaches 0.6 alone
        (dict(min_p=0.29), [0, 0.5 / 0.9, 0.15 / 0.9, 0.25 / 0.9]),  # 0.1 is a fifth of 0.5
        (dict(min_p=0.31), [0, 2 / 3, 0, 1 / 3]),
        (dict(min_p=1.0), [0, 1, 0, 0]),
        (dict(min_p=0.2, temperature=0.5), [0, 0.8, 0, 0.2]),  # a fourth of the likeliest, and 0.09
        (dict(min_p=0.31, top_p=0.8, top_k=3), [0, 2 / 3, 0, 1 / 3]),
        (dict(temperature=0), [0, 1, 0, 0]),
    ],
)
def test_sample_draws_from_the_right_set_in_the_right_shares(options, expected):
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log().expand(20_000, 4)
    drawn = sample(logits, uniform(20_000), **options)
    shares = (drawn.bincount(minlength=4) / len(drawn)).tolist()
    assert shares == pytest.approx(expected, abs=0.02)  # 5 standard deviations
    assert [share == 0 for share in shares] == [share == 0 for share in expected]


def test_sample_reaches_both_ends_of_the_vocabulary_and_never_a_token_without_probability():
    allowed = torch.tensor([0, 1, 777, 2000, 3998])  # 1 of 4,000 to each side of what may not come
    logits = torch.full((4000,), -torch.inf)
    logits[allowed] = torch.tensor([0.2, 0.1, 0.3, 0.1, 0.3]).log()
    drawn = sample(logits.expand(5_000, -1), uniform(5_000))
    assert drawn.unique().tolist() == allowed.tolist()


@float64
@pytest.mark.parametrize(
    "options",
    [
        dict(min_p=0.05),
        dict(min_p=0.3, temperature=0.6),
        dict(top_k=7),
        dict(top_p=0.6, top_k=5),
        dict(top_p=0.8),
        dict(top_p=0.999),  # more than LIKELIEST tokens
        dict(top_p=0.9, min_p=0.02, top_k=300, temperature=1.3),
    ],
    ids=str,
)
def test_sample_leaves_out_what_transformers_leaves_out(options, monkeypatch):
    """A uniform number in the middle of each token's share draws just the tokens that are left."""
    order = ("temperature", "top_k", "top_p", "min_p")  # in which transformers' generate applies them
    warpers = (transformers.TemperatureLogitsWarper, transformers.TopKLogitsWarper)
    warpers += (transformers.TopPLogitsWarper, transformers.MinPLogitsWarper)
    for V, std in ((600, 0.5), (600, 2.0), (24, 1.0)):
        logits = std * torch.randn(3, V, generator=torch.Generator().manual_seed(V))
        wanted = logits
        for key, warper in zip(order, warpers, strict=True):
            wanted = warper(options[key])(None, wanted) if key in options else wanted
        share = wanted.softmax(-1)
        for b in range(3):
            left = share[b].nonzero().squeeze(1)  # (n,)
            middles = share[b].cumsum(-1)[left] - share[b][left] / 2
            drawn = sample(logits[b].expand(len(left), V), middles[:, None], **options)
            assert drawn.tolist() == left.tolist()


@pytest.mark.parametrize(
    "options", [dict(), dict(top_k=2), dict(top_p=0.5), dict(min_p=0.5), dict(temperature=0)], ids=str
)
def test_sample_marks_logits_that_are_not_finite(options):
    drawn = sample(torch.tensor([[0.0, 1], [0, torch.nan], [0, torch.inf], [-torch.inf] * 2]), uniform(4), **options)
    assert drawn.tolist()[1:] == [-1] * 3 and drawn[0] >= 0


@pytest.mark.parametrize("mode", [dict(fetch_every=1, bucket=1), dict(fetch_every=16, bucket=8)], ids=str)
def test_generation_says_that_logits_are_not_finite(mode):
    for options in (dict(), dict(temperature=0), dict(repetition_penalty=1.5, return_logps=True)):
        with pytest.raises(FloatingPointError, match="the logits are not finite"):
            always([0.0, torch.nan]).generate([[1], [0, 1]], 30, eos_id=-1, **options, **mode)
