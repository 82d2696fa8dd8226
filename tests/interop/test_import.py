"""What export.py imports of folders that others wrote, what it says of them, and what it refuses by file and name."""

import json
import math
import os
import resource
import struct

import pytest
import torch
import transformers
from chains import failure
from exporting import make, run, train
from safetensors.torch import load_file, save_file

import export
from common import checkpoint
from common.config import UserError
from interop import exchange, hf, vocabulary


@pytest.fixture(scope="module")
def tok():
    return train()


def change(folder, name, **values):
    """Set keys of a JSON file."""
    path = folder / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))


def foreign(folder, tok, dtype=torch.float32, **changes):
    """(folder of a Llama as transformers writes it, its tensors)."""
    torch.manual_seed(0)
    shape = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6)
    shape |= dict(vocab_size=352, max_position_embeddings=128, rope_theta=20000.0)
    hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape | changes)).to(dtype)
    hf.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(tok.model_bytes)
    return folder, load_file(folder / "model.safetensors")


def test_a_chat_template_of_others_is_told(tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    assert hf.template_notes(folder) == []
    change(folder, "tokenizer_config.json", chat_template=vocabulary.CHAT_TEMPLATE)
    assert hf.template_notes(folder) == []
    change(folder, "tokenizer_config.json", chat_template="{{ messages[0]['content'] }}")
    (line,) = hf.template_notes(folder)
    assert line.startswith("its chat template is not kept: here a conversation is `question <bos> answer <eos>`")
    (folder / "tokenizer_config.json").unlink()
    (folder / "chat_template.jinja").write_text(vocabulary.CHAT_TEMPLATE)
    assert hf.template_notes(folder) == []
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert hf.template_notes(folder) == [line]


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_a_model_of_ours_that_was_trained_on_elsewhere_is_what_it_was(tmp_path, tok, capsys, stage):
    folder = run(format="hf", ckpt=make(tmp_path / stage, tok, stage, scalar_head=stage == "rm"), out=tmp_path / "hf")
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors")  # without our history
    capsys.readouterr()
    assert checkpoint.load(run(import_hf=folder, out=tmp_path / "again")).stage == stage
    by = dict(sft="chat template", rm="head")[stage]
    assert f"no history of ours is in it: by its {by}" in capsys.readouterr().out


def test_a_shared_tensor_goes_by_either_name_and_two_by_none(tmp_path, tok):
    folder, tensors = foreign(tmp_path / "hf", tok, tie_word_embeddings=True)
    wanted = checkpoint.load(run(import_hf=folder, out=tmp_path / "run")).weights
    shared = tensors.pop("model.embed_tokens.weight")
    save_file(tensors | {"lm_head.weight": shared}, folder / "model.safetensors")
    found = checkpoint.load(run(import_hf=folder, out=tmp_path / "again")).weights
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    tensors |= {"lm_head.weight": shared + 1, "model.embed_tokens.weight": shared}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match="tie_word_embeddings is true, but lm_head.weight is not model.embed_tokens"):
        run(import_hf=folder, out=tmp_path / "third")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rotary_tables_of_old_files_are_compared_and_left_out(tmp_path, tok, dtype):
    folder, tensors = foreign(tmp_path / "hf", tok, dtype)
    wanted = checkpoint.load(run(import_hf=folder, out=tmp_path / "run")).weights
    angles = (20000.0 ** (-torch.arange(0, 8, 2) / 8)).to(dtype)
    tables = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": angles.clone() for i in range(2)}
    tables |= {"model.layers.0.self_attn.rotary_emb.cos_cached": torch.ones(1, 1, 128, 8)}
    for more in (tables, {"model.rotary_emb.inv_freq": angles}):
        save_file(tensors | more, folder / "model.safetensors")
        found = checkpoint.load(run(import_hf=folder, out=tmp_path / "run", overwrite=True)).weights
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    for other in (angles / 2, angles[:2], 10000.0 ** (-torch.arange(0, 8, 2) / 8)):
        save_file(tensors | {"model.rotary_emb.inv_freq": other.contiguous()}, folder / "model.safetensors")
        with pytest.raises(UserError, match="hf: model.rotary_emb.inv_freq is not what rope_theta=20000 gives"):
            run(import_hf=folder, out=tmp_path / "other")


