"""Take a checkpoint to transformers, llama.cpp and Ollama, or llama2.c, and bring a model from there.

The model is Llama 2 as published, so no format needs code of ours: tensors get other names, and for Hugging Face the
rows of wq and wk another order, as it rotates the halves of a head and Meta neighbouring pairs. The vocabulary and the
chat template are interop/vocabulary.py's. A folder is written beside `out` and renamed: all of it is there, or nothing.

    python export.py --format=hf --ckpt=out/demo/sft --out=out/demo/hf
    python export.py --format=gguf --ckpt=out/demo/sft --dtype=q8_0 --out=out/demo/gguf
    python export.py --format=llama2c --ckpt=out/demo/pretrain --out=out/demo/llama2c
    python export.py --import_hf=out/demo/hf --out=out/demo/from_hf
    python export.py --import_llama2c=stories260K.bin --tokenizer=tok512.model --out=out/stories

in:  ckpt.pt of any stage (quantized: hf only); or a Hugging Face folder (safetensors and tokenizer.model), or a
     llama2.c .bin
out: hf: what from_pretrained reads, tokenizer.model and a model card; gguf: model.gguf, Modelfile;
     llama2c: model.bin, tokenizer.bin; import: ckpt.pt and config.json, a run like any other
"""

import json
import math
import struct
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common import checkpoint
from common.checkpoint import Checkpoint
from common.config import ConfigError, UserError, new_folder, parse_config, read_json, run, save_config, write_json
from common.provenance import model_card, provenance
from configs.eval_generate import config as chat_defaults
from interop import compressed, vocabulary
from model import Llama, ModelConfig
from tokenizer import MODEL_FILE, Tokenizer

FACTS = "tiny_llama2_zh.provenance"  # our key in the metadata of safetensors and GGUF
SAMPLING = {key: chat_defaults[key] for key in ("temperature", "top_k", "top_p")}
# our names of tensors, Hugging Face's, GGUF's
NAMES = [
    ("tok_embeddings", "model.embed_tokens", "token_embd"),
    ("layers.{}.attention_norm", "model.layers.{}.input_layernorm", "blk.{}.attn_norm"),
    ("layers.{}.attention.wq", "model.layers.{}.self_attn.q_proj", "blk.{}.attn_q"),
    ("layers.{}.attention.wk", "model.layers.{}.self_attn.k_proj", "blk.{}.attn_k"),
    ("layers.{}.attention.wv", "model.layers.{}.self_attn.v_proj", "blk.{}.attn_v"),
    ("layers.{}.attention.wo", "model.layers.{}.self_attn.o_proj", "blk.{}.attn_output"),
    ("layers.{}.ffn_norm", "model.layers.{}.post_attention_layernorm", "blk.{}.ffn_norm"),
    ("layers.{}.feed_forward.w1", "model.layers.{}.mlp.gate_proj", "blk.{}.ffn_gate"),
    ("layers.{}.feed_forward.w2", "model.layers.{}.mlp.down_proj", "blk.{}.ffn_down"),
    ("layers.{}.feed_forward.w3", "model.layers.{}.mlp.up_proj", "blk.{}.ffn_up"),
    ("norm", "model.norm", "output_norm"),
    ("output", "lm_head", "output"),
    ("scalar", "score", None),
]
# our sizes, as Hugging Face's config.json calls them
HF_KEYS = dict(
    dim="hidden_size",
    n_layers="num_hidden_layers",
    n_heads="num_attention_heads",
    n_kv_heads="num_key_value_heads",
    vocab_size="vocab_size",
    max_seq_len="max_position_embeddings",
    hidden_dim="intermediate_size",
    norm_eps="rms_norm_eps",
    tied="tie_word_embeddings",
)
HF_FIXED = dict(model_type="llama", hidden_act="silu", attention_bias=False, mlp_bias=False, rope_scaling=None)
GGUF_TYPES = dict(float32="ALL_F32", float16="MOSTLY_F16", q8_0="MOSTLY_Q8_0", q4_0="MOSTLY_Q4_0")
LLAMA2C_MAGIC = 0x616B3432  # "ak42": a file of version 1 or later
LLAMA2C_HEADER = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
LLAMA2C_LAYER = [ours.removeprefix("layers.{}.") for ours, _, _ in NAMES if ours.startswith("layers.")]
DTYPES = dict(hf=("float32", "bfloat16", "float16"), gguf=tuple(GGUF_TYPES), llama2c=("float32", "int8"))
ALIASES = dict(fp32="float32", f32="float32", bf16="bfloat16", fp16="float16", f16="float16")
# what is written here, and so may be replaced here
FILES = set(
    """
    config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json tokenizer.model README.md
    model.gguf Modelfile model.bin tokenizer.bin ckpt.pt
""".split()
)


