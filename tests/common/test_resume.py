"""The run directory: what begins, what goes on and from where, and that nothing is lost before something is there."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from chains import ROOT
from saving import CONFIG, cut_short, flip_a_bit, killed_before, run_config, save_steps, steps, write

from common.checkpoint import CheckpointError, load
from common.config import ConfigError, UserError
from common.files import unlock
from common.resume import begin, commit, make_new


def test_begin_makes_the_run_directory_and_starts_at_zero(tmp_path, capsys):
    out = tmp_path / "a" / "b"
    assert begin(run_config(out), "sft") is None and out.is_dir()
    assert capsys.readouterr().out == ""
    assert begin(run_config(out, resume=True), "sft") is None
    assert capsys.readouterr().out == f"nothing to resume in {out}, starting at step 0\n"
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot make the run directory"):
        begin(run_config(tmp_path / "file"), "sft")


def test_begin_does_not_touch_a_checkpoint_unasked(tmp_path):
    path = write(tmp_path) / "ckpt.pt"
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="--resume .* --overwrite") as caught:
        begin(run_config(tmp_path), "sft")
    assert str(path) in str(caught.value)
    with pytest.raises(CheckpointError, match="give one of them"):
        begin(run_config(tmp_path, resume=True, overwrite=True), "sft")
    assert path.read_bytes() == before


FOREIGN = ["ckpt.pt", "best.pt", "config.json", "metrics.jsonl", "loss.png", "samples.txt", "logger_id.txt"]


@pytest.mark.parametrize("name", FOREIGN)
def test_files_that_no_run_here_wrote_are_not_replaced(tmp_path, name):
    for data in (b"mine", b'{"out": "x", "overwrite": true}'):  # the second is a config.json of tokenizer.train
        (tmp_path / name).write_bytes(data)
        for changes in (dict(overwrite=True), dict(resume=True), {})[: 1 if name == "ckpt.pt" else 3]:
            with pytest.raises(CheckpointError, match=rf"{name} would be replaced, .* another --out, or remove it"):
                begin(run_config(tmp_path, **changes), "sft")
        assert snapshot(tmp_path) == {name: data}
        unlock(tmp_path)


@pytest.mark.parametrize("name", ["ckpt.pt", "best.pt"])
def test_a_checkpoint_of_something_else_is_not_replaced_even_beside_a_run(tmp_path, name):
    save_steps(tmp_path, 1, 2)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for content in (dict(a=torch.zeros(3)), [1], CONFIG, torch.nn.Linear(1, 1)):
        torch.save(content, tmp_path / name)
        before = snapshot(tmp_path)
        with pytest.raises(CheckpointError, match=f"{name} would be replaced"):
            begin(run_config(tmp_path, overwrite=True), "sft")
        assert snapshot(tmp_path) == before


@pytest.mark.parametrize("known_by", ["ckpt.pt", "ckpt-1.pt", "config.json"])
def test_a_run_is_replaced_though_its_newest_checkpoint_is_damaged(tmp_path, known_by):
    save_steps(tmp_path, 1, 2)
    if known_by != "ckpt.pt":
        cut_short(tmp_path / "ckpt.pt")
    if known_by == "config.json":
        cut_short(tmp_path / "ckpt-1.pt")
        (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for name in ("metrics.jsonl", "loss.png"):
        (tmp_path / name).write_text("old")
    assert begin(run_config(tmp_path, overwrite=True), "sft") is None
    new_run(tmp_path)
    commit(tmp_path)
    assert load(tmp_path).step == 0 and not (tmp_path / "loss.png").exists()


def test_what_a_stage_does_not_write_is_neither_removed_nor_replaced(tmp_path):
    write(tmp_path, stage="quantize")
    mine = ("best.pt", "loss.png", "calibration.png")
    for name in (*mine, "samples.txt"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(CheckpointError, match="best.pt would be replaced"):
        begin(run_config(tmp_path, overwrite=True), "sft")
    assert begin(run_config(tmp_path, overwrite=True), "quantize") is None
    new_run(tmp_path)
    commit(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"ckpt.pt", "metrics.jsonl", *mine}


@pytest.mark.parametrize("stage", ["dpo", "sft"])
def test_a_reference_stays_for_dpo_alone(tmp_path, stage):
    write(tmp_path, stage="dpo")
    (tmp_path / "ref_logps.npz").write_text("of the reference")
    assert begin(run_config(tmp_path, overwrite=True), stage) is None
    make_new(tmp_path)
    write(tmp_path / ".new" / "ckpt.pt", stage=stage)
    commit(tmp_path)
    assert (tmp_path / "ref_logps.npz").exists() == (stage == "dpo")


def old_run(out):
    """A run with files of all kinds and two that are somebody's own; returns {name: bytes}."""
    save_steps(out / "ckpt.pt", 1, 2, 3, keep_last=3)
    (out / "ckpt-1000.pt").write_text("mine")
    for name in ("best.pt", "metrics.jsonl", "samples.txt", "loss.png", "notes.md"):
        (out / name).write_text("old")
    return snapshot(out)


