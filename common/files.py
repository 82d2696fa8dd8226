"""Files and folders that appear whole or not at all, and JSON."""

import errno
import hashlib
import json
import os
import re
import secrets
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has none: there two processes can still write into one folder
    fcntl = None

from common.config import ConfigError, UserError, ending
from dataset.formats import OURS, atomic_write


def save_config(config: dict, out_dir: str | Path) -> None:
    """Write the resolved config to out_dir/config.json."""
    write_json(Path(out_dir) / "config.json", config)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Gives an OSError, such as that of a full disk, the name of the file that it came from."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_file(path: str | Path, data: bytes) -> None:
    """Replace `path` by `data` in one step, so that a reader sees the old file or the new one, never half."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with naming(path), atomic_write(path) as file:
        file.write(data)


def write_rows(path: str | Path, rows: Iterable[dict]) -> None:
    """A .jsonl file of rows, whole or not at all."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with naming(path), atomic_write(path, "w") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; a script that ends with nothing in them removes them again."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    ending.callback(_remove_empty, made)


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):  # of the first that something is in
        for folder in filter(Path.exists, folders):
            folder.rmdir()


_locks: dict[Path, int] = {}  # folder: file descriptor; this process may lock again what it has locked


def lock(folder: Path, shared: bool = False) -> None:
    """Keep other processes from writing into a folder until `unlock` or the end of this one, even by SIGKILL.

    UserError if one does; several may share it. Where the file system has no locks (some of NFS) nothing is done.
    """
    folder = folder.resolve()
    if fcntl is None or folder in _locks:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise UserError(f"{folder}: another process writes into it: let it end, or choose another --out") from None
    else:
        _locks[folder] = descriptor
        ending.callback(unlock, folder)


def unlock(folder: Path) -> None:
    if (descriptor := _locks.pop(folder.resolve(), None)) is not None:
        os.close(descriptor)


if fcntl is not None:  # a worker that outlives this process for a moment holds no lock

    def _forget() -> None:
        for descriptor in _locks.values():
            os.close(descriptor)
        _locks.clear()

    os.register_at_fork(after_in_child=_forget)


MARK = ".written-by-tiny-llama2-zh.json"  # in a folder that was written whole: its files, so that no other is removed
_SMALL = 1 << 20  # bytes: a smaller file is known by its content, a larger one by its size


@contextmanager
def new_folder(out: str | Path, overwrite: bool, names: Iterable[str]) -> Iterator[Path]:
    """A folder to fill with files of these names, which becomes `out` when the block ends well, else vanishes.

    With `overwrite` it replaces one that was made here and holds nothing but what was written then.
    """
    out = Path(out)
    if out.name in ("", "..") or out.is_symlink():
        raise ConfigError(f"out={out}: the name of a new folder is needed")
    _clear_away(out)
    if out.exists():
        if not overwrite:
            raise ConfigError(f"{out} exists: give --overwrite to replace it, or another --out")
        if why := not_ours(out):
            raise ConfigError(f"{out} {why}: choose another --out, or remove it yourself")
    fresh = secrets.token_hex(4)
    new, old = (out.with_name(f".{out.name}.{fresh}.{kind}") for kind in ("new", "old"))
    try:
        make_folder(new)
        lock(new)
        write_json(new / MARK, {"files": dict.fromkeys(names)})
        yield new
        written = {path.name: _known_by(path) for path in sorted(map(new.joinpath, names)) if path.exists()}
        write_json(new / MARK, {"files": written})
        for path in new.iterdir():
            with open(path, "r+b") as file:  # Windows syncs only what may be written
                os.fsync(file.fileno())
        if out.exists() and overwrite:
            lock(out)
            os.rename(out, old)
        os.rename(new, out)  # fails where somebody else has made `out` meanwhile
    except OSError as error:
        why = error.strerror or f"{error}: is the disk full?"  # NumPy's own error has no number
        raise UserError(f"cannot write {out}: {why}") from error
    finally:
        if old.is_dir() and not out.exists():
            os.rename(old, out)
        for left in (new, old):
            _remove(left)
        for folder in (new, out):
            unlock(folder)


