#!/usr/bin/env bash
# One training stage on several machines: the same command on each of them, with a common HEAD.
# usage: HEAD=node0:29500 NODES=2 GPUS=8 bash runs/multinode.sh pretrain.py --parallel=fsdp --save_interval=200 ...
# Under Slurm: srun --ntasks-per-node=1 with HEAD="$(scontrol show hostnames | head -n 1):29500".
# The machines need one file system: the data, and out/, where rank 0 saves and from where all of them resume.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${HEAD:?host:port of one of the machines, as the others reach it}"
# NCCL picks the network by itself; NCCL_SOCKET_IFNAME=eth0 names it, NCCL_DEBUG=INFO shows what was picked.
# Where a process dies, torchrun starts all of them again, at most RESTARTS times, and they go on from the last
# checkpoint, so what is lost is at most save_interval steps. --resume does the same when the whole job starts again.
# A restart needs a fresh store: in the old one are the addresses of processes that are gone.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# The product of processes and grad_accumulation_steps must stay: half the machines, twice the accumulation.
exec torchrun --nnodes="${NODES:-2}" --nproc-per-node="${GPUS:-8}" --max-restarts="${RESTARTS:-3}" \
    --rdzv-backend=c10d --rdzv-endpoint="$HEAD" --rdzv-id="${JOB:-${SLURM_JOB_ID:-tiny-llama2-zh}}" \
    "$@" --resume