def text_ids(ckpt, tok):
    """What bos and eos mean outside: a base model's document, or the two marks of our conversations."""
    return (tok.opening_id, tok.closing_id) if checkpoint.continues(ckpt) else (tok.bos_id, tok.eos_id)


def renamed(name, column):
    """A tensor's name in Hugging Face (column 1) or GGUF (2): layers.3.attention.wq.weight -> blk.3.attn_q.weight."""
    layer = name.split(".")[1]
    for names in NAMES:
        if name == names[0].format(layer) + ".weight":
            return names[column].format(layer) + ".weight"
    raise KeyError(name)


# Hugging Face


def pairs_to_halves(weight, n_heads):
    """Reorder the rows of wq or wk (H * D/H, D), so that the pair (2i, 2i+1) of each head becomes (i, i + D/H/2)."""
    return weight.view(n_heads, -1, 2, weight.size(1)).transpose(1, 2).reshape(weight.shape)


def halves_to_pairs(weight, n_heads):
    """The inverse."""
    return weight.view(n_heads, 2, -1, weight.size(1)).transpose(1, 2).reshape(weight.shape)


def reorder(name, weight, config, how):
    """`how` for wq and wk; any other weight as it is."""
    n_heads = {"wq": config.n_heads, "wk": config.n_kv_heads}.get(name.split(".")[-2])
    return how(weight, n_heads) if n_heads else weight


def hf_config(ckpt, tok, dtype):
    """config.json for transformers 4 (rope_theta, torch_dtype) and 5 (rope_parameters, dtype)."""
    config, (bos, eos) = ModelConfig(**ckpt.model_config), text_ids(ckpt, tok)
    kind = "LlamaForSequenceClassification" if config.scalar_head else "LlamaForCausalLM"
    values = dict(architectures=[kind]) | HF_FIXED | {theirs: getattr(config, ours) for ours, theirs in HF_KEYS.items()}
    values |= dict(head_dim=config.head_dim, attention_dropout=0.0, torch_dtype=dtype, dtype=dtype)
    rope = dict(rope_theta=config.rope_theta)
    values |= rope | dict(rope_parameters=rope | dict(rope_type="default"))
    if config.scalar_head:
        values |= dict(id2label={"0": "reward"}, label2id={"reward": 0})
    return values | dict(bos_token_id=bos, eos_token_id=eos, pad_token_id=tok.pad_id)


def hf_packed(ckpt, layers, dtype):
    """(tensors by name, quantization_config, notes) of a quantized model; `layers` by name are those to pack."""
    config, args = ModelConfig(**ckpt.model_config), compressed.weight_args(layers, ckpt.path)
    tensors = {}
    for name, layer in layers.items():
        order = partial(reorder, f"{name}.weight", config=config, how=pairs_to_halves)
        for ending, tensor in compressed.pack(layer, args, order, getattr(torch, dtype)).items():
            tensors[renamed(f"{name}.weight", 1).removesuffix("weight") + ending] = tensor
    kept = [name.removesuffix(".weight") for name, weight in ckpt.weights.items() if weight.dim() == 2]
    outside = [name for name in kept if not name.startswith("layers.")]
    inside = [name for name in kept if name.startswith("layers.") and name not in layers]
    ignore = ["score" if config.scalar_head else "lm_head"]
    ignore += [renamed(f"{name}.weight", 1).removesuffix(".weight") for name in inside]
    notes = [f"{' and '.join(outside)} in {dtype}: only the linear layers of the blocks are packed"]
    if inside:
        notes.append(
            f"{len(inside)} int8 layers in {dtype}, such as {inside[0]}: a file has packed layers of one width"
        )
    if args.get("group_size") != (group := getattr(next(iter(layers.values())), "group_size", None)):
        notes.append(f"groups of {group} columns are cut into {args['group_size']}, which divide every layer")
    return tensors, compressed.quantization_config(args, ignore), notes


