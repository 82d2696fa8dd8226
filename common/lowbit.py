"""The layers of a quantized model: weights stay int8 in memory, the number of rows chooses the arithmetic.

Each output channel n holds q[n] in -127..127 and one bfloat16 scale: w[n] ~ scale[n] * q[n]. A few rows (decoding)
go through torch's int8 kernel, which reads a quarter of the bytes; many rows (prefill, evaluation) are multiplied
in float32, where int8 has no speed to offer and rounding the activations would cost accuracy.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

# Above this the conversion to float32 is paid back by the faster product (2 AVX2 cores, dim 160 to 512).
KERNEL_ROWS = 32
# The kernel loads 16 values at a time, past the end of other rows: wrong numbers or a crash (torch 2.13).
KERNEL_ALIGNMENT = 16
# Without vector instructions the kernel is 8 to 40 times slower than float32.
HAS_KERNEL = hasattr(torch, "_weight_int8pack_mm") and torch.backends.cpu.get_cpu_capability().startswith("AVX")


def linear_float32(x, q, scale):
    """x (..., K), q (N, K) int8, scale (N,) -> (..., N): exact weights, on any device."""
    return (F.linear(x.float(), q.float()) * scale.float()).to(x.dtype)


def linear_kernel(x, q, scale):
    """The same with activations and result rounded to bfloat16 (relative error about 0.3 %), on a CPU."""
    rows = x.reshape(-1, x.size(-1)).to(torch.bfloat16)  # (M, K)
    return torch._weight_int8pack_mm(rows, q, scale).view(*x.shape[:-1], -1).to(x.dtype)


def use_kernel(x, q):
    """Whether the int8 kernel can do this product, and faster."""
    rows = x.numel() // x.size(-1)
    return (
        HAS_KERNEL
        and q.device.type == "cpu"
        and 0 < rows <= KERNEL_ROWS
        and q.size(1) % KERNEL_ALIGNMENT == 0
        and not x.requires_grad  # the kernel has no derivative
    )


class Int8Weight(nn.Module):
    """A weight (N, K) as q int8 and a scale for each of its N rows."""

    def __init__(self, n_rows, n_columns):
        super().__init__()
        self.register_buffer("q", torch.zeros(n_rows, n_columns, dtype=torch.int8))
        # bfloat16 is what the kernel takes; the scale is rounded before q is computed, so this loses nothing
        self.register_buffer("scale", torch.ones(n_rows, dtype=torch.bfloat16))

    @property
    def weight(self):
        """The float32 weight that q and scale stand for, made anew at each access."""
        return self.q.float() * self.scale.float()[:, None]

    def linear(self, x):
        multiply = linear_kernel if use_kernel(x, self.q) else linear_float32
        return multiply(x, self.q, self.scale)


class Int8Linear(Int8Weight):
    def forward(self, x):
        return self.linear(x)


class Int8Embedding(Int8Weight):
    """Looks up rows; as the tied output projection, `linear` multiplies by the same table."""

    def forward(self, ids):
        return self.q[ids].float() * self.scale[ids].float()[..., None]


def build(model, quant):
    """Replace, in place, the layers that the quantization spec of a checkpoint names; it then loads strictly."""
    if quant.get("method") != "int8":
        raise ValueError(f"quantization method {quant.get('method')}: this code reads int8")
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(*child.weight.shape))
            elif isinstance(child, nn.Embedding):
                setattr(module, name, Int8Embedding(*child.weight.shape))
    return model
