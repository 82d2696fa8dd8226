"""A training step beside a plain Hugging Face loop: tokens a second, memory, and what share of the machine's matrix
product speed the step reaches; then, by benchmarks/parallel.py, two processes beside one.

Ours is also measured by torch.compile where a C++ compiler is there, and, on a CPU that multiplies bfloat16 in
hardware, with products in it, beside their float32 loop.
All train the same shape on the same random tokens with AdamW, each in a process of its own, in turns; of the speeds
the best round counts. A step's floating-point operations are those of its matrix products (common/plan.py).

    python benchmarks/train.py
    python benchmarks/train.py --losses

in:  transformers (requirements-dev.txt)
out: a table and, last, one line of JSON on standard output
"""

import platform
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import argument_parser, fastest, hf_config, launch, print_figures, read_figures, run_python, take_turns

from common.distributed import compiled, compiled_chunk, missing_to_compile, setup
from common.optim import build_optimizer
from common.plan import flops_per_token, measured_peak
from common.progress import peak_memory_gb
from common.tables import format_table
from configs.demo.pretrain import config as demo
from configs.pretrain import config as defaults
from configs.sizes import sizes
from head import LinearCrossEntropy
from model import Llama, ModelConfig

SHAPES = {
    "tiny-llama2-24m": (sizes["tiny-llama2-24m"], 4, 512),
    "demo": (demo["model"] | dict(vocab_size=6144), demo["batch_size"], demo["seq_len"]),
}
PARALLEL = Path(__file__).with_name("parallel.py")
SECONDS = 12  # of steps in one round, after two that warm up


def make_ours(config, optimizer="adamw", dtype="float32", compile=False):
    """A step function of our model, with the optimizer and the precision that pretrain.py would take."""
    env, model = setup("cpu", dtype), Llama(config)
    compiled(model, env, dict(compile=compile))
    optimizer = build_optimizer(model, defaults | dict(optimizer=optimizer))

    def step(ids):
        with env.autocast():
            loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        finish(model, optimizer)

    return step


def make_hf(config):
    """The loop one finds in tutorials: LlamaForCausalLM computes its own loss, torch's AdamW as it comes."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(hf_config(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)

    def step(ids):
        model(input_ids=ids[:, :-1], labels=ids[:, :-1], use_cache=False).loss.backward()
        finish(model, optimizer)

    return step


def compare_losses(shape, repeats=3):
    """Milliseconds of output projection and loss with their gradients: in one piece, torch's in chunks, ours."""
    arguments, B, T = SHAPES[shape]
    config = ModelConfig(**arguments)
    V, D = config.vocab_size, config.dim
    h, W = torch.randn(B * T, D).requires_grad_(), torch.randn(V, D).mul_(0.02).requires_grad_()
    targets, weights = torch.randint(0, V, (B * T,)), torch.full((B * T,), 1 / (B * T))
    losses = {
        "one piece": lambda: F.cross_entropy(h @ W.T, targets),
        "ours": lambda: LinearCrossEntropy.apply(h, W, targets, weights),
    }
    if missing_to_compile(torch.device("cpu")) is None:
        chunk = compiled_chunk()
        losses["ours, its softmax compiled"] = lambda: LinearCrossEntropy.apply(h, W, targets, weights, chunk)
    if hasattr(F, "linear_cross_entropy"):  # not in torch 2.11
        chunked = torch.nn.LinearCrossEntropyOptions()
        losses["torch's linear_cross_entropy"] = lambda: F.linear_cross_entropy(h, W, targets, options=chunked)

    def seconds(loss):
        start = time.perf_counter()
        loss().backward()
        return time.perf_counter() - start

    found = take_turns({name: (loss,) for name, loss in losses.items()}, repeats, seconds)
    return {name: round(1000 * min(times), 1) for name, times in found.items()}


def finish(model, optimizer):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def cpu_name():
    """As Linux names it, else as Python does; and the instructions that torch uses."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"


def measure_peak():
    """Floating-point operations a second of large matrix products."""
    return dict(rate=measured_peak(2048, seconds=2))


def measure_step(kind, shape):
    """Tokens a second, their floating-point operations, and the peak memory of this process."""
    arguments, B, T = SHAPES[shape]
    config = ModelConfig(**arguments)
    step = KINDS[kind][1](config)
    ids = torch.randint(3, config.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        step(ids)
    start, steps = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        step(ids)
        steps += 1
    rate = steps * B * T / (time.perf_counter() - start)
    return dict(rate=rate, flops=rate * flops_per_token(config, T), megabytes=peak_memory_gb() * 1e9 / 2**20)


# a program's name and what makes its step
KINDS = {
    "hf": ("Hugging Face", make_hf),
    "ours": ("ours", make_ours),
    "compiled": ("ours, compiled", partial(make_ours, compile=True)),
    "bfloat16": ("ours, bfloat16", partial(make_ours, dtype="bfloat16")),
    "bfloat16_compiled": ("ours, bfloat16, compiled", partial(make_ours, dtype="bfloat16", compile=True)),
}


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--losses", action="store_true", help="only the loss, beside torch's own")
    options = parser.parse_args()
    if options.losses:
        print_figures({shape: compare_losses(shape) for shape in SHAPES})
        return
    has_bfloat16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    can_compile = missing_to_compile(torch.device("cpu")) is None
    kinds = [k for k in KINDS if (has_bfloat16 or "bfloat16" not in k) and (can_compile or "compiled" not in k)]
    jobs = {}
    for shape in SHAPES:
        jobs |= {(kind, shape): (measure_step, kind, shape) for kind in kinds}
        jobs["peak", shape] = (measure_peak,)
    best = fastest(jobs, options.rounds)
    peak = max(best.pop(("peak", shape))["rate"] for shape in SHAPES)
    rows, ratios = [], {}
    for (kind, shape), found in best.items():
        ratio = ratios[kind, shape] = found["rate"] / best["hf", shape]["rate"]
        rows.append(found | dict(shape=shape, name=KINDS[kind][0], ratio=ratio, share=found["flops"] / peak))
    columns = {
        "shape": "{shape}",
        "": "{name}",
        "tokens/s": "{rate:,.0f}",
        "of Hugging Face's": "{ratio:.2f}",
        "peak memory (MB)": "{megabytes:,.0f}",
        "of float32's matrix product peak": "{share:.1%}",
    }
    print(f"{torch.get_num_threads()} threads; matrix product peak {peak / 1e9:,.0f} GFLOP/s")
    print(format_table(columns, rows))
    ours, hf = (best[kind, "tiny-llama2-24m"] for kind in ("ours", "hf"))
    figures = dict(
        cpu=cpu_name(),
        tokens_per_s_ratio_hf=ratios["ours", "tiny-llama2-24m"],
        peak_memory_ratio_hf=ours["megabytes"] / hf["megabytes"],
        fraction_of_matmul_peak=ours["flops"] / peak,
        demo_tokens_per_s_ratio_hf=ratios["ours", "demo"],
    )
    for kind in kinds[2:]:
        figures[f"{kind}_tokens_per_s_ratio_hf"] = ratios[kind, "tiny-llama2-24m"]
        figures[f"demo_{kind}_tokens_per_s_ratio_hf"] = ratios[kind, "demo"]
    out = run_python(PARALLEL)
    print(out)
    print_figures(figures | read_figures(out), 4)


if __name__ == "__main__":
    launch(main)
