"""Stages in several gloo processes, beside one."""

import os
import subprocess
import sys

import pytest
import torch
from chains import ROOT, train_rows

from common import checkpoint

SCRIPTS = dict(pretrain="pretrain.py", sft="sft.py", rm="rm_train.py", dpo="dpo_train.py")
# a stage in float64
SCRIPT = """
import runpy, sys, torch
torch.set_default_dtype(torch.float64)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def torchrun_stage(folder, processes, stage, options):
    """Standard output of a stage's script in so many processes, in float64; folder is for this launcher's own file."""
    (folder / "script.py").write_text(SCRIPT)
    return torchrun(processes, folder / "script.py", ROOT / SCRIPTS[stage], *options)


def torchrun(processes, *command, restarts=0):
    """Standard output of a script in so many gloo processes of one thread each."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*launcher, f"--max-restarts={restarts}", *map(str, command)]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def assert_same_training(found_dir, expected_dir, atol=1e-6):
    """The logs to their six digits; weights, which checkpoints round to float32, and optimizer states to atol."""
    found, expected = train_rows(found_dir), train_rows(expected_dir)
    assert [row["train/tokens"] for row in found] == [row["train/tokens"] for row in expected]
    for name in ("train/loss", "train/grad_norm"):
        assert [row[name] for row in found] == pytest.approx([row[name] for row in expected], abs=1.5e-5, rel=1e-5)
    found, expected = checkpoint.load(found_dir), checkpoint.load(expected_dir)
    assert found.weights.keys() == expected.weights.keys()
    for name, tensor in expected.weights.items():
        torch.testing.assert_close(found.weights[name], tensor, atol=atol, rtol=0, msg=name)
    (state,), (expected_state,) = (each.training["optimizer"] for each in (found, expected))
    torch.testing.assert_close(state, expected_state, atol=atol, rtol=0)
