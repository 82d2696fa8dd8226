"""What a training stage does around its loop: signals, saves on the side, memory, data that is not what it was."""

import gc
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from chains import MAINS, ROOT, STEPS, TRAINED, act_after, argv, failure, metrics, options_of, train
from saving import tiny, write

import sft
from common.checkpoint import Background, Checkpoint, CheckpointError, build_model, load, parent_of
from common.config import parse_config, run
from common.optim import build_optimizer
from common.stage import Interrupt, Stage

MORE = dict(resume=True, max_steps=STEPS + 1)


@pytest.mark.slow
def test_killed_and_resumed_training_equals_uninterrupted_training():
    command = [sys.executable, str(ROOT / "benchmarks" / "kill_resume.py"), "--tries=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["survived"] == figures["tried"] == 2 and figures["kills"] >= 2


# signals


def test_interrupt_asks_first_and_raises_on_the_second_ctrl_c():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interrupt() as interrupt:
        assert not interrupt.requested
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_python_without_torch_is_told_where_it_is():
    command = [sys.executable, "-S", str(ROOT / "eval_generate.py"), "--ckpt=docs/poet.pt"]  # without its packages
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"error: {sys.executable} has no torch: ")


def test_a_parent_that_has_not_finished_is_told(chain, tmp_path, capsys):
    train(chain, "pretrain", tmp_path / "whole", max_steps=2, save_interval=1, keep_last=2)
    (tmp_path / "part").mkdir()
    shutil.copy(tmp_path / "whole" / "ckpt-1.pt", tmp_path / "part" / "ckpt.pt")
    for name, note in (("whole", ""), ("part", f"note: {tmp_path / 'part' / 'ckpt.pt'} is of step 1 of 2: ")):
        capsys.readouterr()
        train(chain, "sft", tmp_path / f"sft-{name}", init_from=tmp_path / name, max_steps=1)
        said = capsys.readouterr().out
        assert note in said and ("has not finished" in said) == bool(note)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to another process")
@pytest.mark.parametrize(
    "script",
    [f"{name}.py" for name in sorted({main.__name__ for main in MAINS.values()} | {"data_process", "export"})]
    + ["-m tokenizer.train"],
)
def test_ctrl_c_during_imports_is_one_line(script, tmp_path):
    for name in ("torch", "numpy", "sentencepiece"):
        (tmp_path / f"{name}.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    command = [sys.executable, *script.split()]
    process = subprocess.Popen(command, cwd=ROOT, env=dict(PYTHONPATH=str(tmp_path)), **pipes)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n")


def last_words(capsys, options, main=sft.main):
    """The last line on stderr of a run of sft.py that ends with an error."""
    with pytest.raises(SystemExit) as stopped:
        run(lambda: main(options))
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in err
    return err.splitlines()[-1]


REFUSED = dict(data_process=dict(parts="text", sources="x:lines=empty.txt"), export=dict(format="hf", ckpt="sft"))


@pytest.mark.parametrize("name", [*MAINS, "grpo_train", *REFUSED])
def test_what_is_refused_after_its_config_leaves_no_folder(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(Path("sft"))
    Path("empty.txt").touch()
    parent = dict(tokenizer="empty.txt") if name == "pretrain" else dict(init_from="sft")
    options = REFUSED.get(name, parent | dict(data="nowhere"))
    module = MAINS.get(name) or importlib.import_module(name)
    assert last_words(capsys, argv(out="out/deeper", **options), module.main).startswith("error: ")
    assert sorted(os.listdir()) == ["empty.txt", "sft"]


# saving on the side


def test_a_save_in_the_background_holds_what_was_when_it_began(tmp_path):
    model, background = tiny(), Background()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)).backward()
    optimizer.step()
    before = {name: w.clone() for name, w in model.state_dict().items()}
    moment = optimizer.state[model.norm.weight]["exp_avg"].clone()
    extra = dict(watch=dict(negative=1))
    write(tmp_path, model, optimizer=optimizer, extra=extra, background=background)
    optimizer.step()
    extra["watch"]["negative"] = 2
    background.wait()
    ckpt = load(tmp_path)
    assert all(torch.equal(ckpt.weights[name], w) for name, w in before.items())
    assert not torch.equal(model.norm.weight, before["norm.weight"])
    assert any(torch.equal(each["exp_avg"], moment) for each in ckpt.training["optimizer"][0]["state"].values())
    assert ckpt.training["extra"] == dict(watch=dict(negative=1))


