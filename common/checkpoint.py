"""ckpt.pt: one file that says what model it holds, where it came from and how to go on training it.

It is a plain dict of tensors and builtin values, read by archive.py: loading runs no code from it.
How it is written and read is in checkpoint_file.py: a full disk or a kill leaves the previous one intact.
"""

import math
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path

import torch

from common import distributed
from common.checkpoint_file import (
    BEST_NAME,  # noqa: F401 - for those who use checkpoints
    FILE_NAME,
    FORMAT_VERSION,
    Background,
    Checkpoint,
    CheckpointError,
    find,  # noqa: F401
    first_line,
    load,  # noqa: F401
    not_finite,  # noqa: F401
    write,
)
from common.files import file_sha256
from dataset.formats import escaped
from lowbit import layers
from model import Llama, ModelConfig
from tokenizer import DOCUMENT_IDS, Tokenizer, TokenizerError

LARGEST_TABLE = 1 << 28  # bytes of rotary tables that any model may have: 350,000 positions of heads of 64


def save(
    path,
    *,
    stage: str,
    step: int,
    tokens_seen: int,
    model: torch.nn.Module,
    tokenizer: bytes,
    document_ids=DOCUMENT_IDS,
    config: dict,
    parent: dict | None = None,
    quant: dict | None = None,
    optimizer=None,
    extra: dict | None = None,
    data: dict | None = None,
    keep_last: int = 1,
    background: Background | None = None,
) -> None:
    """Write a checkpoint to a run directory or file, all of it or nothing.

    With `optimizer` (one or its state_dict, or a list) or `extra` it can be resumed; the random states are kept too.
    `data` tells what the files are that it was made from, as hashes_of does.
    keep_last counts the checkpoints that stay, this one and those before it. With `background` only a copy of all is
    made now, in pinned memory if it comes from a GPU, and written while training goes on.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    training = data and dict(data=data)
    if optimizer is not None or extra is not None:
        states = [each if isinstance(each, dict) else each.state_dict() for each in _as_list(optimizer)]
        training = dict(optimizer=states, rng=_rng_states(), extra=extra, data=data)
    payload = dict(
        format_version=FORMAT_VERSION,
        stage=stage,
        step=step,
        tokens_seen=tokens_seen,
        model_config=asdict(model.config),
        weights=_weights(model, keep_dtype=quant is not None),
        tokenizer=torch.frombuffer(bytearray(tokenizer), dtype=torch.uint8),  # a pickle of bytes is half as large again
        document_ids=list(document_ids),
        config=config,
        parent=parent,
        git_commit=git_commit(),
        quant=quant,
        training=training,
    )
    on_gpu = any(tensor.is_cuda for tensor in payload["weights"].values())
    if background:
        background.wait()  # one copy at a time
    if background or on_gpu:
        payload = _copied(payload)
    if on_gpu:
        torch.cuda.current_stream().synchronize()
    write_or_start = partial(background.start, write) if background else write
    write_or_start(path, payload, quant is not None, keep_last)


def _copied(value):
    """The same value, no part of which training will change; what comes from a GPU is there once that is waited for."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", non_blocking=True, copy=True)
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return type(value)(map(_copied, value)) if isinstance(value, list | tuple) else value


def _weights(model: torch.nn.Module, keep_dtype: bool) -> dict[str, torch.Tensor]:
    weights = {}
    for name, tensor in model.state_dict().items():
        dtype = tensor.dtype if keep_dtype or not tensor.is_floating_point() else torch.float32
        weights[name] = tensor.detach().to(dtype)
    return weights


