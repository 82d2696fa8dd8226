"""What a CPU's bfloat16 costs and gives: the demo's pretraining in float32 and with products in bfloat16.

    bash runs/demo.sh                     # or its first three commands: the data
    python benchmarks/bfloat16.py
    python benchmarks/bfloat16.py --seeds=1 --steps=200

in:  data/demo, out/demo/tokenizer; a CPU that multiplies bfloat16 in hardware, or it takes hours
out: a run directory for each run (a finished one is not repeated); lines of text and, last, one of JSON: lists have a
     value a seed, losses are those of all validation text at the end, rates tokens a second of training alone
"""

from itertools import pairwise
from pathlib import Path
from statistics import median

from harness import ROOT, argument_parser, flags, launch, print_figures, run_python

from common.distributed import DTYPES
from common.metrics import read_metrics
from configs.demo.pretrain import config as demo


def train(dtype, seed, options):
    """Run pretrain.py; returns the validation loss at the end and the median speed in tokens a second."""
    out = options.out / f"{dtype}-{seed}"
    keys = dict(out=out, dtype=dtype, seed=seed, max_steps=options.steps, eval_interval=options.steps)
    keys |= dict(data=options.data, tokenizer=options.tokenizer, device="cpu", save_interval=options.steps)
    run_python(ROOT / "pretrain.py", ROOT / "configs/demo/pretrain.py", "--resume", *flags(**keys))
    rows = read_metrics(out / "metrics.jsonl")
    clock = [(row["train/tokens"], row["seconds"]) for row in rows if "train/tokens" in row]
    rates = [(b[0] - a[0]) / (b[1] - a[1]) for a, b in pairwise(clock)]
    return [row["val/loss"] for row in rows if "val/loss" in row][-1], median(rates)


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("--data", default="data/demo")
    parser.add_argument("--tokenizer", default="out/demo/tokenizer")
    parser.add_argument("--out", type=Path, default=Path("out/benchmark_bfloat16"))
    parser.add_argument("--steps", type=int, default=demo["max_steps"])
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    found = {dtype: [] for dtype in DTYPES}
    for seed in range(1, options.seeds + 1):
        for dtype, runs in found.items():
            runs.append(train(dtype, seed, options))
            loss, rate = runs[-1]
            print(f"seed {seed}, {dtype}: validation loss {loss:.4f}, {rate:,.0f} tokens/s", flush=True)
    losses, rates = ({dtype: [run[i] for run in runs] for dtype, runs in found.items()} for i in (0, 1))
    pairs = zip(losses["bfloat16"], losses["float32"], strict=True)
    higher = [round(low - exact, 4) for low, exact in pairs]
    figures = dict(losses=losses, loss_higher=higher, mean_loss_higher=sum(higher) / len(higher), tokens_per_s=rates)
    print_figures(figures | dict(speed_ratio=sum(rates["bfloat16"]) / sum(rates["float32"])), 4)


if __name__ == "__main__":
    launch(main)