def test_several_eos_ids_and_generation_config_are_taken_in_or_told(tmp_path, tok, capsys):
    folder, _ = foreign(tmp_path / "hf", tok)
    for config, generation, ids, notes in [
        (dict(eos_token_id=2), dict(eos_token_id=2), [1, 2], []),
        (dict(eos_token_id=[7, 2]), dict(), [1, 2], ["of its eos ids 7, 2 only 2 ends a text here"]),
        (dict(eos_token_id=7), dict(eos_token_id=[7, 9]), [1, 7], ["of its eos ids 7, 9 only 7 ends a text here"]),
        (dict(eos_token_id=None), dict(eos_token_id=5), [1, 5], []),
        (dict(eos_token_id=None), dict(eos_token_id=None), [1, 2], []),
        (
            dict(eos_token_id=2),
            dict(temperature=0.6, top_p=0.9, top_k=0, repetition_penalty=1.1),
            [1, 2],
            [
                "generation_config.json is not kept: sample as it asks with eval_generate.py --temperature=0.6 "
                "--repetition_penalty=1.1",
            ],
        ),
        (
            dict(eos_token_id=2),
            dict(temperature="hot", top_k=-5, top_p=0.5, num_beams=4, min_p=0.1, typical_p=1.0),
            [1, 2],
            [
                "generation_config.json is not kept: sample as it asks with eval_generate.py --top_p=0.5 "
                "--min_p=0.1",
                "generation_config.json asks for --temperature='hot' --top_k=-5 --num_beams=4, which "
                "eval_generate.py does not have",
            ],
        ),
        (dict(), dict(do_sample=False), [1, 2], ["generation_config.json is not kept: sample as it asks with "
                                                 "eval_generate.py --temperature=0"]),
    ]:  # fmt: skip
        change(folder, "config.json", **config)
        (folder / "generation_config.json").write_text(json.dumps(generation))
        capsys.readouterr()
        assert checkpoint.load(run(import_hf=folder, out=tmp_path / "run", overwrite=True)).document_ids == ids
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
        assert said == ["note: it continues documents (stage pretrain)", *(f"note: {note}" for note in notes)]
    (folder / "generation_config.json").unlink()
    for bad in (352, -1, "2", True, [2, 9999], 2.0):
        change(folder, "config.json", eos_token_id=bad)
        with pytest.raises(UserError, match="config.json: eos_token_id is .*, its vocabulary has 0 to 351"):
            run(import_hf=folder, out=tmp_path / "other")


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(rope_theta=0), "rope_theta is 0, in rope_parameters 20000.0"),
        (dict(rope_parameters=None, rope_theta="x"), "rope_theta is 'x', no float"),
        (dict(rope_parameters=None, rope_theta=0), "rope_theta=0.0: not a value"),
        (dict(rope_parameters=None, rope_theta=10**400), "int too large"),
        (dict(rope_parameters=dict(rope_theta=20000.0, partial_rotary_factor=0.5)), "partial_rotary_factor is 0.5"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5, Llama 2 has 1"),
        (dict(rms_norm_eps=[1]), r"rms_norm_eps is \[1\], no float"),
        (dict(tie_word_embeddings="yes"), "tie_word_embeddings is 'yes', no bool"),
    ],
)
def test_odd_values_of_a_config_are_refused_by_their_key(tmp_path, tok, values, message):
    folder, _ = foreign(tmp_path / "hf", tok)
    change(folder, "config.json", rope_theta=20000.0)
    change(folder, "config.json", **values)
    with pytest.raises(UserError, match=f"config.json: {message}"):
        run(import_hf=folder, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_heads_of_keys_and_values_are_as_many_as_of_queries(tmp_path, tok):
    folder, _ = foreign(tmp_path / "hf", tok)
    change(folder, "config.json", num_key_value_heads=None)
    assert checkpoint.load(run(import_hf=folder, out=tmp_path / "run")).model_config["n_kv_heads"] == 6


def test_odd_files_of_a_folder_are_refused_by_their_name(tmp_path, tok, capsys):
    folder, tensors = foreign(tmp_path / "hf", tok)
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    options = [f"--import_hf={folder}", f"--out={tmp_path / 'out'}"]
    assert "pytorch_model.bin: of torch before 1.6: load it" in failure(capsys, export.main, options)
    (folder / "pytorch_model.bin").unlink()
    index = folder / "pytorch_model.bin.index.json"
    for names in (("a.bin", "b.bin"), ("a" * 5000,)):
        index.write_text(json.dumps(dict(weight_map={str(i): name for i, name in enumerate(names)})))
        for name in ("a.bin", "b.bin"):
            torch.save(tensors, folder / name)
        line = failure(capsys, export.main, options)
        assert "b.bin: lm_head.weight is in another file of weights too" in line or "File name too long" in line
    (folder / "generation_config.json").write_text("[" * 100_000)
    index.unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert "generation_config.json: not JSON: maximum recursion" in failure(capsys, export.main, options)
    assert not (tmp_path / "out").exists()


def test_import_refuses_what_is_no_number_or_no_weight(tmp_path, tok, shared_data):
    folder, tensors = foreign(tmp_path / "hf", tok)
    name = "model.layers.1.mlp.up_proj.weight"
    for value, message in [(math.nan, "not finite"), (math.inf, "not finite")]:
        spoilt = tensors[name].clone()
        spoilt[3, 4] = value
        save_file(tensors | {name: spoilt}, folder / "model.safetensors")
        with pytest.raises(UserError, match=f"model.safetensors: {name} holds values that are {message}"):
            run(import_hf=folder, out=tmp_path / "run")
    save_file(tensors | {name: tensors[name].to(torch.int8)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=f"model.safetensors: {name} is torch.int8, only float weights"):
        run(import_hf=folder, out=tmp_path / "run")
    source = shared_data / "llama2c"
    raw = bytearray((source / "stories260K.bin").read_bytes())
    raw[1000:1004] = struct.pack("<f", math.nan)
    (tmp_path / "nan.bin").write_bytes(raw)
    with pytest.raises(UserError, match="nan.bin: tok_embeddings.weight holds values that are not finite"):
        run(import_llama2c=tmp_path / "nan.bin", tokenizer=source / "tok512.model", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(hidden_size="48"), "config.json: hidden_size is '48', no size"),
        (dict(hidden_size=48.0), "config.json: hidden_size is 48.0, no size"),
        (dict(vocab_size=0), "config.json: vocab_size is 0, no size"),
        (dict(num_hidden_layers=10**9), "config.json: n_layers=1000000000, but there are 21 weights"),
        (dict(max_position_embeddings=2**31 - 1), "config.json: max_seq_len=2147483647: its rotary tables would take"),
        (dict(rope_parameters=[1]), "config.json: rope_parameters is .1., no object"),
        (dict(rope_parameters=dict(type="linear", factor=4.0)), "config.json: rope_scaling is .*linear"),
        (dict(rms_norm_eps=0), "config.json: norm_eps=0.0: not a value that it can have"),
        (dict(rms_norm_eps="a"), "config.json: rms_norm_eps is .a., no float"),
    ],
)
def test_import_refuses_a_config_that_is_none(tmp_path, tok, values, message):
    folder, _ = foreign(tmp_path / "hf", tok, rope_parameters=dict(rope_type="default", rope_theta=20000.0))
    change(folder, "config.json", **values)
    with pytest.raises(UserError, match=message):
        run(import_hf=folder, out=tmp_path / "run")


