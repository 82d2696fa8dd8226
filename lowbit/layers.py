"""The layers of a quantized model: weights stay int8 or int4 in memory, the number of rows chooses the arithmetic.

int8: output channel n holds q[n] in -127..127 and one bfloat16 scale: w[n] ~ scale[n] * q[n].
int4: each group of `group_size` columns of a channel holds q in 0..15, two to a byte, one bfloat16 scale and one zero:
w ~ scale * (q - zero), as GPTQ's files have it (arXiv:2210.17323); symmetric layers have zero 8 and do not store it.
A few rows (decoding) go through torch's kernels, which read a quarter or an eighth of the bytes, or on a GPU that has
slow ones or none through a bfloat16 copy of the weight, for 2 bytes a number more; many rows (prefill, evaluation) are
multiplied in float32, where few bits have no speed to offer and rounding activations costs accuracy.
"""

from fnmatch import fnmatchcase

import torch
import torch.nn as nn
import torch.nn.functional as F

# Above this the conversion to float32 is paid back by the faster product. Measured on one core, 288 to 1024 columns:
# from 8 to 40 rows in int8, from 32 (AVX2) to 96 (AVX-512) in int4, whose conversion is the dearer one.
KERNEL_ROWS = 32
# The int8 kernel loads 16 values at a time, past the end of other rows: wrong numbers or a crash (torch 2.13).
KERNEL_ALIGNMENT = 16
# Without vector instructions the kernels are 4 to 40 times slower than float32.
HAS_KERNEL = torch.backends.cpu.get_cpu_capability().startswith("AVX")
# Rows of a weight that are float32 at the same time: they stay in the cache, a whole vocabulary of them does not.
PIECE_ROWS = 4096
# The sizes that torch's kernels know, but 256; a multiple of the smallest can be computed as several of it.
GROUP_SIZES = (32, 64, 128)
# Which of make_kernel and make_dense is faster for a weight of some kind, shape and device; None for neither.
FASTEST = {}
SPEC_KEYS = {"int8": {"method"}, "int4": {"method", "group_size", "symmetric", "algorithm", "int8"}}