def test_a_save_that_fails_in_the_background_is_told_once_and_the_previous_one_stays(tmp_path):
    write(tmp_path, step=1)
    background = Background()
    write(tmp_path, step=2, extra=dict(where=object()), background=background)
    with pytest.raises(CheckpointError, match="cannot save .* previous checkpoint .* is intact"):
        write(tmp_path, step=3, background=background)
    background.wait()
    background.check()
    assert load(tmp_path).step == 1
    write(tmp_path, step=4, background=background)
    background.wait()
    assert load(tmp_path).step == 4


def test_a_stage_waits_for_its_last_save_and_tells_that_it_failed(chain, tmp_path, capsys):
    def on_the_side(stage):  # as on a GPU
        stage.background = Background()

    with pytest.MonkeyPatch.context() as patch:
        act_after(patch, 1, on_the_side)
        train(chain, "sft", tmp_path / "run", save_interval=2)
        assert load(tmp_path / "run").step == STEPS

        def break_extra(stage):
            on_the_side(stage)
            stage.extra = dict(where=object())

        act_after(patch, STEPS + 1, break_extra)
        line = last_words(capsys, options_of(chain, "sft", tmp_path / "run", MORE))
    assert f"cannot save {tmp_path / 'run' / 'ckpt.pt'}" in line and load(tmp_path / "run").step == STEPS


# memory


def test_loaded_weights_and_optimizer_state_are_forgotten_when_training_starts(chain, tmp_path):
    def started(**changes):
        config = parse_config("sft", options_of(chain, "sft", tmp_path / "run", changes), "")
        stage = Stage("sft", config, [])
        parent, tokenizer = stage.load_parent()
        loaded = list(parent.weights.values())
        if stage.resumed:
            loaded += stage.resumed.weights.values()
            loaded += [each["step"] for each in stage.resumed.training["optimizer"][0]["state"].values()]
        dead = [weakref.ref(tensor) for tensor in loaded]
        del loaded
        assert all(ref() is not None for ref in dead)
        model = build_model(parent)
        optimizer = build_optimizer(model, config)
        stage.start(model, optimizer, tokenizer, parent)
        in_use = {id(tensor) for each in optimizer.state.values() for tensor in each.values()}  # taken, not copied
        return [ref for ref in dead if id(ref()) not in in_use]

    assert [ref for ref in started() if ref() is not None] == []
    shutil.copytree(chain / "sft", tmp_path / "run", dirs_exist_ok=True)
    assert [ref for ref in started(**MORE) if ref() is not None] == []


