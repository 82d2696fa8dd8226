"""The schedule, Muon against what it claims, and which optimizer gets which parameter."""

import copy
import importlib
import io
import math

import pytest
import torch
from tiny import assert_same, float64

from common.checkpoint import CheckpointError, save
from common.config import ConfigError
from common.optim import (
    Muon,
    build_optimizer,
    keep_decay,
    learning_rate,
    never_low,
    orthogonalize,
    set_learning_rate,
)
from common.resume import begin
from configs.pretrain import config as pretraining
from model import Llama, ModelConfig

CONFIG = dict(
    optimizer="muon", learning_rate=0.01, weight_decay=0.1, beta1=0.9, beta2=0.95, momentum=0.9, embedding_rate=4.0
)
COSINE = dict(schedule="cosine", decay_share=0.2)
WSD = dict(schedule="wsd", decay_share=0.2, learning_rate=1.0, min_learning_rate=0.1, warmup_steps=10, max_steps=100)
OPTIMIZERS = pytest.mark.parametrize("optimizer", ["adamw", "muon"])


def tiny(**changes):
    torch.manual_seed(0)
    shape = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=48, max_seq_len=16)
    return Llama(ModelConfig(**shape | changes))


def train(model, optimizer, steps, first=0):
    """Losses of steps on tokens that depend on the step's number alone."""
    losses = []
    for step in range(first, first + steps):
        ids = torch.randint(0, 48, (4, 12), generator=torch.Generator().manual_seed(step))
        loss = model(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_learning_rate_warms_up_and_falls_along_a_cosine():
    config = dict(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=4, max_steps=12) | COSINE
    points = {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 6: 0.55 + 0.45 * 0.5**0.5, 8: 0.55, 12: 0.1, 99: 0.1}
    assert {step: learning_rate(step, config) for step in points} == pytest.approx(points)


@pytest.mark.parametrize("share, first", [(0.2, 80), (0.5, 50), (0.0, 100), (1.0, 10)])
def test_wsd_is_constant_then_falls_by_the_root(share, first):
    config = WSD | dict(decay_share=share)
    assert [learning_rate(step, config) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert {learning_rate(step, config) for step in range(10, first + 1)} <= {1.0}
    if first < 100:  # 1 - sqrt(1/4) and 1 - sqrt(16/25) of the way from 0.1 to 1
        assert learning_rate(first + (100 - first) / 4, config) == pytest.approx(0.1 + 0.9 * 0.5)
        assert learning_rate(first + (100 - first) * 0.64, config) == pytest.approx(0.1 + 0.9 * 0.2)
        assert learning_rate(100, config) == learning_rate(150, config) == pytest.approx(0.1)


def test_a_wsd_run_prolonged_before_its_decay_goes_on_as_if_planned_so():
    short, long = WSD | dict(max_steps=100), WSD | dict(max_steps=1000)
    rates = [[learning_rate(step, config) for step in range(81)] for config in (short, long)]
    assert rates[0] == rates[1]  # bit for bit: a checkpoint up to step 80 serves both
    assert learning_rate(81, short) < learning_rate(81, long) == 1.0
    cosine = [learning_rate(20, config | COSINE) for config in (short, long)]
    assert cosine[0] < cosine[1]  # a cosine has no such step


def test_a_prolonged_run_never_raises_its_rate_unless_told_to():
    before = dict(WSD | COSINE, max_steps=100)
    for step, rate in ((50, None), (100, 0.1)):
        config = before | dict(max_steps=400, decay_steps=0)
        anew = learning_rate(step, config)
        line = keep_decay(config, step, before)
        assert config["decay_steps"] == 100
        assert learning_rate(step, config) == learning_rate(step, before) and learning_rate(300, config) == 0.1
        assert rate is None or learning_rate(step, config) == rate
        assert "0.1 from step 100 on" in line and f"--decay_steps=400 makes it jump to {anew:.3g}" in line
        again = config | dict(decay_steps=0)  # the same command a second time
        assert keep_decay(again, step + 10, config) and again["decay_steps"] == 100
    told = before | dict(max_steps=400, decay_steps=400)
    assert keep_decay(told, 100, before) == "" and learning_rate(100, told) > 0.8
    shorter, same = before | dict(max_steps=60, decay_steps=0), before | dict(decay_steps=0)
    assert keep_decay(shorter, 50, before) == keep_decay(same, 50, before) == ""
    assert shorter["decay_steps"] == same["decay_steps"] == 0
    nothing = before | dict(min_learning_rate=0.0, max_steps=400, decay_steps=0)
    with pytest.raises(ConfigError, match="max_steps=400: the learning rate is 0 from step 100 on; --decay_steps=400"):
        keep_decay(nothing, 100, before)


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
@pytest.mark.parametrize("max_steps", [200, 400])
def test_an_end_that_was_asked_for_stays(schedule, max_steps):
    before = WSD | dict(schedule=schedule, max_steps=200, decay_steps=100)
    for step in (5, 50, 90, 150):
        config = before | dict(max_steps=max_steps, decay_steps=0)
        assert keep_decay(config, step, before) == "learning rate: decay_steps=100, as before"
        assert all(learning_rate(n, config) == learning_rate(n, before) for n in range(200))
    told = before | dict(max_steps=max_steps, decay_steps=max_steps)
    assert keep_decay(told, 50, before) == "" and told["decay_steps"] == max_steps


@pytest.mark.parametrize("step, kept", [(5, False), (80, False), (81, True), (100, True)])
def test_a_wsd_run_is_prolonged_freely_until_its_decay(step, kept):
    config = WSD | dict(max_steps=400, decay_steps=0)
    assert bool(keep_decay(config, step, WSD)) == kept
    assert config["decay_steps"] == (100 if kept else 0)


def test_a_decay_that_has_begun_is_not_undone_by_another_share():
    for max_steps in (100, 400):  # at step 90 half of the last 20 steps is over
        config = WSD | dict(decay_share=0.05, max_steps=max_steps, decay_steps=0)
        with pytest.raises(
            ConfigError, match="^decay_share=0.05: the learning rate would rise from 0.364 to 1 at step"
        ):
            keep_decay(config, 90, WSD)
    for step, share, max_steps in ((70, 0.05, 100), (70, 0.05, 400), (90, 0.4, 100)):
        config = WSD | dict(decay_share=share, max_steps=max_steps, decay_steps=0)
        assert keep_decay(config, step, WSD) == "" and config["decay_steps"] == 0


def test_a_warm_up_longer_than_wsds_stable_part_delays_the_decay():
    config = WSD | dict(warmup_steps=90)
    assert learning_rate(89, config) == learning_rate(90, config) == 1.0
    assert learning_rate(95, config) == pytest.approx(0.1 + 0.9 * (1 - 0.5**0.5))


@pytest.mark.parametrize("stage", ["pretrain", "sft", "rm_train", "dpo_train", "ppo_train", "grpo_train"])
def test_every_stage_keeps_the_cosine_unless_told_otherwise(stage):
    config = importlib.import_module(f"configs.{stage}").config
    assert config["schedule"] == "cosine"
    step, warmup = config["max_steps"] // 3, config["warmup_steps"]
    peak, low = config["learning_rate"], config["min_learning_rate"]
    progress = (step - warmup) / (config["max_steps"] - warmup)
    assert learning_rate(step, config) == low + 0.5 * (peak - low) * (1 + math.cos(math.pi * progress))


def test_a_run_from_before_schedules_goes_on_with_its_cosine_only(tmp_path):
    config = copy.deepcopy(pretraining) | dict(out=str(tmp_path))
    old = {key: value for key, value in config.items() if key not in ("schedule", "decay_share", "logger", "plan")}
    save(tmp_path, stage="pretrain", step=3, tokens_seen=1, model=tiny(), tokenizer=b"x", config=old, extra={})
    assert begin(config | dict(resume=True, decay_share=0.1, logger="wandb"), "pretrain").step == 3
    with pytest.raises(CheckpointError, match="schedule is cosine in .* and wsd in this run's config"):
        begin(config | dict(resume=True, schedule="wsd"), "pretrain")


@pytest.mark.parametrize("warmup_steps, max_steps", [(0, 10), (10, 10), (20, 10)])
@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_learning_rate_without_warmup_or_without_decay(warmup_steps, max_steps, schedule):
    config = WSD | dict(schedule=schedule, warmup_steps=warmup_steps, max_steps=max_steps)
    rates = [learning_rate(step, config) for step in range(max_steps + 1)]
    assert max(rates) <= 1 and min(rates) > 0
    assert rates[0] == pytest.approx(1 / max(1, warmup_steps))


def test_a_run_that_ends_in_the_midst_of_its_schedule_is_told():
    config = dict(learning_rate=1.0, min_learning_rate=0.0, schedule="cosine", decay_share=0.2, max_steps=100)
    for warmup, end, line in (
        (0, 0, ""),
        (100, 100, ""),
        (10**9, 0, "warmup_steps=1000000000, but max_steps=100: the learning rate rises to the end"),
        (0, 200, "decay_steps=200, but max_steps=100: the learning rate ends at 0.5"),  # half of half a cosine
    ):
        assert never_low(config | dict(warmup_steps=warmup, decay_steps=end)) == line


def test_set_learning_rate_reaches_every_group_by_its_rate():
    for optimizer, rates in (("muon", [1, 4, 1]), ("adamw", [1, 1])):
        made = build_optimizer(tiny(), CONFIG | dict(optimizer=optimizer))
        assert set_learning_rate(made, 0.5) == 0.5
        assert [group["lr"] for group in made.param_groups] == [0.5 * rate for rate in rates]


@float64
@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (96, 32), (3, 32, 96), (2, 2, 80, 24)])
def test_orthogonalize_brings_singular_values_near_1(shape):
    torch.manual_seed(0)
    G = torch.randn(shape) * 1e-3  # gradients are small; only their direction counts
    X = orthogonalize(G)
    singular = torch.linalg.svdvals(X)
    assert 0.6 <= singular.min() and singular.max() <= 1.3
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    inner = U.mT @ X @ Vh.mT  # diagonal where the singular vectors are kept
    torch.testing.assert_close(inner, torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1)), atol=1e-9, rtol=0)


