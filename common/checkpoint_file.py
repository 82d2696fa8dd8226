"""The file of a checkpoint and its older ones: written all or not at all, read with care, found again after a crash.

out/ckpt.pt is the newest; out/ckpt-<step>.pt are those before it, as many as keep_last says; out/best.pt, if kept, has
the lowest validation loss. A save writes a file beside it, gives ckpt.pt its second name ckpt-<step>.pt, moves the new
file over ckpt.pt and then removes what is too old. So at no moment is ckpt.pt absent or half written, and a kill leaves
at worst a file too many, which --resume takes back (`take_back`). Which ckpt-<step>.pt are the run's own is kept in the
checkpoint itself: no other is ever removed or replaced, not even one that is a second name of ckpt.pt.
"""

import io
import os
import pickle
import re
import shutil
import sys
import threading
import zipfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

from common.archive import Archive, ArchiveError
from common.config import UserError
from common.ranges import LARGEST
from dataset.formats import OURS, atomic_write, escaped, temporary_name
from model import ModelConfig
from tokenizer import DOCUMENT_IDS

FORMAT_VERSION = 1
FILE_NAME = "ckpt.pt"
BEST_NAME = "best.pt"


class CheckpointError(UserError):
    """A checkpoint that is absent, damaged, or does not belong to what it is used with."""


class DamagedError(CheckpointError):
    """A checkpoint whose bytes are not those that were written: an older one may be whole."""


@dataclass
class Checkpoint:
    path: Path
    stage: str
    step: int
    tokens_seen: int
    model_config: dict
    weights: dict  # tensor by parameter name; float32 unless quantized
    tokenizer: bytes  # the SentencePiece model, so that a checkpoint generates alone
    document_ids: list  # what a document of pretraining opens and closes with
    config: dict  # the resolved config of the stage
    parent: dict | None  # path, stage, sha256 of the checkpoint that it started from
    git_commit: str | None
    quant: dict | None  # how the layers were quantized
    training: dict | None  # optimizer, rng, extra, data: what --resume needs
    kept: list = field(default_factory=list)  # steps of the run's older checkpoints, ckpt-<step>.pt

    def drop(self) -> None:
        """Forget the tensors once a model has taken them: they would stay in memory all run."""
        self.weights, self.training = {}, None


def find(path) -> Path:
    """The checkpoint file behind a run directory or a file name."""
    path = Path(path)
    file = path / FILE_NAME if path.is_dir() else path
    if file.is_file():
        return file
    message = f"no checkpoint at {path}" + (f": looked for {file}" if file != path else "")
    stages = sorted(str(other.parent) for other in path.glob(f"*/{FILE_NAME}")) if path.is_dir() else []
    raise CheckpointError(message + (f"; there is one in {', '.join(stages)}" if stages else ""))


def older(path: Path) -> list[Path]:
    """The checkpoints kept from before the one at `path`, the latest first: ckpt-<step>.pt beside ckpt.pt."""
    name = re.compile(rf"{re.escape(path.stem)}-(\d+){re.escape(path.suffix)}")
    steps = {file: int(match[1]) for file in path.parent.iterdir() if (match := name.fullmatch(file.name))}
    return sorted(steps, key=steps.get, reverse=True)


def load(path, training: bool = True) -> Checkpoint:
    """Read a checkpoint (run directory or file) to the CPU, after checking each record's CRC.

    training=False leaves out what only --resume needs, twice as much as the weights.
    """
    path = find(path)
    try:
        return _read(path, training)
    except DamagedError as error:
        whole = _first_whole(older(path))
        raise DamagedError(f"{error}; {whole.path} (step {whole.step}) is whole" if whole else str(error)) from None


def load_newest(path: Path, verbose: bool = True) -> Checkpoint:
    """What to resume from: the checkpoint at `path`, or where that is damaged or gone the latest older one."""
    newest, *others = [file for file in (path, *older(path)) if file.is_file()]
    try:
        return _read(newest)
    except DamagedError as error:
        whole = _first_whole(others)
        if whole is None:
            raise
        if verbose:
            print(f"{error}; going on from {whole.path} (step {whole.step})", file=sys.stderr)
        return whole


def make_newest(ckpt: Checkpoint, path: Path) -> None:
    """Let an older checkpoint take the place of the damaged one at `path`; it keeps its own name too."""
    _link(ckpt.path, path)


def _first_whole(files: list[Path]) -> Checkpoint | None:
    for file in files:
        try:
            return _read(file)
        except CheckpointError:  # whatever has that name
            continue
    return None


