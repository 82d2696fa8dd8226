"""PPO: hand-computed numbers, what must not change the losses, the optimum of a bandit, and small runs."""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from bandit import BETA, PROMPTS, logps_of, play
from chains import argv, failure, metrics, rl_options
from tiny import ENV, EOS, TEMPERATURE, assert_same, float64, gradients, ragged, tiny

import ppo_train
from alignment.objective import entropy_bonus, policy_loss, ratio_stats
from alignment.rollout import Rollout, in_batches, rollout, sequence_kl
from common import checkpoint, resume
from ppo_train import masked_whiten

LOG_2 = math.log(2)


def test_penalised_rewards_on_numbers():
    mask = torch.tensor([[0.0, 1, 1, 0], [1, 1, 1, 1]])
    logps = torch.tensor([[5.0, -1, -2, 5], [-1, -1, -1, -3]])
    ref_logps = torch.tensor([[-5.0, -2, -1, -5], [-1, -1, -1, -1]])
    rewards = ppo_train.penalised_rewards(torch.tensor([10.0, -4]), logps, ref_logps, mask, kl_coef=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[0, -0.1, 10.1, 0], [0, 0, 0, -3.8]]))


def test_reward_of_the_reference_itself_is_the_score_on_the_last_token():
    batch, scores = ragged((2, 9), (3, 1), (1, 4)), torch.tensor([1.5, -2.0, 0.25])
    logps = torch.randn(batch.mask.shape)
    rewards = ppo_train.penalised_rewards(scores, logps, logps, batch.mask, kl_coef=0.3)
    assert rewards.count_nonzero(1).tolist() == [1, 1, 1]
    assert rewards.gather(1, batch.lengths[:, None] - 2).squeeze(1).tolist() == scores.tolist()


def test_gae_on_numbers():
    expected_advantages, expected_returns = [1.9112, 0.71, 0.5], [2.4112, 1.71, 2.0]  # deltas 1.4, 0.35, 0.5
    row = torch.tensor([[1.0, 0, 2]]), torch.tensor([[0.5, 1, 1.5]]), torch.ones(1, 3)
    advantages, returns = ppo_train.gae(*row, gamma=0.9, lam=0.8)
    assert advantages[0].tolist() == pytest.approx(expected_advantages)
    assert returns[0].tolist() == pytest.approx(expected_returns)
    rewards, values = (F.pad(x, (2, 3), value=junk) for x, junk in zip(row[:2], (50.0, -70.0), strict=True))
    padded = ppo_train.gae(rewards, values, F.pad(row[2], (2, 3)), gamma=0.9, lam=0.8)
    for found, expected in zip(padded, (expected_advantages, expected_returns), strict=True):
        assert found[0].tolist() == pytest.approx([0, 0, *expected, 0, 0, 0])


@float64
def test_without_discount_advantages_are_reward_to_go_minus_value():
    batch = ragged((2, 9), (3, 1), (1, 4))
    rewards, values = torch.randn(batch.mask.shape) * batch.mask, torch.randn(batch.mask.shape)
    advantages, returns = ppo_train.gae(rewards, values, batch.mask, gamma=1.0, lam=1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1) * batch.mask
    assert_same(returns, to_go)
    assert_same(advantages, (to_go - values) * batch.mask)


def test_policy_loss_clips_on_the_side_that_would_be_rewarded():
    ratios, advantages = torch.tensor([[1.5, 1.5, 0.5, 0.5]]), torch.tensor([[1.0, -1, 1, -1]])
    logps = ratios.log().requires_grad_()
    weights = torch.full((1, 4), 0.25)
    loss = policy_loss(logps, torch.zeros(1, 4), advantages, weights, cliprange=0.2)
    assert loss.item() == pytest.approx((-1.2 + 1.5 - 0.5 + 0.8) / 4)
    loss.backward()
    assert logps.grad[0].tolist() == pytest.approx([0, 1.5 / 4, -0.5 / 4, 0])
    stats = ratio_stats(logps, torch.zeros(1, 4), weights, cliprange=0.2)
    assert (stats["clipfrac"].item(), stats["ratio"].item(), stats["ratio_max"].item()) == pytest.approx((1, 1, 1.5))
    assert stats["approx_kl"].item() == pytest.approx((0.5 - math.log(1.5) - 0.5 + LOG_2) / 2)


