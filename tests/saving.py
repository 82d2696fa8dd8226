"""Checkpoints of a tiny model, saved one after the other, cut short and counted: what tests of saving share."""

import os
import signal
import sys
from pathlib import Path

import torch

from common.checkpoint import load, save
from model import Llama, ModelConfig

TOKENIZER = bytes(range(256))
CONFIG = dict(out="", lr=1e-3, max_steps=10, betas=(0.9, 0.95), model=dict(dim=16), resume=False, overwrite=False)


def tiny(**changes) -> Llama:
    torch.manual_seed(0)
    config = dict(dim=16, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=48, max_seq_len=16) | changes
    return Llama(ModelConfig(**config))


def write(path: Path, model=None, **changes) -> Path:
    """Save a checkpoint of a tiny model, with `changes` to the arguments of `save`."""
    arguments = dict(stage="sft", step=7, tokens_seen=700, tokenizer=TOKENIZER, config=CONFIG | {"out": str(path)})
    save(path, model=model or tiny(), **arguments | changes)
    return path


def run_config(out: Path, **changes) -> dict:
    return CONFIG | {"out": str(out)} | changes


def steps(out: Path) -> dict[str, int]:
    """{file name: step} of all checkpoints in a run directory."""
    return {file.name: load(file).step for file in sorted(out.glob("*.pt"))}


def save_steps(out: Path, *numbers: int, keep_last: int = 2) -> None:
    for step in numbers:
        write(out, step=step, keep_last=keep_last)


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(load(path).weights["norm.weight"].numpy().tobytes())] ^= 1
    path.write_bytes(data)


FILE_EVENTS = {"open", "os.rename", "os.link", "os.remove"}


def killed_before(event: int, action, events=FILE_EVENTS, named=".pt") -> bool:
    """Run action() in a process that kills itself before its file operation number `event`; whether it came to that."""
    if (child := os.fork()) == 0:
        count = 0

        def kill(name, args):
            nonlocal count
            if name in events and named in str(args[0]):
                if count == event:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1

        sys.addaudithook(kill)  # called before the operation is done
        try:
            action()
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL
