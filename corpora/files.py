"""Read rows from the files that corpora come in, as they are: .txt .jsonl .json .csv .tsv .parquet, some with .gz.

`file_units` cuts an input into units that worker processes read on their own; `read_rows` reads a unit
as a stream, so that memory does not grow with the size of a file, but for a .txt that is one document. What cannot be
read as a row is passed on with a reason; a file that breaks off is a DataError, lest a bad download go unnoticed.
"""

import codecs
import csv
import gzip
import io
import json
import re
import sys
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from dataset.formats import DataError

ENCODINGS = {"utf-8": "UTF-8", "gb18030": "GB18030", "utf-16": "UTF-16"}
TEXT_LAYOUTS = ("txt", "lines")  # whose files are plain text
TEXT_SUFFIXES = (".txt", ".txt.gz")
ROW_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".csv", ".tsv", ".parquet")
BLOCK = 1 << 20  # what is read at once: bytes, or characters of a JSON array
CSV_FIELD = 16 << 20  # characters; a quote that is never closed must not fill the memory
NAMED = 5  # bad lines named per unit: enough to see what is wrong with a file

_GAP = re.compile(r"\s*,?\s*")  # between the elements of a JSON array
_DECODER = json.JSONDecoder(strict=False)  # raw line breaks and tabs inside strings are common, and harmless


@dataclass(frozen=True)
class Unit:
    """A piece of input that one worker reads on its own."""

    source: str  # the user's label
    layout: str  # key in corpora.sources.SOURCES
    path: str  # a file; of kind "hub" a dataset id or a local directory
    kind: str  # "lines", "json", "csv", "parquet", "text" or "hub"
    start: int = 0  # lines: those that start in bytes [start, stop), or all if stop is 0;
    stop: int = 0  # parquet: row groups [start, stop); hub: shard `start` of `stop`
    encoding: str = "utf-8"
    first: int = 1  # lines: number of the first one
    revision: str = ""  # hub: commit of the dataset


# inputs -> units


def file_units(label, layout, path, globs="", unit_bytes=64 << 20):
    """Units of a file, or of the files in a folder that match one of the globs, or if none does of every known one."""
    path = Path(path)
    if path.is_file():
        found = [path]
    elif path.is_dir():
        found = sorted(find_files(path, layout, globs), key=lambda file: file.relative_to(path).as_posix())
    else:
        raise DataError(f"{path} not found")
    units = []
    for file in found:
        if file.stat().st_size:
            units += cut_file(label, layout, file, unit_bytes)
        else:
            print(f"{file}: empty", file=sys.stderr)
    if not units:
        raise DataError(f"{path}: no data in it; a {layout} source is {' '.join(suffixes(layout))} files")
    return units


def suffixes(layout):
    return TEXT_SUFFIXES if layout in TEXT_LAYOUTS else ROW_SUFFIXES


def find_files(folder, layout, globs):
    """Files of known formats below a folder, without hidden ones (download tools leave notes there)."""
    names = [file.relative_to(folder) for file in folder.rglob("*") if file.is_file()]
    names = [n for n in names if n.name.lower().endswith(suffixes(layout)) and not any(p[0] == "." for p in n.parts)]
    wanted = [n for n in names if any(PurePosixPath(n.as_posix()).match(glob) for glob in globs.split())]
    return [folder / name for name in wanted or names]


def cut_file(label, layout, file, unit_bytes):
    """The units of one file."""
    name = file.name.lower().removesuffix(".gz")
    if name.endswith(".parquet"):
        return [Unit(label, layout, str(file), "parquet", *groups) for groups in cut_row_groups(file, unit_bytes)]
    encoding = detect_encoding(file)
    if encoding == "gb18030":
        print(f"{file}: read as GB18030", file=sys.stderr)
    if layout == "txt":
        return [Unit(label, layout, str(file), "text", encoding=encoding)]
    if name.endswith((".csv", ".tsv")) and layout != "lines":
        return [Unit(label, layout, str(file), "csv", encoding=encoding)]
    if name.endswith(".json") and layout != "lines" and not is_json_lines(file, encoding):
        return [Unit(label, layout, str(file), "json", encoding=encoding)]
    if file.name.lower().endswith(".gz") or encoding == "utf-16":  # cannot be entered in the middle
        return [Unit(label, layout, str(file), "lines", encoding=encoding)]
    return cut_lines(Unit(label, layout, str(file), "lines", encoding=encoding), file.stat().st_size, unit_bytes)