def test_entropy_bonus_is_the_score_function_of_the_entropy():
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0], requires_grad=True)
    logps = logits.log_softmax(0)
    entropy = -(logps.exp() * logps).sum()
    (expected,) = torch.autograd.grad(entropy, logits, retain_graph=True)
    bonus = entropy_bonus(logps.detach()[:, None], torch.ones(4, 1))[:, 0]  # of a reply of each token
    (found,) = torch.autograd.grad((logps.detach().exp() * bonus * logps).sum(), logits)
    torch.testing.assert_close(found, expected)
    padded = entropy_bonus(torch.tensor([[-1.0, -3.0], [-5.0, -9.0]]), torch.tensor([[1.0, 1], [1, 0]]))
    assert padded.tolist() == [[-2, 0], [2, 0]]


def test_policy_loss_ignores_what_has_no_weight():
    logps, old = torch.tensor([[0.1, 30.0]]), torch.zeros(1, 2)
    weights, ratio = torch.tensor([[1.0, 0]]), pytest.approx(math.exp(0.1))
    assert -policy_loss(logps, old, torch.ones(1, 2), weights, cliprange=0.2).item() == ratio
    stats = ratio_stats(logps, old, weights, cliprange=0.2)
    assert stats["clipfrac"].item() == 0 and stats["ratio"].item() == ratio and stats["ratio_max"].item() == ratio


def test_value_loss_takes_the_larger_error():
    values, old, returns = torch.tensor([[2.0, 1.1, 9.0]]), torch.tensor([[1.0, 1, 0]]), torch.tensor([[3.0, 0, 0]])
    weights = torch.tensor([[0.5, 0.5, 0]])
    loss = ppo_train.value_loss(values, old, returns, weights, cliprange=0.2)
    assert loss.item() == pytest.approx(0.5 * (0.5 * 1.8**2 + 0.5 * 1.1**2))


def test_adapt_kl_coef_moves_towards_the_target_within_bounds():
    found = [ppo_train.adapt_kl_coef(0.5, kl, target=10.0, horizon=50.0) for kl in (10, 11, 1000, 9, -5)]
    assert found == pytest.approx([0.5, 0.5 * 1.02, 0.5 * 1.04, 0.5 * 0.98, 0.5 * 0.96])


@float64
def test_log_probabilities_are_those_that_the_replies_were_sampled_with():
    policy = tiny()
    batch = rollout(policy, PROMPTS, 12, TEMPERATURE, EOS, seed=4)
    sampled = policy.generate(PROMPTS, 12, temperature=TEMPERATURE, eos_id=EOS, seed=4, return_logps=True)
    assert batch.replies == sampled.tokens
    assert batch.ended.tolist() == [reply[-1] == EOS for reply in sampled.tokens]
    found = in_batches(lambda rows: logps_of(policy, rows), batch, 4)
    for row, prompt, logps in zip(found, PROMPTS, sampled.logps, strict=True):
        expected = torch.zeros_like(row)
        expected[len(prompt) - 1 : len(prompt) - 1 + len(logps)] = torch.tensor(logps)
        assert_same(row, expected)
    assert_same(sequence_kl(policy, policy, batch, TEMPERATURE, 3), torch.zeros(6))


@float64
def test_first_minibatch_has_ratio_1_and_the_plain_policy_gradient():
    policy = tiny()
    batch = rollout(policy, PROMPTS, 12, TEMPERATURE, EOS, seed=4)
    old = in_batches(lambda rows: logps_of(policy, rows), batch, 2)
    index = torch.tensor([4, 0, 3])
    rows = batch.rows(index)
    T, weights = rows.mask.size(1), rows.mask / rows.mask.sum()
    advantages = torch.randn(rows.mask.shape) * rows.mask
    logps = logps_of(policy, rows)
    loss = policy_loss(logps, old[index, :T], advantages, weights, cliprange=0.2)
    stats = ratio_stats(logps, old[index, :T], weights, cliprange=0.2)
    assert stats["ratio"].item() == pytest.approx(1, abs=1e-9)
    assert stats["approx_kl"].item() == pytest.approx(0, abs=1e-9)
    assert stats["clipfrac"].item() == 0
    loss.backward()
    clipped = gradients(policy)
    (-(logps_of(policy, rows) * advantages * weights).sum()).backward()
    assert_same(clipped, gradients(policy))


