"""Direct preference optimization: learn from pairs without a reward model (Rafailov et al., arXiv:2305.18290, eq. 7).

The log-probability of an answer is the sum over its tokens, <eos> included. The reference is the checkpoint that the
stage starts from; its log-probabilities are computed once, before the first step. Optionally adds the loss of the
chosen answer (`sft_coef`), which keeps it from becoming less likely. Reads data/<name>/{rm.pkl, prompts.pkl}.

    python dpo_train.py configs/demo/dpo.py --beta=0.3
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import checkpoint, distributed
from common.config import parse_config, run
from common.optim import build_optimizer, learning_rate, set_learning_rate
from common.rollout import rollout, sequence_kl
from common.stage import Stage
from dataset import BatchOrder, load_pairs, load_prompts, pad_batch, to_device

PANELS = [
    ("loss (nats per pair)", ["train/loss", "val/loss"]),
    ("preference accuracy", ["dpo/accuracy", "val/accuracy"]),
    ("reward margin (nats)", ["dpo/margin", "val/margin"]),
    ("log pi/ref of an answer (nats)", ["dpo/chosen_logratio", "dpo/rejected_logratio"]),
    ("KL to the reference (nats per reply)", ["val/kl"]),
    ("share of replies that end", ["val/eos_rate"]),
]


def dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """-log sigmoid(beta * h) with h = (log pi/ref of chosen) - (log pi/ref of rejected), all inputs (B,).

    Returns (loss, chosen_rewards, rejected_rewards), each (B,); rewards are beta * log pi/ref. At pi = ref the loss is
    log 2.
    """
    chosen_rewards = beta * (policy_chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - ref_rejected_logps)
    return -F.logsigmoid(chosen_rewards - rejected_rewards), chosen_rewards, rejected_rewards


def accuracy(chosen_rewards, rejected_rewards):
    """1 where chosen is rewarded more, 1/2 for a tie, as before the first step: (B,), (B,) -> (B,)."""
    return torch.heaviside(chosen_rewards - rejected_rewards, torch.full_like(chosen_rewards, 0.5))


def pair_logps(model, chosen, rejected, indices, env):
    """Summed answer log-probabilities of some pairs, one forward: chosen (B,), rejected (B,), chosen tokens (B,)."""
    batch = to_device(pad_batch([chosen[i] for i in indices] + [rejected[i] for i in indices]), env.device)
    mask = batch["loss_mask"][:, 1:]
    with env.autocast():
        logps = model.token_logps(batch["ids"], mask=mask).sum(1)  # (2B,)
    return *logps.chunk(2), mask.sum(1).chunk(2)[0]


@torch.no_grad()
def reference_logps(model, chosen, rejected, env):
    """The reference's log-probabilities of every pair: (N, 2), similar lengths together."""
    logps = torch.empty(len(chosen), 2)
    for indices in np.array_split(np.argsort(chosen.lengths + rejected.lengths), max(1, len(chosen) // 64)):
        logps[indices] = torch.stack(pair_logps(model, chosen, rejected, indices, env)[:2], 1).cpu()
    return logps.to(env.device)


@torch.no_grad()
def evaluate(model, reference, pairs, ref_logps, prompts, tokenizer, config, env):
    """Loss, accuracy and margin on validation pairs; KL, eos rate and samples from replies to held-out prompts."""
    results = []
    for indices in np.array_split(np.arange(len(ref_logps)), -(-len(ref_logps) // 32)):
        chosen, rejected, _ = pair_logps(model, *pairs, indices, env)
        results.append(torch.stack(dpo_loss(chosen, rejected, *ref_logps[indices].unbind(1), config["beta"])))
    loss, chosen, rejected = torch.cat(results, 1)  # each (N,)
    batch = rollout(model, prompts, config["eval_new_tokens"], eos_id=tokenizer.eos_id, seed=config["seed"])
    metrics = {
        "val/loss": loss.mean().item(),
        "val/accuracy": accuracy(chosen, rejected).mean().item(),
        "val/margin": (chosen - rejected).mean().item(),
        "val/kl": sequence_kl(model, reference, batch).mean().item(),
        "val/eos_rate": batch.ended.float().mean().item(),
    }
    samples = [(tokenizer.decode(p), tokenizer.decode(r)) for p, r in zip(prompts, batch.replies, strict=True)]
    return metrics, samples[:6]


def main(argv=None):
    config = parse_config("dpo_train", argv, __doc__)
    stage = Stage("dpo", config, PANELS)
    if stage.finished:
        return
    env, data = stage.env, Path(config["data"])
    parent, tokenizer = stage.load_parent()
    train, val = load_pairs(data / "rm.pkl", tokenizer.vocab_size, parent.model_config["max_seq_len"])
    val = [side.select(np.arange(min(len(side), config["eval_pairs"]))) for side in val]
    _, held_out = load_prompts(data / "prompts.pkl", tokenizer.vocab_size)
    prompts = held_out[: config["eval_prompts"]]

    model, reference = (checkpoint.build_model(parent).to(env.device).eval() for _ in range(2))  # no dropout
    reference.requires_grad_(False)
    forward = distributed.wrap(model, env, config)
    optimizer = build_optimizer(model, config)
    stage.start(model, optimizer, tokenizer, parent)
    ref_logps, val_ref_logps = (reference_logps(reference, *pairs, env) for pairs in (train, val))
    accumulation, beta = config["grad_accumulation_steps"], config["beta"]
    order = BatchOrder(len(train[0]), config["batch_size"], config["seed"], sum(side.lengths for side in train))
    if env.is_main:
        epochs = config["max_steps"] * accumulation * env.world_size / order.per_epoch
        print(f"{len(train[0]):,} training and {len(val[0]):,} validation pairs; {epochs:.2f} epochs")

    with stage.interrupt:
        for step in range(stage.first, config["max_steps"] + 1):
            lr = set_learning_rate(optimizer, learning_rate(step, config))
            if stage.due(step, "eval_interval"):
                policy = stage.whole
                stage.report(step, *evaluate(policy, reference, val, val_ref_logps, prompts, tokenizer, config, env))
            if stage.due(step, "save_interval"):
                stage.save(step)
            if stage.ends(step):
                break

            sums, tokens = torch.zeros(5, device=env.device), 0
            for micro in range(accumulation):
                pairs = order[(step * accumulation + micro) * env.world_size + env.rank]
                distributed.sync(forward, last=micro == accumulation - 1)
                chosen, rejected, chosen_tokens = pair_logps(forward, *train, pairs, env)
                loss, chosen_rewards, rejected_rewards = dpo_loss(chosen, rejected, *ref_logps[pairs].unbind(1), beta)
                loss = loss - config["sft_coef"] * chosen / chosen_tokens
                (loss.mean() / accumulation).backward()
                right = accuracy(chosen_rewards, rejected_rewards)
                margin = chosen_rewards - rejected_rewards
                stacked = torch.stack([loss, right, margin, chosen_rewards / beta, rejected_rewards / beta])  # (5, B)
                sums += stacked.detach().mean(1) / accumulation
                tokens += int(sum(side.lengths[pairs].sum() for side in train))
            loss, right, margin, chosen, rejected = (distributed.mean(x, env) for x in sums.tolist())
            grad_norm = stage.update(step, loss)
            metrics = {
                "train/loss": loss,
                "dpo/accuracy": right,
                "dpo/margin": margin,
                "dpo/chosen_logratio": chosen,
                "dpo/rejected_logratio": rejected,
                "train/learning_rate": lr,
                "train/grad_norm": grad_norm,
            }
            stage.log(step + 1, int(distributed.all_sum(tokens, env)), metrics, shown=("train/loss", "dpo/accuracy"))
    stage.close()


if __name__ == "__main__":
    run(main)
