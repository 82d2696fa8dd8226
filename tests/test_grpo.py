"""GRPO, Dr. GRPO and RLOO: advantages and losses beside TRL's, what must not change a gradient, and small runs."""

import importlib
import json
import shutil
from collections import defaultdict
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from bandit import BETA, PROMPTS, logps_of, play
from chains import argv, assert_same_tensors, failure, metrics, rl_options
from tiny import ENV, EOS, TEMPERATURE, assert_same, float64, gradients, ragged, tiny
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

import grpo_train
from alignment.objective import entropy_bonus
from alignment.rollout import Rollout, in_batches, rollout
from common import checkpoint
from common.files import file_sha256
from common.ranges import CHOICES
from dataset.batches import load_prompts
from dataset.formats import load_meta, load_pkl, save_meta, save_pkl

LOSSES = list(CHOICES["grpo_train:loss"])
CONFIG = dict(temperature=TEMPERATURE, epochs=1, minibatch_size=4, micro_batch_size=4, cliprange=0.2, max_new_tokens=16)


# advantages


def test_group_advantages_on_numbers():
    scores = torch.tensor([1.0, 2, 3, 6, 5, 5, 5, 5])
    penalties = torch.tensor([0.5, 0, 0, -0.5, -2, -1, 0, 3])
    above, std = [-2, -1, 0, 3, 0, 0, 0, 0], (14 / 3) ** 0.5
    alone, found = (
        {loss: grpo_train.group_advantages(torch.stack([scores, p]), 4, loss).tolist() for loss in LOSSES}
        for p in (0 * penalties, penalties)
    )
    assert alone["dr_grpo"] == above
    assert alone["grpo"] == pytest.approx([x / (std + 1e-4) for x in above])
    assert alone["rloo"] == pytest.approx([1 - 11 / 3, 2 - 10 / 3, 0, 6 - 6 / 3, 0, 0, 0, 0])
    for loss, factor in dict(grpo=1, dr_grpo=1, rloo=4 / 3).items():  # penalties are in no other unit
        expected = [a + factor * p for a, p in zip(alone[loss], penalties.tolist(), strict=True)]
        assert found[loss] == pytest.approx(expected)
    assert grpo_train.zero_variance(scores, 4) == 0.5


@float64
def test_group_advantages_are_trls():
    """TRL computes them amid _generate_and_score_completions, which wants a trainer: restated from 1.16.0,
    grpo_trainer.py line 2785 (scale_rewards "group" and "none") and rloo_trainer.py line 1688."""
    rewards, g = torch.randn(24, generator=torch.Generator().manual_seed(0)), 6
    groups = rewards.view(-1, g)
    mean, std = (x.repeat_interleave(g) for x in (groups.mean(1), groups.std(1)))
    baselines = ((groups.sum(1, keepdim=True) - groups) / (g - 1)).view(-1)
    expected = dict(grpo=(rewards - mean) / (std + 1e-4), dr_grpo=rewards - mean, rloo=rewards - baselines)
    for loss in LOSSES:
        parts = torch.stack([rewards, torch.zeros(24)])
        assert_same(grpo_train.group_advantages(parts, g, loss), expected[loss])


@float64
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("kl_coef", [1e-3, 0.5])
def test_a_group_of_equal_scores_is_moved_by_the_gradient_of_the_kl(kind, kl_coef):
    """The mean over all groups of two one-token replies, each as likely as the policy makes it.

    The mean of a group holds the reply itself, so that (n - 1) / n of the gradient is left, but for rloo's.
    """
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0], requires_grad=True)
    logps, ref_logps = logits.log_softmax(0), torch.tensor([1.0, 0, 0, -1]).log_softmax(0)
    kl_gradient = torch.autograd.grad((logps.exp() * (logps - ref_logps)).sum(), logits, retain_graph=True)[0]
    tokens = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flatten()  # 16 groups
    likely = logps.detach().exp()[tokens].view(-1, 2).prod(1).repeat_interleave(2) / 2
    old, ref, mask = logps.detach()[tokens, None], ref_logps[tokens, None], torch.ones(32, 1)
    rewards = grpo_train.penalised_rewards(torch.full((32,), 0.7), old, ref, mask, kl_coef)
    advantages = grpo_train.group_advantages(rewards, 2, kind)
    (found,) = torch.autograd.grad(-(likely * advantages * logps[tokens]).sum(), logits)
    assert_same(found, kl_coef * kl_gradient * (1 if kind == "rloo" else 0.5))


