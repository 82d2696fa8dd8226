"""The numbers of a run: metrics.jsonl with its samples and plot, the guard against NaN, losses and small statistics."""

import json
import math
import re
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from common.config import UserError
from common.files import naming, write_file
from common.plots import Line, draw
from dataset.corpus import document_numbers
from dataset.formats import DataError


class NonFiniteError(UserError):
    """Training diverged: too many updates in a row had a loss or a gradient that is not finite."""


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, none where there is no file; what a crash cut off, or is none, is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] < 1 << 53:
                rows.append(row)
    return rows


class MetricLog:
    """metrics.jsonl, samples.txt, loss.png of one run directory; without `resume_step` they start anew.

    `logger`, of common/loggers.py, gets each row too.
    """

    def __init__(self, out_dir: str | Path, resume_step: int | None = None, logger=None):
        self.out_dir, self.logger = Path(out_dir), logger
        self.out_dir.mkdir(parents=True, exist_ok=True)
        seconds = 0.0
        if resume_step is None:
            self.metrics_path.unlink(missing_ok=True)
            self.samples_path.unlink(missing_ok=True)
        else:
            rows = [row for row in self.read() if row["step"] <= resume_step]
            seconds = float(max(points(rows, "seconds")[1], default=0.0))
            self._keep(self.metrics_path, [json.dumps(row, ensure_ascii=False) for row in rows])
            self._keep(self.samples_path, self._samples_until(resume_step))
        self.start = time.monotonic() - seconds

    @property
    def metrics_path(self) -> Path:
        return self.out_dir / "metrics.jsonl"

    @property
    def samples_path(self) -> Path:
        return self.out_dir / "samples.txt"

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Append a line: step, seconds of training, metrics (6 significant digits, null if not finite)."""
        row = {"step": step, "seconds": round(time.monotonic() - self.start, 3)}
        row |= {name: plain(value) for name, value in metrics.items()}
        with naming(self.metrics_path), open(self.metrics_path, "a", encoding="utf-8") as f:
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
        if self.logger:
            self.logger.log(row)

    def close(self) -> None:
        if self.logger:
            self.logger.close()

    def samples(self, step: int, pairs: list[tuple[str, str]]) -> None:
        """Append (prompt, reply) pairs; texts are indented, so that none can look like a `step N` line."""
        lines = [f"step {step}"]
        for prompt, reply in pairs:
            for label, text in (("prompt", prompt), ("reply", reply)):
                first, *rest = text.splitlines() or [""]
                lines += [f"  {label}: {first}", *(f"    {line}" for line in rest)]
            lines.append("")
        with naming(self.samples_path), open(self.samples_path, "a", encoding="utf-8") as f:
            f.write("\n".join(lines) + "\n")

    def read(self) -> list[dict]:
        return read_metrics(self.metrics_path)

    def plot(self, panels: list[tuple[str, list[str]]]) -> None:
        """Draw loss.png from metrics.jsonl: a panel per (y label with unit, [metric names]) that has data.

        A name may be a pattern, such as val/bits_per_char*. Nothing is drawn until one has two points.
        """
        rows = self.read()
        known = dict.fromkeys(name for row in rows for name in row)
        drawn = []
        for label, patterns in panels:
            names = dict.fromkeys(name for pattern in patterns for name in known if fnmatch(name, pattern))
            lines = [Line(name, name, *points(rows, name)) for name in names]
            drawn.append(("step", label, [line for line in lines if len(line.x)]))
        if any(len(line.x) > 1 for *_, lines in drawn for line in lines):
            write_file(self.out_dir / "loss.png", draw(drawn))

    def _samples_until(self, step: int) -> list[str]:
        """Lines of samples.txt up to and including the block of `step`."""
        if not self.samples_path.exists():
            return []
        lines = self.samples_path.read_text(encoding="utf-8", errors="replace").splitlines()
        for i, line in enumerate(lines):
            if (number := re.fullmatch("step ([0-9]{1,18})", line)) and int(number[1]) > step:
                return lines[:i]
        return lines

    @staticmethod
    def _keep(path: Path, lines: list[str]) -> None:
        """Replace a file that exists by these lines."""
        if path.exists():
            write_file(path, "".join(line + "\n" for line in lines).encode())


def plain(value: Any) -> Any:
    """A JSON value: tensors and numpy scalars unwrapped, floats to 6 digits, None where not finite."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def is_number(value: Any) -> bool:
    """Whether a value of metrics.jsonl, which somebody may have edited, can be drawn: a finite number."""
    return type(value) in (int, float) and -1e300 < value < 1e300


