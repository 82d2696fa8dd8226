"""export.py against transformers and llama2.c's own files: logits, texts, ids, round trips, and what is refused."""

import io
import json
import math
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import eval_generate
import export
import quantize
from alignment.rollout import sequence_scores
from common import checkpoint
from common.config import ConfigError, UserError
from interop import exchange
from interop.provenance import provenance
from model import Llama, ModelConfig
from tokenizer import Tokenizer, TokenizerError, encode_example, encode_opening, encode_prompt

TEXT = "这本书很好看，我很喜欢。酒店的房间很干净，服务也不错。差评好评写一条 the quick brown fox 12345"
SHAPES = [dict(), dict(n_kv_heads=2), dict(tied=False), dict(n_kv_heads=1, tied=False)]
SHAPE_NAMES = ["tied MHA", "tied GQA", "untied MHA", "untied MQA"]
QUESTION = [dict(role="user", content="写一条酒店好评。")]


def train(**changes):
    model, options = io.BytesIO(), dict(normalization_rule_name="identity", add_dummy_prefix=False)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 20), model_writer=model, vocab_size=340, model_type="bpe", byte_fallback=True,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2, remove_extra_whitespaces=False, **options | changes,
    )  # fmt: skip
    return Tokenizer(model.getvalue())


@pytest.fixture(scope="module")
def tok():
    return train()


def make(directory, tok, stage="sft", seed=0, **changes):
    """A run directory with a random model whose next tokens are far from equally likely."""
    torch.manual_seed(seed)
    shape = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=4, vocab_size=tok.vocab_size, max_seq_len=256)
    model = Llama(ModelConfig(**shape | changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2) if p.dim() == 2 else p.uniform_(0.5, 1.5)
        model.head_weight[3:259] = 0  # no bytes in greedy text: transformers decodes half a character otherwise
    directory.mkdir(parents=True)
    facts = dict(stage=stage, step=7, tokens_seen=70, tokenizer=tok.model_bytes, config=dict(data="data/none"))
    checkpoint.save(directory, model=model, **facts)
    return directory


def ours(directory):
    return checkpoint.build_model(checkpoint.load(directory)).eval()


def run(**options):
    export.main([f"--{key}={value}" for key, value in options.items()])
    return Path(options["out"])


def theirs(folder, kind=transformers.AutoModelForCausalLM):
    return kind.from_pretrained(folder, dtype="auto").eval()


# Hugging Face


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_NAMES)
@torch.no_grad()
def test_hf_logits_and_greedy_text_are_ours(tmp_path, tok, shape):
    ckpt = make(tmp_path / "sft", tok, **shape)
    folder = run(format="hf", ckpt=ckpt, out=tmp_path / "hf")
    model, hf = ours(ckpt), theirs(folder)
    ids = torch.randint(0, tok.vocab_size, (2, 200), generator=torch.Generator().manual_seed(1))
    assert (model(ids) - hf(ids).logits).abs().max() < 1e-4
    assert hf.dtype == torch.float32 and type(hf).__name__ == "LlamaForCausalLM"

    reader = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = encode_prompt(tok, QUESTION)
    chat = reader.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert chat["input_ids"][0].tolist() == prompt
    reply = model.generate([prompt], 40, temperature=0).tokens[0]
    new = hf.generate(**chat, do_sample=False, max_new_tokens=40)[0, len(prompt) :].tolist()
    assert new == reply
    assert reader.decode(new, skip_special_tokens=True) == tok.decode(reply)


def test_hf_base_model_starts_its_documents_as_it_learnt(tmp_path, tok):
    ckpt = make(tmp_path / "base", tok, "pretrain")
    folder = run(format="hf", ckpt=ckpt, out=tmp_path / "hf")
    reader, hf = transformers.AutoTokenizer.from_pretrained(folder), theirs(folder)
    assert reader("这本书").input_ids == encode_opening(tok, "这本书")
    assert reader.chat_template is None
    reply = ours(ckpt).generate([encode_opening(tok, "")], 20, temperature=0).tokens[0]
    assert hf.generate(do_sample=False, max_new_tokens=20)[0].tolist() == [tok.eos_id, *reply]  # the empty prompt
    pipe = transformers.pipeline("text-generation", model=hf, tokenizer=reader)
    texts = ["这本书", "酒店的房间很干净，"]
    replies = ours(ckpt).generate([encode_opening(tok, text) for text in texts], 20, temperature=0).tokens
    out = pipe(texts, batch_size=2, do_sample=False, max_new_tokens=20, return_full_text=False)
    assert [one[0]["generated_text"] for one in out] == list(map(tok.decode, replies))