def export_hf(ckpt, tok, folder, dtype, packable=None):
    """What from_pretrained of transformers reads, tokenizer.model and a model card.

    `packable`: of a quantized model, whose `ckpt.weights` are float32 here, the layers {name: layer} to pack.
    """
    config, base = hf_config(ckpt, tok, dtype), checkpoint.continues(ckpt)
    weights, notes, precision = {}, [], dtype
    if packable:
        weights, config["quantization_config"], notes = hf_packed(ckpt, packable, dtype)
        precision = f"{ckpt.quant['method']}, {dtype}"
    for name, weight in ckpt.weights.items():
        if not packable or name.removesuffix(".weight") not in packable:
            weight = reorder(name, weight, ModelConfig(**ckpt.model_config), pairs_to_halves)
            weights[renamed(name, 1)] = weight.to(getattr(torch, dtype)).contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt", FACTS: json.dumps(provenance(ckpt))})
    write_json(folder / "config.json", config)
    if not ckpt.model_config["scalar_head"]:
        # sampling as eval_generate.py does it; transformers would keep the 50 likeliest tokens by itself
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        sampling = dict(do_sample=True, max_new_tokens=chat_defaults["max_new_tokens"]) | SAMPLING
        write_json(folder / "generation_config.json", ids | sampling)
    write_json(folder / "tokenizer.json", vocabulary.tokenizer_json(tok, tok.opening_id if base else None))
    max_len = config["max_position_embeddings"]
    write_json(folder / "tokenizer_config.json", vocabulary.tokenizer_config(tok, max_len, chat=not base))
    (folder / MODEL_FILE).write_bytes(tok.model_bytes)
    (folder / "README.md").write_text(model_card(ckpt, precision), encoding="utf-8")
    return notes


