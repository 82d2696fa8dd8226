"""Checkpoints: what is refused, what survives a failed save, and that a round trip is exact."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
import torch
from chains import ROOT

from common import checkpoint
from common.checkpoint import CheckpointError, begin, build_model, find, load, restore, save
from common.stage import Interrupt
from model import Llama, ModelConfig

TOKENIZER = bytes(range(256))
CONFIG = dict(out="", lr=1e-3, max_steps=10, betas=(0.9, 0.95), model=dict(dim=16), resume=False, overwrite=False)


def tiny(**changes) -> Llama:
    torch.manual_seed(0)
    config = dict(dim=16, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=48, max_seq_len=16) | changes
    return Llama(ModelConfig(**config))


def write(path: Path, model=None, **changes) -> Path:
    """Save a checkpoint of a tiny model, with `changes` to the arguments of `save`."""
    arguments = dict(stage="sft", step=7, tokens_seen=700, tokenizer=TOKENIZER, config=CONFIG | {"out": str(path)})
    save(path, model=model or tiny(), **arguments | changes)
    return path


def train(model, optimizer, steps: int) -> list[float]:
    """Steps on random tokens: the losses depend on weights, optimizer moments and the random state alike."""
    losses = []
    for _ in range(steps):
        ids = torch.randint(0, 48, (2, 9))
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_round_trip_keeps_every_field(tmp_path):
    model, parent = tiny(), dict(path="out/pretrain/ckpt.pt", stage="pretrain", sha256="0" * 64)
    write(tmp_path, model, parent=parent, extra=dict(position=3), document_ids=(1, 1))
    ckpt = load(tmp_path)
    assert (ckpt.path, ckpt.stage, ckpt.step, ckpt.tokens_seen) == (tmp_path / "ckpt.pt", "sft", 7, 700)
    assert (ckpt.tokenizer, ckpt.parent, ckpt.quant, ckpt.document_ids) == (TOKENIZER, parent, None, [1, 1])
    assert ckpt.config == CONFIG | {"out": str(tmp_path)}
    assert ckpt.training["extra"] == dict(position=3)
    assert ckpt.git_commit is None or re.fullmatch("[0-9a-f]{40}", ckpt.git_commit)
    assert ckpt.weights.keys() == model.state_dict().keys()
    rebuilt = build_model(ckpt)
    assert rebuilt.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(rebuilt.state_dict()[name], tensor), name


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_resumed_training_equals_uninterrupted_training(tmp_path, make):
    model = tiny(dropout=0.1)
    optimizer = make(model.parameters(), lr=0.1)
    train(model, optimizer, 3)
    write(tmp_path, model, optimizer=optimizer)
    expected = train(model, optimizer, 3)

    torch.manual_seed(999)
    ckpt = load(tmp_path)
    again = Llama(ModelConfig(**ckpt.model_config))
    optimizer = make(again.parameters(), lr=0.7)
    restore(ckpt, again, optimizer)
    assert train(again, optimizer, 3) == expected
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_several_optimizers_are_restored_in_order(tmp_path):
    model = tiny()
    parts = [p for p in model.parameters() if p.dim() == 2], [p for p in model.parameters() if p.dim() == 1]
    optimizers = [torch.optim.SGD(parts[0], lr=0.1, momentum=0.9), torch.optim.AdamW(parts[1], lr=0.2)]
    write(tmp_path, model, optimizer=optimizers)
    fresh = [torch.optim.SGD(parts[0], lr=1.0), torch.optim.AdamW(parts[1], lr=1.0)]
    restore(load(tmp_path), model, fresh)
    assert [each.param_groups[0]["lr"] for each in fresh] == [0.1, 0.2]
    with pytest.raises(CheckpointError, match="optimizer"):
        restore(load(tmp_path), model, fresh[0])


def test_prefixes_of_compile_and_ddp_are_stripped(tmp_path):
    class Wrapper(torch.nn.Module):  # what DistributedDataParallel looks like from outside
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = tiny()
    wrapped = Wrapper(torch.compile(model))
    assert all(name.startswith("module._orig_mod.") for name in wrapped.state_dict())
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    write(tmp_path, wrapped, optimizer=optimizer)
    ckpt = load(tmp_path)
    assert ckpt.weights.keys() == model.state_dict().keys()
    before = ckpt.weights["norm.weight"].clone()
    with torch.no_grad():
        model.norm.weight.add_(1)
    restore(ckpt, wrapped, optimizer)
    assert torch.equal(model.norm.weight, before)


def test_weights_are_stored_in_float32(tmp_path):
    model = tiny().bfloat16()
    write(tmp_path, model)
    assert {tensor.dtype for tensor in load(tmp_path).weights.values()} == {torch.float32}


def test_parent_of_is_the_sha256_of_the_file(tmp_path):
    write(tmp_path)
    expected = hashlib.sha256((tmp_path / "ckpt.pt").read_bytes()).hexdigest()
    parent = checkpoint.parent_of(load(tmp_path))
    assert parent == dict(path=str(tmp_path / "ckpt.pt"), stage="sft", sha256=expected)


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


def test_scalar_head_takes_the_trunk_of_a_language_model(tmp_path):
    for tied in (True, False):
        model = tiny(tied=tied)
        write(tmp_path, model)
        value_model = build_model(load(tmp_path), scalar_head=True)
        assert value_model.config.scalar_head
        trunk = {name: tensor for name, tensor in model.state_dict().items() if name != "output.weight"}
        assert value_model.state_dict().keys() == trunk.keys() | {"scalar.weight"}
        assert all(torch.equal(value_model.state_dict()[name], tensor) for name, tensor in trunk.items())
        ids = torch.randint(0, 48, (2, 5))
        assert torch.equal(value_model.hidden(ids), model.hidden(ids))
        assert torch.equal(value_model.values(ids), torch.zeros(2, 5))


def test_a_trained_scalar_head_is_kept_and_is_no_language_model(tmp_path):
    model = tiny(scalar_head=True)
    torch.nn.init.normal_(model.scalar.weight)
    write(tmp_path, model)
    for scalar_head in (None, True):
        assert torch.equal(build_model(load(tmp_path), scalar_head).scalar.weight, model.scalar.weight)
    with pytest.raises(CheckpointError, match=r"scalar.weight is \(1, 16\) in the file, missing in the model"):
        build_model(load(tmp_path), scalar_head=False)


def test_weights_that_do_not_fit_are_named_with_both_shapes(tmp_path):
    write(tmp_path)
    ckpt = load(tmp_path)
    wider = replace(ckpt, model_config=ckpt.model_config | {"hidden_dim": 96})
    with pytest.raises(CheckpointError) as caught:
        build_model(wider)
    assert str(tmp_path / "ckpt.pt") in str(caught.value)
    assert "layers.0.feed_forward.w1.weight is (64, 16) in the file, (96, 16) in the model" in str(caught.value)
    for scalar_head in (None, True):
        weights = {name: tensor for name, tensor in ckpt.weights.items() if name != "norm.weight"}
        with pytest.raises(CheckpointError, match=r"norm.weight is missing in the file, \(16,\) in the model"):
            build_model(replace(ckpt, weights=weights), scalar_head)
    with pytest.raises(CheckpointError, match=r"extra is \(1,\) in the file, missing in the model"):
        build_model(replace(ckpt, weights=ckpt.weights | {"extra": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match="n_experts"):
        build_model(replace(ckpt, model_config=ckpt.model_config | {"n_experts": 8}))


def test_restore_refuses_another_architecture_and_missing_training_state(tmp_path):
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    write(tmp_path, model, optimizer=optimizer)
    other = tiny(n_kv_heads=4)
    with pytest.raises(CheckpointError, match="n_kv_heads is 2 there and 4 in this run's model") as caught:
        restore(load(tmp_path), other, torch.optim.SGD(other.parameters(), lr=0.1))
    assert str(tmp_path / "ckpt.pt") in str(caught.value)
    write(tmp_path, model)
    with pytest.raises(CheckpointError, match="saved without the optimizer"):
        restore(load(tmp_path), model, optimizer)


@pytest.fixture(scope="module")
def tokenizer_bytes(tmp_path_factory) -> bytes:
    prefix = tmp_path_factory.mktemp("tokenizer") / "small"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world", "tiny llama"] * 20),
        model_prefix=str(prefix),
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return prefix.with_suffix(".model").read_bytes()


def test_the_tokenizer_travels_in_the_checkpoint(tmp_path, tokenizer_bytes):
    write(tmp_path, tokenizer=tokenizer_bytes)
    tokenizer = checkpoint.tokenizer_of(load(tmp_path))
    assert tokenizer.model_bytes == tokenizer_bytes
    assert tokenizer.decode(tokenizer.encode("hello llama")).strip() == "hello llama"


def test_data_of_another_vocabulary_or_tokenizer_is_refused(tmp_path, tokenizer_bytes):
    write(tmp_path, tokenizer=tokenizer_bytes)
    ckpt, meta_path = load(tmp_path), tmp_path / "data" / "meta.json"
    tokenizer, sha256 = checkpoint.tokenizer_of(ckpt), hashlib.sha256(tokenizer_bytes).hexdigest()
    good = dict(vocab_size=tokenizer.vocab_size, tokenizer_sha256=sha256)
    checkpoint.check_data(tokenizer, ckpt.path, good, meta_path)
    for key, wrong in (("vocab_size", 64793), ("tokenizer_sha256", "ab" * 32)):
        with pytest.raises(CheckpointError) as caught:
            checkpoint.check_data(tokenizer, ckpt.path, good | {key: wrong}, meta_path)
        assert f"{key} is {good[key]} in {ckpt.path} and {wrong} in {meta_path}" == str(caught.value)


def run_config(out: Path, **changes) -> dict:
    return CONFIG | {"out": str(out)} | changes


def test_begin_makes_the_run_directory_and_starts_at_zero(tmp_path, capsys):
    out = tmp_path / "a" / "b"
    assert begin(run_config(out), "sft") is None and out.is_dir()
    assert capsys.readouterr().out == ""
    assert begin(run_config(out, resume=True), "sft") is None
    assert capsys.readouterr().out == f"nothing to resume in {out}, starting at step 0\n"
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot make the run directory"):
        begin(run_config(tmp_path / "file"), "sft")


def test_begin_does_not_touch_a_checkpoint_unasked(tmp_path):
    path = write(tmp_path) / "ckpt.pt"
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="--resume .* --overwrite") as caught:
        begin(run_config(tmp_path), "sft")
    assert str(path) in str(caught.value)
    with pytest.raises(CheckpointError, match="give one of them"):
        begin(run_config(tmp_path, resume=True, overwrite=True), "sft")
    assert path.read_bytes() == before


def test_begin_overwrite_removes_the_old_run_only(tmp_path, monkeypatch):
    write(tmp_path)
    for name in ("metrics.jsonl", "samples.txt", "loss.png", "notes.md"):
        (tmp_path / name).write_text("old")
    monkeypatch.setenv("RANK", "1")  # only rank 0 removes: another rank may come after its first writes
    assert begin(run_config(tmp_path, overwrite=True), "sft") is None
    assert len(list(tmp_path.iterdir())) == 5
    monkeypatch.setenv("RANK", "0")
    assert begin(run_config(tmp_path, overwrite=True), "sft") is None
    assert [file.name for file in tmp_path.iterdir()] == ["notes.md"]


def test_begin_resume_returns_the_checkpoint(tmp_path, capsys):
    write(tmp_path)
    changes = dict(max_steps=99, betas=[0.9, 0.95], device="cpu", eval_interval=5, eval_tokens=9, resume=True)
    assert begin(run_config(tmp_path, **changes), "sft").step == 7
    assert capsys.readouterr().out == f"resuming {tmp_path} at step 7\n"
    with pytest.raises(CheckpointError, match="from stage sft, this is dpo"):
        begin(run_config(tmp_path, resume=True), "dpo")


@pytest.mark.parametrize(
    "changes, key, old, new",
    [
        (dict(lr=0.5), "lr", "0.001", "0.5"),
        (dict(model=dict(dim=32)), "model.dim", "16", "32"),
        (dict(seed=3), "seed", "absent", "3"),
    ],
)
def test_begin_resume_refuses_a_changed_key(tmp_path, changes, key, old, new):
    write(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        begin(run_config(tmp_path, resume=True, **changes), "sft")
    assert f"{key} is {old} in {tmp_path / 'ckpt.pt'} and {new} in this run's config" in str(caught.value)


def steps(out: Path) -> dict[str, int]:
    """{file name: step} of all checkpoints in a run directory."""
    return {file.name: load(file).step for file in sorted(out.glob("*.pt"))}


def save_steps(out: Path, *numbers: int, keep_last: int = 2) -> None:
    for step in numbers:
        write(out, step=step, keep_last=keep_last)


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


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


def refuse_links(*_):
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


def test_without_hard_links_the_previous_one_is_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", refuse_links)
    save_steps(tmp_path, 1, 2, 3)
    assert steps(tmp_path) == {"ckpt.pt": 3, "ckpt-2.pt": 2}


def test_a_disk_that_fills_up_while_the_previous_one_is_copied_leaves_it(tmp_path, monkeypatch):
    def fill(_, target):
        Path(target).write_bytes(b"half of")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save_steps(tmp_path, 1, 2)
    monkeypatch.setattr(os, "link", refuse_links)
    monkeypatch.setattr(shutil, "copyfile", fill)
    with pytest.raises(CheckpointError, match=r"No space left on device; the previous checkpoint .*ckpt.pt is intact"):
        save_steps(tmp_path, 3)
    assert steps(tmp_path) == {"ckpt.pt": 2, "ckpt-1.pt": 1}
    assert len(list(tmp_path.iterdir())) == 2


def test_a_save_over_a_damaged_checkpoint_keeps_the_whole_ones(tmp_path):
    save_steps(tmp_path, 1, 2)
    cut_short(tmp_path / "ckpt.pt")
    save_steps(tmp_path, 3)
    assert steps(tmp_path) == {"ckpt.pt": 3, "ckpt-1.pt": 1}


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(load(path).weights["norm.weight"].numpy().tobytes())] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage, reason",
    [
        (cut_short, "cut short or not a checkpoint; "),
        (lambda path: os.truncate(path, 0), "cut short or not a checkpoint; "),
        (lambda path: path.write_bytes(bytes(path.stat().st_size)), "cut short or not a checkpoint; "),
        (flip_a_bit, "damaged, the CRC of archive/data/"),
    ],
    ids=["half", "empty", "zeros", "bit"],
)
def test_resuming_falls_back_to_the_checkpoint_before(tmp_path, capsys, damage, reason):
    path, kept = tmp_path / "ckpt.pt", tmp_path / "ckpt-20.pt"
    save_steps(tmp_path, 10, 20, 30)
    damage(path)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{path}: {reason}") and message.endswith(f"; {kept} (step 20) is whole")
    ckpt = begin(run_config(tmp_path, resume=True), "sft")
    assert (ckpt.step, ckpt.path) == (20, path)
    out, err = capsys.readouterr()
    assert out == f"resuming {tmp_path} at step 20\n"
    assert err == message.replace(f"{kept} (step 20) is whole", f"going on from {kept} (step 20)\n")
    assert steps(tmp_path) == {"ckpt.pt": 20}
    save_steps(tmp_path, 30)
    assert steps(tmp_path) == {"ckpt.pt": 30, "ckpt-20.pt": 20}


def test_resuming_passes_over_all_that_is_damaged(tmp_path, capsys):
    save_steps(tmp_path, 1, 2, 3, 4, keep_last=4)
    for name in ("ckpt.pt", "ckpt-3.pt"):
        cut_short(tmp_path / name)
    assert begin(run_config(tmp_path, resume=True), "sft").step == 2
    assert steps(tmp_path) == {"ckpt.pt": 2, "ckpt-1.pt": 1}
    for file in tmp_path.iterdir():
        cut_short(file)
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path / 'ckpt.pt'}: cut short or not a checkpoint")):
        begin(run_config(tmp_path, resume=True), "sft")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_run_directory_without_its_newest_checkpoint_is_still_one(tmp_path):
    save_steps(tmp_path, 1, 2)
    (tmp_path / "ckpt.pt").unlink()
    with pytest.raises(CheckpointError, match=r"ckpt-1.pt exists: give --resume"):
        begin(run_config(tmp_path), "sft")
    assert begin(run_config(tmp_path, resume=True), "sft").step == 1
    save_steps(tmp_path, 2)
    assert begin(run_config(tmp_path, overwrite=True), "sft") is None and not list(tmp_path.iterdir())


def test_only_damage_is_a_reason_to_fall_back(tmp_path):
    save_steps(tmp_path, 1, 2)
    path = tmp_path / "ckpt.pt"
    torch.save(torch.load(path, weights_only=True) | dict(format_version=2), path)
    with pytest.raises(CheckpointError, match="format version 2, this code reads version 1"):
        begin(run_config(tmp_path, resume=True), "sft")
    write(tmp_path, step=2)
    save_steps(tmp_path, 3)
    cut_short(path)
    with pytest.raises(CheckpointError, match=r"lr is 0.001 in .*ckpt-2.pt and 0.5 in this run's config"):
        begin(run_config(tmp_path, resume=True, lr=0.5), "sft")
    assert {file.name for file in tmp_path.iterdir()} == {"ckpt.pt", "ckpt-2.pt"}


def test_a_run_from_before_keep_last_is_resumed(tmp_path):
    write(tmp_path, keep_last=1)
    assert begin(run_config(tmp_path, resume=True, keep_last=2), "sft").step == 7


FILE_EVENTS = {"open", "os.rename", "os.link", "os.remove"}


def killed_before(event: int, action) -> bool:
    """Run action() in a process that kills itself before its file operation number `event`; whether it came to that."""
    if (child := os.fork()) == 0:
        count = 0

        def kill(name, args):
            nonlocal count
            if name in FILE_EVENTS and ".pt" in str(args[0]):
                if count == event:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1

        sys.addaudithook(kill)  # called before the operation is done
        try:
            action()
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


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
        states.append({file.name for file in out.iterdir()})
        if damaged:  # and with it what is another name of the same file
            cut_short(out / "ckpt.pt")
        newest = max(whole_steps(out))
        assert newest in ({1, 2} if damaged else {2, 3})
        assert begin(run_config(out, resume=True), "sft").step == newest
        save_steps(out, 4)
        assert steps(out) == {"ckpt.pt": 4, f"ckpt-{newest}.pt": newest}
        assert len(list(out.iterdir())) == 2
    before, after = {"ckpt.pt", "ckpt-1.pt"}, {"ckpt.pt", "ckpt-2.pt"}
    reached = [before, before | {"ckpt.pt.tmp"}, before | after | {"ckpt.pt.tmp"}, before | after, after]
    assert [state for i, state in enumerate(states) if state not in states[:i]] == reached


@pytest.mark.slow
def test_killed_and_resumed_training_equals_uninterrupted_training():
    command = [sys.executable, str(ROOT / "benchmarks" / "kill_resume.py"), "--tries=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["survived"] == figures["tried"] == 2 and figures["kills"] >= 2


def test_interrupt_asks_first_and_raises_on_the_second_ctrl_c():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interrupt() as interrupt:
        assert not interrupt.requested
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
