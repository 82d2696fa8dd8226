"""Runs beside each other: their curves in one picture, and a table.

    python -m common.compare out/a out/b --out=compare.png --metric=val/loss

in:  run directories with a metrics.jsonl
out: a PNG, and a Markdown table on standard output
"""

import common.early  # noqa: F401 - before what takes seconds to import

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import config
from common.config import UserError
from common.files import refuse_foreign, write_file
from common.metrics import is_number, points, read_metrics
from common.plots import Line, draw
from common.tables import format_table

# of metrics that end so, the best is the largest; of others the smallest
LARGER_IS_BETTER = ("accuracy", "accuracy_low", "accuracy_high", "score", "margin", "eos_rate", "distinct_2")


@dataclass(frozen=True)
class Run:
    """What is compared of one run."""

    name: str
    train: tuple[np.ndarray, np.ndarray]  # steps and values of the training loss
    val: tuple[np.ndarray, np.ndarray]  # and of the validation metric
    tokens: tuple[np.ndarray, np.ndarray]  # and the tokens seen by then
    seconds: np.ndarray  # when those tokens had been seen
    steps: int

    def tokens_at(self, steps):
        """Tokens seen by these steps, in a straight line between the lines of the log, which start at 0."""
        known, tokens = self.tokens
        return np.interp(steps, [0, *known], [0, *tokens])

    @property
    def speed(self):
        """Tokens a second: the median over the lines of the log, so that validation and pauses do not count."""
        seconds, tokens = np.diff(self.seconds), np.diff(self.tokens[1])
        return np.median(tokens[seconds > 0] / seconds[seconds > 0]) if (seconds > 0).any() else math.nan


def read_run(path: str, metric: str) -> Run:
    """The run of a directory, or UserError where it has no such metric."""
    file = Path(path) / "metrics.jsonl"
    rows = read_metrics(file)
    if not rows:
        raise UserError(f"{file}: not there or empty; a run directory of a training stage is needed")
    val, known = points(rows, metric), dict.fromkeys(name for row in rows for name in row)
    if not len(val[0]):
        others = ", ".join(name for name in known if name.startswith("val/")) or "no validation at all"
        raise UserError(f"{file}: no value of {metric} in it; it has {others}")
    timed = [row for row in rows if is_number(row.get("train/tokens")) and is_number(row.get("seconds"))]
    _, seconds = points(timed, "seconds")
    train, tokens = points(rows, "train/loss"), points(timed, "train/tokens")
    return Run(path, train, val, tokens, seconds, max(row["step"] for row in rows))


def panels(runs: list[Run], metric: str) -> list[tuple[str, str, list[Line]]]:
    """Training loss and the metric, each against steps and against tokens."""
    drawn = []
    for label, curves in (("train/loss", [run.train for run in runs]), (metric, [run.val for run in runs])):
        told = [(run, steps, values) for run, (steps, values) in zip(runs, curves, strict=True) if len(steps)]
        drawn.append(("step", label, [Line(label, run.name, steps, values) for run, steps, values in told]))
        told = [(run, run.tokens_at(steps), values) for run, steps, values in told if len(run.tokens[0])]
        drawn.append(("tokens", label, [Line(label, run.name, tokens, values) for run, tokens, values in told]))
    return drawn


def table(runs: list[Run], metric: str) -> str:
    best = np.argmax if metric.endswith(LARGER_IS_BETTER) else np.argmin
    rows = []
    for run in runs:
        steps, values = run.val
        at = best(values)
        row = dict(run=run.name, steps=run.steps, last=values[-1], last_at=steps[-1], best=values[at], at=steps[at])
        rows.append(row | dict(speed=run.speed, tokens=run.tokens[1][-1] if len(run.tokens[1]) else math.nan))
    columns = {"run": "{run}", "steps": "{steps:,}", "tokens": "{tokens:,.0f}"}
    columns |= {f"last {metric} (step)": "{last:.4g} ({last_at:,})"}
    columns |= {f"best {metric} (step)": "{best:.4g} ({at:,})", "tokens/s": "{speed:,.0f}"}
    return format_table(columns, rows)


def main(argv=None):
    parser = argparse.ArgumentParser("python -m common.compare", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", help="run directories")
    parser.add_argument("--out", default="compare.png", help="the picture (compare.png)")
    parser.add_argument("--metric", default="val/loss", help="the validation metric (val/loss)")
    args = parser.parse_args(argv)
    refuse_foreign(args.out, ".png")
    if len(set(args.runs)) < len(args.runs):
        raise UserError(f"a run is given twice: {' '.join(args.runs)}")
    runs = [read_run(path, args.metric) for path in args.runs]
    write_file(args.out, draw(panels(runs, args.metric)))
    print(table(runs, args.metric))
    print(f"\nwrote {args.out}")


if __name__ == "__main__":
    config.run(main)
