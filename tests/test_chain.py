"""The chain in miniature through the real scripts: corpora made here, from text to a quantized policy."""

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chains import (
    HALF,
    MAINS,
    PARENTS,
    ROOT,
    STEPS,
    TRAINED,
    act_after,
    argv,
    assert_same_run,
    assert_same_tensors,
    data_options,
    failure,
    losses,
    metrics,
    options_of,
    press_ctrl_c,
    start,
    train,
    train_in_two_sittings,
    train_rows,
)

import data_process
import eval_generate
import ppo_train
import pretrain
import quantize
import rm_train
import tokenizer.train
from common import checkpoint
from common.config import run
from common.distributed import setup
from common.stage import Stage
from dataset.batches import load_pairs
from dataset.corpus import Corpus
from dataset.formats import OURS, load_meta

# what a finished chain leaves


def test_data_is_described(chain):
    files = {f"{split}.{source}.bin" for split in ("train", "val") for source in ("reviews", "people_daily")}
    files |= {"corpus.txt", "sft.pkl", "rm.pkl", "prompts.pkl"}
    reports = {"meta.json", "report.md", "lengths.png", "dropped.jsonl"}
    assert {path.name for path in (chain / "data").iterdir()} == files | reports
    meta = load_meta(chain / "data")
    assert meta["files"].keys() == files and meta["sources"].keys() == {"reviews", "people_daily"}
    tokenizer_bytes = (chain / "tokenizer" / "tokenizer.model").read_bytes()
    assert meta["tokenizer_sha256"] == hashlib.sha256(tokenizer_bytes).hexdigest()
    reviews = meta["sources"]["reviews"]
    assert reviews["train"]["documents"] + reviews["val"]["documents"] == 300


@pytest.mark.parametrize("stage", MAINS)
def test_run_directory_holds_what_it_should(chain, stage):
    out = chain / stage
    files = {"ckpt.pt", "config.json", "metrics.jsonl", "loss.png", "samples.txt"}
    if stage in TRAINED:
        files.add("ckpt-0.pt")  # the one before, as keep_last=2
    absent = dict(rm={"samples.txt"}, quantize={"loss.png"}).get(stage, set())
    more = dict(rm={"calibration.png"}, dpo={"ref_logps.npz"}, ppo={"score_kl.png"}).get(stage, set())
    assert {path.name for path in out.iterdir()} == files - absent | more
    if "loss.png" not in absent:
        assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    if "samples.txt" not in absent:
        steps = [line for line in (out / "samples.txt").read_text(encoding="utf-8").splitlines() if line[:5] == "step "]
        assert steps == (["step 0", f"step {STEPS}"] if stage in TRAINED else [f"step {STEPS}"] * 2)
    assert json.loads((out / "config.json").read_text(encoding="utf-8")) == checkpoint.load(out).config


@pytest.mark.parametrize("stage", TRAINED)
def test_metrics_of_every_step_and_validations_at_both_ends(chain, stage):
    rows = metrics(chain / stage)
    validations = [row for row in rows if any(name.startswith("val/") for name in row)]
    assert [row["step"] for row in train_rows(chain / stage)] == list(range(1, STEPS + 1))
    assert [row["step"] for row in validations] == [0, STEPS]
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    assert all(value is not None for row in rows for name, value in row.items() if name != "val/distinct_2")


@pytest.mark.parametrize("stage", MAINS)
def test_checkpoint_says_where_it_came_from(chain, stage):
    ckpt = checkpoint.load(chain / stage)
    assert (ckpt.stage, ckpt.step) == (stage, STEPS)
    assert ckpt.tokenizer == (chain / "tokenizer" / "tokenizer.model").read_bytes()
    first = checkpoint.load(chain / "pretrain")
    assert ckpt.model_config == first.model_config | dict(scalar_head=stage == "rm")
    assert (ckpt.quant is None) == ("optimizer" in ckpt.training) == (stage in TRAINED)
    assert set(ckpt.training["data"]) <= {file.name for file in (chain / "data").iterdir()}
    if stage in TRAINED:
        assert ckpt.tokens_seen == train_rows(chain / stage)[-1]["train/tokens"]
        assert all(w.dtype == torch.float32 and w.isfinite().all() for w in ckpt.weights.values())
    if stage == "pretrain":
        assert ckpt.parent is None and ckpt.tokens_seen == STEPS * 8 * 32
        return
    path = chain / PARENTS[stage] / "ckpt.pt"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert ckpt.parent == dict(path=str(path), stage=PARENTS[stage], sha256=digest)
    changed = [
        name for name, w in checkpoint.load(path).weights.items() if not torch.equal(w, ckpt.weights.get(name, w))
    ]
    assert ("layers.0.attention.wq.weight" in changed) == (stage in TRAINED)


