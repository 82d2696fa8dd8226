"""runs/demo.sh, in miniature."""

import os
import shutil

import pytest
from chains import ROOT
from scripts import shell


@pytest.mark.slow
def test_the_demo_runs_in_miniature(tmp_path):
    """On its real corpus, from a copy without data, runs and network; into folders that are not the demo's."""
    clone = tmp_path / "clone"
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(".*", "data", "out", "tests", "docs", "__pycache__"))
    code, out, err = shell("demo", cwd=clone, SMOKE="1")
    assert code == 0, (out + err)[-4000:]
    assert os.listdir(clone / "data") == os.listdir(clone / "out") == ["demo_smoke"]
    runs = clone / "out/demo_smoke"
    for stage in ("pretrain", "sft", "rm", "dpo", "ppo", "grpo"):
        assert (runs / stage / "loss.png").is_file() and f"its curves: out/demo_smoke/{stage}/loss.png" in out
    written = ("quantize/ckpt.pt", "report.md", "report.html", "compare.png")
    assert [name for name in written if not (runs / name).is_file()] == []
    code, out, err = shell("demo", cwd=clone, SMOKE="1")
    assert (code, out.count("nothing to do"), out.count(", skipped")) == (0, 7, 4)
