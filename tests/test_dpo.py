"""Direct preference optimization: losses beside TRL's and the papers', the cached reference, what must not matter."""

import math
import shutil
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from chains import (
    argv,
    assert_same_tensors,
    losses,
    make_data,
    make_model,
    metrics,
    options_of,
)
from tiny import ENV, assert_same, conversations, examples, float64, gradients, tiny

import dpo_train
from alignment.pairs import pair_batch
from common import checkpoint
from common.config import ConfigError
from common.ranges import CHOICES
from dataset.batches import BatchOrder, pad_batch

LOG_2 = math.log(2)
CHOSEN, REJECTED = ((4, 3), (2, 12), (9, 1), (3, 6)), ((4, 8), (2, 2), (9, 5), (3, 7))
PAIRS = conversations(*CHOSEN), conversations(*REJECTED, seed=1)


def stacked(*rows):
    return torch.tensor(rows, dtype=torch.get_default_dtype())


def reference(seed=5):
    """Reference log-probabilities that PAIRS do not have under tiny()."""
    with torch.no_grad():
        return dpo_train.pair_logps(tiny(seed), pair_batch(*PAIRS, range(len(PAIRS[0])), ENV.device), ENV)[0]


# the losses


def test_sigmoid_on_numbers():
    logps, ref_logps = stacked([-1, -4], [-3, -2]), stacked([-2, -2], [-2, -1])
    loss, rewards = dpo_train.dpo_loss(logps, ref_logps, torch.ones(2, 2), beta=0.5)
    assert rewards.tolist() == [[0.5, -1.0], [-0.5, -0.5]]
    assert loss.tolist() == pytest.approx([0.3132617, 0.9740770])  # log(1 + e^-1), log(1 + e^0.5)


def test_ipo_on_numbers():
    logps, ref_logps = stacked([-1, -4], [-3, -2]), stacked([-2, -2], [-2, -1])
    loss, rewards = dpo_train.dpo_loss(logps, ref_logps, stacked([1, 4], [2, 1]), beta=0.5, kind="ipo")
    assert loss.tolist() == pytest.approx([(1 / 1 + 1 / 2 - 1) ** 2, (-2 / 4 + 1 / 1 - 1) ** 2])
    assert rewards.tolist() == [[0.5, -1.0], [-0.5, -0.5]]


def test_cdpo_is_mitchells_formula():
    """https://ericmitchell.ai/cdpo.pdf: no gradient where sigmoid(beta h) is the share of good labels."""
    logps = stacked([-1, -4, 3], [-3, -2, -1]).requires_grad_()
    loss, rewards = dpo_train.dpo_loss(logps, torch.zeros(2, 3), None, 0.5, "cdpo", label_smoothing=0.2)
    claim = torch.sigmoid(0.5 * (logps[0] - logps[1]))
    torch.testing.assert_close(loss, -0.8 * claim.log() - 0.2 * (1 - claim).log())
    loss.sum().backward()
    torch.testing.assert_close(logps.grad, torch.stack([0.5 * (claim - 0.8), 0.5 * (0.8 - claim)]).detach())
    plain = dpo_train.dpo_loss(logps, torch.zeros(2, 3), None, 0.5)[0]
    assert torch.equal(dpo_train.dpo_loss(logps, torch.zeros(2, 3), None, 0.5, "cdpo", 0.0)[0], plain)


def test_at_the_reference_the_loss_is_log_2_and_the_pair_is_pulled_apart():
    logps = stacked([-3, -7], [-5, -1]).requires_grad_()
    for kind, loss, gradient in (
        ("sigmoid", LOG_2, -0.15),  # -beta / 2
        ("cdpo", LOG_2, -0.12),  # -beta (1/2 - label_smoothing)
        ("ipo", (1 / 0.6) ** 2, -2 / 0.6 / 4),  # 2 (0 - 1 / (2 beta)) / 4 tokens
    ):
        found, rewards = dpo_train.dpo_loss(logps, logps.detach(), torch.full((2, 2), 4), 0.3, kind, 0.1)
        assert found.tolist() == pytest.approx([loss] * 2)
        assert rewards.count_nonzero() == 0
        (grad,) = torch.autograd.grad(found.sum(), logps)
        assert grad.flatten().tolist() == pytest.approx([gradient] * 2 + [-gradient] * 2)


def test_what_is_logged_of_a_pair():
    rewards = stacked([0.5, -1.0, 0.2], [-0.5, -0.5, 0.2])
    found = dpo_train.measures(stacked(7, 8, 9), stacked([-1, -4, -5], [-3, -2, -6]), rewards, beta=0.5)
    found = dict(zip(dpo_train.MEASURES, found.tolist(), strict=True))
    assert found["loss"] == [7, 8, 9] and found["accuracy"] == [1, 0, 0.5]
    assert found["margin"] == pytest.approx([1, -0.5, 0])
    assert found["chosen_logratio"] == pytest.approx([1, -2, 0.4])
    assert found["rejected_logratio"] == pytest.approx([-1, -1, 0.4])
    assert found["chosen_logps"] == [-1, -4, -5] and found["rejected_logps"] == [-3, -2, -6]


