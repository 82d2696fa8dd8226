"""Device, precision and process group; the same stage script runs on a laptop and under torchrun.

Several processes train one model, replicated (DDP) or sharded (FSDP2); both average the gradients over the ranks, so
that the result is that of one process on the joint batch when each rank's loss is a mean over as many items.
"""

import atexit
import gc
import importlib.util
import os
import shutil
import sys
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from common.config import ConfigError, UserError
from head import fused_log_softmax_chunk
from model import Llama

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

    @property
    def generation_dtype(self) -> torch.dtype | None:
        """What model.generate computes in; None, on a CPU: as the weights are."""
        return self.dtype if self.device.type == "cuda" else None

    def autocast(self):
        """A context in which matrix products run in `dtype`; it does nothing for float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def setup(device: str = "auto", dtype: str = "auto", seed: int = 0) -> Env:
    """Pick device and dtype, join torchrun's process group if there is one, seed torch alike on each rank."""
    under_torchrun = "RANK" in os.environ
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    chosen = _pick_device(device, under_torchrun)
    chosen_dtype = _pick_dtype(dtype, chosen, rank == 0)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    # float32 is never TF32, though the environment of a container may ask for it, and torch.compile advises it; on a
    # CPU in bfloat16 what autocast leaves in float32, as the logits, is the result of a product of rounded operands
    rounds = chosen.type == "cpu" and chosen_dtype == torch.bfloat16
    torch.set_float32_matmul_precision("medium" if rounds else "highest")
    if rounds:  # oneDNN keeps what it prepares for a shape, for 1,024 of them: gigabytes where every batch has its own
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
    if under_torchrun and not dist.is_initialized():
        _join(chosen)
    torch.manual_seed(seed)
    return Env(rank, world_size, chosen, chosen_dtype)


def _join(device: torch.device) -> None:
    """Join torchrun's process group.

    On one machine torchrun keeps its store over a restart, and with it the addresses of processes that are gone; under
    a name of its own each attempt finds none of those. Several machines count their restarts apart and share no name.
    """
    timeout = timedelta(hours=2)  # long enough for the other ranks to wait while rank 0 evaluates and saves
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    options = dict(store=store, rank=rank, world_size=world_size, timeout=timeout)
    if device.type == "cuda":  # NCCL then need not guess the device, of a barrier say
        dist.init_process_group("nccl", device_id=device, **options)
    else:
        dist.init_process_group("gloo", **options)
    # gloo's threads drop the tensors of the last collectives late, and need the GIL for it. A wrapped model that is the
    # last to hold the group waits for them with the GIL, for ever; one that a cycle keeps lets them run while the
    # interpreter ends, which aborts. So the group outlives all models, and goes while Python still runs.
    atexit.register(lambda group: gc.collect(), dist.group.WORLD)


def _pick_device(name: str, under_torchrun: bool) -> torch.device:
    if name == "auto":
        # gloo cannot reduce tensors on mps, so several processes on a Mac use its CPU
        mps = torch.backends.mps.is_available() and not under_torchrun
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
        if str(device) != name:  # torch takes cuda:300 for cuda:44
            raise RuntimeError
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


def has_bfloat16(device: torch.device) -> bool:
    """Whether a GPU multiplies bfloat16 in hardware: NVIDIA's do from Ampere on, those before emulate it slowly."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def _pick_dtype(name: str, device: torch.device, verbose: bool) -> torch.dtype:
    if name == "auto":
        if has_bfloat16(device):
            return torch.bfloat16
        if device.type == "cuda" and verbose:
            print(f"dtype=auto: {torch.cuda.get_device_name(device)} has no bfloat16, training is in float32")
        return torch.float32
    if name not in DTYPES:  # float16 would need loss scaling
        raise UserError(f"dtype={name}: not supported; use auto, {' or '.join(DTYPES)}")
    return DTYPES[name]


class _Methods(torch.nn.Module):
    """A model whose forward runs the method that is named first: DDP watches forward and nothing else."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, method, *args, **kwargs):
        return (self.model if method == "forward" else getattr(self.model, method))(*args, **kwargs)