def test_import_refuses_forged_facts_and_shards_from_elsewhere(tmp_path, tok):
    folder, tensors = foreign(tmp_path / "hf", tok)
    damaged = ['{"document_ids": [1, 352]}', '{"document_ids": 3}', '{"parent": 1}', '{"parent": {}}']
    for facts in ("{", "[]", '{"step": "a"}', '{"step": -5}', *damaged):
        save_file(tensors, folder / "model.safetensors", {exchange.FACTS: facts})
        with pytest.raises(UserError, match="hf: its metadata tiny_llama2_zh.provenance was changed"):
            run(import_hf=folder, out=tmp_path / "run")
    (folder / "model.safetensors").unlink()
    for files in ({"a": "../model.safetensors"}, {"a": 1}, {}, [], "x"):
        change(folder, "model.safetensors.index.json", weight_map=files)
        with pytest.raises(UserError, match="index.json: its weight_map names no files of this folder"):
            run(import_hf=folder, out=tmp_path / "run")


def test_a_whole_file_goes_before_an_index_that_was_left_there(tmp_path, tok):
    folder, _ = foreign(tmp_path / "hf", tok)
    wanted = checkpoint.load(run(import_hf=folder, out=tmp_path / "run")).weights
    change(folder, "model.safetensors.index.json", weight_map={"a": "model-00001-of-00002.safetensors"})
    found = checkpoint.load(run(import_hf=folder, out=tmp_path / "again")).weights
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_pytorch_model_bin_whole_and_in_shards(tmp_path, tok):
    folder, tensors = foreign(tmp_path / "hf", tok)
    wanted = checkpoint.load(run(import_hf=folder, out=tmp_path / "run")).weights
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    state = torch.nn.Module().state_dict() | tensors
    torch.save(state, folder / "pytorch_model.bin")
    shards = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    for shards_too in (False, True):
        if shards_too:
            (folder / "pytorch_model.bin").unlink()
            for file, part in shards.items():
                torch.save({name: tensors[name] for name in part}, folder / file)
            weight_map = {name: file for file, part in shards.items() for name in part}
            change(folder, "pytorch_model.bin.index.json", metadata={}, weight_map=weight_map)
        found = checkpoint.load(run(import_hf=folder, out=tmp_path / "run", overwrite=True)).weights
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    (folder / "pytorch_model-00001-of-00002.bin").unlink()
    with pytest.raises(UserError, match="pytorch_model-00001-of-00002.bin: no such file"):
        run(import_hf=folder, out=tmp_path / "other")


