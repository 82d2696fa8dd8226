"""Llama 2 (Touvron et al., 2023, arXiv:2307.09288), as published but for tied embeddings.

RMSNorm before each block, rotary positions on interleaved pairs (Meta's layout), grouped-query attention, SwiGLU, no
biases; `tied=False` gives the output a matrix of its own. The loss is computed inside `model(ids, targets)` and the
per-token log-probabilities inside `model.token_logps(ids)`, both by head.py, which never holds the (B*T, V) logits.
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from generate import generate
from head import (
    LinearCrossEntropy,
    LinearLogps,
    at,
    faster_logits,
    log_softmax_chunk,
    product_dtype,
    row_chunks,
    upcast,
)


@dataclass
class ModelConfig:
    dim: int = 288
    n_layers: int = 6
    n_heads: int = 6
    n_kv_heads: int = 6
    vocab_size: int = 64793
    max_seq_len: int = 512
    hidden_dim: int | None = None  # None: 32 * ceil(int(8 * dim / 3) / 32)
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    dropout: float = 0.0
    tied: bool = True  # the output projection is the embedding
    scalar_head: bool = False  # reward and value models: one number per position instead of V logits

    def __post_init__(self):
        for each in fields(self):
            value, kind = getattr(self, each.name), each.type
            right = isinstance(value, float | int if kind is float else kind)
            if not right or (isinstance(value, bool) and kind is not bool):
                raise TypeError(f"{each.name}={value!r}: {getattr(kind, '__name__', kind)} is needed")
        if self.hidden_dim is None:
            self.hidden_dim = 32 * math.ceil(int(8 * self.dim / 3) / 32)
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len", "hidden_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1 is needed")
        fits = dict(norm_eps=0 < self.norm_eps < 1, rope_theta=0 < self.rope_theta < math.inf)
        for name, right in (fits | dict(dropout=0 <= self.dropout < 1)).items():
            if not right:
                raise ValueError(f"{name}={getattr(self, name)}: not a value that it can have")
        for a, b in (("dim", "n_heads"), ("n_heads", "n_kv_heads")):
            if getattr(self, a) % getattr(self, b):
                raise ValueError(f"{a}={getattr(self, a)} is not a multiple of {b}={getattr(self, b)}")
        if self.head_dim % 2:
            raise ValueError(f"dim/n_heads={self.head_dim} is odd: rotary positions need pairs")

    @property
    def head_dim(self):
        return self.dim // self.n_heads


class Embedding(nn.Embedding):
    """A token embedding that also serves as the output projection."""

    sparse_gradient = False  # True: it is added to that of the output projection, which is whole, in every loss

    def forward(self, ids):
        # on a CPU a gradient of all rows, mostly zeros, is a second matrix to fill and to add
        return F.embedding(ids, self.weight, sparse=self.sparse_gradient and ids.is_cpu)

    def linear(self, h):
        return F.linear(h, self.weight)


class ScalarHead(nn.Linear):
    """One number per position, in float32 under autocast too: scores that bfloat16 rounds have ties."""

    def forward(self, h):
        return (upcast(h) * self.weight).sum(-1, keepdim=True)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def written(y):
    """What the forward of an autograd.Function wrote in place and returns: torch 2.11 compiles that to a gradient of
    zeros, without a word, unless it is a copy, which costs nothing there."""
    return y.clone() if torch.compiler.is_compiling() else y


def rope_table(config):
    """cos (max_seq_len, head_dim), each twice, and sin (max_seq_len, head_dim/2) of position * theta^(-2i/head_dim)."""
    freqs = config.rope_theta ** (-torch.arange(0, config.head_dim, 2).double() / config.head_dim)
    angles = torch.outer(torch.arange(config.max_seq_len).double(), freqs)
    tables = angles.cos().repeat_interleave(2, -1), angles.sin()
    return [table.to(torch.get_default_dtype()) for table in tables]


class Rope(torch.autograd.Function):
    """Rotate the pairs (x[2i], x[2i+1]) by their angles. x (B, T, H, D/H); cos, sin (T, ...) or (B, T, ...).

    Computed in float32 at least and rounded to x's dtype, with few passes over x; backward turns back.
    """

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # the same angle for every head
        y = torch.mul(x, cos, out=torch.empty_like(x))
        pairs, turned = (each.unflatten(-1, (-1, 2)) for each in (x, y))
        turned[..., 0].addcmul_(pairs[..., 1], sin, value=-1)
        turned[..., 1].addcmul_(pairs[..., 0], sin)
        return written(y)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return Rope.apply(grad, cos, -sin), None, None


def document_starts(documents, multiple=256):
    """Where documents start in the flattened rows (N,) int32, from the number of each token's (B, T).

    The end, B * T, follows as often as makes N a multiple: few different shapes let a GPU reuse what is compiled.
    """
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = starts.flatten().nonzero().squeeze(1)
    return F.pad(starts, (0, 1 + -(len(starts) + 1) % multiple), value=documents.numel()).int()


def has_varlen(device, dtype, head_dim):
    """Whether a GPU has the kernel behind varlen_attn, FlashAttention's: from Ampere on, in half precision."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or head_dim % 8 or head_dim > 256:
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)


