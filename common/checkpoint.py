"""ckpt.pt: one file that says what model it holds, where it came from and how to go on training it.

It is a plain dict of tensors and builtin values, read with `weights_only=True`: loading runs no code from it.
How it is written and read is in checkpoint_file.py: a full disk or a kill leaves the previous one intact.
"""

import os
import subprocess
from dataclasses import asdict
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist

from common import distributed
from common.checkpoint_file import (
    BEST_NAME,
    FILE_NAME,
    FORMAT_VERSION,
    Checkpoint,
    CheckpointError,
    find,  # noqa: F401 - for those who use checkpoints
    first_line,
    load,  # noqa: F401
    load_newest,
    make_newest,
    older,
    write,
)
from common.config import flatten
from common.files import file_sha256
from dataset.formats import load_meta
from lowbit import layers
from model import Llama, ModelConfig
from tokenizer import DOCUMENT_IDS, Tokenizer

RUN_FILES = (FILE_NAME, FILE_NAME + ".tmp", BEST_NAME, "metrics.jsonl", "samples.txt", "loss.png", "score_kl.png")
# config keys that may change on --resume: where and how fast it runs, when it stops and what it reports
SAFE_ON_RESUME = """
    out device dtype compile parallel resume overwrite keep_* max_steps *_interval eval_*
    sample_prompts sample_tokens decay_share decay_steps logger plan recompute
""".split()
# what runs did before these keys were in their config
UNWRITTEN = dict(schedule="cosine", mask_documents=False)
UNWRITTEN |= dict(loss="sigmoid", label_smoothing=0.1, margin=0.0, centring=0.0)  # dpo and rm
UNWRITTEN |= dict(packing=False, pack_len=0)  # sft
UNWRITTEN |= dict(reward="model", reward_length=[20, 60], score_clip=0.0, entropy_coef=0.0)  # ppo


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
) -> None:
    """Write a checkpoint to a run directory or file, all of it or nothing.

    With `optimizer` (one or its state_dict, or a list) or `extra` it can be resumed; the random states are kept too,
    and what the files that are trained on are, as hashes_of tells it.
    keep_last counts the checkpoints that stay, this one and those before it.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    training = None
    if optimizer is not None or extra is not None:
        states = [each if isinstance(each, dict) else each.state_dict() for each in _as_list(optimizer)]
        training = dict(optimizer=states, rng=_rng_states(), extra=extra, data=data)
    payload = dict(
        format_version=FORMAT_VERSION,
        stage=stage,
        step=step,
        tokens_seen=tokens_seen,
        model_config=asdict(unwrap(model).config),
        weights=_weights(model, keep_dtype=quant is not None),
        tokenizer=torch.frombuffer(bytearray(tokenizer), dtype=torch.uint8),  # a pickle of bytes is half as large again
        document_ids=list(document_ids),
        config=config,
        parent=parent,
        git_commit=_git_commit(),
        quant=quant,
        training=training,
    )
    write(path, payload, deflate=quant is not None, keep_last=keep_last)


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside torch.compile and torch's own DistributedDataParallel."""
    while (inner := getattr(model, "_orig_mod", getattr(model, "module", None))) is not None:
        model = inner
    return model


def _plain_name(name: str) -> str:
    """A parameter's name without the wrappers: `module._orig_mod.norm.weight` is `norm.weight`."""
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "module"))


def _weights(model: torch.nn.Module, keep_dtype: bool) -> dict[str, torch.Tensor]:
    weights = {}
    for name, tensor in model.state_dict().items():
        dtype = tensor.dtype if keep_dtype or not tensor.is_floating_point() else torch.float32
        weights[_plain_name(name)] = tensor.detach().to("cpu", dtype)
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
def _git_commit() -> str | None:
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
    try:
        config = ModelConfig(**ckpt.model_config | overrides)
        model = Llama(config)
        if ckpt.quant is not None:
            layers.build(model, ckpt.quant)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{ckpt.path}: cannot build its model: {first_line(error)}") from None
    weights = ckpt.weights
    if config.scalar_head and not had_head:
        weights = {name: tensor for name, tensor in weights.items() if name != "output.weight"}
        weights["scalar.weight"] = torch.zeros_like(model.scalar.weight)
    _load_weights(model, weights, ckpt.path)
    return model


def _load_weights(model: torch.nn.Module, weights: dict, path: Path) -> None:
    own = {_plain_name(name): (name, tensor) for name, tensor in model.state_dict().items()}
    problems = []
    for name in own.keys() | weights.keys():
        there = tuple(weights[name].shape) if name in weights else "missing"
        here = tuple(own[name][1].shape) if name in own else "missing"
        if there != here:
            problems.append(f"{name} is {there} in the file, {here} in the model")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{path} does not fit the model: {'; '.join(sorted(problems)[:5])}{more}")
    model.load_state_dict({own[n][0]: distributed.shard_like(tensor, own[n][1]) for n, tensor in weights.items()})


def refuse_quantized(ckpt: Checkpoint) -> None:
    """Stop a stage that needs float32 weights from starting on a quantized checkpoint."""
    if ckpt.quant is not None:
        source = f", such as its parent {ckpt.parent['path']}" if ckpt.parent else ""
        method = ckpt.quant.get("method")
        raise CheckpointError(f"{ckpt.path} is quantized ({method}): a float32 checkpoint is needed{source}")