def test_first_losses_are_those_of_knowing_nothing_more(chain):
    vocab_size = load_meta(chain / "data")["vocab_size"]
    assert metrics(chain / "pretrain")[0]["val/loss"] == pytest.approx(math.log(vocab_size), rel=0.02)
    assert losses(chain / "pretrain")[-1] < losses(chain / "pretrain")[0] - 0.2
    before, first, *_ = metrics(chain / "dpo")
    for loss, margin in ((before["val/loss"], before["val/margin"]), (first["train/loss"], first["dpo/margin"])):
        assert (loss, margin) == (pytest.approx(math.log(2), abs=1e-4), pytest.approx(0, abs=1e-4))
    assert before["val/kl"] == pytest.approx(0, abs=1e-4)
    before, first, *_ = metrics(chain / "ppo")
    assert (before["val/kl"], first["ppo/kl"]) == (pytest.approx(0, abs=1e-4), pytest.approx(0, abs=1e-4))
    assert first["ppo/rlhf_reward"] == pytest.approx(first["ppo/score"], abs=1e-4)


def test_learning_rate_is_that_of_the_schedule(chain):
    rates = [row["train/learning_rate"] for row in train_rows(chain / "pretrain")]
    assert rates[:3] == pytest.approx([0.005, 0.01, 0.01]) and rates[3:] == sorted(rates[3:], reverse=True)


# resuming


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("stage", MAINS)
def test_resuming_a_finished_stage_says_so_and_changes_nothing(chain, stage, capsys):
    before = snapshot(chain / stage)
    train(chain, stage, chain / stage, resume=True)
    assert "nothing to do" in capsys.readouterr().out
    assert snapshot(chain / stage) == before


def test_best_weights_are_kept_over_a_resume(chain, tmp_path):
    too_fast = dict(learning_rate=1.0, min_learning_rate=1.0)  # so that some steps get worse
    watched = dict(keep_best=True, eval_interval=1) | too_fast
    train(chain, "pretrain", tmp_path / "run", **watched, max_steps=HALF)
    train(chain, "pretrain", tmp_path / "run", **watched, resume=True)
    losses = {row["step"]: row["val/loss"] for row in metrics(tmp_path / "run") if "val/loss" in row}
    best = checkpoint.load(tmp_path / "run" / "best.pt")
    assert len(losses) == STEPS + 1 and best.step == min(losses, key=losses.get) != STEPS
    assert best.training is None
    train(chain, "pretrain", tmp_path / "run", max_steps=1, overwrite=True)
    assert not (tmp_path / "run" / "best.pt").exists()


def test_best_weights_are_of_those_that_were_kept(chain, tmp_path):
    worse = dict(learning_rate=1.0, min_learning_rate=1.0, eval_interval=1)
    train(chain, "pretrain", tmp_path / "run", **worse, max_steps=1)
    train(chain, "pretrain", tmp_path / "run", **worse, max_steps=2, resume=True, keep_best=True)
    losses = [row["val/loss"] for row in metrics(tmp_path / "run") if "val/loss" in row]
    assert losses[0] == min(losses) and checkpoint.load(tmp_path / "run" / "best.pt").step == 2