def trl_loss(model, rows, ref_logps, kinds, beta):
    """TRL's DPOTrainer._compute_loss on our model's log-probabilities."""
    from trl import DPOTrainer

    batch = pad_batch(rows)
    inputs = dict(input_ids=batch["ids"], completion_mask=batch["loss_mask"].long())
    inputs |= dict(zip(("ref_chosen_logps", "ref_rejected_logps"), ref_logps, strict=True))

    def forward(input_ids, labels, **_):
        nothing = torch.zeros(input_ids[:, 1:].shape)
        log_probs = model.token_logps(input_ids, mask=labels[:, 1:] != -100)
        return SimpleNamespace(log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())

    same = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        accelerator=same,
        model=SimpleNamespace(training=False),
        _metrics=dict(eval=defaultdict(list)),
        _total_train_tokens=0,
        aux_loss_enabled=False,
        use_weighting=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=list(kinds),
        loss_weights=list(kinds.values()),
        beta=beta,
    )
    loss = DPOTrainer._compute_loss(trainer, forward, inputs, return_outputs=False)
    return loss, {name: values[0] for name, values in trainer._metrics["eval"].items()}


@float64
@pytest.mark.slow
@pytest.mark.parametrize("kind, sft_coef", [("sigmoid", 0.0), ("ipo", 0.0), ("sigmoid", 0.5)])
def test_loss_gradients_and_metrics_are_trls(kind, sft_coef):
    model, ref_logps, beta = tiny(), reference(), 0.3
    # TRL's "sft" is the mean over all tokens, ours that of each answer's mean: the same where answers are as long
    chosen = conversations((4, 5), (2, 5), (9, 5), (3, 5)) if sft_coef else PAIRS[0]
    expected, expected_metrics = trl_loss(
        model, chosen + PAIRS[1], ref_logps, {kind: 1.0} | ({"sft": sft_coef} if sft_coef else {}), beta
    )
    expected.backward()
    expected_gradients = gradients(model)

    logps, tokens = dpo_train.pair_logps(model, pair_batch(chosen, PAIRS[1], range(4), ENV.device), ENV)
    loss, rewards = dpo_train.dpo_loss(logps, ref_logps, tokens, beta, kind)
    loss = loss - sft_coef * logps[0] / tokens[0]
    loss.mean().backward()
    assert_same(loss.mean(), expected)
    assert_same(gradients(model), expected_gradients)
    found = dict(zip(dpo_train.MEASURES, dpo_train.measures(loss, logps, rewards, beta).mean(1).tolist(), strict=True))
    for ours, theirs in (("accuracy", "rewards/accuracies"), ("margin", "rewards/margins")):
        assert found[ours] == pytest.approx(expected_metrics[theirs], rel=1e-6)
    assert found["chosen_logps"] == pytest.approx(expected_metrics["logps/chosen"], rel=1e-6)
    assert found["rejected_logps"] == pytest.approx(expected_metrics["logps/rejected"], rel=1e-6)


# log-probabilities of pairs


@float64
@torch.no_grad()
def test_the_answer_tokens_of_each_side_are_summed():
    model, logps_of = tiny(), lambda ids: model(torch.tensor([ids])).log_softmax(-1)[0]
    logps, tokens = dpo_train.pair_logps(model, pair_batch(*PAIRS, [1, 0], ENV.device), ENV)
    assert tokens.tolist() == [[12, 3], [2, 8]]
    for side, found in zip(PAIRS, logps, strict=True):
        for (ids, mask), logp in zip((side[1], side[0]), found, strict=True):
            token_logps = logps_of(ids)
            alone = sum(token_logps[t - 1, ids[t]].item() for t in range(len(ids)) if mask[t])
            assert logp.item() == pytest.approx(alone, rel=1e-9)


@float64
def test_one_forward_of_both_sides_equals_two():
    model = tiny()
    logps, _ = dpo_train.pair_logps(model, pair_batch(*PAIRS, range(4), ENV.device), ENV)
    logps.square().sum().backward()
    together = gradients(model)
    sides = [pad_batch(side) for side in PAIRS]
    alone = torch.stack([model.token_logps(side["ids"], mask=side["loss_mask"][:, 1:]).sum(1) for side in sides])
    assert_same(logps, alone)
    alone.square().sum().backward()
    assert_same(together, gradients(model))


