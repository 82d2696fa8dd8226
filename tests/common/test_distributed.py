"""Device choice, and several gloo processes, replicated or sharded, against one process on the joint batch."""

import copy
import json
import os
import shutil
from contextlib import nullcontext

import pytest
import torch
from chains import make_data, options_of, train
from parallel import SCRIPTS, assert_same_training, torchrun, torchrun_stage
from tiny import conversations
from torch._dynamo.testing import CompileCounterWithBackend

import sft
from common.config import ConfigError, UserError
from common.distributed import (
    Env,
    all_sum,
    cleanup,
    clip_gradients,
    compiled,
    compiled_chunk,
    has_bfloat16,
    restarted,
    setup,
    step_seed,
    sync,
    wrap,
)
from dataset.batches import pad_batch
from head import log_softmax_chunk, product
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

# the same model and batch in both ways of being parallel and in both precisions; what each rank has at the end
PRECISION_WORKER = """
import sys, torch
from common import distributed
from common.optim import build_optimizer
from model import Llama, ModelConfig

config = dict(optimizer="adamw", learning_rate=0.1, beta1=0.9, beta2=0.95, weight_decay=0.0)
shape = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=96, max_seq_len=32, dropout=0.1)
for dtype in ("float32", "bfloat16"):
    for parallel in ("ddp", "fsdp"):
        env = distributed.setup("cpu", dtype, seed=5)
        model = Llama(ModelConfig(**shape))
        forward = distributed.wrap(model, env, config | dict(parallel=parallel))
        optimizer = build_optimizer(model, config)
        ids = torch.randint(0, 96, (4, 17))[2 * env.rank :][:2]
        torch.manual_seed(distributed.step_seed(5, 0, env))
        with env.autocast():
            loss = forward(ids[:, :-1], ids[:, 1:])
        loss.backward()
        grads = {name: distributed.whole(p.grad) for name, p in model.named_parameters()}
        optimizer.step()
        whole, state = distributed.gather(model, optimizer, env)
        weights = whole and whole.state_dict()
        found = dict(loss=loss.detach(), rng=torch.get_rng_state(), grads=grads, weights=weights)
        found["state"] = state and state["state"]
        torch.save(found, f"{sys.argv[1]}/{dtype}-{parallel}-{env.rank}.pt")
distributed.cleanup(env)
"""