def snapshot(out):
    return {file.name: file.read_bytes() for file in out.iterdir()}


def new_run(out):
    make_new(out)
    (out / ".new" / "metrics.jsonl").write_text("new")
    write(out / ".new" / "ckpt.pt", step=0)


def test_overwriting_removes_nothing_before_the_new_run_is_saved(tmp_path):
    before = old_run(tmp_path)
    assert begin(run_config(tmp_path, overwrite=True), "sft") is None
    assert snapshot(tmp_path) == before
    new_run(tmp_path)
    commit(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"ckpt.pt", "metrics.jsonl", "notes.md", "ckpt-1000.pt"}
    assert load(tmp_path).step == 0 and (tmp_path / "metrics.jsonl").read_text() == "new"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_kill_while_a_new_run_takes_over_leaves_the_old_or_the_new(tmp_path):
    killed, found = True, []
    while killed:
        out = tmp_path / str(len(found))
        old_run(out)
        new_run(out)
        killed = killed_before(len(found), functools.partial(commit, out), {"os.rename", "os.remove", "os.rmdir"}, "")
        assert load(out).step in (0, 3)  # whole at every moment
        found.append(not (out / ".new").exists())
        assert begin(run_config(out, resume=True), "sft").step == (0 if found[-1] else 3)
        assert (out / "metrics.jsonl").read_text() == ("new" if found[-1] else "old")
        assert not {".new", ".saved"} & {file.name for file in out.iterdir()}
    assert found == [False] + [True] * (len(found) - 1) and len(found) > 8


def test_a_folder_that_is_read_is_not_written_into(tmp_path):
    for folder in ("sft", "rm"):
        write(tmp_path / folder / "ckpt.pt")
    (tmp_path / "link").symlink_to(tmp_path / "sft")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "ckpt.pt").symlink_to(tmp_path / "sft" / "ckpt.pt")
    (tmp_path / "vocabulary").mkdir()
    (tmp_path / "vocabulary" / "tokenizer.model").write_bytes(b"")
    for out, read in (
        ("sft", dict(init_from="sft")),
        ("sft", dict(init_from="sft/../sft/ckpt.pt")),
        ("link", dict(init_from="sft")),
        ("sft", dict(init_from="link")),
        ("sft", dict(init_from="linked")),
        ("rm", dict(init_from="sft", reward_model="rm")),
        ("vocabulary", dict(tokenizer="vocabulary")),
        ("vocabulary", dict(tokenizer="vocabulary/tokenizer.model")),
        ("data", dict(data="data")),
    ):
        read = {key: f"{tmp_path}/{name}" for key, name in read.items()}
        key = list(read)[-1]
        for changes in (dict(overwrite=True), dict(resume=True), {}):
            with pytest.raises(ConfigError, match=f"out={tmp_path / out} is where {key}={read[key]} is read"):
                begin(run_config(tmp_path / out, **read, **changes), "sft")
    assert begin(run_config(tmp_path / "new", init_from=str(tmp_path / "sft"), tokenizer="some/name"), "sft") is None