def test_best_weights_by_another_measure_are_replaced(chain, tmp_path):
    """A loss of less text, or one whose weights were not kept, is no bound for what is measured now."""
    worse = dict(learning_rate=1.0, min_learning_rate=1.0, eval_interval=1)
    best = tmp_path / "run" / "best.pt"
    train(chain, "pretrain", tmp_path / "run", **worse, max_steps=1, keep_best=True)
    assert checkpoint.load(best).step == 0
    train(chain, "pretrain", tmp_path / "run", **worse, max_steps=2, resume=True, keep_best=True, eval_tokens=64)
    assert checkpoint.load(best).step == 2


def test_documents_that_were_masked_stay_so_in_what_follows(chain, tmp_path, capsys):
    train(chain, "pretrain", tmp_path / "base", mask_documents=True, max_steps=2)
    train(chain, "sft", tmp_path / "sft", init_from=tmp_path / "base", max_steps=1)
    for name in ("base", "sft"):
        low = tmp_path / f"low-{name}"
        quantize.main([f"--init_from={tmp_path / name}", f"--data={chain / 'data'}", f"--out={low}", "--eval_tokens=0"])
        assert checkpoint.masks_documents(checkpoint.load(low))
        capsys.readouterr()
        eval_generate.main([f"--ckpt={tmp_path / name}", "--ppl", f"--data={chain / 'data'}"])
        measured = json.loads(capsys.readouterr().out.splitlines()[-1])["perplexity"][-1]["perplexity"]
        assert metrics(low)[-1]["quantize/perplexity_float32"] == pytest.approx(measured, rel=1e-5)
    assert not checkpoint.masks_documents(checkpoint.load(chain / "sft"))


@pytest.mark.parametrize("everything", [False, True])
def test_the_last_validation_reads_all_only_where_that_is_asked_for(chain, tmp_path, capsys, everything):
    train(chain, "pretrain", tmp_path / "run", max_steps=1, eval_tokens=64, eval_all=everything)
    model, val = checkpoint.build_model(checkpoint.load(tmp_path / "run")), Corpus(chain / "data", "val")
    few, whole = (pretrain.evaluate(model, val, setup("cpu"), n)["val/loss"] for n in (64, None))
    assert metrics(tmp_path / "run")[-1]["val/loss"] == pytest.approx(whole if everything else few, rel=1e-5)
    assert few != pytest.approx(whole, rel=1e-4)
    assert f"validation on about 64 of {len(val):,} tokens" in capsys.readouterr().out


@pytest.mark.parametrize("everything", [False, True])
def test_the_last_pairs_are_all_only_where_that_is_asked_for(chain, tmp_path, capsys, everything):
    train(chain, "rm", tmp_path / "run", max_steps=1, eval_pairs=5, eval_all=everything)
    model = checkpoint.build_model(checkpoint.load(tmp_path / "run"))
    _, val = load_pairs(chain / "data" / "rm.pkl", model.config.vocab_size)
    few, whole = (rm_train.evaluate(model, *val, setup("cpu"), n)[0]["val/loss"] for n in (5, len(val[0])))
    assert metrics(tmp_path / "run")[-1]["val/loss"] == pytest.approx(whole if everything else few, rel=1e-5)
    assert few != pytest.approx(whole, rel=1e-4)
    assert f"validation on 5 of {len(val[0]):,} pairs" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["pretrain", "rm"])
def test_the_best_is_the_best_on_the_same_data(chain, tmp_path, stage):
    few = dict(pretrain=dict(eval_tokens=64), rm=dict(eval_pairs=5))[stage]
    few |= dict(learning_rate=1e-12, min_learning_rate=0.0)
    train(chain, stage, tmp_path / "run", **few, keep_best=True, eval_all=True, eval_interval=1, max_steps=2)
    losses = [row["val/loss"] for row in metrics(tmp_path / "run") if "val/loss" in row]
    assert len(losses) == 3 and len(set(losses)) == 1  # nothing is learnt, and all of them are over all
    assert checkpoint.load(tmp_path / "run" / "best.pt").step == 0


def test_a_reward_model_of_no_steps_takes_the_place_of_one_whole(chain, tmp_path):
    for _ in range(2):
        train(chain, "rm", tmp_path / "run", max_steps=0, overwrite=True)
        assert (tmp_path / "run" / "calibration.png").is_file()


