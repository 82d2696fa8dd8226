"""Damaged and forged files end in one line or change nothing: benchmarks/corruption.py with a few of each kind."""

import json
import subprocess
import sys

import pytest
from chains import ROOT


@pytest.mark.slow
def test_no_flip_is_silent_and_no_forged_file_crashes():
    few = ["--flips=3", "--fuzzed_pkl=300", "--fuzzed_tokenizers=100"]
    command = [sys.executable, ROOT / "benchmarks" / "corruption.py", *few]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures.pop("bad") == 0 and sum(figures.values()) == 6 * 3 + 300 + 100
