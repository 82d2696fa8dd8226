"""Hugging Face folders: what transformers' from_pretrained reads, and what a folder of Llama weights becomes here.

wq and wk need their rows in another order, as transformers rotates the halves of a head and Meta neighbouring pairs.
"""

import json
from functools import partial

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common import checkpoint
from common.config import UserError
from common.files import read_json, write_json
from configs.eval_generate import config as chat_defaults
from interop import compressed, vocabulary
from interop.exchange import FACTS, SAMPLING, imported, renamed, shapes_of, text_ids
from interop.provenance import model_card, provenance
from model import ModelConfig
from tokenizer import MODEL_FILE, Tokenizer

# our sizes, as Hugging Face's config.json calls them
KEYS = dict(
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
FIXED = dict(model_type="llama", hidden_act="silu", attention_bias=False, mlp_bias=False, rope_scaling=None)


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


def config_json(ckpt, tok, dtype):
    """config.json for transformers 4 (rope_theta, torch_dtype) and 5 (rope_parameters, dtype)."""
    config, (bos, eos) = ModelConfig(**ckpt.model_config), text_ids(ckpt, tok)
    kind = "LlamaForSequenceClassification" if config.scalar_head else "LlamaForCausalLM"
    values = dict(architectures=[kind]) | FIXED | {theirs: getattr(config, ours) for ours, theirs in KEYS.items()}
    values |= dict(head_dim=config.head_dim, attention_dropout=0.0, torch_dtype=dtype, dtype=dtype)
    rope = dict(rope_theta=config.rope_theta)
    values |= rope | dict(rope_parameters=rope | dict(rope_type="default"))
    if config.scalar_head:
        values |= dict(id2label={"0": "reward"}, label2id={"reward": 0})
    return values | dict(bos_token_id=bos, eos_token_id=eos, pad_token_id=tok.pad_id)


def packed_layers(ckpt, layers, dtype):
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
    config, base = config_json(ckpt, tok, dtype), checkpoint.continues(ckpt)
    weights, notes, precision = {}, [], dtype
    if packable:
        weights, config["quantization_config"], notes = packed_layers(ckpt, packable, dtype)
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


def read_config(path):
    """ModelConfig of a config.json; what is not Llama 2 is refused by its key."""
    values = dict(tie_word_embeddings=False) | FIXED | read_json(path)
    if values.get("quantization_config"):
        raise UserError(f"{path}: it has a quantization_config, only models with float weights are imported")
    values.setdefault("num_key_value_heads", values.get("num_attention_heads"))
    rope = values.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        values["rope_scaling"] = rope
    for key, needed in FIXED.items():
        if values[key] != needed:
            raise UserError(f"{path}: {key} is {values[key]}, Llama 2 has {needed}")
    missing = [key for key in KEYS.values() if values.get(key) is None]
    if missing:
        raise UserError(f"{path}: no {', '.join(missing)}")
    try:
        config = ModelConfig(
            **{ours: values[theirs] for ours, theirs in KEYS.items()},
            rope_theta=float(rope.get("rope_theta") or values.get("rope_theta") or 10000),
            scalar_head=values.get("architectures") == ["LlamaForSequenceClassification"],
        )
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path}: {error}") from None
    if values.get("head_dim") not in (None, config.head_dim):
        raise UserError(f"{path}: head_dim is {values['head_dim']}, Llama 2 has {config.head_dim} (dim / n_heads)")
    return config


def read_document_ids(folder):
    """What documents of a foreign base model open and close with, by its config.json and tokenizer_config.json."""
    config, path = read_json(folder / "config.json"), folder / "tokenizer_config.json"
    bos, eos = (config.get(f"{name}_token_id") for name in ("bos", "eos"))
    eos = eos[0] if isinstance(eos, list) else Tokenizer.eos_id if eos is None else eos
    adds_bos = read_json(path).get("add_bos_token", True) if path.exists() else True
    return (Tokenizer.bos_id if bos is None else bos) if adds_bos else eos, eos


def import_hf(folder, tokenizer_path):
    """A Checkpoint from a Hugging Face folder; one that we exported is what it was, another continues documents."""
    config = read_config(folder / "config.json")
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
    ids = facts.get("document_ids") or read_document_ids(folder)
    return imported(folder, config, weights, Tokenizer.load(tokenizer_path or folder), ids, facts)
