"""Device choice, and two gloo processes against one process on the joint batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.config import UserError
from common.distributed import Env, all_sum, average_gradients, cleanup, setup
from model import Llama, ModelConfig

ROOT = Path(__file__).parents[1]

WORKER = """
import json, sys, torch
from common.distributed import all_sum, average_gradients, cleanup, mean, setup
from model import Llama, ModelConfig

env = setup(device="cpu", seed=5)
model = Llama(ModelConfig(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=32, max_seq_len=8))
ids = torch.randint(0, 32, (4, 9))[env.rank * 2 : env.rank * 2 + 2]
model(ids[:, :-1], ids[:, 1:]).backward()
if env.rank == 1:
    model.norm.weight.grad = None
average_gradients(model, env)
grads = {name: p.grad for name, p in model.named_parameters()}
torch.save(grads, f"{sys.argv[1]}/{env.rank}.pt")
facts = dict(rank=env.rank, world=env.world_size, main=env.is_main, sum=all_sum(0.1 + env.rank, env),
             mean=mean(env.rank, env))
open(f"{sys.argv[1]}/{env.rank}.json", "w").write(json.dumps(facts))
cleanup(env)
"""


def test_two_processes_average_to_the_gradient_of_the_joint_batch(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, tmp_path / "worker.py", tmp_path], env=env, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr

    torch.manual_seed(5)
    model = Llama(ModelConfig(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=32, max_seq_len=8))
    ids = torch.randint(0, 32, (4, 9))
    model(ids[:2, :-1], ids[:2, 1:]).backward()
    norm_of_rank_0 = model.norm.weight.grad.clone()
    model.zero_grad()
    model(ids[:, :-1], ids[:, 1:]).backward()
    model.norm.weight.grad = norm_of_rank_0 / 2  # rank 1 had None there

    for rank in (0, 1):
        grads = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, p in model.named_parameters():
            torch.testing.assert_close(grads[name], p.grad, atol=1e-7, rtol=1e-5)
        facts = json.loads((tmp_path / f"{rank}.json").read_text())
        assert facts == dict(rank=rank, world=2, main=rank == 0, sum=pytest.approx(1.2), mean=0.5)


def test_one_process_is_left_as_it_is():
    env = setup(device="cpu", seed=1)
    assert env == Env(0, 1, torch.device("cpu"), torch.float32) and env.is_main
    layer = torch.nn.Linear(2, 2)
    average_gradients(layer, env)
    assert layer.weight.grad is None
    assert all_sum(3, env) == 3.0
    cleanup(env)


def test_the_seed_decides_the_draws():
    draws = []
    for seed in (1, 1, 2):
        setup(device="cpu", seed=seed)
        draws.append(torch.rand(3))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_autocast_follows_the_dtype():
    a = torch.ones(2, 2)
    for dtype, expected in (
        ("auto", torch.float32),
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
    ):
        with setup(device="cpu", dtype=dtype).autocast():
            assert (a @ a).dtype == expected


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(device="gpu"), "device=gpu"),
        (dict(device="meta"), "device=meta"),
        (dict(device="cuda:99"), "GPU 99 was asked for"),
        (dict(device="cpu", dtype="float16"), "dtype=float16"),
    ],
)
def test_a_device_or_dtype_that_is_not_there_is_named(arguments, message):
    with pytest.raises(UserError, match=message):
        setup(**arguments)
