"""A training step beside a plain Hugging Face loop: tokens a second, memory, and what share of the machine's matrix
product speed the step reaches; then, by benchmarks/parallel.py, two processes beside one.

Both train the same shape on the same random tokens with AdamW, each in a process of its own, in turns; of the speeds
the best round counts. A step's floating-point operations are those of its matrix products (common/plan.py).

    python benchmarks/train.py
    python benchmarks/train.py --losses

in:  transformers (requirements-dev.txt)
out: a table and, last, one line of JSON on standard output
"""

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import argument_parser, fastest, hf_config, launch, print_figures, read_figures, run_python, take_turns

from common.optim import build_optimizer
from common.plan import flops_per_token, measured_peak
from common.progress import peak_memory_gb
from common.tables import format_table
from configs.demo.pretrain import config as demo
from configs.pretrain import config as defaults
from configs.sizes import sizes
from model import LinearCrossEntropy, Llama, ModelConfig

SHAPES = {
    "tiny-llama2-24m": (sizes["tiny-llama2-24m"], 4, 512),
    "demo": (demo["model"] | dict(vocab_size=6144), demo["batch_size"], demo["seq_len"]),
}
PARALLEL = Path(__file__).with_name("parallel.py")
SECONDS = 12  # of steps in one round, after two that warm up


def make_ours(config, T, optimizer="adamw"):
    """A step function of our model, with the optimizer that pretrain.py would build."""
    model = Llama(config)
    optimizer = build_optimizer(model, defaults | dict(optimizer=optimizer))

    def step(ids):
        model(ids[:, :-1], ids[:, 1:]).backward()
        finish(model, optimizer)

    return step


def make_hf(config, T):
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


def measure_peak():
    """Floating-point operations a second of large matrix products."""
    return dict(rate=measured_peak(2048, seconds=2))


def measure_step(kind, shape):
    """Tokens a second, their floating-point operations, and the peak memory of this process."""
    arguments, B, T = SHAPES[shape]
    config = ModelConfig(**arguments)
    step = (make_ours if kind == "ours" else make_hf)(config, T)
    ids = torch.randint(3, config.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        step(ids)
    start, steps = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        step(ids)
        steps += 1
    rate = steps * B * T / (time.perf_counter() - start)
    return dict(rate=rate, flops=rate * flops_per_token(config, T), megabytes=peak_memory_gb() * 1e9 / 2**20)


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--losses", action="store_true", help="only the loss, beside torch's own")
    options = parser.parse_args()
    if options.losses:
        print_figures({shape: compare_losses(shape) for shape in SHAPES})
        return
    jobs = {}
    for shape in SHAPES:
        jobs |= {(kind, shape): (measure_step, kind, shape) for kind in ("hf", "ours")}
        jobs["peak", shape] = (measure_peak,)
    best = fastest(jobs, options.rounds)
    peak = max(best.pop(("peak", shape))["rate"] for shape in SHAPES)
    names = dict(hf="Hugging Face", ours="ours")
    rows = [
        dict(shape=shape, name=names[kind], share=found["flops"] / peak) | found
        for (kind, shape), found in best.items()
    ]
    columns = {
        "shape": "{shape}",
        "": "{name}",
        "tokens/s": "{rate:,.0f}",
        "peak memory (MB)": "{megabytes:,.0f}",
        "of the matrix product peak": "{share:.1%}",
    }
    print(f"{torch.get_num_threads()} threads; matrix product peak {peak / 1e9:,.0f} GFLOP/s")
    print(format_table(columns, rows))
    ours, hf = (best[kind, "tiny-llama2-24m"] for kind in ("ours", "hf"))
    figures = dict(
        tokens_per_s_ratio_hf=ours["rate"] / hf["rate"],
        peak_memory_ratio_hf=ours["megabytes"] / hf["megabytes"],
        fraction_of_matmul_peak=ours["flops"] / peak,
        demo_tokens_per_s_ratio_hf=best["ours", "demo"]["rate"] / best["hf", "demo"]["rate"],
    )
    out = run_python(PARALLEL)
    print(out)
    print_figures(figures | read_figures(out), 4)


if __name__ == "__main__":
    launch(main)