@float64
@pytest.mark.parametrize("kind", CHOICES["dpo_train:loss"])
def test_gradient_does_not_depend_on_micro_batches_or_padding(kind):
    model, ref_logps = tiny(), reference()
    long = conversations((20, 12), seed=2)

    def gradient(parts, beside=()):
        for part in parts:
            sides = [[*side, *beside] for side in PAIRS]
            batch = pair_batch(*sides, [*part, *range(4, 4 + len(beside))], ENV.device)
            logps, tokens = dpo_train.pair_logps(model, batch, ENV)
            logps, tokens = logps[:, : len(part)], tokens[:, : len(part)]
            loss, _ = dpo_train.dpo_loss(logps, ref_logps[:, part], tokens, 0.3, kind, 0.1)
            (loss.mean() / len(parts)).backward()
        return gradients(model)

    whole = gradient([[0, 1, 2, 3]])
    assert whole.abs().max() > 1e-3
    for parts in ([[0, 1], [2, 3]], [[3], [1], [0], [2]]):
        assert_same(gradient(parts), whole)
    assert_same(gradient([[0, 1], [2, 3]], beside=long), whole)


@float64
@torch.no_grad()
def test_reference_stands_in_the_order_of_the_pairs():
    sizes = np.random.default_rng(3).integers(1, 9, (130, 2))
    model, chosen, rejected = tiny(), conversations(*sizes), conversations(*sizes[::-1], seed=1)
    sides = examples(chosen), examples(rejected)
    found = dpo_train.reference_logps(model, *sides, np.arange(130), ENV)
    expected, tokens = dpo_train.pair_logps(model, pair_batch(chosen, rejected, range(130), ENV.device), ENV)
    assert_same(found, expected)
    loss, rewards = dpo_train.dpo_loss(expected, found, tokens, beta=0.1)
    assert_same(loss, torch.full((130,), LOG_2))
    assert_same(*rewards)
    some = np.array([3, 129, 40])
    part = dpo_train.reference_logps(model, *sides, some, ENV)
    assert_same(part[:, some], expected[:, some])
    assert part.isnan().sum() == 2 * 127


def test_a_short_run_meets_few_pairs():
    order = BatchOrder(10, 3, seed=1)  # three batches an epoch
    assert dpo_train.pairs_met(order, 2).tolist() == sorted([*order[0], *order[1]])
    assert dpo_train.pairs_met(order, 0).tolist() == sorted(order[0])  # max_steps=0 only validates
    assert dpo_train.pairs_met(order, 3).tolist() == dpo_train.pairs_met(order, 50).tolist() == list(range(10))


# the cache


@pytest.fixture
def cached(tmp_path, capsys):
    """(reference log-probabilities of PAIRS with changes to what they are made from, what was said of it)."""
    (tmp_path / "rm.pkl").write_bytes(b"pairs")
    pairs = [examples(side) for side in PAIRS]

    def call(sha256="aa", seed=0, n=4, met=(0, 1, 2, 3), scale=1.0):
        parent = dict(path="some/ckpt.pt", sha256=sha256)
        stage = SimpleNamespace(env=ENV, out=tmp_path, parent=parent, config=dict(data=tmp_path))
        model = tiny(seed)
        for layer in (model.layers[0].attention.wq, model.layers[0].attention.wk):
            layer.weight.data *= scale
        splits = [[side.select(np.arange(m)) for side in pairs] for m in (4, n)]
        needed = np.array(met), np.arange(n)
        return dpo_train.cached_reference(stage, model, splits, needed), capsys.readouterr().out

    call.path, call.data = tmp_path / dpo_train.CACHE, tmp_path / "rm.pkl"
    return call


def test_a_second_run_reads_the_reference(cached):
    first, said = cached()
    assert said == "" and [each.shape for each in first] == [(2, 4), (2, 4)]
    second, said = cached(seed=1)  # other weights of the same name: the file is believed
    assert said == f"reference log-probabilities from {cached.path}\n"
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_reference_of_something_else_is_computed_again(cached):
    (first, _), _ = cached()
    (second, _), said = cached(sha256="bb", seed=1)
    assert said == f"{cached.path} was made with another checkpoint: computing it again\n"
    assert not torch.allclose(first, second)
    cached.data.write_bytes(b"other pairs")
    _, said = cached(sha256="cc")
    assert "was made with another checkpoint and rm.pkl:" in said
    (_, val), said = cached(sha256="cc", n=3)
    assert "with another number of pairs:" in said and val.shape == (2, 3)
    assert cached(sha256="cc", n=3)[1].startswith("reference log-probabilities from")


def test_a_reference_of_too_few_pairs_is_computed_again(cached):
    (few, _), _ = cached(met=(2, 0))
    assert few.isnan().any(0).tolist() == [False, True, False, True]
    assert cached(met=(0,))[1].startswith("reference log-probabilities from")
    (more, _), said = cached(met=(0, 1))
    assert said == f"{cached.path} has not all pairs that this run meets: computing it again\n"
    assert not more[:, :2].isnan().any()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"no such format", None])