def read_safetensors(folder):
    """(tensors by name, metadata) of model.safetensors or of the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    files = sorted(set(read_json(index).get("weight_map", {}).values())) if index.exists() else ["model.safetensors"]
    tensors, metadata = {}, {}
    for path in (folder / name for name in files):
        if not path.is_file():
            raise UserError(f"{path}: no such file (weights are read from safetensors only)")
        try:
            with safe_open(path, "pt") as file:
                metadata |= file.metadata() or {}
                tensors |= {key: file.get_tensor(key) for key in file.keys()}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cut short or not safetensors: {error}") from None
    return tensors, metadata


def hf_model_config(path):
    """ModelConfig of a config.json; what is not Llama 2 is refused by its key."""
    values = dict(tie_word_embeddings=False) | HF_FIXED | read_json(path)
    if values.get("quantization_config"):
        raise UserError(f"{path}: it has a quantization_config, only models with float weights are imported")
    values.setdefault("num_key_value_heads", values.get("num_attention_heads"))
    rope = values.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        values["rope_scaling"] = rope
    for key, needed in HF_FIXED.items():
        if values[key] != needed:
            raise UserError(f"{path}: {key} is {values[key]}, Llama 2 has {needed}")
    missing = [key for key in HF_KEYS.values() if values.get(key) is None]
    if missing:
        raise UserError(f"{path}: no {', '.join(missing)}")
    try:
        config = ModelConfig(
            **{ours: values[theirs] for ours, theirs in HF_KEYS.items()},
            rope_theta=float(rope.get("rope_theta") or values.get("rope_theta") or 10000),
            scalar_head=values.get("architectures") == ["LlamaForSequenceClassification"],
        )
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path}: {error}") from None
    if values.get("head_dim") not in (None, config.head_dim):
        raise UserError(f"{path}: head_dim is {values['head_dim']}, Llama 2 has {config.head_dim} (dim / n_heads)")
    return config


def hf_document_ids(folder):
    """What documents of a foreign base model open and close with, by its config.json and tokenizer_config.json."""
    config, path = read_json(folder / "config.json"), folder / "tokenizer_config.json"
    bos, eos = (config.get(f"{name}_token_id") for name in ("bos", "eos"))
    eos = eos[0] if isinstance(eos, list) else Tokenizer.eos_id if eos is None else eos
    adds_bos = read_json(path).get("add_bos_token", True) if path.exists() else True
    return (Tokenizer.bos_id if bos is None else bos) if adds_bos else eos, eos


def import_hf(folder, tokenizer_path):
    """A Checkpoint from a Hugging Face folder; one that we exported is what it was, another continues documents."""
    config = hf_model_config(folder / "config.json")
    tensors, metadata = read_safetensors(folder)
    if config.tied:
        tensors.pop("lm_head.weight", None)  # some write the shared tensor twice
    ours = {renamed(name, 1): (name, shape) for name, shape in shapes_of(config).items()}
    weights = {}
    for name, weight in tensors.items():
        name, shape = ours.get(name, (name, None))
        right = weight.shape == shape  # what does not fit, the checkpoint refuses by name
        weights[name] = reorder(name, weight.float(), config, halves_to_pairs) if right else weight
    facts = json.loads(metadata.get(FACTS, "{}"))
    ids = facts.get("document_ids") or hf_document_ids(folder)
    return imported(folder, config, weights, Tokenizer.load(tokenizer_path or folder), ids, facts)


# GGUF


def gguf_type(name, weight, config, dtype):
    """The type of a tensor; the output projection of a q4_0 file stays at 8 bits, as llama.cpp keeps it finer too."""
    if weight.dim() == 1 or dtype == "float32":
        return gguf.GGMLQuantizationType.F32
    if dtype == "float16" or weight.size(1) % 32:  # the blocks of q8_0 and q4_0 are 32 values of a row
        return gguf.GGMLQuantizationType.F16
    is_head = name == ("tok_embeddings.weight" if config.tied else "output.weight")
    return gguf.GGMLQuantizationType.Q8_0 if dtype == "q8_0" or is_head else gguf.GGMLQuantizationType.Q4_0


def export_gguf(ckpt, tok, folder, dtype):
    """model.gguf by llama.cpp's conventions (ggml-org/ggml, docs/gguf.md), and a Modelfile for Ollama."""
    config, base = ModelConfig(**ckpt.model_config), checkpoint.continues(ckpt)
    parts = vocabulary.gguf_vocabulary(tok, config.vocab_size)
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_name(f"tiny-llama2-zh {ckpt.stage}")
    writer.add_string(FACTS, json.dumps(provenance(ckpt), ensure_ascii=False))
    writer.add_file_type(gguf.LlamaFileType[GGUF_TYPES[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    add_gguf_vocabulary(writer, parts, tok, base, text_ids(ckpt, tok))
    for name, weight in ckpt.weights.items():
        kind = gguf_type(name, weight, config, dtype)
        writer.add_tensor(renamed(name, 2), gguf.quants.quantize(weight.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    text = vocabulary.modelfile(tok, config.max_seq_len, SAMPLING, chat=not base)
    (folder / "Modelfile").write_text(text, encoding="utf-8")
    odd = [name for name, weight in ckpt.weights.items() if weight.dim() == 2 and weight.size(1) % 32]
    if odd and dtype.startswith("q"):
        return parts["notes"] + [f"{len(odd)} tensors stay float16, such as {odd[0]}: blocks are of 32 columns"]
    return parts["notes"]


def add_gguf_vocabulary(writer, parts, tok, base, ids):
    """The keys of the tokenizer; llama.cpp puts bos first unless told, which our conversations do not."""
    writer.add_tokenizer_model(parts["model"])
    writer.add_tokenizer_pre("default")
    writer.add_token_list(parts["tokens"])
    writer.add_token_scores(parts["scores"])
    writer.add_token_types(parts["types"])
    writer.add_bos_token_id(ids[0])
    writer.add_eos_token_id(ids[1])
    writer.add_unk_token_id(tok.pad_id)
    writer.add_pad_token_id(tok.pad_id)
    writer.add_add_bos_token(base)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(parts["add_space_prefix"])
    if not base:
        writer.add_chat_template(vocabulary.CHAT_TEMPLATE)


# llama2.c


def llama2c_names(config):
    """Our names of the tensors before the rotary tables, in the order of a legacy .bin file."""
    layers = [f"layers.{i}.{part}.weight" for part in LLAMA2C_LAYER for i in range(config.n_layers)]
    return ["tok_embeddings.weight", *layers, "norm.weight"]


def llama2c_rope(config):
    """cos and sin of a legacy .bin file, each (max_seq_len, head_dim/2), in float32 from the start like llama2.c's."""
    freqs = 1.0 / 10000.0 ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    angles = torch.outer(torch.arange(config.max_seq_len).float(), freqs)
    return angles.cos(), angles.sin()


def export_llama2c(ckpt, tok, folder, dtype):
    """model.bin (float32: the legacy layout; int8: version 2, for runq) and tokenizer.bin."""
    config = ModelConfig(**ckpt.model_config)
    for key, value in dict(norm_eps=1e-5, rope_theta=10000.0).items():
        if getattr(config, key) != value:
            raise UserError(f"{ckpt.path}: {key} is {getattr(config, key)}, llama2.c has {value} in its code")
    weights = {name: ckpt.weights[name].numpy() for name in llama2c_names(config)}
    head = [] if config.tied else [ckpt.weights["output.weight"].numpy()]
    sizes = {key: getattr(config, key) for key in LLAMA2C_HEADER}
    with open(folder / "model.bin", "wb") as file:
        if dtype == "float32":
            # the sign of vocab_size says whether the output projection is the embedding
            sizes["vocab_size"] *= 1 if config.tied else -1
            file.write(struct.pack("<7i", *sizes.values()))
            rope = [table.numpy() for table in llama2c_rope(config)]
            file.writelines(array.astype("<f4").tobytes() for array in [*weights.values(), *rope, *head])
        else:
            group = math.gcd(64, config.dim, config.hidden_dim)  # runq cuts activations into the same groups
            header = struct.pack("<I8iBi", LLAMA2C_MAGIC, 2, *sizes.values(), config.tied, group)
            file.write(header.ljust(256, b"\0"))
            norms = [array for array in weights.values() if array.ndim == 1]
            file.writelines(array.astype("<f4").tobytes() for array in norms)
            for array in [array for array in weights.values() if array.ndim == 2] + head:
                file.writelines(part.tobytes() for part in quantize_groups(array, group))
    (folder / "tokenizer.bin").write_bytes(vocabulary.llama2c_vocabulary(tok, config.vocab_size))
    if tok.opening_id == tok.bos_id:
        return []
    return ["llama2.c opens every text with <s> and stops at <s>; this model learnt neither, see docs/deploy.md"]


def quantize_groups(array, group):
    """(..., K) -> q int8, scale float32 of each `group` values in a row, with array ~ q * scale (Q8_0 of llama2.c)."""
    groups = array.reshape(-1, group)
    scale = np.abs(groups).max(1, keepdims=True) / 127
    return np.rint(groups / np.where(scale == 0, 1, scale)).astype(np.int8), scale.astype("<f4")


def import_llama2c(path, tokenizer_path):
    """A Checkpoint from a legacy .bin file, whose documents open and close with <bos>."""
    tok, raw = Tokenizer.load(tokenizer_path), path.read_bytes()
    if raw[:4] == struct.pack("<I", LLAMA2C_MAGIC):
        raise UserError(f"{path}: a version {raw[4]} file of llama2.c, only the legacy layout is read")
    header = struct.unpack("<7i", raw[:28].ljust(28, b"\0"))
    sizes = dict(zip(LLAMA2C_HEADER, header, strict=True))
    tied, sizes["vocab_size"] = sizes["vocab_size"] > 0, abs(sizes["vocab_size"])
    try:
        if min(sizes.values()) < 1 or max(header) > 2**24 or sizes["n_layers"] > 1024:
            raise ValueError("out of range")
        config = ModelConfig(**sizes, tied=tied)
    except ValueError as error:
        raise UserError(f"{path}: not a legacy .bin file of llama2.c, its header says {sizes}: {error}") from None
    shapes = shapes_of(config)
    names = [*llama2c_names(config), "rope_cos", "rope_sin", *([] if tied else ["output.weight"])]
    shapes |= dict.fromkeys(("rope_cos", "rope_sin"), (config.max_seq_len, config.head_dim // 2))
    needed = 28 + 4 * sum(math.prod(shapes[name]) for name in names)
    if len(raw) != needed:
        raise UserError(f"{path}: {len(raw):,} bytes, its header {sizes} asks for {needed:,}")
    weights, at = {}, 28
    for name in names:
        values = np.frombuffer(raw, "<f4", math.prod(shapes[name]), at)
        weights[name], at = torch.from_numpy(values.reshape(shapes[name]).copy()), at + values.nbytes
    weights = {name: weight for name, weight in weights.items() if not name.startswith("rope")}
    return imported(path, config, weights, tok, (tok.bos_id, tok.bos_id), {})


# both ways


def shapes_of(config):
    """{name: shape} of the model's weights, without making them."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Llama(config).state_dict().items()}


def imported(path, config, weights, tok, document_ids, facts):
    """A Checkpoint of what was read from `path`; `facts` are ours if it carried them, else it is a pretrained model."""
    if config.vocab_size < tok.n_pieces:
        raise UserError(f"{path}: vocab_size is {config.vocab_size}, its tokenizer has {tok.n_pieces} pieces")
    history = dict(stage="pretrain", step=0, tokens_seen=0, config={}, parent=None, git_commit=None)
    history |= {key: facts[key] for key in history if key in facts}
    contents = dict(model_config=asdict(config), weights=weights, tokenizer=tok.model_bytes)
    return Checkpoint(path, **history, **contents, document_ids=list(document_ids), quant=None, training=None)


def check_weights(ckpt, dtype):
    """Refuse what the type cannot hold; the scales of q8_0 and q4_0 are float16."""
    largest = torch.finfo(torch.float16 if dtype in ("float16", "q8_0", "q4_0") else torch.float32).max
    for name, weight in ckpt.weights.items():
        if not (most := weight.abs().max()) <= largest:  # nor is NaN
            raise UserError(f"{ckpt.path}: {name} holds {most:g}, {dtype} ends at {largest:g}")


def check_config(config):
    """ConfigError unless the keys ask for one thing that can be done."""
    asked = [key for key in ("format", "import_hf", "import_llama2c") if config[key] is not None]
    if len(asked) != 1:
        raise ConfigError(f"give one of --format, --import_hf, --import_llama2c (got {' and '.join(asked) or 'none'})")
    if config["out"] is None:
        raise ConfigError("--out: a folder to write is needed")
    if asked == ["format"]:
        dtypes = DTYPES.get(config["format"])
        if dtypes is None:
            raise ConfigError(f"format={config['format']}: {', '.join(DTYPES)} are known")
        if config["dtype"] not in dtypes:
            raise ConfigError(f"dtype={config['dtype']}: {config['format']} has {', '.join(dtypes)}")
    if asked == ["import_llama2c"] and config["tokenizer"] is None:
        raise ConfigError("--import_llama2c needs the --tokenizer=tokenizer.model that the model was trained with")


def write_format(config, out):
    """--format: the checkpoint as files of another program. Returns what the user should know of them."""
    ckpt = checkpoint.load(config["ckpt"])
    options = {}
    if config["format"] != "hf":
        checkpoint.refuse_quantized(ckpt)
    elif ckpt.quant is not None:
        model = checkpoint.build_model(ckpt)
        ckpt, options = replace(ckpt, weights=compressed.dequantized(model)), dict(packable=compressed.packable(model))
    if ckpt.model_config["scalar_head"] and config["format"] != "hf":
        raise UserError(f"{ckpt.path} is a reward model, which {config['format']} cannot hold: --format=hf can")
    check_weights(ckpt, config["dtype"])
    write = dict(hf=export_hf, gguf=export_gguf, llama2c=export_llama2c)[config["format"]]
    with new_folder(out, FILES, config["overwrite"]) as folder:
        return write(ckpt, checkpoint.tokenizer_of(ckpt), folder, config["dtype"], **options)


def write_run(config, out):
    """--import_hf and --import_llama2c: a run directory with a checkpoint."""
    read, source = (
        (import_hf, config["import_hf"]) if config["import_hf"] else (import_llama2c, config["import_llama2c"])
    )
    ckpt = read(Path(source), config["tokenizer"])
    model = checkpoint.build_model(ckpt)
    history = {
        key: getattr(ckpt, key) for key in ("stage", "step", "tokens_seen", "tokenizer", "document_ids", "parent")
    }
    with new_folder(out, FILES, config["overwrite"]) as folder:
        checkpoint.save(folder, model=model, config=ckpt.config or config, **history)
        save_config(config, folder)
    return [f"it {'continues documents' if checkpoint.continues(ckpt) else 'answers questions'} (stage {ckpt.stage})"]


def main(argv=None):
    config = parse_config("export", argv, __doc__)
    config["dtype"] = ALIASES.get(config["dtype"].lower(), config["dtype"].lower())
    check_config(config)
    out = Path(config["out"])
    for note in write_format(config, out) if config["format"] else write_run(config, out):
        print(f"note: {note}")
    for path in sorted(out.iterdir()):
        print(f"wrote {path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    run(main)
