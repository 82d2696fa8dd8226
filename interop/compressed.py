"""The quantized layers of a model as compressed-tensors packs them (`pack-quantized`), for transformers and vLLM.

Its codes are ours: int4 has the nibbles of lowbit/layers.py, int8 those numbers plus 128, each 32 bits of a row's codes
one int32, the first code lowest. Zero points are packed the same way, but down the rows. A file packs the linear layers
of the blocks, of one width. The embedding and the output projection stay unpacked: vLLM's source has no packed
embedding, and transformers 5.23 loads one only where `dequantize` is set and all layers are of its width.
"""

import math

import torch
import torch.nn.functional as F

from common.config import UserError
from lowbit.layers import Int4Weight, LowBitWeight, pack_nibbles, unpack_nibbles

SMALLEST_GROUP = 32  # of vLLM's kernels


def packable(model):
    """{name: layer} of the linear layers in the blocks that have the fewest bits: a file holds one width."""
    layers = {
        name: layer for name, layer in model.layers.named_modules(prefix="layers") if isinstance(layer, LowBitWeight)
    }
    width = Int4Weight if any(isinstance(layer, Int4Weight) for layer in layers.values()) else LowBitWeight
    return {name: layer for name, layer in layers.items() if isinstance(layer, width)}


def weight_args(layers, path):
    """What config.json says of the packed weights; `path` is the checkpoint that they are from.

    Groups are cut into smaller ones until they divide every row, as compressed-tensors has no padding.
    """
    first = next(iter(layers.values()))
    if not isinstance(first, Int4Weight):
        return dict(num_bits=8, type="int", symmetric=True, strategy="channel", dynamic=False)
    group = first.group_size
    for name, layer in layers.items():
        group = math.gcd(group, layer.n_columns)
        if group < SMALLEST_GROUP:
            raise UserError(
                f"{path}: {name} has {layer.n_columns} columns, no multiple of {SMALLEST_GROUP}: compressed-tensors "
                "needs whole groups, export an int8 or a float32 checkpoint"
            )
    symmetric = "zero" not in first.state_dict()
    return dict(num_bits=4, type="int", symmetric=symmetric, strategy="group", group_size=group, dynamic=False)


def quantization_config(args, ignore):
    """The entry of config.json; `ignore` names the linear layers that are not packed."""
    groups = dict(group_0=dict(targets=["Linear"], weights=args))
    config = dict(quant_method="compressed-tensors", format="pack-quantized", quantization_status="compressed")
    config |= dict(config_groups=groups, ignore=ignore)
    if not args["symmetric"]:
        # compressed-tensors 0.19 and 0.20 expect unpacked zero points unless transformers dequantizes while it loads
        config["dequantize"] = True
    return config


def to_words(codes, bits):
    """codes (N, K) uint8, below 2^bits -> (N, ceil(K * bits / 32)) int32."""
    codes = F.pad(codes, (0, -codes.size(1) % (32 // bits)))
    words = (pack_nibbles(codes) if bits == 4 else codes).flatten().view(torch.int32)
    return words.view(len(codes), -1)


def pack(layer, args, order, dtype):
    """The tensors of a layer by the ending of their names; `order` puts rows (N, ...) into another order."""
    bits, shape = args["num_bits"], (layer.n_rows, layer.n_columns)
    if bits == 8:
        codes, scale = layer.q.view(torch.uint8) ^ 128, layer.scale[:, None]
    else:
        codes, scale = unpack_nibbles(layer.q)[:, : layer.n_columns], split(layer.scale, layer, args)
    tensors = dict(weight_packed=to_words(order(codes), bits), weight_scale=order(scale).to(dtype).contiguous())
    if not args["symmetric"]:
        zero = order(split(layer.zero, layer, args))
        tensors["weight_zero_point"] = to_words(zero.T, bits).T.contiguous()
    return tensors | dict(weight_shape=torch.tensor(shape))


def split(values, layer, args):
    """values (N, groups), each repeated for the smaller groups that its own was cut into, those of padding left out."""
    smaller = args["group_size"]
    return values.repeat_interleave(layer.group_size // smaller, 1)[:, : layer.n_columns // smaller]


def dequantized(model):
    """{name: float32 tensor} as a model that is not quantized would have them."""
    low = {name: layer for name, layer in model.named_modules() if isinstance(layer, LowBitWeight)}
    others = {name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[0] not in low}
    return others | {f"{name}.weight": layer.weight for name, layer in low.items()}
