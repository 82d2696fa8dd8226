#!/usr/bin/env bash
# Data preparation on several machines that share a file system: an array of N jobs makes the shards, a last one merges.
# usage: N=8 bash runs/slurm_data.sh --sources=wikipedia=wiki.json,novels:txt=novels --parts=pretrain --out=data/zh ...
# Everything after the script's name goes to data_process.py; a job that is killed may be submitted again.
set -euo pipefail
cd "$(dirname "$0")/.."
n=${N:-4}
cpus=${CPUS:-16}
words= # for any shell in any locale, which printf %q is not
for word in "$@"; do words+=" '${word//\'/\'\\\'\'}'"; done
stage="python data_process.py$words --workers=$cpus"
shards=$(sbatch --parsable --job-name=data --array="0-$((n - 1))" --cpus-per-task="$cpus" --requeue \
    --wrap="$stage --shard=\$SLURM_ARRAY_TASK_ID/$n")
sbatch --job-name=data-merge --dependency="afterok:$shards" --cpus-per-task="$cpus" --wrap="$stage --merge"
