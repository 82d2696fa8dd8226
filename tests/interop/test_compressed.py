"""export.py --format=hf of quantized checkpoints: logits in transformers, compressed-tensors' unpacking, refusals."""

import io
import json
from pathlib import Path

import pytest
import sentencepiece
import torch
import transformers
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file

import export
from common import checkpoint
from common.config import UserError
from interop import compressed
from lowbit import layers
from model import Llama, ModelConfig
from tokenizer import Tokenizer, encode_prompt

TEXT = "这本书很好看，我很喜欢。酒店的房间很干净，服务也不错。差评好评写一条 the quick brown fox 12345"
SHAPES = [dict(), dict(n_kv_heads=2), dict(tied=False), dict(n_kv_heads=1, tied=False, hidden_dim=160)]
SHAPE_NAMES = ["tied MHA", "tied GQA", "untied MHA", "untied MQA, hidden 160"]
INT8 = {"method": "int8"}
OUTER = ["tok_embeddings", "output", "scalar"]  # what a recipe usually leaves in int8
CAUSAL = transformers.AutoModelForCausalLM


def int4(group_size, symmetric, int8=OUTER):
    return dict(method="int4", group_size=group_size, symmetric=symmetric, algorithm="rtn", int8=int8)


SPECS = [INT8, *(int4(group, symmetric) for group in (32, 64) for symmetric in (True, False)), int4(32, False, [])]
SPEC_NAMES = ["int8", "int4 g32 sym", "int4 g32", "int4 g64 sym", "int4 g64", "int4 g32 everywhere"]


@pytest.fixture(scope="module")
def tok():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 20), model_writer=model, vocab_size=340, model_type="bpe", byte_fallback=True,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2, remove_extra_whitespaces=False,
        normalization_rule_name="identity", add_dummy_prefix=False,
    )  # fmt: skip
    return Tokenizer(model.getvalue())


def make(directory, tok, quant, stage="sft", **changes):
    """A run directory with a quantized model of random codes, scales, zeros and padding."""
    torch.manual_seed(0)
    shape = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=4, vocab_size=tok.vocab_size, max_seq_len=256)
    model = layers.build(Llama(ModelConfig(**shape | changes)).eval(), quant)
    for layer in model.modules():
        if isinstance(layer, layers.LowBitWeight):
            eight = layer.q.dtype == torch.int8
            layer.q.random_(-127 if eight else 0, 128 if eight else 256)
            layer.scale.uniform_(0.5, 1.5).mul_(0.05 / (74 if eight else 4.6))  # weights of standard deviation 0.05
            if "zero" in layer.state_dict():
                layer.zero.random_(0, 16)
    directory.mkdir(parents=True)
    facts = dict(stage="quantize", step=7, tokens_seen=70, tokenizer=tok.model_bytes, config={}, quant=quant)
    parent = dict(path="out/parent", stage=stage, sha256="0" * 64)
    checkpoint.save(directory, model=model, parent=parent, **facts)
    return directory


def layer_of(model, name):
    return model.get_submodule(name.rpartition(".")[0])


def reference(directory):
    """The float32 model whose weights are those that the checkpoint stands for."""
    low = checkpoint.build_model(checkpoint.load(directory))
    model = Llama(low.config).eval()
    model.load_state_dict({name: layer_of(low, name).weight for name in model.state_dict()})
    return model


def run(**options):
    export.main([f"--{key}={value}" for key, value in options.items()])
    return Path(options["out"])


def theirs(folder, kind=CAUSAL):
    return kind.from_pretrained(folder, dtype="auto").eval()


def quantization(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


# in transformers


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_NAMES)
@pytest.mark.parametrize("quant", SPECS, ids=SPEC_NAMES)
@torch.no_grad()
def test_logits_and_greedy_text(tmp_path, tok, shape, quant):
    ckpt = make(tmp_path / "run", tok, quant, **shape)
    folder = run(format="hf", ckpt=ckpt, out=tmp_path / "hf")
    model, hf = reference(ckpt), theirs(folder)
    ids = torch.randint(0, tok.vocab_size, (2, 200), generator=torch.Generator().manual_seed(1))
    logits = model(ids)
    assert (logits - hf(ids).logits).abs().max() < 1e-4 < 0.1 < logits.std()
    # and as the checkpoint itself computes so many rows
    assert (checkpoint.build_model(checkpoint.load(ckpt)).eval()(ids) - hf(ids).logits).abs().max() < 1e-4

    prompt = encode_prompt(tok, [dict(role="user", content="写一条酒店好评。")])
    reply = model.generate([prompt], 30, temperature=0).tokens[0]
    hf = theirs(folder)  # one that has not computed anything yet
    assert hf.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=30)[0, len(prompt) :].tolist() == reply