def restore(ckpt: Checkpoint, model: torch.nn.Module, optimizer) -> None:
    """Put back the weights, the optimizer (or list of them) and the random number generators."""
    here = asdict(unwrap(model).config)
    there = ckpt.model_config
    pairs = ((key, there.get(key), here.get(key)) for key in sorted(there.keys() | here.keys()))
    different = [f"{key} is {old} there and {new} in this run's model" for key, old, new in pairs if old != new]
    if different:
        raise CheckpointError(f"{ckpt.path} holds another architecture: {'; '.join(different)}")
    if ckpt.training is None:
        raise CheckpointError(f"{ckpt.path} cannot be resumed: it was saved without the optimizer")
    _load_weights(model, ckpt.weights, ckpt.path)
    try:
        for each, state in zip(_as_list(optimizer), ckpt.training["optimizer"], strict=True):
            each.load_state_dict(distributed.shard_state(state, each))
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{ckpt.path}: its optimizer does not fit: {first_line(error)}") from None
    _set_rng_states(ckpt.training["rng"])


def _as_list(optimizer) -> list:
    if optimizer is None:
        return []
    return list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]


def tokenizer_of(ckpt: Checkpoint) -> Tokenizer:
    """The tokenizer that a checkpoint carries."""
    return Tokenizer(ckpt.tokenizer, tuple(ckpt.document_ids))


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
    return dict(path=str(ckpt.path), stage=ckpt.stage, sha256=file_sha256(ckpt.path))


def same_file(ckpt: Checkpoint, before: dict | None, now: dict | None) -> None:
    """Refuse to go on from `ckpt` on another file than it was started on; both as parent_of tells them."""
    if before and now and before["sha256"] != now["sha256"]:
        raise CheckpointError(
            f"cannot resume {ckpt.path}: it started from {before['path']} with sha256 {before['sha256'][:16]}, "
            f"{now['path']} now has {now['sha256'][:16]}"
        )


def hashes_of(directory, names) -> dict:
    """{name: sha256} of files in a data directory: what meta.json says, as a large corpus takes minutes to hash."""
    files = load_meta(directory).get("files", {})
    return {name: files.get(name, {}).get("sha256") or file_sha256(Path(directory) / name) for name in names}


def same_data(ckpt: Checkpoint, directory, now: dict) -> None:
    """Refuse to go on from `ckpt` on other data than it was trained on; `now` is what hashes_of tells of the files."""
    before, run = (ckpt.training or {}).get("data"), f"step {ckpt.step} of {ckpt.path.parent}"
    if before is None:  # an older file
        if _is_main():
            print(f"{ckpt.path} does not say which data it was trained on: {directory} is taken as it is")
        return
    for name in before | now:
        old, new = before.get(name), now.get(name)
        if old != new:
            here = f"is {new[:16]}" if new else "is not read"
            there = f"on {old[:16]}" if old else "without it"
            raise CheckpointError(f"cannot resume: {Path(directory) / name} {here}, {run} was trained {there}")
    if list(before) != list(now):
        raise CheckpointError(
            f"cannot resume: {directory} has {', '.join(now)} in this order, {run} was trained on {', '.join(before)}"
        )


def begin(config: dict, stage: str) -> Checkpoint | None:
    """Make the run directory; the checkpoint to go on from with --resume, None for a run from step 0."""
    ckpt = _begin(config, stage)
    if dist.is_initialized():
        dist.barrier()  # rank 0 must not save before every rank has looked
    newest = Path(config["out"]) / FILE_NAME
    if ckpt is not None and ckpt.path != newest:
        if _is_main():
            make_newest(ckpt, newest)
        ckpt.path = newest
    return ckpt


def _begin(config: dict, stage: str) -> Checkpoint | None:
    out, is_main = Path(config["out"]), _is_main()
    if config["resume"] and config["overwrite"]:
        raise CheckpointError("--resume and --overwrite exclude each other: give one of them")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make the run directory {out}: {error.strerror}") from None
    file = out / FILE_NAME
    if config["overwrite"]:
        if is_main:
            for each in (*(out / name for name in RUN_FILES), *older(file)):
                each.unlink(missing_ok=True)
        return None
    there = [each for each in (file, *older(file)) if each.is_file()]
    if not there:
        if config["resume"] and is_main:
            print(f"nothing to resume in {out}, starting at step 0")
        return None
    if not config["resume"]:
        raise CheckpointError(f"{there[0]} exists: give --resume to continue it or --overwrite to remove it")
    ckpt = load_newest(file, verbose=is_main)
    if ckpt.stage != stage:
        raise CheckpointError(f"{ckpt.path} is from stage {ckpt.stage}, this is {stage}: choose another --out")
    _refuse_changes(ckpt, config)
    if is_main:
        print(f"resuming {out} at step {ckpt.step}")
    return ckpt


def _is_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def _refuse_changes(ckpt: Checkpoint, config: dict) -> None:
    there, here = (UNWRITTEN | flatten(each) for each in (ckpt.config, config))
    processes = here.pop("processes", 1)
    before = there.pop("processes", processes)  # older files do not say
    # then what they share, the batch of a step, must be the same; PPO and GRPO count theirs over all processes
    if processes != before and "grad_accumulation_steps" in here:
        for values, n in ((there, before), (here, processes)):
            values["grad_accumulation_steps * processes"] = values.pop("grad_accumulation_steps", 1) * n
    # where the data lies does not matter if Stage.start can compare what it is
    may_change = SAFE_ON_RESUME + (["data"] if ckpt.training and ckpt.training.get("data") else [])
    for key in sorted(there.keys() | here.keys()):
        safe = any(fnmatch(key, pattern) for pattern in may_change)
        old, new = (values.get(key, "absent") for values in (there, here))
        old, new = (list(value) if isinstance(value, tuple) else value for value in (old, new))
        if not safe and old != new:
            raise CheckpointError(f"cannot resume: {key} is {old} in {ckpt.path} and {new} in this run's config")
