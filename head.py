"""The output projection and its softmax, a chunk of rows at a time: loss, log-probabilities and their gradients.

Of a large vocabulary the (B*T, V) logits would take more memory than everything else in training together, so that
they never exist at once. model.py calls what stands here; a loss is nats, logits are float32 at least.
"""

import functools
import platform
from pathlib import Path

import torch
import torch.nn.functional as F

FEW_ROWS, UNCACHED = 8, 2**22  # rows, weights: where product_turned is faster than F.linear, on AMD


def upcast(x):
    """x in float32 at least, for sums, softmax and rotations; float64 stays, in which tests compare closely."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def product_dtype(x):
    """What products with x are computed in: autocast's dtype where it is on, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def at(keep, h, targets, weights):
    """States (B, T, D), targets and weights (B, T) at the flat positions `keep` (N,): (N, D), (N,), (N,).

    A position of B * T, one past the end, fills `keep` up to a round number and weighs nothing. None keeps all. The
    positions are told by the caller, who knows them on the host: to look for them would make it wait for the device.
    """
    h, targets, weights = h.flatten(0, 1), targets.flatten(), weights.flatten()
    if keep is None:
        return h, targets, weights
    inside = keep.clamp(max=len(h) - 1)
    return h.index_select(0, inside), targets[inside], F.pad(weights, (0, 1))[keep]


def chunk_rows(device):
    """Rows of a chunk; of 64,793 words their logits take 266 MB on a GPU, 133 MB on a CPU. More rows gain little."""
    return 512 if device.type == "cpu" else 1024


def row_chunks(h):
    """Slices of h's rows, chunk by chunk."""
    rows = chunk_rows(h.device)
    return [slice(i, min(i + rows, len(h))) for i in range(0, len(h), rows)]


