"""The run directory: whether a run starts or goes on in it, what may differ then, what it replaces and when."""

import os
import shutil
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

import torch.distributed as dist

from common.checkpoint_file import (
    BEST_NAME,
    FILE_NAME,
    Checkpoint,
    CheckpointError,
    load_newest,
    make_newest,
    older,
    own_steps,
    second_name,
    stage_of,
    take_back,
)
from common.config import ConfigError, UserError, ending, flatten
from common.files import file_sha256, lock, make_folder, read_json
from dataset.formats import OURS, DataError, load_meta
from tokenizer import MODEL_FILE, Tokenizer

# what a run writes beside its checkpoints: of an older run it must not stay
LOGS = ("metrics.jsonl", "samples.txt")
TRAINED = (*LOGS, BEST_NAME, "loss.png")
RUN_FILES = dict(quantize=LOGS, rm=(*TRAINED, "calibration.png"))
RUN_FILES |= dict.fromkeys(("ppo", "grpo"), (*TRAINED, "score_kl.png"))
ANY_RUN = (FILE_NAME, "config.json", "tensorboard", "logger_id.txt")  # and what is written over or added to
REFERENCE = "ref_logps.npz"  # DPO's, which a run of DPO in the place of another may read, and no other stage
NEW, SAVED = ".new", ".saved"  # folders in `out`: a run from step 0 before its first save, and while that moves
MARK = f".{OURS}"  # a file in them: a run made them
READ = "init_from reward_model tokenizer data".split()  # config keys of what a stage reads
# config keys that may change on --resume: where and how fast it runs, when it stops and what it reports
SAFE_ON_RESUME = """
    out device dtype compile parallel resume overwrite keep_* max_steps *_interval eval_*
    sample_prompts sample_tokens decay_share decay_steps logger plan recompute verify_data micro_batch_size
""".split()
# what runs did before these keys were in their config
UNWRITTEN = dict(schedule="cosine", mask_documents=False)
UNWRITTEN |= dict(loss="sigmoid", label_smoothing=0.1, margin=0.0, centring=0.0)  # dpo and rm
UNWRITTEN |= dict(packing=False, pack_len=0)  # sft
UNWRITTEN |= dict(momentum=0.95, embedding_rate=1.0)  # with optimizer=muon
UNWRITTEN |= dict(reward="model", reward_length=[20, 60], rule_weight=1.0, score_clip=0.0, entropy_coef=0.0)  # ppo


def begin(config: dict, stage: str) -> Checkpoint | None:
    """Make the run directory; the checkpoint to go on from with --resume, None for a run from step 0.

    Nothing is removed: with --overwrite the old run stays until the new one's first save (`commit`).
    """
    if config["resume"] and config["overwrite"]:
        raise CheckpointError("--resume and --overwrite exclude each other: give one of them")
    out = Path(config["out"])
    keep_apart(config)
    if _is_main():
        _open(out)
    _barrier()
    ckpt = _look(out, config, stage)
    if config["overwrite"] and dist.is_initialized() and _is_main():
        make_new(out)
    _barrier()  # rank 0 must not save before every rank has looked
    if ckpt is not None and ckpt.path != out / FILE_NAME:
        if _is_main():
            make_newest(ckpt, out / FILE_NAME)
        ckpt.path = out / FILE_NAME
    return ckpt


def _open(out: Path) -> None:
    try:
        make_folder(out)
    except OSError as error:
        raise CheckpointError(f"cannot make the run directory {out}: {error.strerror}") from None
    lock(out)
    recover(out)


def _look(out: Path, config: dict, stage: str) -> Checkpoint | None:
    there = [each for each in (out / FILE_NAME, *older(out / FILE_NAME)) if each.is_file()]
    if config["overwrite"] or not there:
        if other := _foreign(out, stage, config["overwrite"]):
            raise CheckpointError(
                f"{other} would be replaced, and no checkpoint beside it says that a run here wrote it: "
                "choose another --out, or remove it yourself"
            )
        if config["resume"] and _is_main():
            print(f"nothing to resume in {out}, starting at step 0")
        return None
    if not config["resume"]:
        raise CheckpointError(f"{there[0]} exists: give --resume to continue it or --overwrite to replace it")
    ckpt = load_newest(out / FILE_NAME, verbose=_is_main())
    if ckpt.stage != stage:
        raise CheckpointError(f"{ckpt.path} is from stage {ckpt.stage}, this is {stage}: choose another --out")
    _refuse_changes(ckpt, config)
    if _is_main():
        print(f"resuming {out} at step {ckpt.step}")
    return ckpt