def cut_lines(whole, size, unit_bytes):
    """Byte ranges of a file of lines. Its line breaks are counted once, here, so that a unit knows its line numbers."""
    units, breaks, position = [], 0, 0  # line breaks before position
    with open(whole.path, "rb") as file:
        for start in range(0, size, unit_bytes):
            while position < start - 1:
                block = file.read(min(BLOCK, start - 1 - position))
                breaks, position = breaks + block.count(b"\n"), position + len(block)
            first = breaks + 2 if start else 1
            units.append(replace(whole, start=start, stop=min(start + unit_bytes, size), first=first))
    return units


def cut_row_groups(file, unit_bytes):
    """Runs (start, stop) of row groups of about unit_bytes."""
    with parquet_file(file) as parquet:
        sizes = [parquet.metadata.row_group(i).total_byte_size for i in range(parquet.num_row_groups)]
    runs, start, total = [], 0, 0
    for i, size in enumerate(sizes):
        total += size
        if total >= unit_bytes or i == len(sizes) - 1:
            runs.append((start, i + 1))
            start, total = i + 1, 0
    return runs


# encodings


def detect_encoding(file):
    """utf-8, gb18030 or utf-16, by the byte order mark or the lines of the first megabyte."""
    with open_bytes(file) as stream, whole_gz(file):
        head = stream.read(BLOCK)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    lines = [line for line in head.split(b"\n") if not line.isascii()]
    for encoding, share in (("utf-8", 0.5), ("gb18030", 0.9)):
        if sum(can_decode(line, encoding) for line in lines) >= share * len(lines):
            return encoding
    raise DataError(f"{file}: neither UTF-8 nor GB18030")


def can_decode(line, encoding):
    try:
        codecs.getincrementaldecoder(encoding)().decode(line)  # incremental: a cut last character is no error
    except UnicodeDecodeError:
        return False
    return True


def is_json_lines(file, encoding):
    """Whether a .json file holds an object a line, not one array."""
    with open_text(file, encoding) as stream, whole_gz(file):
        line = stream.readline(BLOCK)
        while line.isspace():
            line = stream.readline(BLOCK)
        if line.lstrip().startswith("["):
            return False
        while not line.endswith("\n") and (more := stream.readline(BLOCK)):
            line += more
    try:
        return isinstance(_DECODER.decode(line), dict)
    except ValueError:
        return False


def open_bytes(file):
    return gzip.open(file, "rb") if str(file).lower().endswith(".gz") else open(file, "rb")


# A lone surrogate for what does not decode, which `is_clean` finds ("surrogateescape" fails on some GB18030).
codecs.register_error("tiny_llama2_mark", lambda error: ("\udcff", error.end))


def open_text(file, encoding, newline=""):
    """Decoded text; line breaks are kept, and bytes that do not decode marked."""
    encoding = "utf-8-sig" if encoding == "utf-8" else encoding
    return io.TextIOWrapper(open_bytes(file), encoding, "tiny_llama2_mark", newline)


def is_clean(text):
    """Whether all of the text did decode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def whole_gz(file):
    """Name the file where a .gz breaks off."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{file}: damaged or not fully downloaded: {error}") from None


# units -> rows


def read_rows(unit):
    """(file and line or record, row or None, remark or the reason for None) of everything in a unit."""
    readers = {"lines": read_lines, "json": read_array, "csv": read_csv, "parquet": read_parquet, "text": read_text}
    with whole_gz(unit.path):
        yield from readers[unit.kind](unit)


def read_lines(unit):
    wrong, named = f"not {ENCODINGS[unit.encoding]}", 0
    for number, line in enumerate(iterate_lines(unit), unit.first):
        place = f"{unit.path}:{number}"
        try:
            text = line.decode(unit.encoding) if isinstance(line, bytes) else line
            if unit.encoding == "utf-16":
                text.encode()
        except UnicodeError as error:
            named += 1
            if named <= NAMED:
                print(f"{place}: {wrong}: {error.reason}, byte {error.start}", file=sys.stderr)
            yield place, None, wrong
            continue
        if number == 1:
            text = text.removeprefix("\ufeff")
        if not text.strip():
            yield place, None, "blank"
        elif unit.layout == "lines":
            yield place, {"text": text.rstrip("\r\n")}, None
        else:
            try:
                row = _DECODER.decode(text)
            except (ValueError, RecursionError):
                yield place, None, "not JSON"
            else:
                yield place, row, None