def _clear_away(out: Path) -> None:
    """Put back what one that was killed was about to replace, and remove what it had begun to write beside `out`."""
    name = re.compile(rf"\.{re.escape(out.name)}\.[0-9a-f]{{8}}\.(new|old)")
    for left in out.parent.glob(".*"):
        if (kind := name.fullmatch(left.name)) is None or left.is_symlink() or not left.is_dir() or fcntl is None:
            continue
        marked = (left / MARK).is_file()
        if not marked and (kind[1] == "old" or any(not path.name.endswith(OURS) for path in left.iterdir())):
            continue  # it is somebody else's
        with suppress(UserError):  # it is still being written
            lock(left)
            if kind[1] == "old" and marked and not out.exists():
                os.rename(left, out)
            elif kind[1] == "new" or not_ours(left) is None:
                _remove(left)
            unlock(left)


def _remove(folder: Path) -> None:
    """Remove the files that the mark of a folder lists, then the mark, and the folder if nothing else is in it."""
    with suppress(OSError, UserError):
        if folder.suffix == ".old":  # a kill may leave it empty, and only an empty .new is known to be ours
            folder = folder.rename(folder.with_suffix(".new"))
        listed = read_json(folder / MARK).get("files") if (folder / MARK).is_file() else {}
        for path in folder.iterdir():
            if path.name.endswith(OURS) or (isinstance(listed, dict) and path.name in listed):
                path.unlink()
        (folder / MARK).unlink(missing_ok=True)
        folder.rmdir()


def not_ours(folder: Path) -> str | None:
    """Why a folder may hold something that `new_folder` did not write, or None."""
    if not (folder / MARK).is_file():
        return "was not written here"
    written = read_json(folder / MARK).get("files")
    for path in sorted(folder.iterdir()):
        if path.name != MARK and (not isinstance(written, dict) or path.name not in written):
            return f"holds {path.name}, which was not written here"
        if path.name != MARK and (not path.is_file() or path.is_symlink() or written[path.name] != _known_by(path)):
            return f"holds {path.name}, which was changed since"
    return None


def _known_by(path: Path) -> int | str:
    size = path.stat().st_size
    return file_sha256(path) if size < _SMALL else size


REPORT_MARK = f"<!-- written by {OURS} -->"  # the last line of a report of older code


def signed(text: str) -> bytes:
    """A report as it is to be written: its last line says whose it is and, by a sha256, whether it was changed."""
    lines = text.encode().splitlines()
    return b"\n".join([*lines, _mark(lines), b""])


def _mark(lines: list[bytes]) -> bytes:
    digest = hashlib.sha256(b"\n".join(lines)).hexdigest()
    return f"<!-- written by {OURS}, sha256 {digest} -->".encode()


def is_ours(report: Path) -> bool:
    """Whether one of our commands wrote this report (.md, .html), though it may have been changed since."""
    return _is_mark((report.read_bytes().splitlines() or [b""])[-1])


def _is_mark(line: bytes) -> bool:
    return line.startswith(REPORT_MARK.removesuffix(" -->").encode())


def refuse_foreign(path: str | Path, suffix: str) -> None:
    """ConfigError unless a command may write a picture (.png) or report (.md, .html) there: nothing is, or ours."""
    path = Path(path)
    if path.suffix != suffix:
        raise ConfigError(f"{path}: the name of a {suffix} file is needed")
    check_folder(path)
    if path.exists() and (why := changed(path)):
        raise ConfigError(f"{path} {why}: choose another name, or remove it yourself")


def check_folder(path: str | Path) -> None:
    """ConfigError, before the work that a file is to hold, unless one may be made there."""
    folder = next(each for each in Path(path).absolute().parents if os.path.lexists(each))
    if not folder.is_dir():
        raise ConfigError(f"{path}: {folder} is no folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{path}: {folder} may not be written")


def changed(path: Path) -> str | None:
    """Why a picture or report may hold what nobody here wrote; None if it is as it was written."""
    data = b"" if path.is_dir() else path.read_bytes()
    *lines, last = data.splitlines() or [b""]
    if path.suffix == ".png":
        whole = _has_software(data)
    else:
        whole = last in (REPORT_MARK.encode(), _mark(lines))
        if _is_mark(last) and not whole:
            return "was changed since it was written"
    return None if whole else "was not written by such a command"


def _has_software(data: bytes) -> bool:
    """Whether a picture has the Software chunk of ours (PNG, 11.3.3.2)."""
    at = 8 if data.startswith(b"\x89PNG\r\n\x1a\n") else len(data)
    while at + 8 <= len(data):  # a chunk: its length, type, data and CRC
        size, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"tEXt" and data[at + 8 : at + 8 + size] == b"Software\0" + OURS.encode():
            return True
        at += size + 12
    return False


def read_json(path: Path) -> dict:
    """A JSON object, or UserError that says what is wrong with the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
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
