"""evaluation/scoring.py against log-probabilities of one text at a time; what becomes of texts that do not fit."""

import pytest
import torch
from questions import make_checkpoint
from tiny import assert_same, float64, tiny

from common import checkpoint
from dataset.formats import DataError
from evaluation.scoring import (
    Question,
    batches,
    by_character,
    by_own_likelihood,
    chosen,
    make_row,
    make_rows,
    score,
    score_rows,
)
from quantize import quantize_checkpoint
from tokenizer import Tokenizer

LIMIT = 32  # of the tiny model


@pytest.fixture
def tok(tokenizer_path):
    return Tokenizer.load(tokenizer_path)


@torch.no_grad()
def alone(model, context, choice):
    """log p(choice | context), the text read by itself and cut on the left."""
    ids = torch.tensor([(context + choice)[-(LIMIT + 1) :]])
    logps = model(ids[:, :-1]).log_softmax(-1).gather(2, ids[:, 1:, None])
    return logps[0, -len(choice) :].sum().item()


def drawn(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 40, (size,), generator=generator).tolist() for size in sizes]


@float64
def test_choices_that_share_a_context_score_as_each_by_itself():
    """Contexts and choices of all lengths, with and without common beginnings, up to the last position."""
    model, questions = tiny().eval(), []
    for context, *sizes in [
        (5, 1, 1, 1, 1),
        (9, 3, 1, 6, 2),
        (1, 4, 9),
        (20, 12, 3, 3),
        (31, 1, 1),
        (2, 31, 1),
        (7, 2),
    ]:
        before, *choices = drawn(context, *sizes, seed=context)
        questions.append((before, choices))
    before, one, two = drawn(6, 4, 2)
    questions.append((before, [one + two, one + [5], one]))  # one is the beginning of another
    rows = [make_row(before, choices, LIMIT) for before, choices in questions]
    found = score_rows(model, rows)
    for logps, (before, choices) in zip(found, questions, strict=True):
        expected = [alone(model, before, choice) for choice in choices]
        assert_same(torch.tensor(logps), torch.tensor(expected))


@float64
@pytest.mark.parametrize("shape", [dict(n_kv_heads=4), dict(tied=False), dict(n_kv_heads=1)])
def test_other_models_score_alike(shape):
    model, (before, *choices) = tiny(**shape).eval(), drawn(8, 3, 5)
    [logps] = score_rows(model, [make_row(before, choices, LIMIT)])
    assert_same(torch.tensor(logps), torch.tensor([alone(model, before, choice) for choice in choices]))


def test_a_low_bit_model_scores_alike(tmp_path, tok):
    ckpt = checkpoint.load(make_checkpoint(tmp_path / "run", tok, "sft"))
    model, (before, *choices) = checkpoint.build_model(quantize_checkpoint(ckpt)).eval(), drawn(8, 3, 5)
    [logps] = score_rows(model, [make_row(before, choices, LIMIT)])
    # float32 sums of a few terms of size 10, in another order
    assert logps == pytest.approx([alone(model, before, choice) for choice in choices], abs=1e-4)


def test_a_context_is_read_once():
    before, a, b = drawn(10, 1, 1)
    assert make_row(before, [a, b], LIMIT) == (before, [[], []], [a, b], 0)
    row = make_row(before, [a + [7, 8], a + [9]], LIMIT)
    assert row.shared == before + a and row.tails == [[7], []]


def test_what_does_not_fit_goes_on_the_left():
    before, a, b = drawn(40, 3, 1)
    row = make_row(before, [a, b], LIMIT)
    assert row.shared + row.tails[0] + a[-1:] == (before + a)[-(LIMIT + 1) :]
    assert row.cut == 40 + 3 - (LIMIT + 1)
    assert make_row(before[:30], [a], LIMIT).cut == 0  # the last token is not read
    with pytest.raises(ValueError, match="no room for a choice of 33 tokens in a context of 32"):
        make_row(before, drawn(33), LIMIT)
    with pytest.raises(ValueError, match="a choice adds no token to it"):
        make_row(before, [a, []], LIMIT)


def test_a_batch_outgrows_neither_the_context_nor_the_tokens():
    rows = []
    for i in range(60):
        before, *choices = drawn(1 + i % 27, 1 + i % 5, 1 + i % 3, seed=i)
        rows.append(make_row(before, choices, LIMIT))
    found = list(batches(rows, 100, LIMIT))
    assert sorted(i for batch in found for i in batch) == list(range(60))
    for batch in found:
        longest = max(len(rows[i].shared) for i in batch) + max(len(ids) for i in batch for ids in rows[i].tails)
        assert longest <= LIMIT and (longest * len(batch) <= 100 or len(batch) == 1)


@float64
def test_text_becomes_tokens_together_with_its_context(tok):
    model = tiny(vocab_size=tok.vocab_size).eval()
    questions = [
        Question("山川河流 ", ["美丽", "明亮", "a b"], 0, ""),
        Question("", ["清晨", "夜晚"], 0, ""),
        Question("龘" * 20, ["安静", "x"], 0, ""),
    ]
    found = score(model, tok, questions, [tok.eos_id])
    for logps, question in zip(found.logps, questions, strict=True):
        for nats, choice in zip(logps, question.choices, strict=True):
            before = tok.encode(question.context.rstrip())
            whole = tok.encode(question.context + choice)
            assert whole[: len(before)] == before
            expected = alone(model, [tok.eos_id] + before, whole[len(before) :])
            assert nats == pytest.approx(expected, abs=1e-9)
    assert found.cut == 1


def test_scores_by_hand():
    questions = [Question("", ["ab", "abcd"], 0, ""), Question("", ["a", "bc"], 1, "")]
    logps = [[-4.0, -6.0], [-1.0, -2.0]]
    assert by_character(logps, questions) == [[-2.0, -1.5], [-1.0, -1.0]]
    assert by_own_likelihood(logps, [[-5.0, -6.5], [-1.5, -4.0]]) == [[1.0, 0.5], [0.5, 2.0]]
    assert chosen([[-2.0, -1.5], [-1.0, -1.0]]) == [1, 0]


def test_a_choice_that_fits_no_context_is_named(tok):
    rows = [Question("问题", ["短", "长" * 40], 0, "law")]
    with pytest.raises(DataError, match="law: '.*': no room for a choice of"):
        make_rows(tok, rows, [], LIMIT)


def test_weights_that_are_no_numbers_are_said():
    model = tiny().eval()
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        score_rows(model, [make_row([3], [[4], [5]], LIMIT)])