@pytest.mark.parametrize("stage", TRAINED)
def test_no_script_holds_a_checkpoint_while_it_trains(chain, tmp_path, stage):
    def checkpoints():
        gc.collect()
        return [each for each in gc.get_objects() if isinstance(each, Checkpoint)]

    def look(_):
        held.extend(each for each in checkpoints() if id(each) not in before)

    before, held = {id(each) for each in checkpoints()}, []
    shutil.copytree(chain / stage, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        act_after(patch, STEPS + 1, look)
        train(chain, stage, tmp_path / "run", **MORE)
    assert held and all(each.weights == {} and each.training is None for each in held)


# what is there is not lost


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_overwriting_costs_nothing_until_the_new_run_is_saved(chain, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(chain / "sft", run_dir)
    (run_dir / "best.pt").write_bytes(b"old")
    (run_dir / "ckpt-77.pt").write_bytes(b"mine")
    before = snapshot(run_dir)
    typos = [dict(data=tmp_path / "none"), dict(init_from=tmp_path / "none"), dict(init_from=run_dir), dict(dtype="x")]
    for changes in (*typos, dict(batch_size=4000), dict(logger="nowhere")):
        failure(capsys, sft.main, options_of(chain, "sft", run_dir, dict(changes, overwrite=True)))
        assert snapshot(run_dir) == before

    def crash(*_):
        raise RuntimeError("out of memory")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(sft, "evaluate", crash)
        train(chain, "sft", run_dir, overwrite=True)
    assert snapshot(run_dir) == before
    train(chain, "sft", run_dir, overwrite=True, max_steps=1)
    assert {path.name for path in run_dir.iterdir()} == before.keys() - {"best.pt"}
    assert load(run_dir).step == 1 and load(run_dir / "ckpt-0.pt").step == 0
    assert [row["step"] for row in metrics(run_dir)] == [0, 1, 1]
    assert (run_dir / "ckpt-77.pt").read_bytes() == b"mine"


def test_a_full_disk_ends_a_run_in_one_line_that_names_the_file(chain, tmp_path, capsys):
    resource = pytest.importorskip("resource", reason="no file size limits on this system")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(stage):
        resource.setrlimit(resource.RLIMIT_FSIZE, (stage.metric_log.metrics_path.stat().st_size, hard))

    try:
        with pytest.MonkeyPatch.context() as patch:
            act_after(patch, 2, fill)
            line = last_words(capsys, options_of(chain, "sft", tmp_path, {}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert line == f"error: File too large: {tmp_path / 'metrics.jsonl'}"
    train(chain, "sft", tmp_path, resume=True)
    assert load(tmp_path).step == STEPS


def test_weights_that_became_nan_are_not_saved_over_good_ones(chain, tmp_path, capsys):
    def poison(stage):
        stage.model.norm.weight.data[0] = torch.nan

    with pytest.MonkeyPatch.context() as patch:
        act_after(patch, 3, poison)
        line = last_words(capsys, options_of(chain, "sft", tmp_path, dict(save_interval=2)))
    why = "norm.weight holds values that are not finite: the last good checkpoint is kept"
    assert line == f"error: step 4: {why}" and load(tmp_path).step == 2


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo", "ppo"])
def test_weights_that_give_no_number_are_named_by_their_file(chain, tmp_path, capsys, stage):
    payload = torch.load(chain / "sft" / "ckpt.pt", weights_only=True)
    parent = "pretrain" if stage == "sft" else "sft"
    for name in ("wq", "wk"):  # whose product is beyond float32
        payload["weights"][f"layers.0.attention.{name}.weight"].fill_(1e25)
    (tmp_path / "huge").mkdir()
    torch.save(payload | dict(stage=parent), tmp_path / "huge" / "ckpt.pt")
    line = failure(
        capsys, MAINS[stage].main, options_of(chain, stage, tmp_path / "out", dict(init_from=tmp_path / "huge"))
    )
    assert line.startswith(f"error: {tmp_path / 'huge' / 'ckpt.pt'}") and "weights are too large" in line
    assert not (tmp_path / "out").exists()


# what is not what it was


@pytest.mark.parametrize("stage", TRAINED)
def test_a_flipped_bit_in_the_data_is_told_before_it_is_read(chain, tmp_path, capsys, stage):
    shutil.copytree(chain / "data", tmp_path / "data")
    path = tmp_path / "data" / list(load(chain / stage).training["data"])[-1]
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(b"is_val") if path.suffix == ".pkl" else 0] ^= 1
    path.write_bytes(damaged)
    options = options_of(chain, stage, tmp_path / "run", dict(data=tmp_path / "data"))
    line = failure(capsys, MAINS[stage].main, options)
    assert line == f"error: {path}: its sha256 is not the one in meta.json: it was changed or damaged"
    assert not (tmp_path / "run" / "ckpt.pt").exists()


def test_data_is_not_verified_where_that_is_not_wanted(chain, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(chain / "data", data)
    path = next(data.glob("train.*.bin"))
    damaged = bytearray(path.read_bytes())
    damaged[0] ^= 1
    path.write_bytes(damaged)
    train(chain, "pretrain", tmp_path / "run", data=data, max_steps=1, verify_data=False)
    assert f"verify_data=False: the files in {data} are taken to be what meta.json says" in capsys.readouterr().out


@pytest.mark.parametrize("stage, key", [("sft", "init_from"), ("ppo", "reward_model"), ("quantize", "init_from")])
def test_a_finished_run_says_that_its_parent_was_trained_again(chain, tmp_path, capsys, stage, key):
    folder = chain / dict(sft="pretrain", ppo="rm", quantize="ppo")[stage]
    shutil.copytree(chain / stage, tmp_path / "run")
    shutil.copytree(folder, tmp_path / "parent")
    payload = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)
    payload["config"][key] = str(tmp_path / "parent")
    torch.save(payload, tmp_path / "run" / "ckpt.pt")
    changes = {key: tmp_path / "parent", "resume": True}
    train(chain, stage, tmp_path / "run", **changes)
    assert "nothing to do" in capsys.readouterr().out

    parent = load(folder)
    facts = dict(stage=parent.stage, step=parent.step + 1, tokenizer=parent.tokenizer)
    write(tmp_path / "parent" / "ckpt.pt", build_model(parent), **facts)
    line = failure(capsys, MAINS[stage].main, options_of(chain, stage, tmp_path / "run", changes))
    now = parent_of(load(tmp_path / "parent"))["sha256"][:16]
    started = f"it started from {folder / 'ckpt.pt'} with sha256 {parent_of(parent)['sha256'][:16]}"
    there = f"{tmp_path / 'parent' / 'ckpt.pt'} now has {now}"
    assert line == f"error: cannot resume {tmp_path / 'run' / 'ckpt.pt'}: {started}, {there}"
