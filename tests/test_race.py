"""benchmarks/race.py: its one scorer, its clock, and when a curve has reached what another ended at."""

import math
from types import SimpleNamespace

import pytest
import torch

from model import Llama


@pytest.fixture
def racers(from_benchmarks):
    return from_benchmarks("racers")


@pytest.fixture
def race(from_benchmarks):
    return from_benchmarks("race")


def likes_what_it_read(input_ids, use_cache):
    """Logits (B, T, 4) that give the token just read a probability of 1/2 and each of the others 1/6."""
    return SimpleNamespace(logits=torch.nn.functional.one_hot(input_ids, 4) * math.log(3))


def test_only_targets_are_scored_whatever_shares_their_batch(racers):
    rows = [([1], [1, 1, 2]), ([1, 3, 3, 3], [3]), ([2, 2], [0, 0])]
    nats = [2 * math.log(2) + math.log(6), math.log(2), math.log(6) + math.log(2)]
    assert racers.nats(likes_what_it_read, rows) == pytest.approx(sum(nats), abs=1e-5)  # float32: 6 ulp of each
    for row, expected in zip(rows, nats, strict=True):
        assert racers.nats(likes_what_it_read, [row]) == pytest.approx(expected, abs=1e-5)


def test_exported_weights_score_as_our_model_does(racers):
    shape = dict(dim=16, n_layers=2, n_heads=2, n_kv_heads=1, max_seq_len=12)
    job = SimpleNamespace(racer="ours", model=shape, vocab_size=50)
    torch.manual_seed(1)
    ours = Llama(racers.shape_of(job)).eval()
    for weight in ours.parameters():
        weight.data += torch.randn_like(weight) * 0.3
    exported, turned = racers.empty_model(job)
    racers.load(exported, turned(ours.state_dict()))
    ids = torch.randint(3, 50, (4, 12))
    rows = [([2], row[1:].tolist()) for row in ids.masked_fill_(torch.arange(12) == 0, 2)]
    expected = ours(ids[:, :-1], ids[:, 1:]).item() * ids[:, 1:].numel()
    assert racers.nats(exported, rows) == pytest.approx(expected, rel=1e-5)  # float32, a sum of 44 terms
    with pytest.raises(SystemExit, match="not those of the model"):
        racers.load(exported, {"norm.weight": torch.ones(16)})


def test_the_clock_stands_in_the_first_step_and_while_it_writes(racers, monkeypatch, tmp_path):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(racers.time, "perf_counter", lambda: now.seconds)

    def save(weights, path):
        now.seconds += 1000
        torch_save(weights, path)

    torch_save = torch.save
    monkeypatch.setattr(racers.torch, "save", save)
    clock = racers.Clock(100.0, tmp_path)
    clock.model, shares = torch.nn.Linear(2, 2), []
    assert clock.tick() == 0
    now.seconds += 500  # the first step
    while not clock.over:
        shares.append(clock.tick())
        now.seconds += 4
    assert shares == pytest.approx([step / 25 for step in range(26)])
    kept = [0.08, 0.12, 0.16, 0.2, 0.32, 0.4, 0.52, 0.6, 0.72, 0.8, 0.92, 1.0]  # the first step after each mark
    found = clock.found()
    assert found["minutes"] == pytest.approx([100 / 60 * share for share in kept])
    assert found["steps"] == 26 and found["parameters"] == 6
    assert len(list(tmp_path.glob("*.pt"))) == len(kept)


def test_a_curve_reaches_a_loss_on_the_line_between_its_points(race):
    curve = dict(minutes=[1, 3, 4], bits=[6.0, 5.0, 5.5])
    assert race.reached(curve, 5.25) == pytest.approx(2.5)
    assert race.reached(curve, 6.5) == 1  # it was there before its first point
    assert race.reached(curve, 4.9) is None


def test_figures_of_two_seeds(race):
    def curve(*bits):
        return dict(minutes=[5, 10], bits=list(bits))

    curves = {("ours", "sft", 1): curve(6, 4), ("ours", "sft", 2): curve(7, 5)}
    curves |= {("transformers", "sft", 1): curve(8, 5), ("transformers", "sft", 2): curve(8, 6.5)}
    found = race.compare(curves | {("ours", "pretrain", 1): curve(1, 1)}, "sft", ["ours", "transformers"])
    assert found["bits_per_char"] == dict(ours=[4, 5], transformers=[5, 6.5])
    assert found["bits_per_char_ahead"] == dict(transformers=1.25)  # 5.75 - 4.5
    assert found["time_fraction"] == dict(transformers=pytest.approx((0.75 + 0.625) / 2, abs=1e-3))
    halves = [dict(minutes=[2.5, 5], bits=[7, last]) for last in (5, 6.6)]  # the second is never there
    curves |= {(race.HALF, "sft", seed): halves[seed - 1] for seed in (1, 2)}
    found = race.compare(curves, "sft", ["ours", "transformers"])
    assert found["bits_per_char_ahead"] == dict(transformers=1.25)
    assert found["time_fraction"] == dict(transformers=pytest.approx((0.5 + 0.625) / 2, abs=1e-3))
    assert found["time_fraction_without_half"] == dict(transformers=pytest.approx((0.75 + 0.625) / 2, abs=1e-3))
    curves["transformers", "sft", 1] = curve(5, 3)
    assert race.compare(curves, "sft", ["ours", "transformers"])["time_fraction"] == dict(transformers=None)
