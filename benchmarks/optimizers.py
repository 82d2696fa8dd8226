"""How many tokens Muon with the WSD schedule needs to reach the validation loss of AdamW with a cosine.

AdamW is nanoGPT's recipe: betas 0.9 and 0.95, weight decay 0.1 on matrices, clipping at 1, a cosine down to a tenth.
Both recipes are tuned by --sweep, a key at a time, on runs of a third of the steps. Every run is pretrain.py on the
demo's model and data; losses are those of all validation text at the end, over several seeds.

    bash runs/demo.sh                     # or its first three commands: the data
    python benchmarks/optimizers.py --sweep
    python benchmarks/optimizers.py --out=out/benchmark_optimizers

in:  data/demo, out/demo/tokenizer
out: out/optimizers.png, a run directory for each run (a finished one is not repeated); lines of text and, last, one of
     JSON
"""

from pathlib import Path

import numpy as np
from harness import ROOT, argument_parser, flags, launch, print_figures, run_python

from common.metrics import read_metrics
from common.plots import new_figure, png

ADAMW = dict(optimizer="adamw", schedule="cosine", learning_rate=2e-3)
MUON = dict(optimizer="muon", schedule="wsd", learning_rate=5e-3, momentum=0.9, embedding_rate=4.0)
# what --sweep changes of a recipe, one at a time
SWEEP = {
    "adamw": dict(learning_rate=(1e-3, 4e-3, 8e-3)),
    "muon": dict(
        learning_rate=(2.5e-3, 7e-3, 1e-2),
        embedding_rate=(1.0, 2.0, 8.0),
        momentum=(0.8, 0.95),
        decay_share=(0.5,),
        weight_decay=(0.0,),
    ),
}
LOWEST = {"cosine": 0.1, "wsd": 0.0}  # the last learning rate, as a share of the peak


def train(out, steps, recipe, seed, options):
    """Run pretrain.py; returns [(step, tokens, validation loss)]."""
    keys = recipe | dict(
        out=out,
        max_steps=steps,
        seed=seed,
        data=options.data,
        tokenizer=options.tokenizer,
        min_learning_rate=recipe["learning_rate"] * LOWEST[recipe["schedule"]],
        eval_interval=max(steps // 8, 1),
        save_interval=steps,
    )
    run_python(ROOT / "pretrain.py", ROOT / "configs/demo/pretrain.py", "--resume", *flags(**keys))
    rows = read_metrics(out / "metrics.jsonl")
    tokens_per_step = next(row["train/tokens"] / row["step"] for row in rows if "train/tokens" in row)
    return [(r["step"], r["step"] * tokens_per_step, r["val/loss"]) for r in rows if "val/loss" in r]


def sweep(options):
    """The final losses of a third of the steps by each recipe and with one key of it changed."""
    losses = {}
    for recipe in (ADAMW, MUON):
        name = f"{recipe['optimizer']} {recipe['schedule']}"
        changes = [{}] + [{key: value} for key, values in SWEEP[recipe["optimizer"]].items() for value in values]
        for change in changes:
            label = " ".join([name, *flags(**change)])
            out = options.out / ("sweep-" + label.replace(" ", "-"))
            losses[label] = train(out, options.steps // 3, recipe | change, 1, options)[-1][2]
            print(f"{label}: {losses[label]:.4f}", flush=True)
    print_figures(losses, 4)


def draw(curves, path):
    """Validation loss against tokens; curves {label: [runs]}, each run [(step, tokens, loss)]."""
    figure = new_figure(8.4, 4.6)
    axes = figure.add_subplot()
    for color, (label, runs) in enumerate(curves.items()):
        for i, run in enumerate(runs):
            _, tokens, losses = zip(*run[1:], strict=True)
            axes.plot(tokens, losses, f"C{color}", linewidth=1, alpha=0.6, label=None if i else label)
            axes.plot(tokens[-1], losses[-1], f"C{color}o", markersize=4)
    first = np.mean([run[-1][2] for run in next(iter(curves.values()))])
    axes.axhline(first, color="C0", linestyle=":", linewidth=1)
    axes.set_ylim(first - 0.3, first + 1.5)
    axes.set_xlabel("training tokens")
    axes.set_ylabel("validation loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    path.write_bytes(png(figure))


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("--data", default="data/demo")
    parser.add_argument("--tokenizer", default="out/demo/tokenizer")
    parser.add_argument("--out", type=Path, default=Path("out/benchmark_optimizers"))
    parser.add_argument("--steps", type=int, default=1200, help="of AdamW")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fractions", type=float, nargs="*", default=[0.35, 0.4], help="of those steps, for Muon")
    parser.add_argument("--sweep", action="store_true", help="only compare settings")
    options = parser.parse_args()
    if options.sweep:
        sweep(options)
        return
    recipes = {"AdamW + cosine": (options.steps, ADAMW)}
    recipes |= {f"Muon + WSD, {f:.0%}": (round(f * options.steps), MUON) for f in options.fractions}
    curves = {}
    for label, (steps, recipe) in recipes.items():
        outs = [options.out / f"{recipe['optimizer']}-{steps}-{seed}" for seed in range(1, options.seeds + 1)]
        curves[label] = [train(out, steps, recipe, seed, options) for seed, out in enumerate(outs, 1)]
        finals = [run[-1][2] for run in curves[label]]
        listed = ", ".join(f"{loss:.4f}" for loss in finals)
        print(f"{label}: {steps} steps, validation loss {np.mean(finals):.4f} ({listed})", flush=True)
    draw(curves, options.out / "optimizers.png")
    losses = {label: np.mean([run[-1][2] for run in runs]) for label, runs in curves.items()}
    target = losses.pop("AdamW + cosine")
    by_fraction = dict(zip(options.fractions, losses.values(), strict=True))
    reached = [fraction for fraction, loss in by_fraction.items() if loss <= target]
    figures = dict(muon_token_fraction=min(reached, default=None), steps=options.steps, adamw_loss=round(target, 4))
    figures |= {f"muon_loss_{fraction:g}": round(loss, 4) for fraction, loss in by_fraction.items()}
    print_figures(figures)


if __name__ == "__main__":
    launch(main)
