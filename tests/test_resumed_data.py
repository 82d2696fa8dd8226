"""A run is resumed on the data and the parent that it was trained on, told by their sha256, wherever they lie."""

import shutil

import pytest
import torch
from chains import MAINS, PARENTS, STEPS, TRAINED, failure, options_of, train

from common import checkpoint, resume
from dataset.formats import load_meta, save_meta

LONGER = dict(max_steps=STEPS + 1)


def changed_data(chain, folder, **changes):
    """A copy of the chain's data in which meta.json gives some files another sha256, None for a file that is gone."""
    shutil.copytree(chain / "data", folder)
    meta = load_meta(folder)
    for name, sha256 in changes.items():
        meta["files"][name]["sha256"] = sha256
    save_meta(folder, meta)
    return folder


@pytest.mark.parametrize("stage", TRAINED)
def test_a_run_is_not_resumed_on_other_data(chain, tmp_path, capsys, stage):
    run_dir, files = tmp_path / "run", checkpoint.load(chain / stage).training["data"]
    entries = load_meta(chain / "data")["files"]
    assert files == {name: entries[name]["sha256"] for name in files}
    reads = dict(pretrain={"train.people_daily.bin", "train.reviews.bin", "val.people_daily.bin", "val.reviews.bin"})
    reads |= dict(sft={"sft.pkl"}, rm={"rm.pkl"}, dpo={"rm.pkl", "prompts.pkl"})
    assert files.keys() == reads.get(stage, {"prompts.pkl"})
    shutil.copytree(chain / stage, run_dir)
    name = list(files)[-1]
    data = changed_data(chain, tmp_path / "data", **{name: "f" * 64})
    line = failure(capsys, MAINS[stage].main, options_of(chain, stage, run_dir, dict(data=data, resume=True, **LONGER)))
    was = f"step {STEPS} of {run_dir} was trained on {files[name][:16]}"
    assert line == f"error: cannot resume: {data / name} is {'f' * 16}, {was}"
    assert checkpoint.load(run_dir).step == STEPS


def test_a_run_is_resumed_where_only_the_place_of_its_data_or_other_files_changed(chain, tmp_path):
    data = changed_data(chain, tmp_path / "data", **{"rm.pkl": "f" * 64})
    shutil.copytree(chain / "sft", tmp_path / "run")
    train(chain, "sft", tmp_path / "run", data=data, resume=True, **LONGER)
    assert checkpoint.load(tmp_path / "run").step == STEPS + 1


@pytest.mark.parametrize("stage, changed", [("pretrain", {}), ("sft", dict(init_from="ppo")), ("ppo", {})])
def test_a_run_is_resumed_where_it_was_moved_with_what_it_reads(chain, tmp_path, capsys, stage, changed):
    moved = tmp_path / "chain"
    shutil.copytree(chain, moved)
    for key, other in changed.items():
        options = {key: moved / other, "resume": True, **LONGER}
        line = failure(capsys, MAINS[stage].main, options_of(moved, stage, moved / stage, options))
        before, now = chain / PARENTS[stage] / "ckpt.pt", moved / other / "ckpt.pt"
        assert f"it started from {before} with sha256" in line and f"{now} now has" in line
    train(moved, stage, moved / stage, resume=True, **LONGER)
    assert checkpoint.load(moved / stage).step == STEPS + 1


def test_sources_that_a_mixture_leaves_out_may_change(chain, tmp_path, capsys):
    changes = dict(mixture="reviews=1")
    train(chain, "pretrain", tmp_path / "run", **changes, max_steps=1)
    data = changed_data(chain, tmp_path / "data", **{"train.people_daily.bin": "f" * 64})
    train(chain, "pretrain", tmp_path / "run", **changes, data=data, max_steps=2, resume=True)
    options = dict(changes, data=data, max_steps=3, resume=True)
    meta = load_meta(data)
    save_meta(data, meta | dict(files={n: e | dict(sha256="e" * 64) for n, e in meta["files"].items()}))
    line = failure(capsys, MAINS["pretrain"].main, options_of(chain, "pretrain", tmp_path / "run", options))
    assert "train.reviews.bin is eeee" in line


def test_validation_text_that_a_mixture_leaves_out_is_verified(chain, tmp_path, capsys):
    shutil.copytree(chain / "data", tmp_path / "data")
    path = tmp_path / "data" / "val.people_daily.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"\1\0")
    options = dict(data=tmp_path / "data", mixture="reviews=1", max_steps=1)
    line = failure(capsys, MAINS["pretrain"].main, options_of(chain, "pretrain", tmp_path / "run", options))
    assert f"{path}: its sha256 is not the one in meta.json" in line


def test_sources_added_or_in_another_order_are_other_data(chain, tmp_path):
    ckpt = checkpoint.load(chain / "pretrain")
    files = ckpt.training["data"]
    resume.same_data(ckpt, "data", dict(files))
    with pytest.raises(checkpoint.CheckpointError, match=r"data/train.new.bin is aaaa, step \d+ of .* without it"):
        resume.same_data(ckpt, "data", files | {"train.new.bin": "aaaa"})
    with pytest.raises(checkpoint.CheckpointError, match=r"val.reviews.bin is not read, step .* on [0-9a-f]{16}$"):
        resume.same_data(ckpt, "data", {n: h for n, h in files.items() if n != "val.reviews.bin"})
    with pytest.raises(checkpoint.CheckpointError, match="in this order"):
        resume.same_data(ckpt, "data", dict(reversed(files.items())))


def test_a_checkpoint_from_before_data_was_compared_goes_on_with_a_word(chain, tmp_path, capsys):
    shutil.copytree(chain / "sft", tmp_path / "run")
    payload = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)
    del payload["training"]["data"]
    torch.save(payload, tmp_path / "run" / "ckpt.pt")
    data = changed_data(chain, tmp_path / "data", **{"sft.pkl": "f" * 64})
    options = dict(data=data, resume=True, **LONGER)
    line = failure(capsys, MAINS["sft"].main, options_of(chain, "sft", tmp_path / "run", options))
    assert "cannot resume: data is" in line  # then another place is refused
    train(chain, "sft", tmp_path / "run", resume=True, **LONGER)
    assert "does not say which data it was trained on" in capsys.readouterr().out
    assert list(checkpoint.load(tmp_path / "run").training["data"]) == ["sft.pkl"]