def _rng_states() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # of this rank's device only: asking for the others would open them
        states["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def _set_rng_states(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    if "mps" in states and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])


@lru_cache
def git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def build_model(ckpt: Checkpoint, scalar_head: bool | None = None) -> Llama:
    """The model in a checkpoint, which must fit exactly.

    scalar_head=True on a language model takes its trunk, without an untied output, and a head of zeros.
    """
    had_head = ckpt.model_config.get("scalar_head", False)
    overrides = {} if scalar_head is None else {"scalar_head": scalar_head}
    weights = ckpt.weights
    try:
        config = ModelConfig(**ckpt.model_config | overrides)
        if config.scalar_head and not had_head:
            weights = {name: tensor for name, tensor in weights.items() if name != "output.weight"}
            weights["scalar.weight"] = torch.zeros(1, config.dim)
        check_size(config, weights)
        with torch.device("meta"):  # first without memory: a model far larger than its file would fill it
            check_fit(_bare_model(config, ckpt.quant), weights, ckpt.path)
        model = _bare_model(config, ckpt.quant)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{ckpt.path}: cannot build its model: {first_line(error)}") from None
    load_weights(model, weights, ckpt.path)
    return model


def _bare_model(config: ModelConfig, quant: dict | None) -> Llama:
    model = Llama(config)
    return model if quant is None else layers.build(model, quant)


def check_size(config: ModelConfig, weights: dict) -> None:
    """ValueError for what the weights cannot tell: too many layers to list, a rotary table larger than a model."""
    table = 12 * config.max_seq_len * config.head_dim  # bytes of cos, each twice, and sin, made in float64
    if config.n_layers > len(weights):
        raise ValueError(f"n_layers={config.n_layers}, but there are {len(weights)} weights")
    if table > max(LARGEST_TABLE, sum(tensor.nbytes for tensor in weights.values())):
        raise ValueError(f"max_seq_len={config.max_seq_len}: its rotary tables would take {table:,} bytes")


def check_fit(model: torch.nn.Module, weights: dict, path: Path) -> None:
    """Refuse weights that are not those of the model, by name, shape and kind of number."""
    own, problems = model.state_dict(), []
    for name in own.keys() | weights.keys():
        there = tuple(weights[name].shape) if name in weights else "missing"
        here = tuple(own[name].shape) if name in own else "missing"
        if there == here and not _same_kind(weights[name].dtype, own[name].dtype):
            there, here = weights[name].dtype, own[name].dtype
        if there != here:
            problems.append(f"{name} is {there} in the file, {here} in the model")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(escaped(f"{path} does not fit the model: {'; '.join(sorted(problems)[:5])}{more}"))


def _same_kind(a: torch.dtype, b: torch.dtype) -> bool:
    return a == b or (a.is_floating_point and b.is_floating_point)


def load_weights(model: torch.nn.Module, weights: dict, path: Path) -> None:
    """Copy weights by name into a model, sharded or not; they must fit exactly."""
    check_fit(model, weights, path)
    own = model.state_dict()
    model.load_state_dict({name: distributed.shard_like(tensor, own[name]) for name, tensor in weights.items()})


def refuse_quantized(ckpt: Checkpoint) -> None:
    """Stop a stage that needs float32 weights from starting on a quantized checkpoint."""
    if ckpt.quant is not None:
        source = f", such as its parent {ckpt.parent['path']}" if ckpt.parent else ""
        method = ckpt.quant.get("method")
        raise CheckpointError(f"{ckpt.path} is quantized ({method}): a float32 checkpoint is needed{source}")


def restore(ckpt: Checkpoint, model: torch.nn.Module, optimizer) -> None:
    """Put back the weights, the state of the optimizer (or list of them) and the random number generators.

    How the optimizer updates (betas, decay, kernels), but for its learning rate, stays as this run's config has it.
    """
    here = asdict(model.config)
    there = ckpt.model_config
    pairs = ((key, there.get(key), here.get(key)) for key in sorted(there.keys() | here.keys()))
    different = [f"{key} is {old} there and {new} in this run's model" for key, old, new in pairs if old != new]
    if different:
        raise CheckpointError(f"{ckpt.path} holds another architecture: {'; '.join(different)}")
    if "optimizer" not in (ckpt.training or {}):
        raise CheckpointError(f"{ckpt.path} cannot be resumed: it was saved without the optimizer")
    load_weights(model, ckpt.weights, ckpt.path)
    try:
        for each, state in zip(_as_list(optimizer), ckpt.training["optimizer"], strict=True):
            check_state(state, each)
            done = max((int(values.get("step", 0)) for values in state["state"].values()), default=0)
            if done > ckpt.step and ckpt.stage not in ("ppo", "grpo"):  # which update several times a step
                raise ValueError(f"it has done {done} steps, the run {ckpt.step}")
            groups = zip(each.state_dict()["param_groups"], state["param_groups"], strict=True)
            groups = [own | dict(lr=saved["lr"]) for own, saved in groups]
            each.load_state_dict(distributed.shard_state(dict(state=state["state"], param_groups=groups), each))
        _set_rng_states(ckpt.training["rng"])
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            escaped(f"{ckpt.path}: its optimizer or random state does not fit: {first_line(error)}")
        ) from None


