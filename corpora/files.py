"""Paths -> units: the files that a source names are found, told what they are, and cut into units of work.

`file_units` cuts an input into units that worker processes read on their own; how a unit is read is in rows.py. Every
path below a source becomes part of a unit or is named on stderr with the reason; what cannot be read, or not told what
it is, is a DataError.
"""

import errno
import fnmatch
import glob
import json
import os
import stat
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import PurePath, PurePosixPath

from corpora.encodings import BLOCK, ENCODINGS, LEGACY, WIDE, Doubtful, escaped, is_compressed, reading
from corpora.kinds import ROW_SUFFIXES, Unread, check_name, look, suffix_of, suffixes
from corpora.tables import cut_row_groups
from dataset.formats import DataError

SMALL = 16  # files of less than this part of a unit's bytes share a unit
NAMED = 3  # files named of those that one reason holds for


@dataclass(frozen=True, slots=True)
class Unit:
    """A piece of input that one worker reads on its own."""

    source: str  # the user's label
    layout: str  # key in corpora.sources.SOURCES
    path: str  # a file; of kind "hub" a dataset id or a local directory
    kind: str  # a key of rows.READERS, "hub", or "files": several, which are in `parts`
    start: int = 0  # lines: those that start in bytes [start, stop), or all if stop is 0; json: where its list begins;
    stop: int = 0  # parquet: row groups [start, stop); hub: shard `start` of `stop`
    encoding: str = "utf-8"
    first: int = 1  # lines: number of the first one
    revision: str = ""  # hub: commit of the dataset
    size: int = 0  # bytes of the file when it was listed, 0 = unknown
    characters: int = 0  # text: about so many make a document, 0 = the file is one
    parts: tuple = ()


def file_units(label, layout, path, globs="", unit_bytes=64 << 20, characters=0):
    """Units of a file, of the files in a folder that match one of the globs, or if none does of every known one; or of
    all files and folders that a pattern with * ? [ ] matches, unless there is a path of that name."""
    path, units = str(PurePath(os.path.expanduser(path))), []
    notes = defaultdict(list)  # {what is to be said: files that it holds for}
    with reading(path):
        found = [file for root in expand(path) for file in list_files(root, layout, globs, notes)]
        for file, (kind, encoding, start) in look_at_all(found, layout, notes, alone=found == [path]).items():
            if encoding in LEGACY or encoding.endswith(("-le", "-be")):
                notes[f"read as {ENCODINGS[encoding]}"].append(file)
            size = os.path.getsize(file)
            whole = Unit(label, layout, file, kind, start, encoding=encoding, size=size, characters=characters)
            pieces = cut_file(whole, unit_bytes)
            units += pieces
            if not pieces:
                notes["no rows in it"].append(file)
    say(path, layout, notes)
    if not units:
        known = " ".join(suffixes(layout))
        raise Unread(
            f"{escaped(path)}: no data in it; {layout} sources are {known} files, as such or .gz .bz2 .xz .zst"
        )
    return bundle(units, unit_bytes)


def say(path, layout, notes):
    """Name files on stderr, a line for each thing to be said of them; all that would be data and are not read."""
    data = {*ROW_SUFFIXES, *suffixes(layout)}
    for what, files in notes.items():
        lost = [file for file in files[NAMED:] if what.startswith("not read") and suffix_of(file) in data]
        names = [escaped(file).removeprefix(f"{escaped(path)}/") for file in files[:NAMED] + lost]
        more = ", ..." if len(files) > len(names) else ""
        several = f"{escaped(path)}: {len(files):,} files {what}: {', '.join(names)}{more}"
        print(several if len(files) > 1 else f"{escaped(files[0])}: {what}", file=sys.stderr)


# paths -> files


def expand(path):
    """[path], or if there is none the paths that it matches as a pattern."""
    try:
        os.lstat(path)
        return [path]
    except (FileNotFoundError, NotADirectoryError):
        if not glob.has_magic(path):
            raise DataError(f"{escaped(path)} not found") from None
    if "**" in path:
        raise DataError(f"{escaped(path)}: ** is not known; name the folder, whose subfolders are read too")
    parts = PurePath(path).parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    found = [os.path.join(*parts[:fixed]) if fixed else ""]
    for part in parts[fixed:]:
        names = {folder: sorted(os.listdir(folder or ".")) for folder in found if os.path.isdir(folder or ".")}
        found = [
            os.path.join(folder, name)
            for folder, those in names.items()
            for name in those
            if fnmatch.fnmatchcase(name, part) and (name[0] != "." or part[0] == ".")
        ]
    if not found:
        raise DataError(f"{escaped(path)}: no file matches")
    return found


