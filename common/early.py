"""Ctrl-C while modules are still being imported, which takes seconds, or none to import: one line.

A script imports this before torch.
"""

import importlib.util
import os
import signal
import sys

import __main__


def leave(*_) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)  # an exception could be swallowed by an import of C code


def is_ours() -> bool:
    """Whether a script of this project is run, and not another program that imports it."""
    if sys.argv[:1] == ["-m"]:  # python -m imports the package first: there is no __main__ yet
        return "tokenizer.train" in sys.orig_argv
    root = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    folder = os.path.dirname(os.path.realpath(getattr(__main__, "__file__", os.sep)))
    return folder in (root, *(os.path.join(root, name) for name in ("alignment", "common", "corpora", "tokenizer")))


if is_ours() and importlib.util.find_spec("torch") is None:
    ours = ". .venv/bin/activate" if os.path.exists(".venv") else "pip install -r requirements.txt"
    print(f"error: {sys.executable} has no torch: {ours}", file=sys.stderr)
    sys.exit(2)

# where a shell ignores it, for what runs in the background, that stays so
if is_ours() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, leave)