def check_state(state: dict, optimizer) -> None:
    """ValueError unless an optimizer's state_dict is one of this optimizer, with numbers that it can have.

    torch compares only how many parameters there are; its fused kernels then read past the end of what is too small.
    """
    sizes = [[len(group["params"]) for group in groups] for groups in (state["param_groups"], optimizer.param_groups)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"groups of {sizes[0]} parameters in the file, of {sizes[1]} here")
    if not all(isinstance(group["lr"], float) and 0 <= group["lr"] < math.inf for group in state["param_groups"]):
        raise ValueError("no learning rate")
    params = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    if state["state"].keys() - range(len(params)):
        raise ValueError("it has a state of parameters that are not there")
    if state["state"] and (missing := set(range(len(params))) - state["state"].keys()):
        raise ValueError(f"it has no state of parameter {min(missing)}")
    for i, values in state["state"].items():
        param, group = params[i]
        needed = {"momentum"} if group.get("muon") else {"step", "exp_avg", "exp_avg_sq"} if "betas" in group else None
        if needed and values.keys() != needed:
            raise ValueError(f"parameter {i} has {', '.join(map(str, values))}, not {', '.join(sorted(needed))}")
        for name, value in values.items():
            number, shape = torch.as_tensor(value), () if name == "step" else param.shape
            kind = number.dtype == param.dtype or name == "step"
            if number.shape != shape or not kind:
                raise ValueError(
                    f"{name} of parameter {i} is {tuple(number.shape)} of {number.dtype}, not {tuple(shape)}"
                )
            least = -math.inf if name in ("exp_avg", "momentum", "momentum_buffer") else 0
            if not (number.isfinite().all() and (number >= least).all()):
                raise ValueError(f"{name} of parameter {i} holds numbers that it cannot have")


def _as_list(optimizer) -> list:
    if optimizer is None:
        return []
    return list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]


@contextmanager
def naming(ckpt: Checkpoint) -> Iterator[None]:
    """Gives what its model cannot compute the name of the file that it came from."""
    try:
        yield
    except FloatingPointError as error:
        raise CheckpointError(f"{ckpt.path}: {error}") from None


def tokenizer_of(ckpt: Checkpoint) -> Tokenizer:
    """The tokenizer that a checkpoint carries."""
    try:
        return Tokenizer(ckpt.tokenizer, tuple(ckpt.document_ids))
    except TokenizerError as error:
        raise CheckpointError(f"{ckpt.path}: its tokenizer: {error}") from None


def continues(ckpt: Checkpoint) -> bool:
    """Whether its model only knows documents, not questions: pretrained, quantized or not."""
    stage = ckpt.parent["stage"] if ckpt.stage == "quantize" and ckpt.parent else ckpt.stage
    return stage == "pretrain"


def check_data(tokenizer, source, meta: dict, meta_path) -> None:
    """Refuse data that was tokenized with another tokenizer than the one that `source` (a path) holds."""
    for key, value in dict(vocab_size=tokenizer.vocab_size, tokenizer_sha256=tokenizer.sha256).items():
        if meta.get(key) != value:
            raise CheckpointError(f"{key} is {value} in {source} and {meta.get(key)} in {meta_path}")


def parent_of(ckpt: Checkpoint) -> dict:
    """What a child checkpoint records about the one it started from."""
    masked = dict(mask_documents=True) if masks_documents(ckpt) else {}
    return dict(path=str(ckpt.path), stage=ckpt.stage, sha256=file_sha256(ckpt.path)) | masked


def masks_documents(ckpt: Checkpoint) -> bool:
    """Whether it was pretrained, or what it came from was, with no document attending to another one."""
    return bool((ckpt.config or {}).get("mask_documents", (ckpt.parent or {}).get("mask_documents")))
