"""The file of a checkpoint: what is refused, what survives a failed save or a kill, which older ones stay."""

import contextlib
import errno
import functools
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from saving import cut_short, killed_before, run_config, save_steps, steps, write

from common.checkpoint import CheckpointError, find, load
from common.resume import begin
from dataset.formats import OURS


def test_find_says_where_it_looked_and_what_is_there(tmp_path):
    with pytest.raises(CheckpointError, match=re.escape(f"no checkpoint at {tmp_path / 'gone'}")):
        find(tmp_path / "gone")
    write(tmp_path / "sft" / "ckpt.pt")
    assert find(tmp_path / "sft") == find(tmp_path / "sft" / "ckpt.pt") == tmp_path / "sft" / "ckpt.pt"
    with pytest.raises(CheckpointError, match=re.escape(f"there is one in {tmp_path / 'sft'}")):
        find(tmp_path)


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_a_file_cut_short_is_refused_by_name(tmp_path, keep):
    path = write(tmp_path) / "ckpt.pt"
    size = path.stat().st_size
    os.truncate(path, int(size * keep) if keep < 1 else keep)
    with pytest.raises(CheckpointError, match=re.escape(f"{path}: cut short")):
        load(tmp_path)


def test_one_flipped_bit_of_a_weight_is_noticed(tmp_path):
    path = write(tmp_path) / "ckpt.pt"
    data = bytearray(path.read_bytes())
    weight = load(tmp_path).weights["layers.0.attention.wq.weight"].numpy().tobytes()
    data[data.index(weight) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=re.escape(f"{path}: damaged")):
        load(tmp_path)


class Payload:
    """Unpickled without care, it makes the file `trap`."""

    def __init__(self, trap: Path):
        self.trap = trap

    def __reduce__(self):
        return os.mkdir, (str(self.trap),)


@pytest.mark.parametrize("container", ["torch", "bare pickle"])
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path, container):
    path, trap = tmp_path / "ckpt.pt", tmp_path / "trap"
    if container == "torch":
        torch.save(dict(format_version=1, weights=Payload(trap)), path)
    else:
        path.write_bytes(pickle.dumps(Payload(trap)))
    with pytest.raises(CheckpointError, match=re.escape(str(path))) as caught:
        load(path)
    assert not trap.exists()
    assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)
    if container == "torch":
        assert "mkdir" in str(caught.value)
    else:  # the trap is a real one
        pickle.loads(path.read_bytes())
        assert trap.exists()


def test_a_file_from_before_document_ids_is_ours(tmp_path):
    path = write(tmp_path / "ckpt.pt", document_ids=(1, 1))
    payload = torch.load(path, weights_only=True)
    del payload["document_ids"]
    torch.save(payload, path)
    assert load(path).document_ids == [2, 2]


@pytest.mark.parametrize("key, value", [("step", -1), ("step", 10**18), ("tokens_seen", -1), ("tokens_seen", 1 << 63)])
def test_counts_that_no_run_reaches_are_refused(tmp_path, key, value):
    path = write(tmp_path / "ckpt.pt", **{key: value})
    with pytest.raises(
        CheckpointError, match=f"ckpt.pt: not a checkpoint of this project: {key}={value} is out of range"
    ):
        load(path)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(step=True), "its step is no int"),
        (dict(document_ids=[2, 48]), r"document_ids=\[2, 48\]: the vocabulary has 0 to 47"),
        (dict(quant={}), "quant names no method"),
        (dict(tokenizer=torch.zeros(0, dtype=torch.uint8)), "its tokenizer is empty"),
        (dict(tokenizer=torch.zeros(9)), "its tokenizer is torch.float32, no bytes"),
        (dict(training=dict(data={1: 2})), "training.data names no files"),
        (dict(training=dict(optimizer=[], rng={})), "training has optimizer, rng only"),
        (dict(config={1: 2}), "config holds what no config file says"),
        (dict(config=dict(model=[torch.zeros(1)])), "config holds what no config file says"),
    ],
)
def test_fields_that_no_run_writes_are_refused_by_name(tmp_path, change, message):
    path = write(tmp_path / "ckpt.pt")
    torch.save(torch.load(path, weights_only=True) | change, path)
    with pytest.raises(CheckpointError, match=f"ckpt.pt: not a checkpoint of this project: {message}"):
        load(path)