def _read(path: Path, training: bool = True) -> Checkpoint:
    try:
        with open(path, "rb") as file:
            archive = Archive(file)
            payload = archive.fill(_checked_fields(archive.content) | ({} if training else dict(training=None)))
            archive.check_rest()
        ckpt = Checkpoint(path, **payload)
        _check(ckpt)
    except ArchiveError as error:
        raise (DamagedError if error.damaged else CheckpointError)(escaped(f"{path}: {error}")) from None
    except RecursionError:
        raise CheckpointError(f"{path}: not a checkpoint, it is nested without end") from None
    return ckpt


def _checked_fields(payload) -> dict:
    """The fields of a Checkpoint, if the version is ours and each is there and of its type."""
    version = payload.pop("format_version", None) if isinstance(payload, dict) else None
    if version is None:
        raise ArchiveError("not a checkpoint of this project, it has no format_version", damaged=False)
    if version != FORMAT_VERSION:
        raise ArchiveError(f"format version {version}, this code reads version {FORMAT_VERSION}", damaged=False)
    payload = {"document_ids": list(DOCUMENT_IDS), "kept": []} | payload  # older files: ours, not imported
    names = {each.name for each in fields(Checkpoint)} - {"path"}
    if payload.keys() != names:
        odd = ", ".join(sorted(payload.keys() ^ names, key=str))
        raise ArchiveError(f"fields missing or unknown: {odd}", damaged=False)
    return payload


def _check(ckpt: Checkpoint) -> None:
    """Refuse fields of another type or out of range, and weights that are not finite."""

    def need(holds, what):
        if not holds:
            raise ArchiveError(f"not a checkpoint of this project: {what}", damaged=False)

    if isinstance(ckpt.tokenizer, torch.Tensor):
        need(ckpt.tokenizer.dtype == torch.uint8, f"its tokenizer is {ckpt.tokenizer.dtype}, no bytes")
        ckpt.tokenizer = ckpt.tokenizer.numpy().tobytes()
    for each in fields(Checkpoint):
        kind = getattr(each.type, "__name__", each.type)
        value = getattr(ckpt, each.name)
        need(isinstance(value, each.type) and not isinstance(value, bool), f"its {each.name} is no {kind}")
    need(ckpt.tokenizer, "its tokenizer is empty")
    need(_is_plain(ckpt.config), "config holds what no config file says")
    need(ckpt.quant is None or isinstance(ckpt.quant.get("method"), str), "quant names no method")
    for key, largest in (("step", LARGEST), ("tokens_seen", 10**18)):
        need(0 <= (n := getattr(ckpt, key)) <= largest, f"{key}={n} is out of range")
    ids = ckpt.document_ids
    need(len(ids) == 2 and all(type(i) is int and i >= 0 for i in ids), "document_ids are two token ids")
    facts = (ckpt.parent or {}).get
    need(ckpt.parent is None or all(isinstance(facts(key), str) for key in ("path", "stage", "sha256")),
         "parent has path, stage and sha256")  # fmt: skip
    try:
        ckpt.model_config = asdict(ModelConfig(**ckpt.model_config))
    except (TypeError, ValueError, ArithmeticError) as error:
        need(False, f"model_config: {first_line(error)}")
    vocab_size = ckpt.model_config["vocab_size"]
    need(max(ids) < vocab_size, f"document_ids={ids}: the vocabulary has 0 to {vocab_size - 1}")
    kinds = dict(optimizer=list, rng=dict, extra=dict | None, data=dict | None)
    for key, value in (ckpt.training or {}).items():
        need(key in kinds and isinstance(value, kinds[key]), f"training has an unknown {key}")
    state = (ckpt.training or {}).keys() - {"data"}
    need(state in (set(), kinds.keys() - {"data"}), f"training has {', '.join(sorted(state))} only")
    hashes = (ckpt.training or {}).get("data") or {}
    need(all(isinstance(each, str) for pair in hashes.items() for each in pair), "training.data names no files")
    for name, tensor in ckpt.weights.items():
        need(isinstance(name, str) and isinstance(tensor, torch.Tensor), f"weights has an unknown {name}")
    if odd := not_finite(ckpt.weights):
        raise ArchiveError(f"{odd} holds values that are not finite")


def _is_plain(value) -> bool:
    """Whether it is what a config may hold: text, numbers, truths, None, lists of such and dicts by name."""
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float)


def not_finite(weights: dict) -> str | None:
    """The name of the first tensor that holds nan or inf."""
    for name, w in weights.items():  # nan goes through aminmax, which takes a tenth of the time of isfinite
        if w.is_floating_point() and w.numel() and not torch.stack(w.aminmax()).isfinite().all():
            return name
    return None


