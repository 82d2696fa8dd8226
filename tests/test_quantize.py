import io
import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import sentencepiece
import torch
from packing import pack

import eval_generate
import quantize
from common import checkpoint
from common.checkpoint import CheckpointError
from common.config import ConfigError
from common.distributed import Env
from dataset.corpus import Corpus
from dataset.formats import BinWriter, save_meta, save_pkl, token_dtype
from lowbit import layers
from model import Llama, ModelConfig
from tokenizer import StreamDecoder, Tokenizer

ENV = Env(0, 1, torch.device("cpu"))
TEXT = "这本书很好看，我很喜欢。酒店的房间很干净，服务也不错。价格便宜，下次还来！the quick brown fox"
SHAPES = [dict(), dict(n_kv_heads=2), dict(tied=False), dict(hidden_dim=172)]
SHAPE_NAMES = ["tied, MHA", "tied, GQA", "untied", "hidden size not a multiple of 16"]


def tiny_model(seed=0, **changes):
    torch.manual_seed(seed)
    shape = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=4, vocab_size=320, max_seq_len=64)
    model = Llama(ModelConfig(**shape | changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(std=0.1)  # 0.02 would leave the softmax flat and every comparison easy
    return model


def save_model(model, directory, tokenizer=b"tokenizer", stage="pretrain"):
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint.save(directory, stage=stage, step=7, tokens_seen=70, model=model, tokenizer=tokenizer, config={})
    return checkpoint.load(directory)


def to_int8(ckpt):
    return checkpoint.build_model(quantize.quantize_checkpoint(ckpt)).eval()


def int4(**changes):
    quant = dict(method="int4", group_size=32, symmetric=False, algorithm="rtn", int8=["tok_embeddings", "output"])
    return quant | changes


def train_tokenizer(text):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text] * 20), model_writer=model, vocab_size=320, model_type="bpe",
        byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


@pytest.fixture(scope="session")
def tokenizer_bytes():
    return train_tokenizer(TEXT)


def write_val(directory, ids, characters, tokenizer_sha256=None):
    """val.text.bin and its meta.json, of one source and a vocabulary of 320."""
    directory.mkdir(parents=True, exist_ok=True)
    with BinWriter(directory / "val.text.bin", 320) as file:
        file.write(ids)
    counts = dict(documents=6, tokens=len(ids), characters=characters)
    save_meta(
        directory,
        dict(
            format_version=2, vocab_size=320, tokenizer_sha256=tokenizer_sha256 or "none",
            sources={"text": dict(train=counts, val=counts)}, dtype=token_dtype(320).name,
            files={"val.text.bin": dict(part="pretrain", tokens=len(ids))},
        ),
    )  # fmt: skip
    return directory


@pytest.fixture
def data_dir(tmp_path, tokenizer_bytes):
    tok = Tokenizer(tokenizer_bytes)
    ids = (tok.encode(TEXT) + [tok.eos_id]) * 6
    data = write_val(tmp_path / "data", ids, 6 * len(TEXT), tok.sha256)
    with BinWriter(data / "train.text.bin", 320) as file:
        file.write(ids * 3)
    examples = [ids[n : n + 5 + n % 50] for n in range(100)]
    tokens, offsets = pack(examples, token_dtype(320))
    arrays = dict(tokens=tokens, offsets=offsets, loss_mask=np.packbits(np.ones(len(tokens), np.uint8)))
    save_pkl(data / "sft.pkl", arrays | dict(is_val=np.arange(100) % 5 == 0))
    meta = json.loads((data / "meta.json").read_text())
    meta["files"]["train.text.bin"] = dict(part="pretrain", tokens=3 * len(ids))
    meta["sources"]["text"]["train"] |= dict(tokens=3 * len(ids))
    save_meta(data, meta)
    return data


# the numbers


