"""The checkpoints and runs under a folder: what they are, where they come from, what they logged.

A checkpoint is known by its header: no model is built, and its tensors are not kept.
"""

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from common import checkpoint
from common.archive import Archive, ArchiveError
from dataset.formats import escaped, writable

NAME = re.compile(r"(ckpt|best|ckpt-(\d+))\.pt")
PLOTS = ("loss.png", "score_kl.png", "calibration.png")
LONGEST_SAMPLES = 1 << 20  # bytes of the end of samples.txt that are read


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
    config: dict = field(default_factory=dict)  # of the stage, as it was resolved
    git_commit: str = ""
    problem: str | None = None

    @property
    def bytes(self):
        return self.key[3]

    def json(self):
        return dict(
            id=self.id,
            object="model",
            created=int(self.key[2] / 1e9),
            owned_by="tiny-llama2-zh",
            bytes=self.bytes,
            parent=self.parent and {name: self.parent[name] for name in ("path", "stage", "sha256")},
            **{name: getattr(self, name) for name in "stage step tokens_seen context parameters quant kind".split()},
        )


def file_key(path: Path) -> tuple:
    facts = os.stat(path)
    return path, facts.st_ino, facts.st_mtime_ns, facts.st_size


def read_entry(name: str, path: Path, key: tuple, whole: bool = False) -> Entry:
    """The facts in a checkpoint's header. With `whole` its other bytes are compared with their CRC too."""
    try:
        with open(path, "rb") as file:
            archive = Archive(file)
            damage = damage_of(archive) if whole else None
        content = archive.content
        config, parent, quant = content["model_config"], content["parent"], content["quant"]
        entry = Entry(
            name,
            path,
            key,
            stage=writable(str(content["stage"])),
            step=count(content["step"]),
            tokens_seen=count(content["tokens_seen"]),
            context=count(config["max_seq_len"]),
            parameters=count(n_parameters(config)),
            quant=quant and writable(str(quant["method"])),
            parent=parent and {name: writable(str(parent[name])) for name in ("path", "stage", "sha256")},
            config=dict(content["config"]),
            git_commit=str(content["git_commit"] or ""),
        )
        kind = "score" if config["scalar_head"] else "text" if checkpoint.continues(entry) else "chat"
        return Entry(**entry.__dict__ | dict(kind=kind, problem=damage))
    except (ArchiveError, OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        why = str(error) if isinstance(error, ArchiveError | OSError) else "not a checkpoint of this project"
        return Entry(name, path, key, problem=escaped(why))


def count(n) -> int:
    """A whole number that JSON and a page can hold; ValueError of any other."""
    if type(n) is not int or not 0 <= n < 1 << 53:
        raise ValueError(n)
    return n


def damage_of(archive: Archive) -> str | None:
    """What is wrong with the bytes of the tensors, if anything is."""
    try:
        archive.check_rest()
    except ArchiveError as error:
        return escaped(str(error))
    return None


def n_parameters(config: dict) -> int:
    """What model.Llama of these facts has, counted without building it."""
    dim, V, layers = config["dim"], config["vocab_size"], config["n_layers"]
    hidden = config["hidden_dim"] or 32 * math.ceil(int(8 * dim / 3) / 32)
    kv = dim // config["n_heads"] * config["n_kv_heads"]
    block = 2 * dim * dim + 2 * dim * kv + 3 * dim * hidden + 2 * dim
    head = dim if config["scalar_head"] else 0 if config["tied"] else V * dim
    return V * dim + layers * block + dim + head


def find_folders(root: Path) -> dict[str, tuple[Path, list[str]]]:
    """{name: (folder, its files)} of the root and all below it, but for .new and .saved of a run at its start.

    What is no file is left out: to open a named pipe would wait for ever.
    """
    found, seen = {}, set()
    for folder, inner, files in os.walk(root, followlinks=True):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        if (real := os.path.realpath(folder)) in seen:  # a link that leads back
            inner.clear()
            continue
        seen.add(real)
        name = Path(folder).relative_to(root).as_posix()
        files = [file for file in files if os.path.isfile(os.path.join(folder, file))]
        found[writable(Path(real).name if name == "." else name)] = Path(folder), files
    return found


def find_checkpoints(folders: dict[str, tuple[Path, list[str]]]) -> Iterator[tuple[str, Path, tuple]]:
    """(id, path, key) of every checkpoint in what find_folders gave."""
    for run, (folder, names) in folders.items():
        for match in filter(None, map(NAME.fullmatch, names)):
            path = folder / match[0]
            try:
                yield run + {"ckpt": "", "best": "@best"}.get(match[1], f"@{match[2]}"), path, file_key(path)
            except OSError:  # gone meanwhile
                continue


def by_content(hashes: dict[str, str | None]) -> dict[str, str]:
    """{sha256: id} of {id: sha256}; of files with the same bytes the plain name, without @."""
    found = {}
    for name, digest in hashes.items():
        if digest and "@" in found.get(digest, "@"):
            found[digest] = name
    return found


def last_values(rows: list[dict]) -> dict:
    """The last value of each metric in rows of metrics.jsonl."""
    return {key: value for row in rows for key, value in row.items() if "/" in key}


def read_samples(path: Path) -> list[dict]:
    """[{step, pairs: [{prompt, reply}]}] of a samples.txt, in order; of a very long one the end."""
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
