"""Reward model: which of two answers is better, as one number (InstructGPT, arXiv:2203.02155, section 3.5, equation 1).

The fine-tuned model with a scalar head in place of the vocabulary; the score is read at the last real token, the <eos>
of the answer, and trained so that chosen beats rejected (Bradley-Terry). The head starts as N(0, 1/(dim + 1)), as in
Stiennon et al. (arXiv:2009.01325). Reads data/<name>/rm.pkl, in which a ranked list is every pair of a better with a
worse answer; writes a run directory, with calibration.png: is a pair as sure as the difference of its scores says?

    python rm_train.py configs/demo/rm.py
"""

import common.early  # noqa: F401 - before what takes seconds to import

import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from alignment.objective import add_up, wins
from alignment.pairs import pair_batch
from alignment.rollout import sequence_scores
from common import checkpoint, distributed
from common.config import parse_config, run
from common.files import write_file
from common.metrics import wilson_interval
from common.optim import build_optimizer, learning_rate, set_learning_rate
from common.plots import new_figure, png
from common.stage import Stage
from dataset.batches import BatchOrder, load_pairs

PANELS = [
    ("loss (nats per pair)", ["train/loss", "val/loss"]),
    ("accuracy on pairs", ["rm/accuracy", "val/accuracy"]),
    ("score", ["val/chosen_score", "val/rejected_score"]),
    ("expected calibration error", ["val/ece"]),
    ("gradient norm", ["train/grad_norm"]),
]
CALIBRATION = "calibration.png"


def reward_loss(chosen_scores, rejected_scores, margin=0.0, centring=0.0):
    """-log sigmoid(chosen - rejected - margin) + centring * (chosen + rejected)^2: (B,), (B,) -> (B,).

    Without both it is the negative log-likelihood of a Bradley-Terry model. The margin, a number or (B,), is that of
    Llama 2 (arXiv:2307.09288, eq. 2); centring, which fixes where zero is, is by Eisenstein et al. (arXiv:2312.09244).
    """
    loss = -F.logsigmoid(chosen_scores - rejected_scores - margin)
    return loss + centring * (chosen_scores + rejected_scores).square()


def pair_scores(model, batch, env):
    """Scores of both sides of a pair_batch in one forward: (B,), (B,)."""
    with env.autocast():
        scores = sequence_scores(model, batch["ids"], batch["lengths"])
    return scores.chunk(2)


@torch.no_grad()
def evaluate(model, chosen, rejected, env, n_pairs, objective=reward_loss):
    """(metrics, chosen scores (N,), rejected scores (N,)) of the first n_pairs validation pairs.

    Accuracy comes with its 95 % interval, next to calling the longer answer better.
    """
    model.eval()
    parts = [range(i, min(i + 64, n_pairs)) for i in range(0, n_pairs, 64)]
    scores = [pair_scores(model, pair_batch(chosen, rejected, part, env.device), env) for part in parts]
    model.train()
    chosen_scores, rejected_scores = (torch.cat(side) for side in zip(*scores, strict=True))  # (N,), (N,)
    right = wins(chosen_scores, rejected_scores).sum().item()
    low, high = wilson_interval(right, n_pairs)
    longer = chosen.lengths[:n_pairs] - rejected.lengths[:n_pairs]
    metrics = {
        "val/loss": objective(chosen_scores, rejected_scores).mean().item(),
        "val/accuracy": right / n_pairs,
        "val/accuracy_low": low,
        "val/accuracy_high": high,
        "val/longer_wins": float(((longer > 0) + 0.5 * (longer == 0)).mean()),  # a tie counts half
        "val/chosen_score": chosen_scores.mean().item(),
        "val/rejected_score": rejected_scores.mean().item(),
        "val/ece": calibration_error(calibration((chosen_scores - rejected_scores).cpu().numpy())),
    }
    return metrics, chosen_scores.cpu().numpy(), rejected_scores.cpu().numpy()


def calibration(margins, n_bins=10):
    """What the model claims of pairs and what is so, in bins of as many pairs, by the size of the margin.

    margins (N,) are chosen - rejected scores. The answer with the higher score is claimed to be the better one with
    probability sigmoid(|margin|). Rows: (mean |margin|, mean claim, pairs that it is right of, pairs); a tie is half
    right, which is what it claims.
    """
    margins = np.asarray(margins, dtype=np.float64)
    order = np.argsort(np.abs(margins), kind="stable")
    rows = []
    for part in np.array_split(margins[order], min(n_bins, len(margins))):
        size = np.abs(part)
        rows.append((size.mean(), (1 / (1 + np.exp(-size))).mean(), np.heaviside(part, 0.5).sum(), len(part)))
    return rows


def calibration_error(rows):
    """Expected calibration error: |accuracy - claim| of each bin, weighted by its pairs (arXiv:1706.04599, eq. 3)."""
    return float(sum(abs(right - n * claim) for _, claim, right, n in rows) / sum(n for *_, n in rows))