class Replicated(torch.nn.parallel.DistributedDataParallel):
    """A model in DistributedDataParallel, called as the model itself is."""

    def __init__(self, model):
        super().__init__(_Methods(model), gradient_as_bucket_view=True)
        self.broadcast_buffers = False  # they never change; as an argument torch 2.13 calls it forward_sync_buffers

    def forward(self, *args, **kwargs):
        return super().forward("forward", *args, **kwargs)

    def token_logps(self, *args, **kwargs):
        return super().forward("token_logps", *args, **kwargs)

    def values(self, *args, **kwargs):
        return super().forward("values", *args, **kwargs)


def wrap(model: Llama, env: Env, config: dict) -> torch.nn.Module:
    """What the loop calls instead of the model, whose gradients then are means over the ranks: config["parallel"].

    "ddp" wraps the model, "fsdp" shards it in place: make the optimizer afterwards. One process gets the model back.
    """
    if env.world_size == 1:
        return model
    if config["parallel"] == "ddp":
        return Replicated(model)
    if config["optimizer"] == "muon":
        raise ConfigError("optimizer=muon with parallel=fsdp: Muon needs whole matrices, fsdp shards them; use ddp")
    return _shard(model, env)


def compiled(model: Llama, env: Env, config: dict, **options) -> None:
    """torch.compile, in place, the blocks and, on a GPU, the head's softmax: config["compile"]; before `wrap`.

    In pieces, so that compiling takes seconds, blocks share their code, and no number of rows compiles anew. "auto":
    on a GPU that has all that it takes. True: anywhere, or one line of warning says what is missing. A CPU's own
    softmax is faster than the compiled one (benchmarks/train.py --losses).
    """
    wanted = config["compile"]
    missing = missing_to_compile(env.device) if wanted else None
    if missing and wanted != "auto":
        print(f"compile=True: {missing} is not here, training goes on without torch.compile", file=sys.stderr)
    if not wanted or missing or (wanted == "auto" and env.device.type != "cuda"):
        return
    import torch._dynamo as dynamo  # takes seconds
    from torch.fx.experimental import _config as shapes

    shapes.use_duck_shape = False  # sizes that happen to be equal need not be so next time
    dynamo.config.optimize_ddp = False  # it splits for DDP's buckets, which blocks by themselves are small enough for
    dynamo.config.specialize_float = True  # an epsilon stays what it is
    options = dict(dynamic=True) | options
    for layer in model.layers:
        layer.compile(**options)
    if env.device.type != "cpu":
        model.chunk = compiled_chunk(**options)


def compiled_chunk(**options):
    """fused_log_softmax_chunk compiled once for any number of rows."""
    import torch._dynamo as dynamo

    chunk = torch.compile(fused_log_softmax_chunk, **options | dict(dynamic=None))

    def chunk_of_any_rows(logits, targets, *rest):
        for tensor in (logits, targets):
            dynamo.maybe_mark_dynamic(tensor, 0)
        return chunk(logits, targets, *rest)

    return chunk_of_any_rows


def missing_to_compile(device: torch.device) -> str | None:
    """What torch.compile would generate code with and does not find; Triton too compiles some C."""
    names = ("cc", "gcc", "clang") if device.type == "cuda" else ("c++", "g++", "clang++", "cl")
    compiler = os.environ.get("CC" if device.type == "cuda" else "CXX") or next(filter(shutil.which, names), None)
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (7, 0):
            return "a GPU of compute capability 7.0"
        if not importlib.util.find_spec("triton"):
            return "the package triton"
        return None if compiler or os.name == "nt" else "a C compiler"  # Triton for Windows brings its own
    return None if compiler else "a C++ compiler"


def _shard(model, env):
    from torch.distributed.device_mesh import init_device_mesh  # FSDP takes a second to import
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # Weights are gathered in float32 and cast by autocast, as in DDP. FSDP's own mixed precision would carry the
    # residual stream and the head in bfloat16.
    mesh = init_device_mesh(env.device.type, (env.world_size,))
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh)
    for method in ("token_logps", "values"):
        register_fsdp_forward_method(model, method)
    return model


def sync(model: torch.nn.Module, last: bool) -> None:
    """Before a micro-batch: gradients are exchanged in the backward of the step's last one only."""
    if isinstance(model, Replicated):
        model.require_backward_grad_sync = last  # what no_sync() sets
    elif is_sharded(model):
        model.set_requires_gradient_sync(last)


def is_sharded(model: torch.nn.Module) -> bool:
    return hasattr(model, "set_requires_gradient_sync")  # FSDPModule's