@pytest.mark.parametrize("quant", [INT8, int4(32, True), int4(32, False)], ids=["int8", "int4 sym", "int4"])
@torch.no_grad()
def test_reward_model(tmp_path, tok, quant):
    ckpt = make(tmp_path / "rm", tok, quant, "rm", scalar_head=True)
    hf = theirs(run(format="hf", ckpt=ckpt, out=tmp_path / "hf"), transformers.AutoModelForSequenceClassification)
    ids = torch.arange(3, 43)[None]
    assert (hf(ids).logits[0, 0] - reference(ckpt).values(ids)[0, -1]).abs() < 1e-4


@pytest.mark.parametrize("quant", [INT8, int4(64, False), int4(64, True)], ids=["int8", "int4", "int4 sym"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@torch.no_grad()
def test_other_dtypes_are_the_rounded_weights(tmp_path, tok, quant, dtype):
    ckpt = make(tmp_path / "run", tok, quant)
    hf = theirs(run(format="hf", ckpt=ckpt, out=tmp_path / "hf", dtype=dtype))
    hf(torch.tensor([[5]]))  # compressed-tensors unpacks when first asked
    w2 = reference(ckpt).layers[1].feed_forward.w2.weight
    assert hf.dtype == getattr(torch, dtype)
    assert torch.equal(hf.model.layers[1].mlp.down_proj.weight, w2.to(hf.dtype))


@torch.no_grad()
def test_layers_of_a_second_width_are_not_packed(tmp_path, tok, capsys):
    ids = torch.arange(3, 203)[None]
    for symmetric in (True, False):
        quant = int4(32, symmetric, [*OUTER, "layers.1.attention.*", "layers.0.feed_forward.w2"])
        ckpt = make(tmp_path / f"run {symmetric}", tok, quant)
        folder = run(format="hf", ckpt=ckpt, out=tmp_path / f"hf {symmetric}")
        assert "note: 5 int8 layers in float32, such as layers." in capsys.readouterr().out
        attention = [f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"]
        assert set(quantization(folder)["ignore"]) == {"lm_head", "model.layers.0.mlp.down_proj", *attention}
        assert "model.layers.1.self_attn.q_proj.weight" in load_file(folder / "model.safetensors")
        assert (reference(ckpt)(ids) - theirs(folder)(ids).logits).abs().max() < 1e-4


# the file


def test_words_by_hand():
    codes = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 15, 14, 13]], dtype=torch.uint8)
    assert compressed.to_words(codes, 4).tolist() == [[0x76543210, 0xDEF]]
    assert compressed.to_words(codes[:, 1:6], 8).tolist() == [[0x04030201, 5]]
    # int8: code = q + 128; columns 127, -127, 0, -1
    layer = layers.Int8Linear(1, 4)
    layer.q.copy_(torch.tensor([[127, -127, 0, -1]]))
    layer.scale.fill_(0.5)
    args = compressed.weight_args(dict(w=layer), "x")
    tensors = compressed.pack(layer, args, lambda rows: rows, torch.float32)
    assert tensors["weight_packed"].tolist() == [[0x7F8001FF]]
    assert tensors["weight_scale"].tolist() == [[0.5]] and tensors["weight_shape"].tolist() == [1, 4]


