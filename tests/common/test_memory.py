"""common/memory.py against the model itself: what it counts, keeps and allocates."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chains import ROOT
from planning import SHAPE, config_of

from common import memory
from common.optim import build_optimizer
from common.plan import shape_of
from configs.sizes import count_parameters, sizes
from model import Llama, ModelConfig


@pytest.mark.parametrize("name", sizes)
def test_parameters_are_those_of_the_sizes(name):
    counts = memory.count_parameters(ModelConfig(**sizes[name]))
    assert counts["embedding"] == 64793 * sizes[name]["dim"] and counts["output"] == 0
    assert sum(counts.values()) == count_parameters(**sizes[name])


@pytest.mark.parametrize("dtype, size", [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("n_kv_heads", [2, 4])
def test_activations_are_what_autograd_keeps(dtype, size, n_kv_heads):
    model, sizes, kept = Llama(ModelConfig(**SHAPE | dict(n_kv_heads=n_kv_heads))), {}, []
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)  # or its address would be used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", dtype, enabled=size == 2):
            model.hidden(torch.randint(0, 512, (4, 32)))
    expected = memory.activation_bytes(model.config, 4 * 32, size, fused_norm=False)
    assert sum(sizes.values()) == pytest.approx(expected, rel=1e-3)  # the ids, and vectors in bfloat16, are left out


# Trains as pretrain.py does and prints by how many bytes the process grew at most. A small model comes first, so that
# what the libraries need is not counted.
MEASURE = """
import json, sys
import torch
import torch.nn.functional as F
from common.optim import build_optimizer
from model import Llama, ModelConfig

def status(key):
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])

def train(config, vocab_size, chunked, steps):
    model = Llama(ModelConfig(vocab_size=vocab_size, **config["model"]))
    model.recompute = config["recompute"]
    optimizer = build_optimizer(model, config)
    for _ in range(steps):
        for _ in range(config["grad_accumulation_steps"]):
            ids = torch.randint(0, vocab_size, (config["batch_size"], config["seq_len"] + 1))
            x, y = ids[:, :-1], ids[:, 1:]
            (model(x, y) if chunked else F.cross_entropy(model(x).flatten(0, 1), y.flatten())).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

