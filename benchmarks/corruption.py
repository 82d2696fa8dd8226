"""Whether damaged files are noticed by the stages that use them, and whether any crashes Python.

A bit is flipped somewhere in a checkpoint (float32, int8), sft.pkl, train.*.bin, meta.json or tokenizer.model; then
the script that reads the file runs: eval_generate.py, sft.py or pretrain.py, for a step. A flip is `detected` if it
ends in one line that names the file, `harmless` if all that it makes, and all that the project's functions read from
the file, is the same as without; otherwise it is silent, a traceback, a crash, or a line that names nothing. Besides,
.pkl files and tokenizers with bytes changed, cut out and put in are read. Each kind runs in processes of its own, so
that a crash is seen.

    python benchmarks/corruption.py --flips=100 --fuzzed_pkl=3000 --fuzzed_tokenizers=2000

in:  nothing; text is made up, everything else is made of it by the scripts of the project
out: a line a kind and, last, one line of JSON on standard output; exit code 1 unless all are detected or harmless
"""

import contextlib
import hashlib
import io
import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from harness import ROOT, argument_parser, flags, launch, print_figures, run_python

import eval_generate
import pretrain
import sft
from common import checkpoint
from common.config import run
from dataset.batches import load_pairs, load_prompts, load_tasks
from dataset.corpus import Corpus
from dataset.formats import load_pkl
from tokenizer import Tokenizer

VOCAB = 600
GOOD = ("detected", "harmless", "read")
RUN = dict(max_steps=1, warmup_steps=0, log_interval=1, device="cpu", overwrite=True)
SHAPE = {f"model.{key}": n for key, n in dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=64).items()}


def make_world(folder):
    """A tokenizer, data of all parts, a run of pretrain.py and its int8 copy; small, as a flip tells no size."""
    rng = random.Random(1)
    characters = [chr(code) for code in range(0x4E00, 0x4E00 + 200)]
    texts = ["".join(rng.choices(characters, k=rng.randint(20, 60))) for _ in range(300)]
    (folder / "text.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    answered = [(text[:8], text[8:20]) for text in texts]
    rows = dict(
        text_rows=[dict(text=text) for text in texts],
        alpaca=[dict(instruction=question, output=answer) for question, answer in answered],
        pairs=[dict(prompt=question, chosen=answer, rejected=answer[::-1]) for question, answer in answered],
        prompts=[dict(prompt=question, answer=answer) for question, answer in answered],
    )
    for layout, those in rows.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in those)
        (folder / f"{layout}.jsonl").write_text(lines, encoding="utf-8")
    run_python("-m", "tokenizer.train", *flags(input=folder / "text.txt", vocab_size=VOCAB, out=folder / "tokenizer"))
    sources = ",".join(f"{layout}={folder}/{layout}.jsonl" for layout in rows)
    options = dict(sources=sources, parts="pretrain,sft,rm,prompts", tokenizer=folder / "tokenizer", val_share=0.1)
    run_python(ROOT / "data_process.py", *flags(**options, max_seq_len=64, out=folder / "data"))
    run_python(ROOT / "pretrain.py", *pretrain_options(folder, "pretrain"))
    options = dict(init_from=folder / "pretrain", data=folder / "data", eval_tokens=0, sample_tokens=2, device="cpu")
    run_python(ROOT / "quantize.py", *flags(**options, out=folder / "int8"))


def pretrain_options(folder, out):
    options = RUN | SHAPE | dict(seq_len=32, batch_size=2, grad_accumulation_steps=1, sample_tokens=2)
    return flags(**options, tokenizer=folder / "tokenizer", data=folder / "data", out=folder / out)


# the stages that use the files; each returns all that it made or read


def pretrained(folder):
    with quietly():
        pretrain.main(pretrain_options(folder, "trial"))
    corpora = [Corpus(folder / "data", split) for split in ("train", "val")]
    return [contents(folder / "trial"), *(corpus.read(0, len(corpus)) for corpus in corpora)]


def tuned(folder):
    options = RUN | dict(batch_size=4, grad_accumulation_steps=1, eval_prompts=4, eval_new_tokens=2)
    with quietly():
        sft.main(flags(**options, init_from=folder / "pretrain", data=folder / "data", out=folder / "trial"))
    return [contents(folder / "trial"), load_pkl(folder / "data" / "sft.pkl")]


def answered(run_dir):
    def use(folder):
        with quietly():
            options = dict(ckpt=folder / run_dir, prompt="一", temperature=0, max_new_tokens=2, device="cpu")
            eval_generate.main(flags(**options))
        return contents(folder / run_dir)

    return use


def contents(run_dir):
    """A checkpoint without what tells when and where it was made."""
    found = asdict(checkpoint.load(run_dir))
    return {key: value for key, value in found.items() if key not in ("path", "git_commit")}


FLIPPED = {
    "checkpoint_float32": ("pretrain/ckpt.pt", answered("pretrain")),
    "checkpoint_int8": ("int8/ckpt.pt", answered("int8")),
    "pkl": ("data/sft.pkl", tuned),
    "bin": ("data/train.text_rows.bin", pretrained),
    "meta": ("data/meta.json", pretrained),
    "tokenizer": ("tokenizer/tokenizer.model", pretrained),
}


def read_sft(path):
    return load_tasks(path, VOCAB)


