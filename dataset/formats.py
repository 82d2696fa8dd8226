"""The artifact formats: token files (.bin), example files (.pkl) and the meta.json that describes them.

A .bin is raw uint16 (uint32 when the vocabulary needs it) with no header, one a source and split; the meta.json beside
it tells what it holds. A .pkl is a dict of flat numpy arrays: all examples end to end in `tokens`, example i being
tokens[offsets[i]:offsets[i + 1]], and in `loss_mask`, a bit a token; reading it can run no code.
"""

import hashlib
import json
import os
import pickle
import re
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from dataset.plain_pickle import read_pickle

FORMAT_VERSION = 2
OURS = "tiny-llama2-zh"  # in the name of whatever stands on disk for a moment only: nobody else's has it
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
OWN = re.compile(r"corpus\.txt|(?:train|val)\.[\w.-]+\.bin|(?:sft|rm|prompts)\.pkl")  # what data_process.py writes


class DataError(Exception):
    """Data that cannot be used: the message names the file and what is wrong with it."""


def writable(text):
    """Text that can be written and hashed: what is not UTF-8 in file names, and lone surrogates, as backslashes."""
    return os.fspath(text).encode(errors="backslashreplace").decode()


def escaped(text):
    """A text as it can stand in a line of a message: line breaks and what else steers a terminal as backslashes too."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), writable(text))


def shortened(text, most=200):
    """A text of at most about so many characters, without its middle where it has more."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 3 :]}"


def is_running(pid):
    if os.name == "nt":  # where os.kill(pid, 0) would send a Ctrl-C; what was left then stays
        return True
    try:
        os.kill(pid, 0)  # sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def temporary_name(path):
    """What `path` is called until it is complete."""
    return Path(path).with_name(f"{Path(path).name}.{os.getpid()}.{OURS}")


def remove_left(folder):
    """Remove the files in a folder to which processes that were killed left their temporary names."""
    for left in folder.glob(f"*.{OURS}"):
        number = left.name.removesuffix(f".{OURS}").rpartition(".")[2]
        if number.isdecimal() and not is_running(int(number)):
            left.unlink(missing_ok=True)


@contextmanager
def atomic_write(path, mode="wb"):
    """Open a temporary file beside `path`; it takes that name only once it is complete and on disk."""
    path, temporary = Path(path), temporary_name(path)
    remove_left(path.parent)
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# meta.json

TEXT = dict(documents=int, tokens=int, characters=int)
COUNTS = dict(read=int, kept=int, dropped={str: int}, remarks={str: int}, answer_tokens_lost=int, train=TEXT, val=TEXT)
ANSWERED = dict(train=dict(examples=int, answer_tokens=int), val=dict(examples=int, answer_tokens=int))
# what is read of it, a type for a value and {str: ...} for any names; one of its keys may be absent, no other's
META = dict(vocab_size=int, dtype=str, tokenizer_sha256=str, val_share=float, files={str: dict(part=str)})
META |= dict(sources={str: dict(train=TEXT, val=TEXT)}, tally={str: {str: COUNTS}}, command={str: str})
META |= dict(lengths={str: {str: {str: int}}})
FILES = {".bin": dict(tokens=int), ".pkl": dict(train=dict(examples=int), val=dict(examples=int)), ".txt": {}}


def misfit(found, wanted, where):
    """What in `found` is not as `wanted` says, a dict as META or a type; None if all is. No number is negative."""
    if not isinstance(wanted, dict):
        types = (int, float) if wanted is float else (wanted,)
        right = type(found) in types and (wanted is str or 0 <= found < 2**63)
        return None if right else f"{where} is {json.dumps(found)[:40]}, no {'text' if wanted is str else 'count'}"
    if not isinstance(found, dict):
        return f"{where} is no object"
    if str in wanted:
        wanted = dict.fromkeys(found, wanted[str])
    if missing := wanted.keys() - found.keys():
        return f"{where} has no {min(missing)}"
    return next(filter(None, (misfit(found[key], kind, f"{where}.{key}") for key, kind in wanted.items())), None)


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
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(meta, dict) or meta.get("format_version") != FORMAT_VERSION:
        found = meta.get("format_version") if isinstance(meta, dict) else None
        raise DataError(f"{path}: format version {found}, this code reads {FORMAT_VERSION}: run data_process.py again")
    wrong = [misfit(meta[key], META[key], key) for key in META if key in meta]
    if not any(wrong):
        tally, files = meta.get("tally", {}), meta.get("files", {})
        if foreign := next((name for name in files if not OWN.fullmatch(name)), None):
            what = f"files names {foreign!a}, which data_process.py does not write: it is from elsewhere"
            raise DataError(f"{path}: {what}")
        wrong += [misfit(tally[part], {str: ANSWERED}, f"tally.{part}") for part in ("sft", "rm") if part in tally]
        wrong += [misfit(entry, FILES[Path(name).suffix], name) for name, entry in files.items()]
        wrong += [misfit(entry.get("sha256", ""), str, f"{name}.sha256") for name, entry in files.items()]
    if any(wrong):
        what = escaped(next(filter(None, wrong)))
        raise DataError(f"{path}: {what}: it was changed or damaged; run data_process.py again")
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


def save_pkl(path, arrays):
    """Write a dict of numpy arrays, numbers, strings and lists of them."""
    arrays = {name: _unchanging(value) for name, value in arrays.items()}
    with atomic_write(path) as file:
        pickle.dump(arrays, file, protocol=5)


def _unchanging(value):
    """An array that cannot be written to, whose bytes a pickle holds as such: reading it then copies nothing."""
    if isinstance(value, np.ndarray):
        value = np.asarray(value, order="C").view()
        value.flags.writeable = False
    return value


def load_pkl(path):
    """Read what save_pkl wrote; a file that asks for anything but plain arrays is refused, not run."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            data = read_pickle(file)
    except FileNotFoundError:
        raise DataError(f"{path} not found: data_process.py writes it") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except pickle.UnpicklingError as error:
        raise DataError(f"{path}: {error}") from None
    except Exception as error:  # damaged bytes can raise anything
        raise DataError(f"{path} is damaged or not a data file: {str(error) or type(error).__name__}") from None
    if not isinstance(data, dict):
        raise DataError(f"{path}: not a dict of arrays")
    return data