def ppo_batch(seed=0):
    """Replies, and old log-probabilities, values, advantages and returns that the models have since moved from."""
    batch = ragged((4, 3), (2, 12), (9, 1), (3, 6))
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(batch.mask.shape, generator=generator) * batch.mask for _ in range(4)]
    with torch.no_grad():
        logps = in_batches(lambda rows: logps_of(tiny(), rows), batch)
    return batch, (logps + 0.2 * noise[0], *noise[1:])


@float64
@pytest.mark.parametrize("micro_batch_size, padding", [(2, 0), (1, 0), (3, 6), (4, 6)])
def test_ppo_update_does_not_depend_on_micro_batches_or_padding(micro_batch_size, padding):
    policy, value = tiny(), tiny(1, scalar_head=True)
    both = torch.nn.ModuleDict(dict(policy=policy, value=value))
    batch, old = ppo_batch()
    config = dict(
        temperature=TEMPERATURE, ppo_epochs=1, minibatch_size=4, cliprange=0.2, cliprange_value=0.2, vf_coef=0.1
    )

    def updated(batch, old, size):
        found = []
        stage = SimpleNamespace(env=ENV, clip_and_step=lambda step, loss: found.append(gradients(both)) or 1.0)
        order = torch.Generator().manual_seed(5)
        metrics = ppo_train.update(stage, 1, policy, value, batch, old, config | dict(micro_batch_size=size), order)
        return found, metrics

    (whole,), expected = updated(batch, old, 4)
    assert whole.abs().max() > 1e-3 and 0 < expected["clipfrac"] < 1
    mask, ids = F.pad(batch.mask, (0, padding)), F.pad(batch.ids, (0, padding), value=7)
    wider = Rollout(ids, batch.lengths, mask, batch.ended, batch.replies)
    wide_old = tuple(F.pad(x, (0, padding), value=3.0) for x in old)
    (found,), stats = updated(wider, wide_old, micro_batch_size)
    assert_same(found, whole)
    assert stats == pytest.approx(expected, rel=1e-9, abs=1e-9)


@float64
def test_ppo_losses_are_untouched_by_padding_that_is_not_cut_off():
    policy, value = tiny(), tiny(1, scalar_head=True)
    batch, old = ppo_batch()

    def gradient(padding):
        ids, mask = F.pad(batch.ids, (0, padding), value=7), F.pad(batch.mask, (0, padding))
        old_logps, old_values, advantages, returns = (F.pad(x, (0, padding), value=3.0) for x in old)
        weights = mask / mask.sum()
        logps, values = policy.token_logps(ids, TEMPERATURE, mask), value.values(ids)[:, :-1]
        loss = policy_loss(logps, old_logps, advantages, weights, cliprange=0.2)
        (loss + ppo_train.value_loss(values, old_values, returns, weights, cliprange=0.2)).backward()
        return gradients(policy, value)

    assert_same(gradient(6), gradient(0))


@float64
def test_advantages_are_untouched_by_padding():
    batch, (logps, ref_logps, values, _) = ppo_batch()
    scores = torch.tensor([1.0, -1, 0.5, 2])

    def whitened(padding):
        mask = F.pad(batch.mask, (0, padding))
        a, b, v = (F.pad(x, (0, padding), value=3.0) for x in (logps, ref_logps, values))
        rewards = ppo_train.penalised_rewards(scores, a, b, mask, kl_coef=0.1)
        return masked_whiten(ppo_train.gae(rewards, v, mask, gamma=1.0, lam=0.95)[0], mask)

    found, T = whitened(6), batch.mask.size(1)
    assert_same(found[:, :T], whitened(0))
    assert found[:, T:].count_nonzero() == 0


def test_explained_variance_on_numbers():
    returns, mask = torch.tensor([[1.0, 3, 9], [5, 9, 9]]), torch.tensor([[1.0, 1, 0], [1, 0, 0]])
    assert ppo_train.explained_variance(returns, returns, mask) == 1
    assert ppo_train.explained_variance(torch.full((2, 3), 3.0), returns, mask) == pytest.approx(0)
    assert ppo_train.explained_variance(torch.zeros(2, 3), returns, mask) == pytest.approx(1 - 35 / 8)


