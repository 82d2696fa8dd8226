"""common.runs and serving.runs: names of checkpoints, their family tree, samples."""

import json
import os

import pytest
from tiny import tiny

from common import checkpoint
from common.metrics import MetricLog
from common.runs import find_folders, n_parameters, parse_samples
from serving.protocol import ApiError
from serving.runs import Runs


def save(folder, name="ckpt.pt", stage="sft", seed=0, parent=None, step=1, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    facts = dict(stage=stage, step=step, tokens_seen=9, config={}, tokenizer=b"x", parent=parent)
    checkpoint.save(folder / name, model=tiny(seed, **changes), **facts)
    return folder / name


def parent_of(path, stage):
    return dict(path=str(path), stage=stage, sha256=checkpoint.file_sha256(path))


@pytest.mark.parametrize("changes", [{}, dict(tied=False), dict(scalar_head=True), dict(n_kv_heads=4, hidden_dim=48)])
def test_parameters_are_counted_without_the_model(changes):
    model = tiny(**changes)
    assert n_parameters(model.config.__dict__) == model.num_params()


def test_names_kinds_and_problems(tmp_path):
    save(tmp_path / "demo" / "pretrain", stage="pretrain")
    for name in ("ckpt.pt", "ckpt-3.pt", "best.pt", "other.pt"):
        save(tmp_path / "demo" / "sft", name)
    save(tmp_path / "demo" / "rm", stage="rm", scalar_head=True)
    save(tmp_path / "demo" / "new" / ".new")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "ckpt.pt").write_bytes(b"PK")
    (tmp_path / "demo" / "loop").symlink_to(tmp_path)
    runs = Runs(tmp_path)
    kinds = {name: entry.kind for name, entry in runs.entries().items()}
    sft = dict.fromkeys(("demo/sft", "demo/sft@3", "demo/sft@best"), "chat")
    assert kinds == {"demo/pretrain": "text", "demo/rm": "score", "odd": ""} | sft
    assert {entry.id for entry in runs.usable()} == {"demo/pretrain", *sft}
    for name, status in (("odd", 400), ("demo/rm", 400), ("demo/../demo/sft", 404), ("demo/new/.new", 404)):
        with pytest.raises(ApiError) as error:
            runs.model(name)
        assert error.value.status == status
    assert list(Runs(tmp_path / "demo" / "sft").entries()) and "sft" in Runs(tmp_path / "demo" / "sft").entries()


def test_what_json_cannot_hold_is_one_entrys_problem(tmp_path):
    save(tmp_path / "good")
    save(tmp_path / "many", step=10**5000)
    save(tmp_path / "odd", stage="\ud800")
    (huge := tiny()).config.max_seq_len = 1e200
    (tmp_path / "huge").mkdir()
    checkpoint.save(tmp_path / "huge", stage="sft", step=1, tokens_seen=9, config={}, tokenizer=b"x", model=huge)
    os.mkdir(named := os.fsencode(tmp_path) + b"/\xc4\xff")
    os.link(tmp_path / "good" / "ckpt.pt", named + b"/ckpt.pt")
    runs = Runs(tmp_path)
    said = json.dumps([[entry.json() for entry in runs.usable()], runs.tree(), runs.runs()], ensure_ascii=False)
    assert said.encode()
    problems = {name: entry.problem for name, entry in runs.entries().items()}
    assert problems.pop("many") == problems.pop("huge") == "not a checkpoint of this project"
    assert set(problems) == {"good", "odd", r"\udcc4\udcff"} and set(problems.values()) == {None}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_what_is_no_file_is_not_listed(tmp_path):
    """To open a pipe that nobody writes to would wait for ever, and the whole server with it."""
    for name in ("ckpt.pt", "metrics.jsonl", "samples.txt", "loss.png"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "best.pt").symlink_to(tmp_path / "gone.pt")
    (tmp_path / "ckpt-1.pt").symlink_to(save(tmp_path / "sft"))
    assert {name: files for name, (_, files) in find_folders(tmp_path).items()} == {
        tmp_path.name: ["ckpt-1.pt"],
        "sft": ["ckpt.pt"],
    }


def test_tree_follows_the_hash_not_the_path(tmp_path):
    first = save(tmp_path / "pretrain", stage="pretrain")
    save(tmp_path / "sft", parent=parent_of(first, "pretrain"))
    save(tmp_path / "dpo", stage="dpo", parent=parent_of(tmp_path / "sft" / "ckpt.pt", "sft"))
    moved = tmp_path / "moved"
    (tmp_path / "pretrain").rename(moved)
    parents = {node["id"]: node["parent_id"] for node in Runs(tmp_path).tree()}
    assert parents == {"moved": None, "sft": "moved", "dpo": "sft"}
    runs = Runs(tmp_path)
    save(tmp_path / "sft", seed=1)  # trained anew since
    assert {node["id"]: node["parent_id"] for node in runs.tree()}["dpo"] is None


def test_runs_and_their_files(tmp_path):
    log = MetricLog(tmp_path / "demo" / "sft")
    log.write(1, {"train/loss": 2.5})
    log.write(2, {"train/loss": 1.5, "val/loss": float("nan")})
    log.samples(2, [("一\n二", "step 3\n  reply: x"), ("", "三")])
    log.plot([("loss", ["train/loss"])])
    with open(tmp_path / "demo" / "sft" / "metrics.jsonl", "a") as file:  # by somebody else
        file.write('{"step": 3, "val/kl": NaN, "val/odd": true}\n')
    runs = Runs(tmp_path)
    (run,) = runs.runs()
    assert (run["id"], run["step"], run["plots"], run["samples"]) == ("demo/sft", 3, ["loss.png"], True)
    assert run["figures"]["train/loss"] == 1.5 and not {"val/loss", "val/kl", "val/odd"} & set(run["figures"])
    assert runs.plot("demo/sft", "loss.png").startswith(b"\x89PNG")
    pairs = [dict(prompt="一\n二", reply="step 3\n  reply: x"), dict(prompt="", reply="三")]
    assert runs.samples("demo/sft") == [dict(step=2, pairs=pairs)]
    for run, name in (("demo/sft", "metrics.jsonl"), ("demo/sft", "../sft/loss.png"), ("..", "loss.png")):
        with pytest.raises(ApiError):
            runs.plot(run, name)


def test_samples_cut_at_their_beginning():
    assert parse_samples("    rest\n  reply: a\n\nstep 4\n  prompt: p\n  reply: r\n") == [
        dict(step=4, pairs=[dict(prompt="p", reply="r")])
    ]
    assert parse_samples("") == []
