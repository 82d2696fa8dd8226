"""Units -> rows: what stands in the files, as it is.

`read_rows` reads a unit as a stream, so that memory does not grow with the size of a file. What cannot be read as a
row is passed on with a reason; a file that breaks off is a DataError, lest a bad download go unnoticed.
"""

import json
import os
import re
import sys

from corpora import encodings
from corpora.encodings import BLOCK, ENCODINGS, WIDE, escaped, is_clean, lines_of, open_bytes, open_text, reading
from corpora.fields import NUMBERS, nothing, shown
from corpora.kinds import BLANKS, decode_json, is_row
from corpora.tables import read_arrow, read_csv, read_parquet
from dataset.formats import DataError

TOO_LONG = f"longer than {encodings.LONGEST >> 20} MB"
CUT_CHARACTER = ("unexpected end of data", "incomplete multibyte sequence")  # Python's words for bytes that break off
NAMED = 5  # bad lines named per unit: enough to see what is wrong with a file

_NAME = re.compile(r'("(?:[^"\\]|\\.)*")\s*:\s*\Z')  # of the field whose value comes next
_GAP = re.compile(r"[\s\ufeff]*,?[\s\ufeff]*")  # between the elements of a JSON array
# Where a long text may be cut, the best places first: before the heading of a chapter, after a line, after a sentence.
_CUTS = (
    re.compile(r"\n(?=[ \t\u3000]*第[\d零〇一二两三四五六七八九十百千]{1,9}[章回节節卷][^\n。！？：“”]{0,40}\n)"),
    re.compile(r"\n"),
    re.compile(r"[。！？!?…]+[”’」』）]*"),
)


_repeated = []  # remarks on the objects of the value that is being decoded


def single(pairs):
    """An object of these fields, of those with one name the last; what that costs is remarked on."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        lost = dict.fromkeys(name for name, value in pairs if value != fields[name] and not nothing(value))
        _repeated.extend(f"{shown(name)} given twice, the last taken" for name in lost)
    return fields


DECODER = json.JSONDecoder(strict=False, **NUMBERS, object_pairs_hook=single)


def remark():
    """The remark on the value that was decoded last, or None."""
    said = "; ".join(dict.fromkeys(_repeated)) or None
    _repeated.clear()
    return said


def read_rows(unit):
    """(file and line or record, row or None, remark or the reason for None) of everything in a unit."""
    for part in unit.parts or (unit,):
        with reading(part.path):
            yield from READERS[part.kind](part)
            if part.size and os.path.getsize(part.path) != part.size:
                raise DataError(f"{escaped(part.path)}: its size changed while it was read")


def read_lines(unit):
    name, wrong, named = escaped(unit.path), f"not {ENCODINGS[unit.encoding]}", 0
    for number, line in enumerate(iterate_lines(unit), unit.first):
        place, row, why, cut = f"{name}:{number}", None, None, False
        if line is None:
            yield place, None, TOO_LONG
            continue
        try:
            text = encodings.decode(line, unit.encoding) if isinstance(line, bytes) else line
            if unit.encoding in WIDE:
                text.encode()
        except UnicodeError as error:
            why, named, cut = wrong, named + 1, error.reason in CUT_CHARACTER
            if named <= NAMED:
                print(f"{place}: {wrong}: {error.reason}, byte {error.start}", file=sys.stderr)
        else:
            text = text.removeprefix("\ufeff")  # of files joined to one, each may have its own
            if not text.strip():
                why = "blank"
            elif unit.layout == "lines":
                row = {"text": text.rstrip("\r\n")}
            elif unit.kind == "plain":
                row = text.rstrip("\r\n")
            else:
                try:
                    _repeated.clear()
                    row = DECODER.decode(text)
                    why = remark()
                except ValueError:
                    why, cut = "not JSON", True
                except RecursionError:
                    why = "nested too deeply"
        if cut and line[-1:] not in (b"\n", "\n"):
            raise DataError(f"{place}: {why} and ends without a line break: it breaks off, as after a partial download")
        yield place, row, why


def iterate_lines(unit):
    """Lines as bytes, those that start in the unit's range; of UTF-16 and UTF-32, as text; None for one too long."""
    if unit.encoding in WIDE:
        with open_text(unit.path, unit.encoding, "\n") as file:
            yield from (line for line, _ in lines_of(file))
        return
    with open_bytes(unit.path) as file:
        position = unit.start
        if position:
            file.seek(position - 1)
            position += next(lines_of(file), (b"", 0))[1] - 1  # to the first line that starts at or after `start`
        for line, size in lines_of(file) if not unit.stop or position < unit.stop else ():
            yield line
            position += size
            if unit.stop and position >= unit.stop:
                return