def _foreign(out: Path, stage: str, overwrite: bool) -> Path | None:
    """The first file that a run of `stage` would replace though it is no run's, without `overwrite` whosever it is."""
    was = _run_in(out) if overwrite else None
    own = () if was is None else (*ANY_RUN, *RUN_FILES.get(was, TRAINED))
    for name in dict.fromkeys((*ANY_RUN, *RUN_FILES.get(stage, TRAINED), *own)):
        others = name not in own or (name.endswith(".pt") and stage_of(out / name) is None)
        if others and os.path.lexists(out / name):
            return out / name
    return None


def _run_in(out: Path) -> str | None:
    """The stage of the run in `out`, as the newest checkpoint tells that can be read; None if there is no run.

    A run whose checkpoints are all damaged is known by its config.json, and taken for one of pretraining.
    """
    for path in (out / FILE_NAME, *older(out / FILE_NAME)):
        if stage := stage_of(path):
            return stage
    with suppress(OSError, UserError):
        if {"out", "resume", "overwrite"} <= read_json(out / "config.json").keys():
            return ""
    return None


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def keep_apart(config: dict) -> None:
    """Refuse to write into a folder from which something is read."""
    out = Path(config["out"]).resolve()
    for key in READ:
        path = Path(config.get(key) or "")
        files = [each.resolve() for each in (path, path / FILE_NAME, path / MODEL_FILE)]
        if config.get(key) and out in [file.parent if file.is_file() else file for file in files]:
            where = f"out={config['out']} is where {key}={config[key]} is read"
            raise ConfigError(f"{where}, its files would be replaced: choose another --out")


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
    # where they lie does not matter if the stage can compare what they are
    training = ckpt.training or {}
    known = dict(data=training.get("data"), init_from=ckpt.parent)
    unread = here.get("reward", "model").partition("+")[0] != "model"
    known["reward_model"] = unread or (training.get("extra") or {}).get("reward_model")
    if here.get("tokenizer") not in (None, there.get("tokenizer")):
        known["tokenizer"] = Tokenizer.load(here["tokenizer"]).model_bytes == ckpt.tokenizer
    known |= dict.fromkeys(("momentum", "embedding_rate"), here.get("optimizer") == "adamw")  # which has neither
    may_change = SAFE_ON_RESUME + [key for key, found in known.items() if found]
    for key in sorted(there.keys() | here.keys()):
        safe = any(fnmatch(key, pattern) for pattern in may_change)
        old, new = (values.get(key, "absent") for values in (there, here))
        old, new = (list(value) if isinstance(value, tuple) else value for value in (old, new))
        if not safe and old != new:
            raise CheckpointError(f"cannot resume: {key} is {old} in {ckpt.path} and {new} in this run's config")


# a run from step 0 writes into out/.new until its first save, so that what it replaces stays whole until then


def make_new(out: Path) -> Path:
    """out/.new, marked as a run's own; a script that ends without a save removes it."""
    (out / NEW).mkdir(exist_ok=True)
    (out / NEW / MARK).touch()
    if not dist.is_initialized():  # torchrun may start this again: then it tells that nothing was saved yet
        ending.callback(shutil.rmtree, out / NEW, ignore_errors=True)
    return out / NEW


def commit(out: Path) -> None:
    """Let what a run wrote into out/.new, its first checkpoint too, take the place of an older run."""
    os.rename(out / NEW, out / SAVED)
    replace(out)


def replace(out: Path) -> None:
    """Move a new run into `out`; a kill in between is made good by calling it again."""
    new, old = out / SAVED / FILE_NAME, out / FILE_NAME
    if new.exists():  # nothing was moved yet
        was = _run_in(out)
        files = () if was is None else RUN_FILES.get(was, TRAINED)
        files += (REFERENCE,) if was == "dpo" != stage_of(new) else ()
        for path in [*(second_name(old, step) for step in own_steps(old)), *(out / name for name in files)]:
            path.unlink(missing_ok=True)
        os.replace(new, old)
    for path in (out / SAVED).iterdir():
        if path.name != MARK:
            os.replace(path, out / path.name)
    (out / SAVED / MARK).unlink()
    (out / SAVED).rmdir()


