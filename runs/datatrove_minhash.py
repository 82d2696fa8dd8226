"""Near-duplicate removal over many machines, with the four MinHash stages of datatrove (0.10.1).

For text too large for one machine; corpora/dedup.py does the same on one. Chinese is compared by runs of three
characters, as there: datatrove's own Chinese shingles are words, which need spaCy and jieba.

    pip install "datatrove==0.10.1" orjson regex tokenizers "xxhash<4"
    python runs/datatrove_minhash.py raw/ deduplicated/ --tasks=8
    python runs/datatrove_minhash.py raw/ deduplicated/ --tasks=200 --slurm=PARTITION

in:  a folder of .jsonl or .jsonl.gz files, {"text", "id", ...} a line; a task reads whole files
out: OUTPUT/text/*.jsonl, one document of each group of near-duplicates; OUTPUT/work holds the signatures and the
     logs, by which an interrupted run goes on: remove it before a run over other data
"""

import argparse
import sys
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.dedup import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter

# datatrove takes every pair that shares a bucket, without a second look: 1 - (1 - s**5)**48 is 0.97 at the similarity
# s = 0.585 of a copy with 10 % of its characters edited, 0.11 at 0.3, and 1e-5 at 0.05, more than most pairs have.
# Its defaults, 14 buckets of 8 hashes over five words, find none of such copies.
CONFIG = MinhashConfig(n_grams=3, num_buckets=48, hashes_per_bucket=5)


class CharacterSignature(MinhashDedupSignature):
    """Stage 1 over runs of letters and digits instead of words."""

    def __init__(self, output_folder, config):
        super().__init__(output_folder, config, language="zho_Latn")  # split at blanks: needs no package, not used

    def get_shingles(self, text):
        import re  # here, because a Slurm task gets this class from a pickle, without the imports above

        import numpy as np

        key, n = re.sub(r"[\W_]+", "", text).lower(), self.config.n_grams
        shingles = {self._hash_func(key[i : i + n]) for i in range(len(key) - n + 1)}
        return np.fromiter(shingles, np.uint64).reshape(-1, 1)


def make_stages(source, output, tasks):
    """[(name, pipeline, tasks)]; stages 1 and 4 must read the same files in the same tasks."""
    work = output / "work"
    signatures, pairs, removed = (str(work / name) for name in ("signatures", "pairs", "removed"))
    reader = JsonlReader(str(source), glob_pattern="**/*.jsonl*", add_file_path=False)
    writer = JsonlWriter(str(output / "text"), compression=None, expand_metadata=True)
    return [
        ("signatures", [reader, CharacterSignature(signatures, CONFIG)], tasks),
        ("buckets", [MinhashDedupBuckets(signatures, pairs, config=CONFIG)], CONFIG.num_buckets),
        ("cluster", [MinhashDedupCluster(pairs, removed, config=CONFIG)], 1),
        ("filter", [reader, MinhashDedupFilter(removed), writer], tasks),
    ]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, help="folder of jsonl files")
    parser.add_argument("output", type=Path)
    parser.add_argument("--tasks", type=int, default=1, help="parts of the input, at most one a file")
    parser.add_argument("--workers", type=int, default=2, help="tasks at once, if not on Slurm")
    parser.add_argument("--slurm", metavar="PARTITION", help="submit to Slurm instead of running here")
    parser.add_argument("--time", default="20:00:00", help="Slurm's limit for a task")
    options = parser.parse_args(argv)
    stage = None
    for name, pipeline, tasks in make_stages(options.input.resolve(), options.output.resolve(), options.tasks):
        logs = str(options.output.resolve() / "work" / "logs" / name)
        common = dict(pipeline=pipeline, tasks=tasks, logging_dir=logs, depends=stage)
        if options.slurm:
            cluster = dict(partition=options.slurm, time=options.time, venv_path=f"{sys.prefix}/bin/activate")
            stage = SlurmPipelineExecutor(**common, **cluster, job_name=name)
        else:
            stage = LocalPipelineExecutor(**common, workers=options.workers)
    stage.run()  # after those it depends on


if __name__ == "__main__":
    main()
