"""PPO on a reward model, as in InstructGPT (arXiv:2203.02155) with the details of Huang et al. (arXiv:2403.17031).

A step has five phases: (1) the policy answers prompts, (2) each reply is scored, by the reward model at its last real
token or by the function that `reward` names, (3) every token is penalised for leaving the reference, (4) generalised
advantage estimation, (5) clipped updates of the policy and of a separate value model in minibatches. Departures: scores
are normalised on replies of the reference, the value model has the reward model's trunk (where there is none, the
policy's) under a head of zeros, and a reply that never ends gets a fixed score.
Reads data/<name>/prompts.pkl, an SFT checkpoint and maybe a reward model; writes a run directory.

    python ppo_train.py configs/demo/ppo.py --kl_coef=0.1
"""

import common.early  # noqa: F401 - before what takes seconds to import

from pathlib import Path

import torch
import torch.nn.functional as F

from alignment.objective import add_up, average, entropy_bonus, masked_mean, policy_loss, ratio_stats
from alignment.rewards import Reward, evaluate_policy
from alignment.rollout import Watch, in_batches, reply_logps, reply_metrics, rollout
from alignment.tradeoff import plot_score_kl
from common import checkpoint, distributed
from common.config import ConfigError, parse_config, run
from common.optim import build_optimizer, learning_rate, set_learning_rate
from common.stage import Stage
from dataset.batches import BatchOrder, load_prompts, move