def iterate_lines(unit):
    """Lines as bytes, those that start in the unit's range; of UTF-16, as text."""
    if unit.encoding == "utf-16":
        with open_text(unit.path, "utf-16", "\n") as file:
            yield from file
        return
    with open_bytes(unit.path) as file:
        position = unit.start
        if position:
            file.seek(position - 1)
            position += len(file.readline()) - 1  # to the first line that starts at or after `start`
        while (not unit.stop or position < unit.stop) and (line := file.readline()):
            yield line
            position += len(line)


def read_array(unit):
    """The elements of a JSON array, decoded out of a window that moves over the file."""
    wrong = f"not {ENCODINGS[unit.encoding]}"
    with open_text(unit.path, unit.encoding) as file:
        window, number = file.read(BLOCK).lstrip(), 1
        if not window.startswith("["):
            raise DataError(f"{unit.path}: neither a JSON array nor JSON Lines")
        at, more = 1, True
        while True:
            at = _GAP.match(window, at).end()
            if window.startswith("]", at):
                if (window[at + 1 :] + file.read(BLOCK)).strip():
                    raise DataError(f"{unit.path}: more data after its JSON array of {number - 1} records")
                return
            try:
                value, end = _DECODER.raw_decode(window, at)
                cut = end == len(window) and more  # perhaps a number that goes on
            except json.JSONDecodeError as error:
                # An open string, or an error where the window ends, may only be cut by it; any other is real.
                cut = more and (error.msg.startswith("Unterminated") or error.pos > len(window) - 16)
                if not cut:
                    what = "is not JSON" if more else "breaks off, as after a partial download"
                    raise DataError(f"{unit.path}: record {number} {what}: {error.msg}") from None
            if cut:
                more = file.read(max(BLOCK, len(window) - at))  # at least doubled: long elements in linear time
                window, at = window[at:] + more, 0
                continue
            place = f"{unit.path}:record {number}"
            yield (place, value, None) if is_clean(window[at:end]) else (place, None, wrong)
            at, number = end, number + 1


def read_csv(unit):
    csv.field_size_limit(CSV_FIELD)
    delimiter = "\t" if unit.path.lower().endswith(".tsv") else ","
    with open_text(unit.path, unit.encoding) as file:
        rows = csv.reader(file, delimiter=delimiter)
        header, line = None, 1
        while True:
            place = f"{unit.path}:{line}"
            try:
                row = next(rows, None)
            except csv.Error as error:
                raise DataError(f"{place}: {error}") from None
            if row is None:
                return
            line = rows.line_num + 1
            if header is None:
                header = row
            elif not row:
                yield place, None, "blank"
            elif len(row) != len(header):
                yield place, None, "wrong number of columns"
            elif not is_clean("".join(row)):
                yield place, None, f"not {ENCODINGS[unit.encoding]}"
            else:
                yield place, dict(zip(header, row, strict=True)), None


def read_text(unit):
    """The whole file as one row; bytes that do not decode become U+FFFD, as a few of them should not cost a book."""
    with open_text(unit.path, unit.encoding) as file:
        text = file.read().replace("\r\n", "\n")
    remark = None if is_clean(text) else f"bytes that are not {ENCODINGS[unit.encoding]} replaced"
    yield f"{unit.path}:1", {"text": text.replace("\udcff", "\ufffd")}, remark


@contextmanager
def parquet_file(path):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs pyarrow (pip install pyarrow)") from None
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=BLOCK) as parquet:
            yield parquet
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: {error}") from None


def read_parquet(unit):
    with parquet_file(unit.path) as parquet:
        number = 1 + sum(parquet.metadata.row_group(i).num_rows for i in range(unit.start))
        groups = range(unit.start, unit.stop)
        for batch in parquet.iter_batches(batch_size=256, row_groups=groups):  # 256 rows: documents can be long
            for row in batch.to_pylist():
                yield f"{unit.path}:record {number}", row, None
                number += 1
