"""Hugging Face folders: what transformers' from_pretrained reads, and what a folder of Llama weights becomes here.

wq and wk need their rows in another order, as transformers rotates the halves of a head and Meta neighbouring pairs.
"""

import json
import re
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common import checkpoint
from common.archive import Archive, ArchiveError
from common.config import UserError
from common.files import read_json, write_json
from common.ranges import fault
from configs.eval_generate import config as chat_defaults
from interop import compressed, vocabulary
from interop.exchange import FACTS, SAMPLING, check_finite, imported, read_facts, renamed, shapes_of, text_ids
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
SIZES = [theirs for ours, theirs in KEYS.items() if ours not in ("norm_eps", "tied")]
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
ROTARY_TABLE = re.compile(r"rotary_emb\.(?:inv_freq|cos_cached|sin_cached)$")
BEFORE_ZIP = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save began until 1.6: a pickled number
# of generation_config.json, where they mean nothing
UNKNOWN = dict(typical_p=1, num_beams=1, no_repeat_ngram_size=0, encoder_repetition_penalty=1)
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
    try:
        save_file(weights, folder / WEIGHTS[0], {"format": "pt", FACTS: json.dumps(provenance(ckpt))})
        sort_metadata(folder / WEIGHTS[0])
    except SafetensorError as error:  # of a full disk
        raise OSError(str(error)) from None
    write_json(folder / "config.json", config)
    (folder / WEIGHTS[0]).chmod((folder / "config.json").stat().st_mode)  # the library's file is for its owner alone
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


def sort_metadata(path):
    """Put the metadata of a safetensors file in the order of its names; the library's, a HashMap's, changes each time.

    https://huggingface.co/docs/safetensors/index: 8 bytes with the size of the header, JSON padded by spaces, then it.
    """
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(size))


def weight_files(folder):
    """The files with the weights of a folder, one or the shards that an index names."""
    for name in WEIGHTS:
        if (folder / name).exists():  # as transformers, which then reads no index
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.exists():
            names = read_json(index).get("weight_map")
            names = list(names.values()) if isinstance(names, dict) else []
            if not names or not all(isinstance(each, str) and Path(each).name == each for each in names):
                raise UserError(f"{index}: its weight_map names no files of this folder")
            return [folder / each for each in sorted(set(names))]
    raise UserError(f"{folder / WEIGHTS[0]}: no such file, nor {', '.join(WEIGHTS[1:])} or an index of shards")


def read_weights(folder):
    """(float32 tensors by name, metadata) of all files with weights; what is no finite number is refused."""
    tensors, metadata = {}, {}
    for path in weight_files(folder):
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        found, said = (read_safetensors if path.suffix == ".safetensors" else read_bin)(path)
        check_finite(path, found)
        if twice := sorted(tensors.keys() & found.keys()):
            raise UserError(f"{path}: {twice[0]} is in another file of weights too")
        tensors |= {name: tensor.float() for name, tensor in found.items()}
        metadata |= said
    return tensors, metadata


def read_safetensors(path):
    """(tensors by name, metadata) of one file."""
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cut short or not safetensors: {error}") from None


def read_bin(path):
    """The same of a file of torch.save, of which no code runs."""
    try:
        with open(path, "rb") as file:
            archive = Archive(file)
            tensors = archive.fill(archive.content)
            archive.check_rest()
    except ArchiveError as error:
        with open(path, "rb") as file:
            old = file.read(len(BEFORE_ZIP)) == BEFORE_ZIP
        said = (
            "of torch before 1.6: load it there, or in a torch you trust it with, and save it again" if old else error
        )
        raise UserError(f"{path}: {said}") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise UserError(f"{path}: not a dict of tensors by name")
    return {str(name): tensor for name, tensor in tensors.items()}, {}


