"""export.py against llama2.c's own files: the text that they must give, layouts, round trips, what is refused."""

import json
import math
import struct

import numpy as np
import pytest
import torch
import transformers
from exporting import SHAPE_NAMES, SHAPES, make, run, theirs, train

import eval_generate
from common import checkpoint
from common.config import UserError


@pytest.fixture(scope="module")
def tok():
    return train()


def test_stories260k_gives_the_text_it_must_and_the_same_bytes(tmp_path, shared_data, capsys):
    source = shared_data / "llama2c"
    options = dict(import_llama2c=source / "stories260K.bin", tokenizer=source / "tok512.model")
    ckpt = run(**options, out=tmp_path / "run")
    expected = json.loads((source / "expected_stories260K.json").read_text())
    capsys.readouterr()
    eval_generate.main([f"--ckpt={ckpt}", "--prompt=", "--temperature=0", "--max_new_tokens=200", "--device=cpu"])
    assert capsys.readouterr().out == expected["expected_stdout"] + "\n"
    folder = run(format="llama2c", ckpt=ckpt, out=tmp_path / "llama2c")
    assert (folder / "model.bin").read_bytes() == (source / "stories260K.bin").read_bytes()
    assert (folder / "tokenizer.bin").read_bytes() == (source / "tok512.bin").read_bytes()


def test_how_documents_open_survives_hugging_face(tmp_path, shared_data):
    source = shared_data / "llama2c"
    options = dict(import_llama2c=source / "stories260K.bin", tokenizer=source / "tok512.model")
    ckpt = checkpoint.load(run(**options, out=tmp_path / "run"))
    assert ckpt.document_ids == [1, 1]
    folder = run(format="hf", ckpt=tmp_path / "run", out=tmp_path / "hf")
    hf = theirs(folder)
    expected = json.loads((source / "expected_stories260K.json").read_text())
    ids = hf.generate(do_sample=False, max_new_tokens=200)[0]
    reader = transformers.AutoTokenizer.from_pretrained(folder)
    assert reader.decode(ids, skip_special_tokens=True) == expected["expected_stdout"]
    assert checkpoint.load(run(import_hf=folder, out=tmp_path / "again")).document_ids == [1, 1]
    assert hf.generation_config.eos_token_id == 1 and reader("Once").input_ids[0] == 1


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_NAMES)
def test_llama2c_round_trip_is_bit_identical(tmp_path, tok, shape):
    ckpt = make(tmp_path / "run", tok, "pretrain", **shape)
    folder = run(format="llama2c", ckpt=ckpt, out=tmp_path / "llama2c")
    (tmp_path / "tok.model").write_bytes(tok.model_bytes)
    run(import_llama2c=folder / "model.bin", tokenizer=tmp_path / "tok.model", out=tmp_path / "again")
    before, after = checkpoint.load(ckpt), checkpoint.load(tmp_path / "again")
    assert before.weights.keys() == after.weights.keys() and before.model_config == after.model_config
    assert all(torch.equal(weight, after.weights[name]) for name, weight in before.weights.items())


def read_version_2(path):
    """{name: array} of an int8 file, read by its documented layout: norms, then q and scales of each matrix."""
    data = path.read_bytes()
    magic, version, dim, hidden, n_layers, n_heads, n_kv, vocab, _, shared, group = struct.unpack("<I8iBi", data[:41])
    assert (magic, version) == (0x616B3432, 2) and not any(data[41:256])
    at, out = 256, {}

    def take(name, dtype, *shape):
        nonlocal at
        out[name] = np.frombuffer(data, dtype, math.prod(shape), at).reshape(shape)
        at += out[name].nbytes

    take("attention_norm", "<f4", n_layers, dim)
    take("ffn_norm", "<f4", n_layers, dim)
    take("norm", "<f4", dim)
    kv = n_kv * dim // n_heads
    matrices = [("tok_embeddings", vocab, dim)]
    for name, n, k in [("wq", dim, dim), ("wk", kv, dim), ("wv", kv, dim), ("wo", dim, dim)] + [
        ("w1", hidden, dim), ("w2", dim, hidden), ("w3", hidden, dim)]:  # fmt: skip
        matrices += [(f"{name}.{i}", n, k) for i in range(n_layers)]
    for name, n, k in matrices + [("output", vocab, dim)] * (not shared):
        take(f"{name} q", "i1", n, k // group, group)
        take(f"{name} s", "<f4", n, k // group, 1)
        out[name] = (out[f"{name} q"] * out[f"{name} s"]).reshape(n, k)
    assert at == len(data)
    return out, group


@pytest.mark.parametrize("shape", [*SHAPES, dict(hidden_dim=176)], ids=[*SHAPE_NAMES, "hidden 176"])
def test_llama2c_int8_has_the_layout_of_version_2(tmp_path, tok, shape):
    ckpt = make(tmp_path / "run", tok, "pretrain", **shape)
    folder = run(format="llama2c", ckpt=ckpt, out=tmp_path / "llama2c", dtype="int8")
    got, group = read_version_2(folder / "model.bin")
    assert group == (16 if "hidden_dim" in shape else 64)
    weights = {name: weight.numpy() for name, weight in checkpoint.load(ckpt).weights.items()}
    assert np.array_equal(got["norm"], weights["norm.weight"])
    assert np.array_equal(got["ffn_norm"][1], weights["layers.1.ffn_norm.weight"])
    names = dict(tok_embeddings="tok_embeddings", output="output") | {
        f"{part}.{i}": f"layers.{i}.{'feed_forward' if part[1] in '123' else 'attention'}.{part}"
        for part in ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
        for i in range(2)
    }
    for short, name in names.items():
        if f"{name}.weight" in weights:
            error = np.abs(got[short] - weights[f"{name}.weight"])
            assert (error <= np.repeat(got[f"{short} s"].reshape(len(error), -1), group, 1) * 0.501).all()


def test_llama2c_refuses_what_its_code_has_fixed(tmp_path, tok):
    for i, (change, message) in enumerate([(dict(rope_theta=5e5), "rope_theta is"), (dict(norm_eps=1e-6), "norm_eps")]):
        ckpt = make(tmp_path / f"run{i}", tok, **change)
        with pytest.raises(UserError, match=f"{message}.*llama2.c has .* in its code"):
            run(format="llama2c", ckpt=ckpt, out=tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == [f"run{j}" for j in range(i + 1)]


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "not a legacy .bin file"),
        (struct.pack("<I", 0x616B3432) + struct.pack("<i", 2) + bytes(300), "a version 2 file of llama2.c"),
        (struct.pack("<7i", 64, 128, 2, 4, 4, 340, 256) + bytes(1000), "1,028 bytes, its header .* asks for"),
        (struct.pack("<7i", 64, 128, 2, 5, 4, 340, 256) + bytes(1000), "dim=64 is not a multiple of n_heads=5"),
        (b"PK\x03\x04" + bytes(range(200, 256)) * 9, "not a legacy .bin file"),
    ],
)
def test_llama2c_import_refuses_other_files(tmp_path, tok, data, message):
    (tmp_path / "model.bin").write_bytes(data)
    (tmp_path / "tok.model").write_bytes(tok.model_bytes)
    with pytest.raises(UserError, match=message):
        run(import_llama2c=tmp_path / "model.bin", tokenizer=tmp_path / "tok.model", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
