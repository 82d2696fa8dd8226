"""GRPO (arXiv:2402.03300), Dr. GRPO (arXiv:2503.20783) and RLOO (arXiv:2402.14740): RL without a value model.

A step has five phases: (1) the policy answers each prompt `group_size` times, (2) each reply is scored, by the reward
model or by the function that `reward` names, (3) a reply is penalised for leaving the reference, (4) its advantage is
what it got above the others of its group, (5) clipped updates of the policy in minibatches. Departure: GRPO and
Dr. GRPO put beta * k3, an estimate of the KL, into the loss. Its gradient is not the KL's, but that of the KL in the
other direction. So the penalty is in the reward here, as in RLOO, and the optimum is reference * exp(score / kl_coef).
As in the papers it is not divided by a group's standard deviation: a group of equal scores feels the KL alone, and
under grpo kl_coef counts such deviations, so that the optimum is sharper where scores differ little.
Reads data/<name>/prompts.pkl, an SFT checkpoint and maybe a reward model; writes a run directory.

    python grpo_train.py configs/demo/grpo.py --loss=rloo
"""

import common.early  # noqa: F401 - before what takes seconds to import

from pathlib import Path

import torch

from alignment.objective import add_up, average, entropy_bonus, policy_loss, ratio_stats
from alignment.rewards import Reward, evaluate_policy
from alignment.rollout import Watch, reply_logps, reply_metrics, rollout
from alignment.tradeoff import plot_score_kl
from common import checkpoint, distributed
from common.config import ConfigError, parse_config, run
from common.optim import build_optimizer, learning_rate, set_learning_rate
from common.stage import Stage
from dataset.batches import BatchOrder, load_prompts, move

PANELS = [
    ("normalised score", ["grpo/score", "val/score"]),
    ("KL to the reference (nats per reply)", ["grpo/kl", "val/kl"]),
    ("reply length (tokens)", ["grpo/length", "val/length"]),
    ("share of replies that end", ["grpo/eos_rate", "val/eos_rate"]),
    ("clipped share", ["grpo/clipfrac"]),
    ("groups of equal scores (share)", ["grpo/zero_variance"]),
    ("distinct character bigrams (share)", ["grpo/distinct_2", "val/distinct_2"]),
    ("entropy (nats per token)", ["grpo/entropy"]),
]


def penalised_rewards(scores, logps, ref_logps, mask, kl_coef):
    """Score, and -kl_coef * (log p of the reply - that under the reference): (B,), rest (B, T) -> (2, B)."""
    if kl_coef == 0:
        return torch.stack([scores, torch.zeros_like(scores)])
    return torch.stack([scores, -kl_coef * ((logps - ref_logps) * mask).sum(1)])


def group_advantages(rewards, group_size, loss):
    """What each reply got above its group's mean; the replies to a prompt stand side by side: (2, B) -> (B,).

    grpo: scores in standard deviations of the group's; rloo: above the mean of the others.
    """
    groups = rewards.view(2, -1, group_size)  # scores and penalties
    scores, penalties = groups - groups.mean(2, keepdim=True)
    if loss == "grpo":
        scores = scores / (groups[0].std(1, keepdim=True) + 1e-4)
    advantages = scores + penalties
    if loss == "rloo":
        advantages = advantages * (group_size / (group_size - 1))
    return advantages.flatten()


def zero_variance(scores, group_size):
    """The share of groups whose scores are all equal: nothing but the KL penalty moves those."""
    groups = scores.view(-1, group_size)
    return (groups.amax(1) - groups.amin(1) < 1e-6).to(scores).mean()


def group_loss(logps, old_logps, advantages, mask, n_replies, config):
    """The clipped surrogate of some of a minibatch's n_replies, and its ratio_stats; (B, T), advantages or (B, 1).

    grpo: mean over the tokens of a reply, then over replies; dr_grpo: sum over tokens by a constant, so that no token
    weighs less in a long reply; rloo: mean over replies, whose ratios are of the whole reply.
    """
    if config["loss"] == "rloo":
        logps, old_logps = ((x * mask).sum(1, keepdim=True) for x in (logps, old_logps))
        shares = weights = torch.full_like(logps, 1 / n_replies)
    else:
        shares = weights = mask / mask.sum(1, keepdim=True) / n_replies
        if config["loss"] == "dr_grpo":
            weights = mask / (n_replies * config["max_new_tokens"])
    loss = policy_loss(logps, old_logps, advantages, weights, config["cliprange"])
    return loss, ratio_stats(logps, old_logps, shares, config["cliprange"])


def experience(policy, reference, reward, prompts, seed, config, env):
    """Phases 1 to 4: group_size replies to each of this rank's prompts; their logps (B, T-1); advantages (B, 1), or
    (B, T-1) with the entropy's; metrics by name, of all ranks."""
    group_size = config["group_size"]
    # 1. rollout
    prompts = [prompt for prompt in prompts for _ in range(group_size)]
    sampling = config["max_new_tokens"], config["temperature"], reward.tokenizer.eos_id, seed
    batch = rollout(policy, prompts, *sampling, dtype=env.generation_dtype)
    # 2. score
    scores = reward.scores(batch)  # (B,)
    # 3. penalised rewards
    logps = reply_logps(policy, batch, env, config)  # (B, T-1)
    ref_logps = reply_logps(reference, batch, env, config) if config["kl_coef"] else None
    mask = batch.mask.to(env.device)
    rewards = penalised_rewards(scores, logps, ref_logps, mask, config["kl_coef"])  # (2, B)
    # 4. advantages
    advantages = group_advantages(rewards, group_size, config["loss"])[:, None]  # (B, 1)
    if config["entropy_coef"]:
        advantages = advantages + config["entropy_coef"] * entropy_bonus(logps, mask, env)  # (B, T-1)

    metrics = reply_metrics(batch, scores, logps, ref_logps, reward.tokenizer, env)
    more = dict(rlhf_reward=rewards.sum(0).mean(), zero_variance=zero_variance(scores, group_size))
    return batch, logps, advantages, metrics | add_up([more], env)