def test_penalised_rewards_take_the_whole_replys_kl():
    mask = torch.tensor([[0.0, 1, 1, 0], [1, 1, 1, 1]])
    logps, ref_logps = torch.tensor([[9.0, -1, -2, 9], [-1, -1, -1, -3]]), torch.full((2, 4), -1.0)
    scores = torch.tensor([10.0, -4])
    found = grpo_train.penalised_rewards(scores, logps, ref_logps, mask, 0.1)
    assert found[0].tolist() == [10, -4] and found[1].tolist() == pytest.approx([0.1, 0.2])
    assert grpo_train.penalised_rewards(scores, logps, None, mask, 0).tolist() == [[10, -4], [0, 0]]


# losses


def moved(batch, seed=0):
    """Old log-probabilities that tiny() has since moved from, and advantages."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        logps = in_batches(lambda rows: logps_of(tiny(), rows), batch)
    noise = 0.2 * torch.randn(logps.shape, generator=generator) * batch.mask
    return logps + noise, torch.randn(len(batch.ids), generator=generator)


def trl_loss(kind, logps, old_logps, advantages, mask, config):
    """_compute_loss of TRL's trainers, called without one; it is given log-probabilities in the place of a model."""
    accelerator = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x)
    trainer = SimpleNamespace(
        accelerator=accelerator, args=SimpleNamespace(delta=None), model=SimpleNamespace(training=True),
        _metrics=dict(train=defaultdict(list)), aux_loss_enabled=False, beta=0.0, use_vllm=False,
        epsilon_low=config["cliprange"], epsilon_high=config["cliprange"], top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, importance_sampling_level="token", loss_type=kind,
        current_gradient_accumulation_steps=1, max_completion_length=config["max_new_tokens"],
        _entropy_bonus_enabled=False,
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logps, torch.zeros_like(logps), None),
    )  # fmt: skip
    prompts = torch.zeros(len(logps), 1, dtype=torch.long)
    inputs = dict(prompt_ids=prompts, prompt_mask=prompts, completion_ids=prompts.expand(mask.shape))
    inputs |= dict(completion_mask=mask, advantages=advantages, old_per_token_logps=old_logps)
    if kind == "rloo":
        return RLOOTrainer._compute_loss(trainer, None, inputs | dict(old_logps=(old_logps * mask).sum(1)))
    return GRPOTrainer._compute_loss(trainer, None, inputs)


@float64
@pytest.mark.parametrize("kind", LOSSES)
def test_losses_and_gradients_are_trls(kind):
    batch = ragged((4, 3), (2, 12), (9, 1), (3, 6))
    old_logps, advantages = moved(batch)
    noise = torch.randn(old_logps.shape, generator=torch.Generator().manual_seed(2))
    logps = (old_logps + 0.3 * noise).requires_grad_()
    config = CONFIG | dict(loss=kind)
    loss, stats = grpo_train.group_loss(logps, old_logps, advantages[:, None], batch.mask, 4, config)
    (gradient,) = torch.autograd.grad(loss, logps)
    expected = trl_loss(kind, logps, old_logps, advantages, batch.mask, config)
    (expected_gradient,) = torch.autograd.grad(expected, logps)
    assert 0 < stats["clipfrac"] < 1 and gradient.abs().max() > 1e-3
    assert_same(loss, expected)
    assert_same(gradient, expected_gradient)


def updated(kind, batch, old_logps, advantages, **changes):
    """The gradients of the update's only minibatch, and the metrics."""
    policy, found = tiny(), []
    stage = SimpleNamespace(env=ENV, clip_and_step=lambda step, loss: found.append(gradients(policy)) or 1.0)
    config, order = CONFIG | dict(loss=kind) | changes, torch.Generator().manual_seed(5)
    stats = grpo_train.update(stage, 1, policy, batch, old_logps, advantages[:, None], config, order)
    return found[0], stats


