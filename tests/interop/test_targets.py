"""export.py: what it replaces, spares and removes, and which models and options it refuses."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from exporting import make, run, train

import quantize
from common import checkpoint
from common.config import ConfigError, UserError
from tokenizer import TokenizerError


@pytest.fixture(scope="module")
def tok():
    return train()


@pytest.mark.parametrize("format", ["hf", "gguf", "llama2c"])
def test_target_is_kept_unless_overwrite_and_then_replaced_as_a_whole(tmp_path, tok, format):
    one, two = make(tmp_path / "one", tok), make(tmp_path / "two", tok, seed=1)
    out = run(format=format, ckpt=one, out=tmp_path / "deep" / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ConfigError, match="out exists: give --overwrite"):
        run(format=format, ckpt=two, out=out)
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    run(format=format, ckpt=two, out=out, overwrite="true")
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    assert before.keys() == after.keys() and before != after
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("format", ["hf", "gguf", "llama2c"])
def test_the_same_model_gives_the_same_bytes(tmp_path, tok, format):
    ckpt, found = make(tmp_path / "sft", tok), set()
    for i in range(4):
        out = run(format=format, ckpt=ckpt, out=tmp_path / f"out{i}")
        found.add(tuple((path.name, path.read_bytes()) for path in sorted(out.glob("[!.]*"))))
    assert len(found) == 1


@pytest.mark.parametrize("name", ["", ".", "..", "/", "link"])
def test_only_a_new_name_is_a_target(tmp_path, tok, monkeypatch, name):
    ckpt = make(tmp_path / "sft", tok)
    (tmp_path / "cwd").mkdir()
    (tmp_path / "cwd" / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path / "cwd")
    with pytest.raises(ConfigError, match="the name of a (?:new )?folder is needed|it holds ckpt="):
        run(format="hf", ckpt=ckpt, out=name, overwrite="true")
    assert checkpoint.load(ckpt).step == 7 and [path.name for path in Path().iterdir()] == ["link"]


def test_only_what_this_run_made_is_removed(tmp_path, tok):
    """Names that an export might take for its own, a folder of the same files from elsewhere, what it reads itself."""
    ckpt = make(tmp_path / "sft", tok)
    for name in ("out.old", "out.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("mine")
    out = run(format="hf", ckpt=ckpt, out=tmp_path / "out")
    run(format="hf", ckpt=ckpt, out=out, overwrite="true")
    assert all((tmp_path / name / "thesis.txt").read_text() == "mine" for name in ("out.old", "out.tmp"))
    shutil.copytree(out, tmp_path / "downloaded", ignore=shutil.ignore_patterns(".*"))
    with pytest.raises(ConfigError, match="downloaded was not written here"):
        run(format="hf", ckpt=ckpt, out=tmp_path / "downloaded", overwrite="true")
    (out / "README.md").write_text("my own model card")
    with pytest.raises(ConfigError, match="out holds README.md, which was changed since"):
        run(format="hf", ckpt=ckpt, out=out, overwrite="true")
    imported = run(import_hf=tmp_path / "downloaded", out=tmp_path / "run")
    with pytest.raises(ConfigError, match="out=.*: it holds ckpt=.*, which is read"):
        run(format="hf", ckpt=imported / "ckpt.pt", out=imported, overwrite="true")
    with pytest.raises(ConfigError, match="it holds import_hf="):
        run(import_hf=tmp_path / "downloaded", out=tmp_path / "downloaded", overwrite="true")


def test_overwrite_spares_what_no_export_wrote(tmp_path, tok):
    ckpt = make(tmp_path / "sft", tok)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("x")
    with pytest.raises(ConfigError, match="mine was not written here"):
        run(format="hf", ckpt=ckpt, out=tmp_path / "mine", overwrite="true")
    out = run(format="hf", ckpt=ckpt, out=tmp_path / "out")
    (out / "diary.txt").write_text("x")
    with pytest.raises(ConfigError, match="out holds diary.txt, which was not written here"):
        run(format="hf", ckpt=ckpt, out=out, overwrite="true")
    assert checkpoint.load(ckpt).step == 7


def test_a_failure_half_way_leaves_nothing(tmp_path):
    # the weights are written before it turns out that the vocabulary cannot be
    ckpt = make(tmp_path / "sft", train(user_defined_symbols=["酒店"], add_dummy_prefix=True))
    with pytest.raises(TokenizerError, match="user-defined pieces"):
        run(format="hf", ckpt=ckpt, out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["sft"]


def test_reward_models_and_quantized_ones_are_refused(tmp_path, tok):
    rm = make(tmp_path / "rm", tok, "rm", scalar_head=True)
    for format in ("gguf", "llama2c"):
        with pytest.raises(UserError, match=f"is a reward model, which {format} cannot hold"):
            run(format=format, ckpt=rm, out=tmp_path / "out")
    sft = checkpoint.load(make(tmp_path / "sft", tok))
    int8 = quantize.quantize_checkpoint(sft)
    facts = dict(stage="quantize", step=1, tokens_seen=1, tokenizer=tok.model_bytes, config={}, quant=int8.quant)
    parent = checkpoint.parent_of(sft)
    checkpoint.save(tmp_path / "int8" / "ckpt.pt", model=checkpoint.build_model(int8), parent=parent, **facts)
    for format in ("gguf", "llama2c"):
        with pytest.raises(UserError, match="is quantized .int8.: a float32 checkpoint is needed, such as its parent"):
            run(format=format, ckpt=tmp_path / "int8", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value, dtype", [(math.nan, "float32"), (math.inf, "float32"), (7e4, "float16")])
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, tok, value, dtype):
    ckpt = make(tmp_path / "sft", tok)
    payload = torch.load(ckpt / "ckpt.pt", weights_only=True)
    payload["weights"]["layers.1.feed_forward.w2.weight"][3, 4] = value
    torch.save(payload, ckpt / "ckpt.pt")
    with pytest.raises(
        UserError, match=f"layers.1.feed_forward.w2.weight holds (?:.*{dtype} ends at|values that are not finite)"
    ):
        run(format="gguf", ckpt=ckpt, out=tmp_path / "out", dtype=dtype)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(), "give one of --format, --import_hf, --import_llama2c .got none"),
        (dict(format="hf", import_hf="x"), "got format and import_hf"),
        (dict(format="onnx"), "format=onnx: hf, gguf, llama2c are known"),
        (dict(format="llama2c", dtype="q8_0"), "dtype=q8_0: llama2c has float32, int8"),
        (dict(import_llama2c="x.bin"), "needs the --tokenizer"),
        (dict(format="hf", out="none"), "--out: a folder to write"),
    ],
)
def test_options(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        run(**dict(out=tmp_path / "out") | options)
