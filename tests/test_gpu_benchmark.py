"""benchmarks/gpu.py on a CPU: all of it runs, its checks find what is wrong, and what fails does not end it."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from chains import ROOT
from tiny import ENV

from generate import KVCache


@pytest.fixture
def gpu(from_benchmarks):
    return from_benchmarks("gpu")


@pytest.fixture
def checks(from_benchmarks):
    return from_benchmarks("gpu_checks")


@pytest.mark.slow
def test_every_part_runs_on_a_cpu_and_every_check_holds(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--device=cpu", "--tiny", "--minutes=60"]
    done = subprocess.run([*command, f"--out={tmp_path / 'gpu.md'}"], capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures.pop("failed") == {} and figures.pop("wrong") == {}
    assert [name for name, found in figures.items() if found is None and not name.endswith("transformers")] == []
    table = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in table for name, found in figures.items() if found and name != "device")


@pytest.mark.parametrize("name", ["sft, packed", "rm", "dpo", "ppo", "grpo"])
def test_a_step_in_float32_is_far_within_the_bounds(checks, name):
    found = checks.check_step(ENV, name)
    assert checks.failed(found) == [] and found["loss"] < 1e-5 and found["gradient"] < 1e-4


def test_bfloat16_is_within_the_bounds(checks):
    low = replace(ENV, dtype=torch.bfloat16)
    assert checks.failed(checks.check_step(low, "dpo")) == []
    assert checks.failed(checks.check_logps(low)) == []  # a softmax in bfloat16 is off by 0.9 nats


def test_what_is_wrong_in_a_step_exceeds_the_bounds(checks):
    exact = checks.pretrain_step(checks.EXACT, documents=True)
    assert checks.failed(checks.compare_steps(checks.pretrain_step(ENV), exact)) == ["loss", "gradient"]
    loss, models = checks.pretrain_step(ENV, documents=True)
    models[0].layers[1].attention.wk.weight.grad *= 1.1
    assert checks.failed(checks.compare_steps((loss + 0.01, models), exact)) == ["loss", "gradient"]
    assert checks.failed(dict(loss=float("nan"), loss_bound=1.0)) == ["loss"]


def test_replies_whose_cache_holds_wrong_keys_exceed_the_bounds(checks, monkeypatch):
    write = KVCache.write

    def shifted(cache, layer, k, v):
        return write(cache, layer, k.roll(1, -1), v)

    monkeypatch.setattr(KVCache, "write", shifted)
    assert checks.failed(checks.check_generate(ENV, [9, 4], 12)) == ["nats", "other"]


def test_a_part_that_raises_is_the_last_of_its_process_and_late_ones_are_left_out(gpu, monkeypatch, capsys):
    parts = {
        "good": (0, lambda env, scale: dict(rate=2.0)),
        "long": (100, lambda env, scale: dict(rate=3.0)),
        "bad": (0, lambda env, scale: torch.zeros(2)[5]),
        "last": (0, lambda env, scale: dict(rate=4.0)),
    }
    monkeypatch.setattr(gpu, "all_parts", lambda tiny: parts)
    gpu.run_parts(list(parts), "cpu", False, time.time() + 50)
    good, long, bad = map(json.loads, capsys.readouterr().out.splitlines())
    assert good["figures"] == dict(rate=2.0) and long.keys() == {"part", "skipped"}
    assert bad["failed"].startswith("IndexError: index 5 is out of bounds")


def test_a_process_that_dies_costs_one_part(gpu):
    options = SimpleNamespace(device="cpu", tiny=True)
    results = gpu.results_of(["device", "no such part", "check: sft"], options, time.time() + 600)
    assert list(results) == ["device", "no such part"] and "exit code 1" in results["no such part"]["failed"]