def test_rows_by_hand():
    weight = torch.tensor([[127.0, -63.6, 0.4, -0.6], [0.0, 0.0, 0.0, 0.0], [-0.25, 0.125, 0.0, 0.01], [0, 0, 0, 2.54]])
    q, scale = quantize.quantize_int8(weight)
    assert q.dtype == torch.int8 and q.shape == weight.shape
    assert q.tolist() == [[127, -64, 0, -1], [0, 0, 0, 0], [-127, 64, 0, 5], [0, 0, 0, 127]]
    # 0.25 / 127 = 1.0079 * 2^-9, next to the bfloat16 1.0078125 * 2^-9; 0.02 = 1.28 * 2^-6 lies between the
    # bfloat16 163/128 and 164/128 * 2^-6, nearer to the second
    assert scale.tolist() == [1.0, 1.0, 1.0078125 * 2**-9, 164 / 128 * 2**-6]


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e6])
def test_error_is_at_most_half_a_step_and_the_largest_uses_the_whole_range(size):
    weight = size * torch.randn(200, 96, generator=torch.Generator().manual_seed(0))
    q, scale = quantize.quantize_int8(weight)
    error = (weight - q * scale[:, None].float()).abs()
    assert (error <= scale.float()[:, None] * 0.5001).all()
    assert q.abs().amax(1).tolist() == [127] * 200


def test_quantized_weights_are_a_fixed_point():
    q, scale = quantize.quantize_int8(torch.randn(50, 32))
    again, scale_again = quantize.quantize_int8(q * scale.float()[:, None])
    assert torch.equal(q, again) and torch.equal(scale, scale_again)


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_NAMES)
def test_every_matrix_is_quantized_and_norms_are_not(tmp_path, shape):
    ckpt = save_model(tiny_model(**shape), tmp_path)
    weights = quantize.quantize_weights(ckpt.weights, quantize.INT8)
    for name, weight in ckpt.weights.items():
        if weight.dim() == 1:
            assert torch.equal(weights[name], weight)
        else:
            layer = name.removesuffix("weight")
            assert weights[f"{layer}q"].dtype == torch.int8 and weights[f"{layer}scale"].dtype == torch.bfloat16
            assert name not in weights
    model = to_int8(ckpt)
    assert not [m for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Embedding)]
    assert ("output.q" in weights) == (shape.get("tied") is False)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value):
    model = tiny_model()
    model.layers[1].feed_forward.w2.weight.data[3, 5] = value
    with pytest.raises(CheckpointError, match=r"ckpt.pt.*layers\.1\.feed_forward\.w2\.weight.*not finite"):
        save_model(model, tmp_path)  # and read again