def test_what_is_no_reference_is_neither_read_nor_replaced(cached, content):
    cached()
    if content is None:
        np.savez(cached.path, other=np.zeros(3))
    else:
        cached.path.write_bytes(content)
    before = cached.path.read_bytes()
    with pytest.raises(checkpoint.CheckpointError, match=f"{cached.path} is damaged, or not written by this stage"):
        cached()
    assert cached.path.read_bytes() == before


def test_a_reference_that_is_not_finite_is_not_kept(cached):
    with pytest.raises(checkpoint.CheckpointError, match="some/ckpt.pt: its log-probabilities are not finite"):
        cached(scale=1e25)
    assert not cached.path.exists()


# the stage


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data of a small chain and a model that knows nothing yet."""
    folder = tmp_path_factory.mktemp("dpo")
    make_data(folder, "rm,prompts")
    make_model(folder, "sft")
    dpo_train.main(options_of(folder, "dpo", folder / "dpo", dict(save_interval=3)))
    return folder


def test_resuming_uses_the_cache_and_changes_nothing(folder, tmp_path, capsys):
    out = tmp_path / "dpo"
    shutil.copytree(folder / "dpo", out)
    shutil.copyfile(out / "ckpt-3.pt", out / "ckpt.pt")  # as a run killed after its third step
    dpo_train.main(options_of(folder, "dpo", out, dict(save_interval=3, resume=True)))
    assert f"reference log-probabilities from {out / dpo_train.CACHE}\n" in capsys.readouterr().out
    assert metrics(out) == metrics(folder / "dpo")
    assert_same_tensors(checkpoint.load(out).weights, checkpoint.load(folder / "dpo").weights)


def test_a_run_from_before_the_losses_can_be_resumed(folder, tmp_path):
    out = tmp_path / "dpo"
    shutil.copytree(folder / "dpo", out)
    payload = torch.load(out / "ckpt-3.pt", weights_only=True)
    for key in ("loss", "label_smoothing"):
        del payload["config"][key]
    torch.save(payload, out / "ckpt.pt")
    (out / dpo_train.CACHE).unlink()
    options = dict(save_interval=3, resume=True)
    with pytest.raises(checkpoint.CheckpointError, match="loss is sigmoid in .* and ipo in this run's config"):
        dpo_train.main(options_of(folder, "dpo", out, options | dict(loss="ipo")))
    dpo_train.main(options_of(folder, "dpo", out, options))
    assert metrics(out) == metrics(folder / "dpo")


@pytest.mark.parametrize("kind, start", [("cdpo", LOG_2), ("ipo", 100)])  # (1 / (2 * 0.05))^2
def test_other_losses_train(folder, tmp_path, kind, start):
    dpo_train.main(options_of(folder, "dpo", tmp_path, dict(loss=kind, beta=0.05, max_steps=12)))
    rows = metrics(tmp_path)
    assert rows[0]["val/loss"] == pytest.approx(start, rel=1e-4) and losses(tmp_path)[0] == pytest.approx(
        start, rel=1e-4
    )
    assert rows[-1]["val/loss"] < rows[0]["val/loss"] and rows[-1]["val/accuracy"] > 0.5
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(loss="hinge"), "loss=hinge: sigmoid, ipo or cdpo is needed"),
        (dict(label_smoothing=0.5), "label_smoothing=0.5: at least 0 and less than 0.5"),
        (dict(label_smoothing=-0.1), "label_smoothing=-0.1"),
    ],
)
def test_bad_options_are_refused_before_anything_is_read(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        dpo_train.main(argv(data=tmp_path / "no", init_from=tmp_path / "no", out=tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_a_fall_of_both_answers_is_told(capsys):
    def warned(chosen, rejected):
        found = dpo_train.warn_if_fallen(7, {"val/chosen_logratio": chosen, "val/rejected_logratio": rejected})
        return found, capsys.readouterr().err

    assert warned(-9.9, -30) == (False, "") and warned(-12, -3) == (False, "")
    found, said = warned(-10.5, -30)
    assert found and said.startswith("step 7: ") and "-10.5 nats for chosen and -30.0 for rejected" in said


def test_a_run_tells_it_once(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dpo_train, "FALLEN", 100)  # then every validation is below
    dpo_train.main(options_of(folder, "dpo", tmp_path, dict(eval_interval=2)))
    said = [line for line in capsys.readouterr().err.splitlines() if "both fall" in line]
    assert len(said) == 1 and said[0].startswith("step 0: ")
    assert [row["step"] for row in metrics(tmp_path) if "val/loss" in row] == [0, 2, 4, 6]
