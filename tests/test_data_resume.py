"""data_process.py on several machines, killed at any moment, and run again: the same bytes, and no work done twice."""

import os
import random
import shutil
import signal
import subprocess
import sys

import pytest
from chains import ROOT
from preparing import files_of, texts_of, two_sources, write_jsonl

from common.config import ConfigError, UserError
from data_process import main
from dataset.formats import OURS

DIES = """
import os, signal, sys
from dataset import formats
import data_process

save, written = formats.{writer}, []

def save_or_die(self, *args):
    written.append(1)
    if len(written) == {times}:
        os.kill(os.getpid(), signal.SIGKILL)
    return save(self, *args)

formats.{writer} = save_or_die
data_process.main(sys.argv[1:])
"""


def test_machines_make_shards_and_one_merges_them(tmp_path, build, tokenizer_path):
    options = (two_sources(tmp_path), "--parts=pretrain", "--unit_bytes=10000")
    whole = build("whole", *options)

    def make(shard, out="apart"):
        main([f"--out={tmp_path / out}", f"--tokenizer={tokenizer_path}", *options, f"--shard={shard}"])
        assert [path.name for path in (tmp_path / out).iterdir()] == ["work"]

    make("2/3")
    make("0/3")
    with pytest.raises(UserError, match=r"pretrain: \d+ of \d+ shards are missing .*a-00001: run the --shard"):
        build("apart", *options, "--merge")
    make("1/3")
    assert build("apart", *options, "--merge") == whole
    make("0/1", "one")  # a single machine merges no sooner
    for shard in ("3/3", "1", "-1/2", "0/0"):
        with pytest.raises(ConfigError, match="shard = .*: write i/n"):
            make(shard)


@pytest.mark.slow
def test_killed_runs_go_on_to_the_same_bytes(tmp_path, build, tokenizer_path):
    """kill -9 at moments spread over a run, until one gets through."""
    options = [two_sources(tmp_path, 6000), "--parts=pretrain", "--unit_bytes=40000", "--workers=2", "--val_share=0.2"]
    whole = build("whole", *options)
    command = [sys.executable, "data_process.py", *options, f"--out={tmp_path / 'killed'}"]
    command.append(f"--tokenizer={tokenizer_path}")
    rng, kills = random.Random(0), 0
    while True:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            # The first seconds are imports: after them shards come one by one, so that every run gets further.
            process.wait(rng.uniform(3.0, 5.0) + kills)
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
    assert process.returncode == 0
    assert files_of(tmp_path / "killed") == whole
    assert not list((tmp_path / "killed").rglob(f"*.{OURS}"))


@pytest.mark.parametrize("death", [("BinWriter.write", 2, 2), ("save_pkl", 1, 0)], ids=["pretrain", "sft"])
def test_a_kill_in_the_merge_costs_no_shard_and_leaves_nothing(tmp_path, build, tokenizer_path, capsys, death):
    writer, times, left = death
    sources, killed = two_sources(tmp_path), tmp_path / "killed"
    write_jsonl(tmp_path / "sft.jsonl", [dict(instruction=t, output=t) for t in texts_of(50, 3)])
    options = [f"{sources},chat:alpaca={tmp_path / 'sft.jsonl'}", "--parts=text,pretrain,sft", "--val_share=0.2"]
    for out in ("whole", "killed"):  # over the data of an earlier run, of which c goes
        build(out, sources.replace("b:", "c:"), "--parts=pretrain")
    whole = build("whole", *options)
    command = [sys.executable, "-c", DIES.format(writer=writer, times=times), *options, f"--out={killed}"]
    process = subprocess.run([*command, f"--tokenizer={tokenizer_path}"], cwd=ROOT, capture_output=True)
    assert process.returncode == -signal.SIGKILL
    assert len(list(killed.glob(f"*.{OURS}"))) == left  # of train.a.bin and val.a.bin
    capsys.readouterr()
    assert build("killed", *options) == whole
    said = capsys.readouterr().out
    assert all(f"{part} units: {n} of {n} are done" in said for part, n in dict(text=2, pretrain=2, sft=1).items())
    assert not list(killed.rglob(f"*.{OURS}")) and not (killed / "work").exists()
    metas = [(tmp_path / out / "meta.json").read_text(encoding="utf-8") for out in ("whole", "killed")]
    assert metas[0].replace(str(tmp_path / "whole"), str(killed)) == metas[1]  # in the same order, too


def test_a_kill_while_the_shards_are_removed_leaves_none_that_looks_complete(tmp_path, build, monkeypatch):
    options = [two_sources(tmp_path), "--parts=pretrain"]
    whole = build("whole", *options)

    def die(folder, **_):
        next(folder.glob("*.bin")).unlink()  # the first file that a shard cannot do without
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shutil, "rmtree", die)
        build("killed", *options)
    assert (tmp_path / "killed" / "work").exists()
    assert build("killed", *options) == whole
    assert not (tmp_path / "killed" / "work").exists()


def test_a_shard_made_from_something_else_is_made_again(tmp_path, build):
    sources = two_sources(tmp_path)
    before = build("kept", sources, "--parts=pretrain", "--keep_work")
    folder = tmp_path / "kept" / "work" / "pretrain"
    made = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert build("kept", sources, "--parts=pretrain", "--keep_work") == before
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == made  # nothing was made again
    rows = [dict(text=text) for text in texts_of(300, 1)]
    write_jsonl(tmp_path / "a.jsonl", [*rows[:-1], dict(text=rows[-1]["text"].replace("第299篇", "第992篇"))])
    after = build("kept", sources, "--parts=pretrain", "--keep_work")
    again = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert [name for name in made if again[name] != made[name]] == ["a-00000"]
    assert after == build("fresh", sources, "--parts=pretrain")
