"""The reward model: its loss beside TRL's and Llama 2's, evaluation and calibration, what must not matter."""

import io
import math
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from chains import argv
from tiny import ENV, assert_same, conversations, examples, float64, gradients, tiny

import rm_train
from alignment.pairs import pair_batch
from common.config import ConfigError
from common.metrics import wilson_interval
from dataset.batches import load_pairs
from dataset.formats import DataError, save_pkl

CHOSEN, REJECTED = ((4, 3), (2, 12), (9, 1), (3, 6)), ((4, 8), (2, 2), (9, 5), (3, 7))
PAIRS = conversations(*CHOSEN), conversations(*REJECTED, seed=1)


# the loss


def test_loss_on_numbers():
    chosen, rejected = torch.tensor([1.0, 0.0, 5.0]), torch.tensor([0.0, 2.0, 5.0])
    assert rm_train.reward_loss(chosen, rejected).tolist() == pytest.approx([0.3132617, 2.1269280, math.log(2)])
    # with a margin of 1: log(1 + e^0), log(1 + e^3), log(1 + e^1)
    assert rm_train.reward_loss(chosen, rejected, 1.0).tolist() == pytest.approx([math.log(2), 3.0485874, 1.3132617])
    margins = torch.tensor([0.0, 1.0, 1.0])
    assert rm_train.reward_loss(chosen, rejected, margins).tolist() == pytest.approx([0.3132617, 3.0485874, 1.3132617])
    centred = rm_train.reward_loss(chosen, rejected, centring=0.01)
    assert centred.tolist() == pytest.approx([0.3232617, 2.1669280, math.log(2) + 1])


def test_centring_pulls_both_scores_to_zero_and_leaves_their_difference():
    chosen, rejected = torch.tensor([3.0], requires_grad=True), torch.tensor([2.0], requires_grad=True)
    (rm_train.reward_loss(chosen, rejected, centring=0.5) - rm_train.reward_loss(chosen, rejected)).sum().backward()
    assert chosen.grad.item() == pytest.approx(5) and rejected.grad.item() == pytest.approx(5)


@float64
@pytest.mark.slow
@pytest.mark.parametrize("margin, centring", [(0.0, 0.0), (0.7, 0.0), (0.0, 0.02), (0.7, 0.02)])
def test_loss_and_gradients_are_trls(margin, centring):
    from trl import RewardTrainer

    chosen, rejected = (torch.randn(6, generator=torch.Generator().manual_seed(seed)) * 3 for seed in (0, 1))
    scores = torch.cat([chosen, rejected]).requires_grad_()
    same = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        accelerator=same,
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=centring or None),
        _metrics=dict(eval=defaultdict(list)),
        _total_train_tokens=0,
    )
    inputs = dict(margin=torch.full((6,), margin)) if margin else {}
    expected = RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=scores[:, None]), inputs)
    (expected_grad,) = torch.autograd.grad(expected, scores)
    found = rm_train.reward_loss(*scores.chunk(2), margin, centring).mean()
    (grad,) = torch.autograd.grad(found, scores)
    assert_same(found, expected)
    assert_same(grad, expected_grad)


# scores of pairs


@float64
@torch.no_grad()
def test_pair_scores_keeps_the_sides_apart():
    model = tiny(scalar_head=True)
    scores = rm_train.pair_scores(model, pair_batch(*PAIRS, [1, 0], ENV.device), ENV)
    for side, score in zip(PAIRS, scores, strict=True):
        alone = torch.cat([model.values(torch.tensor([side[i][0]]))[:, -1] for i in (1, 0)])
        assert_same(score, alone)


@float64
@pytest.mark.parametrize("margin, centring", [(0.0, 0.0), (1.0, 0.1)])
def test_gradient_does_not_depend_on_micro_batches_or_padding(margin, centring):
    model, long = tiny(scalar_head=True), conversations((20, 12), seed=2)

    def gradient(parts, beside=()):
        for part in parts:
            sides = [[*side, *beside] for side in PAIRS]
            batch = pair_batch(*sides, [*part, *range(4, 4 + len(beside))], ENV.device)
            scores = rm_train.pair_scores(model, batch, ENV)
            loss = rm_train.reward_loss(*(side[: len(part)] for side in scores), margin, centring)
            (loss.mean() / len(parts)).backward()
        return gradients(model)

    whole = gradient([[0, 1, 2, 3]])
    assert whole.abs().max() > 1e-3
    for parts in ([[0, 1], [2, 3]], [[3], [1], [0], [2]]):
        assert_same(gradient(parts), whole)
    assert_same(gradient([[0, 1], [2, 3]], beside=long), whole)


@float64
def test_evaluation_counts_right_pairs_and_longer_answers():
    model = tiny(scalar_head=True)
    chosen, rejected = conversations((4, 6), (4, 2), (4, 3)), conversations((4, 5), (4, 4), (4, 3), seed=1)
    with torch.no_grad():
        scores = rm_train.pair_scores(model, pair_batch(chosen, rejected, range(3), ENV.device), ENV)
    sides = examples(chosen), examples(rejected)
    metrics, *found = rm_train.evaluate(model, *sides, ENV, 3)
    for side, expected in zip(found, scores, strict=True):
        assert side.tolist() == pytest.approx(expected.tolist(), rel=1e-9)
    assert metrics["val/accuracy"] == pytest.approx((scores[0] > scores[1]).float().mean().item())
    assert metrics["val/loss"] == pytest.approx(rm_train.reward_loss(*scores).mean().item())
    assert metrics["val/longer_wins"] == pytest.approx(1.5 / 3)  # one longer, one shorter, one alike
    assert metrics["val/accuracy_low"] < metrics["val/accuracy"] < metrics["val/accuracy_high"]
    claims = [1 / (1 + math.exp(-abs(m))) for m in (scores[0] - scores[1]).tolist()]
    gaps = [abs((m > 0) - claim) for m, claim in zip((scores[0] - scores[1]).tolist(), claims, strict=True)]
    assert metrics["val/ece"] == pytest.approx(sum(gaps) / 3)  # three bins of one pair
    assert model.training
    strict, *_ = rm_train.evaluate(model, *sides, ENV, 3, lambda a, b: rm_train.reward_loss(a, b, 1.0, 0.1))
    assert strict["val/loss"] == pytest.approx(rm_train.reward_loss(*scores, 1.0, 0.1).mean().item())