@float64
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("micro_batch_size, padding", [(2, 0), (1, 0), (3, 6), (4, 6)])
def test_update_does_not_depend_on_micro_batches_or_padding(kind, micro_batch_size, padding):
    batch = ragged((4, 3), (2, 12), (9, 1), (3, 6))
    old_logps, advantages = moved(batch)
    whole, expected = updated(kind, batch, old_logps, advantages)
    assert whole.abs().max() > 1e-3 and 0 < expected["clipfrac"] < 1 < expected["ratio_max"]
    mask, ids = F.pad(batch.mask, (0, padding)), F.pad(batch.ids, (0, padding), value=7)
    wider = Rollout(ids, batch.lengths, mask, batch.ended, batch.replies)
    old_logps = F.pad(old_logps, (0, padding), value=3.0)
    found, stats = updated(kind, wider, old_logps, advantages, micro_batch_size=micro_batch_size)
    assert_same(found, whole)
    assert stats == pytest.approx(expected, rel=1e-9, abs=1e-9)


@float64
@pytest.mark.parametrize("kind", LOSSES)
def test_loss_is_untouched_by_padding_that_is_not_cut_off(kind):
    batch = ragged((4, 3), (2, 12), (9, 1), (3, 6))
    old_logps, advantages = moved(batch)

    def gradient(padding):
        policy, mask = tiny(), F.pad(batch.mask, (0, padding))
        logps = policy.token_logps(F.pad(batch.ids, (0, padding), value=7), TEMPERATURE, mask)
        old = F.pad(old_logps, (0, padding), value=3.0)
        grpo_train.group_loss(logps, old, advantages[:, None], mask, 4, CONFIG | dict(loss=kind))[0].backward()
        return gradients(policy)

    assert_same(gradient(6), gradient(0))


@float64
@pytest.mark.parametrize("kind", LOSSES)
def test_first_minibatch_has_ratio_1_and_the_plain_policy_gradient(kind):
    policy = tiny()
    batch = rollout(policy, PROMPTS[:4], 12, TEMPERATURE, EOS, seed=4)
    old_logps = in_batches(lambda rows: logps_of(policy, rows), batch, 2)
    advantages = torch.tensor([1.0, -2, 0.5, 0.7])
    found, stats = updated(kind, batch, old_logps, advantages)
    assert (stats["ratio"], stats["ratio_max"]) == pytest.approx((1, 1), abs=1e-9)
    assert stats["approx_kl"] == pytest.approx(0, abs=1e-9) and stats["clipfrac"] == 0
    lengths = batch.mask.sum(1)
    by = dict(grpo=4 * lengths, dr_grpo=torch.tensor(4.0 * CONFIG["max_new_tokens"]), rloo=torch.tensor(4.0))[kind]
    (-(logps_of(policy, batch).sum(1) * advantages / by).sum()).backward()
    expected = gradients(policy)
    assert_same(found, expected)


@pytest.mark.parametrize("kind, entropy_coef", [("dr_grpo", 0), ("rloo", 0), ("dr_grpo", 0.3)])
def test_one_token_bandit_learns_the_tilted_reference(kind, entropy_coef):
    config = dict(temperature=1.0, epochs=2, minibatch_size=480, micro_batch_size=480, cliprange=0.2)
    config |= dict(loss=kind, max_new_tokens=1)

    def step_of(stage, policy, batch, scores, logps, ref_logps, generator):
        rewards = grpo_train.penalised_rewards(scores, logps, ref_logps, batch.mask, BETA)
        advantages = grpo_train.group_advantages(rewards, 8, kind)[:, None]
        advantages = advantages + entropy_coef * entropy_bonus(logps, batch.mask)
        grpo_train.update(stage, 1, policy, batch, logps, advantages, config, generator)

    # the mean of a group of 8 holds the reply itself, so that only 7/8 of the reward stands against the entropy
    play(step_of, entropy_coef=entropy_coef * 8 / 7)


# runs


def options_of(small, out, **changes):
    options = rl_options(small, out, group_size=4, epochs=2, save_interval=2, max_steps=4) | changes
    return argv(**{key: value for key, value in options.items() if key != "kl_target"})


@pytest.mark.parametrize("loss", LOSSES)
def test_resuming_gives_the_same_run(small, tmp_path, loss):
    grpo_train.main(options_of(small, tmp_path / "whole", loss=loss))
    halves = tmp_path / "halves"
    shutil.copytree(tmp_path / "whole", halves)
    (halves / "ckpt-2.pt").replace(halves / "ckpt.pt")
    grpo_train.main(options_of(small, halves, loss=loss, resume=True))
    assert metrics(halves) == metrics(tmp_path / "whole")
    found, expected = (checkpoint.load(path) for path in (halves, tmp_path / "whole"))
    assert (found.step, found.training["extra"]) == (4, expected.training["extra"])
    assert_same_tensors(found.weights, expected.weights)