def draw_calibration(chosen_scores, rejected_scores):
    """PNG: accuracy by margin beside what the scores claim, with 95 % intervals; the scores of both sides."""
    size, _, right, n = np.array(calibration(chosen_scores - rejected_scores)).T
    low, high = np.array([wilson_interval(hits, count) for hits, count in zip(right, n, strict=True)]).T
    figure = new_figure(8.4, 3.6)
    curve, histogram = figure.subplots(1, 2)
    x = np.linspace(0, size.max(), 100)
    curve.plot(x, 1 / (1 + np.exp(-x)), color="gray", linewidth=1.2, label="sigmoid(margin)")
    pairs = f"{n.min():.0f}" if n.min() == n.max() else f"{n.min():.0f} to {n.max():.0f}"
    errors = np.maximum([right / n - low, high - right / n], 0)  # rounding may leave -1e-17
    curve.errorbar(size, right / n, errors, fmt="o", markersize=4, capsize=2, label=f"bins of {pairs} pairs, 95 %")
    curve.set_xlabel("size of the score difference")
    curve.set_ylabel("accuracy")
    edges = np.histogram_bin_edges(np.concatenate([chosen_scores, rejected_scores]).astype(np.float64), 30)
    for name, scores in (("chosen", chosen_scores), ("rejected", rejected_scores)):
        histogram.hist(scores, edges, alpha=0.55, label=name)
    histogram.set_xlabel("score")
    histogram.set_ylabel("answers")
    histogram.yaxis.get_major_locator().set_params(integer=True)
    for each in (curve, histogram):
        each.grid(alpha=0.25)
        each.legend(frameon=False)
    return png(figure)


def main(argv=None):
    config = parse_config("rm_train", argv, __doc__)
    stage = Stage("rm", config, PANELS)
    if stage.finished:
        return
    env, data = stage.env, Path(config["data"])
    parent, tokenizer = stage.load_parent()
    stage.check_data("rm.pkl")
    train, val = load_pairs(data / "rm.pkl", tokenizer.vocab_size, parent.model_config["max_seq_len"])
    lengths = sum(side.lengths for side in train)
    order = BatchOrder(len(train[0]), config["batch_size"], config["seed"], lengths, data / "rm.pkl")

    model = checkpoint.build_model(parent, scalar_head=True).to(env.device)
    torch.nn.init.normal_(model.scalar.weight, std=1 / math.sqrt(model.config.dim + 1))
    distributed.compiled(model, env, config)
    forward = distributed.wrap(model, env, config)
    optimizer = build_optimizer(model, config)
    stage.start(model, optimizer, tokenizer, parent)
    accumulation = config["grad_accumulation_steps"]
    objective = partial(reward_loss, margin=config["margin"], centring=config["centring"])

    def fetch(n):
        """Micro-batch n of this process, on its way to the device."""
        return pair_batch(*train, order[n * env.world_size + env.rank], env.device)

    if env.is_main:
        if stage.resumed:
            (stage.folder / CALIBRATION).unlink(missing_ok=True)  # of an earlier end, which more steps have made untrue
        epochs = config["max_steps"] * accumulation * env.world_size / order.per_epoch
        print(f"{len(train[0]):,} training and {len(val[0]):,} validation pairs; {epochs:.2f} epochs")
        last = ", at the end on all" if config["eval_all"] else ""
        n = len(val[0]) if stage.validates_on_all(0) else min(config["eval_pairs"], len(val[0]))
        print(f"validation on {n:,} of {len(val[0]):,} pairs{last}")

    batch = fetch(stage.first * accumulation)
    with stage.interrupt:
        for step in range(stage.first, config["max_steps"] + 1):
            lr = set_learning_rate(optimizer, learning_rate(step, config))
            if stage.due(step, "eval_interval"):
                last = step == config["max_steps"]
                n_pairs = len(val[0]) if stage.validates_on_all(step) else min(len(val[0]), config["eval_pairs"])
                metrics, *scores = evaluate(stage.whole, *val, env, n_pairs, objective)
                stage.report(step, metrics)
                if last and math.isfinite(metrics["val/loss"]):
                    write_file(stage.folder / CALIBRATION, draw_calibration(*scores))
            if stage.due(step, "save_interval"):
                stage.save(step)
            if stage.ends(step):
                break

            parts, tokens = [], 0
            for micro in range(accumulation):
                distributed.sync(forward, last=micro == accumulation - 1)
                scores = pair_scores(forward, batch, env)
                loss = objective(*scores).mean() / accumulation
                loss.backward()
                parts.append({"train/loss": loss.detach(), "rm/accuracy": wins(*scores).mean() / accumulation})
                tokens += batch["tokens"]
                batch = fetch(step * accumulation + micro + 1)  # while an accelerator still computes
            metrics = add_up(parts, env)
            grad_norm = stage.clip_and_step(step, metrics["train/loss"])
            metrics |= {"train/learning_rate": lr, "train/grad_norm": grad_norm}
            stage.log(step + 1, int(distributed.all_sum(tokens, env)), metrics, shown=("train/loss", "rm/accuracy"))
    stage.close()


if __name__ == "__main__":
    run(main)