def read_json(unit):
    """The elements of a JSON array, that of an object's list from unit.start on, or values that follow each other.

    They are decoded out of a window that moves over the file.
    """
    name, wrong = escaped(unit.path), f"not {ENCODINGS[unit.encoding]}"
    with open_text(unit.path, unit.encoding) as file:
        window, number, more = file.read(BLOCK).lstrip(BLANKS), 1, True
        in_array, first = window.startswith("[", unit.start), None
        key = decode_json(_NAME.search(window[: unit.start])[1]) if unit.start else ""
        at = unit.start + in_array
        while True:
            at = _GAP.match(window, at).end()
            if in_array and window.startswith("]", at):
                check_rest(unit, window[at + 1 :] + file.read(BLOCK), number - 1, key, first or {})
                return
            if not in_array and not more and at == len(window):
                return
            _repeated.clear()
            try:
                value, end = DECODER.raw_decode(window, at)
                cut = end == len(window) and more  # perhaps a number that goes on
            except RecursionError:
                raise DataError(f"{name}: record {number} is nested too deeply") from None
            except json.JSONDecodeError as error:
                # An open string, or an error where the window ends, may only be cut by it; any other is real.
                cut = more and (error.msg.startswith("Unterminated") or error.pos > len(window) - 16)
                if not cut:
                    what = "is not JSON" if more else "breaks off, as after a partial download"
                    raise DataError(f"{name}: record {number} {what}: {error.msg}") from None
            if cut and len(window) - at > encodings.LONGEST:
                raise DataError(f"{name}: record {number} is {TOO_LONG}: or a bracket or quote in it is not closed")
            if cut:
                more = file.read(max(BLOCK, len(window) - at))  # at least doubled: long elements in linear time
                window, at = window[at:] + more, 0
                continue
            place, first = f"{name}:record {number}", first or value
            yield (place, value, remark()) if is_clean(window[at:end]) else (place, None, wrong)
            at, number = end, number + 1


def read_value(unit):
    """A file that is one row, which was read once to tell that."""
    with open_text(unit.path, unit.encoding) as file:
        text = file.read().strip(BLANKS)
    _repeated.clear()
    row = DECODER.decode(text) if is_clean(text) else None
    yield f"{escaped(unit.path)}:record 1", row, remark() if row else f"not {ENCODINGS[unit.encoding]}"


def check_rest(unit, rest, records, key, first):
    """DataError unless after the array there is nothing, or what ends the object whose field `key` it is.

    `first` is the first element: it may only now be seen that not the elements are rows, but the object is one.
    """
    name = escaped(unit.path)
    if not unit.start:
        if rest.strip(BLANKS):
            raise DataError(f"{name}: more data after its JSON array of {records} records")
        return
    try:
        others = DECODER.decode('{"": 0' + rest.rstrip(BLANKS))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: breaks off or goes on wrongly after its list of {records} records: {error}") from None
    del others[""]
    lists = [key for key, value in others.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if lists or is_row(others, key, first):
        why = f"other data beside its list of {records} records: {', '.join(map(escaped, lists or others))}"
        raise DataError(f"{name}: {why}; write each to a file of its own")


def read_text(unit):
    """A file's text; bytes that do not decode become U+FFFD, as a few of them should not cost a book."""
    name, line = escaped(unit.path), 1
    with open_text(unit.path, unit.encoding, None) as file:
        for piece in cut_text(file, unit.characters) if unit.characters else [file.read(encodings.LONGEST)]:
            if len(piece) == encodings.LONGEST:
                raise DataError(f"{name}: {TOO_LONG} for one document: txt_characters=10000 makes several of it")
            remark = None if is_clean(piece) else f"bytes that are not {ENCODINGS[unit.encoding]} replaced"
            text = piece.replace("\udcff", "\ufffd").replace("\n\ufeff", "\n").removeprefix("\ufeff")
            yield f"{name}:{line}", {"text": text}, remark
            line += piece.count("\n")


def cut_text(file, size):
    """Pieces of about `size` characters that together are the text; one of no more than that stays whole."""
    window = file.read(BLOCK)
    while window:
        start, more = 0, file.read(BLOCK)
        while (left := len(window) - start) > size and (left >= 2 * size or not more):
            end = find_cut(window, start, size)
            yield window[start:end]
            start = end
        if not more:
            yield window[start:]
        window = window[start:] + more if more else ""


def find_cut(text, start, size):
    """Where to end a piece that starts at `start`, with a quarter of the size at least on both sides."""
    left = len(text) - start
    low, high = start + size // 4, start + min(size + size // 2, left - size // 4)
    goal = start + min(size, left // 2)
    for pattern in _CUTS:
        if found := [match.end() for match in pattern.finditer(text, low, high)]:
            return min(found, key=lambda end: abs(end - goal))
    return goal


READERS = dict(lines=read_lines, plain=read_lines, json=read_json, value=read_value, text=read_text)
READERS |= dict(csv=read_csv, parquet=read_parquet, arrow=read_arrow)