def test_first_step_costs_nothing_and_all_is_measured(small, tmp_path):
    one_update = dict(max_steps=1, epochs=1, minibatch_size=8)
    grpo_train.main(options_of(small, tmp_path / "out", **one_update))
    before, first, _ = metrics(tmp_path / "out")
    assert (before["val/kl"], first["grpo/kl"]) == pytest.approx((0, 0), abs=1e-4)
    assert first["grpo/rlhf_reward"] == pytest.approx(first["grpo/score"], abs=1e-4)
    assert (first["grpo/ratio"], first["grpo/ratio_max"]) == pytest.approx((1, 1), abs=1e-5)
    assert first["grpo/approx_kl"] == pytest.approx(0, abs=1e-6) and first["grpo/clipfrac"] == 0
    rest = ("entropy", "length", "eos_rate", "distinct_2", "zero_variance", "grad_norm", "policy_loss")
    assert {f"grpo/{name}" for name in rest} <= first.keys()
    assert (tmp_path / "out" / "score_kl.png").read_bytes().startswith(b"\x89PNG")


def test_without_kl_penalty_the_reference_is_asked_in_validation_only(small, tmp_path, own_rewards):
    changes = dict(kl_coef=0, max_new_tokens=25, seed=2, reward="own_rewards:odd", reward_model=tmp_path / "none")
    grpo_train.main(options_of(small, tmp_path / "out", **changes))
    rows = metrics(tmp_path / "out")
    assert all(row["grpo/kl"] is None for row in rows if "grpo/kl" in row)
    kl = [rows[0]["val/kl"], rows[-1]["val/kl"]]  # from samples: below 0 by chance
    assert abs(kl[0]) < 1e-4 < 1e-3 < abs(kl[1])
    assert {row["grpo/rlhf_reward"] - row["grpo/score"] for row in rows if "grpo/kl" in row} == {0}


def save_prompts(folder, arrays):
    """prompts.pkl anew, as meta.json then says."""
    save_pkl(folder / "prompts.pkl", arrays)
    meta = load_meta(folder)
    meta["files"]["prompts.pkl"]["sha256"] = file_sha256(folder / "prompts.pkl")
    save_meta(folder, meta)


def with_fields(small, folder, fields):
    """A copy of small's data whose prompts have the fields that fields(i) gives for the i-th."""
    shutil.copytree(small / "data", folder)
    arrays = load_pkl(folder / "prompts.pkl")
    arrays["fields"] = [json.dumps(fields(i), ensure_ascii=False) for i in range(len(arrays["is_val"]))]
    save_prompts(folder, arrays)


