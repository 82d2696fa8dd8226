"""Device choice, and several gloo processes, replicated or sharded, against one process on the joint batch."""

import json

import pytest
import torch
from chains import make_data, options_of, train
from parallel import SCRIPTS, assert_same_training, torchrun, torchrun_stage

from common.config import ConfigError, UserError
from common.distributed import Env, all_sum, cleanup, clip_gradients, compiled, restarted, setup, sync, wrap
from model import Llama, ModelConfig

# several processes add up in another order than one, and what AdamW makes of a tiny gradient knows no bound in float32
pytestmark = pytest.mark.usefixtures("module_in_float64")
TINY = dict(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=32, max_seq_len=8, scalar_head=True)

# rank r of 2 gets rows r and 2 + r of the batch below, one a micro-batch
WORKER = """
import json, sys, torch
torch.set_default_dtype(torch.float64)
from common import distributed
from common.distributed import all_sum, cleanup, mean, setup
from model import Llama, ModelConfig


def main(folder, parallel, tiny):
    env = setup(device="cpu", seed=5)
    model = Llama(ModelConfig(**json.loads(tiny)))
    forward = distributed.wrap(model, env, dict(parallel=parallel, optimizer="adamw"))
    ids = torch.randint(0, 32, (4, 8))
    for micro in range(2):
        distributed.sync(forward, last=micro == 1)
        row = ids[2 * micro + env.rank, None]
        loss = forward(row[:, :-1], row[:, 1:]) + forward.token_logps(row).mean() + forward.values(row).mean()
        (loss / 2).backward()
    grads = {name: distributed.whole(p.grad) for name, p in model.named_parameters()}
    torch.save(grads, f"{folder}/{env.rank}.pt")
    norms = [distributed.clip_gradients(model.parameters(), 0.5) for _ in range(2)]
    facts = dict(rank=env.rank, world=env.world_size, main=env.is_main, sum=all_sum(0.1 + env.rank, env),
                 mean=mean(env.rank, env), norms=norms)
    open(f"{folder}/{env.rank}.json", "w").write(json.dumps(facts))
    cleanup(env)


main(*sys.argv[1:])
"""

