"""Files and folders that appear whole or not at all, and JSON."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.config import ConfigError, UserError
from dataset.formats import atomic_write


def save_config(config: dict, out_dir: str | Path) -> None:
    """Write the resolved config to out_dir/config.json."""
    write_json(Path(out_dir) / "config.json", config)


def write_file(path: str | Path, data: bytes) -> None:
    """Replace `path` by `data` in one step, so that a reader sees the old file or the new one, never half."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(data)


@contextmanager
def new_folder(out: str | Path, names: set[str], overwrite: bool) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when the block ends well and vanishes when it does not.

    With `overwrite` it replaces one that holds nothing but files of these names.
    """
    out = Path(out)
    new, old = (out.with_name(f"{out.name}.{ending}") for ending in ("tmp", "old"))
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} exists: give --overwrite to replace it, or another --out")
    others = {path.name for path in out.iterdir()} - names if out.is_dir() else {out.name} if out.exists() else set()
    if others:
        raise ConfigError(f"{out} holds {min(others)}, which was not written here: choose another --out")
    shutil.rmtree(new, ignore_errors=True)  # left by one that was killed, as the next
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        yield new
        for path in new.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if out.is_dir():
            os.rename(out, old)
        os.rename(new, out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        if old.is_dir() and not out.exists():
            os.rename(old, out)
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)


def read_json(path: Path) -> dict:
    """A JSON object, or UserError that says what is wrong with the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a JSON object")
    return values


def write_json(path: Path, values: dict) -> None:
    write_file(path, (json.dumps(values, ensure_ascii=False, indent=2) + "\n").encode())


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
