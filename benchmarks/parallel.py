"""Two processes against one on the same batch: optimizer steps a second with DDP and with FSDP2, over gloo on a CPU.

Every process has one thread. Both sides compute the same step, of `--rows` rows: one process as two micro-batches, each
of two processes one of them. Two that exchange nothing show what the machine has to give: its cores may share caches
and memory, or be busy with other work. All take turns, --rounds times, and of each the best round counts.

    python benchmarks/parallel.py

out: a table and, last, one line of JSON on standard output
"""

import time

import torch
from harness import argument_parser, fastest, launch, measure, print_figures

from common import distributed
from common.optim import build_optimizer
from common.tables import format_table
from model import Llama, ModelConfig

WARM_UP = 2  # steps before the clock starts
# 9.6 million parameters, of which 1.6 million are embeddings
MODEL = dict(dim=256, n_layers=10, n_heads=8, n_kv_heads=8, vocab_size=6144, max_seq_len=256)
JOBS = {
    "1 process": (1, "none"),
    "2 processes, DDP": (2, "ddp"),
    "2 processes, FSDP2": (2, "fsdp"),
    "2 processes, nothing exchanged": (2, "none"),
}


def worker(parallel, rows, steps):
    """Optimizer steps a second, done as the stages do them, and the model's parameters; rank 0 tells."""
    env = distributed.setup("cpu", "float32")
    config = dict(parallel=parallel, optimizer="adamw", learning_rate=1e-3, beta1=0.9, beta2=0.95, weight_decay=0.1)
    model = Llama(ModelConfig(**MODEL))
    parameters = model.num_params()
    forward = model if parallel == "none" else distributed.wrap(model, env, config)
    optimizer = build_optimizer(model, config)
    accumulation, T = 2 // env.world_size, MODEL["max_seq_len"]
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            start = time.perf_counter()
        for micro in range(accumulation):
            ids = torch.randint(0, MODEL["vocab_size"], (rows // 2, T + 1))
            distributed.sync(forward, last=micro == accumulation - 1)
            loss = forward(ids[:, :-1], ids[:, 1:]) / accumulation
            loss.backward()
        distributed.clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - start
    distributed.cleanup(env)
    return dict(rate=steps / seconds, parameters=parameters) if env.is_main else None


def measure_group(processes, *arguments):
    """What the first of so many processes found."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return measure(worker, *arguments, launcher=launcher, OMP_NUM_THREADS="1")


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("--rows", type=int, default=32, help="rows of 256 tokens in a step, an even number")
    parser.add_argument("--steps", type=int, default=3, help="steps that are timed")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each")
    options = parser.parse_args()
    jobs = {name: (*job, options.rows, options.steps) for name, job in JOBS.items()}
    best = fastest(jobs, options.rounds, measure_group)
    parameters = best["1 process"]["parameters"]
    one, ddp, fsdp, free = (found["rate"] for found in best.values())
    print(f"{parameters:,} parameters, {options.rows * MODEL['max_seq_len']:,} tokens a step, one thread a process")
    rows = [dict(name=name, speedup=found["rate"] / one) | found for name, found in best.items()]
    print(format_table({"": "{name}", "steps/s": "{rate:.3f}", "speedup": "{speedup:.2f}"}, rows))
    figures = dict(ddp_speedup_2=ddp / one, fsdp_speedup_2=fsdp / one, free_speedup_2=free / one)
    print_figures(figures, 3)


if __name__ == "__main__":
    launch(main)