@float64
def test_a_tie_is_half_right():
    model = tiny(scalar_head=True)
    same, other = conversations((4, 6), (4, 2)), conversations((4, 5), (4, 4), seed=1)
    chosen, rejected = [*same, other[0]], [*same, same[0]]  # two ties
    metrics, *scores = rm_train.evaluate(model, examples(chosen), examples(rejected), ENV, 3)
    last = float(scores[0][2] > scores[1][2])
    assert metrics["val/accuracy"] == pytest.approx((1 + last) / 3)
    assert rm_train.calibration(scores[0] - scores[1], 1)[0][2] == 1 + last
    blank, *_ = rm_train.evaluate(tiny(scalar_head=True).requires_grad_(False), *[examples(same)] * 2, ENV, 2)
    assert blank["val/accuracy"] == 0.5 and blank["val/ece"] == 0  # half is what a tie claims


def test_pairs_none_of_which_is_held_out_are_refused(tmp_path):
    side = dict(
        tokens=np.array([5, 6, 7, 8], np.uint16), offsets=np.array([0, 2, 4]), loss_mask=np.array([10], np.uint8)
    )
    sides = {f"{which}_{key}": value for which in ("chosen", "rejected") for key, value in side.items()}
    save_pkl(tmp_path / "rm.pkl", sides | dict(is_val=np.array([False, True])))
    train, val = load_pairs(tmp_path / "rm.pkl", 40)
    assert (len(train[0]), len(val[1])) == (1, 1)
    save_pkl(tmp_path / "rm.pkl", sides | dict(is_val=np.array([False, False])))
    with pytest.raises(DataError, match="rm.pkl: no held-out pair"):
        load_pairs(tmp_path / "rm.pkl", 40)


# calibration


def test_calibration_on_numbers():
    margins = [math.log(3), -math.log(3), math.log(9), math.log(9), 0.0, -math.log(1.5)]
    rows = rm_train.calibration(margins, n_bins=3)  # |margin| 0 and log 1.5, twice log 3, twice log 9
    sizes, claims, right, n = zip(*rows, strict=True)
    assert sizes == pytest.approx([math.log(1.5) / 2, math.log(3), math.log(9)])
    assert claims == pytest.approx([(0.5 + 0.6) / 2, 0.75, 0.9])
    assert right == (0.5, 1, 2) and n == (2, 2, 2)  # a tie is half right, as in val/accuracy
    assert rm_train.calibration_error(rows) == pytest.approx((0.3 + 0.25 + 0.1) / 3)


def test_fewer_pairs_than_bins_are_a_bin_each():
    rows = rm_train.calibration([2.0, -1.0])
    assert [row[2:] for row in rows] == [(0, 1), (1, 1)]
    assert sum(row[3] for row in rm_train.calibration(np.arange(1, 24))) == 23


def test_the_error_weighs_bins_by_their_pairs():
    assert rm_train.calibration_error([(1.0, 0.75, 1, 1), (2.0, 0.9, 2, 4)]) == pytest.approx((0.25 + 4 * 0.4) / 5)


def test_a_calibrated_model_has_little_error_and_a_boastful_one_much():
    rng = np.random.default_rng(0)
    size = rng.exponential(2.0, 20000)
    margins = np.where(rng.random(20000) < 1 / (1 + np.exp(-size)), size, -size)  # right as often as is claimed
    rows = rm_train.calibration(margins)
    assert rm_train.calibration_error(rows) < 0.02
    assert rm_train.calibration_error(rm_train.calibration(3 * margins)) > 0.05
    inside = [low <= claim <= high for _, claim, right, n in rows for low, high in [wilson_interval(right, n)]]
    assert sum(inside) >= 8


@pytest.mark.parametrize("n", [1, 7, 200])
def test_the_picture_is_a_png_of_two_panels(n):
    from PIL import Image

    rng = np.random.default_rng(1)
    png = rm_train.draw_calibration(rng.normal(1, 1, n).astype(np.float32), rng.normal(0, 1, n).astype(np.float32))
    assert Image.open(io.BytesIO(png)).format == "PNG" and Image.open(io.BytesIO(png)).size == (1260, 540)


def test_a_picture_of_scores_that_are_almost_the_same():
    scores = np.array([5.0, 5.0000005, 5.000001], np.float32)  # of a reward model that tells nothing apart
    assert rm_train.draw_calibration(scores, scores[::-1]).startswith(b"\x89PNG")


@pytest.mark.parametrize("option", [dict(margin=-0.5), dict(centring=-0.1)])
def test_bad_options_are_refused_before_anything_is_read(tmp_path, option):
    ((key, value),) = option.items()
    with pytest.raises(ConfigError, match=f"{key}={value}: at least 0"):
        rm_train.main(argv(data=tmp_path / "no", init_from=tmp_path / "no", out=tmp_path / "out", **option))
    assert not (tmp_path / "out").exists()