PANELS = [
    ("normalised score", ["ppo/score", "val/score"]),
    ("KL to the reference (nats per reply)", ["ppo/kl", "val/kl"]),
    ("reply length (tokens)", ["ppo/length", "val/length"]),
    ("share of replies that end", ["ppo/eos_rate", "val/eos_rate"]),
    ("clipped share of tokens", ["ppo/clipfrac"]),
    ("explained variance of returns", ["ppo/explained_variance"]),
    ("distinct character bigrams (share)", ["ppo/distinct_2", "val/distinct_2"]),
    ("entropy (nats per token)", ["ppo/entropy"]),
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
    next_values = F.pad((values * mask)[:, 1:], (0, 1))
    advantages, span = (rewards + gamma * next_values - values) * mask, 1
    while span < mask.size(1):  # each holds the discounted sum of `span` terms, and takes those of the next span on
        advantages = advantages + (gamma * lam) ** span * F.pad(advantages[:, span:], (0, span))
        span *= 2
    advantages = advantages * mask
    return advantages, (advantages + values) * mask


def masked_whiten(x, mask, env=None):
    """x with mean 0 and variance 1 over the entries where mask is 1, with env of all ranks; zero elsewhere."""
    centred = (x - masked_mean(x, mask, env)) * mask
    return centred * torch.rsqrt(masked_mean(centred.square(), mask, env) + 1e-8)


def reply_values(model, batch, env, config):
    """The value model's expectation at each reply token, before it is chosen: (B, T-1)."""

    def values(rows):
        with env.autocast():
            return model.values(rows.ids)[:, :-1] * rows.mask

    return in_batches(values, batch, config["micro_batch_size"])


def explained_variance(values, returns, mask, env=None):
    """The share of the variance of returns over real tokens that the values tell beforehand; 1 is all, 0 none."""
    residual = masked_mean((returns - values).square(), mask, env)
    variance = masked_mean((returns - masked_mean(returns, mask, env)).square(), mask, env)
    return 1 - (residual / variance).item()


def experience(policy, reference, value, reward, prompts, kl_coef, seed, config, env):
    """Phases 1 to 4: replies to this rank's prompts; (logps, values, advantages, returns), each (B, T-1); metrics by
    name, of all ranks."""
    # 1. rollout
    sampling = config["max_new_tokens"], config["temperature"], reward.tokenizer.eos_id, seed
    batch = rollout(policy, prompts, *sampling, dtype=env.generation_dtype)
    # 2. score
    scores = reward.scores(batch)  # (B,)
    # 3. penalised rewards
    logps, ref_logps = (reply_logps(model, batch, env, config) for model in (policy, reference))  # (B, T-1)
    mask = batch.mask.to(env.device)
    rewards = penalised_rewards(scores, logps, ref_logps, mask, kl_coef)
    # 4. advantages
    values = reply_values(value, batch, env, config)
    advantages, returns = gae(rewards, values, mask, config["gamma"], config["lam"])
    advantages = masked_whiten(advantages, mask, env)
    advantages += config["entropy_coef"] * entropy_bonus(logps, mask, env)

    metrics = reply_metrics(batch, scores, logps, ref_logps, reward.tokenizer, env)
    metrics |= dict(kl_coef=kl_coef, explained_variance=explained_variance(values, returns, mask, env))
    metrics["rlhf_reward"] = metrics["score"] - kl_coef * metrics["kl"]
    return batch, (logps, values, advantages, returns), metrics


def value_loss(values, old_values, returns, weights, cliprange):
    """Half the squared error, the larger of the plain and the clipped value's; all (B, T), weights as policy_loss's."""
    clipped = old_values + (values - old_values).clamp(-cliprange, cliprange)
    error = torch.max((values - returns).square(), (clipped - returns).square())
    return 0.5 * (error * weights).sum()


def update(stage, step, policy, value, batch, fixed, config, generator):
    """Phase 5: ppo_epochs passes over the replies in shuffled minibatches; returns the metrics' averages over updates.

    policy and value as distributed.wrap gives them; each rank has its part of the replies and of every minibatch.
    fixed: (logps, values, advantages, returns) of the policy and the value model that met the replies, each (B, T-1).
    """
    env, updates = stage.env, []
    size = distributed.per_rank(config, "minibatch_size", env)
    for _ in range(config["ppo_epochs"]):
        for minibatch in torch.randperm(len(batch.ids), generator=generator).split(size):
            # tokens a rank has in the mean, as gradients are averaged over the ranks
            tokens = distributed.summed(batch.mask[minibatch].sum().to(env.device), env) / env.world_size
            micros, parts = batch.by_length(minibatch, config["micro_batch_size"]), []
            for micro in micros:
                for model in (policy, value):
                    distributed.sync(model, last=micro is micros[-1])
                rows = batch.rows(micro)
                (at,) = move([micro], env.device)
                old_logps, old_values, advantages, returns = (x[at, : rows.mask.size(1)] for x in fixed)
                weights = rows.mask / tokens
                with env.autocast():
                    logps = policy.token_logps(rows.ids, config["temperature"], rows.mask, rows.keep)
                    values = value.values(rows.ids)[:, :-1]
                pg_loss = policy_loss(logps, old_logps, advantages, weights, config["cliprange"])
                vf_loss = value_loss(values, old_values, returns, weights, config["cliprange_value"])
                (pg_loss + config["vf_coef"] * vf_loss).backward()
                stats = ratio_stats(logps, old_logps, weights, config["cliprange"])
                parts.append(stats | {"policy_loss": pg_loss.detach(), "value_loss": vf_loss.detach()})
            sums = add_up(parts, env)
            grad_norm = stage.clip_and_step(step, sums["policy_loss"] + config["vf_coef"] * sums["value_loss"])
            updates.append(sums | {"grad_norm": grad_norm})
    return average(updates)


def adapt_kl_coef(kl_coef, kl, target, horizon):
    """Ziegler et al. (arXiv:1909.08593, section 2.2): raise the weight where KL is above the target, lower it below."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * 10 / horizon)


def main(argv=None):
    config = parse_config("ppo_train", argv, __doc__)
    if config["parallel"] != "ddp":
        raise ConfigError(f"parallel={config['parallel']}: PPO trains a copy of its models per process; ddp is needed")
    if config["kl_target"] > 0 and config["kl_coef"] == 0:
        raise ConfigError(f"kl_target={config['kl_target']}: kl_coef above 0 is needed, which it multiplies")
    stage = Stage("ppo", config, PANELS)
    if stage.finished:
        return
    env = stage.env
    n_prompts, _ = (distributed.per_rank(config, key, env) for key in ("rollout_size", "minibatch_size"))
    parent, tokenizer = stage.load_parent()
    stage.check_data("prompts.pkl")
    reward = Reward(config, parent, tokenizer, env)
    room = reward.context, config["max_new_tokens"]
    path = Path(config["data"]) / "prompts.pkl"
    train, held_out = load_prompts(path, tokenizer.vocab_size, *room)
    order = BatchOrder(len(train), config["rollout_size"], config["seed"], path=path, key="rollout_size")
    held_out = held_out[: config["eval_prompts"]]

    policy, reference = (checkpoint.build_model(parent).to(env.device) for _ in range(2))
    reference.eval().requires_grad_(False)
    value = checkpoint.build_model(reward.ckpt or parent, scalar_head=True).to(env.device)
    torch.nn.init.zeros_(value.scalar.weight)  # normalised scores have mean 0 on the reference: so does the first value
    both = torch.nn.ModuleDict({"policy": policy, "value": value})
    both.eval()  # no dropout: a ratio must compare the policy with itself
    for model in (policy, reference, value):
        distributed.compiled(model, env, config)
    wrapped = [distributed.wrap(model, env, config) for model in (policy, value)]
    optimizer = build_optimizer(both, config)
    stage.start(policy, optimizer, tokenizer, parent, trained=both)
    with checkpoint.naming(parent):
        reward.start(stage, reference, train[: config["norm_prompts"]])
    if stage.resumed:
        checkpoint.load_weights(value, stage.extra.pop("value"), stage.resumed.path)
    kl_coef, watch = stage.extra.get("kl_coef", config["kl_coef"]), Watch(stage.extra.get("watch"))
    if env.is_main:
        scores = f"reference scores {reward.norm[0]:.3f} +- {reward.norm[1]:.3f}"
        print(f"{len(train):,} training and {len(held_out):,} held-out prompts; {scores}")

    with stage.interrupt:
        for step in range(stage.first, config["max_steps"] + 1):
            lr = set_learning_rate(optimizer, learning_rate(step, config))
            if stage.due(step, "eval_interval"):
                stage.report(step, *evaluate_policy(policy, reference, reward, held_out, config))
                plot_score_kl(stage.metric_log, "ppo")
            if stage.due(step, "save_interval"):
                stage.extra = dict(value=value.state_dict(), kl_coef=kl_coef, watch=watch.state) | reward.state
                stage.save(step)
            if stage.ends(step):
                break

            seed = distributed.step_seed(config["seed"], step, env)
            prompts = [train[i] for i in order[step][env.rank * n_prompts :][:n_prompts]]
            batch, fixed, before = experience(policy, reference, value, reward, prompts, kl_coef, seed, config, env)
            generator = torch.Generator().manual_seed(seed)
            metrics = update(stage, step, *wrapped, batch, fixed, config, generator) | before
            if env.is_main:
                watch.look(step + 1, metrics)
            if config["kl_target"] > 0:
                kl_coef = adapt_kl_coef(kl_coef, metrics["kl"], config["kl_target"], config["kl_horizon"])
            metrics = {f"ppo/{name}": number for name, number in metrics.items()} | {"train/learning_rate": lr}
            tokens = int(distributed.all_sum(batch.lengths.sum(), env))
            stage.log(step + 1, tokens, metrics, shown=("ppo/score", "ppo/kl"))
    stage.close()


if __name__ == "__main__":
    run(main)
