"""The checkpoints and runs under a folder: what they are, where they come from, their plots and samples.

What a visitor names is looked up among what was found there: no name becomes a path.
"""

import math
import os
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from common import checkpoint
from common.archive import Archive, ArchiveError
from common.files import file_sha256
from common.metrics import plain, read_metrics
from dataset.formats import escaped
from serving.generation import file_key
from serving.protocol import ApiError

NAME = re.compile(r"(ckpt|best|ckpt-(\d+))\.pt")
PLOTS = ("loss.png", "score_kl.png", "calibration.png")
LONGEST_SAMPLES = 1 << 20  # bytes of the end of samples.txt that are read
FRESH = 1.0  # seconds that a listing is good for


@dataclass(frozen=True)
class Entry:
    """A checkpoint file as its header tells; `problem` says why one cannot be used."""

    id: str  # demo/sft of out/demo/sft/ckpt.pt, demo/sft@300 of ckpt-300.pt, demo/sft@best of best.pt
    path: Path
    key: tuple  # of the file: changes when it does
    stage: str = ""
    step: int = 0
    tokens_seen: int = 0
    context: int = 0
    parameters: int = 0
    quant: str | None = None
    kind: str = ""  # chat, text (continues it), score (a reward model)
    parent: dict | None = None
    problem: str | None = None

    def json(self):
        return dict(
            id=self.id,
            object="model",
            created=int(self.key[2] / 1e9),
            owned_by="tiny-llama2-zh",
            bytes=self.key[3],
            parent=self.parent and {name: self.parent[name] for name in ("path", "stage", "sha256")},
            **{name: getattr(self, name) for name in "stage step tokens_seen context parameters quant kind".split()},
        )