def test_a_reward_compares_replies_with_the_answer_of_their_row(small, tmp_path, monkeypatch):
    tokenizer = checkpoint.tokenizer_of(checkpoint.load(small / "sft"))
    prompts = [tokenizer.decode(p) for side in load_prompts(small / "data" / "prompts.pkl", 1 << 16) for p in side]
    assert len(set(prompts)) == len(prompts)
    right = {prompt: f"答{len(prompt)}" for prompt in prompts}
    everything = load_pkl(small / "data" / "prompts.pkl")
    texts = [tokenizer.decode(everything["tokens"][a:b]) for a, b in pairwise(everything["offsets"])]
    with_fields(small, tmp_path / "data", lambda i: dict(answer=right[texts[i]], **dict(level=3) if i else {}))
    seen = []

    def compare(prompts, replies, answer, level=None):
        seen.append((prompts, answer, level))
        return [float(reply[:1] == right[:1]) for reply, right in zip(replies, answer, strict=True)]

    (tmp_path / "comparing.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(importlib.import_module("comparing"), "compare", compare, raising=False)
    changes = dict(data=tmp_path / "data", reward="comparing:compare", reward_model="none", max_steps=2)
    grpo_train.main(options_of(small, tmp_path / "out", **changes))
    assert len(seen) == 5  # the reference, two validations, two steps
    for prompts, answer, level in seen:
        assert answer == [right[prompt] for prompt in prompts]
        assert level == [None if prompt == texts[0] else 3 for prompt in prompts]
    steps = [prompts for prompts, _, _ in seen[2:4]]
    assert all(len(set(prompts[i : i + 4])) == 1 for prompts in steps for i in range(0, 8, 4))  # groups


def test_fields_that_are_missing_or_not_taken(small, tmp_path, capsys, own_rewards):
    with_fields(small, tmp_path / "data", lambda i: dict(replies="x", answer="y"))
    data = dict(data=tmp_path / "data", reward_model="none", max_steps=1)
    grpo_train.main(options_of(small, tmp_path / "two", reward="own_rewards:odd", **data))  # takes two arguments
    grpo_train.main(options_of(small, tmp_path / "all", reward="own_rewards:takes_all", **data))
    assert "not passed, as its own parameters have these names: replies of the prompts" in capsys.readouterr().err
    options = options_of(small, tmp_path / "out", reward="own_rewards:takes_label", **data)
    line = failure(capsys, grpo_train.main, options)
    assert "reward=own_rewards:takes_label needs the field label of the prompts, which have replies, answer" in line


def test_prompts_must_leave_room_for_replies(small, tmp_path, capsys):
    longest = max(len(p) for side in load_prompts(small / "data" / "prompts.pkl", 1 << 16) for p in side)
    line = failure(capsys, grpo_train.main, options_of(small, tmp_path / "out", max_new_tokens=65 - longest))
    assert f"prompts.pkl: a prompt of {longest} tokens and a reply of {65 - longest} exceed the context of 64" in line
    shutil.copytree(small / "data", tmp_path / "data")
    arrays = load_pkl(tmp_path / "data" / "prompts.pkl")
    save_prompts(tmp_path / "data", arrays | dict(is_val=arrays["is_val"] & False))
    line = failure(capsys, grpo_train.main, options_of(small, tmp_path / "out", data=tmp_path / "data"))
    assert "prompts.pkl: no held-out prompt; make it of two or more" in line


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(loss="ppo"), "loss=ppo: grpo, dr_grpo or rloo is needed"),
        (dict(group_size=1), "group_size=1: at least 2 is needed"),
        (dict(group_size=3), "rollout_size=8: a multiple of group_size=3 is needed"),
        (dict(epochs=0), "epochs=0: at least 1 is needed"),
        (
            dict(loss="rloo", entropy_coef=0.1),
            "entropy_coef: it counts token by token, and loss=rloo weighs whole replies",
        ),
        (dict(score_clip=-1), "score_clip=-1.0: at least 0 is needed"),
        (dict(reward="length", reward_length="9,3"), "reward_length=[9, 3]"),
        (dict(reward="nothing"), "reward=nothing: model, length, module:function or"),
        (dict(rollout_size=4000), "one batch of 1000: choose a smaller rollout_size, or a larger group_size"),
    ],
)
def test_a_wrong_option_is_named(small, tmp_path, capsys, changes, words):
    assert words in failure(capsys, grpo_train.main, options_of(small, tmp_path / "out", **changes))


def test_another_text_of_the_function_is_told_on_resuming(small, tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text("def score(prompts, replies):\n    return [len(reply) % 3 for reply in replies]\n")
    options = dict(reward=f"{path}:score", reward_model="none")
    grpo_train.main(options_of(small, tmp_path / "out", **options, max_steps=1))
    identity = checkpoint.load(tmp_path / "out").training["extra"]["reward_model"]
    assert identity == dict(path=str(path), sha256=file_sha256(path))
    said = f"{path} has changed since this run began"
    grpo_train.main(options_of(small, tmp_path / "out", **options, max_steps=2, resume=True))
    assert said not in capsys.readouterr().out
    path.write_text(path.read_text() + "# the same, but who knows\n")
    grpo_train.main(options_of(small, tmp_path / "out", **options, max_steps=3, resume=True))
    assert said in capsys.readouterr().out


def test_another_reward_model_is_refused_on_resuming(small, tmp_path, capsys):
    shutil.copytree(small / "rm", tmp_path / "rm")
    grpo_train.main(options_of(small, tmp_path / "out", reward_model=tmp_path / "rm", max_steps=1))
    ckpt = checkpoint.load(tmp_path / "rm")
    facts = dict(stage="rm", step=2, tokens_seen=1, tokenizer=ckpt.tokenizer, config={})
    checkpoint.save(tmp_path / "rm", model=checkpoint.build_model(ckpt), **facts)
    options = options_of(small, tmp_path / "out", reward_model=tmp_path / "rm", max_steps=2, resume=True)
    line = failure(capsys, grpo_train.main, options)
    assert "cannot resume" in line and str(tmp_path / "rm" / "ckpt.pt") in line
