"""Reward model: which of two answers is better, as one number (InstructGPT, arXiv:2203.02155, section 3.5, equation 1).

The fine-tuned model with a scalar head in place of the vocabulary; the score is read at the last real token, the <eos>
of the answer, and trained so that chosen beats rejected (Bradley-Terry). The head starts as N(0, 1/(dim + 1)), as in
Stiennon et al. (arXiv:2009.01325). Reads data/<name>/rm.pkl; writes a run directory.

    python rm_train.py configs/demo/rm.py
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F

from common import checkpoint, distributed
from common.config import parse_config, run
from common.metrics import wilson_interval
from common.optim import build_optimizer, learning_rate, set_learning_rate
from common.rollout import sequence_scores
from common.stage import Stage
from dataset import BatchOrder, load_pairs, pad_batch, to_device

PANELS = [
    ("loss (nats per pair)", ["train/loss", "val/loss"]),
    ("accuracy on pairs", ["rm/accuracy", "val/accuracy"]),
    ("score", ["val/chosen_score", "val/rejected_score"]),
    ("gradient norm", ["train/grad_norm"]),
]


def reward_loss(chosen_scores, rejected_scores):
    """-log sigmoid(chosen - rejected), the negative log-likelihood of a Bradley-Terry model: (B,), (B,) -> (B,)."""
    return -F.logsigmoid(chosen_scores - rejected_scores)


def pair_scores(model, chosen, rejected, indices, env):
    """Scores of both sides of some pairs in one forward: (B,), (B,)."""
    rows = [chosen[i] for i in indices] + [rejected[i] for i in indices]
    batch = to_device(pad_batch(rows), env.device)
    with env.autocast():
        scores = sequence_scores(model, batch["ids"], batch["lengths"])
    return scores.chunk(2)


@torch.no_grad()
def evaluate(model, chosen, rejected, env, n_pairs):
    """Accuracy on n_pairs validation pairs with its 95 % interval, next to calling the longer answer better."""
    model.eval()
    scores = [pair_scores(model, chosen, rejected, range(i, min(i + 64, n_pairs)), env) for i in range(0, n_pairs, 64)]
    model.train()
    chosen_scores, rejected_scores = (torch.cat(side) for side in zip(*scores, strict=True))  # (N,), (N,)
    right = int((chosen_scores > rejected_scores).sum())
    low, high = wilson_interval(right, n_pairs)
    longer = chosen.lengths[:n_pairs] - rejected.lengths[:n_pairs]
    return {
        "val/loss": reward_loss(chosen_scores, rejected_scores).mean().item(),
        "val/accuracy": right / n_pairs,
        "val/accuracy_low": low,
        "val/accuracy_high": high,
        "val/longer_wins": float(((longer > 0) + 0.5 * (longer == 0)).mean()),  # a tie counts half
        "val/chosen_score": chosen_scores.mean().item(),
        "val/rejected_score": rejected_scores.mean().item(),
    }


def main(argv=None):
    config = parse_config("rm_train", argv, __doc__)
    stage = Stage("rm", config, PANELS)
    if stage.finished:
        return
    env, data = stage.env, Path(config["data"])
    parent, tokenizer = stage.load_parent()
    train, val = load_pairs(data / "rm.pkl", tokenizer.vocab_size, parent.model_config["max_seq_len"])

    model = checkpoint.build_model(parent, scalar_head=True).to(env.device)
    torch.nn.init.normal_(model.scalar.weight, std=1 / math.sqrt(model.config.dim + 1))
    forward = distributed.wrap(model, env, config)
    optimizer = build_optimizer(model, config)
    stage.start(model, optimizer, tokenizer, parent)
    accumulation = config["grad_accumulation_steps"]
    order = BatchOrder(len(train[0]), config["batch_size"], config["seed"], sum(side.lengths for side in train))
    if env.is_main:
        epochs = config["max_steps"] * accumulation * env.world_size / order.per_epoch
        print(f"{len(train[0]):,} training and {len(val[0]):,} validation pairs; {epochs:.2f} epochs")

    with stage.interrupt:
        for step in range(stage.first, config["max_steps"] + 1):
            lr = set_learning_rate(optimizer, learning_rate(step, config))
            if stage.due(step, "eval_interval"):
                full = step == config["max_steps"]
                n_pairs = len(val[0]) if full else min(len(val[0]), config["eval_pairs"])
                stage.report(step, evaluate(stage.whole, *val, env, n_pairs))
            if stage.due(step, "save_interval"):
                stage.save(step)
            if stage.ends(step):
                break

            loss, right, tokens = 0.0, 0.0, 0
            for micro in range(accumulation):
                pairs = order[(step * accumulation + micro) * env.world_size + env.rank]
                distributed.sync(forward, last=micro == accumulation - 1)
                chosen_scores, rejected_scores = pair_scores(forward, *train, pairs, env)
                micro_loss = reward_loss(chosen_scores, rejected_scores).mean() / accumulation
                micro_loss.backward()
                loss += micro_loss.item()
                right += (chosen_scores > rejected_scores).float().mean().item() / accumulation
                tokens += int(sum(side.lengths[pairs].sum() for side in train))
            loss, right = distributed.mean(loss, env), distributed.mean(right, env)
            grad_norm = stage.update(step, loss)
            metrics = {"train/loss": loss, "rm/accuracy": right}
            metrics |= {"train/learning_rate": lr, "train/grad_norm": grad_norm}
            stage.log(step + 1, int(distributed.all_sum(tokens, env)), metrics, shown=("train/loss", "rm/accuracy"))
    stage.close()


if __name__ == "__main__":
    run(main)
