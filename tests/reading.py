"""What the tests of reading corpora share: files written in a line, and all that comes of them."""

import json
import pickle
from pathlib import Path

from corpora.sources import list_units, read_records


def read(layout, path, unit_bytes=64 << 20, characters=0):
    """[(place without the folder, record, note)] of all units, as worker processes get them."""
    units = pickle.loads(pickle.dumps(list_units("label", layout, path, unit_bytes, characters=characters)))
    folder = f"{path if Path(path).is_dir() else Path(path).parent}/"
    return [(place.removeprefix(folder), record, note) for unit in units for place, record, note in read_records(unit)]


def files_read(layout, path):
    """The names of the files that are read, in order."""
    units = list_units("label", layout, path)
    return [Path(part.path).name for unit in units for part in unit.parts or (unit,)]


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def json_lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def at(name, results):
    return [(f"{name}:{line}", record, note) for line, record, note in results]
