"""llama2.c's .bin files: the legacy layout in float32, both ways, and version 2 in int8 for runq."""

import math
import struct

import numpy as np
import torch

from common.config import UserError
from interop import vocabulary
from interop.exchange import NAMES, check_finite, imported, shapes_of
from model import ModelConfig
from tokenizer import Tokenizer

MAGIC = 0x616B3432  # "ak42": a file of version 1 or later
HEADER = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
LAYER = [ours.removeprefix("layers.{}.") for ours, _, _ in NAMES if ours.startswith("layers.")]


def tensor_names(config):
    """Our names of the tensors before the rotary tables, in the order of a legacy .bin file."""
    layers = [f"layers.{i}.{part}.weight" for part in LAYER for i in range(config.n_layers)]
    return ["tok_embeddings.weight", *layers, "norm.weight"]


def rope_tables(config):
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
    weights = {name: ckpt.weights[name].numpy() for name in tensor_names(config)}
    head = [] if config.tied else [ckpt.weights["output.weight"].numpy()]
    sizes = {key: getattr(config, key) for key in HEADER}
    with open(folder / "model.bin", "wb") as file:
        if dtype == "float32":
            # the sign of vocab_size says whether the output projection is the embedding
            sizes["vocab_size"] *= 1 if config.tied else -1
            file.write(struct.pack("<7i", *sizes.values()))
            rope = [table.numpy() for table in rope_tables(config)]
            file.writelines(array.astype("<f4").tobytes() for array in [*weights.values(), *rope, *head])
        else:
            group = math.gcd(64, config.dim, config.hidden_dim)  # runq cuts activations into the same groups
            header = struct.pack("<I8iBi", MAGIC, 2, *sizes.values(), config.tied, group)
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
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: no regular file")
    tok, raw = Tokenizer.load(tokenizer_path), path.read_bytes()
    if raw[:4] == struct.pack("<I", MAGIC):
        raise UserError(f"{path}: a version {raw[4]} file of llama2.c, only the legacy layout is read")
    header = struct.unpack("<7i", raw[:28].ljust(28, b"\0"))
    sizes = dict(zip(HEADER, header, strict=True))
    tied, sizes["vocab_size"] = sizes["vocab_size"] > 0, abs(sizes["vocab_size"])
    try:
        if min(sizes.values()) < 1 or max(header) > 2**24 or sizes["n_layers"] > 1024:
            raise ValueError("out of range")
        config = ModelConfig(**sizes, tied=tied)
    except ValueError as error:
        raise UserError(f"{path}: not a legacy .bin file of llama2.c, its header says {sizes}: {error}") from None
    shapes = shapes_of(config)
    names = [*tensor_names(config), "rope_cos", "rope_sin", *([] if tied else ["output.weight"])]
    shapes |= dict.fromkeys(("rope_cos", "rope_sin"), (config.max_seq_len, config.head_dim // 2))
    needed = 28 + 4 * sum(math.prod(shapes[name]) for name in names)
    if len(raw) != needed:
        raise UserError(f"{path}: {len(raw):,} bytes, its header {sizes} asks for {needed:,}")
    weights, at = {}, 28
    for name in names:
        values = np.frombuffer(raw, "<f4", math.prod(shapes[name]), at)
        weights[name], at = torch.from_numpy(values.reshape(shapes[name]).copy()), at + values.nbytes
    weights = {name: weight for name, weight in weights.items() if not name.startswith("rope")}
    check_finite(path, weights)
    return imported(path, config, weights, tok, (tok.bos_id, tok.bos_id), {})