def read_tokenizer(path):
    tok = Tokenizer.load(path)
    return tok.decode(tok.encode("一 two\n三")), tok.decode(range(tok.n_pieces))


FUZZED = {
    "sft.pkl": ("data/sft.pkl", read_sft),
    "rm.pkl": ("data/rm.pkl", lambda path: load_pairs(path, VOCAB)),
    "prompts.pkl": ("data/prompts.pkl", lambda path: load_prompts(path, VOCAB)),
    "tokenizers": ("tokenizer/tokenizer.model", read_tokenizer),
}


# what became of it


def quietly():
    return contextlib.redirect_stdout(io.StringIO())


def digest(value):
    """A hash of nested dicts, lists, tensors, arrays and plain values."""
    if isinstance(value, torch.Tensor):
        value = value.contiguous().flatten().view(torch.uint8).numpy() if value.numel() else str(value.shape)
    if isinstance(value, np.ndarray):
        return hashlib.sha256(f"{value.dtype} {value.shape} ".encode() + value.tobytes()).hexdigest()
    if isinstance(value, dict):
        value = [digest(each) for pair in value.items() for each in pair]
    elif isinstance(value, list | tuple):
        value = [digest(each) for each in value]
    return hashlib.sha256(repr(value).encode()).hexdigest()


def outcome(use, path, argument):
    """(what became of reading the damaged file at `path`, what was made of it): "read" is not judged yet."""
    errors, found = io.StringIO(), []
    try:
        with contextlib.redirect_stderr(errors):
            run(lambda: found.append(use(argument)))
    except SystemExit:
        line = errors.getvalue().splitlines()[-1]
        return ("detected" if path.name in line or str(path.parent) in line else f"unnamed: {line}"), None
    except Exception as error:
        return f"traceback: {type(error).__name__}: {error}", None
    return "read", found[0]


def flip(content, rng):
    damaged = bytearray(content)
    damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def fuzz(content, rng):
    """Bits, bytes and runs of bytes changed, cut out, put in or copied, at one place to sixteen."""
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at, n = rng.randrange(len(damaged)), rng.randint(1, 8)
        other = rng.randrange(len(damaged))
        damaged[at : at + rng.choice((0, n))] = rng.choice((b"", rng.randbytes(n), damaged[other : other + n]))
    return flip(damaged, rng) if rng.random() < 0.5 else bytes(damaged)


def worker_flips(folder, kind, first, last):
    """Print what became of each flip of one kind of file."""
    folder, (name, use) = Path(folder), FLIPPED[kind]
    path, expected = folder / name, digest(use(folder))
    content = path.read_bytes()
    try:
        for i in range(first, last):
            path.write_bytes(flip(content, random.Random(f"{kind} {i}")))
            what, found = outcome(use, path, folder)
            if what == "read":
                what = "harmless" if digest(found) == expected else "silent"
            print(what.replace("\n", " "), flush=True)
    finally:
        path.write_bytes(content)


def worker_fuzz(folder, kind, first, last):
    """Print what became of reading each fuzzed file of one kind."""
    name, use = FUZZED[kind]
    content, path = (Path(folder) / name).read_bytes(), Path(folder) / f"fuzzed.{Path(name).name}"
    for i in range(first, last):
        path.write_bytes(fuzz(content, random.Random(f"{kind} {i}")))
        what, _ = outcome(use, path, path)
        print(what.replace("\n", " "), flush=True)


def survey(worker, folder, kind, n):
    """{what became of it: how many} of n trials; a process that dies costs the trial that killed it."""
    found = []
    while len(found) < n:
        arguments = json.dumps([str(folder), kind, len(found), n])
        command = [sys.executable, __file__, "--worker", worker.__name__, arguments]
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", env=os.environ | dict(OMP_NUM_THREADS="1")
        )
        found += done.stdout.splitlines()
        if done.returncode > 0:
            raise SystemExit(f"{kind}: {done.stderr[-2000:]}")
        if done.returncode < 0:
            found.append(f"crash: signal {-done.returncode}")
    for i, what in enumerate(found):
        if what not in GOOD:
            print(f"{kind} {i}: {what[:300]}", file=sys.stderr)
    return Counter(what.partition(":")[0] for what in found)


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("--flips", type=int, default=100, help="of each kind of file")
    parser.add_argument("--fuzzed_pkl", type=int, default=3000)
    parser.add_argument("--fuzzed_tokenizers", type=int, default=2000)
    options, figures, bad = parser.parse_args(), {}, 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_world(folder)
        wanted = [(worker_flips, kind, options.flips) for kind in FLIPPED]
        wanted += [(worker_fuzz, kind, options.fuzzed_pkl // 3) for kind in FUZZED if kind.endswith(".pkl")]
        for worker, kind, n in [*wanted, (worker_fuzz, "tokenizers", options.fuzzed_tokenizers)]:
            found = survey(worker, folder, kind, n)
            bad += sum(count for what, count in found.items() if what not in GOOD)
            print(f"{kind}: {n} {'flips' if worker is worker_flips else 'fuzzed'}: {dict(found)}", flush=True)
            name = ("flipped_" if worker is worker_flips else "fuzzed_") + kind.replace(".", "_")
            figures |= {f"{name}_{what}": count for what, count in found.items()}
    print_figures(figures | dict(bad=bad))
    return bad > 0


if __name__ == "__main__":
    launch(main)
