"""What a pretraining run will take, before it is started: parameters, memory, tokens and time (pretrain.py --plan).

Memory is that of tensors which live at once, on one process without torch.compile. What a CPU's malloc holds back, or
what CUDA itself needs, comes on top.
"""

import math
import os
import time
from pathlib import Path

import torch

from common.config import ConfigError
from common.optim import build_optimizer
from common.report import format_table
from model import Llama, ModelConfig, row_chunks
from tokenizer import MODEL_FILE, Tokenizer

# Dense peaks in TFLOP/s from NVIDIA's data sheets and white papers, bfloat16 with float32 accumulation unless said, and
# what the driver's name of the GPU contains. Sheets that give them "with sparsity" give twice as much.
PEAKS = {
    "V100 SXM2, float32 (it has no bfloat16)": (15.7, "V100-SXM2"),  # Tesla V100 data sheet, 2018
    "RTX 3090": (71, "RTX 3090"),  # GA102 white paper, 2020
    "RTX 4090": (165.2, "RTX 4090"),  # Ada white paper, 2022; 82.6 is its float32 outside the tensor cores
    "A100": (312, "A100"),  # A100 data sheet, 2020
    "L40S": (362, "L40S"),  # L40S data sheet, 2023
    "H100 SXM": (989.4, "H100 80GB HBM3"),  # H100 data sheet, 2022; its PCIe and NVL are slower
}
SHARE = 0.4  # of the peak that training reaches, about; 0.3 to 0.9 of sgemm were measured on CPUs of two threads
TOKENS_A_PARAMETER = 20  # at the least compute for a loss, Hoffmann et al., 2022, arXiv:2203.15556


def shape_of(config: dict, vocab_size: int) -> ModelConfig:
    """The model of a pretraining config, or ConfigError where its numbers do not go together."""
    try:
        shape = ModelConfig(vocab_size=vocab_size, **config["model"])
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None
    if config["seq_len"] > shape.max_seq_len:
        raise ConfigError(f"seq_len={config['seq_len']} exceeds model.max_seq_len={shape.max_seq_len}")
    return shape


