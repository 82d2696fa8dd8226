"""How the loss falls with parameters and tokens: L = E + A / N^alpha + B / D^beta, fitted to runs that a CPU can do.

N counts the trunk, without the embedding, D the tokens trained on; L is the loss on 65,536 held-out tokens, nats each.
Text and vocabulary are those of runs/poems.sh, of whose 12 million tokens no run reads as much as half. Six widths
train by the recipe of configs/recipes: Muon, WSD, a learning rate inverse to the width. The token counts of a width
share one run at a constant rate: at each count a copy of it begins to decay, over a last fifth (arXiv:2405.18392).

The fit is the third of Hoffmann et al., 2022 (arXiv:2203.15556): Huber's loss of log L, from many starts. Intervals are
5 to 95 % of 200 bootstraps over the runs; as runs of a width share most of their steps, they are rather too narrow.
What an extrapolation is worth, the largest model tells: its losses beside those of a fit that has not seen them. What
the fit says of the five sizes is of poems without end; the published losses beside it are of other text and vocabulary.

About 90 minutes on two cores that train the poet's model at 3,500 tokens a second. Finished runs are not repeated, what
was interrupted goes on; to train a width again, remove its whole folder.

    bash runs/poems.sh                     # or its commands up to `data`
    python benchmarks/scaling.py
    python benchmarks/scaling.py --scale=0.05 --out=out/smoke

in:  data/poems, out/poems/tokenizer
out: scaling.png, WIDTHxBLOCKS with a run directory for each token count; lines of text and, last, one of JSON
"""

import shutil
from itertools import product
from pathlib import Path

import numpy as np
from harness import ROOT, argument_parser, flags, launch, print_figures, run_python

from common.files import write_file
from common.memory import count_parameters
from common.metrics import read_metrics
from common.plots import new_figure, png
from common.tables import format_table
from configs.poems.pretrain import config as base
from configs.recipes import ROWS, STEPS
from configs.sizes import sizes
from dataset.formats import load_meta
from model import ModelConfig

# width, blocks, steps of its longest run; the others have halves of them, down to FEWEST
MODELS = [(96, 3, 2880), (128, 4, 1440), (160, 4, 720), (224, 4, 360), (288, 5, 360), (320, 8, 360)]
FEWEST = 180
BATCH = 16  # rows in a step
DECAY = 0.2  # share of a run
EVAL_TOKENS = 65_536
HUBER = 1e-3  # of log L, as in the paper
BOOTSTRAPS = 200
NAMES = ("E", "A", "B", "alpha", "beta")
# The first models of these five sizes: training loss at the end, nats per token of ChatGLM3's vocabulary, AdamW; from
# the README of github.com/wdndev/tiny-llm-zh: general text, about 19e9 tokens read twice, and novels, 9e9 three times.
PUBLISHED = {
    "general text": {"9m": 4.372, "24m": 4.016, "58m": 3.538, "134m": 3.127, "256m": 2.919},
    "novels": {"24m": 4.093, "58m": 3.67, "134m": 3.229},
}


