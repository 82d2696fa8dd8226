"""Corpora of the hubs: a Hugging Face dataset is read as a stream, shard by shard; ModelScope's, for readers who cannot
reach that, are downloaded into its cache and read as the files they are.

ModelScope's download was tried on folders laid out like its cache, not over a network.
"""

import re
from contextlib import contextmanager
from pathlib import Path

from corpora.files import Unit
from dataset.formats import DataError

HUBS = {"huggingface": "hf:", "modelscope": "ms:"}  # what stands before an id that is given in the place of a path

# Layouts whose data stands on ModelScope too, as ms-swift's table of datasets has it (CValues: there alone).
MODELSCOPE = {
    "wikipedia": "AI-ModelScope/wikipedia-cn-20230720-filtered",
    "zhihu": "OmniData/Zhihu-KOL",
    "belle": "AI-ModelScope/train_2M_CN",
    "firefly": "AI-ModelScope/firefly-train-1.1M",
    "cvalues": "iic/CValues-Comparison",
    "zhihu_rlhf": "AI-ModelScope/zhihu_rlhf_3k",
    "hh_rlhf_cn": "AI-ModelScope/hh_rlhf_cn",
}


def path_of(layout, huggingface, hub):
    """hf:OWNER/NAME or ms:OWNER/NAME of a layout's own dataset on one of the HUBS; `huggingface` is its id there."""
    names = dict(huggingface=huggingface, modelscope=MODELSCOPE.get(layout))
    if names[hub] is None:
        others = [f"{layout}={HUBS[other]}{name}" for other, name in names.items() if name]
        raise DataError(f"{layout} is not known on {hub}; write {' or '.join([*others, f'{layout}=PATH'])}")
    return HUBS[hub] + names[hub]


def on_hub(path):
    """(hub, id) of a path like hf:OWNER/NAME or ms:OWNER/NAME; (None, path) of any other."""
    for hub, prefix in HUBS.items():
        if str(path).startswith(prefix):
            name = str(path).removeprefix(prefix)
            if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
                raise DataError(f"{path}: the id of a dataset is needed, as in {prefix}OWNER/NAME")
            return hub, name
    return None, path


def hub_units(label, layout, name, globs=""):
    """A unit for each shard of the train split of a Hugging Face dataset, or of a local directory laid out like one.

    They keep the dataset's commit: all are read of the same state, and one that has changed makes other shards.
    """
    revision = "" if Path(name).is_dir() else latest(name)
    with hub_dataset(name, globs, revision) as dataset:
        shards = dataset.num_shards
    return [Unit(label, layout, name, "hub", i, shards, revision=revision) for i in range(shards)]


def latest(name):
    """The newest commit of a Hugging Face dataset."""
    try:
        from huggingface_hub import HfApi

        return HfApi().dataset_info(name).sha
    except Exception as error:  # the hub raises its own, requests', httpx's and OS errors
        raise unreachable(f"hf:{name}", error) from None


@contextmanager
def hub_dataset(name, globs, revision=""):
    """The train split as a stream. A JSON array is loaded whole by `datasets`: better download it and give its path."""
    try:
        import datasets
    except ImportError:
        raise DataError(f"hf:{name}: reading from the hub needs datasets (pip install datasets)") from None
    options = dict(split="train", streaming=True, revision=revision or None)
    try:
        yield datasets.load_dataset(name, data_files=globs.split() or None, **options)
    except Exception as error:  # it raises its own, requests', httpx's and OS errors
        raise unreachable(f"hf:{name}", error) from None


def read_hub(unit, globs):
    with hub_dataset(unit.path, globs, unit.revision) as dataset:
        for number, row in enumerate(dataset.shard(num_shards=unit.stop, index=unit.start), 1):
            yield f"{unit.path}:shard {unit.start} record {number}", row, None


def download(name):
    """The folder of a ModelScope dataset's files; those that its cache holds already are not downloaded again."""
    try:
        from modelscope.hub.snapshot_download import dataset_snapshot_download
    except ImportError as error:
        raise DataError(f"ms:{name}: ModelScope needs modelscope (pip install modelscope): {error}") from None
    try:
        return dataset_snapshot_download(name)
    except Exception as error:  # it raises its own, requests' and OS errors
        raise unreachable(f"ms:{name}", error) from None


def unreachable(name, error):
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return DataError(f"{name}: not found or not reached: {reason}; a copy on this machine can be given as NAME=PATH")