def whole(tensor):
    """A sharded tensor (DTensor) in one piece, on every rank, which all must call this; others as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(tensor, param):
    """A tensor in one piece as `param` is: this rank's part of it if param is sharded and of this shape."""
    if not hasattr(param, "full_tensor") or getattr(tensor, "shape", None) != param.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(param.device, param.dtype)
    return distribute_tensor(tensor, param.device_mesh, param.placements, src_data_rank=None)  # no rank sends: all know


def shard_state(state: dict, optimizer) -> dict:
    """An optimizer's state_dict in one piece as this optimizer, whose parameters may be sharded, holds it."""
    params = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    parts = {
        i: {name: shard_like(value, params.get(i)) for name, value in values.items()}
        for i, values in state["state"].items()
    }
    return state | {"state": parts}


def gather(model, optimizer, env: Env):
    """(a plain copy of a sharded model, its optimizer's state in one piece) on rank 0, (None, None) on the others.

    All ranks must call it. Rank 0 needs the host memory of all weights, the others that of the largest on their device.
    Without an optimizer no state is gathered, and the copy is on the device, to be evaluated; else it is to be saved.
    """

    def collect(tensors):
        pieces = ((name, whole(tensor)) for name, tensor in tensors.items())
        return {name: tensor.cpu() if env.is_main else None for name, tensor in pieces}

    weights = collect(model.state_dict())
    state = optimizer.state_dict() if optimizer else dict(state={})
    # the optimizer's own dicts: not to be changed
    state["state"] = {i: collect(values) for i, values in state["state"].items()}
    if not env.is_main:
        return None, None
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, in vain
        copy = Llama(model.config)
    copy.load_state_dict(weights)
    return copy.to("cpu" if optimizer else env.device).train(model.training), state


def clip_gradients(params, largest: float) -> float:
    """Scale the gradients to a norm, over all parts of sharded ones, of at most `largest`; returns the norm before.

    0 leaves them as they are.
    """
    return whole(torch.nn.utils.clip_grad_norm_(params, largest or torch.inf)).item()


def summed(tensor: torch.Tensor, env: Env | None) -> torch.Tensor:
    """The sum of a tensor over the ranks, known to each, for which no host waits; without env of this rank alone."""
    if env is None or env.world_size == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def all_sum(value: float, env: Env) -> float:
    """The sum of a number over the ranks, known to each of them."""
    if env.world_size == 1:
        return float(value)
    return summed(torch.tensor(float(value), dtype=torch.float64, device=env.device), env).item()


def mean(value: float, env: Env) -> float:
    """The mean of a number over the ranks, known to each of them."""
    return all_sum(value, env) / env.world_size


def gathered(tensor: torch.Tensor, env: Env | None) -> torch.Tensor:
    """A tensor of one shape from each rank, in their order: (ranks, ...); without env of this one alone."""
    if env is None or env.world_size == 1:
        return tensor[None]
    parts = [torch.empty_like(tensor) for _ in range(env.world_size)]
    dist.all_gather(parts, tensor.contiguous())
    return torch.stack(parts)


def joined(items: list, env: Env | None) -> list:
    """The lists of all ranks as one, in their order; items are plain values, as they are pickled on the way."""
    if env is None or env.world_size == 1:
        return items
    parts = [None] * env.world_size
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def per_rank(config: dict, key: str, env: Env, multiple: int = 1) -> int:
    """This rank's part of what config[key] counts over all of them, a multiple of `multiple`."""
    part, rest = divmod(config[key], env.world_size * multiple)
    if rest:
        groups = f", in whole groups of {multiple}" if multiple > 1 else ""
        raise ConfigError(f"{key}={config[key]}: {env.world_size} processes cannot share it evenly{groups}")
    return part * multiple


def step_seed(seed: int, step: int, env: Env) -> int:
    """What a rank draws its random numbers of a step from, so that a resumed run draws the same."""
    return ((seed * 1_000_003 + step) * env.world_size + env.rank) % 2**63


def restarted(env: Env) -> bool:
    """Whether torchrun's --max-restarts started this run again, on any of its machines."""
    return all_sum(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), env) > 0


def cleanup(env: Env) -> None:
    """Leave the process group that `setup` joined, all ranks together.

    Without the barrier a rank that has nothing to evaluate exits while gloo's threads still drop the tensors of the
    last collective, and now and then aborts.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
