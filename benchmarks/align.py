"""Alignment over several seeds: what DPO, PPO and GRPO gain and what it costs, beside best of 8; and how fast it runs.

Quality: from one pretrained checkpoint, each seed fine-tunes, trains a reward model and aligns by the demo's configs;
eval_generate.py then compares on the same held-out prompts. Speed: align_sft.py and align_rollout.py, beside Hugging
Face and TRL. A finished run is not repeated, and an interrupted one goes on.

    bash runs/demo.sh                     # or its first four commands: the data and the pretrained checkpoint
    python benchmarks/align.py
    python benchmarks/align.py --only=quality --seeds=1 --steps_scale=0.05 --out=out/smoke

in:  data/demo, out/demo/pretrain; for the speed of fine-tuning, what align_sft.py reads
out: out/seed-N with a run directory and a log of each stage, compare.md and compare.png; lines of text and, last, one
     of JSON: lists have a value a seed
"""

import importlib
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

from harness import ROOT, argument_parser, flags, launch, print_figures, read_figures, run_python

from common.metrics import read_metrics
from dataset.batches import load_pairs
from dataset.formats import load_meta

# script, the demo's config, and the runs that it starts from, by key
STAGES = {
    "sft": ("sft", dict()),
    "rm": ("rm_train", dict(init_from="sft")),
    "dpo": ("dpo_train", dict(init_from="sft")),
    "ppo": ("ppo_train", dict(init_from="sft", reward_model="rm")),
    "grpo": ("grpo_train", dict(init_from="sft", reward_model="rm")),
}
COMPARED = ["sft", "dpo", "ppo", "grpo"]
BEST_OF = "best of 8"
FIGURES = {"positive": "positive_share", "kl": "kl", "distinct_2": "distinct_2", "eos_rate": "eos_rate"}


def train(name, seed, options):
    """A stage's run directory, trained unless it is there."""
    script, parents = STAGES[name]
    folder = options.out / f"seed-{seed}"
    config = importlib.import_module(f"configs.demo.{name}").config
    keys = dict(data=options.data, out=folder / name, seed=seed, device="cpu")
    keys |= dict(init_from=options.pretrain) | {key: folder / parent for key, parent in parents.items()}
    if options.steps_scale != 1:
        keys["max_steps"] = max(1, round(config["max_steps"] * options.steps_scale))
    print(f"seed {seed}: {name}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    command = [ROOT / f"{script}.py", ROOT / f"configs/demo/{name}.py", "--resume", *flags(**keys)]
    run_python(*command, log=folder / f"{name}.log")
    return folder / name


def last_value(run, name):
    """The last value of a metric of a run directory."""
    return [row[name] for row in read_metrics(run / "metrics.jsonl") if name in row][-1]


def one_seed(seed, options):
    """{figure: value or {policy: value}} of one seed."""
    runs = {name: train(name, seed, options) for name in STAGES}
    folder = options.out / f"seed-{seed}"
    print(f"seed {seed}: comparison", flush=True)
    keys = dict(compare=",".join(str(runs[name]) for name in COMPARED), reward_model=runs["rm"], best_of="2,4,8")
    keys |= dict(compare_examples=1000)  # all of the demo's
    keys |= dict(data=options.data, seed=seed, report=folder / "compare.md", picture=folder / "compare.png")
    command = [ROOT / "eval_generate.py", *flags(device="cpu", **keys)]
    compared = read_figures(run_python(*command, log=folder / "compare.log"))
    rows = dict(zip(COMPARED, compared["replies"], strict=False))
    rows["best_of_8"] = next(row for row in compared["replies"] if row["checkpoint"] == BEST_OF)
    figures = dict(rm_accuracy=last_value(runs["rm"], "val/accuracy"))
    for key, name in FIGURES.items():
        figures[name] = {policy: row[key] for policy, row in rows.items()}
    del figures["kl"]["sft"]  # to itself
    sft = compared["tasks"][0]
    return figures | dict(asked_polarity=sft["asked_mean"], told_polarity=sft["polarity"])


def naive_bayes_accuracy(data):
    """Validation accuracy of the simplest judge of rm.pkl's pairs, the yardstick for the reward model.

    The log odds of each token and each two neighbours being in a chosen text, counts smoothed by 0.5, sum up.
    """
    splits = load_pairs(data / "rm.pkl", load_meta(data)["vocab_size"])
    train, val = (
        [[set(ids := side[i][0].tolist()) | set(pairwise(ids)) for i in range(len(side))] for side in sides]
        for sides in splits
    )
    chosen, rejected = (Counter(feature for text in side for feature in text) for side in train)

    def score(text):
        return sum(math.log((chosen[feature] + 0.5) / (rejected[feature] + 0.5)) for feature in text)

    return sum(score(good) > score(bad) for good, bad in zip(*val, strict=True)) / len(val[0])


def quality(options):
    """The figures of all seeds, each a list in their order; and what needs none."""
    seeds = [one_seed(seed, options) for seed in options.seeds]
    return dict(rm_accuracy_naive_bayes=naive_bayes_accuracy(options.data)) | {
        name: {policy: [found[name][policy] for found in seeds] for policy in value}
        if isinstance(value, dict)
        else [found[name] for found in seeds]
        for name, value in seeds[0].items()
    }


def speed(options):
    """Ratios to Hugging Face and TRL, with the rates that they come from."""
    figures = dict(sft_answer_tokens_ratio_hf=None)
    print("speed: align_sft.py", flush=True)
    command = [ROOT / "benchmarks/align_sft.py", *flags(data=options.sft_data)]
    if out := run_python(*command, log=options.out / "align_sft.log", may_refuse=True):
        figures |= read_figures(out)
    else:
        print(f"{options.sft_data} lacks what it reads: fine-tuning is not measured", flush=True)
    sft = train("sft", options.seeds[0], options)
    print("speed: align_rollout.py", flush=True)
    command = [ROOT / "benchmarks/align_rollout.py", *flags(ckpt=sft, data=options.data)]
    return figures | read_figures(run_python(*command, log=options.out / "align_rollout.log"))


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/demo"))
    parser.add_argument("--pretrain", type=Path, default=Path("out/demo/pretrain"))
    parser.add_argument("--sft_data", type=Path, default=ROOT.parent / "shared/data/sft", help="of align_sft.py")
    parser.add_argument("--out", type=Path, default=Path("out/benchmark_align"))
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2, 3])
    parser.add_argument("--only", choices=["speed", "quality"], help="one of the two parts")
    parser.add_argument("--steps_scale", type=float, default=1.0, help="of the demo's steps, for a quick look")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    figures = {}
    if options.only != "quality":
        figures |= speed(options)
    if options.only != "speed":
        figures |= quality(options)
    print_figures(figures)


if __name__ == "__main__":
    launch(main)