def round_up(n, multiple):
    return -(-n // multiple) * multiple


def pack_nibbles(q):
    """q (N, Kp) uint8 in 0..15 -> (N, Kp/2) uint8: column 2i in the low half of byte i, 2i + 1 in the high half."""
    return q[:, ::2] | (q[:, 1::2] << 4)


def unpack_nibbles(packed):
    """The inverse: (N, Kp/2) uint8 -> (N, Kp) uint8."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def linear_kernel(x, *weight, multiply=torch._weight_int8pack_mm):
    """x (..., K) and a weight as `multiply` takes it -> (..., N).

    Activations and result are rounded to bfloat16 (relative error about 0.3 %).
    """
    rows = x.reshape(-1, x.size(-1)).contiguous()  # (M, K)
    if x.dtype == torch.bfloat16:
        y = multiply(rows, *weight)
    else:
        y = multiply(rows.bfloat16(), *weight)
        y = y.float() if x.dtype == torch.float32 else y.to(x.dtype)  # float() takes a microsecond less than to()
    return y.view(*x.shape[:-1], -1)


def cuda_seconds(kernel, x, repeats=10):
    """The median time that CUDA takes for kernel(x), the weight not in its cache, as it is not from token to token."""
    flush = torch.empty(2**27, dtype=torch.uint8, device=x.device)  # more bytes than a GPU's cache holds
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    with torch.cuda.device(x.device):
        for _ in range(repeats):
            flush.zero_()  # takes longer than to launch what follows, which so is not measured
            start.record()
            kernel(x)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000)
    return sorted(times)[repeats // 2]


def use_kernel(x, q):
    """Whether torch's kernel can multiply x (..., K) by q, and faster. An int4 q (N, Kp/2) is always aligned."""
    return (
        0 < x.numel() <= KERNEL_ROWS * x.size(-1)
        and not x.requires_grad  # the kernel has no derivative
        and (HAS_KERNEL if q.is_cpu else q.is_cuda)
        and q.size(1) % KERNEL_ALIGNMENT == 0
    )


class LowBitWeight(nn.Module):
    """A weight (N, K) in a few bits: buffers `q` and `scale`, and what a storage makes of them.

    rows(ids): the float32 rows of those numbers (or of a slice)
    piece(x, part): x (..., K) times the rows of a slice, in float32
    make_kernel(): a function of few x, times all rows: faster on a CPU, and rounded to bfloat16
    """

    def __init__(self, n_rows, n_columns):
        super().__init__()
        self.n_rows, self.n_columns = n_rows, n_columns
        self.made = None  # the kernel and what it was made of

    @property
    def weight(self):
        """The float32 weight that the buffers stand for, made anew at each access."""
        return self.rows(slice(None))

    def linear(self, x):
        """x (..., K) -> (..., N), of x's dtype."""
        if use_kernel(x, self._buffers["q"]) and (kernel := self.kernel()):
            return kernel(x)
        return self.linear_float32(x)

    def linear_float32(self, x):
        """The same with exact weights, on any device."""
        y = x.new_empty(*x.shape[:-1], self.n_rows)
        for start in range(0, self.n_rows, PIECE_ROWS):
            part = slice(start, start + PIECE_ROWS)
            y[..., part] = self.piece(x, part)
        return y

    def kernel(self):
        """make_kernel's, made at first use and again after a buffer was replaced or written to; or None."""
        state = [(id(b), 0 if b.is_inference() else b._version) for b in self._buffers.values()]
        if self.made is None or self.made[0] != state:
            kernel = self.make_kernel() if self.q.is_cpu else self.fastest_kernel(cuda_seconds)
            self.made = state, kernel, list(self._buffers.values())  # an id is theirs as long as they are held
        return self.made[1]

    def make_dense(self):
        """As make_kernel, of the weight in bfloat16, two bytes a number more: what many GPUs multiply faster."""
        weight = self.weight.bfloat16()
        return lambda x: linear_kernel(x, weight, multiply=F.linear)

    def agrees(self, kernel):
        """Whether a kernel computes what float32 does. No GPU was at hand to test torch's of CUDA."""
        x = torch.linspace(0, 1, self.n_columns, device=self.q.device)
        exact = self.linear_float32(x)
        return bool((kernel(x) - exact).norm() <= 0.02 * exact.norm())

    def fastest_kernel(self, seconds):
        """Of make_kernel's and make_dense's the one that agrees with float32 and takes less seconds(kernel, x), for
        one row and for KERNEL_ROWS together; or None. Weights of one kind and shape on a device choose once."""
        key = self.q.dtype, self.n_rows, self.n_columns, self.scale.shape, self.q.device
        if key not in FASTEST:
            times = {}
            for make in ("make_kernel", "make_dense"):
                try:
                    kernel = getattr(self, make)()
                    if self.agrees(kernel):
                        few = [torch.ones(n, self.n_columns, device=self.q.device) for n in (1, KERNEL_ROWS)]
                        times[make] = sum(seconds(kernel, x) for x in few)
                except RuntimeError:  # this GPU has none, or none for this shape, or no memory for it
                    continue
            FASTEST[key] = min(times, key=times.get, default=None)
        return FASTEST[key] and getattr(self, FASTEST[key])()

    def _apply(self, fn, recurse=True):
        """Moves to other devices. A change of the model's dtype is meant for activations: the scale keeps its own."""
        scale, self.made = self.scale, None
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        return self

    def __getstate__(self):
        return self.__dict__ | {"made": None}  # a copy or a pickle makes its own


class Int8Weight(LowBitWeight):
    """A weight (N, K) as q int8 and a scale for each of its N rows."""

    def __init__(self, n_rows, n_columns):
        super().__init__(n_rows, n_columns)
        self.register_buffer("q", torch.zeros(n_rows, n_columns, dtype=torch.int8))
        # bfloat16 is what the kernel takes; the scale is rounded before q is computed, so this loses nothing
        self.register_buffer("scale", torch.ones(n_rows, dtype=torch.bfloat16))

    def rows(self, ids):
        return self.q[ids].float() * self.scale[ids].float()[..., None]

    def piece(self, x, part):
        return F.linear(x.float(), self.q[part].float()) * self.scale[part].float()

    def make_kernel(self):
        q, scale = self.q, self.scale
        return lambda x: linear_kernel(x, q, scale)


class Int4Weight(LowBitWeight):
    """A weight (N, K) as nibbles q, a scale and a zero for each group of columns; Kp is K padded to whole groups."""

    def __init__(self, n_rows, n_columns, group_size, symmetric):
        super().__init__(n_rows, n_columns)
        self.group_size = group_size
        n_groups = round_up(n_columns, group_size) // group_size
        self.register_buffer("q", torch.full((n_rows, n_groups * group_size // 2), 0x88, dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(n_rows, n_groups, dtype=torch.bfloat16))
        if not symmetric:
            self.register_buffer("zero", torch.full((n_rows, n_groups), 8, dtype=torch.uint8))

    def rows(self, ids):
        zero = self.zero[ids].float()[..., None] if "zero" in self._buffers else 8
        w = unpack_nibbles(self.q[ids]).float().unflatten(-1, (-1, self.group_size))  # (..., Kp/group, group)
        w = w.sub_(zero).mul_(self.scale[ids].float()[..., None])
        return w.flatten(-2)[..., : self.n_columns]

    def piece(self, x, part):
        return F.linear(x.float(), self.rows(part))

    def make_kernel(self):
        # whole groups need no columns beyond K; others are computed in groups of 32, so that at most 31 are padding
        group = self.group_size if self.n_columns % self.group_size == 0 else GROUP_SIZES[0]
        N, K = round_up(self.n_rows, 16), round_up(self.n_columns, group)
        n_rows, below, right = self.n_rows, N - self.n_rows, K - self.n_columns
        q = F.pad(unpack_nibbles(self.q)[:, :K], (0, 0, 0, below))
        if self.q.is_cpu:
            multiply = torch._weight_int4pack_mm_for_cpu
            packed = torch._convert_weight_to_int4pack_for_cpu(q.int(), 1)
        else:  # CUDA's packing takes bytes, column 2i in the high half
            multiply = torch._weight_int4pack_mm
            packed = torch._convert_weight_to_int4pack(q[:, ::2] << 4 | q[:, 1::2], 2)
        scale = self.scale.float()
        shift = scale * (8 - self.zero.float()) if "zero" in self._buffers else torch.zeros_like(scale)
        pairs = torch.stack((scale, shift), -1)  # the kernel's w = scale * (q - 8) + shift
        pairs = pairs.repeat_interleave(self.group_size // group, 1)[:, : K // group]
        pairs = F.pad(pairs, (0, 0, 0, 0, 0, below)).transpose(0, 1).bfloat16().contiguous()  # (K/group, N, 2)

        def kernel(x):
            y = linear_kernel(F.pad(x, (0, right)) if right else x, packed, group, pairs, multiply=multiply)
            return y[..., :n_rows].contiguous() if below else y

        return kernel


class Int8Linear(Int8Weight):
    forward = Int8Weight.linear


class Int4Linear(Int4Weight):
    forward = Int4Weight.linear


class Int8Embedding(Int8Weight):
    """Looks up rows; as the tied output projection, `linear` multiplies by the same table."""

    forward = Int8Weight.rows


class Int4Embedding(Int4Weight):
    forward = Int4Weight.rows


def check_spec(quant):
    """Refuse the quantization spec of a checkpoint that these layers do not read."""
    method, patterns = quant.get("method"), quant.get("int8", [])
    bad = None
    if method not in list(SPEC_KEYS):
        bad = f"method {method}"
    elif surplus := quant.keys() - SPEC_KEYS[method]:
        bad = f"key {min(map(str, surplus))}"
    elif method == "int4" and quant.get("group_size") not in GROUP_SIZES:
        bad = f"group_size {quant.get('group_size')}"
    elif method == "int4" and not isinstance(quant.get("symmetric"), bool):
        bad = f"symmetric {quant.get('symmetric')}"
    elif not isinstance(patterns, list | tuple) or not all(isinstance(pattern, str) for pattern in patterns):
        bad = f"int8 {patterns}"
    if bad:
        raise ValueError(
            f'quantization {bad}: this code reads {{"method": "int8"}} and {{"method": "int4", "group_size": 32, 64 or '
            '128, "symmetric": true or false, "algorithm": any, "int8": [patterns of layer names]}'
        )


def bits_of(name, quant):
    """The width of the module of that name: 8 or 4."""
    if quant["method"] == "int8" or any(fnmatchcase(name, pattern) for pattern in quant.get("int8", [])):
        return 8
    return 4


def build(model, quant):
    """Replace, in place, the layers that the quantization spec of a checkpoint names; it then loads strictly."""
    check_spec(quant)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear | nn.Embedding):
            linear, shape = isinstance(layer, nn.Linear), layer.weight.shape
            if bits_of(name, quant) == 8:
                low = (Int8Linear if linear else Int8Embedding)(*shape)
            else:
                low = (Int4Linear if linear else Int4Embedding)(*shape, quant["group_size"], quant["symmetric"])
            model.set_submodule(name, low)
    return model
