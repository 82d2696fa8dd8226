"""PPO on a reward model, as in InstructGPT (arXiv:2203.02155) with the details of Huang et al. (arXiv:2403.17031).

A step has five phases: (1) the policy answers prompts, (2) the reward model scores each reply at its last real token,
(3) every token is penalised for leaving the reference, (4) generalised advantage estimation, (5) clipped updates of the
policy and of a separate value model in minibatches. Departures: scores are normalised on replies of the reference, the
value model has the reward model's trunk under a head of zeros, and a reply that never ends gets a fixed score.
Reads data/<name>/prompts.pkl, an SFT checkpoint and a reward model; writes a run directory.

    python ppo_train.py configs/demo/ppo.py --kl_coef=0.1
"""

import hashlib
from functools import partial
from pathlib import Path

import torch

from common import checkpoint
from common.config import UserError, parse_config, run
from common.metrics import distinct_2
from common.optim import build_optimizer, learning_rate, set_learning_rate
from common.rollout import in_batches, masked_mean, masked_whiten, rollout, sequence_kl, sequence_scores
from common.stage import Stage
from dataset import BatchOrder, load_prompts

PANELS = [
    ("normalised score", ["ppo/score", "val/score"]),
    ("KL to the reference (nats per reply)", ["ppo/kl", "val/kl"]),
    ("reply length (tokens)", ["ppo/length", "val/length"]),
    ("share of replies that end", ["ppo/eos_rate", "val/eos_rate"]),
    ("clipped share of tokens", ["ppo/clipfrac"]),
    ("explained variance of returns", ["ppo/explained_variance"]),
]


def penalised_rewards(scores, logps, ref_logps, mask, kl_coef):
    """-kl_coef * (logp - ref_logp) on each reply token, plus the score once, on the last: scores (B,), rest (B, T)."""
    rewards = -kl_coef * (logps - ref_logps) * mask
    last = (mask * torch.arange(1, mask.size(1) + 1, device=mask.device)).argmax(1)  # (B,) last place where mask is 1
    return rewards.scatter_add(1, last[:, None], scores[:, None])


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation (Schulman et al., arXiv:1506.02438, eq. 16) over each row's run of mask = 1.

    All (B, T). Returns advantages and returns = advantages + values; the value after the last token is 0.
    """
    advantages, running = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(running)
    for t in reversed(range(rewards.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = (delta + gamma * lam * running) * mask[:, t]
        advantages[:, t] = running
        next_value = values[:, t] * mask[:, t]
    return advantages, (advantages + values) * mask


def policy_loss(logps, old_logps, advantages, weights, cliprange):
    """PPO's clipped surrogate (Schulman et al., arXiv:1707.06347, eq. 7), negated; all (B, T).

    weights are mask / (real tokens of the whole minibatch), so that micro-batches add up. Returns the loss and, by
    name, sums with the same weights: approx_kl (k3), clipfrac, ratio.
    """
    log_ratio = logps - old_logps
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange)
    loss = (torch.max(-advantages * ratio, -advantages * clipped) * weights).sum()
    with torch.no_grad():
        stats = {
            "approx_kl": ((ratio - 1 - log_ratio) * weights).sum(),
            "clipfrac": (((ratio - 1).abs() > cliprange) * weights).sum(),
            "ratio": (ratio * weights).sum(),
        }
    return loss, stats


def value_loss(values, old_values, returns, weights, cliprange):
    """Half the squared error, the larger of the plain and the clipped value's; all (B, T), weights as above."""
    clipped = old_values + (values - old_values).clamp(-cliprange, cliprange)
    error = torch.max((values - returns).square(), (clipped - returns).square())
    return 0.5 * (error * weights).sum()


def adapt_kl_coef(kl_coef, kl, target, horizon):
    """Ziegler et al. (arXiv:1909.08593, section 2.2): raise the weight where KL is above the target, lower it below."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * 10 / horizon)


def final_scores(raw_scores, ended, norm, no_eos_score):
    """Scores in standard deviations of the reference's; replies without <eos> get no_eos_score: (B,)."""
    mean, std = norm
    return torch.where(ended, (raw_scores - mean) / std, torch.full_like(raw_scores, no_eos_score))