@float64
def test_orthogonalize_of_a_batch_is_that_of_each():
    G = torch.randn(4, 24, 40, generator=torch.Generator().manual_seed(1))
    for batched, alone in zip(orthogonalize(G), G, strict=True):
        assert_same(batched, orthogonalize(alone))
    assert orthogonalize(torch.zeros(2, 8, 4)).count_nonzero() == 0


@float64
def test_muon_on_same_shaped_matrices_is_muon_on_each():
    torch.manual_seed(0)
    together = [torch.nn.Parameter(torch.randn(24, 16)) for _ in range(3)] + [torch.nn.Parameter(torch.randn(16, 24))]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in together]
    optimizers = [Muon([dict(params=together, muon=True)], lr=0.1)]
    optimizers += [Muon([dict(params=[p], muon=True)], lr=0.1) for p in alone]
    for _ in range(3):
        for p, q in zip(together, alone, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(together, alone, strict=True):
        assert_same(p, q)


@pytest.mark.parametrize("shape", [(64, 64), (128, 32), (32, 128)])
def test_muon_update_has_the_size_of_adamw(shape):
    p = torch.nn.Parameter(torch.zeros(shape))
    p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 1e-4
    Muon([dict(params=[p], muon=True)], lr=0.01).step()
    assert 0.1 < p.detach().square().mean().sqrt() / 0.01 < 0.3  # root mean square 0.2 lr
    assert (p.detach() * p.grad).sum() < 0


@float64
def test_muon_momentum_is_nesterovs():
    torch.manual_seed(3)
    first, second = torch.randn(2, 16, 48)
    p = torch.nn.Parameter(torch.zeros(16, 48))
    optimizer = Muon([dict(params=[p], muon=True)], lr=1.0, momentum=0.9)
    for grad in (first, second):
        before, p.grad = p.detach().clone(), grad.clone()
        optimizer.step()
        assert torch.equal(p.grad, grad)
    buffer = 0.9 * (0.1 * first) + 0.1 * second
    expected = -0.2 * 48**0.5 * orthogonalize(0.9 * buffer + 0.1 * second)
    assert_same(p.detach() - before, expected)


@float64
def test_the_adamw_in_muon_is_torchs():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((7, 5), (5,))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    mine = Muon([dict(params=ours, muon=False, weight_decay=0.1)], lr=0.02, betas=(0.8, 0.95))
    torchs = torch.optim.AdamW(theirs, lr=0.02, betas=(0.8, 0.95), weight_decay=0.1)
    for step in range(12):
        for optimizer in (mine, torchs):
            set_learning_rate(optimizer, 0.02 / (1 + step))
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p) * 10.0 ** (step % 4 - 2)
            q.grad = p.grad.clone()
        mine.step()
        torchs.step()
        for p, q in zip(ours, theirs, strict=True):
            assert_same(p, q)