def train(out, dim, n_layers, max_steps, decay_steps, options):
    """Run pretrain.py as far as max_steps, or go on to there."""
    keys = dict(out=out, data=options.data, tokenizer=options.tokenizer, seed=options.seed, max_steps=max_steps)
    keys |= {"model.dim": dim, "model.n_layers": n_layers, "model.n_heads": dim // 32, "model.n_kv_heads": dim // 32}
    keys |= dict(schedule="wsd", decay_steps=decay_steps, decay_share=DECAY, min_learning_rate=0.0)
    keys |= dict(learning_rate=min(5e-3, 0.8 / dim), save_interval=50, sample_prompts="")  # as configs/recipes
    keys |= dict(batch_size=BATCH, warmup_steps=50)
    keys |= dict(eval_interval=max_steps, eval_tokens=round(EVAL_TOKENS * options.scale), eval_all=False)
    command = [ROOT / "pretrain.py", ROOT / "configs/poems/pretrain.py", "--resume", *flags(**keys)]
    run_python(*command, log=out.with_suffix(".log"))


def losses(dim, n_layers, longest, options):
    """{steps: validation loss} of the runs of a width."""
    folder, found = options.out / f"{dim}x{n_layers}", {}
    folder.mkdir(parents=True, exist_ok=True)
    longest = max(5, round(longest * options.scale))
    halves = [longest]
    while halves[-1] // 2 >= max(5, round(FEWEST * options.scale)):
        halves.append(halves[-1] // 2)
    for steps in reversed(halves):
        out, stable, part = folder / str(steps), folder / "stable", folder / "part"
        if not out.exists():
            until = round((1 - DECAY) * steps)
            train(stable, dim, n_layers, until, longest, options)
            if (last := read_metrics(stable / "metrics.jsonl")[-1]["step"]) > until:
                raise SystemExit(f"{stable} went on to step {last}: remove {folder} to train this width again")
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(stable, part)
            part.rename(out)
        train(out, dim, n_layers, steps, steps, options)
        found[steps] = next(row["val/loss"] for row in read_metrics(out / "metrics.jsonl")[::-1] if "val/loss" in row)
        print(f"{dim}x{n_layers}, {steps} steps: {found[steps]:.4f}", flush=True)
    return found


def loss_at(theta, N, D):
    """E + A / N^alpha + B / D^beta of theta (..., 5), in the order of NAMES."""
    E, A, B, alpha, beta = np.moveaxis(np.asarray(theta)[..., None], -2, 0)
    return E + A * N**-alpha + B * D**-beta


def fit(N, D, L, counts):
    """theta (K, 5), as loss_at reads it, for K ways to count the R runs, counts (K, R).

    Steps of Levenberg and Marquardt on Huber's loss of log L, by reweighted least squares, for all starts and ways at
    once. N and D are taken relative to their geometric means, where the terms are of like size.
    """
    log_N, log_D, log_L = np.log(N), np.log(D), np.log(L)
    n, d = log_N - log_N.mean(), log_D - log_D.mean()
    lowest, middle = log_L.min(), np.exp(log_L.mean())
    starts = [
        (np.log(share) + lowest, *np.log([(middle - share * np.exp(lowest)) / 2] * 2), alpha, beta)
        for share, alpha, beta in product((0.2, 0.5, 0.8), (0.2, 0.5, 1.0), (0.2, 0.5, 1.0))
    ]
    low = np.array([lowest - 7, -30, -30, 0.01, 0.01])  # E at least a thousandth of the lowest loss
    high = np.array([lowest, 30, 30, 3, 3])
    theta = np.tile(starts, (len(counts), 1))  # (K S, 5)
    weights = np.repeat(counts, len(starts), 0)  # (K S, R)

    def residuals(theta):
        e, a, b, alpha, beta = theta.T[..., None]
        terms = np.exp(np.stack(np.broadcast_arrays(e, a - alpha * n, b - beta * d)))  # (3, K S, R)
        return log_L - np.log(terms.sum(0)), terms / terms.sum(0)

    def objective(r):
        size = np.abs(r)
        return (weights * np.where(size <= HUBER, r**2 / 2, HUBER * (size - HUBER / 2))).sum(1)

    r, shares = residuals(theta)
    damping = np.full(len(theta), 1e-2)
    for _ in range(200):
        J = np.stack([*shares, -n * shares[1], -d * shares[2]], -1)  # (K S, R, 5)
        W = weights * np.minimum(1, HUBER / np.maximum(np.abs(r), 1e-300))
        JW = np.swapaxes(J * W[..., None], 1, 2)
        H = JW @ J
        diagonal = np.einsum("kii->ki", H) * damping[:, None] + 1e-12
        step = np.linalg.solve(H + diagonal[:, None] * np.eye(5), JW @ r[..., None])
        tried = np.clip(theta + step[..., 0], low, high)
        r_tried, shares_tried = residuals(tried)
        better = objective(r_tried) < objective(r)
        theta, r = np.where(better[:, None], tried, theta), np.where(better[:, None], r_tried, r)
        shares = np.where(better[:, None], shares_tried, shares)
        damping = np.clip(np.where(better, damping / 3, damping * 4), 1e-12, 1e12)
    best = objective(r).reshape(len(counts), -1).argmin(1)
    e, a, b, alpha, beta = theta.reshape(len(counts), -1, 5)[np.arange(len(counts)), best].T
    return np.stack([*np.exp([e, a + alpha * log_N.mean(), b + beta * log_D.mean()]), alpha, beta], 1)


def interval(values):
    return np.quantile(values, (0.05, 0.95), axis=0)


def draw(runs, theta, sizes_at, predicted, between, path):
    """Left the runs with their fit, right what it says of the five sizes beside what was published."""
    figure = new_figure(10.4, 4.4)
    left, right = figure.subplots(1, 2)
    for color, trunk in enumerate(dict.fromkeys(runs[:, 0])):
        D, L = runs[runs[:, 0] == trunk][:, 1:].T
        many = np.geomspace(D.min(), D.max(), 50)
        left.plot(D / 1e6, L, f"C{color}o", markersize=4, label=f"{trunk / 1e6:.2f}M")
        left.plot(many / 1e6, loss_at(theta, trunk, many), f"C{color}-", linewidth=1)
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter("{x:g}")
    left.set_xlabel("million training tokens")
    left.legend(frameon=False, title="trunk", fontsize="small")
    trunks = np.array([trunk for trunk, _ in sizes_at.values()])
    right.plot(trunks, predicted, "C0o-", markersize=4, label="poems, 6,144 pieces: the fit, 5 to 95 %")
    right.fill_between(trunks, *between, color="C0", alpha=0.2)
    for color, (text, ends) in enumerate(PUBLISHED.items(), 1):
        xs = [sizes_at[size][0] for size in ends]
        right.plot(xs, list(ends.values()), f"C{color}s:", markersize=4, label=f"{text}, 64,793 rows: published")
    right.set_xscale("log")
    right.set_xlabel("parameters of the trunk; of the fit, tokens of the recipes")
    right.legend(frameon=False, fontsize="small")
    for axes in (left, right):
        axes.set_ylabel("loss (nats per token)")
        axes.grid(alpha=0.25)
    write_file(path, png(figure))


def trunk_of(**shape):
    return count_parameters(ModelConfig(**shape))["trunk"]


def five_sizes(theta, thetas, to_bits):
    """Print what the fit and its bootstraps say of the five sizes; {size: (trunk, tokens)}, losses, intervals."""
    recipes = {name.rsplit("-", 1)[1]: shape for name, shape in sizes.items()}
    sizes_at = {s: (trunk_of(**shape), STEPS[s] * ROWS[s] * shape["max_seq_len"]) for s, shape in recipes.items()}
    at = np.array(list(sizes_at.values()), dtype=float).T
    predicted, between = loss_at(theta, *at), interval(loss_at(thetas, *at))
    rows = [
        dict(size=size, trunk=trunk, tokens=tokens, loss=loss, low=low, high=high, bits=loss * to_bits)
        | {text: str(ends.get(size, "")) for text, ends in PUBLISHED.items()}
        for (size, (trunk, tokens)), loss, low, high in zip(sizes_at.items(), predicted, *between, strict=True)
    ]
    form = {"size": "{size}", "trunk": "{trunk:,}", "tokens": "{tokens:,}", "nats a token, poems": "{loss:.3f}"}
    form |= {"5 to 95 %": "{low:.3f} to {high:.3f}", "bits a character": "{bits:.3f}"}
    print(format_table(form | {f"published, {text}": f"{{{text}}}" for text in PUBLISHED}, rows))
    return sizes_at, predicted, between


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/poems"))
    parser.add_argument("--tokenizer", default="out/poems/tokenizer")
    parser.add_argument("--out", type=Path, default=Path("out/benchmark_scaling"))
    parser.add_argument("--scale", type=float, default=1.0, help="of all steps")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    meta, per_step = load_meta(options.data), BATCH * base["seq_len"]
    train_text, val_text = (meta["sources"]["poems"][split] for split in ("train", "val"))
    runs = [
        (trunk_of(dim=dim, n_layers=n_layers, n_heads=dim // 32, n_kv_heads=dim // 32), steps * per_step, loss)
        for dim, n_layers, longest in MODELS
        for steps, loss in losses(dim, n_layers, longest, options).items()
    ]
    R, runs = len(runs), np.array(runs)
    N, D, L = runs.T
    resampled = np.random.default_rng(options.seed).multinomial(R, np.full(R, 1 / R), BOOTSTRAPS)
    theta, without, *thetas = fit(N, D, L, np.stack([np.ones(R), N < N.max(), *resampled]).astype(float))
    between = dict(zip(NAMES, interval(thetas).T.tolist(), strict=True))
    error = np.abs(loss_at(theta, N, D) - L).mean()
    surprise = (loss_at(without, N, D) - L)[N == N.max()].tolist()
    print(f"{R} runs, at most {D.max() / train_text['tokens']:.2f} epochs; the fit is off by {error:.4f} nats")
    for name, value in zip(NAMES, theta, strict=True):
        print(f"{name}: {value:.4g} ({between[name][0]:.4g} to {between[name][1]:.4g})")
    print(f"largest model, said by a fit without it less measured: {', '.join(f'{x:+.4f}' for x in surprise)} nats")
    print(f"compute C is best spent on parameters ~ C^{theta[4] / (theta[3] + theta[4]):.2f}")

    to_bits = val_text["tokens"] / val_text["characters"] / np.log(2)  # of a character, from nats of a token
    sizes_at, predicted, ranges = five_sizes(theta, thetas, to_bits)
    draw(runs, theta, sizes_at, predicted, ranges, options.out / "scaling.png")
    figures = dict(zip(NAMES, theta.tolist(), strict=True)) | {f"{name}_5_95": found for name, found in between.items()}
    figures |= dict(error=error, largest_without_it=surprise, runs=runs.tolist())
    figures |= dict(predicted=dict(zip(sizes_at, predicted.tolist(), strict=True)))
    figures |= dict(predicted_5_95=dict(zip(sizes_at, ranges.T.tolist(), strict=True)))
    print_figures(figures)


if __name__ == "__main__":
    launch(main)
