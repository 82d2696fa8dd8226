"""How many tokens Muon with the WSD schedule needs to reach the validation loss of AdamW with a cosine.

AdamW is nanoGPT's recipe: betas 0.9 and 0.95, weight decay 0.1 on matrices, clipping at 1, a cosine down to a tenth.
Both recipes are tuned by --sweep, a key at a time, on runs of a third of the steps. Every run is pretrain.py with the
demo's steps and blocks, on two corpora and at two widths, whose learning rates are inverse to the width; losses are
those of all validation text at the end, over several seeds.

    bash runs/demo.sh                     # or its first three commands: the reviews
    bash runs/poems.sh                    # or its commands up to `data`: the poems
    python benchmarks/optimizers.py --sweep --settings reviews_160
    python benchmarks/optimizers.py

in:  data/demo, out/demo/tokenizer, data/poems, out/poems/tokenizer, as far as the settings are of them
out: out/optimizers.png, a run directory for each run (a finished one is not repeated); lines of text and, last, one of
     JSON: token_fraction has the smallest of --fractions with which Muon reached AdamW's mean loss, or null
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
HEAD = 32  # numbers of a head
# folder of the data and of the tokenizer, width
SETTINGS = {
    f"{corpus}_{dim}": (f"data/{name}", f"out/{name}/tokenizer", dim)
    for dim in (160, 320)
    for corpus, name in (("reviews", "demo"), ("poems", "poems"))
}


def train(out, steps, recipe, seed, setting):
    """Run pretrain.py; returns [(step, tokens, validation loss)]."""
    data, tokenizer, dim = SETTINGS[setting]
    lr = recipe["learning_rate"] * SETTINGS["reviews_160"][2] / dim
    keys = recipe | dict(
        out=out,
        max_steps=steps,
        seed=seed,
        data=data,
        tokenizer=tokenizer,
        learning_rate=lr,
        min_learning_rate=lr * LOWEST[recipe["schedule"]],
        eval_interval=max(steps // 8, 1),
        save_interval=steps,
        sample_prompts="",
    )
    keys |= {"model.dim": dim, "model.n_heads": dim // HEAD, "model.n_kv_heads": dim // HEAD}
    run_python(ROOT / "pretrain.py", ROOT / "configs/demo/pretrain.py", "--resume", *flags(**keys))
    rows = read_metrics(out / "metrics.jsonl")
    tokens_per_step = next(row["train/tokens"] / row["step"] for row in rows if "train/tokens" in row)
    return [(r["step"], r["step"] * tokens_per_step, r["val/loss"]) for r in rows if "val/loss" in r]


def sweep(setting, options):
    """The final losses of a third of the steps by each recipe and with one key of it changed."""
    losses = {}
    for recipe in (ADAMW, MUON):
        name = f"{recipe['optimizer']} {recipe['schedule']}"
        changes = [{}] + [{key: value} for key, values in SWEEP[recipe["optimizer"]].items() for value in values]
        for change in changes:
            label = " ".join([setting, name, *flags(**change)])
            out = options.out / ("sweep-" + label.replace(" ", "-"))
            losses[label] = train(out, options.steps // 3, recipe | change, 1, setting)[-1][2]
            print(f"{label}: {losses[label]:.4f}", flush=True)
    return losses


def race(setting, options):
    """({label: [runs]}, {fraction: Muon's mean loss}, AdamW's) of a setting."""
    recipes = {"AdamW + cosine": (options.steps, ADAMW)}
    recipes |= {f"Muon + WSD, {f:.0%}": (round(f * options.steps), MUON) for f in options.fractions}
    curves = {}
    for label, (steps, recipe) in recipes.items():
        outs = [options.out / setting / f"{recipe['optimizer']}-{steps}-{n}" for n in range(1, options.seeds + 1)]
        curves[label] = [train(out, steps, recipe, seed, setting) for seed, out in enumerate(outs, 1)]
        finals = [run[-1][2] for run in curves[label]]
        listed = ", ".join(f"{loss:.4f}" for loss in finals)
        print(f"{setting}, {label}: {steps} steps, validation loss {np.mean(finals):.4f} ({listed})", flush=True)
    target, *others = (np.mean([run[-1][2] for run in runs]) for runs in curves.values())
    return curves, dict(zip(options.fractions, others, strict=True)), target


def draw(found, path):
    """Validation loss against tokens, a panel a setting; curves {label: [runs]}, each run [(step, tokens, loss)]."""
    figure = new_figure(5 * len(found) + 1.4, 4.6)
    for column, (setting, (curves, _, target)) in enumerate(found.items()):
        axes = figure.add_subplot(1, len(found), column + 1)
        for color, (label, runs) in enumerate(curves.items()):
            for i, run in enumerate(runs):
                _, tokens, losses = zip(*run[1:], strict=True)
                axes.plot(tokens, losses, f"C{color}", linewidth=1, alpha=0.6, label=None if i else label)
                axes.plot(tokens[-1], losses[-1], f"C{color}o", markersize=4)
        axes.axhline(target, color="C0", linestyle=":", linewidth=1)
        axes.set_ylim(target - 0.3, target + 1.5)
        axes.set_xlabel("training tokens")
        axes.set_ylabel("validation loss (nats per token)")
        axes.set_title(setting)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    path.write_bytes(png(figure))


def main():
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), help="corpus and width"
    )
    parser.add_argument("--out", type=Path, default=Path("out/benchmark_optimizers"))
    parser.add_argument("--steps", type=int, default=1200, help="of AdamW")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fractions", type=float, nargs="*", default=[0.35, 0.4], help="of those steps, for Muon")
    parser.add_argument("--sweep", action="store_true", help="only compare settings of the recipes")
    options = parser.parse_args()
    if options.sweep:
        print_figures({label: x for setting in options.settings for label, x in sweep(setting, options).items()}, 4)
        return
    found = {setting: race(setting, options) for setting in options.settings}
    draw(found, options.out / "optimizers.png")
    figures = dict(steps=options.steps, token_fraction={}, adamw_loss={}, muon_loss={})
    for setting, (_, losses, target) in found.items():
        reached = [fraction for fraction, loss in losses.items() if loss <= target]
        figures["token_fraction"][setting] = min(reached, default=None)
        figures["adamw_loss"][setting] = round(target, 4)
        figures["muon_loss"][setting] = {f"{fraction:g}": round(loss, 4) for fraction, loss in losses.items()}
    print_figures(figures)


if __name__ == "__main__":
    launch(main)