def test_hf_samples_as_eval_generate_does(tmp_path, tok):
    folder = run(format="hf", ckpt=make(tmp_path / "sft", tok), out=tmp_path / "hf")
    read = transformers.GenerationConfig.from_pretrained(folder)
    defaults = eval_generate.parse_config("eval_generate", [], "")
    for key in ("temperature", "top_k", "top_p", "max_new_tokens"):
        assert getattr(read, key) == defaults[key]
    assert read.do_sample and read.eos_token_id == 2 and read.pad_token_id == 0


@torch.no_grad()
def test_hf_reward_model_scores_as_ours_beside_padding(tmp_path, tok):
    ckpt = make(tmp_path / "rm", tok, "rm", scalar_head=True)
    folder = run(format="hf", ckpt=ckpt, out=tmp_path / "hf")
    hf = theirs(folder, transformers.AutoModelForSequenceClassification)
    reader = transformers.AutoTokenizer.from_pretrained(folder)
    chats = [[*QUESTION, dict(role="assistant", content=text)] for text in ("很干净", "房间很干净，服务也不错。")]
    ids = [encode_example(tok, chat)[0].ids for chat in chats]
    batch = reader.apply_chat_template(chats, padding=True, return_tensors="pt", return_dict=True)
    assert [row[mask.bool()].tolist() for row, mask in zip(*batch.values(), strict=True)] == ids
    assert len(ids[0]) < len(ids[1])
    for row, score in zip(ids, hf(**batch).logits.squeeze(1), strict=True):
        want = sequence_scores(ours(ckpt), torch.tensor([row]), torch.tensor([len(row)]))
        assert (score - want).abs().max() < 1e-4


@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("float16", torch.float16)])
def test_hf_other_dtypes_are_the_rounded_weights(tmp_path, tok, name, dtype):
    ckpt = make(tmp_path / "sft", tok)
    folder = run(format="hf", ckpt=ckpt, out=tmp_path / "hf", dtype=name)
    assert theirs(folder).dtype == dtype
    again = checkpoint.load(run(import_hf=folder, out=tmp_path / "again"))
    for key, weight in checkpoint.load(ckpt).weights.items():
        assert torch.equal(again.weights[key], weight.to(dtype).float())