def test_int4_layers_and_those_kept_in_int8(tmp_path):
    ckpt = save_model(tiny_model(tied=False, hidden_dim=72), tmp_path)
    quant = int4(int8=["output", "*.wo"])
    weights = quantize.quantize_checkpoint(ckpt, quant).weights
    for name, weight in ckpt.weights.items():
        layer = name.removesuffix(".weight")
        buffers = {key: weights.get(f"{layer}.{key}") for key in ("weight", "q", "scale", "zero")}
        shapes = {key: tuple(tensor.shape) for key, tensor in buffers.items() if tensor is not None}
        n, k = weight.shape if weight.dim() == 2 else (0, 0)
        if weight.dim() == 1:
            assert shapes == {"weight": tuple(weight.shape)} and torch.equal(buffers["weight"], weight)
        elif layer == "output" or layer.endswith(".wo"):
            assert shapes == {"q": (n, k), "scale": (n,)} and buffers["q"].dtype == torch.int8
        else:
            groups = -(-k // 32)
            assert shapes == {"q": (n, groups * 16), "scale": (n, groups), "zero": (n, groups)}
            assert buffers["q"].dtype == buffers["zero"].dtype == torch.uint8
    symmetric = quantize.quantize_checkpoint(ckpt, quant | dict(symmetric=True)).weights
    assert not [name for name in symmetric if name.endswith("zero")]


@pytest.mark.parametrize("symmetric", [False, True])
def test_an_int4_model_stands_for_what_the_numbers_say(tmp_path, symmetric):
    ckpt = save_model(tiny_model(hidden_dim=72), tmp_path)
    model = checkpoint.build_model(quantize.quantize_checkpoint(ckpt, int4(symmetric=symmetric)))
    weight = ckpt.weights["layers.0.feed_forward.w2.weight"]
    q, scale, zero = quantize.quantize_int4(weight, 32, symmetric)
    steps = q.unflatten(1, (-1, 32)).float() - zero.float()[..., None]
    expected = (steps * scale.float()[..., None]).flatten(1)[:, :72]
    assert torch.equal(model.layers[0].feed_forward.w2.weight, expected)


# the model


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_NAMES)
def test_model_generates(tmp_path, shape):
    model = to_int8(save_model(tiny_model(**shape), tmp_path))
    prompts = [[5, 6, 7], [8], list(range(3, 45))]
    one, two = (model.generate(prompts, 12, temperature=0.8, seed=3, eos_id=-1).tokens for _ in range(2))
    assert one == two and [len(t) for t in one] == [12, 12, 12]


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_NAMES)
def test_perplexity_within_half_a_percent(tmp_path, shape):
    ckpt = save_model(tiny_model(**shape), tmp_path)
    model, int8_model = checkpoint.build_model(ckpt).eval(), to_int8(ckpt)
    # text that the model itself finds likely, as validation text is to a trained model
    tokens = model.generate([[i + 3] for i in range(16)], 63, temperature=0.7, seed=0, eos_id=-1).tokens
    ids = [i + 3 if t == 0 else token for i, row in enumerate(tokens) for t, token in enumerate([None, *row])]
    val = Corpus(write_val(tmp_path / "data", ids, 1), "val")
    metrics = quantize.evaluate(model, int8_model, val, dict(eval_tokens=0, eval_batch_size=8), ENV)
    assert metrics["quantize/perplexity_float32"] < 200
    assert abs(metrics["quantize/perplexity_ratio"] - 1) < 0.005


# the file


@pytest.mark.parametrize("shape", SHAPES + [dict(scalar_head=True)], ids=SHAPE_NAMES + ["scalar head"])
def test_round_trip_through_the_file(tmp_path, shape):
    ckpt = save_model(tiny_model(**shape), tmp_path / "float32")
    model = to_int8(ckpt)
    checkpoint.save(
        tmp_path / "ckpt.pt", stage="quantize", step=7, tokens_seen=70, model=model, tokenizer=b"t",
        config={}, quant={"method": "int8"}, parent=checkpoint.parent_of(ckpt),
    )  # fmt: skip
    loaded = checkpoint.load(tmp_path / "ckpt.pt")
    again = checkpoint.build_model(loaded).eval()
    assert loaded.training is None and loaded.quant == {"method": "int8"}
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor) and again.state_dict()[name].dtype == tensor.dtype
    ids = torch.arange(40)[None]
    compute = (lambda m: m.values(ids)) if shape.get("scalar_head") else (lambda m: m(ids))
    with torch.no_grad():
        assert torch.equal(compute(again), compute(model))


@pytest.mark.parametrize("shape", [dict(dim=64, n_layers=5, vocab_size=6144), dict(dim=160, n_heads=5, n_kv_heads=5)])
def test_file_is_about_a_quarter(tmp_path, shape):
    shape = dict(vocab_size=6144) | shape
    ckpt = save_model(tiny_model(**shape), tmp_path / "float32", tokenizer=b"x")
    checkpoint.save(
        tmp_path / "ckpt.pt", stage="quantize", step=7, tokens_seen=70, model=to_int8(ckpt), tokenizer=b"x",
        config={}, quant={"method": "int8"},
    )  # fmt: skip
    sizes = quantize.file_sizes(ckpt, tmp_path / "ckpt.pt")
    assert sizes["quantize/float32_weight_bytes"] == 4 * tiny_model(**shape).num_params()
    assert 0.2 < sizes["quantize/file_ratio"] <= 0.26


