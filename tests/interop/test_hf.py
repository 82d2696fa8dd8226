"""export.py against transformers: logits, texts, ids, round trips, the model card."""

import json

import pytest
import torch
import transformers
from exporting import QUESTION, SHAPE_NAMES, SHAPES, make, ours, run, theirs, train
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import eval_generate
from alignment.rollout import sequence_scores
from common import checkpoint
from common.config import UserError
from interop import exchange
from interop.provenance import provenance
from tokenizer import TokenizerError, encode_example, encode_opening, encode_prompt


@pytest.fixture(scope="module")
def tok():
    return train()


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
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # as the umask says
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
    ckpt.stage, ckpt.parent = "quantize", dict(path="out/x", stage=stage, sha256="0" * 64)
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