def without_rotary_tables(tensors, config, path):
    """The tensors without the tables of angles that old versions of transformers saved, if those are rope_theta's."""
    angles = config.rope_theta ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
    for name, tensor in tensors.items():
        if name.endswith("rotary_emb.inv_freq"):
            # in 16 bits the smallest are off by a hundredth
            if tensor.shape != angles.shape or not torch.allclose(tensor, angles, rtol=0.02, atol=1e-6):
                raise UserError(f"{path}: {name} is not what rope_theta={config.rope_theta:g} gives: other rotations")
    return {name: tensor for name, tensor in tensors.items() if not ROTARY_TABLE.search(name)}


def read_config(path):
    """ModelConfig of a config.json; what is not Llama 2 is refused by its key."""
    values = dict(tie_word_embeddings=False) | FIXED | read_json(path)
    if values.get("quantization_config"):
        raise UserError(f"{path}: it has a quantization_config, only models with float weights are imported")
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = values.get("num_attention_heads")
    rope = values.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_parameters is {rope!a:.40}, no object")
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        values["rope_scaling"] = rope
    values["partial_rotary_factor"] = rope.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1
    for key, needed in (FIXED | dict(partial_rotary_factor=1)).items():
        if values[key] != needed:
            raise UserError(f"{path}: {key} is {values[key]}, Llama 2 has {needed}")
    thetas = [each["rope_theta"] for each in (rope, values) if each.get("rope_theta") is not None] or [10000.0]
    if thetas[0] != thetas[-1]:
        raise UserError(f"{path}: rope_theta is {thetas[-1]!a:.40}, in rope_parameters {thetas[0]!a:.40}")
    values["rope_theta"] = thetas[0]
    missing = [key for key in KEYS.values() if values.get(key) is None]
    if missing:
        raise UserError(f"{path}: no {', '.join(missing)}")
    for key in SIZES:
        if type(values[key]) is not int or not 0 < values[key] < 1 << 31:
            raise UserError(f"{path}: {key} is {values[key]!a:.40}, no size")
    for key, kinds in (("rope_theta", (int, float)), ("rms_norm_eps", (int, float)), ("tie_word_embeddings", (bool,))):
        if type(values[key]) not in kinds:
            raise UserError(f"{path}: {key} is {values[key]!a:.40}, no {kinds[-1].__name__}")
    try:
        config = ModelConfig(
            **{ours: values[theirs] for ours, theirs in KEYS.items()} | dict(norm_eps=float(values["rms_norm_eps"])),
            rope_theta=float(values["rope_theta"]),
            scalar_head=values.get("architectures") == ["LlamaForSequenceClassification"],
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: {error}") from None
    if values.get("head_dim") not in (None, config.head_dim):
        raise UserError(f"{path}: head_dim is {values['head_dim']}, Llama 2 has {config.head_dim} (dim / n_heads)")
    return config


def read_document_ids(folder, vocab_size):
    """((what documents of a foreign base model open and close with), notes), by its three JSON files."""
    files = {name: folder / f"{name}.json" for name in ("config", "generation_config", "tokenizer_config")}
    config, generation, tokenizer = (read_json(path) if path.exists() else {} for path in files.values())
    bos = token_ids(config, "bos_token_id", vocab_size, files["config"]) or [Tokenizer.bos_id]
    ends = token_ids(config, "eos_token_id", vocab_size, files["config"])
    ends += token_ids(generation, "eos_token_id", vocab_size, files["generation_config"])
    ends = list(dict.fromkeys(ends)) or [Tokenizer.eos_id]
    end = Tokenizer.eos_id if Tokenizer.eos_id in ends else ends[0]
    notes = [f"of its eos ids {', '.join(map(str, ends))} only {end} ends a text here"] if len(ends) > 1 else []
    return (bos[0] if tokenizer.get("add_bos_token", True) else end, end), notes


def token_ids(values, key, vocab_size, path):
    """The ids under a key that may be absent, one, or a list."""
    found = values.get(key)
    found = [] if found is None else found if isinstance(found, list) else [found]
    for each in found:
        if type(each) is not int or not 0 <= each < vocab_size:
            raise UserError(f"{path}: {key} is {each!a}, its vocabulary has 0 to {vocab_size - 1}")
    return found


def sampling_notes(path):
    """What of a generation_config.json this project does not keep, as its sampling is asked for with every command."""
    theirs = read_json(path) if path.exists() else {}
    usual = SAMPLING | dict(min_p=0, repetition_penalty=1.0)
    asked = {key: theirs[key] for key in usual | UNKNOWN if theirs.get(key) not in (None, (usual | UNKNOWN)[key])}
    if theirs.get("do_sample") is False:
        asked = {key: value for key, value in asked.items() if key not in SAMPLING} | dict(temperature=0)
    odd = {key for key, value in asked.items() if key in UNKNOWN or not is_allowed(key, value)}
    options, others = (
        " ".join(f"--{key}={value!a:.20}" for key, value in asked.items() if (key in odd) == left) for left in (0, 1)
    )
    notes = [f"{path.name} is not kept: sample as it asks with eval_generate.py {options}"] if options else []
    return notes + ([f"{path.name} asks for {others}, which eval_generate.py does not have"] if others else [])


def read_template(folder):
    """The chat template of a folder, a key or, in transformers 5, a file; None where it has none."""
    path = folder / "tokenizer_config.json"
    found = (read_json(path) if path.exists() else {}).get("chat_template")
    for path in folder.glob("chat_template.*"):
        found = path.read_text(encoding="utf-8", errors="replace")
    return found


def template_notes(folder):
    """That a chat template of others is not kept, where a folder has one."""
    if read_template(folder) in (None, vocabulary.CHAT_TEMPLATE):
        return []
    return ["its chat template is not kept: here a conversation is `question <bos> answer <eos>`, whatever it learnt"]


def is_allowed(key, value):
    """Whether eval_generate.py takes a value of that key."""
    return type(value) in (int, float) and fault("eval_generate", key, value) is None


def import_hf(folder, tokenizer_path):
    """(Checkpoint of a Hugging Face folder, what is to be said of it).

    One that we exported is what it was. Of another, such as ours that was trained on elsewhere, a scalar head makes a
    reward model and our chat template one that answers; any other continues documents.
    """
    config = read_config(folder / "config.json")
    tensors, metadata = read_weights(folder)
    tensors = without_rotary_tables(tensors, config, folder)
    try:
        checkpoint.check_size(config, tensors)  # before so many names and shapes are made
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None
    if config.tied and (head := tensors.pop("lm_head.weight", None)) is not None:  # some write the shared tensor twice
        embedding = tensors.setdefault("model.embed_tokens.weight", head)  # or by this name alone
        if embedding.shape != head.shape or not torch.equal(embedding.float(), head.float()):
            found = "tie_word_embeddings is true, but lm_head.weight is not model.embed_tokens.weight"
            raise UserError(f"{folder}: {found}: set it to false to keep both, or take one of them out")
    ours = {renamed(name, 1): (name, shape) for name, shape in shapes_of(config).items()}
    weights = {}
    for name, weight in tensors.items():
        name, shape = ours.get(name, (name, None))
        right = weight.shape == shape  # what does not fit, the checkpoint refuses by name
        weights[name] = reorder(name, weight, config, halves_to_pairs) if right else weight
    facts = read_facts(folder, metadata.get(FACTS, "{}"), config.vocab_size)
    ids, notes = read_document_ids(folder, config.vocab_size)
    ids = facts.get("document_ids", ids)
    answers = read_template(folder) == vocabulary.CHAT_TEMPLATE
    if "stage" not in facts and (config.scalar_head or answers):
        facts["stage"] = "rm" if config.scalar_head else "sft"
        notes.append(f"no history of ours is in it: by its {'head' if config.scalar_head else 'chat template'}")
    notes += sampling_notes(folder / "generation_config.json") + template_notes(folder)
    return imported(folder, config, weights, Tokenizer.load(tokenizer_path or folder), ids, facts), notes