def recover(out: Path) -> None:
    """Finish what a killed run had begun to move, forget what it had not saved; refuse what is no run's."""
    for folder in (out / NEW, out / SAVED):
        with suppress(OSError):  # a kill may have left it without the mark, and empty
            folder.rmdir()
        if os.path.lexists(folder) and (folder.is_symlink() or not (folder / MARK).is_file()):
            raise CheckpointError(
                f"{folder} was not made by a run, which needs this name: move it, or choose another --out"
            )
    if (out / SAVED).is_dir():
        replace(out)
    shutil.rmtree(out / NEW, ignore_errors=True)
    take_back(out / FILE_NAME)


# what a run was started from


def still_finished(ckpt: Checkpoint, config: dict) -> None:
    """Refuse to call a run finished whose parent, reward model or data was made anew since, where they are there."""
    training = ckpt.training or {}
    models = {"init_from": ckpt.parent}
    if config.get("reward", "").partition("+")[0] == "model":
        models["reward_model"] = (training.get("extra") or {}).get("reward_model")
    for key, before in models.items():
        path = Path(config.get(key) or "")
        file = path / FILE_NAME if path.is_dir() else path
        if before and file.is_file():  # else it is gone, but what it became is here
            same_file(ckpt, before, dict(path=str(file), sha256=file_sha256(file)))
    if training.get("data") and (Path(config["data"]) / "meta.json").is_file():
        same_data(ckpt, config["data"], hashes_of(config["data"], training["data"]))


def same_file(ckpt: Checkpoint, before: dict | None, now: dict | None) -> None:
    """Refuse to go on from `ckpt` on another file than it was started on; both as parent_of tells them."""
    if before and now and before["sha256"] != now["sha256"]:
        raise CheckpointError(
            f"cannot resume {ckpt.path}: it started from {before['path']} with sha256 {before['sha256'][:16]}, "
            f"{now['path']} now has {now['sha256'][:16]}"
        )


def hashes_of(directory, names) -> dict:
    """{name: sha256} of files in a data directory, as meta.json says; `verify_data` compares it with the files."""
    files = load_meta(directory).get("files", {})
    return {name: files.get(name, {}).get("sha256") or _hash(Path(directory) / name) for name in names}


def _hash(path: Path) -> str:
    if path.suffix == ".pkl" and not path.exists():
        raise DataError(f"{path}: no such file: data_process.py writes it with --parts={path.stem}")
    return file_sha256(path)


def verify_data(directory, hashes: dict) -> None:
    """Read files of a data directory and refuse those that are not what meta.json says: a second or two a gigabyte."""
    for name, sha256 in hashes.items():
        path = Path(directory) / name
        if file_sha256(path) != sha256:
            raise DataError(f"{path}: its sha256 is not the one in meta.json: it was changed or damaged")


def same_data(ckpt: Checkpoint, directory, now: dict) -> None:
    """Refuse to go on from `ckpt` on other data than it was trained on; `now` is what hashes_of tells of the files."""
    before, run = (ckpt.training or {}).get("data"), f"step {ckpt.step} of {ckpt.path.parent}"
    if before is None:  # an older file
        if _is_main():
            print(f"{ckpt.path} does not say which data it was trained on: {directory} is taken as it is")
        return
    for name in before | now:
        old, new = before.get(name), now.get(name)
        unmentioned = old is None and name.startswith("val.")  # an older file tells only of a mixture's
        if old != new and not unmentioned:
            here = f"is {new[:16]}" if new else "is not read"
            there = f"on {old[:16]}" if old else "without it"
            raise CheckpointError(f"cannot resume: {Path(directory) / name} {here}, {run} was trained {there}")
    if list(before) != [name for name in now if name in before]:
        raise CheckpointError(
            f"cannot resume: {directory} has {', '.join(now)} in this order, {run} was trained on {', '.join(before)}"
        )