def padded(W, dtype):
    """W (V, D) in dtype; on a GPU with rows of zeros up to a multiple of 128: of odd shapes it multiplies slowly."""
    if W.device.type == "cpu":
        return W.to(dtype)
    low = W.new_zeros(-(-len(W) // 128) * 128, W.size(1), dtype=dtype)
    low[: len(W)] = W
    return low


def product(a, b, out=None):
    """a (M, K) times b (K, N) with sums and result in float32 at least, also where a and b are bfloat16."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16) and not torch.version.hip:  # only CUDA's has out_dtype
        return torch.mm(a, b, out_dtype=torch.float32)
    with torch.autocast(a.device.type, enabled=False):  # which else rounds operands and result of a product on a CPU
        return torch.mm(upcast(a), upcast(b), out=out)


def logits_buffer(h, V):
    """Room for the logits of a chunk of h's rows (rows, Vp), for logits_of; None but on a CPU: others make their own.

    Each row begins at a multiple of 64 bytes: at others MKL works at three quarters of the speed (on AMD's Zen 3).
    """
    if not h.is_cpu or len(h) == 0 or torch.compiler.is_compiling():  # which takes no such rows as `out`
        return None
    return upcast(h).new_empty(row_chunks(h)[0].stop, -(-V // 16) * 16)


def logits_of(h, W, buffer):
    """h (rows, D) times W (V, D) turned: the logits (rows, Vp), of which columns from V on mean nothing."""
    if buffer is None:
        return product(h, W.T)
    product(h, W.T, buffer[: len(h), : len(W)])
    return buffer[: len(h)]


def product_turned(h, weight):
    """h (..., D) times weight (V, D), for few rows of h and a weight that no CPU's cache holds: (..., V).

    F.linear reads such a weight at a half to a quarter of the memory's speed (MKL on AMD's Zen 3; on Intel's CPUs at
    all of it). The other way round it does not, but for a single row, which therefore stands there twice.
    """
    rows = h.reshape(-1, h.size(-1))
    wide = rows.repeat(2, 1) if len(rows) == 1 else rows
    return (weight @ wide.T)[:, : len(rows)].T.contiguous().view(*h.shape[:-1], -1)


@functools.cache
def is_amd():
    """Whether this machine's CPU is AMD's."""
    path = Path("/proc/cpuinfo")
    return "AuthenticAMD" in (path.read_text() if path.exists() else platform.processor())


def faster_logits(h, weight):
    """h (..., D) times weight (V, D) turned, without a gradient: (..., V), where F.linear is not the way; else None.

    On a GPU in float32, as bfloat16 makes different logits equal.
    """
    if h.is_cuda:
        low = product_dtype(h)
        return product(h.flatten(0, -2).to(low), weight.to(low).T).unflatten(0, h.shape[:-1])
    few = h.is_cpu and 0 < h.numel() <= FEW_ROWS * h.size(-1) and weight.numel() >= UNCACHED
    return product_turned(h, weight) if few and is_amd() else None


def add_product(total, a, b):
    """total (M, N) and a times b, as `product`, written over total."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return total.add_(product(a, b))
    return total.addmm_(upcast(a), upcast(b))


def log_softmax_chunk(logits, targets, V, grad_dtype=None):
    """log softmax over the first V columns at the targets (rows, 1); the logits (rows, Vp) are overwritten.

    With grad_dtype also softmax - onehot (rows, Vp), its derivative with respect to the logits but for the sign.
    """
    logits[:, V:] = -torch.inf
    logps, targets = torch.log_softmax(logits, -1, out=logits), targets[:, None]
    picked = logps.gather(1, targets)
    if grad_dtype is None:
        return picked
    # p - 1 of the target is computed in float32: where p is nearly 1, little of it would be left in bfloat16
    logps.scatter_add_(1, targets, torch.full_like(picked, -torch.inf))
    grad = torch.exp(logps, out=logps if logps.dtype == grad_dtype else torch.empty_like(logps, dtype=grad_dtype))
    return picked, grad.scatter_add_(1, targets, picked.expm1().to(grad_dtype))


def fused_log_softmax_chunk(logits, targets, V, grad_dtype=None):
    """The same for torch.compile, which reads the logits twice for it and writes the derivative once."""
    columns, targets = torch.arange(logits.size(1), device=logits.device), targets[:, None]
    logits = torch.where(columns < V, logits, -torch.inf)
    largest = logits.amax(1, keepdim=True)
    lse = (logits - largest).exp().sum(1, keepdim=True).log() + largest  # as logsumexp, but in one kernel
    picked = logits.gather(1, targets) - lse
    if grad_dtype is None:
        return picked
    return picked, torch.where(columns == targets, picked.expm1(), (logits - lse).exp()).to(grad_dtype)


class LinearCrossEntropy(torch.autograd.Function):
    """sum_n weights[n] * -log softmax(h[n] W^T)[targets[n]], the gradients computed with the loss, chunk by chunk.

    `chunk` is log_softmax_chunk or, compiled, fused_log_softmax_chunk.
    """

    @staticmethod
    def forward(ctx, h, W, targets, weights, chunk=log_softmax_chunk):  # (N, D), (V, D), (N,), (N,)
        low = product_dtype(h) if h.is_cuda else h.dtype
        h_low, W_low = h.to(low), padded(W, low)
        loss = upcast(h.new_zeros(()))
        weights = weights.to(loss.dtype)
        grad_h = torch.empty_like(h)
        grad_W = torch.zeros_like(W_low, dtype=loss.dtype)
        buffer = logits_buffer(h, len(W_low))
        for rows in row_chunks(h):
            hr, w = h_low[rows], weights[rows, None]
            picked, grad = chunk(logits_of(hr, W_low, buffer), targets[rows], len(W), low)
            loss -= (picked * w).sum()
            grad = grad[:, : len(W_low)]
            grad_h[rows] = product(grad, W_low) * w
            add_product(grad_W, grad.T, (hr * w).to(low))
            del grad  # before the next logits
        ctx.save_for_backward(grad_h, grad_W[: len(W)].to(W.dtype))
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_h, grad_W = ctx.saved_tensors
        return grad_h.mul_(grad_loss), grad_W.mul_(grad_loss), None, None, None


class LinearLogps(torch.autograd.Function):
    """log softmax(h W^T / temperature)[targets]; backward recomputes the logits chunk by chunk."""

    @staticmethod
    def forward(ctx, h, W, targets, temperature, chunk=log_softmax_chunk):  # (N, D), (V, D), (N,)
        low = product_dtype(h) if h.is_cuda else h.dtype
        h_low, W_low = (h / temperature).to(low), padded(W, low)
        buffer = logits_buffer(h, len(W_low))
        logps = [chunk(logits_of(h_low[rows], W_low, buffer), targets[rows], len(W)) for rows in row_chunks(h)]
        ctx.save_for_backward(h_low, W, targets)
        ctx.temperature, ctx.chunk, ctx.dtype = temperature, chunk, h.dtype
        return torch.cat(logps).squeeze(1) if logps else upcast(h.new_zeros(0))  # (N,)

    @staticmethod
    def backward(ctx, grad_logps):
        h_low, W, targets = ctx.saved_tensors
        low = h_low.dtype
        W_low = padded(W, low)
        grad_h = torch.empty_like(h_low, dtype=ctx.dtype)
        grad_W = torch.zeros_like(W_low, dtype=grad_logps.dtype)
        buffer = logits_buffer(h_low, len(W_low))
        for rows in row_chunks(h_low):
            hr, g = h_low[rows], -grad_logps[rows, None]
            _, grad = ctx.chunk(logits_of(hr, W_low, buffer), targets[rows], len(W), low)
            grad = grad[:, : len(W_low)]
            grad_h[rows] = product(grad, W_low) * (g / ctx.temperature)
            add_product(grad_W, grad.T, (hr * g).to(low))
            del grad  # before the next logits
        return grad_h, grad_W[: len(W)].to(W.dtype), None, None, None