def _save_deflated(payload: dict, file) -> None:
    """torch.save with every record compressed; torch.load reads that too, but not with mmap.

    Weights of few bits do not fill them: int8 loses a tenth, the padding of int4 nearly all. Float32 would gain little.
    """
    plain = io.BytesIO()
    torch.save(payload, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        for record in source.infolist():
            info = zipfile.ZipInfo(record.filename)  # of a fixed date: the same checkpoint gives the same bytes
            target.writestr(info, source.read(record), zipfile.ZIP_DEFLATED)


def write(path: Path, payload: dict, deflate: bool = False, keep_last: int = 1) -> None:
    """Put a checkpoint at `path`, all of it or nothing; of those that were there the latest keep_last - 1 are kept."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        own = own_steps(path)
        stays = own[1 - keep_last :] if keep_last > 1 else []
        try:
            with atomic_write(path) as file:
                (_save_deflated if deflate else torch.save)(payload | dict(kept=own), file)
                file.flush()
                with open(file.name, "rb") as written:  # what cannot be read back must not replace what can
                    Archive(written)
                if own and own[-1] in stays and not (kept := second_name(path, own[-1])).exists():
                    _link(path, kept)
        finally:
            _unlink_same(path, own)
        for step in own:
            if step not in stays:
                second_name(path, step).unlink(missing_ok=True)
    except (OSError, RuntimeError, pickle.PickleError, ArchiveError) as error:
        left = f"the previous checkpoint {path} is intact" if path.is_file() else "nothing was left behind"
        raise CheckpointError(f"cannot save {path}: {_reason(error)}; {left}") from error


def second_name(path: Path, step: int) -> Path:
    return path.with_name(f"{path.stem}-{step}{path.suffix}")


def own_steps(path: Path) -> list[int]:
    """The steps of the checkpoint at `path` and of those before it that its run has made and not removed yet.

    That of `path` itself is left out where somebody else's file has its second name (`take_back` removes ours).
    """
    kept, step = _listed(path)
    before = [n for n in kept if n < step and second_name(path, n).is_file()]
    return before if step is None or os.path.lexists(second_name(path, step)) else [*before, step]


def _listed(path: Path) -> tuple[list[int], int | None]:
    """(steps of its run's own files before it, its step), as a checkpoint says; nothing of one absent or damaged."""
    try:
        with open(path, "rb") as file:
            content = Archive(file).content
        return list(map(int, content.get("kept", []))), int(content["step"])
    except (OSError, ArchiveError, LookupError, TypeError, ValueError, AttributeError):
        return [], None


def take_back(path: Path) -> None:
    """Remove the second name that a save which was then killed gave to the checkpoint at `path`.

    What it was about to put there, still under a temporary name, lists it; a user's hard link it does not list.
    """
    for left in path.parent.glob(f"{path.name}.*.{OURS}"):
        _unlink_same(path, _listed(left)[0])


def _unlink_same(path: Path, steps: list[int]) -> None:
    for second in (second_name(path, step) for step in steps):
        if path.exists() and second.exists() and second.samefile(path):
            second.unlink()


def stage_of(path: Path) -> str | None:
    """The stage whose run wrote a checkpoint, in whatever version; None if none did, "" if it is damaged or gone."""
    try:
        with open(path, "rb") as file:
            content = Archive(file).content
    except OSError:
        return ""
    except ArchiveError as error:
        return "" if error.damaged else None
    if not isinstance(content, dict) or "format_version" not in content:
        return None
    return str(content.get("stage", ""))


def _link(path: Path, name: Path) -> None:
    """Give a file a second name, in place of what has it, which stays when another takes the first."""
    try:
        os.link(path, temporary_name(name))
        os.replace(temporary_name(name), name)
    except OSError:  # a file system without hard links
        with open(path, "rb") as source, atomic_write(name) as copy:
            shutil.copyfileobj(source, copy)


class Background:
    """Saves in a thread, one at a time, while training goes on. What failed there is raised by the next call."""

    def __init__(self):
        self.thread = self.error = None

    def start(self, function, *args, **kwargs) -> None:
        self.wait()

        def run():
            try:
                function(*args, **kwargs)
            except BaseException as error:
                self.error = error

        self.thread = threading.Thread(target=run)  # no daemon: Python waits for it in any case
        self.thread.start()

    def check(self) -> None:
        """Raise what a save has failed of, if it has."""
        error, self.error = self.error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self.check()


def _reason(error: BaseException) -> str:
    """Why torch.save failed, in one line."""
    cause = error  # torch turns the OSError of the file below it into a RuntimeError about positions
    while cause and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return (cause and cause.strerror) or first_line(error)


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