def update(stage, step, policy, batch, old_logps, advantages, config, generator):
    """Phase 5: `epochs` passes over the replies in shuffled minibatches; returns the metrics' averages over updates.

    policy as distributed.wrap gives it; each rank has its part of the replies and of every minibatch. old_logps
    (B, T-1), advantages (B, T-1) or (B, 1).
    """
    env, updates = stage.env, []
    size = distributed.per_rank(config, "minibatch_size", env)
    for _ in range(config["epochs"]):
        for minibatch in torch.randperm(len(batch.ids), generator=generator).split(size):
            micros, parts = batch.by_length(minibatch, config["micro_batch_size"]), []
            for micro in micros:
                distributed.sync(policy, last=micro is micros[-1])
                rows = batch.rows(micro)
                (at,) = move([micro], env.device)
                old, above = (x[at, : rows.mask.size(1)] for x in (old_logps, advantages))
                with env.autocast():
                    logps = policy.token_logps(rows.ids, config["temperature"], rows.mask, rows.keep)
                # a mean over this rank's replies, as gradients are averaged over the ranks
                loss, stats = group_loss(logps, old, above, rows.mask, len(minibatch), config)
                loss.backward()
                parts.append(stats | {"policy_loss": loss.detach()})
            sums = add_up(parts, env)
            grad_norm = stage.clip_and_step(step, sums["policy_loss"])
            updates.append(sums | {"grad_norm": grad_norm})
    return average(updates)


def check_config(config):
    """Refuse numbers that do not go together."""
    size, group = config["rollout_size"], config["group_size"]
    if config["entropy_coef"] and config["loss"] == "rloo":
        raise ConfigError("entropy_coef: it counts token by token, and loss=rloo weighs whole replies; 0 is needed")
    if size % group:
        raise ConfigError(f"rollout_size={size}: a multiple of group_size={group} is needed")
    if config["parallel"] != "ddp":
        raise ConfigError(f"parallel={config['parallel']}: GRPO trains a copy of its policy per process; ddp is needed")


def main(argv=None):
    config = parse_config("grpo_train", argv, __doc__)
    check_config(config)
    stage = Stage("grpo", config, PANELS)
    if stage.finished:
        return
    env = stage.env
    n_prompts = distributed.per_rank(config, "rollout_size", env, config["group_size"]) // config["group_size"]
    distributed.per_rank(config, "minibatch_size", env)
    parent, tokenizer = stage.load_parent()
    stage.check_data("prompts.pkl")
    reward = Reward(config, parent, tokenizer, env)
    room = reward.context, config["max_new_tokens"]
    path = Path(config["data"]) / "prompts.pkl"
    train, held_out = load_prompts(path, tokenizer.vocab_size, *room)
    per_step, key = config["rollout_size"] // config["group_size"], "rollout_size, or a larger group_size"
    order = BatchOrder(len(train), per_step, config["seed"], path=path, key=key)
    held_out = held_out[: config["eval_prompts"]]

    policy, reference = (checkpoint.build_model(parent).to(env.device) for _ in range(2))
    policy.eval()  # no dropout: a ratio must compare the policy with itself
    reference.eval().requires_grad_(False)
    for model in (policy, reference):
        distributed.compiled(model, env, config)
    forward = distributed.wrap(policy, env, config)
    optimizer = build_optimizer(policy, config)
    stage.start(policy, optimizer, tokenizer, parent)
    with checkpoint.naming(parent):
        reward.start(stage, reference, train[: config["norm_prompts"]])
    watch = Watch(stage.extra.get("watch"))
    if env.is_main:
        scores = f"reference scores {reward.norm[0]:.3f} +- {reward.norm[1]:.3f}"
        print(f"{len(train):,} training and {len(held_out):,} held-out prompts; {scores}")

    with stage.interrupt:
        for step in range(stage.first, config["max_steps"] + 1):
            lr = set_learning_rate(optimizer, learning_rate(step, config))
            if stage.due(step, "eval_interval"):
                stage.report(step, *evaluate_policy(policy, reference, reward, held_out, config))
                plot_score_kl(stage.metric_log, "grpo")
            if stage.due(step, "save_interval"):
                stage.extra = dict(watch=watch.state) | reward.state
                stage.save(step)
            if stage.ends(step):
                break

            seed = distributed.step_seed(config["seed"], step, env)
            prompts = [train[i] for i in order[step][env.rank * n_prompts :][:n_prompts]]
            batch, logps, advantages, before = experience(policy, reference, reward, prompts, seed, config, env)
            generator = torch.Generator().manual_seed(seed)
            metrics = update(stage, step, forward, batch, logps, advantages, config, generator) | before
            if env.is_main:
                watch.look(step + 1, metrics)
            metrics = {f"grpo/{name}": number for name, number in metrics.items()} | {"train/learning_rate": lr}
            tokens = int(distributed.all_sum(batch.lengths.sum(), env))
            stage.log(step + 1, tokens, metrics, shown=("grpo/score", "grpo/kl"))
    stage.close()


if __name__ == "__main__":
    run(main)