def test_muon_goes_on_from_steps_that_are_plain_numbers():
    old, new = tiny(), tiny()
    optimizers = [build_optimizer(model, CONFIG) for model in (old, new)]
    for step in range(4):
        for model, optimizer in zip((old, new), optimizers, strict=True):
            for p in model.parameters():
                p.grad = torch.full_like(p, 0.5 + step)
            optimizer.step()
        state = optimizers[0].state_dict()
        for values in state["state"].values():
            if "step" in values:
                values["step"] = int(values["step"])  # as checkpoints once had it
        optimizers[0].load_state_dict(state)
    for p, q in zip(old.parameters(), new.parameters(), strict=True):
        assert torch.equal(p, q)


@float64
@OPTIMIZERS
def test_weight_decay_is_for_matrices_only(optimizer):
    model = tiny(scalar_head=True)
    torch.nn.init.ones_(model.scalar.weight)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    build_optimizer(model, CONFIG | dict(optimizer=optimizer)).step()
    for name, p in model.named_parameters():
        shrunk = 1 - 0.01 * 0.1 if p.dim() == 2 else 1.0
        assert_same(p.detach(), before[name] * shrunk)


def names_of(model, group):
    wanted = {id(p) for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in wanted}


@pytest.mark.parametrize("changes", [dict(), dict(tied=False), dict(scalar_head=True)])
def test_muon_gets_the_trunks_matrices_and_adamw_the_rest(changes):
    model = tiny(**changes)
    muon, rest, vectors = build_optimizer(model, CONFIG).param_groups
    assert muon["muon"] and not rest["muon"] and not vectors["muon"]
    assert [group["weight_decay"] for group in (muon, rest, vectors)] == [0.1, 0.025, 0.0]
    assert [group["lr"] for group in (muon, rest, vectors)] == [0.01, 0.04, 0.01]
    kinds = ["attention.wq", "attention.wk", "attention.wv", "attention.wo"]
    kinds += ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
    assert names_of(model, muon) == {f"layers.{i}.{kind}.weight" for i in (0, 1) for kind in kinds}
    outside = {"tok_embeddings.weight"} | ({"output.weight"} if model.output else set())
    assert names_of(model, rest) == outside | ({"scalar.weight"} if model.scalar else set())
    assert all("norm" in name for name in names_of(model, vectors))
    chosen = [id(p) for group in (muon, rest, vectors) for p in group["params"]]
    assert sorted(chosen) == sorted(id(p) for p in model.parameters())


