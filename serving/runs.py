"""The checkpoints and runs under a folder: what they are, where they come from, their plots and samples.

What a visitor names is looked up among what was found there: no name becomes a path.
"""

import math
import threading
import time
from pathlib import Path

from common import runs
from common.files import file_sha256
from common.metrics import is_number, read_metrics
from common.runs import PLOTS, Entry
from serving.protocol import ApiError

FRESH = 1.0  # seconds that a listing is good for


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
            for name, path, key in runs.find_checkpoints(self.folders()):
                before = self.known.get(name)
                found[name] = before if before and before.key == key else runs.read_entry(name, path, key)
            self.known = dict(sorted(found.items(), key=lambda item: -item[1].key[2]))
            self.hashes = {name: value for name, value in self.hashes.items() if name in found}
            self.read_at = time.monotonic()
            return self.known

    def folders(self) -> dict[str, tuple[Path, list[str]]]:
        return runs.find_folders(self.root)

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
        by_hash = runs.by_content({node["id"]: node["sha256"] for node in nodes})
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
        last = {key: value for row in rows for key, value in row.items() if key == "seconds"} | runs.last_values(rows)
        return dict(
            id=name,
            stage=entry.stage if entry else "",
            step=max((row["step"] for row in rows), default=0),
            figures={key: value for key, value in last.items() if is_number(value)},
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
        return runs.read_samples(self._file(run, "samples.txt", ("samples.txt",)))