@pytest.mark.parametrize("stage", TRAINED)
def test_stopped_and_resumed_equals_uninterrupted(chain, stage, tmp_path, capsys):
    train_in_two_sittings(chain, stage, tmp_path / "two", capsys)
    assert_same_run(tmp_path / "two", chain / stage)


def test_stopped_and_resumed_equals_uninterrupted_with_muon_and_dropout(chain, tmp_path, capsys):
    changes = {"optimizer": "muon", "model.dropout": 0.1}
    train(chain, "pretrain", tmp_path / "one", **changes)
    train_in_two_sittings(chain, "pretrain", tmp_path / "two", capsys, **changes)
    assert_same_run(tmp_path / "two", tmp_path / "one")


def test_a_signal_between_saving_and_stopping_loses_nothing(chain, tmp_path):
    ends = Stage.ends

    def ctrl_c_then_end(self, step):
        if step == HALF:
            press_ctrl_c(self)
        return ends(self, step)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Stage, "ends", ctrl_c_then_end)
        train(chain, "rm", tmp_path)
    ckpt = checkpoint.load(tmp_path)
    assert ckpt.step == train_rows(tmp_path)[-1]["step"] == HALF + 1


def test_after_a_crash_training_goes_on_from_the_last_checkpoint(chain, tmp_path):
    def crash(_):
        raise RuntimeError("the machine went down")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="went down"):
        act_after(patch, 5, crash)
        train(chain, "sft", tmp_path / "sft", save_interval=2)
    assert [row["step"] for row in train_rows(tmp_path / "sft")] == [1, 2, 3, 4, 5]
    assert checkpoint.load(tmp_path / "sft").step == 4
    train(chain, "sft", tmp_path / "sft", save_interval=2, resume=True)
    assert_same_run(tmp_path / "sft", chain / "sft")


def test_a_finished_run_can_be_trained_further(chain, tmp_path, capsys):
    shutil.copytree(chain / "rm", tmp_path / "rm")
    train(chain, "rm", tmp_path / "rm", resume=True, max_steps=STEPS + 2)
    assert checkpoint.load(tmp_path / "rm").step == STEPS + 2
    rows = metrics(tmp_path / "rm")
    assert rows[: len(metrics(chain / "rm"))] == metrics(chain / "rm") and rows[-1]["step"] == STEPS + 2
    assert {row["train/learning_rate"] for row in train_rows(tmp_path / "rm")[STEPS:]} == {5e-6}  # where it had ended
    assert "5e-06 from step 6 on; --decay_steps=8 makes it jump to 0." in capsys.readouterr().out
    told = dict(resume=True, max_steps=STEPS + 4, decay_steps=STEPS + 4)
    train(chain, "rm", tmp_path / "rm", **told)
    assert train_rows(tmp_path / "rm")[STEPS + 2]["train/learning_rate"] > 1e-3


def test_ppo_compares_the_policy_with_itself_even_if_it_was_pretrained_with_dropout(chain, tmp_path):
    ckpt = checkpoint.load(chain / "sft")
    model = checkpoint.build_model(replace(ckpt, model_config=ckpt.model_config | dict(dropout=0.5)))
    facts = dict(stage="sft", step=1, tokens_seen=1, tokenizer=ckpt.tokenizer, config=ckpt.config)
    checkpoint.save(tmp_path / "ckpt.pt", model=model, **facts)
    one_update = dict(max_steps=1, ppo_epochs=1, minibatch_size=8, init_from=tmp_path)
    train(chain, "ppo", tmp_path / "ppo", **one_update)
    (first,) = train_rows(tmp_path / "ppo")
    assert first["ppo/ratio"] == pytest.approx(1, abs=1e-5) and first["ppo/clipfrac"] == 0
    assert (first["ppo/approx_kl"], first["ppo/kl"]) == (pytest.approx(0, abs=1e-6), pytest.approx(0, abs=1e-4))


# the same step by other means