def test_hf_config_has_the_keys_of_transformers_4_and_5(tmp_path, tok):
    ckpt = make(tmp_path / "sft", tok, rope_theta=50000.0, norm_eps=1e-6)
    config = json.loads((run(format="hf", ckpt=ckpt, out=tmp_path / "hf") / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 50000.0
    assert config["torch_dtype"] == config["dtype"] == "float32"
    model, hf = ours(ckpt), theirs(tmp_path / "hf")
    ids = torch.arange(200)[None] % tok.vocab_size
    assert (model(ids) - hf(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("stage", ["pretrain", "sft", "rm"])
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_NAMES)
def test_hf_round_trip_is_bit_identical(tmp_path, tok, shape, stage):
    ckpt = make(tmp_path / "run", tok, stage, **shape, scalar_head=stage == "rm")
    folder = run(format="hf", ckpt=ckpt, out=tmp_path / "hf")
    before, after = checkpoint.load(ckpt), checkpoint.load(run(import_hf=folder, out=tmp_path / "again"))
    assert before.weights.keys() == after.weights.keys()
    assert all(torch.equal(weight, after.weights[name]) for name, weight in before.weights.items())
    for key in "stage step tokens_seen model_config tokenizer document_ids config parent".split():
        assert getattr(before, key) == getattr(after, key), key


def test_hf_import_of_what_transformers_wrote(tmp_path, tok):
    torch.manual_seed(0)
    shape = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6)
    shape |= dict(num_key_value_heads=2, vocab_size=352, max_position_embeddings=128, rope_theta=20000.0)
    hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval()
    folder = tmp_path / "hf"
    hf.save_pretrained(folder, max_shard_size="60kB")
    assert (folder / "model.safetensors.index.json").exists()
    (folder / "tokenizer.model").write_bytes(tok.model_bytes)
    ckpt = checkpoint.load(run(import_hf=folder, out=tmp_path / "run"))
    ids = torch.arange(100)[None]
    assert (checkpoint.build_model(ckpt).eval()(ids) - hf(ids).logits).abs().max() < 1e-4
    assert (ckpt.stage, ckpt.document_ids) == ("pretrain", [1, 2])  # Llama 2's: <s> text </s>


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(rope_scaling=dict(type="linear", factor=2.0)), "config.json: rope_scaling is "),
        (dict(rope_parameters=dict(rope_type="llama3", rope_theta=1e4)), "config.json: rope_scaling is "),
        (dict(attention_bias=True), "config.json: attention_bias is True"),
        (dict(model_type="mistral"), "config.json: model_type is mistral, Llama 2 has llama"),
        (dict(head_dim=32), "config.json: head_dim is 32, Llama 2 has 16"),
        (dict(hidden_size=None), "config.json: no hidden_size"),
        (dict(intermediate_size=160), "w1.weight is .192, 64. in the file, .160, 64. in the model"),
        (dict(num_attention_heads=7), "config.json: dim=64 is not a multiple of n_heads=7"),
        (dict(num_hidden_layers=3), "layers.2.attention.wk.weight is missing in the file"),
        (dict(vocab_size=339), "vocab_size is 339, its tokenizer has 340 pieces"),
    ],
)
def test_hf_import_refuses_what_is_not_this_llama(tmp_path, tok, change, message):
    folder = run(format="hf", ckpt=make(tmp_path / "sft", tok), out=tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        run(import_hf=folder, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_hf_import_names_the_damaged_or_missing_file(tmp_path, tok):
    folder = run(format="hf", ckpt=make(tmp_path / "sft", tok), out=tmp_path / "hf")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for data in (whole[:-100], whole[:4], b""):
        weights.write_bytes(data)
        with pytest.raises(UserError, match="model.safetensors: cut short or not safetensors"):
            run(import_hf=folder, out=tmp_path / "run")
    weights.unlink()
    with pytest.raises(UserError, match="model.safetensors: no such file"):
        run(import_hf=folder, out=tmp_path / "run")
    weights.write_bytes(whole)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: not JSON"):
        run(import_hf=folder, out=tmp_path / "run")
    with pytest.raises(FileNotFoundError):
        run(import_hf=tmp_path / "nothing", out=tmp_path / "run")


def test_hf_import_wants_a_tokenizer(tmp_path, tok):
    folder = run(format="hf", ckpt=make(tmp_path / "sft", tok), out=tmp_path / "hf")
    (folder / "tokenizer.model").rename(tmp_path / "other.model")
    with pytest.raises(TokenizerError, match="no tokenizer at .*tokenizer.model"):
        run(import_hf=folder, out=tmp_path / "run")
    ckpt = checkpoint.load(run(import_hf=folder, tokenizer=tmp_path / "other.model", out=tmp_path / "run"))
    assert ckpt.tokenizer == tok.model_bytes


def test_extra_and_unknown_tensors(tmp_path, tok):
    folder = run(format="hf", ckpt=make(tmp_path / "sft", tok), out=tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    shared = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": shared}, folder / "model.safetensors")
    run(import_hf=folder, out=tmp_path / "run")  # a tied model may hold its embedding twice
    save_file(tensors | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}, folder / "model.safetensors")
    with pytest.raises(UserError, match="self_attn.q_proj.bias is .64,. in the file, missing in the model"):
        run(import_hf=folder, out=tmp_path / "run2")


@pytest.mark.parametrize("stage, parts", [("sft", {"sft/a"}), ("pretrain", {"pretrain/a"}), ("grpo", {"prompts/a"})])
def test_the_card_names_what_this_stage_has_read(chain, tmp_path, tok, stage, parts):
    meta = json.loads((chain / "data/meta.json").read_text(encoding="utf-8"))
    counts = next(iter(meta["tally"]["sft"].values()))
    tally = {part: dict(a=counts) for part in ("text", "pretrain", "sft", "rm", "prompts")}
    (tmp_path / "data").mkdir()
    (tmp_path / "data/meta.json").write_text(json.dumps(meta | dict(tally=tally)), encoding="utf-8")
    ckpt = checkpoint.load(make(tmp_path / stage, tok, stage))
    ckpt.config["data"] = str(tmp_path / "data")
    assert provenance(ckpt)["data"].keys() == parts


def test_provenance_and_card(tmp_path, tok):
    ckpt = make(tmp_path / "sft", tok)
    (ckpt / "metrics.jsonl").write_text(
        '{"step": 7, "val/loss": 3.25, "train/loss": 9}\n{"step": 8, "val/loss": 1.5}\n'
    )
    folder = run(format="hf", ckpt=ckpt, out=tmp_path / "hf")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "| val/loss | 3.25 |" in card and "license: other" in card and "train/loss" not in card
    assert f"{ours(ckpt).num_params():,}（float32）" in card
    with safe_open(folder / "model.safetensors", "pt") as file:
        facts = json.loads(file.metadata()[exchange.FACTS])
    assert facts["stage"] == "sft" and facts["step"] == 7 and facts["metrics"] == {"val/loss": 3.25}
    assert facts["tokenizer_sha256"] == tok.sha256 and facts["config"] == dict(data="data/none")


# llama2.c


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


# targets, sources, options


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
