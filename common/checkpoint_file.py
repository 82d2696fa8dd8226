"""The file of a checkpoint and its older ones: written all or not at all, read with care, found again after a crash.

out/ckpt.pt is the newest; out/ckpt-<step>.pt are those before it, as many as keep_last says; out/best.pt, if kept, has
the lowest validation loss. A save writes ckpt.pt.tmp, gives ckpt.pt its second name ckpt-<step>.pt, moves the new file
over ckpt.pt and then removes what is too old. So at no moment is ckpt.pt absent or half written, and a kill leaves at
worst a file too many, which the next save removes.
"""

import io
import os
import pickle
import re
import shutil
import sys
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from common.config import UserError
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
    document_ids: list[int]  # what a document of pretraining opens and closes with
    config: dict  # the resolved config of the stage
    parent: dict | None  # path, stage, sha256 of the checkpoint that it started from
    git_commit: str | None
    quant: dict | None  # how the layers were quantized
    training: dict | None  # optimizer, rng, extra: what --resume needs


def find(path) -> Path:
    """The checkpoint file behind a run directory or a file name."""
    path = Path(path)
    file = path / FILE_NAME if path.is_dir() else path
    if file.is_file():
        return file
    message = f"no checkpoint at {path}: looked for {file}"
    stages = sorted(str(other.parent) for other in path.glob(f"*/{FILE_NAME}")) if path.is_dir() else []
    raise CheckpointError(message + (f"; there is one in {', '.join(stages)}" if stages else ""))


def older(path: Path) -> list[Path]:
    """The checkpoints kept from before the one at `path`, the latest first: ckpt-<step>.pt beside ckpt.pt."""
    name = re.compile(rf"{re.escape(path.stem)}-(\d+){re.escape(path.suffix)}")
    steps = {file: int(match[1]) for file in path.parent.iterdir() if (match := name.fullmatch(file.name))}
    return sorted(steps, key=steps.get, reverse=True)


def load(path) -> Checkpoint:
    """Read a checkpoint (run directory or file) to the CPU, after checking each record's CRC."""
    path = find(path)
    try:
        return _read(path)
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
    """Let an older checkpoint take the place of the damaged one at `path`, as if that had never been saved."""
    for file in older(path):
        if file == ckpt.path:
            break
        file.unlink()  # a later one, unreadable too
    os.replace(ckpt.path, path)


def _first_whole(files: list[Path]) -> Checkpoint | None:
    for file in files:
        try:
            return _read(file)
        except DamagedError:
            continue
    return None


def _read(path: Path) -> Checkpoint:
    with open(path, "rb") as file:
        try:
            damaged = zipfile.ZipFile(file).testzip()  # torch.load itself does not compare the CRCs
        except Exception:  # a malformed archive can raise anything
            raise DamagedError(f"{path}: cut short or not a checkpoint") from None
        if damaged:
            raise DamagedError(f"{path}: damaged, the CRC of {damaged} does not match its bytes")
        file.seek(0)
        try:
            payload = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a malformed pickle too
            raise CheckpointError(f"{path}: not loaded: {_reason(error)}") from None
    version = payload.pop("format_version", None) if isinstance(payload, dict) else None
    if version is None:
        raise CheckpointError(f"{path}: not a checkpoint of this project, it has no format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format version {version}, this code reads version {FORMAT_VERSION}")
    payload = {"document_ids": list(DOCUMENT_IDS)} | payload  # older files: ours, not imported
    names = {field.name for field in fields(Checkpoint)} - {"path"}
    if payload.keys() != names:
        raise CheckpointError(
            f"{path}: fields missing or unknown: {', '.join(sorted(payload.keys() ^ names, key=str))}"
        )
    payload["tokenizer"] = payload["tokenizer"].numpy().tobytes()
    return Checkpoint(path=path, **payload)


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
    tmp = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(tmp, "wb") as file:
            (_save_deflated if deflate else torch.save)(payload, file)
            file.flush()
            os.fsync(file.fileno())
        # what cannot be read back must not replace what can; mmap reads no tensor data
        torch.load(tmp, map_location="cpu", weights_only=True, mmap=not deflate)
        if keep_last > 1:
            _keep(path)
        os.replace(tmp, path)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        left = f"the previous checkpoint {path} is intact" if path.is_file() else "nothing was left behind"
        raise CheckpointError(f"cannot save {path}: {_reason(error)}; {left}") from error
    finally:
        if tmp.exists():
            tmp.unlink()
    for file in older(path)[keep_last - 1 :]:
        file.unlink()


def _keep(path: Path) -> None:
    """Give the checkpoint at `path`, where it can be read, a second name, which stays when the next takes its place."""
    try:
        step = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"]
    except Exception:  # absent, or cut short since this run began
        return
    kept = path.with_name(f"{path.stem}-{step}{path.suffix}")
    kept.unlink(missing_ok=True)  # left by a save that was killed
    try:
        os.link(path, kept)
    except OSError:  # a file system without hard links
        try:
            shutil.copyfile(path, kept)
        except OSError:
            kept.unlink(missing_ok=True)
            raise


def _reason(error: BaseException) -> str:
    """Why torch.save or torch.load failed, in one line."""
    if isinstance(error, pickle.UnpicklingError):
        refused = re.search(r"GLOBAL (\S+)", str(error))
        return f"it holds {refused.group(1) if refused else 'an object'}, not only tensors and plain values"
    cause = error  # torch turns the OSError of the file below it into a RuntimeError about positions
    while cause and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return (cause and cause.strerror) or first_line(error)


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
