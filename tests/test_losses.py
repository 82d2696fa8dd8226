"""The losses and estimators of SFT, RM, DPO and PPO: hand-computed numbers, and what must not change them."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from packing import pack_examples

import dpo_train
import ppo_train
import rm_train
import sft
from common.distributed import Env
from common.rollout import Rollout, in_batches, masked_mean, masked_whiten, rollout, sequence_kl, sequence_scores
from dataset import Examples, pad_batch
from model import Llama, ModelConfig
from tokenizer import Example

ENV = Env(0, 1, torch.device("cpu"))
VOCAB, EOS, TEMPERATURE = 40, 2, 0.7
LOG_2 = math.log(2)


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    shape = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=VOCAB, max_seq_len=32)
    model = Llama(ModelConfig(**shape | changes))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(std=0.15)  # at 0.02 every distribution is flat and every comparison easy
    return model


def conversations(*sizes, seed=0):
    """[(ids, loss_mask)]: prompts and answers of the given (question, answer) lengths."""
    rng = np.random.default_rng(seed)
    return [(rng.integers(3, VOCAB, q + a).tolist(), [0] * q + [1] * a) for q, a in sizes]


def gradients(*models):
    """Every gradient, flat; the models are left without."""
    flat = torch.cat([p.grad.flatten() for model in models for p in model.parameters()])
    for model in models:
        model.zero_grad()
    return flat


def widen(batch, n):
    """A padded batch with n more columns of padding, which are no zeros."""
    wider = {"ids": F.pad(batch["ids"], (0, n), value=7), "loss_mask": F.pad(batch["loss_mask"], (0, n))}
    return batch | wider


# SFT


def test_loss_weights():
    mask = torch.tensor([[0.0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    assert torch.equal(sft.loss_weights(mask, "token"), mask)
    each = torch.tensor([[0.0, 0.5, 0.5, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    assert torch.equal(sft.loss_weights(mask, "example"), each)


@pytest.mark.parametrize("example_weight", ["token", "example"])
def test_sft_gradient_does_not_depend_on_micro_batches_or_padding(example_weight):
    model, rows = tiny(), conversations((4, 3), (2, 12), (9, 1), (3, 6))

    def gradient(parts, padding=0):
        batches = [widen(pad_batch(part), padding) for part in parts]
        weights = [sft.loss_weights(batch["loss_mask"], example_weight) for batch in batches]
        total = sum(w[:, 1:].sum() for w in weights)
        for batch, w in zip(batches, weights, strict=True):
            sft.answer_loss(model, batch, w / total).backward()
        return gradients(model)

    whole = gradient([rows])
    assert whole.abs().max() > 1e-3
    for parts, padding in (
        ([rows[:2], rows[2:]], 0),
        ([[row] for row in rows], 0),
        ([rows], 6),
        ([rows[:3], rows[3:]], 6),
    ):
        torch.testing.assert_close(gradient(parts, padding), whole, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_answer_loss_counts_answer_tokens_and_nothing_else():
    model, rows = tiny(), conversations((4, 3), (2, 5))
    batch = pad_batch(rows)
    nats = 0.0
    for ids, mask in rows:
        logps = model(torch.tensor([ids])).log_softmax(-1)[0]
        nats -= sum(logps[t - 1, ids[t]].item() for t in range(len(ids)) if mask[t])
    assert sft.answer_loss(model, batch, batch["loss_mask"]).item() == pytest.approx(nats, rel=1e-5)


def test_sft_question_is_what_stands_before_the_first_answer():
    ids, mask = np.array([5, 6, 1, 7, 2, 8, 1, 9, 2]), np.array([0, 0, 0, 1, 1, 0, 0, 1, 1])
    assert sft.question(ids, mask) == [5, 6, 1]


# reward model


def test_reward_loss():
    loss = rm_train.reward_loss(torch.tensor([1.0, 0.0, 5.0]), torch.tensor([0.0, 2.0, 5.0]))
    assert loss.tolist() == pytest.approx([0.3132617, 2.1269280, LOG_2])


@torch.no_grad()
def test_sequence_scores_reads_the_last_real_token_whatever_the_padding():
    model, rows = tiny(scalar_head=True), conversations((4, 3), (2, 12), (9, 1))
    rows[0] = (rows[0][0][:-1] + [0], rows[0][1])  # a last token with the id of the padding
    alone = torch.cat([model.values(torch.tensor([ids]))[:, -1] for ids, _ in rows])
    for padding in (0, 7):
        batch = widen(pad_batch(rows), padding)
        torch.testing.assert_close(sequence_scores(model, batch["ids"], batch["lengths"]), alone, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_pair_scores_keeps_the_sides_apart():
    model, chosen, rejected = (
        tiny(scalar_head=True),
        conversations((4, 3), (2, 5)),
        conversations((3, 9), (1, 2), seed=1),
    )
    scores = rm_train.pair_scores(model, chosen, rejected, [1, 0], ENV)
    for side, score in zip((chosen, rejected), scores, strict=True):
        alone = torch.cat([model.values(torch.tensor([side[i][0]]))[:, -1] for i in (1, 0)])
        torch.testing.assert_close(score, alone, atol=1e-6, rtol=1e-5)


def examples(rows):
    return Examples(pack_examples([Example(*row) for row in rows], VOCAB))


def test_reward_evaluation_counts_right_pairs_and_longer_answers():
    model = tiny(scalar_head=True)
    chosen, rejected = conversations((4, 6), (4, 2), (4, 3)), conversations((4, 5), (4, 4), (4, 3), seed=1)
    with torch.no_grad():
        scores = rm_train.pair_scores(model, chosen, rejected, range(3), ENV)
    metrics = rm_train.evaluate(model, examples(chosen), examples(rejected), ENV, 3)
    assert metrics["val/accuracy"] == pytest.approx((scores[0] > scores[1]).float().mean().item())
    assert metrics["val/loss"] == pytest.approx(rm_train.reward_loss(*scores).mean().item())
    assert metrics["val/longer_wins"] == pytest.approx(1.5 / 3)  # one longer, one shorter, one alike
    assert metrics["val/accuracy_low"] < metrics["val/accuracy"] < metrics["val/accuracy_high"]
    assert model.training


# DPO


def test_dpo_loss_on_numbers():
    logps = [torch.tensor(x) for x in ([-1.0, -4.0], [-3.0, -2.0], [-2.0, -2.0], [-2.0, -1.0])]
    loss, chosen, rejected = dpo_train.dpo_loss(*logps, beta=0.5)
    assert chosen.tolist() == [0.5, -1.0] and rejected.tolist() == [-0.5, -0.5]
    assert loss.tolist() == pytest.approx([0.3132617, 0.9740770])  # log(1 + e^-1), log(1 + e^0.5)


def test_dpo_starts_at_log_2_and_pulls_the_pair_apart():
    chosen, rejected = torch.tensor([-3.0, -7.0], requires_grad=True), torch.tensor([-5.0, -1.0], requires_grad=True)
    loss, *rewards = dpo_train.dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), beta=0.3)
    assert loss.tolist() == pytest.approx([LOG_2] * 2)
    assert (rewards[0] - rewards[1]).tolist() == [0, 0]
    loss.sum().backward()
    assert chosen.grad.tolist() == pytest.approx([-0.15] * 2)  # -beta / 2
    assert rejected.grad.tolist() == pytest.approx([0.15] * 2)


@torch.no_grad()
def test_dpo_sums_the_answer_tokens_of_each_side():
    model, chosen, rejected = tiny(), conversations((4, 3), (2, 5)), conversations((3, 9), (1, 2), seed=1)
    *logps, chosen_tokens = dpo_train.pair_logps(model, chosen, rejected, [1, 0], ENV)
    assert chosen_tokens.tolist() == [5, 3]
    for side, found in zip((chosen, rejected), logps, strict=True):
        for (ids, mask), logp in zip((side[1], side[0]), found, strict=True):
            token_logps = model(torch.tensor([ids])).log_softmax(-1)[0]
            alone = sum(token_logps[t - 1, ids[t]].item() for t in range(len(ids)) if mask[t])
            assert logp.item() == pytest.approx(alone, rel=1e-5)


@torch.no_grad()
def test_dpo_reference_logps_stand_in_the_order_of_the_pairs():
    sizes = np.random.default_rng(3).integers(1, 9, (130, 2))
    model, chosen, rejected = tiny(), conversations(*sizes), conversations(*sizes[::-1], seed=1)
    found = dpo_train.reference_logps(model, examples(chosen), examples(rejected), ENV)
    expected = torch.stack(dpo_train.pair_logps(model, chosen, rejected, range(130), ENV)[:2], 1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    loss, better, worse = dpo_train.dpo_loss(*expected.unbind(1), *found.unbind(1), beta=0.1)
    torch.testing.assert_close(loss, torch.full((130,), LOG_2), atol=1e-4, rtol=0)
    torch.testing.assert_close(better, worse, atol=1e-4, rtol=0)


# masked arithmetic and batches


def test_masked_mean_and_whiten_ignore_padding():
    x, mask = torch.tensor([[9e9, 1.0, 2, -9e9], [3, 6, 9e9, 9e9]]), torch.tensor([[0.0, 1, 1, 0], [1, 1, 0, 0]])
    assert masked_mean(x, mask).item() == 3
    white = masked_whiten(x, mask)  # deviations -2, -1, 0, 3 and variance 3.5
    expected = torch.tensor([[0, -2.0, -1, 0], [0, 3, 0, 0]]) / math.sqrt(3.5)
    torch.testing.assert_close(white, expected)
    torch.testing.assert_close(masked_whiten(F.pad(x, (0, 3), value=5.0), F.pad(mask, (0, 3)))[:, :4], white)


def ragged(*sizes, seed=0):
    rows = conversations(*sizes, seed=seed)
    batch = pad_batch(rows)
    replies = [ids[len(mask) - sum(mask) :] for ids, mask in rows]
    ended = torch.tensor([reply[-1] == EOS for reply in replies])
    return Rollout(batch["ids"], batch["lengths"], batch["loss_mask"][:, 1:], ended, replies)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_in_batches_restores_the_order_and_the_width(batch_size):
    batch, widths = ragged((2, 9), (3, 1), (1, 4), (8, 2), (2, 3)), []

    def next_tokens(rows):
        widths.append(rows.ids.size(1))
        assert rows.ids.shape == (len(rows.replies), int(rows.lengths.max()))
        return rows.ids[:, 1:] * rows.mask

    assert torch.equal(in_batches(next_tokens, batch, batch_size), batch.ids[:, 1:] * batch.mask)
    assert sorted(widths) == widths and widths[-1] == 11
    assert torch.equal(in_batches(lambda rows: rows.lengths, batch, batch_size), batch.lengths)


def test_rows_picks_the_replies_too():
    batch = ragged((2, 9), (3, 1), (1, 4))
    rows = batch.rows(torch.tensor([2, 1]))
    assert rows.replies == [batch.replies[2], batch.replies[1]]
    assert rows.ids.shape == (2, 5) and rows.mask.sum(1).tolist() == [4, 1]
    assert rows.ids[0].tolist() == batch.ids[2, :5].tolist() and rows.lengths.tolist() == [5, 4]


# PPO


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


def test_without_discount_advantages_are_reward_to_go_minus_value():
    batch = ragged((2, 9), (3, 1), (1, 4))
    rewards, values = torch.randn(batch.mask.shape) * batch.mask, torch.randn(batch.mask.shape)
    advantages, returns = ppo_train.gae(rewards, values, batch.mask, gamma=1.0, lam=1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1) * batch.mask
    torch.testing.assert_close(returns, to_go)
    torch.testing.assert_close(advantages, (to_go - values) * batch.mask)


def test_policy_loss_clips_on_the_side_that_would_be_rewarded():
    ratios, advantages = torch.tensor([[1.5, 1.5, 0.5, 0.5]]), torch.tensor([[1.0, -1, 1, -1]])
    logps = ratios.log().requires_grad_()
    loss, stats = ppo_train.policy_loss(logps, torch.zeros(1, 4), advantages, torch.full((1, 4), 0.25), cliprange=0.2)
    assert loss.item() == pytest.approx((-1.2 + 1.5 - 0.5 + 0.8) / 4)
    loss.backward()
    assert logps.grad[0].tolist() == pytest.approx([0, 1.5 / 4, -0.5 / 4, 0])
    assert stats["clipfrac"].item() == 1 and stats["ratio"].item() == 1
    assert stats["approx_kl"].item() == pytest.approx((0.5 - math.log(1.5) - 0.5 + LOG_2) / 2)


def test_policy_loss_ignores_what_has_no_weight():
    logps, old = torch.tensor([[0.1, 30.0]]), torch.zeros(1, 2)
    loss, stats = ppo_train.policy_loss(logps, old, torch.ones(1, 2), torch.tensor([[1.0, 0]]), cliprange=0.2)
    assert loss.item() == pytest.approx(-math.exp(0.1))
    assert stats["clipfrac"].item() == 0 and stats["ratio"].item() == pytest.approx(math.exp(0.1))


def test_value_loss_takes_the_larger_error():
    values, old, returns = torch.tensor([[2.0, 1.1, 9.0]]), torch.tensor([[1.0, 1, 0]]), torch.tensor([[3.0, 0, 0]])
    weights = torch.tensor([[0.5, 0.5, 0]])
    loss = ppo_train.value_loss(values, old, returns, weights, cliprange=0.2)
    assert loss.item() == pytest.approx(0.5 * (0.5 * 1.8**2 + 0.5 * 1.1**2))


def test_final_scores_are_normalised_and_unended_replies_get_theirs():
    scores = ppo_train.final_scores(torch.tensor([3.0, 8.0, 0.0]), torch.tensor([True, False, True]), [1.0, 2.0], -3.0)
    assert scores.tolist() == [1, -3, -0.5]


def test_adapt_kl_coef_moves_towards_the_target_within_bounds():
    found = [ppo_train.adapt_kl_coef(0.5, kl, target=10.0, horizon=50.0) for kl in (10, 11, 1000, 9, -5)]
    assert found == pytest.approx([0.5, 0.5 * 1.02, 0.5 * 1.04, 0.5 * 0.98, 0.5 * 0.96])


PROMPTS = [[5, 6, 1], [7, 1], [8, 9, 10, 11, 1], [12, 13, 14, 1], [15, 1], [16, 17, 1]]


def logps_of(model, rows):
    return model.token_logps(rows.ids, TEMPERATURE, rows.mask)


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
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sequence_kl(policy, policy, batch, TEMPERATURE, 3), torch.zeros(6), atol=1e-5, rtol=0)


def test_first_minibatch_has_ratio_1_and_the_plain_policy_gradient():
    policy = tiny()
    batch = rollout(policy, PROMPTS, 12, TEMPERATURE, EOS, seed=4)
    old = in_batches(lambda rows: logps_of(policy, rows), batch, 2)
    index = torch.tensor([4, 0, 3])
    rows = batch.rows(index)
    T, weights = rows.mask.size(1), rows.mask / rows.mask.sum()
    advantages = torch.randn(rows.mask.shape) * rows.mask
    loss, stats = ppo_train.policy_loss(logps_of(policy, rows), old[index, :T], advantages, weights, cliprange=0.2)
    assert stats["ratio"].item() == pytest.approx(1, abs=1e-5)
    assert stats["approx_kl"].item() == pytest.approx(0, abs=1e-6)
    assert stats["clipfrac"].item() == 0
    loss.backward()
    clipped = gradients(policy)
    (-(logps_of(policy, rows) * advantages * weights).sum()).backward()
    torch.testing.assert_close(clipped, gradients(policy), atol=1e-6, rtol=1e-4)


def ppo_batch(seed=0):
    """Replies, and old log-probabilities, values, advantages and returns that the models have since moved from."""
    batch = ragged((4, 3), (2, 12), (9, 1), (3, 6))
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(batch.mask.shape, generator=generator) * batch.mask for _ in range(4)]
    with torch.no_grad():
        logps = in_batches(lambda rows: logps_of(tiny(), rows), batch)
    return batch, (logps + 0.2 * noise[0], *noise[1:])


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
        stage = SimpleNamespace(env=ENV, update=lambda step, loss: found.append(gradients(both)) or 1.0)
        order = torch.Generator().manual_seed(5)
        metrics = ppo_train.update(stage, 1, policy, value, batch, old, config | dict(micro_batch_size=size), order)
        return found, metrics

    (whole,), expected = updated(batch, old, 4)
    assert whole.abs().max() > 1e-3 and 0 < expected["ppo/clipfrac"] < 1
    mask, ids = F.pad(batch.mask, (0, padding)), F.pad(batch.ids, (0, padding), value=7)
    wider = Rollout(ids, batch.lengths, mask, batch.ended, batch.replies)
    wide_old = tuple(F.pad(x, (0, padding), value=3.0) for x in old)
    (found,), metrics = updated(wider, wide_old, micro_batch_size)
    torch.testing.assert_close(found, whole, atol=1e-6, rtol=1e-4)
    assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_ppo_losses_are_untouched_by_padding_that_is_not_cut_off():
    policy, value = tiny(), tiny(1, scalar_head=True)
    batch, old = ppo_batch()

    def gradient(padding):
        ids, mask = F.pad(batch.ids, (0, padding), value=7), F.pad(batch.mask, (0, padding))
        old_logps, old_values, advantages, returns = (F.pad(x, (0, padding), value=3.0) for x in old)
        weights = mask / mask.sum()
        logps, values = policy.token_logps(ids, TEMPERATURE, mask), value.values(ids)[:, :-1]
        loss, _ = ppo_train.policy_loss(logps, old_logps, advantages, weights, cliprange=0.2)
        (loss + ppo_train.value_loss(values, old_values, returns, weights, cliprange=0.2)).backward()
        return gradients(policy, value)

    torch.testing.assert_close(gradient(6), gradient(0), atol=1e-6, rtol=1e-4)


def test_advantages_are_untouched_by_padding():
    batch, (logps, ref_logps, values, _) = ppo_batch()
    scores = torch.tensor([1.0, -1, 0.5, 2])

    def whitened(padding):
        mask = F.pad(batch.mask, (0, padding))
        a, b, v = (F.pad(x, (0, padding), value=3.0) for x in (logps, ref_logps, values))
        rewards = ppo_train.penalised_rewards(scores, a, b, mask, kl_coef=0.1)
        return masked_whiten(ppo_train.gae(rewards, v, mask, gamma=1.0, lam=0.95)[0], mask)

    found, T = whitened(6), batch.mask.size(1)
    torch.testing.assert_close(found[:, :T], whitened(0))
    assert found[:, T:].count_nonzero() == 0


def test_one_token_bandit_learns_the_tilted_reference():
    """The optimum of E[score] - beta KL is ref * exp(score / beta) / Z; every action is weighed by its probability."""
    scores, beta = torch.tensor([1.0, 0.0, -1.0, 0.5, 0.8]), 0.5
    ref_logps = torch.tensor([-2.0, 0.5, 1.0, 0.0, -1.0]).log_softmax(0)
    logits, mask = ref_logps.clone().requires_grad_(), torch.ones(5, 1)  # a row per action, each of one token
    optimizer = torch.optim.Adam([logits], lr=0.02)
    for _ in range(600):
        old = logits.detach().log_softmax(0)
        rewards = ppo_train.penalised_rewards(scores, old[:, None], ref_logps[:, None], mask, beta)
        advantages, _ = ppo_train.gae(rewards, torch.zeros(5, 1), mask, gamma=1.0, lam=1.0)
        for _ in range(2):  # as with ppo_epochs=2, the second pass has left ratio 1
            logps = logits.log_softmax(0)[:, None]
            loss, _ = ppo_train.policy_loss(logps, old[:, None], advantages, old.exp()[:, None], cliprange=0.2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    expected = (ref_logps + scores / beta).softmax(0)
    torch.testing.assert_close(logits.detach().softmax(0), expected, rtol=0.03, atol=0)
    assert (expected / ref_logps.exp()).max() > 2
