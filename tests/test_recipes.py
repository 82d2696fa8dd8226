"""The recipes of runs/general.sh and runs/novels.sh: their configs at all sizes, and two of them run in miniature."""

import io
import json
import shutil
import sys

import pytest
import torch
from chains import ROOT, failure
from rows import adapt
from scripts import VARIABLES, shell

import data_process
from common import checkpoint
from common.config import parse_config
from common.memory import stage_memory
from common.plan import RESERVED
from configs.sizes import sizes
from corpora import samples
from model import ModelConfig

CONFIGS = {  # of a stage's defaults: its file
    "data_process": "data",
    "tokenizer": "tokenizer",
    "pretrain": "pretrain",
    "sft": "sft",
    "rm_train": "rm",
    "dpo_train": "dpo",
    "ppo_train": "ppo",
    "grpo_train": "grpo",
    "quantize": "quantize",
    "eval_generate": "compare",
}
SIZES = [name.removeprefix("tiny-llama2-") for name in sizes]


@pytest.fixture
def config_of(monkeypatch):
    """config_of(stage, SIZE="9m", ...): the resolved config of a recipe, with these variables alone."""

    def load(stage, **environment):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        for name in [name for name in sys.modules if name.startswith("configs.recipes")]:
            monkeypatch.delitem(sys.modules, name)
        return parse_config(stage, [str(ROOT / f"configs/recipes/{CONFIGS[stage]}.py")], "", file=io.StringIO())

    return load


@pytest.mark.parametrize("recipe", ["general", "novels"])
@pytest.mark.parametrize("size", SIZES)
def test_every_config_is_one_of_its_stage(config_of, recipe, size):
    for stage in CONFIGS:
        for smoke in "01":
            out = config_of(stage, RECIPE=recipe, SIZE=size, SMOKE=smoke)
            assert out.get("data", "data/").startswith("data/")
    config = config_of("pretrain", RECIPE=recipe, SIZE=size)
    assert config["model"] == config["model"] | sizes[f"tiny-llama2-{size}"]
    assert config["out"] == f"out/{recipe}-{size}/pretrain" and config["data"] == f"data/{recipe}"


def test_what_is_planned_by_hand(config_of):
    config = config_of("pretrain", SIZE="24m")
    assert config["batch_size"] * config["grad_accumulation_steps"] * 512 * config["max_steps"] == 4_194_304_000
    assert config["learning_rate"] == pytest.approx(1.6e-3 * 512 / 288)
    config = config_of("pretrain", SIZE="256m")
    assert config["batch_size"] * config["grad_accumulation_steps"] * 1024 * config["max_steps"] == 18_874_368_000
    assert config["learning_rate"] == pytest.approx(0.8e-3)
    assert config_of("sft", SIZE="256m")["learning_rate"] == pytest.approx(1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_a_step_is_the_same_however_it_is_shared(config_of, size):
    for stage in ("pretrain", "sft", "rm_train", "dpo_train"):
        rows = set()
        for processes in (1, 2, 16):
            for split in (1, 4):
                config = config_of(stage, SIZE=size, WORLD_SIZE=str(processes), SPLIT=str(split))
                rows.add(config["batch_size"] * config["grad_accumulation_steps"] * processes)
        assert len(rows) == 1, stage
        one, four = (config_of(stage, SIZE=size, SPLIT=split)["batch_size"] for split in "14")
        assert four <= one


@pytest.mark.parametrize("size", SIZES)
def test_all_stages_fit_16_gb(config_of, size):
    shape, room = ModelConfig(**sizes[f"tiny-llama2-{size}"]), config_of("data_process")["max_seq_len"]
    prompt = config_of("data_process")["prompts_max_len"]
    for stage in ("pretrain", "sft", "rm_train", "dpo_train", "ppo_train", "grpo_train"):
        config = config_of(stage, SIZE=size)
        T = config.get("seq_len") or (prompt + config["max_new_tokens"] if "rollout_size" in config else room)
        B = config.get("batch_size") or config["micro_batch_size"]
        peak = stage_memory(stage, shape, config, True, B, T, config.get("rollout_size", 0))["peak"]
        assert peak + RESERVED <= 16e9, (stage, peak)


@pytest.mark.parametrize(
    "arguments, environment, words",
    [
        ([], {}, ["a size is needed"]),
        (["24m", "2", "--resume"], {}, ["a size is needed"]),
        (["12m"], {}, ["SIZE=12m", "9m, 24m, 58m, 134m, 256m"]),
        (["24m", "3"], {}, ["GPUS=3", "1, 2, 4, 8, 16"]),
        (["24m"], dict(SPLIT="0"), ["SPLIT=0"]),
        (["24m"], dict(VOCAB="many"), ["VOCAB=many", "32000"]),
    ],
)
def test_a_wrong_word_is_one_line(arguments, environment, words):
    code, out, err = shell("novels", *arguments, **environment)
    [line] = err.splitlines()
    assert (code, out) == (2, "") and line.startswith("error: ") and all(word in line for word in words)
    assert line.endswith("usage: bash runs/novels.sh SIZE [GPUS], such as 58m 8")


def test_a_missing_source_is_one_line(config_of, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config_of("data_process", SOURCES="wikipedia=nowhere.json,belle=b.json")
    line = failure(capsys, data_process.main, [str(ROOT / "configs/recipes/data.py"), "--parts=text"])
    assert "nowhere.json" in line and list(tmp_path.iterdir()) == []


def test_samples_are_rows_of_their_sources(tmp_path):
    samples.main([str(tmp_path)])
    for file in tmp_path.iterdir():
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        records = [record for row in rows for record in adapt(file.stem, row)]
        assert len(records) == len(rows) >= 60
        assert all(record is not None and not remark for record, remark in records), file.stem


@pytest.mark.slow
@pytest.mark.parametrize("script, size", [("general", "24m"), ("novels", "58m")])
def test_a_recipe_runs_in_miniature(script, size, tmp_path):
    """From a copy without data, runs and network; run again, it makes what is missing alone."""
    clone = tmp_path / "clone"
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(".*", "data", "out", "tests", "docs", "__pycache__"))
    code, out, err = shell(script, size, cwd=clone, SMOKE="1")
    assert code == 0, (out + err)[-4000:]
    runs = clone / f"out/{script}-2048-smoke-{size}"
    for stage in ("pretrain", "sft", "rm", "dpo", "ppo", "grpo", "int8", "int4"):
        ckpt = checkpoint.load(runs / stage)
        assert all(w.isfinite().all() for w in ckpt.weights.values() if w.dtype == torch.float32)
    written = ("benchmarks.md", "report.md", "report.html", "compare.png", "hf/model.safetensors", "gguf/model.gguf")
    assert [name for name in written if not (runs / name).is_file()] == []
    if script == "general":
        shutil.rmtree(runs / "gguf")
        code, out, err = shell(script, size, cwd=clone, SMOKE="1")
        assert code == 0, (out + err)[-4000:]
        assert out.count("nothing to do") == 8 and out.count(", skipped") == 7
        assert (runs / "gguf/model.gguf").is_file()