# the stage, whose second process is killed once
KILLED = """
import os, signal, sys
import torch
torch.set_default_dtype(torch.float64)
import pretrain
from common.stage import Stage

log = Stage.log

def log_and_die(self, step, *args, **kwargs):
    log(self, step, *args, **kwargs)
    if step == 3 and self.env.rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)

Stage.log = log_and_die
pretrain.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_average_to_the_gradient_of_the_joint_batch(tmp_path, parallel):
    (tmp_path / "worker.py").write_text(WORKER)
    torchrun(2, tmp_path / "worker.py", tmp_path, parallel, json.dumps(TINY))

    torch.manual_seed(5)
    model = Llama(ModelConfig(**TINY))
    ids = torch.randint(0, 32, (4, 8))
    (model(ids[:, :-1], ids[:, 1:]) + model.token_logps(ids).mean() + model.values(ids).mean()).backward()
    norm = torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt().item()
    assert norm > 0.5
    for rank in (0, 1):
        grads = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert grads.keys() == dict(model.named_parameters()).keys()
        for name, p in model.named_parameters():
            torch.testing.assert_close(grads[name], p.grad, atol=1e-9, rtol=1e-9, msg=name)
        facts = json.loads((tmp_path / f"{rank}.json").read_text())
        norms = pytest.approx([norm, 0.5 * norm / (norm + 1e-6)], rel=1e-9)  # torch divides by a little more
        assert facts == dict(rank=rank, world=2, main=rank == 0, sum=pytest.approx(1.2), mean=0.5, norms=norms)


def test_one_process_is_left_as_it_is():
    env = setup(device="cpu", seed=1)
    assert env == Env(0, 1, torch.device("cpu"), torch.float32) and env.is_main
    model = Llama(ModelConfig(**TINY))
    for parallel in ("ddp", "fsdp"):
        assert wrap(model, env, dict(parallel=parallel, optimizer="muon")) is model
    sync(model, last=False)
    model.scalar.weight.grad = torch.full((1, 16), 3.0)
    assert clip_gradients(model.parameters(), 1.0) == 12.0
    torch.testing.assert_close(model.scalar.weight.grad, torch.full((1, 16), 0.25))
    assert all_sum(3, env) == 3.0
    cleanup(env)


def test_what_cannot_be_parallel_is_refused():
    two, model = Env(0, 2, torch.device("cpu")), Llama(ModelConfig(**TINY))
    with pytest.raises(ConfigError, match="parallel=zero: ddp or fsdp"):
        wrap(model, two, dict(parallel="zero", optimizer="adamw"))
    with pytest.raises(ConfigError, match="optimizer=muon with parallel=fsdp"):
        wrap(model, two, dict(parallel="fsdp", optimizer="muon"))


def test_a_restart_by_torchrun_is_seen(monkeypatch):
    env = Env(0, 1, torch.device("cpu"))
    assert not restarted(env)
    for count in (0, 2):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))
        assert restarted(env) == (count > 0)


# whole stages: four micro-batches a step in one process against two in each of two, and so on


@pytest.fixture(scope="module")
def folder(tmp_path_factory, module_in_float64):
    """Data of a small chain and one-process runs of its stages, each step four micro-batches."""
    folder = tmp_path_factory.mktemp("parallel")
    make_data(folder, "pretrain,sft,rm,prompts")
    for stage in SCRIPTS:
        train(folder, stage, folder / stage, batch_size=4, grad_accumulation_steps=4)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage, parallel",
    [(stage, "ddp") for stage in SCRIPTS] + [("pretrain", "fsdp"), ("sft", "fsdp"), ("dpo", "fsdp")],
)
def test_two_processes_equal_one_that_accumulates(folder, tmp_path, stage, parallel):
    changes = dict(batch_size=4, grad_accumulation_steps=2, parallel=parallel, save_interval=2)
    torchrun_stage(tmp_path, 2, stage, options_of(folder, stage, tmp_path / "run", changes))
    assert_same_training(tmp_path / "run", folder / stage)
    samples = [run / "samples.txt" for run in (tmp_path / "run", folder / stage) if (run / "samples.txt").exists()]
    assert len({path.read_text(encoding="utf-8") for path in samples}) <= 1


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes(folder, tmp_path, capsys):
    steady = {"batch_size": 4, "min_learning_rate": 0.01, "max_steps": 8}  # a schedule that knows no max_steps
    train(folder, "pretrain", tmp_path / "one", **steady, grad_accumulation_steps=4)
    sittings = [(4, "fsdp"), (2, "ddp"), (2, "fsdp")]
    for i, (processes, parallel) in enumerate(sittings, 1):
        changes = steady | dict(max_steps=2 * i, grad_accumulation_steps=4 // processes, parallel=parallel)
        options = options_of(folder, "pretrain", tmp_path / "many", changes | dict(resume=True))
        out = torchrun_stage(tmp_path, processes, "pretrain", options)
        assert i == 1 or f"at step {2 * i - 2}\n" in out
    with pytest.raises(UserError, match=r"grad_accumulation_steps \* processes is 4 in .* and 8 in"):
        train(folder, "pretrain", tmp_path / "many", **steady, grad_accumulation_steps=8, resume=True)
    train(folder, "pretrain", tmp_path / "many", **steady, grad_accumulation_steps=4, resume=True)
    assert_same_training(tmp_path / "many", tmp_path / "one", atol=1e-4)  # three times rounded to float32


@pytest.mark.slow
def test_after_a_kill_torchrun_restarts_and_the_run_resumes_by_itself(folder, tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    changes = dict(batch_size=4, grad_accumulation_steps=2, save_interval=2)
    options = options_of(folder, "pretrain", tmp_path / "run", changes)
    out = torchrun(2, tmp_path / "killed.py", *options, restarts=1)
    assert f"resuming {tmp_path / 'run'} at step 2\n" in out
    assert_same_training(tmp_path / "run", folder / "pretrain")


def test_the_seed_decides_the_draws():
    draws = []
    for seed in (1, 1, 2):
        setup(device="cpu", seed=seed)
        draws.append(torch.rand(3))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_autocast_follows_the_dtype():
    a = torch.ones(2, 2, dtype=torch.float32)
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


def test_without_a_compiler_training_goes_on(monkeypatch, tmp_path, capsys):
    model, env = Llama(ModelConfig(dim=8, n_layers=1, n_heads=2, n_kv_heads=2, vocab_size=10)), setup("cpu")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert compiled(model, env) is model
    assert capsys.readouterr().err == (
        "compile=True: a C++ compiler is not here, training goes on without torch.compile\n"
    )
    monkeypatch.setenv("CXX", "c++")
    assert compiled(model, env) is not model