def load_reward_model(path, policy):
    """A checkpoint with a scalar head that reads the policy's tokens."""
    ckpt = checkpoint.load(path)
    checkpoint.refuse_quantized(ckpt)
    if not ckpt.model_config["scalar_head"]:
        raise UserError(f"{ckpt.path} (stage {ckpt.stage}) has no scalar head: reward_model wants a run of rm_train.py")
    if ckpt.tokenizer != policy.tokenizer:
        here, there = (hashlib.sha256(c.tokenizer).hexdigest()[:16] for c in (ckpt, policy))
        raise UserError(f"tokenizer {here} in {ckpt.path}, {there} in {policy.path}: they must be the same")
    return ckpt


def score_rows(reward_model, rows):
    return sequence_scores(reward_model, rows.ids, rows.lengths)


def evaluate(policy, reference, reward_model, prompts, norm, tokenizer, config):
    """Score, KL, length, eos rate and distinct-2 of replies to held-out prompts, and some of the replies."""
    batch = rollout(policy, prompts, config["max_new_tokens"], config["temperature"], tokenizer.eos_id, config["seed"])
    raw = in_batches(partial(score_rows, reward_model), batch, config["micro_batch_size"])
    texts = [tokenizer.decode(reply) for reply in batch.replies]
    metrics = {
        "val/score": final_scores(raw, batch.ended, norm, config["no_eos_score"]).mean().item(),
        "val/kl": sequence_kl(policy, reference, batch, config["temperature"]).mean().item(),
        "val/length": batch.mask.sum(1).mean().item(),
        "val/eos_rate": batch.ended.float().mean().item(),
        "val/distinct_2": distinct_2(texts, sum(map(len, texts))),
    }
    return metrics, [(tokenizer.decode(p), text) for p, text in zip(prompts, texts, strict=True)][:8]


def update(stage, step, policy, value, batch, old, config, generator):
    """Phase 5: ppo_epochs passes over the replies in shuffled minibatches; returns the metrics' means over updates.

    old holds logps, values, advantages, returns, each (B, T-1).
    """
    temperature, updates = config["temperature"], []
    for _ in range(config["ppo_epochs"]):
        for minibatch in torch.randperm(len(batch.ids), generator=generator).split(config["minibatch_size"]):
            total = batch.mask[minibatch].sum()
            stats, loss = {}, 0.0
            for micro in minibatch.split(config["micro_batch_size"]):
                rows = batch.rows(micro)
                T = rows.mask.size(1)
                logps0, values0, advantages, returns = (x[micro, :T] for x in old)
                weights = rows.mask / total
                with stage.env.autocast():
                    logps = policy.token_logps(rows.ids, temperature, rows.mask)
                    values = value.values(rows.ids)[:, :-1]
                pg_loss, parts = policy_loss(logps, logps0, advantages, weights, config["cliprange"])
                vf_loss = value_loss(values, values0, returns, weights, config["cliprange_value"])
                micro_loss = pg_loss + config["vf_coef"] * vf_loss
                micro_loss.backward()
                loss += micro_loss.item()
                parts |= {"policy_loss": pg_loss.detach(), "value_loss": vf_loss.detach()}
                stats = {name: stats.get(name, 0.0) + part.item() for name, part in parts.items()}
            stats["grad_norm"] = stage.update(step, loss)
            updates.append(stats)
    return {f"ppo/{name}": sum(u[name] for u in updates) / len(updates) for name in updates[0]}


def rollout_metrics(batch, scores, logps, ref_logps, values, returns, kl_coef):
    """What the replies of a step were like before its updates; means over real tokens or over replies."""
    kl = ((logps - ref_logps) * batch.mask).sum(1).mean().item()
    residual = masked_mean((returns - values).square(), batch.mask)
    variance = masked_mean((returns - masked_mean(returns, batch.mask)).square(), batch.mask)
    return {
        "ppo/score": scores.mean().item(),
        "ppo/rlhf_reward": scores.mean().item() - kl_coef * kl,
        "ppo/kl": kl,
        "ppo/kl_coef": kl_coef,
        "ppo/entropy": -masked_mean(logps, batch.mask).item(),  # nats per token, estimated on its own samples
        "ppo/explained_variance": 1 - (residual / variance).item(),
        "ppo/length": batch.mask.sum(1).mean().item(),
        "ppo/eos_rate": batch.ended.float().mean().item(),
    }