def test_other_torch_files_and_other_versions_are_refused(tmp_path):
    path = tmp_path / "ckpt.pt"
    for foreign in ({"tok_embeddings.weight": torch.zeros(2)}, [1, 2]):
        torch.save(foreign, path)
        with pytest.raises(CheckpointError, match="no format_version"):
            load(path)
    for change, message in (
        (dict(format_version=2), "format version 2, this code reads version 1"),
        (dict(surprise=1), "fields missing or unknown: surprise"),
    ):
        write(path)
        torch.save(torch.load(path, weights_only=True) | change, path)
        with pytest.raises(CheckpointError, match=message):
            load(path)


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    resource = pytest.importorskip("resource", reason="no file size limits on this system")
    path = write(tmp_path, step=1) / "ckpt.pt"
    before, (soft, hard) = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))  # the kernel stops the write half-way
    try:
        with pytest.raises(CheckpointError) as caught:
            write(tmp_path, step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value).startswith(f"cannot save {path}: File too large; the previous checkpoint")
    assert [file.name for file in tmp_path.iterdir()] == ["ckpt.pt"]
    assert path.read_bytes() == before and load(tmp_path).step == 1


def test_a_first_save_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "out").write_text("a file where the run directory should be")
    with pytest.raises(CheckpointError, match="cannot save"):
        write(tmp_path / "out" / "ckpt.pt")
    assert not list(tmp_path.rglob("ckpt.pt*"))


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    write(tmp_path, step=1)
    with pytest.raises(CheckpointError, match="holds pathlib.* previous checkpoint .* is intact"):
        write(tmp_path, step=2, extra=dict(where=Path("x")))
    assert [file.name for file in tmp_path.iterdir()] == ["ckpt.pt"]
    assert load(tmp_path).step == 1


def test_the_last_checkpoints_are_kept(tmp_path):
    save_steps(tmp_path, 0, 5, 90, 100, 1000, keep_last=3)
    assert steps(tmp_path) == {"ckpt.pt": 1000, "ckpt-100.pt": 100, "ckpt-90.pt": 90}
    (tmp_path / "ckpt-mine.pt").write_bytes((tmp_path / "ckpt.pt").read_bytes())
    save_steps(tmp_path, 1001, keep_last=1)
    assert steps(tmp_path) == {"ckpt.pt": 1001, "ckpt-mine.pt": 1000}


def test_keeping_one_copies_nothing(tmp_path):
    save_steps(tmp_path, 1)
    before = (tmp_path / "ckpt.pt").stat()
    save_steps(tmp_path, 2)
    kept = (tmp_path / "ckpt-1.pt").stat()
    assert (kept.st_ino, kept.st_nlink) == (before.st_ino, 1)


@pytest.mark.parametrize("name_it", [os.link, shutil.copy], ids=["link", "copy"])
@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_users_second_name_of_a_checkpoint_stays(tmp_path, name_it, keep_last):
    save_steps(tmp_path, 5, 6, keep_last=keep_last)
    name_it(tmp_path / "ckpt.pt", tmp_path / "ckpt-6.pt")
    begin(run_config(tmp_path, resume=True), "sft")
    save_steps(tmp_path, 7, 8, 9, keep_last=keep_last)
    own = {"ckpt-8.pt": 8} if keep_last == 2 else {}
    assert steps(tmp_path) == {"ckpt.pt": 9, "ckpt-6.pt": 6} | own


def test_a_users_copy_that_a_damaged_run_goes_on_from_stays(tmp_path):
    save_steps(tmp_path, 5, 6, keep_last=1)
    shutil.copy(tmp_path / "ckpt.pt", tmp_path / "ckpt-6.pt")
    save_steps(tmp_path, 7, keep_last=1)
    cut_short(tmp_path / "ckpt.pt")
    assert begin(run_config(tmp_path, resume=True), "sft").step == 6
    save_steps(tmp_path, 8, 9, keep_last=1)
    assert steps(tmp_path) == {"ckpt.pt": 9, "ckpt-6.pt": 6}


