"""dataset/formats.py: what is written is read back, bad files are refused, and run no code."""

import hashlib
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from chains import ROOT
from packing import make_bins

from dataset.corpus import Corpus
from dataset.formats import OURS, BinWriter, DataError, atomic_write, is_running, load_pkl, save_pkl


@pytest.mark.parametrize("vocab_size, size", [(1 << 16, 2), ((1 << 16) + 1, 4)])
def test_bin_round_trip_at_the_edge_of_uint16(tmp_path, vocab_size, size):
    ids = [0, 1, 65535, vocab_size - 1, 7]
    make_bins(tmp_path, {"text": ids}, vocab_size)
    assert (tmp_path / "train.text.bin").stat().st_size == size * len(ids)
    found = Corpus(tmp_path, "train", vocab_size).read(0, 5)
    assert found.tolist() == ids and found.dtype == np.int64


def test_bin_writer_counts_and_hashes_what_it_wrote(tmp_path):
    with BinWriter(tmp_path / "a.bin", 1000) as writer:
        for ids in ([1, 2], np.array([3], np.uint16), [], np.arange(10)[::3]):
            writer.write(ids)
    data = (tmp_path / "a.bin").read_bytes()
    assert data == np.array([1, 2, 3, 0, 3, 6, 9], np.uint16).tobytes() and writer.tokens == 7
    assert writer.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("bad", [1000, 70000, -1])
def test_bin_writer_refuses_an_id_outside_the_vocabulary_and_leaves_nothing(tmp_path, bad):
    with pytest.raises(DataError, match=rf"train\.text\.bin: token id {bad} .*999"):
        make_bins(tmp_path, {"text": [1, 2, 3, bad]})
    assert os.listdir(tmp_path) == []


def test_atomic_write_keeps_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path, "w") as file:
        file.write("half of the n")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_atomic_write_removes_what_one_that_was_killed_left(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    path, gone, alive = tmp_path / "a[1].bin", process.pid, os.getppid()
    others = ["a1.bin.tmp", f"a[1].bin.tmp{gone}", f"a[1].bin.{OURS}", f"a.x.{OURS}", f"a[1].bin.{alive}.{OURS}"]
    for name in [*others, f"a[1].bin.{gone}.{OURS}", f"b.{gone}.{OURS}", f"a[1].bin.{'9' * 30}.{OURS}"]:
        (tmp_path / name).write_text("half")
    with atomic_write(path) as file:
        file.write(b"whole")
    assert {each.name for each in tmp_path.iterdir()} == {*others, "a[1].bin"}


def test_whether_a_process_runs_is_asked_without_a_signal_on_windows(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        patch.setattr(os, "kill", lambda *_: pytest.fail("a Ctrl-C was sent"))
        asked = is_running(os.getpid())
    assert asked


def test_pkl_round_trip(tmp_path):
    data = dict(
        tokens=np.arange(5, dtype=np.uint16),
        offsets=np.array([0, 2, 5]),
        is_val=np.array([True, False]),
        empty=np.zeros(0, np.uint32),
        task_names=["write", "polarity"],
        share=np.float64(0.5),
        n=3,
    )
    save_pkl(tmp_path / "a.pkl", data)
    read = load_pkl(tmp_path / "a.pkl")
    assert read.keys() == data.keys()
    for key, value in data.items():
        assert np.array_equal(read[key], value)
        assert getattr(read[key], "dtype", None) == getattr(value, "dtype", None)
    assert os.listdir(tmp_path) == ["a.pkl"]


@pytest.mark.parametrize("protocol", range(6))
def test_pkl_of_every_protocol_is_read_and_refused_alike(tmp_path, protocol):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(dict(a=np.arange(3)), protocol))
    if protocol >= 3:  # the older ones write bytes through codecs.encode, which is not admitted
        assert load_pkl(tmp_path / "a.pkl")["a"].tolist() == [0, 1, 2]
    else:
        with pytest.raises(DataError, match="_codecs.encode is not allowed"):
            load_pkl(tmp_path / "a.pkl")


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_pkl_of_numpy_itself_is_read(tmp_path, protocol):
    grid = np.arange(6, dtype=np.int16).reshape(2, 3)
    data = dict(rows=grid, columns=grid.T, steps=grid[:, ::2], twice=[grid, grid], number=np.float32(0.5), long=2**70)
    data |= dict(empty=np.zeros((0, 4), bool), texts=["a" * 300, "二"], nothing=None, pair=(1, -2), **{"键": True})
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(data, protocol))
    found = load_pkl(tmp_path / "a.pkl")
    assert found.keys() == data.keys() and found["twice"][0] is found["twice"][1]
    for key, value in data.items():
        assert np.array_equal(found[key], value) and type(found[key]) is type(value), key
        assert getattr(found[key], "dtype", None) == getattr(value, "dtype", None), key