def test_pytorch_model_bin_runs_no_code_and_is_checked(tmp_path, tok):
    folder, tensors = foreign(tmp_path / "hf", tok)
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(tensors, path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    torch.save(dict(model=tensors), tmp_path / "nested.bin")
    torch.save(dict(call=Runs(str(tmp_path / "executed"))), tmp_path / "code.bin")
    torch.save(tensors | {"model.norm.weight": torch.full((48,), math.nan)}, tmp_path / "nan.bin")
    wrong = {whole[:-100]: "cut short", b"": "cut short", bytes(flipped): "the CRC of .* does not match"}
    wrong |= {(tmp_path / "nested.bin").read_bytes(): "not a dict of tensors by name"}
    wrong |= {(tmp_path / "code.bin").read_bytes(): "it holds posix.mkdir, not only tensors"}
    wrong |= {(tmp_path / "nan.bin").read_bytes(): "model.norm.weight holds values that are not finite"}
    for content, message in wrong.items():
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"pytorch_model.bin: .*{message}"):
            run(import_hf=folder, out=tmp_path / "run")
    assert not (tmp_path / "run").exists() and not (tmp_path / "executed").exists()


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("format", ["hf", "gguf", "llama2c", "import_hf"])
def test_a_full_disk_ends_in_one_line_and_leaves_nothing(tmp_path, tok, capsys, format):
    ckpt = make(tmp_path / "base", tok, "pretrain")
    options = dict(format=format, ckpt=ckpt)
    if format == "import_hf":
        options = dict(import_hf=run(format="hf", ckpt=ckpt, out=tmp_path / "hf"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the kernel stops the write half-way
    try:
        line = failure(
            capsys, export.main, [f"--{key}={value}" for key, value in (options | dict(out=tmp_path / "o")).items()]
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot " in line and str(tmp_path) in line
    assert {path.name for path in tmp_path.iterdir()} <= {"base", "hf"}
