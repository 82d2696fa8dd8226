"""What a pretraining run will take, before it is started: parameters, memory, tokens and time (pretrain.py --plan)."""

import math
import os
import re
import time
from pathlib import Path

import torch

from common.config import ConfigError
from common.memory import activation_bytes, count_parameters, loss_bytes, stage_memory
from common.tables import format_table
from model import ModelConfig
from tokenizer import MODEL_FILE, Tokenizer

# By the name that the driver gives a GPU, or a part of it: dense TFLOP/s in bfloat16 with float32 sums unless said,
# TB/s of its memory, GB, and a name for people. From NVIDIA's data sheets and architecture papers; sheets that give
# TFLOP/s "with sparsity" give twice as much. Of the 3060 and the laptop twice the float32 rate is taken, as their
# kin has it in the GA102 and Ada papers; a laptop reaches it where it may draw enough power.
CARDS = {
    "RTX 3060": (25.5, 0.360, 12, "RTX 3060 12 GB"),
    "RTX 4060 Laptop": (29.1, 0.256, 8, "RTX 4060 of a laptop, 8 GB"),
    "RTX 3090": (71, 0.936, 24, "RTX 3090"),
    "RTX 4090": (165.2, 1.008, 24, "RTX 4090"),
    "V100-SXM2": (15.7, 0.9, 16, "V100 SXM2, float32 (it has no bfloat16)"),
    "L40S": (362, 0.864, 48, "L40S"),
    "A100": (312, 2.039, 80, "A100 80 GB"),
    "H100 PCIe": (756, 2.0, 80, "H100 PCIe"),
    "H100 80GB HBM3": (989.4, 3.35, 80, "H100 SXM"),
    "H200": (989.4, 4.8, 141, "H200"),
    "B200": (2250, 8.0, 180, "B200"),
}
OTHERS = r"(?! Ti| Laptop| SUPER| D\b| NVL|.* MIG )"  # after a name: another card, or a slice of one
# What programs reach of these: large products (0.69 was measured on an H100), and kernels that only move numbers.
PRODUCTS, BANDWIDTH = 0.7, 0.75
HOST = 0.018  # seconds that a host takes to launch a micro-batch, however small: measured, compiled, beside an H100
SHARE = 0.4  # of a CPU's products that training reaches, about; 0.3 to 0.9 were measured on two threads
TRAFFIC = 282  # bytes of a token for each layer and number of its state
RESERVED = 1e9  # bytes of a GPU that CUDA itself, its libraries and gaps between tensors take, about
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
    """ConfigError for what cannot be trained here, instead of a machine that swaps until it is killed."""
    total = sum(count_parameters(shape).values())
    shards = env.world_size if config["parallel"] == "fsdp" else 1
    needed = total * 4 * (3 if config["optimizer"] == "muon" else 4) / shards  # weights, gradients, one state or two
    needed += total * 4 * (shards > 1)  # rank 0 evaluates a copy in one piece
    if needed > (has := machine_memory(env.device)):
        raise ConfigError(
            f"model: {total:,} parameters need {needed / 1e9:,.0f} GB with their gradients and the optimizer's state, "
            f"and {env.device} has {has / 1e9:,.0f} GB: choose a smaller model.dim, model.n_layers or vocabulary"
        )
    n_tokens, size = config["batch_size"] * config["seq_len"], torch.finfo(env.dtype).bits // 8
    kept = activation_bytes(shape, n_tokens, size, env.device.type == "cuda", config["recompute"])
    if kept > has:
        raise ConfigError(
            f"batch_size={config['batch_size']}: {n_tokens:,} tokens at once need {kept / 1e9:,.0f} GB for what the "
            f"backward pass reads, and {env.device} has {has / 1e9:,.0f} GB: choose a smaller one"
        )