def machine_memory(device: torch.device) -> float:
    """Bytes of a GPU, or of this machine's RAM; inf where the system does not tell."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cuda" or not hasattr(os, "sysconf"):  # Windows has none
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_fits(shape: ModelConfig, config: dict, env) -> None:
    """ConfigError for a model that cannot be trained here, instead of a machine that swaps until it is killed."""
    D, kv = shape.dim, shape.n_kv_heads * shape.head_dim
    block = 2 * D * D + 2 * D * kv + 3 * D * shape.hidden_dim + 2 * D  # wq, wo; wk, wv; w1, w2, w3; two norms
    total = shape.n_layers * block + D + shape.vocab_size * D * (1 if shape.tied else 2)
    shards = env.world_size if config["parallel"] == "fsdp" else 1
    needed = total * 4 * (3 if config["optimizer"] == "muon" else 4) / shards  # weights, gradients, one state or two
    if needed > (has := machine_memory(env.device)):
        raise ConfigError(
            f"model: {total:,} parameters need {needed / 1e9:,.0f} GB with their gradients and the optimizer's state, "
            f"and {env.device} has {has / 1e9:,.0f} GB: choose a smaller model.dim, model.n_layers or vocabulary"
        )


def skeleton(shape: ModelConfig) -> Llama:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return Llama(shape)


def count_parameters(shape: ModelConfig) -> dict[str, int]:
    """Of the trunk (blocks and last norm), of the embedding, and of the output projection where it has its own."""
    counts = dict(trunk=0, embedding=0, output=0)
    for name, p in skeleton(shape).named_parameters():
        kind = {"tok_embeddings": "embedding", "output": "output"}.get(name.split(".")[0], "trunk")
        counts[kind] += p.numel()
    return counts


def flops_per_token(shape: ModelConfig, seq_len: int) -> float:
    """Of forward and backward: 6 for each parameter that a token is multiplied with, and the attention.

    6 is a multiplication and an addition, once forward, twice backward. An embedding is looked up, not multiplied with,
    unless it is the output projection too. Attention takes 12 * n_layers * dim * T: two products (scores, values) of
    2 * dim * T, three times; a token sees half of the T on average.
    """
    counts = count_parameters(shape)
    multiplied = counts["trunk"] + (counts["embedding"] if shape.tied else counts["output"])
    return 6 * multiplied + 12 * shape.n_layers * shape.dim * seq_len / 2


def activation_bytes(shape: ModelConfig, batch_size: int, seq_len: int, size: int, fused_norm: bool) -> int:
    """What the trunk keeps of a micro-batch for the backward pass.

    size: bytes of a number in the matrix products: 4, or 2 under bfloat16 autocast, where what is added up and
    normalised still has 4, each product keeps a copy of its input, and every matrix has one in bfloat16.
    fused_norm: CUDA's, which keeps no normalised copy.
    """
    D, F, H = shape.dim, shape.hidden_dim, shape.n_heads
    kv = shape.n_kv_heads * shape.head_dim
    norm = 4 * (D + 1 + (0 if fused_norm else D))  # input, 1 / root mean square, and input times that
    inputs = (3 + 2 if size < 4 else 1 + 1) * D  # of wq, wk, wv and of w1, w3
    attention = size * (D + kv + kv + D) + 4 * H  # rotated q and k, v, output; log-sum-exp of each head
    feed_forward = size * (inputs + 3 * F)  # w1's output, w3's output, the product of the gated
    cast = size * count_parameters(shape)["trunk"] if size < 4 else 0
    return batch_size * seq_len * (shape.n_layers * (2 * norm + attention + feed_forward) + norm) + cast


def loss_bytes(shape: ModelConfig, n_tokens: int, size: int, device: str, chunked: bool = True) -> int:
    """The largest that exists at once for the output projection and the loss of a micro-batch, gradients included."""
    V, D = shape.vocab_size, shape.dim
    if not chunked:  # log-softmax, its gradient and that of the logits; gradient of the projection
        return 3 * 4 * n_tokens * V + 4 * V * D
    rows = len(range(n_tokens)[row_chunks(torch.empty(n_tokens, 1, device=device), V)[0]])
    projection, chunk = 4 * V * D, 4 * rows * V  # its gradient; the logits, which everything is written over
    if size < 4:  # the weight in bfloat16; a chunk's logits before and their gradient after float32
        projection, chunk = projection + size * V * D, chunk + 2 * size * rows * V
    return projection + chunk + 3 * 4 * n_tokens * D  # three of the states and their gradients


def optimizer_bytes(shape: ModelConfig, config: dict, size: int) -> tuple[int, int]:
    """(state, largest temporary of a step): AdamW keeps two numbers a parameter, Muon one.

    Muon's step holds six copies of all matrices of a shape at once, two of them in float32, and two squares of the
    shorter side.
    """
    state, scratch = 0, 0
    for group in build_optimizer(skeleton(shape), config).param_groups:
        muon = group.get("muon", False)
        state += (4 if muon else 8) * sum(p.numel() for p in group["params"])
        shapes = [tuple(p.shape) for p in group["params"]] if muon else []
        for N, M in set(shapes):
            scratch = max(scratch, shapes.count((N, M)) * ((2 * 4 + 4 * size) * N * M + 2 * size * min(N, M) ** 2))
    return state, scratch


def memory(shape: ModelConfig, config: dict, on_gpu: bool) -> dict[str, int]:
    """Bytes by part, and the most that lives at once: float32 on a CPU, bfloat16 autocast on a GPU.

    The peak is at the loss, or, in models that are large for their batch, when all gradients are there.
    """
    size, device = (2, "meta") if on_gpu else (4, "cpu")  # row_chunks asks only whether it is a CPU
    B, T = config["batch_size"], config["seq_len"]
    weights = 4 * sum(count_parameters(shape).values())
    state, scratch = optimizer_bytes(shape, config, size)
    activations = activation_bytes(shape, B, T, size, fused_norm=on_gpu)
    loss, embedding = loss_bytes(shape, B * T, size, device), 4 * shape.vocab_size * shape.dim
    accumulated = weights if config["grad_accumulation_steps"] > 1 else 0  # there while the next micro-batch runs
    peak = weights + state + max(activations + loss + accumulated, weights + max(scratch, embedding))
    return {
        "weights": weights,
        "gradients": weights,
        "optimizer state": state,
        "optimizer step": scratch,
        "activations of a micro-batch": activations,
        "loss, in chunks": loss,
        "peak": peak,
        "loss, were it in one piece": loss_bytes(shape, B * T, size, device, chunked=False),
    }


def measured_peak(size: int = 1024, seconds: float = 0.5) -> float:
    """FLOP/s of float32 matrix products on this CPU, the best of those that fit in `seconds`."""
    a, b = torch.rand(2, size, size)
    best, end = math.inf, time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def utilisation(flops: float, env) -> str:
    """A process's FLOP/s beside what its device has: a CPU's peak is measured, a known GPU's is the data sheet's."""
    if env.device.type == "cpu":
        peak, what = measured_peak(), "of matrix products measured here"
    else:
        name = torch.cuda.get_device_name(env.device) if env.device.type == "cuda" else env.device.type
        known = [tflops for tflops, part in PEAKS.values() if part in name]
        if not known:
            return f"{flops / 1e9:,.0f} GFLOP/s a process; the peak of {name} is not known here"
        peak, what = known[0] * 1e12, f"of {name}'s data sheet"
    return f"{flops / 1e9:,.0f} GFLOP/s a process, {flops / peak:.1%} of the {peak / 1e9:,.0f} {what}"


def vocabulary(config: dict) -> tuple[int, str]:
    """(rows, where that is from): the tokenizer's if it is on this disk, else ChatGLM3's, for which the sizes are."""
    path = Path(config["tokenizer"])
    if path.is_file() or (path / MODEL_FILE).is_file():
        return Tokenizer.load(path).vocab_size, config["tokenizer"]
    return ModelConfig.vocab_size, f"the default, as {config['tokenizer']} is not there"


def duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def report(config: dict) -> str:
    """The whole plan of a pretraining config, to be printed."""
    vocab_size, source = vocabulary(config)
    shape, T = shape_of(config, vocab_size), config["seq_len"]
    counts, flops = count_parameters(shape), flops_per_token(shape, T)
    total, per_step = sum(counts.values()), T * config["batch_size"] * config["grad_accumulation_steps"]
    tokens, wanted = config["max_steps"] * per_step, TOKENS_A_PARAMETER * total
    parts = [f"{kind} {n:,}" for kind, n in counts.items() if n]
    lines = [
        f"parameters: {total:,} ({', '.join(parts)}; vocabulary {vocab_size:,}, {source})",
        f"compute: {flops / 1e6:,.1f} MFLOP a token, forward and backward",
        f"tokens: {tokens:,} in {config['max_steps']:,} steps of {per_step:,} on one process, {tokens / total:.1f} a "
        f"parameter; {TOKENS_A_PARAMETER} a parameter (arXiv:2203.15556) are {wanted / per_step:,.0f} steps",
    ]
    columns = [memory(shape, config, on_gpu) for on_gpu in (False, True)]
    rows = [dict(part=part, cpu=columns[0][part] / 1e6, gpu=columns[1][part] / 1e6) for part in columns[0]]
    form = {"memory (MB)": "{part}", "CPU, float32": "{cpu:,.0f}", "GPU, bfloat16": "{gpu:,.0f}"}
    lines += ["", format_table(form, rows), ""]

    peak = measured_peak()
    here = f"this CPU, {torch.get_num_threads()} threads, {SHARE:.0%} of {peak / 1e9:,.0f} GFLOP/s measured"
    speeds = {here: peak * SHARE}
    for name, (tflops, _) in PEAKS.items():
        speeds[f"{name}, {SHARE:.0%} of {tflops} TFLOP/s"] = tflops * 1e12 * SHARE
    rows = [dict(on=on, speed=rate / flops, time=duration(tokens * flops / rate)) for on, rate in speeds.items()]
    lines.append(format_table({"on": "{on}", "tokens/s": "{speed:,.0f}", "time": "{time}"}, rows))
    return "\n".join(lines)
