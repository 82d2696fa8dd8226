"""runs/slurm_data.sh, with an sbatch that runs what it is given."""

import os

from chains import ROOT
from scripts import shell


def test_arguments_reach_the_jobs_as_they_are_in_any_locale(tmp_path):
    said = ["--sources=novels:txt=小说/it's", "--out=$HOME/a b"]
    for name, text in (
        ("sbatch", 'for last; do :; done\nSLURM_ARRAY_TASK_ID=3 sh -c "${last#--wrap=}" >&2\necho 7'),
        ("python", 'printf "%s|" "$@"; echo'),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    code, _, err = shell("slurm_data", *said, cwd=ROOT, PATH=path, LC_ALL="C", N="4", CPUS="2")
    wanted = "|".join(["data_process.py", *said, "--workers=2", ""])
    assert (code, err.splitlines()) == (0, [f"{wanted}--shard=3/4|", f"{wanted}--merge|"])