def test_one_token_bandit_learns_the_tilted_reference():
    config = dict(temperature=1.0, ppo_epochs=2, minibatch_size=480, micro_batch_size=480, vf_coef=0.1)
    config |= dict(cliprange=0.2, cliprange_value=0.2)

    def step_of(stage, policy, batch, scores, logps, ref_logps, generator):
        rewards = ppo_train.penalised_rewards(scores, logps, ref_logps, batch.mask, BETA)
        values = policy.values(batch.ids)[:, :-1].detach()
        advantages, returns = ppo_train.gae(rewards, values, batch.mask, gamma=1.0, lam=0.95)
        old = logps, values, masked_whiten(advantages, batch.mask), returns
        ppo_train.update(stage, 1, policy, policy, batch, old, config, generator)

    play(step_of)


# runs


def test_ppo_needs_no_reward_model_with_a_function(small, tmp_path, own_rewards, capsys):
    options = rl_options(small, tmp_path / "out", reward="length", reward_length="2,30", reward_model=tmp_path / "none")
    ppo_train.main(argv(**options))
    ckpt, (_, first, *_) = checkpoint.load(tmp_path / "out"), metrics(tmp_path / "out")
    assert ckpt.training["extra"]["reward_model"] is None and ckpt.training["extra"]["norm"][0] > 0
    assert (first["ppo/kl"], first["ppo/rlhf_reward"]) == pytest.approx((0, first["ppo/score"]), abs=1e-4)
    assert {"ppo/" + name for name in ("ratio_max", "distinct_2", "explained_variance", "entropy")} <= first.keys()
    trunk, value = checkpoint.load(small / "sft").weights, ckpt.training["extra"]["value"]
    name = "layers.0.attention.wq.weight"
    torch.testing.assert_close(value[name], trunk[name], atol=0.02, rtol=0)  # two steps of 0.003 in four updates
    options |= dict(reward="own_rewards:starts", resume=True, max_steps=3)
    line = failure(capsys, ppo_train.main, argv(**options))
    assert "cannot resume: reward is length in" in line and "own_rewards:starts in this run's config" in line


def test_a_run_on_model_and_function_remembers_both(small, tmp_path, own_rewards, capsys):
    shutil.copytree(small / "rm", tmp_path / "rm")
    options = rl_options(small, tmp_path / "out", reward="model+own_rewards:odd", rule_weight=3.0)
    options["reward_model"] = tmp_path / "rm"
    ppo_train.main(argv(**options))
    extra = checkpoint.load(tmp_path / "out").training["extra"]
    assert extra["reward_model"]["path"] == str(tmp_path / "rm" / "ckpt.pt")
    assert extra["reward_function"]["path"] == str(tmp_path / "own_rewards.py")
    with open(tmp_path / "own_rewards.py", "a") as file:
        file.write("# changed\n")
    capsys.readouterr()
    ppo_train.main(argv(**options | dict(resume=True, max_steps=3)))
    assert "own_rewards.py has changed since this run began" in capsys.readouterr().out
    line = failure(capsys, ppo_train.main, argv(**options | dict(resume=True, max_steps=4, rule_weight=1.0)))
    assert "rule_weight is 3.0 in" in line
    ckpt = checkpoint.load(tmp_path / "rm")
    facts = dict(stage="rm", step=2, tokens_seen=0, config={}, tokenizer=ckpt.tokenizer)
    checkpoint.save(tmp_path / "rm", model=checkpoint.build_model(ckpt), **facts)
    line = failure(capsys, ppo_train.main, argv(**options | dict(resume=True)))
    assert "it started from" in line and "rm/ckpt.pt" in line


def test_a_run_from_before_rewards_goes_on_with_its_reward_model_only(small, tmp_path):
    config = ppo_train.parse_config("ppo_train", argv(**rl_options(small, tmp_path)), "")
    old = {key: value for key, value in config.items() if key not in ("reward", "reward_length")}
    ckpt = checkpoint.load(small / "sft")
    facts = dict(stage="ppo", step=1, tokens_seen=1, tokenizer=ckpt.tokenizer, extra={})
    checkpoint.save(tmp_path, model=checkpoint.build_model(ckpt), config=old, **facts)
    assert resume.begin(config | dict(resume=True), "ppo").step == 1
    with pytest.raises(checkpoint.CheckpointError, match="reward is model in .* and length in this run's config"):
        resume.begin(config | dict(resume=True, reward="length"), "ppo")
