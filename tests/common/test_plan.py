"""The plan of common/plan.py against the model itself: what it counts, computes, keeps and allocates."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chains import ROOT
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import pretrain
from common import plan
from common.config import ConfigError
from common.distributed import Env
from configs.pretrain import config as base
from configs.sizes import count_parameters, sizes
from configs.tokenizer import config as train_defaults
from model import Llama, ModelConfig
from tokenizer import Tokenizer
from tokenizer.train import Corpus, train_bpe

SHAPE = dict(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=512, max_seq_len=64)


def config_of(**changes):
    """The default config with these values; those of the model by their own names."""
    config = copy.deepcopy(base)
    for key, value in changes.items():
        (config["model"] if key in config["model"] else config)[key] = value
    return config


@pytest.mark.parametrize("name", sizes)
def test_parameters_are_those_of_the_sizes(name):
    counts = plan.count_parameters(ModelConfig(**sizes[name]))
    assert counts["embedding"] == 64793 * sizes[name]["dim"] and counts["output"] == 0
    assert sum(counts.values()) == count_parameters(**sizes[name])


def test_an_untied_output_is_counted_by_itself():
    tied, untied = (plan.count_parameters(ModelConfig(**SHAPE, tied=tied)) for tied in (True, False))
    assert untied == tied | dict(output=512 * 64)
    flops = [plan.flops_per_token(ModelConfig(**SHAPE, tied=tied), 64) for tied in (True, False)]
    assert flops[0] == flops[1]  # one of the two is looked up


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_that_torch_counts(tied):
    model, T = Llama(ModelConfig(**SHAPE, tied=tied)), 64
    ids = torch.randint(0, 512, (2, T + 1))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids[:, :-1], ids[:, 1:]).backward()
    causal = 12 * 3 * 64 * T / 2  # torch counts the half above the diagonal too
    vectors = 6 * sum(p.numel() for p in model.parameters() if p.dim() == 1)  # but no products of elements
    in_place = 2 * 64 * 512  # nor addmm_, by which the loss adds to the gradient of the projection
    expected = 2 * T * (plan.flops_per_token(model.config, T) + causal - vectors - in_place)
    assert counter.get_total_flops() == expected


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
    expected = plan.activation_bytes(model.config, 4, 32, size, fused_norm=False)
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
    "vocabulary": (WIDE | dict(batch_size=4, grad_accumulation_steps=2), 32000),
    "muon's step": (
        dict(dim=512, n_layers=6, n_heads=8, n_kv_heads=8, max_seq_len=128, seq_len=128)
        | dict(batch_size=2, grad_accumulation_steps=1, optimizer="muon"),
        6144,
    ),
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("case", MEMORY_CASES)
def test_memory_is_what_training_takes(case):
    changes, vocab_size = MEMORY_CASES[case]
    config = config_of(**changes)
    parts = plan.memory(plan.shape_of(config, vocab_size), config, on_gpu=False)
    assert measured_growth(config, vocab_size) == pytest.approx(parts["peak"], rel=0.15)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_of_a_loss_in_one_piece():
    config = config_of(**WIDE, batch_size=4, grad_accumulation_steps=1)
    parts = plan.memory(plan.shape_of(config, 32000), config, on_gpu=False)
    expected = parts["peak"] - parts["loss, in chunks"] + parts["loss, were it in one piece"]
    assert measured_growth(config, 32000, chunked=False) == pytest.approx(expected, rel=0.15)


def test_optimizer_state_is_the_optimizers():
    shape = ModelConfig(**SHAPE)
    for name in ("adamw", "muon"):
        config = config_of(optimizer=name)
        model = Llama(shape)
        optimizer = plan.build_optimizer(model, config)
        model(*torch.randint(0, 512, (2, 2, 16))).backward()
        optimizer.step()
        tensors = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.dim()]
        assert plan.optimizer_bytes(shape, config, 4)[0] == sum(t.nbytes for t in tensors)


def test_plan_needs_no_files_and_leaves_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pretrain.main(["--plan", "--max_steps=1000", "--grad_accumulation_steps=4"])
    text = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert "parameters: 58,479,616 (trunk 25,305,600, embedding 33,174,016; vocabulary 64,793" in text
    # 6 * 58,479,616 + 12 * 8 * 512 * 512 / 2
    assert "compute: 363.5 MFLOP a token" in text
    # 1000 * 32 * 4 * 512 tokens; 20 * 58,479,616 / 65,536 steps
    assert "tokens: 65,536,000 in 1,000 steps of 65,536" in text and "are 17,847 steps" in text
    # 65,536,000 * 363.46 MFLOP / (312 TFLOP/s * 0.4)
    assert "| A100, 40% of 312 TFLOP/s | 343,366 | 3.2 minutes |" in text


def test_plan_asks_the_tokenizer_if_there_is_one(tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("酒店很好，房间干净\n" * 20, encoding="utf-8")
    options = train_defaults | dict(vocab_size=365, character_coverage=1.0)
    (tmp_path / "tokenizer").mkdir()
    config = config_of(tokenizer=str(tmp_path / "tokenizer"))
    assert plan.vocabulary(config)[0] == 64793  # a folder without one
    (tmp_path / "tokenizer" / "tokenizer.model").write_bytes(train_bpe(Corpus([str(corpus)], 1000), options))
    for path in (tmp_path / "tokenizer", tmp_path / "tokenizer" / "tokenizer.model"):
        config = config_of(tokenizer=str(path))
        assert plan.vocabulary(config) == (Tokenizer.load(path).vocab_size, str(path))
        assert f"embedding {512 * Tokenizer.load(path).vocab_size:,};" in plan.report(config)


def test_durations():
    assert [plan.duration(s) for s in (59.6, 150, 7200, 90000, 200000)] == [
        "60 seconds",
        "2.5 minutes",
        "2.0 hours",
        "25.0 hours",
        "2.3 days",
    ]


def test_measured_peak_is_a_rate_of_this_machine():
    assert 1e8 < plan.measured_peak(size=256, seconds=0.05) < 1e14


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(n_heads=7), "model: dim=512 is not a multiple of n_heads=7"),
        (dict(seq_len=1024), "seq_len=1024 exceeds model.max_seq_len=512"),
    ],
)
def test_what_cannot_be_trained_is_not_planned(changes, message):
    with pytest.raises(ConfigError, match=message):
        plan.report(config_of(**changes))


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_that_this_machine_cannot_hold_is_refused(monkeypatch, tied):
    shape, env = ModelConfig(**SHAPE, tied=tied), Env(0, 2, torch.device("cpu"))
    n = sum(plan.count_parameters(shape).values())
    for bytes_each, changes in ((16, {}), (12, dict(optimizer="muon")), (8, dict(parallel="fsdp"))):
        config = dict(optimizer="adamw", parallel="ddp") | changes
        monkeypatch.setattr(plan, "machine_memory", lambda device, has=bytes_each * n: has)
        plan.check_fits(shape, config, env)
        monkeypatch.setattr(plan, "machine_memory", lambda device, has=bytes_each * n - 1: has)
        with pytest.raises(ConfigError, match=f"^model: {n:,} parameters need 0 GB .* and cpu has 0 GB: choose"):
            plan.check_fits(shape, config, env)


def test_memory_of_this_machine():
    assert 1e8 < plan.machine_memory(torch.device("cpu"))


def test_utilisation_is_beside_the_measured_peak(monkeypatch):
    monkeypatch.setattr(plan, "measured_peak", lambda: 80e9)
    line = plan.utilisation(20e9, Env(0, 1, torch.device("cpu")))
    assert line == "20 GFLOP/s a process, 25.0% of the 80 of matrix products measured here"


@pytest.mark.parametrize("name, share", [("NVIDIA H100 80GB HBM3", "10.1%"), ("NVIDIA GeForce RTX 4090", "60.5%")])
def test_utilisation_of_a_known_gpu_is_beside_its_data_sheet(monkeypatch, name, share):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert share in plan.utilisation(100e12, Env(0, 1, torch.device("cuda")))


@pytest.mark.parametrize("name", ["GeForce 256", "NVIDIA H100 PCIe"])
def test_utilisation_of_an_unknown_gpu_says_so(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert f"the peak of {name} is not known" in plan.utilisation(1e12, Env(0, 1, torch.device("cuda")))
