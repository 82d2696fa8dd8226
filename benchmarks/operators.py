"""Where the time of a training step goes on this CPU: each operator's beside the least that it could take.

For products and attention that is their floating-point operations at the speed of large matrix products; for what only
reads and writes, its operands' bytes at the speed of a copy. What is below 1 % of the step stands together in a line.

    python benchmarks/operators.py
    python benchmarks/operators.py --shape=demo --optimizer=muon

in:  nothing
out: a table and, last, one line of JSON: milliseconds of the step, the least of it, and the share of both
"""

import math
import time

import torch
from harness import argument_parser, launch, print_figures
from torch.profiler import ProfilerActivity, profile
from train import SHAPES, make_ours

from common.plan import measured_peak
from common.tables import format_table
from model import ModelConfig

# floating-point operations of operators that multiply matrices, from the shapes of their arguments
FLOPS = {
    "aten::mm": lambda a, b, *_: 2 * math.prod(a) * b[-1],
    "aten::bmm": lambda a, b, *_: 2 * math.prod(a) * b[-1],
    "aten::addmm_": lambda c, a, b, *_: 2 * math.prod(a) * b[-1],
    "aten::baddbmm": lambda c, a, b, *_: 2 * math.prod(a) * b[-1],
    # causal: half of the pairs; scores and sum forward, scores again and four products backward
    "aten::_scaled_dot_product_flash_attention_for_cpu": lambda q, *_: 2 * math.prod(q) * q[-2],
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": lambda g, *_: 5 * math.prod(g) * g[-2],
}
LEAST_SHARE = 0.01  # of the step, for a line of its own


def copy_speed(numel=2**25, repeats=5):
    """Bytes a second that a copy of 128 MB reads and writes."""
    a, b, best = torch.zeros(numel), torch.zeros(numel), math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        b.copy_(a)
        best = min(best, time.perf_counter() - start)
    return 8 * numel / best


def floor_seconds(event, peak, bandwidth):
    """The least that a call of this operator could take."""
    shapes = [shape for shape in event.input_shapes if shape]
    if event.key in FLOPS:
        return FLOPS[event.key](*shapes) / peak
    numels = [math.prod(shape) for shape in shapes]
    return 4 * (sum(numels) + max(numels, default=0)) / bandwidth  # and a result as large as the largest


def profile_step(shape, optimizer, steps=5):
    """[operator with its shapes], all of `steps` steps, and the seconds of one."""
    arguments, B, T = SHAPES[shape]
    config = ModelConfig(**arguments)
    step = make_ours(config, optimizer)
    ids = torch.randint(3, config.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        step(ids)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        start = time.perf_counter()
        for _ in range(steps):
            step(ids)
        seconds = (time.perf_counter() - start) / steps
    return profiler.key_averages(group_by_input_shape=True), seconds, steps


def rows_of(events, seconds, steps, peak, bandwidth):
    """Rows of operators by shape where they take long, else of all shapes, else of all that is left."""
    rows = {}
    for event in events:
        own = event.self_cpu_time_total / 1e6 / steps
        calls = event.count / steps
        least = min(own, calls * floor_seconds(event, peak, bandwidth)) if event.key.startswith("aten::") else 0.0
        shapes = " ".join("×".join(map(str, shape)) for shape in event.input_shapes[:3] if shape)
        name = event.key.removeprefix("aten::")
        add(rows, (name, shapes if own >= LEAST_SHARE * seconds else ""), calls, own, least)
    merged = {}
    for key, (calls, own, least) in rows.items():
        add(merged, key if own >= LEAST_SHARE * seconds else ("everything else", ""), calls, own, least)
    ordered = sorted(merged.items(), key=lambda item: -item[1][1])
    return [
        dict(
            name=name,
            shapes=shapes,
            calls=calls,
            ms=1e3 * own,
            share=own / seconds,
            least=1e3 * least,
            ratio=least / own,
        )
        for (name, shapes), (calls, own, least) in ordered
    ]


def add(rows, key, *numbers):
    rows[key] = [a + b for a, b in zip(rows.get(key, [0.0] * len(numbers)), numbers, strict=True)]


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="tiny-llama2-24m")
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw")
    options = parser.parse_args()
    peak, bandwidth = measured_peak(2048, seconds=2), copy_speed()
    events, seconds, steps = profile_step(options.shape, options.optimizer)
    rows = rows_of(events, seconds, steps, peak, bandwidth)
    least = sum(row["least"] for row in rows)
    columns = {
        "operator": "{name}", "arguments": "{shapes}", "calls": "{calls:.0f}", "ms": "{ms:.1f}",
        "of the step": "{share:.1%}", "least ms": "{least:.1f}", "of the time": "{ratio:.0%}",
    }  # fmt: skip
    print(f"{torch.get_num_threads()} threads; products {peak / 1e9:,.0f} GFLOP/s, copies {bandwidth / 1e9:,.1f} GB/s")
    print(format_table(columns, rows))
    print_figures(dict(step_ms=1e3 * seconds, least_ms=least, share_of_least=least / 1e3 / seconds), 3)


if __name__ == "__main__":
    launch(main)