def test_file_of_int4_layers_is_about_a_seventh(tmp_path):
    ckpt = save_model(tiny_model(dim=128, n_layers=4, hidden_dim=384), tmp_path / "float32", tokenizer=b"x")
    low = quantize.quantize_checkpoint(ckpt, int4(group_size=64))
    checkpoint.save(
        tmp_path / "ckpt.pt", stage="quantize", step=7, tokens_seen=70, model=checkpoint.build_model(low),
        tokenizer=b"x", config={}, quant=low.quant,
    )  # fmt: skip
    # 4 bits, 16 of scale and 8 of zero for 64 weights: 4.375 of 32; a twentieth of the weights are the embedding's
    assert 0.1 < quantize.file_sizes(ckpt, tmp_path / "ckpt.pt")["quantize/file_ratio"] <= 0.17


def test_unknown_method_is_refused(tmp_path):
    int8_ckpt = quantize.quantize_checkpoint(save_model(tiny_model(), tmp_path))
    int8_ckpt.quant = {"method": "int3"}
    with pytest.raises(CheckpointError, match=r"ckpt\.pt.*method int3"):
        checkpoint.build_model(int8_ckpt)


def test_training_stages_can_refuse_a_quantized_checkpoint(tmp_path):
    ckpt = save_model(tiny_model(), tmp_path)
    checkpoint.refuse_quantized(ckpt)
    int8_ckpt = quantize.quantize_checkpoint(ckpt)
    int8_ckpt.parent = checkpoint.parent_of(ckpt)
    with pytest.raises(CheckpointError, match=r"quantized \(int8\).*float32 checkpoint.*parent"):
        checkpoint.refuse_quantized(int8_ckpt)
    with pytest.raises(CheckpointError, match="is quantized"):
        quantize.quantize_checkpoint(int8_ckpt)


# the stage


def arguments(init_from, data, out, *more):
    return [
        f"--init_from={init_from}",
        f"--data={data}",
        f"--out={out}",
        "--device=cpu",
        "--sample_tokens=5",
        *more,
    ]


@pytest.mark.parametrize("stage, shape", [("pretrain", {}), ("sft", {"n_kv_heads": 2}), ("rm", {"scalar_head": True})])
def test_the_stage(tmp_path, data_dir, tokenizer_bytes, capsys, stage, shape):
    model = tiny_model(**shape)
    parent = save_model(model, tmp_path / stage, tokenizer_bytes, stage)
    out = tmp_path / "quantize"
    quantize.main(arguments(tmp_path / stage, data_dir, out))
    row = json.loads((out / "metrics.jsonl").read_text())
    ckpt = checkpoint.load(out)
    assert (ckpt.stage, ckpt.step, ckpt.tokens_seen) == ("quantize", 7, 70)
    assert ckpt.parent == checkpoint.parent_of(parent) and ckpt.tokenizer == tokenizer_bytes
    assert ckpt.model_config == asdict(model.config)
    assert json.loads((out / "config.json").read_text()) == ckpt.config
    assert row["quantize/file_bytes"] == (out / "ckpt.pt").stat().st_size
    printed = capsys.readouterr().out
    if stage == "rm":
        assert 0 < row["quantize/score_rms_difference"] < 0.05 * row["quantize/score_std"]
        assert not (out / "samples.txt").exists()
    else:
        assert row["quantize/perplexity_ratio"] == pytest.approx(1, abs=0.02)  # random weights, likelihood of noise
        assert "perplexity_ratio" in printed and "file_ratio" in printed
        samples = (out / "samples.txt").read_text(encoding="utf-8")
        assert samples.count("[float32]") == samples.count("[int8]") == 2

    with pytest.raises(CheckpointError, match="--overwrite"):
        quantize.main(arguments(tmp_path / stage, data_dir, out))
    before = (out / "ckpt.pt").read_bytes()
    quantize.main(arguments(tmp_path / stage, data_dir, out, "--resume"))
    assert (out / "ckpt.pt").read_bytes() == before
    quantize.main(arguments(tmp_path / stage, data_dir, out, "--overwrite", "--sample_prompts="))
    with pytest.raises(CheckpointError, match="is quantized"):
        quantize.main(arguments(out, data_dir, tmp_path / "again"))
    assert not (tmp_path / "again").exists()