def test_a_save_that_fails_gives_no_second_name(tmp_path, monkeypatch):
    save_steps(tmp_path, 1, 2)
    with monkeypatch.context() as patched, pytest.raises(CheckpointError, match="No space left on device"):
        patched.setattr(os, "fsync", full_disk)
        save_steps(tmp_path, 3)
    assert steps(tmp_path) == {"ckpt.pt": 2, "ckpt-1.pt": 1} and len(list(tmp_path.iterdir())) == 2


def full_disk(_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def refuse_links(*_):
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


def test_without_hard_links_the_previous_one_is_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", refuse_links)
    save_steps(tmp_path, 1, 2, 3)
    assert steps(tmp_path) == {"ckpt.pt": 3, "ckpt-2.pt": 2}


def test_a_disk_that_fills_up_while_the_previous_one_is_copied_leaves_it(tmp_path, monkeypatch):
    def fill(_, target):
        target.write(b"half of")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save_steps(tmp_path, 1, 2)
    monkeypatch.setattr(os, "link", refuse_links)
    monkeypatch.setattr(shutil, "copyfileobj", fill)
    with pytest.raises(CheckpointError, match=r"No space left on device; the previous checkpoint .*ckpt.pt is intact"):
        save_steps(tmp_path, 3)
    assert steps(tmp_path) == {"ckpt.pt": 2, "ckpt-1.pt": 1}
    assert len(list(tmp_path.iterdir())) == 2


def test_a_save_over_a_damaged_checkpoint_keeps_the_whole_ones(tmp_path):
    save_steps(tmp_path, 1, 2)
    cut_short(tmp_path / "ckpt.pt")
    save_steps(tmp_path, 3)
    assert steps(tmp_path) == {"ckpt.pt": 3, "ckpt-1.pt": 1}


def whole_steps(out: Path) -> set[int]:
    found = set()
    for file in out.glob("*.pt"):
        with contextlib.suppress(CheckpointError):
            found.add(load(file).step)
    return found


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
@pytest.mark.parametrize("damaged", [False, True], ids=["whole", "damaged"])
def test_a_kill_between_any_two_file_operations_leaves_a_run_to_resume(tmp_path, links, damaged, monkeypatch):
    if not links:
        monkeypatch.setattr(os, "link", refuse_links)
    killed, states = True, []
    while killed:
        out = tmp_path / str(len(states))
        save_steps(out / "ckpt.pt", 1, 2)
        killed = killed_before(len(states), functools.partial(save_steps, out, 3))
        states.append({re.sub(rf"\d+\.{OURS}", "tmp", file.name) for file in out.iterdir()})
        if damaged:  # and with it what is another name of the same file
            cut_short(out / "ckpt.pt")
        newest = max(whole_steps(out))
        assert newest in ({1, 2} if damaged else {2, 3})
        assert begin(run_config(out, resume=True), "sft").step == newest
        save_steps(out, 4)
        assert whole_steps(out) >= {4, newest}
        # one too many stays where nobody can tell whose ckpt-2.pt is: gone on from, or a copy that none lists yet
        both = newest == 2 and {"ckpt-1.pt", "ckpt-2.pt"} <= states[-1] and (damaged or not links)
        expected = {"ckpt.pt", f"ckpt-{newest}.pt"} | ({"ckpt-1.pt"} if both else set())
        assert {file.name for file in out.iterdir()} == expected
    before, after, tmp = {"ckpt.pt", "ckpt-1.pt"}, {"ckpt.pt", "ckpt-2.pt"}, {"ckpt.pt.tmp"}
    reached = [before, before | tmp, before | tmp | {"ckpt-2.pt.tmp"}, before | after | tmp, before | after, after]
    assert [state for i, state in enumerate(states) if state not in states[:i]] == reached