def test_two_models_under_one_optimizer_are_split_alike():
    both = torch.nn.ModuleDict(dict(policy=tiny(), value=tiny(scalar_head=True)))
    muon, rest, _ = build_optimizer(both, CONFIG).param_groups
    assert len(muon["params"]) == 2 * 2 * 7
    assert names_of(both, rest) == {f"{m}.tok_embeddings.weight" for m in ("policy", "value")} | {"value.scalar.weight"}


@OPTIMIZERS
def test_both_optimizers_learn(optimizer):
    model = tiny()
    ids = torch.randint(0, 48, (4, 12), generator=torch.Generator().manual_seed(0))
    made = build_optimizer(model, CONFIG | dict(optimizer=optimizer))
    losses = []
    for _ in range(30):
        loss = model(ids[:, :-1], ids[:, 1:])
        made.zero_grad()
        loss.backward()
        made.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@OPTIMIZERS
def test_a_saved_state_goes_on_as_if_never_saved(optimizer):
    model = tiny()
    made = build_optimizer(model, CONFIG | dict(optimizer=optimizer))
    train(model, made, 3)
    file = io.BytesIO()
    torch.save(dict(model=model.state_dict(), optimizer=made.state_dict()), file)
    expected = train(model, made, 3, first=3)

    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    again = tiny()
    again.load_state_dict(saved["model"])
    resumed = build_optimizer(again, CONFIG | dict(optimizer=optimizer, learning_rate=9.0))
    resumed.load_state_dict(saved["optimizer"])
    assert train(again, resumed, 3, first=3) == expected
    for name, p in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], p), name