torch.set_num_threads(1)
config, vocab_size, chunked = json.loads(sys.argv[1])
small = dict(dim=32, n_layers=1, n_heads=2, n_kv_heads=2, max_seq_len=16)
train(config | dict(model=small, batch_size=2, seq_len=16), 64, chunked, 2)
before = status("VmRSS")
train(config, vocab_size, chunked, 2)
print(status("VmHWM") - before)
"""


def measured_growth(config, vocab_size, chunked=True):
    """Without glibc's habit of holding back what was freed, which is not the model's."""
    env = os.environ | dict(PYTHONPATH=str(ROOT), MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    command = [sys.executable, "-c", MEASURE, json.dumps([config, vocab_size, chunked])]
    return int(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)


WIDE = dict(dim=256, n_layers=4, n_heads=4, n_kv_heads=2, max_seq_len=256, seq_len=256)
MEMORY_CASES = {
    "activations": (WIDE | dict(batch_size=16, grad_accumulation_steps=1), 6144),
    "recomputed": (WIDE | dict(batch_size=32, grad_accumulation_steps=1, recompute=True), 6144),
    "vocabulary": (WIDE | dict(batch_size=4, grad_accumulation_steps=2), 32000),
    # two gradients of it and their sum; a third would be beyond what the test allows
    "embedding": (WIDE | dict(n_layers=2, batch_size=1, seq_len=64, grad_accumulation_steps=1), 32000),
    "muon's step": (
        dict(dim=512, n_layers=6, n_heads=8, n_kv_heads=8, max_seq_len=128, seq_len=128)
        | dict(batch_size=2, grad_accumulation_steps=1, optimizer="muon"),
        6144,
    ),
}


def parts_of(config, vocab_size, on_gpu=False):
    shape = shape_of(config, vocab_size)
    return memory.stage_memory("pretrain", shape, config, on_gpu, config["batch_size"], config["seq_len"])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("case", MEMORY_CASES)
def test_memory_is_what_training_takes(case):
    changes, vocab_size = MEMORY_CASES[case]
    config = config_of(**changes)
    assert measured_growth(config, vocab_size) == pytest.approx(parts_of(config, vocab_size)["peak"], rel=0.15)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_of_a_loss_in_one_piece():
    config = config_of(**WIDE, batch_size=4, grad_accumulation_steps=1)
    parts, shape = parts_of(config, 32000), shape_of(config, 32000)
    one_piece = memory.loss_bytes(shape, 4 * 256, 4, False, "one piece")
    expected = parts["peak"] - parts["loss, in chunks"] + one_piece
    assert measured_growth(config, 32000, chunked=False) == pytest.approx(expected, rel=0.15)


def test_the_loss_holds_a_chunk_of_logits():
    shape, states = ModelConfig(**SHAPE), 3 * 4 * 4096 * SHAPE["dim"]
    V, D = shape.vocab_size, shape.dim
    assert memory.loss_bytes(shape, 4096, 4, on_gpu=False) == 4 * V * D + 4 * 512 * V + states
    low = 2 * 4096 * D  # the states in bfloat16; V is a multiple of 128, to which a GPU's is filled up
    assert memory.loss_bytes(shape, 4096, 2, on_gpu=True) == 10 * V * D + 6 * 1024 * V + states + low
    few = memory.loss_bytes(shape, 7, 4, on_gpu=False)
    assert few == 4 * V * D + 4 * 7 * V + 3 * 4 * 7 * D


def test_optimizer_state_is_the_optimizers():
    shape = ModelConfig(**SHAPE)
    for name in ("adamw", "muon"):
        config = config_of(optimizer=name)
        model = Llama(shape)
        optimizer = build_optimizer(model, config)
        model(*torch.randint(0, 512, (2, 2, 16))).backward()
        optimizer.step()
        tensors = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.dim()]
        assert memory.optimizer_bytes(shape, config, 4)[0] == sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scalar_head", [True, False])
def test_parameters_are_those_of_the_model(tied, scalar_head):
    shape = ModelConfig(**SHAPE, tied=tied, scalar_head=scalar_head)
    assert sum(memory.count_parameters(shape).values()) == Llama(shape).num_params()


def test_a_stage_holds_all_its_models():
    """PPO: policy, reference, value and reward model, of which two are trained; AdamW's two numbers for each."""
    shape, config = ModelConfig(**SHAPE), config_of()
    parts = memory.stage_memory("ppo_train", shape, config, True, B=2, T=16, replies=4)
    policy, value = Llama(shape).num_params(), Llama(replace(shape, scalar_head=True)).num_params()
    assert parts["weights"] == 2 * 4 * (policy + value) and parts["gradients"] == 4 * (policy + value)
    assert parts["optimizer state"] == 8 * (policy + value)
    # bfloat16 weights of the policy, keys and values of 3 layers and 2 heads of 16, logits of 4 rows
    assert parts["generation"] == 2 * policy + 2 * 2 * 3 * 4 * 16 * 32 + max(2 * 4 * 16 * (192 + 384), 20 * 4 * 512)


@pytest.mark.parametrize("stage", memory.STAGES)
def test_the_largest_batch_is_the_largest_that_fits(stage):
    shape, config = ModelConfig(**SHAPE), config_of()
    peaks = [memory.stage_memory(stage, shape, config, True, B, 64, 2)["peak"] for B in range(1, 40)]
    assert peaks == sorted(peaks)
    for B in (1, 7, 33):
        assert memory.largest_batch(peaks[B - 1], stage, shape, config, 64, 2) >= B
        assert memory.largest_batch(peaks[B] - 1, stage, shape, config, 64, 2) <= B
    assert memory.largest_batch(1000, stage, shape, config, 64, 2) == 0
