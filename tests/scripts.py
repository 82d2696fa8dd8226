"""The scripts of runs/ as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

from chains import ROOT

VARIABLES = "RECIPE SIZE SMOKE SPLIT WORLD_SIZE VOCAB TOKENIZER SOURCES HUB QUESTIONS".split()


def shell(script, *arguments, cwd=ROOT, **environment):
    """Run a script of runs/ with these variables alone, in the environment of the tests and without a network."""
    env = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    env |= dict(VIRTUAL_ENV=sys.prefix, PATH=f"{Path(sys.executable).parent}:{env['PATH']}", OMP_NUM_THREADS="1")
    env |= dict(PIP_NO_INDEX="1", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(
        ["bash", f"runs/{script}.sh", *arguments], cwd=cwd, env=env | environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr
