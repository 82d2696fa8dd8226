"""The artifact formats: token files (.bin), example files (.pkl) and the meta.json that describes them.

A .bin is raw uint16 (uint32 when the vocabulary needs it) with no header, one a source and split; the meta.json beside
it tells what it holds. A .pkl is a dict of flat numpy arrays: all examples end to end in `tokens`, example i being
tokens[offsets[i]:offsets[i + 1]], and in `loss_mask`, a bit a token; reading it can run no code.
"""

import glob
import hashlib
import json
import os
import pickle
import re
from contextlib import contextmanager
from pathlib import Path

import numpy as np

FORMAT_VERSION = 2
OWN = re.compile(r"corpus\.txt|(?:train|val)\.[\w.-]+\.bin|(?:sft|rm|prompts)\.pkl")  # what data_process.py writes


class DataError(Exception):
    """Data that cannot be used: the message names the file and what is wrong with it."""


def is_running(pid):
    try:
        os.kill(pid, 0)  # sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        pass
    return True


@contextmanager
def atomic_write(path, mode="wb"):
    """Open a temporary file beside `path`; it takes that name only once it is complete and on disk.

    What one that was killed left of the same file is removed.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    for left in path.parent.glob(f"{glob.escape(path.name)}.tmp*"):
        number = left.name.removeprefix(f"{path.name}.tmp")
        if number.isdecimal() and not is_running(int(number)):
            left.unlink(missing_ok=True)
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# meta.json


def save_meta(directory, meta):
    with atomic_write(Path(directory) / "meta.json", "w") as file:
        file.write(json.dumps(meta, ensure_ascii=False, indent=1) + "\n")


def load_meta(directory):
    """The meta.json of a data directory, of a format version this code can read."""
    path = Path(directory) / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} not found: data_process.py writes it beside the data") from None
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(meta, dict) or meta.get("format_version") != FORMAT_VERSION:
        found = meta.get("format_version") if isinstance(meta, dict) else None
        raise DataError(f"{path}: format version {found}, this code reads {FORMAT_VERSION}: run data_process.py again")
    files = meta.get("files", {})
    if not isinstance(files, dict):
        raise DataError(f"{path}: files is no object")
    for name in files:
        if not OWN.fullmatch(name):
            raise DataError(f"{path}: files names {name!a}, which data_process.py does not write: it is from elsewhere")
    return meta


# .bin


def token_dtype(vocab_size):
    """uint16 while every id fits, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def check_ids(ids, vocab_size, path):
    """Refuse ids that the vocabulary does not have; uint16 would wrap them around silently."""
    if len(ids) and not 0 <= (low := int(ids.min())) <= (high := int(ids.max())) < vocab_size:
        bad = low if low < 0 else high
        raise DataError(f"{path}: token id {bad} is outside the vocabulary (0 to {vocab_size - 1})")


class BinWriter:
    """Write token ids to a .bin; it takes its name only when the `with` block ends without an error.

    After it, `tokens` is how many were written and `sha256` of which bytes.
    """

    def __init__(self, path, vocab_size):
        self.path, self.vocab_size, self.tokens = Path(path), vocab_size, 0
        self._hash = hashlib.sha256()

    def __enter__(self):
        self._open = atomic_write(self.path)
        self._file = self._open.__enter__()
        return self

    def write(self, ids):
        ids = np.asarray(ids)
        check_ids(ids, self.vocab_size, self.path)
        data = np.ascontiguousarray(ids, token_dtype(self.vocab_size))
        self._file.write(data)
        self._hash.update(data)
        self.tokens += len(data)

    def __exit__(self, *error):
        self.sha256 = self._hash.hexdigest()
        return self._open.__exit__(*error)


# .pkl


def _number_dtype(name, *_):
    dtype = np.dtype(name, copy=True)  # a copy, since unpickling then sets its byte order
    if dtype.kind not in "biuf":  # an object array could hold forged pointers
        raise DataError(f"dtype {dtype} is not allowed in a data file, which holds numbers only")
    return dtype


def _numpy_rebuilders():
    """{name: what stands for it} of all that pickled numpy arrays and scalars ask for."""
    array, scalar = np.zeros(1), np.float64(0)
    reconstruct = array.__reduce__()[0]
    functions = (array.__reduce_ex__(5)[0], scalar.__reduce__()[0])
    return {f.__name__: f for f in functions} | {
        reconstruct.__name__: lambda subtype, shape, typecode: reconstruct(np.ndarray, (0,), b"b"),
        "ndarray": None,  # only ever handed to reconstruct; must not be called
        "dtype": _number_dtype,
    }


class _ArrayUnpickler(pickle.Unpickler):
    """Admits numpy arrays and scalars (builtin containers and numbers need no global), refuses the rest."""

    allowed = _numpy_rebuilders()
    modules = ("numpy",) + tuple(f"numpy.{c}.{m}" for c in ("core", "_core") for m in ("multiarray", "numeric"))

    def find_class(self, module, name):
        if module in self.modules and name in self.allowed:
            return self.allowed[name]
        raise DataError(f"{module}.{name} is not allowed in a data file, which holds plain arrays only")


def save_pkl(path, arrays):
    """Write a dict of numpy arrays, numbers, strings and lists of them."""
    with atomic_write(path) as file:
        pickle.dump(arrays, file, protocol=5)


def load_pkl(path):
    """Read what save_pkl wrote; a file that asks for anything but plain arrays is refused, not run."""
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} not found: data_process.py writes it")
    try:
        with open(path, "rb") as file:
            data = _ArrayUnpickler(file).load()
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError, MemoryError) as error:
        raise DataError(f"{path} is damaged or not a data file: {error}") from None
    if not isinstance(data, dict):
        raise DataError(f"{path}: not a dict of arrays")
    return data