@pytest.mark.usefixtures("float64")
def test_two_micro_batches_equal_one_of_twice_the_size(chain, tmp_path):
    train(chain, "pretrain", tmp_path / "one")
    train(chain, "pretrain", tmp_path / "two", batch_size=4, grad_accumulation_steps=2)
    # the log has 6 significant digits: 1e-5 is its last one
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1.5e-5)
    assert checkpoint.load(tmp_path / "two").tokens_seen == checkpoint.load(tmp_path / "one").tokens_seen


@pytest.mark.parametrize("module", ["common.compare", "common.report", "alignment.ranked", "tokenizer.train"])
def test_ctrl_c_while_modules_are_imported_is_one_line(tmp_path, module):
    """By a torch that takes long; the signal comes when it says that it has begun."""
    (tmp_path / "torch.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(300)\n")
    (tmp_path / "numpy.py").write_text("import torch\n")
    environment = os.environ | dict(PYTHONPATH=str(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-m", module],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, err) == (130, "interrupted\n")


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(chain, tmp_path):
    changes = dict(max_steps=1_000_000, save_interval=1_000_000, eval_interval=1_000_000)
    process = start("sft.py", *options_of(chain, "sft", tmp_path, changes))
    try:
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if (tmp_path / "metrics.jsonl").exists() and len(train_rows(tmp_path)) > 3:
                break
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "stopping after this step" in err and f"the same command with --resume goes on from {tmp_path}" in out
    ckpt = checkpoint.load(tmp_path)
    assert ckpt.step > 3 and ckpt.step == train_rows(tmp_path)[-1]["step"]


# when it goes wrong


def test_updates_that_are_not_finite_are_skipped_and_ten_end_the_run(chain, tmp_path, capsys):
    weights = []

    def poison(stage):
        stage.model.norm.weight.data[0] = math.nan
        live = {name: w for name, w in stage.model.state_dict().items() if name != "norm.weight"}
        weights.append((live, {name: w.clone() for name, w in live.items()}))

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        act_after(patch, 2, poison)
        run(lambda: train(chain, "pretrain", tmp_path, max_steps=50))
    assert stopped.value.code == 2
    err = capsys.readouterr().err.splitlines()
    assert "update skipped (1 in a row, stops at 10)" in err[-10] and "the last good checkpoint is kept" in err[-1]
    assert [row["step"] for row in train_rows(tmp_path) if row["train/loss"] is None] == list(range(3, 12))
    assert_same_tensors(*weights[0])
    assert checkpoint.load(tmp_path).step == 0
    assert all(w.isfinite().all() for w in checkpoint.load(tmp_path).weights.values())


def test_a_script_ends_with_one_line_and_exit_code_2():
    process = start("sft.py", "--learning_rat=0.1")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2 and out == ""
    assert err == "error: --learning_rat=0.1: unknown key learning_rat = 0.1, the nearest is learning_rate\n"


@pytest.mark.parametrize(
    "stage, changes, words",
    [
        ("pretrain", {"model.dims": 64}, ["--model.dims=64", "model.dim"]),
        ("pretrain", {"max_steps": "many"}, ["max_steps", "whole number", "'many'"]),
        ("pretrain", {"optimizer": "adam"}, ["optimizer=adam", "adamw", "muon"]),
        ("pretrain", {"seq_len": 128}, ["seq_len=128", "max_seq_len=64"]),
        ("pretrain", {"model.n_heads": 5}, ["dim=32", "n_heads=5"]),
        ("pretrain", {"sample_prompts": "酒店" * 64}, ["sample_prompts: '酒店", "model.max_seq_len=64 is needed"]),
        ("sft", {"example_weight": "tokens"}, ["example_weight=tokens", "token", "example"]),
        ("sft", {"batch_size": 4000}, ["examples do not fill one batch of 4000"]),
        ("rm", {"eval_interval": 0}, ["eval_interval=0", "at least 1"]),
        ("dpo", {"eval_prompts": 0}, ["eval_prompts=0", "at least 1"]),
        ("ppo", {"reward": "model+"}, ["reward=model+", "MODULE:FUNCTION"]),
        ("ppo", {"rollout_size": 4000, "micro_batch_size": 4}, ["one batch of 4000: choose a smaller rollout_size"]),
    ],
)
def test_a_wrong_option_is_named(chain, tmp_path, capsys, stage, changes, words):
    line = failure(capsys, MAINS[stage].main, options_of(chain, stage, tmp_path / "out", changes))
    assert all(word in line for word in words), line
    assert not (tmp_path / "out" / "ckpt.pt").exists()


@pytest.mark.parametrize(
    "stage, key", [("sft", "init_from"), ("rm", "init_from"), ("dpo", "init_from"), ("ppo", "reward_model")]
)
def test_a_missing_checkpoint_is_named(chain, tmp_path, capsys, stage, key):
    changes = {key: tmp_path / "nowhere"}
    line = failure(capsys, MAINS[stage].main, options_of(chain, stage, tmp_path / "out", changes))
    assert line.startswith(f"error: {key}: no checkpoint at {tmp_path / 'nowhere'}")


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo", "ppo"])
def test_nothing_is_trained_from_a_quantized_checkpoint(chain, tmp_path, capsys, stage):
    options = options_of(chain, stage, tmp_path / "out", dict(init_from=chain / "quantize"))
    line = failure(capsys, MAINS[stage].main, options)
    assert str(chain / "quantize" / "ckpt.pt") in line and "is quantized (int8)" in line


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo", "ppo"])
def test_no_language_model_is_trained_from_a_reward_model(chain, tmp_path, capsys, stage):
    options = options_of(chain, stage, tmp_path / "out", dict(init_from=chain / "rm"))
    line = failure(capsys, MAINS[stage].main, options)
    assert str(chain / "rm" / "ckpt.pt") in line and "is a reward model" in line


def test_a_parent_that_was_not_taught_to_answer_is_told(chain, tmp_path, capsys):
    train(chain, "dpo", tmp_path / "out", init_from=chain / "pretrain", max_steps=0)
    note = f"note: {chain / 'pretrain' / 'ckpt.pt'} is a pretrained model that was never taught to answer"
    assert note in capsys.readouterr().out


@pytest.mark.parametrize("part", ["rm", "prompts"])
def test_a_part_that_was_not_made_is_named(chain, tmp_path, capsys, part):
    data = tmp_path / "data"
    shutil.copytree(chain / "data", data)
    meta = json.loads((data / "meta.json").read_text())
    del meta["files"][f"{part}.pkl"]
    (data / "meta.json").write_text(json.dumps(meta))
    (data / f"{part}.pkl").unlink()
    line = failure(capsys, MAINS["dpo"].main, options_of(chain, "dpo", tmp_path / "out", dict(data=data)))
    assert f"{data / part}.pkl: no such file: data_process.py writes it with --parts={part}" in line


def test_ppo_wants_a_reward_model_that_can_be_trained(chain, tmp_path, capsys):
    options = options_of(chain, "ppo", tmp_path / "out", dict(reward_model=chain / "sft"))
    line = failure(capsys, ppo_train.main, options)
    assert f"{chain / 'sft' / 'ckpt.pt'} (stage sft) has no scalar head" in line
    train(chain, "quantize", tmp_path / "int8", init_from=chain / "rm")
    options = options_of(chain, "ppo", tmp_path / "out", dict(reward_model=tmp_path / "int8"))
    line = failure(capsys, ppo_train.main, options)
    assert str(tmp_path / "int8" / "ckpt.pt") in line and "is quantized (int8)" in line


def test_data_of_another_tokenizer_is_refused_with_both_files_and_values(chain, tmp_path, capsys):
    corpus = chain / "data" / "corpus.txt"
    tokenizer.train.main(argv(input=corpus, vocab_size=530, out=tmp_path / "tokenizer"))
    data = data_options(chain, tmp_path / "data", tmp_path / "tokenizer")
    data_process.main(argv(**data, parts="pretrain,sft,rm,prompts"))
    sources = dict(pretrain=chain / "tokenizer", sft=chain / "pretrain" / "ckpt.pt", ppo=chain / "sft" / "ckpt.pt")
    for stage, source in sources.items():
        options = options_of(chain, stage, tmp_path / "out", dict(data=tmp_path / "data"))
        line = failure(capsys, MAINS[stage].main, options)
        assert line == f"error: vocab_size is 540 in {source} and 530 in {tmp_path / 'data' / 'meta.json'}"


def test_an_empty_or_missing_corpus_is_named(chain, tmp_path, capsys):
    data = data_options(chain, tmp_path / "data", chain / "tokenizer")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n", encoding="utf-8")
    for path, what in ((empty, "holds no text"), (tmp_path / "none.txt", "not found")):
        for key in ("negative", "people_daily"):
            line = failure(capsys, data_process.main, argv(**data | {key: path}))
            assert f"corpus file {path} {what}" in line
    assert not list((tmp_path / "data").glob("*.*")) and not list((tmp_path / "data").rglob(f"*.{OURS}"))
    empty.write_text("", encoding="utf-8")
    for path, what in ((empty, "empty"), (tmp_path / "none.txt", "no such file")):
        line = failure(capsys, tokenizer.train.main, argv(input=path, out=tmp_path / "tokenizer"))
        assert str(path) in line and what in line
    assert not (tmp_path / "tokenizer").exists()


def test_a_validation_without_prompts_measures_the_rest(chain, tmp_path):
    train(chain, "sft", tmp_path, eval_prompts=2, max_steps=1)  # a quarter of two is none
    first = metrics(tmp_path)[0]
    assert first["val/eos_rate"] is None and first["val/loss"] > 0


# using what came out


def evaluation(capsys, **options):
    capsys.readouterr()
    eval_generate.main(argv(**options, device="cpu"))
    return capsys.readouterr().out


@pytest.mark.parametrize("stage", ["pretrain", "sft", "ppo", "quantize"])
def test_every_language_model_answers(chain, stage, capsys):
    options = dict(ckpt=chain / stage, prompt="写一条酒店评价。", max_new_tokens=8)
    reply = evaluation(capsys, **options)
    assert reply.endswith("\n") and evaluation(capsys, **options) == reply


def test_a_reward_model_scores(chain, capsys):
    options = dict(ckpt=chain / "rm", prompt="写一条酒店评价。")
    scores = [float(evaluation(capsys, **options, reply=reply)) for reply in ("酒店的房间很好。", "作者的故事糟！")]
    assert scores[0] != scores[1]


def test_perplexity_is_that_of_the_last_validation(chain, tmp_path, capsys):
    out = evaluation(capsys, ckpt=chain / "pretrain", ppl=True, data=chain / "data", report=tmp_path / "ppl.md")
    figures = {row["source"]: row for row in json.loads(out.splitlines()[-1])["perplexity"]}
    last = metrics(chain / "pretrain")[-1]
    assert figures.keys() == {"reviews", "people_daily", "all"}
    assert math.log(figures["all"]["perplexity"]) == pytest.approx(last["val/loss"], rel=1e-4)
    for name in ("reviews", "people_daily"):
        assert figures[name]["bits_per_char"] == pytest.approx(last[f"val/bits_per_char/{name}"], rel=1e-4)
    assert out.startswith((tmp_path / "ppl.md").read_text(encoding="utf-8").partition("<!--")[0])


@pytest.mark.slow
def test_checkpoints_are_compared(chain, tmp_path, capsys):
    paths = [str(chain / stage) for stage in ("sft", "dpo", "ppo", "quantize")]
    options = dict(compare=",".join(paths), data=chain / "data", report=tmp_path / "compare.md", max_new_tokens=8)
    out = evaluation(capsys, **options, compare_prompts=4, compare_examples=4)
    figures = json.loads(out.splitlines()[-1])
    assert [row["checkpoint"] for row in figures["replies"]] == paths and figures["prompts"] == 4
    kl = {Path(row["checkpoint"]).name: row["kl"] for row in figures["replies"]}
    assert kl["sft"] == pytest.approx(0, abs=1e-4) and kl["dpo"] != 0
    assert [row["stage"] for row in figures["tasks"]] == ["sft", "dpo", "ppo", "quantize"]
    report, _, mark = (tmp_path / "compare.md").read_text(encoding="utf-8").rpartition("\n\n")
    assert out.startswith(report) and OURS in mark
