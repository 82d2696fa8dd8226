"""corpora/hub.py on local folders: a dataset of Hugging Face by shards, and a cache laid out like ModelScope's."""

import functools
import json
import sys

import pytest

from corpora import hub
from corpora.sources import SOURCES, list_sources, list_units, parse_source, read_records
from dataset.formats import DataError


def write_rows(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def records(units):
    return [record for unit in units for _, record, _ in read_records(unit)]


def test_hub_directory_by_shards(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="reads hub datasets")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # it may have been imported before
    for i in range(3):
        rows = [{"title": "书", "chapter": f"第{i}章", "text": f"正文{i}{j}"} for j in range(2)]
        write_rows(tmp_path / "copy" / "data" / f"part-{i}.jsonl", *rows)
    write_rows(tmp_path / "copy" / "example.jsonl", {"text": "例"})
    units = hub.hub_units("novels", "webnovel", str(tmp_path / "copy"), SOURCES["webnovel"].files)
    assert [(unit.source, unit.kind, unit.start, unit.stop) for unit in units] == [
        ("novels", "hub", i, 3) for i in range(3)
    ]
    results = [item for unit in units for item in read_records(unit)]
    assert [record["text"] for _, record, _ in results] == [
        f"书\n第{i}章\n正文{i}{j}" for i in range(3) for j in (0, 1)
    ]
    assert results[3][0] == f"{tmp_path / 'copy'}:shard 1 record 2"
    assert len(records(list_units("x", "webnovel", tmp_path / "copy"))) == 6  # as files, example.jsonl left out too


def test_hugging_face_that_is_not_reached_is_one_line(monkeypatch):
    hugging_face = pytest.importorskip("huggingface_hub", reason="reads hub datasets")
    there = functools.partialmethod(hugging_face.HfApi.__init__, endpoint="http://127.0.0.1:9")  # nothing listens
    monkeypatch.setattr(hugging_face.HfApi, "__init__", there)
    for path in ("hf:BelleGroup/train_2M_CN", None):
        with pytest.raises(DataError, match=r"^hf:BelleGroup/train_2M_CN: not found or not reached: .*NAME=PATH$"):
            list_units("x", "belle", path)


# What of ModelScope's package is used, on a cache that was filled before: owner/name, a dot in a name as three _.
MODELSCOPE = """
import os
from pathlib import Path

def dataset_snapshot_download(dataset_id):
    owner, name = dataset_id.split("/")
    folder = Path(os.environ["MODELSCOPE_CACHE"]) / "datasets" / owner / name.replace(".", "___")
    if not folder.is_dir():
        raise ValueError(f"The request id: 1, {dataset_id} not exists\\nmore of it")
    return str(folder)
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A folder in the place of ModelScope's cache of datasets."""
    package = tmp_path / "packages" / "modelscope"
    (package / "hub").mkdir(parents=True)
    for name, code in {"__init__": "", "hub/__init__": "", "hub/snapshot_download": MODELSCOPE}.items():
        (package / f"{name}.py").write_text(code)
    for name in [name for name in sys.modules if name.partition(".")[0] == "modelscope"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "datasets"
    for name in ("modelscope", "modelscope.hub", "modelscope.hub.snapshot_download"):
        sys.modules.pop(name, None)


def test_modelscope_datasets_are_read_as_the_files_of_its_cache(cache):
    wiki = cache / "AI-ModelScope" / "wikipedia-cn-20230720-filtered"
    write_rows(wiki / "wikipedia.jsonl", dict(completion="一"), dict(completion="二"))
    (wiki / ".msc").write_bytes(b"\x80notes of the download")
    (wiki / "README.md").write_text("说明")
    for path in (None, "ms:AI-ModelScope/wikipedia-cn-20230720-filtered"):
        units = list_units("x", "wikipedia", path, default_hub="modelscope")
        assert [(unit.kind, unit.path) for unit in units] == [("lines", str(wiki / "wikipedia.jsonl"))]
        assert records(units) == [{"text": "一"}, {"text": "二"}]
    write_rows(cache / "AI-ModelScope" / "firefly-train-1___1M" / "a.jsonl", dict(input="问", target="答"))
    (record,) = records(list_units("x", "firefly", None, default_hub="modelscope"))
    assert [message["content"] for message in record["messages"]] == ["问", "答"]
    pair = dict(prompt="问", pos_resp="好", neg_resp="差")
    write_rows(cache / "iic" / "CValues-Comparison" / "train.jsonl", pair)
    (record,) = records(list_units("x", "cvalues", None, default_hub="modelscope"))
    assert (record["chosen"], record["rejected"]) == ("好", "差")


def test_any_layout_takes_an_id_of_a_hub(cache):
    label, layout, path = parse_source("chat:alpaca=ms:AI-ModelScope/alpaca-gpt4-data-zh")
    assert (label, layout, path) == ("chat", "alpaca", "ms:AI-ModelScope/alpaca-gpt4-data-zh")
    write_rows(cache / "AI-ModelScope" / "alpaca-gpt4-data-zh" / "train.jsonl", dict(instruction="问", output="答"))
    assert len(records(list_units(label, layout, path))) == 1
    for path in ("ms:alpaca", "hf:a/b/c", "ms:"):
        with pytest.raises(DataError, match=f"^{path}: the id of a dataset is needed, as in .s?f?:OWNER/NAME"):
            list_units(label, layout, path)


def test_what_a_hub_lacks_is_one_line(cache):
    with pytest.raises(DataError, match=r"^ms:a/b: not found or not reached: .* a/b not exists; a copy"):
        list_units("x", "alpaca", "ms:a/b")
    with pytest.raises(DataError, match="^webnovel is not known on modelscope; write webnovel=hf:wdndev/"):
        list_units("x", "webnovel", None, default_hub="modelscope")
    with pytest.raises(DataError, match="^cvalues is not known on huggingface; write cvalues=ms:iic/CV"):
        list_units("x", "cvalues", None)
    assert parse_source("cvalues") == ("cvalues", "cvalues", None)
    with pytest.raises(DataError, match="a path is needed"):
        parse_source("alpaca")


def test_an_absent_package_is_named(monkeypatch):
    for name, path in (("modelscope", "ms:a/b"), ("datasets", "hf:a/b")):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setattr(hub, "latest", lambda name: "")
        with pytest.raises(DataError, match=rf"^{path}: .*pip install {name}"):
            list_units("x", "alpaca", path)


def test_every_id_is_of_a_known_layout():
    assert hub.MODELSCOPE.keys() <= SOURCES.keys()
    listed = {line.split()[0]: line for line in list_sources().splitlines()}
    assert all(name in listed[layout] for layout, name in hub.MODELSCOPE.items())