@pytest.mark.parametrize("quant", SPECS, ids=SPEC_NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_NAMES)
def test_their_unpacking_gives_our_codes(tmp_path, tok, shape, quant):
    ckpt = make(tmp_path / "run", tok, quant, **shape)
    folder = run(format="hf", ckpt=ckpt, out=tmp_path / "hf")
    low = checkpoint.build_model(checkpoint.load(ckpt))
    tensors, args = load_file(folder / "model.safetensors"), quantization(folder)["config_groups"]["group_0"]["weights"]
    assert (args["num_bits"], args["symmetric"]) == (8, True) if quant == INT8 else (4, quant["symmetric"])
    for ours, name in [("attention.wq", "self_attn.q_proj"), ("attention.wk", "self_attn.k_proj"),
                       ("attention.wv", "self_attn.v_proj"), ("feed_forward.w2", "mlp.down_proj")]:  # fmt: skip
        layer, name = low.get_submodule(f"layers.1.{ours}"), f"model.layers.1.{name}.weight"
        N, K = tensors[f"{name}_shape"].tolist()
        assert (N, K) == layer.weight.shape and name not in tensors
        packed = tensors[f"{name}_packed"]
        assert packed.nbytes == N * K * args["num_bits"] // 8
        codes = unpack_from_int32(packed, args["num_bits"], (N, K)).float()
        scale = tensors[f"{name}_scale"]
        n_groups = scale.size(1)
        if quant != INT8:
            assert n_groups == K // args["group_size"]
        zero = torch.zeros(N, n_groups)
        if f"{name}_zero_point" in tensors:
            zero = unpack_from_int32(tensors[f"{name}_zero_point"], 4, (N, n_groups), packed_dim=0).float()
        assert (f"{name}_zero_point" in tensors) == (not args["symmetric"])
        # row by row: row r of their q_proj is the one that Meta's layout of neighbouring pairs has elsewhere
        head = low.config.head_dim
        for row in range(N):
            half, i = divmod(row % head, head // 2)
            source = row - row % head + 2 * i + half if ours.endswith(("wq", "wk")) else row
            values = (codes[row].view(n_groups, -1) - zero[row, :, None]) * scale[row, :, None]
            assert torch.equal(values.flatten(), layer.weight[source])


def test_groups_that_do_not_divide_a_row_are_cut_smaller(tmp_path, tok, capsys):
    # 64 and 192 columns in groups of 128: padded in the checkpoint, exact in groups of 64
    ckpt = make(tmp_path / "run", tok, int4(128, False))
    folder = run(format="hf", ckpt=ckpt, out=tmp_path / "hf")
    assert "note: groups of 128 columns are cut into 64, which divide every layer" in capsys.readouterr().out
    assert quantization(folder)["config_groups"]["group_0"]["weights"]["group_size"] == 64
    ids = torch.arange(3, 203)[None]
    with torch.no_grad():
        assert (reference(ckpt)(ids) - theirs(folder)(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("quant", [INT8, int4(32, False)], ids=["int8", "int4"])
@pytest.mark.parametrize("tied", [True, False])
def test_what_stays_unpacked_is_said(tmp_path, tok, capsys, quant, tied):
    folder = run(format="hf", ckpt=make(tmp_path / "run", tok, quant, tied=tied), out=tmp_path / "hf", dtype="bf16")
    printed = capsys.readouterr().out
    outer = "tok_embeddings" if tied else "tok_embeddings and output"
    assert f"note: {outer} in bfloat16: only the linear layers of the blocks are packed" in printed
    assert printed.count("note:") == 1
    tensors = load_file(folder / "model.safetensors")
    assert ("lm_head.weight" in tensors) == (not tied)
    floats = {name for name, tensor in tensors.items() if tensor.is_floating_point()}
    assert {tensors[name].dtype for name in floats} == {torch.bfloat16}
    assert all(
        name.endswith(("norm.weight", "weight_scale", "embed_tokens.weight", "lm_head.weight")) for name in floats
    )
    card = (folder / "README.md").read_text(encoding="utf-8")
    n = sum(p.numel() for p in reference(tmp_path / "run").parameters())
    assert f"{n:,}（{quant['method']}, bfloat16）" in card


# refused


def test_a_row_that_is_not_whole_groups_is_refused_by_name(tmp_path, tok):
    ckpt = make(tmp_path / "run", tok, int4(32, False), hidden_dim=176)
    with pytest.raises(UserError, match=r"ckpt.pt: layers.0.feed_forward.w2 has 176 columns, no multiple of 32"):
        run(format="hf", ckpt=ckpt, out=tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    # int8 has no groups
    ckpt = make(tmp_path / "int8", tok, INT8, hidden_dim=174)
    folder, ids = run(format="hf", ckpt=ckpt, out=tmp_path / "hf"), torch.arange(3, 203)[None]
    with torch.no_grad():
        assert (reference(ckpt)(ids) - theirs(folder)(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("quant", [INT8, int4(32, False)], ids=["int8", "int4"])
@pytest.mark.parametrize("format", ["gguf", "llama2c"])
def test_other_formats_refuse(tmp_path, tok, format, quant):
    ckpt = make(tmp_path / "run", tok, quant)
    message = f"is quantized .{quant['method']}.: a float32 checkpoint is needed, such as its parent out/parent"
    with pytest.raises(UserError, match=message):
        run(format=format, ckpt=ckpt, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_import_refuses_a_packed_folder(tmp_path, tok):
    folder = run(format="hf", ckpt=make(tmp_path / "run", tok, int4(32, True)), out=tmp_path / "hf")
    with pytest.raises(UserError, match="config.json: it has a quantization_config, only models with float weights"):
        run(import_hf=folder, out=tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_scales_that_are_not_finite_are_refused_by_name(tmp_path, tok):
    ckpt = make(tmp_path / "run", tok, INT8)
    payload = torch.load(ckpt / "ckpt.pt", weights_only=True)
    payload["weights"]["layers.1.attention.wo.scale"][3] = torch.inf
    torch.save(payload, ckpt / "ckpt.pt")
    with pytest.raises(UserError, match="layers.1.attention.wo.scale holds values that are not finite"):
        run(format="hf", ckpt=ckpt, out=tmp_path / "out")