def points(rows: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of one metric, without the rows that lack it or have no number there."""
    found = [(row["step"], row[name]) for row in rows if is_number(row.get(name))]
    steps, values = zip(*found, strict=True) if found else ((), ())
    return np.array(steps), np.array(values, dtype=float)


class FiniteGuard:
    """Skips updates whose loss or gradient is not finite, and gives up after `limit` of them in a row."""

    def __init__(self, limit: int = 10):
        self.limit = limit
        self.in_a_row = 0
        self.stepped = False  # whether any update was applied

    def ok(self, step: int, loss: float, grad_norm: float) -> bool:
        """False: do not apply this step's gradients."""
        loss, grad_norm = float(loss), float(grad_norm)
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.in_a_row = 0
            self.stepped = True
            return True
        self.in_a_row += 1
        found = f"step {step}: loss {loss:g}, gradient norm {grad_norm:g}"
        if self.in_a_row >= self.limit:
            raise NonFiniteError(
                f"{found}: not finite {self.in_a_row} times in a row; the last good checkpoint is kept. "
                "Try a lower learning rate, a smaller grad_clip, or dtype=float32"
            )
        tqdm.write(f"{found}: update skipped ({self.in_a_row} in a row, stops at {self.limit})", file=sys.stderr)
        return False


def share(hits: list[bool]) -> float:
    """The share that is true, nan of nothing."""
    return sum(hits) / len(hits) if hits else math.nan


@dataclass(frozen=True)
class TextLoss:
    """What a model's loss on some text adds up to."""

    nats: float
    tokens: int  # those that were predicted
    characters: float  # of the text in them

    @property
    def per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.inf if self.per_token > 700 else math.exp(self.per_token)  # above, a float ends

    @property
    def bits_per_char(self) -> float:
        """Comparable between tokenizers, which perplexity is not."""
        return self.nats / self.characters / math.log(2)


@torch.no_grad()
def source_losses(
    model, corpus, env, max_tokens=None, batch_size=16, eos_id=None
) -> tuple[TextLoss, dict[str, TextLoss]]:
    """Loss on at most max_tokens of a Corpus (None: all of it) in rows of full context: over all, and by source.

    The rows are evenly spaced, so that each source has its share; its characters are in proportion to its tokens. No
    more is read than is scored, a batch at a time. Given eos_id, no document attends to those before it.
    """
    was_training = model.training
    model.eval()
    every = max(1, -(-len(corpus) // (max_tokens or len(corpus))))
    losses = {}
    for name, (start, stop) in corpus.segments.items():
        nats, scored = 0.0, 0
        for x, y in corpus.spaced_windows(start, stop, model.config.max_seq_len, every, batch_size):  # (B, T)
            n = int((y != -100).sum())
            documents = None if eos_id is None else document_numbers(x, eos_id).to(env.device)
            with env.autocast():
                nats += model(x.to(env.device), y.to(env.device), documents=documents).item() * n
            scored += n
        if scored:
            counts = corpus.meta["sources"][name][corpus.split]
            losses[name] = TextLoss(nats, scored, counts["characters"] * scored / counts["tokens"])
    model.train(was_training)
    if not losses:
        raise DataError(f"{corpus.path}: no source in it has two tokens to measure a loss on")
    columns = zip(*((loss.nats, loss.tokens, loss.characters) for loss in losses.values()), strict=True)
    return TextLoss(*map(sum, columns)), losses


def wilson_interval(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a proportion; z = 1.96 gives 95 %. (0, 1) when nothing was observed.

    https://en.wikipedia.org/wiki/Binomial_proportion_confidence_interval#Wilson_score_interval
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes out of {n}")
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    scale = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def distinct_2(texts: list[str], n_chars: int) -> float:
    """Distinct character bigrams in the first `n_chars` characters of the texts, divided by `n_chars`.

    The share of new bigrams falls with length, so systems are comparable only at one `n_chars`: nan when
    the texts are shorter than that. Bigrams do not cross from one text into the next.
    """
    if n_chars <= 0 or sum(map(len, texts)) < n_chars:
        return math.nan
    bigrams, left = set(), n_chars
    for text in texts:
        text = text[:left]
        left -= len(text)
        bigrams.update(text[i : i + 2] for i in range(len(text) - 1))
    return len(bigrams) / n_chars


if __name__ == "__main__":
    raise SystemExit("runs are compared by python -m common.compare")