def list_files(root, layout, globs, notes):
    """The file that the root is, or the files of a folder by their names, in an order that every file system gives."""
    if not os.path.isdir(root):
        if not os.path.isfile(root):
            raise DataError(f"{escaped(root)}: neither a file nor a folder")
        return [root]
    names = []
    for name in sorted(walk(root, notes), key=lambda file: PurePath(file).as_posix()):
        try:
            check_name(name, layout)
            names.append(name)
        except Unread as reason:
            notes[f"not read: {reason}"].append(name)
    wanted = {n for n in names if any(PurePosixPath(PurePath(n).as_posix()).match(glob) for glob in globs.split())}
    if cached := unlisted(names):
        notes["not read: not among the files of its state.json"] += sorted(cached)
        names = [name for name in names if name not in cached]
        wanted -= cached
    if wanted:
        if others := [name for name in names if name not in wanted]:
            notes[f"not read: not among {globs}"] += others
    return [name for name in names if name in wanted or not wanted]


def unlisted(names):
    """The .arrow files beside a state.json of Hugging Face's datasets that does not name them: what it has cached."""
    found = set()
    for folder in {os.path.dirname(name) for name in names if name.endswith(".arrow")}:
        try:
            with open(os.path.join(folder, "state.json"), encoding="utf-8") as file:
                listed = {entry["filename"] for entry in json.load(file)["_data_files"]}
        except (OSError, ValueError, LookupError, TypeError):  # none, or another program's
            continue
        arrows = [name for name in names if name.endswith(".arrow") and os.path.dirname(name) == folder]
        found |= {name for name in arrows if os.path.basename(name) not in listed}
    return found


def walk(root, notes):
    """Every file below a folder, links followed, without hidden ones (download tools leave notes there)."""
    seen, waiting = set(), [root]
    while waiting:
        path = waiting.pop()
        try:
            facts = os.stat(path)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP):
                raise
            notes["not read: a broken link"].append(path)
            continue
        if stat.S_ISREG(facts.st_mode):
            yield path
        elif not stat.S_ISDIR(facts.st_mode):
            notes["not read: neither a file nor a folder"].append(path)
        elif (facts.st_dev, facts.st_ino) in seen:
            notes["not read: the same folder as one that is read, by a link"].append(path)
        else:
            seen.add((facts.st_dev, facts.st_ino))
            with os.scandir(path) as entries:  # the last is taken first: links after the folders that they may lead to
                found = sorted(entries, key=lambda entry: (entry.is_symlink(), entry.name), reverse=True)
            waiting += [entry.path for entry in found if not entry.name.startswith(".")]


def look_at_all(found, layout, notes, alone):
    """{file: (kind, encoding, where its list begins)}; if it is not `alone`, what the layout does not read is noted.

    A file whose encoding is in doubt has that of most others.
    """
    looked, doubtful = dict.fromkeys(found), []

    def look_at(file, likely=None):
        try:
            if os.path.getsize(file):
                looked[file] = look(file, layout, likely)
            else:
                notes["empty"].append(file)
        except Unread as reason:
            if alone:
                raise Unread(f"{escaped(file)}: {reason}") from None
            notes[f"not read: {reason}"].append(file)

    for file in found:
        try:
            look_at(file)
        except Doubtful:
            doubtful.append(file)
    legacy = Counter(entry[1] for entry in looked.values() if entry and entry[1] in LEGACY).most_common(1)
    for file in doubtful:
        look_at(file, legacy[0][0] if legacy else None)
    looked = {file: entry for file, entry in looked.items() if entry}
    plain = [file for file, entry in looked.items() if entry[0] == "plain"]
    if 0 < len(plain) < len(looked):  # notes, most likely
        notes["not read: plain text beside rows; give it as a source of its own"] += plain
        looked = {file: entry for file, entry in looked.items() if entry[0] != "plain"}
    return looked


# files -> units


def cut_file(whole, unit_bytes):
    """The units of one file."""
    if whole.kind == "parquet":
        return [replace(whole, start=start, stop=stop) for start, stop in cut_row_groups(whole.path, unit_bytes)]
    by_bytes = whole.kind in ("lines", "plain") and whole.encoding not in WIDE
    if by_bytes and whole.size > unit_bytes and not is_compressed(whole.path):
        return cut_lines(whole, unit_bytes)
    return [whole]


def cut_lines(whole, unit_bytes):
    """Byte ranges of a file of lines. Its line breaks are counted once, here, so that a unit knows its line numbers."""
    units, breaks, position = [], 0, 0  # line breaks before position
    with open(whole.path, "rb") as file:
        for start in range(0, whole.size, unit_bytes):
            while position < start - 1:
                block = file.read(min(BLOCK, start - 1 - position))
                if not block:
                    raise DataError(f"{escaped(whole.path)}: became shorter while it was read")
                breaks, position = breaks + block.count(b"\n"), position + len(block)
            first = breaks + 2 if start else 1
            units.append(replace(whole, start=start, stop=min(start + unit_bytes, whole.size), first=first))
    return units


def bundle(units, unit_bytes):
    """The units in order, small files that follow each other joined to units of several."""
    runs, room = [], 0
    for unit in units:
        small = unit.size <= unit_bytes // SMALL
        if not small or unit.size > room:
            runs.append([])
            room = unit_bytes if small else 0
        runs[-1].append(unit)
        room -= unit.size
    return [
        run[0] if len(run) == 1 else Unit(run[0].source, run[0].layout, run[0].path, "files", parts=tuple(run))
        for run in runs
    ]