def read_entry(name: str, path: Path, key: tuple) -> Entry:
    """The facts in a checkpoint's header; its tensors are not read, nor compared with their CRC before it is loaded."""
    try:
        with open(path, "rb") as file:
            content = Archive(file).content
        config, parent, quant = content["model_config"], content["parent"], content["quant"]
        entry = Entry(
            name,
            path,
            key,
            stage=str(content["stage"]),
            step=int(content["step"]),
            tokens_seen=int(content["tokens_seen"]),
            context=int(config["max_seq_len"]),
            parameters=n_parameters(config),
            quant=quant and str(quant["method"]),
            parent=parent and {name: str(parent[name]) for name in ("path", "stage", "sha256")},
        )
        kind = "score" if config["scalar_head"] else "text" if checkpoint.continues(entry) else "chat"
        return Entry(**entry.__dict__ | dict(kind=kind))
    except (ArchiveError, OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        why = str(error) if isinstance(error, ArchiveError | OSError) else "not a checkpoint of this project"
        return Entry(name, path, key, problem=escaped(why))


def n_parameters(config: dict) -> int:
    """What model.Llama of these facts has, counted without building it."""
    dim, V, layers = config["dim"], config["vocab_size"], config["n_layers"]
    hidden = config["hidden_dim"] or 32 * math.ceil(int(8 * dim / 3) / 32)
    kv = dim // config["n_heads"] * config["n_kv_heads"]
    block = 2 * dim * dim + 2 * dim * kv + 3 * dim * hidden + 2 * dim
    head = dim if config["scalar_head"] else 0 if config["tied"] else V * dim
    return V * dim + layers * block + dim + head


class Runs:
    """What is found under a root folder, read again when a file has changed."""

    def __init__(self, root: Path):
        self.root, self.lock, self.hashing = root, threading.Lock(), threading.Lock()
        self.known: dict[str, Entry] = {}
        self.hashes: dict[str, tuple] = {}  # id: (key, sha256)
        self.read_at = -math.inf

    def entries(self) -> dict[str, Entry]:
        """{id: Entry} of every checkpoint, the newest file first."""
        with self.lock:
            if time.monotonic() - self.read_at < FRESH:
                return self.known
            found = {}
            for run, (folder, names) in self.folders().items():
                for match in filter(None, map(NAME.fullmatch, names)):
                    name, path = run + {"ckpt": "", "best": "@best"}.get(match[1], f"@{match[2]}"), folder / match[0]
                    try:
                        key = file_key(path)
                    except OSError:  # gone meanwhile
                        continue
                    before = self.known.get(name)
                    found[name] = before if before and before.key == key else read_entry(name, path, key)
            self.known = dict(sorted(found.items(), key=lambda item: -item[1].key[2]))
            self.hashes = {name: value for name, value in self.hashes.items() if name in found}
            self.read_at = time.monotonic()
            return self.known

    def folders(self) -> dict[str, tuple[Path, list[str]]]:
        """{name: (folder, its files)} of the root and all below it, but for .new and .saved of a run at its start."""
        found, seen = {}, set()
        for folder, inner, files in os.walk(self.root, followlinks=True):
            inner[:] = sorted(name for name in inner if not name.startswith("."))
            if (real := os.path.realpath(folder)) in seen:  # a link that leads back
                inner.clear()
                continue
            seen.add(real)
            name = Path(folder).relative_to(self.root).as_posix()
            found[Path(real).name if name == "." else name] = Path(folder), files
        return found

    def usable(self) -> list[Entry]:
        """Those that write text."""
        return [entry for entry in self.entries().values() if entry.kind in ("chat", "text")]

    def model(self, name: str) -> Entry:
        """The checkpoint of that id, or ApiError."""
        entry = self.entries().get(name)
        if entry is None:
            raise ApiError(f"no model {name[:200]!a}: /v1/models lists them", 404, "model", "model_not_found")
        if entry.problem or entry.kind == "score":
            why = entry.problem or "a reward model, which writes nothing"
            raise ApiError(f"{entry.id}: {why}", 400, "model", "model_not_usable")
        return entry

    def tree(self) -> list[dict]:
        """Every checkpoint with its sha256, and the id of its parent where that file is here and unchanged."""
        nodes = [entry.json() | dict(problem=entry.problem, sha256=self._hash(entry))
                 for entry in self.entries().values()]  # fmt: skip
        by_hash = {}
        for node in nodes:  # of files with the same bytes the plain name
            if node["sha256"] and ("@" in by_hash.get(node["sha256"], "@")):
                by_hash[node["sha256"]] = node["id"]
        return [node | dict(parent_id=by_hash.get((node["parent"] or {}).get("sha256"))) for node in nodes]

    def _hash(self, entry: Entry) -> str | None:
        with self.hashing:  # one reads a file, the others have what it found
            key, digest = self.hashes.get(entry.id, (None, None))
            if key != entry.key:
                try:
                    digest = file_sha256(entry.path)
                except OSError:
                    return None
                self.hashes[entry.id] = entry.key, digest
            return digest

    def runs(self) -> list[dict]:
        """What each run's page shows: its stage, its plots, the last value of each metric."""
        entries = self.entries()
        shown = {"metrics.jsonl", "samples.txt", *PLOTS}
        return [
            self._run(name, folder, names, entries.get(name))
            for name, (folder, names) in self.folders().items()
            if shown & set(names)
        ]

    def _run(self, name, folder, names, entry):
        rows = read_metrics(folder / "metrics.jsonl")
        last = {key: value for row in rows for key, value in row.items() if "/" in key or key == "seconds"}
        return dict(
            id=name,
            stage=entry.stage if entry else "",
            step=max((row["step"] for row in rows), default=0),
            figures=plain({key: value for key, value in last.items() if isinstance(value, int | float)}),
            plots=[plot for plot in PLOTS if plot in names],
            samples="samples.txt" in names,
        )

    def _file(self, run: str, name: str, among) -> Path:
        folder, names = self.folders().get(run, (None, ()))
        if name not in among or name not in names:
            raise ApiError(f"no {name[:60]!a} of a run {run[:200]!a}", 404, "run")
        return folder / name

    def plot(self, run: str, name: str) -> bytes:
        """The PNG of a run."""
        return self._file(run, name, PLOTS).read_bytes()

    def samples(self, run: str) -> list[dict]:
        """[{step, pairs: [{prompt, reply}]}] of a run's samples.txt, in order."""
        path = self._file(run, "samples.txt", ("samples.txt",))
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - LONGEST_SAMPLES))
            return parse_samples(file.read().decode(errors="replace"))


def parse_samples(text: str) -> list[dict]:
    """What MetricLog.samples has written; a block whose beginning is missing is left out."""
    steps, at = [], None
    for line in text.splitlines():
        if match := re.fullmatch(r"step (\d+)", line):
            steps.append(dict(step=int(match[1]), pairs=[]))
        elif steps and (match := re.match(r"  (prompt|reply): ?", line)):
            at = match[1]
            if at == "prompt":
                steps[-1]["pairs"].append(dict(prompt="", reply=""))
            if steps[-1]["pairs"]:
                steps[-1]["pairs"][-1][at] = line[match.end() :]
        elif steps and at and steps[-1]["pairs"] and line.startswith("    "):
            steps[-1]["pairs"][-1][at] += "\n" + line[4:]
    return steps
