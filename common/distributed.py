"""Device, precision and process group; the same stage script runs on a laptop and under torchrun."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from common.config import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Env:
    """Where this process runs: its rank, its device and the dtype that matrix products are done in."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype = torch.float32

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self):
        """A context in which matrix products run in `dtype`; it does nothing for float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def setup(device: str = "auto", dtype: str = "auto", seed: int = 0) -> Env:
    """Pick device and dtype, join torchrun's process group if there is one, seed torch alike on each rank."""
    under_torchrun = "RANK" in os.environ
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    chosen = _pick_device(device, under_torchrun)
    chosen_dtype = _pick_dtype(dtype, chosen)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    if under_torchrun and not dist.is_initialized():
        # long enough for the other ranks to wait while rank 0 evaluates and saves
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    torch.manual_seed(seed)
    return Env(rank, world_size, chosen, chosen_dtype)


def _pick_device(name: str, under_torchrun: bool) -> torch.device:
    if name == "auto":
        # gloo cannot reduce tensors on mps, so several processes on a Mac use its CPU
        mps = torch.backends.mps.is_available() and not under_torchrun
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device={name}: not a device; use auto, cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda":
        index = int(os.environ["LOCAL_RANK"]) if under_torchrun else device.index or 0
        if index >= torch.cuda.device_count():
            raise UserError(f"device={name}: GPU {index} was asked for, this machine has {torch.cuda.device_count()}")
        return torch.device("cuda", index)
    if device.type == "mps" and (under_torchrun or not torch.backends.mps.is_available()):
        raise UserError("device=mps: not available here" + (" under torchrun" if under_torchrun else ""))
    if device.type not in ("cpu", "mps"):
        raise UserError(f"device={name}: not supported; use auto, cpu, cuda, cuda:1 or mps")
    return device


def _pick_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:  # float16 would need loss scaling
        raise UserError(f"dtype={name}: not supported; use auto, {' or '.join(DTYPES)}")
    return DTYPES[name]


@torch.no_grad()
def average_gradients(model: torch.nn.Module, env: Env) -> None:
    """Replace each gradient by its mean over the ranks, in one all_reduce.

    A gradient that is None on this rank counts as zeros, so every rank reduces the same bucket. The result is
    that of one process on the joint batch when the ranks' losses are means over equally many items.
    """
    if env.world_size == 1:
        return
    params = [p for p in model.parameters() if p.requires_grad]
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    bucket = torch.cat([p.grad.flatten() for p in params])
    dist.all_reduce(bucket)
    bucket /= env.world_size
    for p, grad in zip(params, bucket.split([p.numel() for p in params]), strict=True):
        p.grad.copy_(grad.view_as(p))


def all_sum(value: float, env: Env) -> float:
    """The sum of a number over the ranks, known to each of them."""
    if env.world_size == 1:
        return float(value)
    total = torch.tensor(float(value), dtype=torch.float64, device=env.device)
    dist.all_reduce(total)
    return total.item()


def mean(value: float, env: Env) -> float:
    """The mean of a number over the ranks, known to each of them."""
    return all_sum(value, env) / env.world_size


def cleanup(env: Env) -> None:
    """Leave the process group that `setup` joined, all ranks together.

    Without the barrier a rank that has nothing to evaluate exits while gloo's threads still drop the tensors of the
    last collective, and now and then aborts.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