def document_mask(documents, B, T, varlen):
    """What keeps attention within documents, their numbers (B, T) or starts (N,): (B, 1, T, T) bool.

    With varlen their starts, which a kernel takes that skips what is masked.
    """
    if varlen:
        return documents if documents.dim() == 1 else document_starts(documents)
    if documents.dim() == 1:
        positions = torch.arange(B * T, dtype=documents.dtype, device=documents.device)
        documents = torch.searchsorted(documents, positions, right=True).view(B, T)
    return (documents[:, :, None] == documents[:, None, :]).tril().unsqueeze(1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)

    def forward(self, x, cos, sin, cache=None, layer=0, mask=None):
        B, T, _ = x.shape
        q, k, v = (w(x).view(B, T, -1, self.head_dim) for w in (self.wq, self.wk, self.wv))  # (B, T, H or Hkv, D/H)
        q, k = Rope.apply(q, cos, sin), Rope.apply(k, cos, sin)
        if mask is not None and mask.dim() == 1:
            return self.wo(self.within_documents(q, k, v, mask).view(B, T, -1))
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))  # (B, H or Hkv, T, D/H)
        if cache is not None:
            k, v = (kv.type_as(q) for kv in cache.write(layer, k, v))
        if T == 1:  # the heads that share keys stand as positions of one head, and no kernel needs to know of groups
            q = q.reshape(B, self.n_kv_heads, -1, self.head_dim)
        causal, gqa = mask is None and (cache is None or T > 1), q.size(1) != self.n_kv_heads
        if gqa and q.is_cuda and q.dtype == torch.float32:  # its kernels know no groups: all scores would exist
            k, v = (heads.repeat_interleave(self.n_heads // self.n_kv_heads, 1) for heads in (k, v))
            gqa = False
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=gqa)
        return self.wo(y.reshape(B, self.n_heads, T, -1).transpose(1, 2).reshape(B, T, -1))

    def within_documents(self, q, k, v, starts):
        """Causal attention over all rows end to end, each document by itself: (B * T, H, D/H)."""
        from torch.nn.attention.varlen import varlen_attn  # takes as long as torch itself: where it is used alone

        T = q.size(1)
        if self.n_heads != self.n_kv_heads:  # torch 2.11 has no enable_gqa
            k, v = (heads.repeat_interleave(self.n_heads // self.n_kv_heads, 2) for heads in (k, v))
        q, k, v = (heads.flatten(0, 1) for heads in (q, k, v))
        return varlen_attn(q, k, v, starts, starts, T, T, window_size=(-1, 0))


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up. Keeps neither silu(gate) nor a second copy of the rest for backward: a quarter less memory."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return written(F.silu(gate).mul_(up))

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        grad_gate = grad * up
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)  # in place
        return grad_gate, F.silu(gate).mul_(grad)


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)

    def forward(self, x):
        return self.w2(SwiGLU.apply(self.w1(x), self.w3(x)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, h, *attention_args):
        x = self.attention_norm(h)
        h = h + self.dropout(self.attention(x.to(product_dtype(x)), *attention_args))  # cast once for q, k and v
        x = self.ffn_norm(h)
        return h + self.dropout(self.feed_forward(x.to(product_dtype(x))))


class Llama(nn.Module):
    generate = generate  # model.generate(prompts, max_new_tokens, ...)

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.tok_embeddings = Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.tok_embeddings.sparse_gradient = config.tied and not config.scalar_head
        needs_output = not (config.tied or config.scalar_head)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False) if needs_output else None
        self.scalar = ScalarHead(config.dim, 1, bias=False) if config.scalar_head else None
        self.chunk = log_softmax_chunk  # of the head's rows; or the fused one, compiled
        self.recompute = False  # activation checkpointing: backward computes each block's activations again
        cos, sin = rope_table(config)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.init_weights()

    def init_weights(self):
        """GPT-2's: N(0, 0.02), the projections into the residual stream scaled by 1/sqrt(2 n_layers); scalar head 0."""
        for name, p in self.named_parameters():
            std = 0.02
            if name.endswith(("wo.weight", "w2.weight")):
                std /= math.sqrt(2 * self.config.n_layers)
            elif name.startswith(("tok_embeddings", "output")):
                # logits of variance at most 1/4, so that a wide model too starts within 2 % of ln(vocab_size)
                std = min(std, 0.5 / math.sqrt(self.config.dim))
            elif name.startswith("scalar"):
                std = 0.0
            if p.dim() == 2:
                nn.init.normal_(p, std=std)

    @property
    def head_weight(self):
        return self.tok_embeddings.weight if self.output is None else self.output.weight

    def head(self, h):
        """(..., D) -> logits (..., V)."""
        dense = isinstance(self.output or self.tok_embeddings, nn.Linear | nn.Embedding)
        if dense and not torch.is_grad_enabled() and (logits := faster_logits(h, self.head_weight)) is not None:
            return logits
        return self.tok_embeddings.linear(h) if self.output is None else self.output(h)

    def hidden(self, ids, cache=None, documents=None):
        """The trunk: ids (B, T) -> final normalised states (B, T, D); with a cache, T tokens more for every row.

        With documents (B, T), the number of the document that each token is of, none attends to another document; those
        of one stand side by side. Rotary positions need no reset, as attention sees only their differences. Their
        document_starts, computed on the CPU, do as well, and on a GPU without its waiting for the host.
        """
        B, T = ids.shape
        if T > self.config.max_seq_len:
            raise ValueError(f"{T} tokens are longer than max_seq_len={self.config.max_seq_len}")
        positions, mask = (slice(T), None) if cache is None else cache.append(T)
        if documents is not None:
            varlen = has_varlen(ids.device, product_dtype(self.norm.weight), self.config.head_dim)
            mask = document_mask(documents, B, T, varlen)
        cos, sin = self.rope_cos[positions], self.rope_sin[positions]
        h = self.dropout(self.tok_embeddings(ids).to(self.norm.weight.dtype))  # a low-bit embedding's is float32
        for i, layer in enumerate(self.layers):
            if cache is not None:
                h = layer.forward(h, cos, sin, cache, i, mask)  # never compiled, as a call of the layer may be
            elif self.recompute and torch.is_grad_enabled():
                h = checkpoint(layer, h, cos, sin, None, 0, mask, use_reentrant=False)
            else:
                h = layer(h, cos, sin, None, 0, mask)
        return self.norm(h)

    def forward(self, ids, targets=None, weights=None, documents=None, keep=None):
        """ids (B, T) -> logits (B, T, V), or with targets (B, T) the loss in nats.

        Targets of -100 are left out. The loss is the mean over the others, or with weights (B, T) the sum of
        weights * nll: pass mask / (number of counted tokens in the whole step) and micro-batches add up exactly.
        `documents` as in `hidden`, `keep` as in `at`: without it the head is computed also where nothing counts.
        """
        h = self.hidden(ids, documents=documents)
        if targets is None:
            return self.head(h)
        counts = targets != -100
        weights = counts.to(h.dtype) / counts.sum().clamp(min=1) if weights is None else weights * counts
        h, targets, weights = at(keep, h, targets.clamp(min=0), weights)  # (N, D), (N,), (N,)
        if torch.is_grad_enabled():
            return LinearCrossEntropy.apply(h, self.head_weight, targets, weights, self.chunk)
        return -(self._logps(h, targets, 1.0) * weights).sum()

    def token_logps(self, ids, temperature=1.0, mask=None, keep=None):
        """log p(ids[:, t+1] | ids[:, :t+1]) under softmax(logits / temperature): (B, T-1), zero where mask is zero.

        `keep` as in `at`, of positions (B, T-1): those that mask leaves.
        """
        mask = torch.ones_like(ids[:, 1:]) if mask is None else mask
        h, targets, counts = at(keep, self.hidden(ids)[:, :-1], ids[:, 1:], mask)
        logps = self._logps(h, targets, temperature)
        logps = logps.masked_fill(counts == 0, 0)
        if keep is None:
            return logps.view(mask.shape)
        return logps.new_zeros(mask.numel() + 1).scatter(0, keep, logps)[:-1].view(mask.shape)

    def _logps(self, h, targets, temperature):
        """log softmax(logits / temperature) at the targets: (N, D), (N,) -> (N,)."""
        if isinstance(self.output or self.tok_embeddings, nn.Linear | nn.Embedding):
            return LinearLogps.apply(h, self.head_weight, targets, temperature, self.chunk)
        logps = [  # a low-bit head has no weight to multiply by
            (upcast(self.head(h[rows])) / temperature).log_softmax(-1).gather(1, targets[rows, None])
            for rows in row_chunks(h)
        ]
        return torch.cat(logps).squeeze(1) if logps else upcast(h.new_zeros(0))

    def values(self, ids):
        """The scalar head at every position, in float32: bfloat16 would make different scores equal. (B, T)"""
        h = upcast(self.hidden(ids))
        with torch.autocast(h.device.type, enabled=False):  # under which a low-bit head would round
            return self.scalar(h).squeeze(-1)

    def num_params(self):
        return sum(p.numel() for p in self.parameters())