def test_forged_pkl_takes_no_memory_nor_crashes(tmp_path):
    size, header = (1 << 40).to_bytes(8, "little"), b"\x80\x05}\x94\x8c\x01a"
    array = pickle.dumps(dict(a=np.arange(1000)), 5)
    forged = {
        "bytes": header + b"\x8e" + size + b"\0s.",
        "bytearray": header + b"\x96" + size + b"\0s.",
        "text": header + b"\x8d" + size + b"\0s.",
        "place in the memo": header + b"r\xff\xff\xff\x7fK\x01s.",  # pickle's own reader takes 64 GB for it
        "frame": b"\x80\x05\x95" + size + header[2:] + b"K\x01s.",
        "dtype": array.replace(b"i8", b"O8"),
        "byte order": array.replace(b"\x8c\x01<", b"\x8c\x01>"),
        "state": array.replace(b"K\x03\x8c\x01<", b"K\x03K\x01K"),
        "shape": array.replace(b"M\xe8\x03", b"M\xe9\x03"),
        "key of many tuples": b"\x80\x05})" + b"\x85" * 1_000_000 + b"K\x01s.",
        "lists in lists": header + b"]" * 1_000_000 + b"K\x01s.",
    }
    for name, content in forged.items():
        (tmp_path / f"{name}.pkl").write_bytes(content)
    code = """
import resource, sys
from dataset.formats import DataError, load_pkl
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
for path in sys.argv[1:]:
    try:
        print(load_pkl(path), flush=True)
    except DataError as error:
        print(error, flush=True)
"""
    paths = [str(tmp_path / f"{name}.pkl") for name in forged]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    for path, line in zip(paths, done.stdout.splitlines(), strict=True):
        assert line.startswith(path) or line == "{'a': 1}" and "memo" in path, line


class Attack:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_malicious_pkl_is_refused_and_not_executed(tmp_path):
    target, path = tmp_path / "executed", tmp_path / "sft.pkl"
    attacks = [
        Attack(os.mkdir, str(target)),
        Attack(eval, f"__import__('os').mkdir({str(target)!r})"),
        dict(tokens=np.array([Attack(os.mkdir, str(target))], dtype=object)),
        Attack(np.load, str(target)),
        torch.zeros(1),
    ]
    for protocol in (2, 5):
        for data in attacks:
            path.write_bytes(pickle.dumps(data, protocol))
            with pytest.raises(DataError, match=r"sft\.pkl: .* is not allowed"):
                load_pkl(path)
            assert not target.exists()


def test_pkl_cannot_forge_object_arrays_or_call_numpy_types(tmp_path):
    path, rebuild = tmp_path / "sft.pkl", np.zeros(1).__reduce_ex__(5)[0]
    forged = [
        np.array([{}], dtype=object),
        Attack(np.ndarray, (1,), "O", b"12345678"),
        Attack(np.ndarray, (1,), np.dtype("i8"), b"12345678"),
        Attack(rebuild, b"12345678", "O", (1,), "C"),
        Attack(rebuild, b"12345678", np.dtype("i8"), (10**13,), "C"),
        np.dtype([("a", "O")]),
    ]
    for value in forged:
        path.write_bytes(pickle.dumps(dict(a=[value]), 5))
        with pytest.raises(DataError, match=r"sft\.pkl"):
            load_pkl(path)


def test_damaged_or_missing_pkl(tmp_path):
    path = tmp_path / "sft.pkl"
    with pytest.raises(DataError, match=r"sft\.pkl not found"):
        load_pkl(path)
    save_pkl(path, dict(tokens=np.arange(1000)))
    whole = path.read_bytes()
    for damaged in (b"", b"not a pickle", whole[:100], whole[:-1], pickle.dumps([1, 2])):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"sft\.pkl"):
            load_pkl(path)