@pytest.mark.parametrize("name", [".new", ".saved"])
def test_a_folder_or_file_of_the_user_with_a_name_that_a_run_needs_is_refused(tmp_path, name):
    write(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    for make in (
        lambda path: path.write_text("mine"),
        lambda path: path.symlink_to("mine"),
        lambda path: path.symlink_to("nowhere"),
        lambda path: shutil.copytree(tmp_path / "mine", path),
    ):
        make(tmp_path / name)
        for changes in (dict(overwrite=True), dict(resume=True), {}):
            with pytest.raises(CheckpointError, match=rf"{re.escape(name)} was not made by a run.*another --out"):
                begin(run_config(tmp_path, **changes), "sft")
        assert os.path.lexists(tmp_path / name) and (tmp_path / "mine" / "thesis.txt").read_text() == "mine"
        if (tmp_path / name).is_dir() and not (tmp_path / name).is_symlink():
            assert (tmp_path / name / "thesis.txt").read_text() == "mine"
        else:
            (tmp_path / name).unlink()


LOCKING = """
import sys
from pathlib import Path
from common.config import run
from common.files import lock
def main():
    lock(Path(sys.argv[1]), shared=len(sys.argv) > 2)
    print("locked", flush=True)
    sys.stdin.read()
run(main)
"""


def locking(folder, *shared):
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", LOCKING, folder, *shared], cwd=ROOT, **pipes)


@pytest.mark.skipif(sys.platform == "win32", reason="no locks on this system")
def test_a_second_process_is_told_in_one_line_and_a_killed_one_leaves_no_lock(tmp_path):
    first = locking(tmp_path)
    assert first.stdout.readline() == "locked\n"
    second = locking(tmp_path)
    _, err = second.communicate("", timeout=60)
    assert second.returncode == 2
    assert err == f"error: {tmp_path}: another process writes into it: let it end, or choose another --out\n"
    with pytest.raises(UserError, match=f"{tmp_path}: another process"):
        begin(run_config(tmp_path), "sft")
    first.kill()
    first.communicate()
    assert not list(tmp_path.iterdir())
    assert begin(run_config(tmp_path), "sft") is None and begin(run_config(tmp_path), "sft") is None
    unlock(tmp_path)
    third, fourth = locking(tmp_path, "shared"), locking(tmp_path, "shared")
    assert (third.stdout.readline(), fourth.stdout.readline()) == ("locked\n", "locked\n")
    for each in (third, fourth):
        each.communicate("", timeout=60)


def test_begin_resume_returns_the_checkpoint(tmp_path, capsys):
    write(tmp_path)
    changes = dict(max_steps=99, betas=[0.9, 0.95], device="cpu", eval_interval=5, eval_tokens=9, resume=True)
    assert begin(run_config(tmp_path, **changes), "sft").step == 7
    assert capsys.readouterr().out == f"resuming {tmp_path} at step 7\n"
    with pytest.raises(CheckpointError, match="from stage sft, this is dpo"):
        begin(run_config(tmp_path, resume=True), "dpo")


@pytest.mark.parametrize(
    "changes, key, old, new",
    [
        (dict(lr=0.5), "lr", "0.001", "0.5"),
        (dict(model=dict(dim=32)), "model.dim", "16", "32"),
        (dict(seed=3), "seed", "absent", "3"),
    ],
)
def test_begin_resume_refuses_a_changed_key(tmp_path, changes, key, old, new):
    write(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        begin(run_config(tmp_path, resume=True, **changes), "sft")
    assert f"{key} is {old} in {tmp_path / 'ckpt.pt'} and {new} in this run's config" in str(caught.value)


@pytest.mark.parametrize(
    "damage, reason",
    [
        (cut_short, "cut short or not a checkpoint; "),
        (lambda path: os.truncate(path, 0), "cut short or not a checkpoint; "),
        (lambda path: path.write_bytes(bytes(path.stat().st_size)), "cut short or not a checkpoint; "),
        (flip_a_bit, "damaged, the CRC of archive/data/"),
    ],
    ids=["half", "empty", "zeros", "bit"],
)
def test_resuming_falls_back_to_the_checkpoint_before(tmp_path, capsys, damage, reason):
    path, kept = tmp_path / "ckpt.pt", tmp_path / "ckpt-20.pt"
    save_steps(tmp_path, 10, 20, 30)
    damage(path)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{path}: {reason}") and message.endswith(f"; {kept} (step 20) is whole")
    ckpt = begin(run_config(tmp_path, resume=True), "sft")
    assert (ckpt.step, ckpt.path) == (20, path)
    out, err = capsys.readouterr()
    assert out == f"resuming {tmp_path} at step 20\n"
    assert err == message.replace(f"{kept} (step 20) is whole", f"going on from {kept} (step 20)\n")
    assert steps(tmp_path) == {"ckpt.pt": 20, "ckpt-20.pt": 20}
    save_steps(tmp_path, 30)
    assert steps(tmp_path) == {"ckpt.pt": 30, "ckpt-20.pt": 20}


def test_resuming_passes_over_all_that_is_damaged(tmp_path, capsys):
    save_steps(tmp_path, 1, 2, 3, 4, keep_last=4)
    for name in ("ckpt.pt", "ckpt-3.pt"):
        cut_short(tmp_path / name)
    assert begin(run_config(tmp_path, resume=True), "sft").step == 2
    assert {load(tmp_path / name).step for name in ("ckpt.pt", "ckpt-2.pt")} == {2}
    for file in tmp_path.iterdir():
        cut_short(file)
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path / 'ckpt.pt'}: cut short or not a checkpoint")):
        begin(run_config(tmp_path, resume=True), "sft")
    assert len(list(tmp_path.iterdir())) == 4


def test_a_run_directory_without_its_newest_checkpoint_is_still_one(tmp_path):
    save_steps(tmp_path, 1, 2)
    (tmp_path / "ckpt.pt").unlink()
    with pytest.raises(CheckpointError, match=r"ckpt-1.pt exists: give --resume"):
        begin(run_config(tmp_path), "sft")
    assert begin(run_config(tmp_path, resume=True), "sft").step == 1


def test_only_damage_is_a_reason_to_fall_back(tmp_path):
    save_steps(tmp_path, 1, 2)
    path = tmp_path / "ckpt.pt"
    torch.save(torch.load(path, weights_only=True) | dict(format_version=2), path)
    with pytest.raises(CheckpointError, match="format version 2, this code reads version 1"):
        begin(run_config(tmp_path, resume=True), "sft")
    write(tmp_path, step=2)
    save_steps(tmp_path, 3)
    cut_short(path)
    with pytest.raises(CheckpointError, match=r"lr is 0.001 in .*ckpt-2.pt and 0.5 in this run's config"):
        begin(run_config(tmp_path, resume=True, lr=0.5), "sft")
    assert {file.name for file in tmp_path.iterdir()} == {"ckpt.pt", "ckpt-2.pt"}


def test_a_run_from_before_keep_last_is_resumed(tmp_path):
    write(tmp_path, keep_last=1)
    assert begin(run_config(tmp_path, resume=True, keep_last=2), "sft").step == 7


def test_a_run_from_before_muons_keys_is_resumed_as_it_was(tmp_path):
    now = dict(momentum=0.9, embedding_rate=4.0, resume=True)
    for optimizer in ("adamw", "muon"):
        (tmp_path / optimizer).mkdir()
        write(tmp_path / optimizer, config=run_config(tmp_path / optimizer, optimizer=optimizer))
    assert begin(run_config(tmp_path / "adamw", optimizer="adamw", **now), "sft").step == 7
    with pytest.raises(CheckpointError, match="embedding_rate is 1.0 in .* and 4.0 in this run's config"):
        begin(run_config(tmp_path / "muon", optimizer="muon", **now), "sft")
