"""Whether training survives kill -9: a small pretraining run, killed at random moments and resumed until it ends, has
to give the metrics, samples, weights and optimizer state of one that was left alone, to the last bit.

Half of the kills come at any time from the start of Python on, half while a checkpoint is being written. After a
quarter of them ckpt.pt is cut short too, as a loss of power may leave it, if there is an older one. --seed draws the
moments; what the process is doing then depends on the machine.

    python benchmarks/kill_resume.py --tries=20

in:  nothing; text is made up, a tokenizer and data are made of it by the scripts of the project
out: a line a trial and, last, one line of JSON on standard output; exit code 1 if a trial differed
"""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from harness import ROOT, argument_parser, flags, launch, print_figures, run_python

from common import checkpoint
from common.checkpoint_file import older
from common.metrics import read_metrics
from dataset.formats import OURS

STEPS = 40
SAVING = 0.1  # seconds in which a kill falls after a save has begun; a save takes about as long
MOST_KILLS = 3  # in a trial
OPTIONS = {
    "model.dim": 192, "model.n_layers": 3, "model.n_heads": 4, "model.n_kv_heads": 4, "model.max_seq_len": 64,
    "model.dropout": 0.1, "seq_len": 64, "batch_size": 4, "grad_accumulation_steps": 1, "max_steps": STEPS,
    "warmup_steps": 5, "eval_interval": 20, "save_interval": 3, "log_interval": 1, "sample_prompts": "天",
    "sample_tokens": 8, "device": "cpu",
}  # fmt: skip
# waiting threads that sleep leave the processor to others
ENVIRONMENT = dict(OMP_NUM_THREADS="2", OMP_WAIT_POLICY="passive", PYTHONPATH=str(ROOT))


def make_data(folder, rng):
    """A thousand documents of made-up words, a tokenizer and token files of them; the options that name both."""
    characters = [chr(code) for code in range(0x4E00, 0x4E00 + 200)]
    words = ["".join(rng.choices(characters, k=2)) for _ in range(400)]
    lines = ["".join(rng.choices(words, k=rng.randint(20, 60))) for _ in range(1000)]
    (folder / "text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = [json.dumps(dict(text=line), ensure_ascii=False) + "\n" for line in lines]
    (folder / "text.jsonl").write_text("".join(rows), encoding="utf-8")
    tokenizer, data = f"{folder}/tokenizer", f"{folder}/data"
    vocabulary = flags(input=folder / "text.txt", vocab_size=600, out=tokenizer)
    run_python("-m", "tokenizer.train", *vocabulary, **ENVIRONMENT)
    sources = dict(sources=f"made_up:text_rows={folder}/text.jsonl", parts="pretrain", val_share=0.05)
    run_python(ROOT / "data_process.py", *flags(tokenizer=tokenizer, out=data, **sources), **ENVIRONMENT)
    return flags(tokenizer=tokenizer, data=data, **OPTIONS)


def last_step(out):
    rows = read_metrics(out / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0


def wait_until_killed(process, out, rng, seconds):
    """Kill it at a random moment of the `seconds` it would take, or in a random save; what it did, None if it ended."""
    began = time.perf_counter()
    saving = f"{checkpoint.FILE_NAME}.*.{OURS}"
    delay = rng.uniform(0, seconds)
    if rng.random() < 0.5:
        step, delay = rng.uniform(last_step(out), STEPS), rng.uniform(0, SAVING)
        while process.poll() is None and not (any(out.glob(saving)) and last_step(out) >= step):
            time.sleep(0.002)
        began = time.perf_counter()
    while process.poll() is None and time.perf_counter() < began + delay:
        time.sleep(0.002)
    process.kill()
    if process.wait() == 0:
        return None
    return f"step {last_step(out)}" + (" saving" if any(out.glob(saving)) else "")


def cut_short(path):
    """Leave half of the newest checkpoint, if there is another file to go on from; whether it did."""
    others = [file for file in older(path) if not file.samefile(path)] if path.exists() else []
    if others:
        os.truncate(path, path.stat().st_size // 2)
    return bool(others)


def tensors(value):
    """All tensors in nested dicts and lists, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from tensors(inner)


def outcome(out):
    """What two runs must have in common: metrics without the seconds, samples, weights, optimizer and random states."""
    rows = read_metrics(out / "metrics.jsonl")
    for row in rows:
        del row["seconds"]
    ckpt, digest = checkpoint.load(out), hashlib.sha256()
    for tensor in tensors([ckpt.weights, ckpt.training]):
        digest.update(tensor.numpy().tobytes())
    return dict(metrics=rows, samples=(out / "samples.txt").read_bytes(), step=ckpt.step, state=digest.hexdigest())


def trial(command, out, rng, seconds):
    """Kill and resume one to MOST_KILLS times, then let it end; what each kill met."""
    command = [*command, f"--out={out}", "--resume"]
    silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    kills, wanted = [], rng.randint(1, MOST_KILLS)
    while len(kills) < wanted:
        process = subprocess.Popen([sys.executable, *command], env=os.environ | ENVIRONMENT, **silent)
        met = wait_until_killed(process, out, rng, seconds)
        if met is not None:
            kills.append(met + (", cut short" if rng.random() < 0.25 and cut_short(out / checkpoint.FILE_NAME) else ""))
        elif kills:
            break
        else:  # it ended before the first kill: once more
            shutil.rmtree(out)
    run_python(*command, **ENVIRONMENT)
    return kills


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("--tries", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    survived, kills = 0, []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        command = [ROOT / "pretrain.py", *make_data(folder, random.Random(options.seed))]
        began = time.perf_counter()
        run_python(*command, f"--out={folder / 'whole'}", **ENVIRONMENT)
        seconds = time.perf_counter() - began
        expected = outcome(folder / "whole")
        size = checkpoint.find(folder / "whole").stat().st_size
        print(f"uninterrupted: {seconds:.1f} s, {STEPS} steps, a checkpoint of {size / 1e6:.0f} MB", flush=True)
        for number in range(1, options.tries + 1):
            out = folder / f"trial{number}"
            met = trial(command, out, random.Random(f"{options.seed} {number}"), seconds)
            found = outcome(out)
            different = [name for name, value in expected.items() if found[name] != value]
            survived += not different
            kills += met
            verdict = f"differs in {', '.join(different)}" if different else "the same to the last bit"
            print(f"trial {number}: killed at {'; '.join(met)}; {verdict}", flush=True)
    counts = {name.replace(" ", "_"): sum(name in met for met in kills) for name in ("saving", "cut short")}
    print_figures(dict(survived=survived, tried=options.tries, kills=len(kills)) | counts)
    return survived < options.tries


if __name__ == "__main__":
    launch(main)
