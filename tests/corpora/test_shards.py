"""Shard folders, where another system than Linux would refuse what Linux allows."""

import json
import os

import numpy as np
import pytest

from corpora.files import Unit
from corpora.shards import ShardWriter, content_mark, read_done, unit_mark


def test_a_changed_file_is_told_wherever_it_changed(tmp_path):
    path, text = tmp_path / "a.txt", bytes(range(256)) * 1200
    path.write_bytes(text)
    before = content_mark(path)
    os.utime(path, (1, 1))  # as a copy on another machine has
    assert content_mark(path) == before and content_mark(path, 0, len(text)) == before
    for at in (0, 100_000, 150_001, len(text) - 1):
        path.write_bytes(text[:at] + bytes([text[at] ^ 1]) + text[at + 1 :])
        assert content_mark(path) != before
    assert content_mark(path, 0, 1000) == content_mark(path, 0, 1000, whole=1000)
    large = tmp_path / "large"
    for change in (b"3", b"9"):  # more than is hashed at once
        large.write_bytes(b"a" * (3 << 20) + change + b"a" * (5 << 20))
        marks = content_mark(large), content_mark(large, 1 << 20, 4 << 20), content_mark(large, 4 << 20)
        assert change == b"3" or [a == b for a, b in zip(marks, before, strict=True)] == [False, False, True]
        before = marks
    path.write_bytes(text)
    large = content_mark(path, whole=1000, size=100)
    for at in (0, len(text) - 1):  # of a large one its ends and some of the rest
        path.write_bytes(text[:at] + bytes([text[at] ^ 1]) + text[at + 1 :])
        assert content_mark(path, whole=1000, size=100) != large
    path.write_bytes(b"")
    assert content_mark(path)[0] == 0


def test_units_of_rows_are_told_by_the_whole_file(tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    path, marks = tmp_path / "a.parquet", []
    for word in ("好", "坏", "好"):
        parquet.write_table(pyarrow.table(dict(text=[word * 9] * 80)), path, row_group_size=20, use_dictionary=False)
        units = [Unit("x", "text_rows", str(path), "parquet", start, start + 1) for start in range(4)]
        marks.append([unit_mark(unit) for unit in units])
    assert len(set(marks[0])) == 4 and not {*marks[0]} & {*marks[1]} and marks[0] == marks[2]
    path = tmp_path / "a.json"
    for word in ("好", "坏"):
        path.write_text(json.dumps(dict(title="题" * 50, data=[dict(text=word)])), encoding="utf-8")
        marks.append(unit_mark(Unit("x", "text_rows", str(path), "json", 90)))
    assert marks[-1] != marks[-2]


def test_a_shard_takes_its_name_with_no_file_open(tmp_path, monkeypatch):
    rename, still_open = os.rename, []
    with ShardWriter(tmp_path / "shard", dict(text=np.uint8)) as shard:
        shard.write(dict(text=[np.arange(3, dtype=np.uint8)]), dict(content=np.zeros(1, np.uint64)))

        def looking(source, target):
            still_open.extend(name for name, file in shard.files.items() if not file.closed)
            rename(source, target)

        monkeypatch.setattr(os, "rename", looking)
        shard.finish(dict(fingerprint=1))
    assert still_open == [] and read_done(tmp_path / "shard") == dict(fingerprint=1)
    assert (tmp_path / "shard/text.bin").read_bytes() == b"\0\1\2"