def flops_per_token(shape: ModelConfig, seq_len: int) -> float:
    """Of forward and backward: 6 for each parameter that a token is multiplied with, and the attention.

    6 is a multiplication and an addition, once forward, twice backward. An embedding is looked up, not multiplied with,
    unless it is the output projection too. Attention takes 12 * n_layers * dim * T: two products (scores, values) of
    2 * dim * T, three times; a token sees half of the T on average.
    """
    counts = count_parameters(shape)
    multiplied = counts["trunk"] + (counts["embedding"] if shape.tied else counts["output"])
    return 6 * multiplied + 12 * shape.n_layers * shape.dim * seq_len / 2


def traffic_per_token(shape: ModelConfig, n_tokens: int) -> float:
    """Bytes that all but products and attention move on a GPU, in a micro-batch of n_tokens.

    The head's softmax reads and writes logits (14 bytes each); each chunk of 1,024 rows adds to the gradient of the
    projection; weights are cast and gradients added once; the rest grows with the width of the states. Within 8 % of a
    count of what every operator reads and writes without torch.compile, at 24m, 134m and 256m; compiled it is less.
    """
    V, D = shape.vocab_size, shape.dim
    head = 14 * V + V * D * (12 / 1024 + 54 / n_tokens)
    return head + TRAFFIC * shape.n_layers * D


def seconds_per_token(
    shape: ModelConfig, n_tokens: int, T: int, tflops: float, bandwidth: float
) -> tuple[float, float]:
    """(as fast as the products alone, with what is moved between them) on a GPU of these TFLOP/s and TB/s.

    A model. Of a compiled step on an H100 it has 0.90 to 1.11 times the speed, at all five sizes (docs/gpu.md).
    """
    products = flops_per_token(shape, T) / (PRODUCTS * tflops * 1e12)
    moved = traffic_per_token(shape, n_tokens) / (BANDWIDTH * bandwidth * 1e12)
    return products, max(products + moved, HOST / n_tokens)


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
        known = [tflops for part, (tflops, *_) in CARDS.items() if re.search(rf"\b{part}\b{OTHERS}", name)]
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
    B, n_tokens = config["batch_size"], T * config["batch_size"]
    columns = [stage_memory("pretrain", shape, config, on_gpu, B, T) for on_gpu in (False, True)]
    for column, on_gpu in zip(columns, (False, True), strict=True):
        del column["generation"]
        column["loss, were it in one piece"] = loss_bytes(shape, n_tokens, 2 if on_gpu else 4, on_gpu, "one piece")
    rows = [dict(part=part, cpu=columns[0][part] / 1e6, gpu=columns[1][part] / 1e6) for part in columns[0]]
    form = {"memory (MB)": "{part}", "CPU, float32": "{cpu:,.0f}", "GPU, bfloat16": "{gpu:,.0f}"}
    lines += ["", format_table(form, rows), ""]

    again = 4 / 3 if config["recompute"] else 1  # another forward beside one, and a backward of twice that
    peak = measured_peak()
    here = f"this CPU, {torch.get_num_threads()} threads, {SHARE:.0%} of {peak / 1e9:,.0f} GFLOP/s measured"
    rows = [dict(on=here, share="", least=peak * SHARE / flops / again, most="", fits="")]
    for tflops, bandwidth, gigabytes, name in CARDS.values():
        most, least = (1 / seconds / again for seconds in seconds_per_token(shape, n_tokens, T, tflops, bandwidth))
        kind = columns[0 if "float32" in name else 1]
        fits = "yes" if kind["peak"] + RESERVED < gigabytes * 1e9 else "batch_size is too large"
        share = f"{least * flops / tflops / 1e12:.0%} of {tflops} TFLOP/s"
        rows.append(dict(on=name, share=share, least=least, most=f"{most:,.0f}", fits=fits))
    for row in rows:
        row["time"] = duration(tokens / row["least"])
    form = {"on": "{on}", "tokens/s": "{least:,.0f}", "of the peak": "{share}", "time": "{time}"}
    form |= {"by products alone (tokens/s)": "{most}", "fits its memory": "{fits}"}
    lines.append(format_table(form, rows))
    lines.append("GPUs: modelled with torch.compile, the default there; docs/gpu.md has what an H100 measured.")
    return "\n".join(lines)
