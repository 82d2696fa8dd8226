"""corpora/meta.py and corpora/shards.py: nobody's file is overwritten or removed, and no worker outlives its parent."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from chains import ROOT

from common.config import UserError
from corpora.meta import part_table
from data_process import main
from dataset.formats import DataError, load_meta, save_meta


@pytest.fixture
def run(tmp_path):
    """run(*options): plain text from raw.txt into tmp_path/out."""
    words = zip("山川河流城市乡村", "老师学生清晨夜晚", strict=True)
    lines = [f"第{i}行写着{a}和{b}的故事，很长的一行。" for i, (a, b) in enumerate(words)]
    (tmp_path / "raw.txt").write_text("\n".join(lines), encoding="utf-8")

    def prepare(*options, source="raw.txt", out="out"):
        main([f"--sources=x:lines={tmp_path / source}", "--parts=text", f"--out={tmp_path / out}", *options])

    return prepare


@pytest.mark.parametrize("name", ["../thesis.txt", "/etc/hostname", "thesis.txt", "train.x.bin/../thesis", "ckpt.pt"])
def test_a_meta_from_elsewhere_removes_nothing(tmp_path, run, name):
    run()
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    meta = json.loads((tmp_path / "out" / "meta.json").read_text(encoding="utf-8"))
    meta["files"][name] = dict(meta["files"]["corpus.txt"])
    (tmp_path / "out" / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(DataError, match="meta.json: files names .*, which data_process.py does not write"):
        run()
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_every_name_in_meta_is_missed(tmp_path, chain):
    """With any one of them misspelt the file is refused, or nothing reads it: no traceback."""

    def places(entry, at=()):
        for key in entry if isinstance(entry, dict) else ():
            yield at, key
            yield from places(entry[key], (*at, key))

    text, silent = (chain / "data" / "meta.json").read_text(encoding="utf-8"), set()
    for at, key in places(json.loads(text)):
        changed = entry = json.loads(text)
        for name in at:
            entry = entry[name]
        entry[f"{key}_"] = entry.pop(key)
        save_meta(tmp_path, changed)
        with suppress(DataError):
            meta = load_meta(tmp_path)
            for part, tally in meta.get("tally", {}).items():
                part_table(part, tally)
            silent.add(key)
    assert silent.isdisjoint("format_version part read kept dropped remarks train val examples".split())
    assert "unknown" in silent  # which has a default


def test_what_was_cut_off_before_it_wrote_is_told(tmp_path, run):
    run()
    meta = json.loads((tmp_path / "out" / "meta.json").read_text(encoding="utf-8"))
    (tmp_path / "out" / "meta.json").write_text(json.dumps(meta | dict(files={}, tally={})), encoding="utf-8")
    with pytest.raises(DataError, match="meta.json names no files: the run that began it was cut off; run it again"):
        main(["--verify", f"--out={tmp_path / 'out'}"])


@pytest.mark.parametrize("name", ["report.md", "corpus.txt", "train.wiki.bin", "sft.pkl"])
def test_a_folder_of_somebody_else_is_left_alone(tmp_path, run, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(DataError, match=f"{name} is there, but no meta.json: it was not written here"):
        run()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
    assert (tmp_path / "out" / name).read_text() == "mine"


def test_a_file_changed_by_hand_is_not_replaced(tmp_path, run):
    run()
    path = tmp_path / "out" / "corpus.txt"
    before = path.read_bytes()
    for changed in (before + b"mine\n", before.replace("很长".encode(), "很短".encode()), b""):
        path.write_bytes(changed)
        with pytest.raises(DataError, match="corpus.txt: changed since it was written: move it away, or"):
            run()
        assert path.read_bytes() == changed
    path.rename(tmp_path / "mine.txt")
    run()
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "name, change, line",
    [
        ("report.md", lambda b: b.replace(b"##", b"mine ##"), "report.md was changed since it was written: move it"),
        ("report.md", lambda b: b + b"mine\n", "report.md was not written by such a command: move it away"),
        ("lengths.png", lambda b: b"mine", "lengths.png was not written by such a command: move it away"),
        ("dropped.jsonl", lambda b: b + b"mine\n", r"dropped.jsonl:\d+: a line that was not written here: move it"),
        ("dropped.jsonl", lambda b: b'{"text": "mine"}\n' + b, "dropped.jsonl:1: a line that was not written here"),
    ],
)
def test_a_report_with_a_users_words_is_not_replaced(tmp_path, run, name, change, line):
    with open(tmp_path / "raw.txt", "a", encoding="utf-8") as file:
        file.write("\n短\u2028短")  # too short, so that it stands in dropped.jsonl, and no end of a line there
    run()
    path = tmp_path / "out" / name
    path.write_bytes(changed := change(path.read_bytes() if path.exists() else b""))
    with pytest.raises(DataError, match=line):
        run()
    assert path.read_bytes() == changed
    path.unlink()
    run()
    run()


def test_a_file_that_meta_does_not_name_is_not_replaced(tmp_path, run, capsys):
    """Neither beside a meta.json that lost its keys, nor beside one of an older version."""
    run()
    path, meta = tmp_path / "out" / "corpus.txt", tmp_path / "out" / "meta.json"
    written, said = path.read_bytes(), json.loads(meta.read_text(encoding="utf-8"))
    for kept in (dict(format_version=2), dict(format_version=1), said | dict(files={})):
        meta.write_text(json.dumps(kept))
        with pytest.raises(DataError, match="corpus.txt would be replaced, but .*meta.json does not name it: move it"):
            run()
        assert path.read_bytes() == written
    (tmp_path / "out" / "work" / "text").mkdir(parents=True)  # a run was killed while it wrote the file
    run()
    assert path.read_bytes() == written and "corpus.txt" in load_meta(tmp_path / "out")["files"]


def test_data_of_an_older_version_is_replaced_as_far_as_it_is_what_was_written(tmp_path, run, capsys):
    run()
    path, meta = tmp_path / "out" / "corpus.txt", tmp_path / "out" / "meta.json"
    written, said = path.read_bytes(), json.loads(meta.read_text(encoding="utf-8")) | dict(format_version=1)
    meta.write_text(json.dumps(said), encoding="utf-8")
    path.write_bytes(written + b"mine\n")
    with pytest.raises(DataError, match="corpus.txt: changed since it was written: move it away"):
        run()
    path.write_bytes(written)
    capsys.readouterr()
    run()
    assert capsys.readouterr().err.splitlines()[0] == f"{meta}: of format version 1, starting anew"
    assert load_meta(tmp_path / "out")["files"]["corpus.txt"]["bytes"] == len(written)


@pytest.mark.parametrize("version", [None, "2", [2], 1.5, 3])
def test_a_version_that_is_none_is_one_line(tmp_path, run, version):
    run()
    meta = tmp_path / "out" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text(encoding="utf-8")) | dict(format_version=version)))
    with pytest.raises(DataError, match="meta.json: format version"):
        run()


def test_no_source_is_overwritten(tmp_path, run):
    (tmp_path / "zh").mkdir()
    shutil.copy(tmp_path / "raw.txt", tmp_path / "zh" / "raw.txt")
    run(source="zh", out="zh")  # beside what is written is fine
    before = (tmp_path / "zh" / "corpus.txt").read_bytes()
    for source in ("zh", "zh/corpus.txt"):
        with pytest.raises(DataError, match="zh/corpus.txt: a source that this run would overwrite"):
            run(source=source, out="zh")
    assert (tmp_path / "zh" / "corpus.txt").read_bytes() == before


def test_only_shards_are_removed_from_work(tmp_path, run):
    names = (
        "notes.md text/notes.md text/photos-00001/one.jpg text/mine/index.npz text/mine/a.bin text/x-00001.old.tmp/a"
    )
    mine = [tmp_path / "out" / "work" / name for name in [*names.split(), "text/x-00000/thesis.txt"]]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    with pytest.raises(UserError, match="work/text/x-00000 holds something else than a shard"):
        run()
    mine.pop().unlink()
    (tmp_path / "out" / "work" / "text" / "x-00000").rmdir()
    run()
    assert sorted(path for path in (tmp_path / "out" / "work").rglob("*") if path.is_file()) == sorted(mine)


SLEEPERS = """
import os, signal, sys, time
from corpora.shards import make_in_parallel

class Silent:
    def update(self, *_): pass

def sleep(job):
    open(os.path.join(sys.argv[1], str(os.getpid())), "w").close()
    time.sleep(60)

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, under which the tests may run, ignores it
make_in_parallel([0, 1], sleep, 2, Silent())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_workers_end_with_their_parent(tmp_path, number):
    parent = subprocess.Popen([sys.executable, "-c", SLEEPERS, str(tmp_path)], cwd=ROOT)
    while len(workers := [int(path.name) for path in tmp_path.iterdir()]) < 2:
        assert parent.poll() is None
        time.sleep(0.05)
    parent.send_signal(number)
    parent.wait()
    deadline = time.monotonic() + 20
    while alive := [pid for pid in workers if is_running(pid)]:
        assert time.monotonic() < deadline, f"{alive} outlive their parent"
        time.sleep(0.05)


def is_running(pid):
    """Whether a process is there and no zombie, which nobody may be left to bury."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"
