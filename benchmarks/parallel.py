"""Two processes against one on the same batch: optimizer steps a second with DDP and with FSDP2, over gloo on a CPU.

Every process has one thread. Both sides compute the same step, of `--rows` rows: one process as two micro-batches, each
of two processes one of them. Two that exchange nothing show what the machine has to give: its cores may share caches
and memory, or be busy with other work. All take turns, --rounds times, and of each the best round counts.

    python benchmarks/parallel.py

out: a table and, last, one line of JSON on standard output
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import distributed
from common.optim import build_optimizer
from common.report import format_table
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
    """Seconds of `steps` optimizer steps as the stages do them; printed by rank 0."""
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
    if env.is_main:
        print(json.dumps(dict(seconds=seconds, parameters=parameters)))


def measure(processes, parallel, options):
    """Steps a second of one run, which is its own group of processes, and the model's parameters."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, __file__, "--worker", parallel, str(options.rows), str(options.steps)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    found = json.loads(result.stdout.splitlines()[-1])
    return options.steps / found["seconds"], found["parameters"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=32, help="rows of 256 tokens in a step, an even number")
    parser.add_argument("--steps", type=int, default=3, help="steps that are timed")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each")
    options = parser.parse_args()
    rates = {name: [] for name in JOBS}
    for _ in range(options.rounds):
        for name, job in JOBS.items():
            rate, parameters = measure(*job, options)
            rates[name].append(rate)
    best = {name: max(found) for name, found in rates.items()}
    one, ddp, fsdp, free = best.values()
    print(f"{parameters:,} parameters, {options.rows * MODEL['max_seq_len']:,} tokens a step, one thread a process")
    rows = [dict(name=name, rate=rate, speedup=rate / one) for name, rate in best.items()]
    print(format_table({"": "{name}", "steps/s": "{rate:.3f}", "speedup": "{speedup:.2f}"}, rows))
    figures = dict(ddp_speedup_2=ddp / one, fsdp_speedup_2=fsdp / one, free_speedup_2=free / one)
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], *map(int, sys.argv[3:]))
    else:
        main()