# the first process leaves while gloo has yet to drop a tensor of which only it knows
LEAVING = """
import time, torch
import torch.distributed as dist
from common.distributed import setup, wrap
from model import Llama, ModelConfig


def main():
    env = setup(device="cpu")
    shape = dict(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=32, max_seq_len=8)
    forward = wrap(Llama(ModelConfig(**shape)), env, dict(parallel="ddp", optimizer="adamw"))
    forward(torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)).backward()
    tensor = torch.ones(3)
    dist.barrier()
    time.sleep(2 * env.rank)
    work = dist.all_reduce(tensor, async_op=True)
    if env.rank == 1:
        work.wait()
    del tensor, work
    dist.destroy_process_group()


main()
print("left")
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
def test_a_process_that_leaves_first_waits_for_no_lock_that_it_holds(tmp_path):
    (tmp_path / "worker.py").write_text(LEAVING)
    assert torchrun(2, tmp_path / "worker.py").count("left") == 2


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


@pytest.mark.slow
def test_sharded_training_is_replicated_training_in_either_precision(tmp_path):
    """The same numbers but for the order of sums: a float32 gradient of two ranks is rounded once, by 6e-8."""
    (tmp_path / "worker.py").write_text(PRECISION_WORKER)
    torchrun(2, tmp_path / "worker.py", tmp_path)
    for dtype in ("float32", "bfloat16"):
        ddp, fsdp = (torch.load(tmp_path / f"{dtype}-{parallel}-0.pt") for parallel in ("ddp", "fsdp"))
        assert torch.equal(ddp["loss"], fsdp["loss"])
        for name, expected in ddp["grads"].items():
            bound = 1e-6 * expected.abs().max().item()
            torch.testing.assert_close(fsdp["grads"][name], expected, atol=bound, rtol=0, msg=name)
        other = torch.load(tmp_path / f"{dtype}-fsdp-1.pt")
        assert fsdp["weights"].keys() == ddp["grads"].keys() and fsdp["state"]
        assert other["weights"] is None and other["state"] is None
        assert not torch.equal(fsdp["rng"], other["rng"])  # nor do they drop the same
    wide, narrow = (torch.load(tmp_path / f"{dtype}-fsdp-0.pt")["loss"] for dtype in ("float32", "bfloat16"))
    assert wide != narrow  # the products were in another precision


def test_the_seed_of_a_step_is_of_its_rank_and_run():
    alone, two = Env(0, 1, torch.device("cpu")), [Env(rank, 2, torch.device("cpu")) for rank in (0, 1)]
    assert step_seed(1, 7, alone) == 1_000_010
    seeds = [step_seed(seed, step, env) for seed in (1, 2) for step in range(5) for env in two]
    assert len(set(seeds)) == len(seeds)
    torch.Generator().manual_seed(step_seed(2**62, 10**9, two[1]))  # of any size


def test_one_process_is_left_as_it_is():
    env = setup(device="cpu", seed=1)
    assert env == Env(0, 1, torch.device("cpu"), torch.float32) and env.is_main
    model = Llama(ModelConfig(**TINY))
    for parallel in ("ddp", "fsdp"):
        assert wrap(model, env, dict(parallel=parallel, optimizer="muon")) is model
    sync(model, last=False)
    model.scalar.weight.grad = torch.full((1, 16), 3.0)
    assert clip_gradients(model.parameters(), 0.0) == 12.0  # measured and not clipped
    assert torch.equal(model.scalar.weight.grad, torch.full((1, 16), 3.0))
    assert clip_gradients(model.parameters(), 1.0) == 12.0
    torch.testing.assert_close(model.scalar.weight.grad, torch.full((1, 16), 0.25))
    assert all_sum(3, env) == 3.0
    cleanup(env)


def test_what_cannot_be_parallel_is_refused():
    two, model = Env(0, 2, torch.device("cpu")), Llama(ModelConfig(**TINY))
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
def test_two_processes_that_drop_out_resume_to_the_same_run(folder, tmp_path):
    changes = {"batch_size": 4, "save_interval": 2, "max_steps": 4, "model.dropout": 0.2}
    options = options_of(folder, "pretrain", tmp_path / "whole", changes)
    torchrun_stage(tmp_path, 2, "pretrain", options)
    shutil.copytree(tmp_path / "whole", tmp_path / "halves")
    (tmp_path / "halves" / "ckpt-2.pt").replace(tmp_path / "halves" / "ckpt.pt")
    torchrun_stage(
        tmp_path, 2, "pretrain", options_of(folder, "pretrain", tmp_path / "halves", changes | {"resume": True})
    )
    assert_same_training(tmp_path / "halves", tmp_path / "whole")


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


def test_float32_is_never_tf32():
    torch.set_float32_matmul_precision("high")  # as a container's environment may have it
    setup("cpu", "float32")
    assert torch.get_float32_matmul_precision() == "highest"


def test_autocast_follows_the_dtype():
    a = torch.ones(2, 2, dtype=torch.float32)
    for dtype, expected in (
        ("auto", torch.float32),
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
    ):
        with setup(device="cpu", dtype=dtype).autocast():
            assert (a @ a).dtype == expected
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("card, has, dtype", [("H100", True, torch.bfloat16), ("T4", False, torch.float32)])
def test_bfloat16_is_chosen_where_it_is_not_emulated(monkeypatch, capsys, card, has, dtype):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has or including_emulation)
    precision = torch.get_float32_matmul_precision()
    assert has_bfloat16(torch.device("cuda")) == has and not has_bfloat16(torch.device("cpu"))
    assert setup(device="cuda").dtype == dtype
    said = "" if has else "dtype=auto: T4 has no bfloat16, training is in float32\n"
    assert capsys.readouterr().out == said
    assert setup(device="cuda", dtype="bfloat16").dtype == torch.bfloat16  # who asks for it gets it
    torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("given", [None, "7"])
def test_a_cpu_in_bfloat16_keeps_few_prepared_shapes_unless_told(monkeypatch, given):
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.setenv(name, given or "")
    if given is None:
        monkeypatch.delenv(name)
    setup(device="cpu", dtype="bfloat16")
    assert os.environ[name] == (given or "64")


def test_a_cpu_in_bfloat16_gives_float32_logits():
    env = setup(device="cpu", dtype="bfloat16")
    a, b = torch.randn(2, 64, 64, dtype=torch.float32)
    with env.autocast():
        found = product(a, b)
    assert found.dtype == torch.float32 and (found != found.bfloat16().float()).any()
    largest = 2**-7 * (a.abs() @ b.abs())  # operands that a CPU rounds, where it can, are off by 2^-9 each
    assert ((found.double() - a.double() @ b.double()).abs() < largest).all()
    setup(device="cpu")
    assert torch.equal(product(a, b), torch.mm(a, b)) and torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(device="gpu"), "device=gpu"),
        (dict(device="meta"), "device=meta"),
        (dict(device="cuda:99"), "GPU 99 was asked for"),
        (dict(device="cuda:300"), "device=cuda:300: not a device"),
        (dict(device="cpu:256"), "device=cpu:256: not a device"),
        (dict(device="cpu", dtype="float16"), "dtype=float16"),
    ],
)
def test_a_device_or_dtype_that_is_not_there_is_named(arguments, message):
    with pytest.raises(UserError, match=message):
        setup(**arguments)


def is_compiled(model):
    return [layer._compiled_call_impl is not None for layer in model.layers] + [model.chunk is not log_softmax_chunk]


def test_without_a_compiler_training_goes_on(monkeypatch, tmp_path, capsys):
    model, env = Llama(ModelConfig(dim=8, n_layers=2, n_heads=2, n_kv_heads=2, vocab_size=10)), setup("cpu")
    names = list(model.state_dict())
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    for wanted in ("auto", False, True):
        assert not capsys.readouterr().err
        compiled(model, env, dict(compile=wanted))
        assert is_compiled(model) == [False] * 3
    assert capsys.readouterr().err == (
        "compile=True: a C++ compiler is not here, training goes on without torch.compile\n"
    )
    monkeypatch.setenv("CXX", "c++")
    compiled(model, env, dict(compile="auto"))
    assert is_compiled(model) == [False] * 3  # on a CPU only where it is asked for
    compiled(model, env, dict(compile=True))
    assert is_compiled(model) == [True, True, False]  # whose softmax a CPU computes faster as it is
    assert list(model.state_dict()) == names


def test_two_fine_tuning_batches_compile_once(monkeypatch):
    """They differ in their rows, length and answer tokens. Loss and gradients are those of the plain model."""
    monkeypatch.setenv("CXX", "c++")
    torch.manual_seed(0)
    shape = dict(dim=32, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=97, max_seq_len=64)
    plain = Llama(ModelConfig(**shape))
    model, counter = copy.deepcopy(plain), CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled(model, setup("cpu"), dict(compile=True), backend=counter)
    model.chunk = compiled_chunk(backend=counter)  # as on a GPU
    compilations = []
    for sizes in ([(20, 9), (3, 30)], [(5, 3), (7, 33), (11, 40)]):
        batch, found = pad_batch(conversations(*sizes)), []
        for each in (plain, model):
            each.zero_grad()
            loss = sft.answer_loss(each, batch, batch["loss_mask"] / 100)
            loss.backward()
            found.append([loss.detach(), *(p.grad for p in each.parameters())])
        for mine, expected in zip(*found, strict=True):
            torch.testing.assert_close(mine, expected, atol=1e-9, rtol=1e-9)
        compilations.append(counter.frame_count)
    assert compilations == [2, 2]  # a block, which stands for all, and the softmax of the head