RECIPES = {
    "int8": [],
    "rtn": ["--method=int4", "--algorithm=rtn", "--group_size=32"],
    "gptq": ["--method=int4", "--calibration_tokens=200"],
    "gptq symmetric": ["--method=int4", "--symmetric=true", "--calibration_tokens=200", "--act_order=false"],
    "gptq of sft.pkl": ["--method=int4", "--calibration=sft.pkl", "--calibration_tokens=200", "--range_search=false"],
    "gptq, int8 in part": ["--method=int4", "--int8_layers=tok_embeddings,layers.0.*", "--calibration_tokens=200"],
    "all in int4": ["--method=int4", "--int8_layers=", "--calibration_tokens=200"],
}


@pytest.mark.parametrize("shape", [{}, dict(tied=False, n_kv_heads=2, hidden_dim=172), dict(scalar_head=True)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_through_the_stage(tmp_path, data_dir, tokenizer_bytes, capsys, recipe, shape):
    stage = "rm" if shape.get("scalar_head") else "sft"
    save_model(tiny_model(**shape), tmp_path / stage, tokenizer_bytes, stage)
    out = tmp_path / "quantize"
    quantize.main(arguments(tmp_path / stage, data_dir, out, *RECIPES[recipe]))
    calibrated = [line for line in capsys.readouterr().out.splitlines() if "relative error of its output" in line]
    ckpt = checkpoint.load(out)
    model = checkpoint.build_model(ckpt).eval()
    low = {name for name, module in model.named_modules() if isinstance(module, layers.LowBitWeight)}
    in_four_bits = {name for name in low if layers.bits_of(name, ckpt.quant) == 4}
    assert len(calibrated) == (len(in_four_bits - {"tok_embeddings"}) if "gptq" in recipe or "all" in recipe else 0)
    for name in low:
        bits = 4 if name in in_four_bits else 8
        assert isinstance(model.get_submodule(name), layers.Int4Weight if bits == 4 else layers.Int8Weight)
    if recipe == "all in int4":
        assert in_four_bits == low
    elif recipe != "int8":
        assert "scalar" not in in_four_bits or "part" in recipe
        assert in_four_bits and "tok_embeddings" not in in_four_bits
    row = json.loads((out / "metrics.jsonl").read_text())
    if stage == "rm":
        assert row["quantize/score_rms_difference"] < 0.5 * row["quantize/score_std"]
        return
    assert row["quantize/perplexity_ratio"] == pytest.approx(1, abs=0.3)
    assert row["quantize/perplexity_quantized"] == pytest.approx(
        row["quantize/perplexity_float32"] * row["quantize/perplexity_ratio"], rel=1e-4
    )
    assert f"[{ckpt.quant['method']}]" in (out / "samples.txt").read_text(encoding="utf-8")

    with pytest.raises(CheckpointError, match=rf"is quantized \({ckpt.quant['method']}\)"):
        checkpoint.refuse_quantized(ckpt)
    with pytest.raises(CheckpointError, match="is quantized"):
        quantize.main(arguments(out, data_dir, tmp_path / "again", *RECIPES[recipe]))
    capsys.readouterr()
    eval_generate.main([f"--ckpt={out}", "--prompt=这本书", "--max_new_tokens=5", "--temperature=0", "--device=cpu"])
    tok = checkpoint.tokenizer_of(ckpt)
    reply = model.generate([[*tok.encode("这本书"), tok.bos_id]], 5, temperature=0, eos_id=tok.eos_id).tokens[0]
    decoder = StreamDecoder(tok)
    assert capsys.readouterr().out == "".join(map(decoder.push, reply)) + "\n"


def test_gptq_loses_less_than_rounding_to_nearest_and_the_spec_says_which(tmp_path, data_dir, tokenizer_bytes):
    save_model(tiny_model(), tmp_path / "sft", tokenizer_bytes, "sft")
    tok, ids = Tokenizer(tokenizer_bytes), Corpus(data_dir, "val").read(0, 64)
    with torch.no_grad():
        exact = tiny_model()(torch.from_numpy(ids)[None])
        errors = {}
        for algorithm in ("rtn", "gptq"):
            options = ["--method=int4", f"--algorithm={algorithm}", "--calibration_tokens=300"]
            quantize.main(arguments(tmp_path / "sft", data_dir, tmp_path / algorithm, *options))
            ckpt = checkpoint.load(tmp_path / algorithm)
            assert ckpt.quant == int4(algorithm=algorithm, group_size=64, int8=["tok_embeddings", "output", "scalar"])
            errors[algorithm] = (checkpoint.build_model(ckpt).eval()(torch.from_numpy(ids)[None]) - exact).norm()
    assert tok.vocab_size == 320 and errors["gptq"] < 0.7 * errors["rtn"]


def test_what_it_was_made_from_is_kept_and_a_change_is_told(tmp_path, data_dir, tokenizer_bytes, capsys):
    save_model(tiny_model(), tmp_path / "sft", tokenizer_bytes, "sft")
    made = {"val.text.bin"}
    for text, more in (("train", {"train.text.bin"}), ("sft.pkl", {"sft.pkl"}), (None, set())):
        options = ["--method=int4", f"--calibration={text}", "--calibration_tokens=300"] if text else []
        command = arguments(tmp_path / "sft", data_dir, tmp_path / str(text), *options)
        quantize.main(command)
        assert checkpoint.load(tmp_path / str(text)).training["data"].keys() == made | more
        quantize.main([*command, "--resume"])
        assert "is complete: nothing to do" in capsys.readouterr().out
    command = arguments(tmp_path / "sft", data_dir, tmp_path / "train", "--method=int4", "--calibration_tokens=300")
    data = bytearray((data_dir / "train.text.bin").read_bytes())
    data[0] ^= 1
    (data_dir / "train.text.bin").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"train\.text\.bin is \w{16}, step 7 of .* was trained on \w{16}"):
        quantize.main([*command, "--resume"])


def test_the_stage_never_replaces_its_own_input(tmp_path, data_dir, tokenizer_bytes):
    save_model(tiny_model(), tmp_path / "sft", tokenizer_bytes)
    before = (tmp_path / "sft" / "ckpt.pt").read_bytes()
    with pytest.raises(ConfigError, match="would be replaced"):
        quantize.main(arguments(tmp_path / "sft", data_dir, tmp_path / "sft", "--overwrite"))
    assert (tmp_path / "sft" / "ckpt.pt").read_bytes() == before


@pytest.mark.parametrize(
    "option, message",
    [
        ("--method=int3", "method=int3: int8 or int4"),
        ("--eval_tokens=-1", "eval_tokens=-1: at least 0"),
        ("--sample_tokens=0", "sample_tokens=0: at least 1"),
        ("--algorithm=awq", "algorithm=awq: gptq or rtn"),
        ("--group_size=48", "group_size=48: 32, 64 or 128"),
        ("--calibration=val", "calibration=val: train or sft.pkl"),
        ("--calibration_tokens=0", "calibration_tokens=0: at least 1"),
        ("--damping=-0.1", "damping=-0.1: at least 0"),
    ],
)
def test_bad_values_are_refused(tmp_path, option, message):
    with pytest.raises(ConfigError, match=message):
        quantize.main([option, f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_a_context_of_one_token_has_no_room_for_samples(tmp_path, data_dir, tokenizer_bytes):
    save_model(tiny_model(max_seq_len=1), tmp_path / "sft", tokenizer_bytes, "sft")
    options = arguments(tmp_path / "sft", data_dir, tmp_path / "out")
    with pytest.raises(ConfigError, match="sample_prompts: a context of 1 token has no room"):
        quantize.main(options)
    assert not (tmp_path / "out").exists()
    quantize.main([*options, "--sample_prompts="])
    assert checkpoint.load(tmp_path / "out").quant == dict(method="int8")


def test_a_model_that_gives_no_number_is_named(tmp_path, data_dir, tokenizer_bytes):
    model = tiny_model()
    with torch.no_grad():
        for layer in (model.layers[0].attention.wq, model.layers[0].attention.wk):
            layer.weight.fill_(1e25)  # their product is beyond float32
    path = save_model(model, tmp_path / "sft", tokenizer_bytes, "sft").path
    with pytest.raises(CheckpointError, match=f"{path}: quantize/perplexity_float32 is nan: weights are too large"):
        quantize.main(arguments(tmp_path / "sft", data_dir, tmp_path / "out"))


def test_a_pattern_without_a_layer_is_refused(tmp_path, data_dir, tokenizer_bytes):
    save_model(tiny_model(), tmp_path / "sft", tokenizer_bytes)
    options = ["--method=int4", "--int8_layers=output,layers.*.atention.wo"]  # a tied model has no output: allowed
    with pytest.raises(ConfigError, match=r"int8_layers: layers\.\*\.atention\.wo matches no layer of .*ckpt\.pt"):
        quantize.main(arguments(tmp_path / "sft", data_dir, tmp_path / "out", *options))
    assert not (tmp_path / "out").exists()


def test_too_little_calibration_text_is_refused(tmp_path, data_dir, tokenizer_bytes):
    save_model(tiny_model(), tmp_path / "sft", tokenizer_bytes)
    with pytest.raises(ConfigError, match=r"train\.\*\.bin: \d+ tokens are too few for calibration_tokens=65536"):
        quantize.main(arguments(tmp_path / "sft", data_dir, tmp_path / "out", "--method=int4"))
    assert not (tmp_path / "out").exists()


def test_data_of_another_tokenizer_is_refused(tmp_path, data_dir):
    save_model(tiny_model(), tmp_path / "sft", train_tokenizer(TEXT[:40]))
    with pytest.raises(CheckpointError, match="tokenizer_sha256"):
        quantize.main(arguments(tmp_path / "sft", data_dir, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_too_little_data_is_refused(tmp_path, tokenizer_bytes):
    save_model(tiny_model(), tmp_path / "sft", tokenizer_bytes)
    data = write_val(tmp_path / "data", [5], 1, Tokenizer(tokenizer_bytes).sha256)
    with pytest.raises(ConfigError, match=r"val\.\*\.bin: 1 tokens are too few"):
        quantize.main(arguments(tmp_path / "sft", data, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_how_an_imported_models_documents_open_is_kept(tmp_path, tokenizer_bytes, data_dir):
    facts = dict(stage="pretrain", step=7, tokens_seen=70, tokenizer=tokenizer_bytes, config={}, document_ids=(1, 1))
    checkpoint.save(tmp_path / "base" / "ckpt.pt", model=tiny_model(), **facts)
    quantize.main(arguments(tmp_path / "base", data_dir, tmp_path / "int8"))
    ckpt = checkpoint.load(tmp_path / "int8")
    assert ckpt.document_ids == [1, 1] and checkpoint.continues(ckpt)
    assert checkpoint.tokenizer_of(ckpt).opening_id == 1


def test_a_pretrained_model_continues_and_later_ones_answer(tokenizer_bytes):
    tok, model = Tokenizer(tokenizer_bytes), tiny_model()
    for stage, ids in (("pretrain", [2, *tok.encode("这本书")]), ("sft", [*tok.encode("这本书"), 1])):
        reply = tok.decode(model.generate([ids], 9, temperature=0).tokens[0])
        assert quantize.sample_pairs(model, "x", tok, stage == "pretrain", ["这本书"], 9) == [("[x] 这本书", reply)]