def main(argv=None):
    config = parse_config("ppo_train", argv, __doc__)
    stage = Stage("ppo", config, PANELS)
    if stage.finished:
        return
    env = stage.env
    if env.world_size > 1:
        raise UserError("ppo_train.py runs in one process: start it without torchrun")
    parent, tokenizer = stage.load_parent()
    reward_ckpt = load_reward_model(config["reward_model"], parent)
    train, held_out = load_prompts(Path(config["data"]) / "prompts.pkl", tokenizer.vocab_size)
    eos_id, held_out = tokenizer.eos_id, held_out[: config["eval_prompts"]]

    policy, reference = (checkpoint.build_model(parent).to(env.device) for _ in range(2))
    reward_model, value = (checkpoint.build_model(reward_ckpt).to(env.device) for _ in range(2))
    for frozen in (reference, reward_model):
        frozen.eval().requires_grad_(False)
    torch.nn.init.zeros_(value.scalar.weight)  # normalised scores have mean 0 on the reference: so does the first value
    both = torch.nn.ModuleDict({"policy": policy, "value": value})
    both.eval()  # no dropout: a ratio must compare the policy with itself
    optimizer = build_optimizer(both, config)
    stage.start(policy, optimizer, tokenizer, parent, trained=both)
    sample = partial(rollout, max_new_tokens=config["max_new_tokens"], temperature=config["temperature"], eos_id=eos_id)

    def logps_of(model, rows):
        with env.autocast():  # as in the updates, so that the first ratio is 1 in bfloat16 too
            return model.token_logps(rows.ids, config["temperature"], rows.mask)

    def values_of(rows):
        with env.autocast():
            return value.values(rows.ids)[:, :-1]

    batched = partial(in_batches, batch_size=config["micro_batch_size"])
    score = partial(batched, partial(score_rows, reward_model))
    judge = checkpoint.parent_of(reward_ckpt)
    if stage.resumed:
        extra = stage.resumed.training["extra"]
        checkpoint.same_file(stage.resumed, extra["reward_model"], judge)
        value.load_state_dict(extra["value"])
        kl_coef, norm = extra["kl_coef"], extra["norm"]
    else:
        raw = score(sample(reference, train[: config["norm_prompts"]], seed=config["seed"]))
        kl_coef, norm = config["kl_coef"], [raw.mean().item(), raw.std().item()]
    print(f"{len(train):,} training and {len(held_out):,} held-out prompts; "
          f"reference scores {norm[0]:.3f} +- {norm[1]:.3f}")  # fmt: skip
    order = BatchOrder(len(train), config["rollout_size"], config["seed"])

    with stage.interrupt:
        for step in range(stage.first, config["max_steps"] + 1):
            lr = set_learning_rate(optimizer, learning_rate(step, config))
            if stage.due(step, "eval_interval"):
                stage.report(step, *evaluate(policy, reference, reward_model, held_out, norm, tokenizer, config))
            if stage.due(step, "save_interval"):
                stage.extra = dict(value=value.state_dict(), kl_coef=kl_coef, norm=norm, reward_model=judge)
                stage.save(step)
            if stage.ends(step):
                break

            # 1. rollout
            seed = config["seed"] * 1_000_003 + step
            batch = sample(policy, [train[i] for i in order[step]], seed=seed)
            # 2. score
            scores = final_scores(score(batch), batch.ended, norm, config["no_eos_score"])  # (B,)
            # 3. penalised rewards
            logps, ref_logps = (batched(partial(logps_of, model), batch) for model in (policy, reference))  # (B, T-1)
            rewards = penalised_rewards(scores, logps, ref_logps, batch.mask, kl_coef)
            # 4. advantages
            values = batched(values_of, batch) * batch.mask
            advantages, returns = gae(rewards, values, batch.mask, config["gamma"], config["lam"])
            advantages = masked_whiten(advantages, batch.mask)
            # 5. updates
            generator = torch.Generator().manual_seed(seed)
            metrics = update(stage, step, policy, value, batch, (logps, values, advantages, returns), config, generator)

            metrics |= rollout_metrics(batch, scores, logps, ref_logps, values, returns, kl_coef)
            if config["kl_target"] > 0:
                kl_coef = adapt_kl_coef(kl_coef, metrics["ppo/kl"], config["kl_target"], config["kl_horizon"])
            metrics["train/learning_rate"] = lr
            stage.log(step + 1, int(batch.lengths.sum()), metrics, shown=("ppo/score", "ppo/kl"))
    stage.close()


if __name__ == "__main__":
    run(main)
