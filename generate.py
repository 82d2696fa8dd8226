"""model.generate: prompts of any lengths in one batch, keys and values cached, finished rows leaving.

A GPU is not kept waiting: the host looks at the tokens once in FETCH_EVERY, and a step has the same shapes for up to
BUCKET tokens, so that it is captured as a CUDA graph and replayed. A CPU has nothing to gain from either.
"""

import copy
import functools
import sys
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

FETCH_EVERY = 16  # tokens; rows that ended meanwhile went on for nothing, and what they got is cut away
BUCKET = 128  # keys; attention reads half of it too many, in the mean
LIKELIEST = 256  # tokens that nearly always have top_p together: to sort these is to leave the vocabulary unsorted
REPAID = 16  # tokens that repay a capture, which takes as long as a few steps without a graph


@dataclass
class Generation:
    tokens: list[list[int]]  # the new tokens of each prompt, its eos included when it came
    logps: list[list[float]] | None  # of those tokens, under softmax(logits / temperature) before top-k and top-p


class KVCache:
    """Keys and values already computed. Row b holds `lengths[b]` tokens, so ragged prompts need no left padding.

    With a bucket above 1, steps of the same `shape` run the same kernels on the same memory: where their tokens stand
    is known on the device alone.
    """

    def __init__(self, config, batch_size, capacity, device, dtype, bucket=1):
        self.capacity, self.bucket = capacity, bucket
        shape = (config.n_layers, batch_size, 2, config.n_kv_heads, self.rounded(capacity), config.head_dim)
        self.kv = torch.zeros(shape, device=device, dtype=dtype)
        self.set_lengths([0] * batch_size)

    def rounded(self, keys):
        return -(-keys // self.bucket) * self.bucket

    def set_lengths(self, lengths):
        """Row b keeps its first lengths[b] tokens. `longest` and `even` spare each step a look at the tensor."""
        self.lengths = torch.tensor(lengths, device=self.kv.device)  # (B,)
        self.longest, self.even = max(lengths), min(lengths) == max(lengths)

    def shape(self):
        """Rows of the next step, and keys that each sees."""
        return len(self.lengths), self.rounded(min(self.longest + 1, self.capacity))

    def append(self, T):
        """Make room for T tokens more in every row; kv[layer][slot] for one is (B, 2, Hkv, D/H). Positions (B, T) of
        them, and what attention adds to their scores (B, 1, T, keys); or a slice and None where that says all: the same
        positions for every row, and no key to hide but those that causal attention hides."""
        first, device = self.longest, self.kv.device
        self.longest = min(first + T, self.capacity)
        if first == 0 or (T == 1 and self.even and self.bucket == 1):
            self.keys, mask = self.longest, None
            self.positions = slice(first, self.longest)
            self.slot = slice(None), slice(None), slice(None), first
        else:
            self.keys, self.rows = self.rounded(self.longest), torch.arange(len(self.lengths), device=device)[:, None]
            # a row that goes on although the cache is full writes over its last slot
            self.positions = (self.lengths[:, None] + torch.arange(T, device=device)).clamp(max=self.capacity - 1)
            self.slot = self.rows[:, 0], slice(None), slice(None), self.positions[:, 0]
            later = torch.arange(self.keys, device=device) > self.positions[..., None]  # (B, T, keys)
            mask = torch.zeros_like(later, dtype=self.kv.dtype).masked_fill_(later, -torch.inf).unsqueeze(1)
        self.lengths += T  # in place, so that a replay counts on
        return self.positions, mask

    def write(self, layer, k, v):
        """Store the keys and values of those tokens (B, Hkv, T, D/H); returns all that they see."""
        for cached, new in zip(self.kv[layer].unbind(1), (k, v), strict=True):
            if isinstance(self.positions, slice):
                cached[:, :, self.positions] = new
            else:
                cached[self.rows, :, self.positions] = new.transpose(1, 2).to(cached.dtype)
        return self.kv[layer, :, :, :, : self.keys].unbind(1)

    def keep(self, rows):
        self.kv, self.lengths = self.kv[:, rows], self.lengths[rows]
        if self.bucket == 1:
            self.set_lengths(self.lengths.tolist())  # which may be even from now on


class Graphed:
    """step(token), captured as a CUDA graph when a shape of the cache comes again, and replayed while it lasts.

    The first step of a shape is the warm-up that a capture needs. A replay writes over the logits of the one before.
    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """

    failed = False  # whether a capture did, of any cache: then none is tried again

    def __init__(self, step, cache):
        self.step, self.cache, self.stream = step, cache, side_stream(cache.kv.device)
        self.shape, self.graph = None, None

    def __call__(self, token):
        cache, longest = self.cache, self.cache.longest
        rows, keys = shape = cache.shape()
        if shape != self.shape:  # the old one never comes back: rows leave, keys grow
            self.shape, self.graph, self.logits = shape, None, None
            current = torch.cuda.current_stream(token.device)
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                logits = self.step(token)
            current.wait_stream(self.stream)
            return logits
        if self.graph is None and not self.failed and min(keys, cache.capacity) - longest >= REPAID:
            self.capture(token)
        if self.graph is None:
            return self.step(token)
        self.token.copy_(token)
        self.graph.replay()
        cache.longest = longest + 1  # as no Python runs in a replay
        return self.logits

    def capture(self, token):
        self.token, graph, longest = token.clone(), torch.cuda.CUDAGraph(), self.cache.longest
        # thread_local: what threads do that pin batches or write a checkpoint is no error
        recording = torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local")
        try:
            with torch.cuda.stream(self.stream), recording:  # the outer one: a failed capture leaves its stream set
                self.logits = self.step(self.token)
            self.graph = graph
        except RuntimeError as error:
            Graphed.failed, reason = True, str(error.__context__ or error).strip().partition("\n")[0]
            print(f"warning: generation goes on without a CUDA graph, and slower: {reason}", file=sys.stderr)
        self.cache.longest = longest  # as no kernel runs in a capture


@functools.lru_cache
def side_stream(device):
    """The one for captures: libraries keep a workspace, megabytes, for each stream that they have seen."""
    return torch.cuda.Stream(device)


class Sampler:
    """Draws the next token of each row, and keeps on the device what it drew until it is fetched."""

    def __init__(self, prompts, vocab_size, device, options, penalty, uniform, return_logps, on_logits):
        self.options, self.penalty, self.return_logps, self.on_logits = options, penalty, return_logps, on_logits
        self.uniform = uniform  # (B, number of tokens), or None
        self.seen = None if penalty == 1.0 else prompt_tokens(prompts, vocab_size, device)
        self.n_rows, self.n_drawn, self.drawn, self.logps = len(prompts), 0, [], []

    def draw(self, logits):
        """logits (B, V) -> the next token of each row (B,)."""
        raw = logits.to(torch.promote_types(logits.dtype, torch.float32))  # for softmax and sums
        logits = penalise(raw, self.seen, self.penalty)
        uniform = None if self.uniform is None else self.uniform[:, self.n_drawn, None]
        self.n_drawn += 1
        self.drawn.append(sample(logits, uniform, **self.options))
        self.token = self.drawn[-1].clamp(min=0)
        if self.on_logits:
            self.on_logits(raw, self.token)
        if self.return_logps:
            logps = (logits / (self.options["temperature"] or 1.0)).log_softmax(-1)
            self.logps.append(logps.gather(1, self.token[:, None]).squeeze(1))
        if self.seen is not None:
            self.seen.scatter_(1, self.token[:, None], True)
        return self.token

    def fetch(self):
        """What was drawn since the last time, row by row and step by step, and its logps or nothing; with one wait."""
        flat = torch.cat(self.drawn + self.logps).tolist()  # ids beside logps are floats, exact up to 2^24
        n = len(self.drawn) * self.n_rows
        self.drawn, self.logps = [], []
        return flat[:n], flat[n:]

    def keep(self, rows):
        self.n_rows, self.token = len(rows), self.token[rows]
        self.uniform, self.seen = (each if each is None else each[rows] for each in (self.uniform, self.seen))
        return self.token


@torch.no_grad()
def generate(
    model,
    prompts,
    max_new_tokens,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
    eos_id=2,
    seed=None,
    on_token=None,
    on_logits=None,
    return_logps=False,
    dtype=None,
    fetch_every=None,
    bucket=None,
):
    """Continue prompts (a list of id lists of any lengths) until eos, max_new_tokens or the end of the context.

    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off; min_p as in arXiv:2407.01082; repetition_penalty as
    in CTRL (arXiv:1909.05858, 4.1). on_token(row, id) is called for each token when it is fetched.
    The same seed gives the same tokens, whatever else is in the batch: a row draws by the seed, its prompt and how many
    equal prompts stand before it; or, where seed is a list of one for each prompt, by that alone.
    on_logits(logits (B, V), tokens (B,)) sees on the device what each step drew, and from what before the penalty and
    temperature; the next step may write over them.
    dtype of weights and cache: None is bfloat16 on a CUDA device that computes in it, else the model's own.
    fetch_every and bucket as above: None is 1 on a CPU. Bucket 1 goes without CUDA graphs.
    """
    limit, device = model.config.max_seq_len, model.norm.weight.device
    if not all(0 < len(prompt) < limit for prompt in prompts):
        raise ValueError(f"a prompt must have 1 to {limit - 1} tokens; got {sorted({len(p) for p in prompts})}")
    fetch_every = fetch_every or (1 if device.type == "cpu" else FETCH_EVERY)
    bucket = bucket or (BUCKET if device.type == "cuda" else 1)
    out = Generation([[] for _ in prompts], [[] for _ in prompts] if return_logps else None)
    # the text, its newest token included, never outgrows max_seq_len, so that token_logps can score it
    room = [min(max_new_tokens, limit - len(prompt)) for prompt in prompts]
    if max(room, default=0) <= 0:
        return out
    model = decoder(model, dtype or decoding_dtype(model))
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    uniform = uniform_numbers(prompts, seed, max(room)).to(device) if temperature else None
    facts = (options, repetition_penalty, uniform, return_logps, on_logits)
    sampler = Sampler(prompts, model.config.vocab_size, device, *facts)
    logits, cache = prefill(model, prompts, max_new_tokens, bucket)  # (B, V)
    wide = torch.promote_types(model.norm.weight.dtype, torch.float32)
    turns = torch.complex(model.rope_cos[:, ::2].to(wide), model.rope_sin.to(wide))  # (max_seq_len, D/H/2)
    step = functools.partial(decode, model, turns, cache)
    if bucket > 1 and has_graphs(device):
        step = Graphed(step, cache)
    rows, due = list(range(len(prompts))), min(fetch_every, max(room))
    leaving = 1 / 2 if bucket > 1 else 1 / 8  # to leave is to copy the rest of the cache, and to capture a graph anew
    while True:
        token = sampler.draw(logits)
        if len(sampler.drawn) == due:
            alive = take(out, rows, *sampler.fetch(), room, eos_id, on_token)
            if not alive:
                return out
            due = min(fetch_every, max(room[rows[i]] - len(out.tokens[rows[i]]) for i in alive))
            if len(rows) - len(alive) >= len(rows) * leaving:
                rows, kept = [rows[i] for i in alive], torch.tensor(alive, device=device)
                cache.keep(kept)
                token = sampler.keep(kept)
        logits = step(token)


def take(out, rows, tokens, logps, room, eos_id, on_token):
    """Append to `out` what each of its `rows` got until its end. Returns the numbers of those that go on."""

    def goes_on(row):
        text = out.tokens[row]
        return len(text) < room[row] and text[-1:] != [eos_id]

    for i, token in enumerate(map(int, tokens)):
        row = rows[i % len(rows)]
        if goes_on(row):
            if token < 0:
                raise FloatingPointError("the logits are not finite: weights are too large, or training diverged")
            out.tokens[row].append(token)
            if logps:
                out.logps[row].append(logps[i])
            if on_token:
                on_token(row, token)
    return [i for i, row in enumerate(rows) if goes_on(row)]


def has_graphs(device):
    return device.type == "cuda" and torch.cuda.is_available()


def decoding_dtype(model):
    """bfloat16 for float32 weights on a GPU that computes in it, without emulation; else as they are."""
    weight = model.norm.weight
    half = weight.dtype == torch.float32 and weight.device.type == "cuda"
    if half and torch.cuda.is_available():
        half = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if half else weight.dtype


def decoder(module, dtype):
    """The model for decoding: parameters in dtype, no dropout, not compiled, as each length would be compiled anew.

    The modules are copies, so that nothing changes for those who train it; buffers and low-bit layers are shared.
    """

    def cast(p):
        return p if p is None else nn.Parameter(p.to(dtype), requires_grad=False)

    if module._buffers and not module._parameters and not module._modules:
        return module
    twin = copy.copy(module)
    twin._parameters = {name: cast(p) for name, p in module._parameters.items()}
    twin._modules = {name: decoder(child, dtype) for name, child in module._modules.items()}
    twin.training = False
    return twin


def prefill(model, prompts, max_new_tokens, bucket):
    """The logits after the last token of each prompt (B, V), and a cache that holds them and has room to go on."""
    lengths, weight = [len(prompt) for prompt in prompts], model.norm.weight
    longest = max(lengths)
    # right padding is harmless: causal attention never looks at it, and decoding overwrites it in the cache
    ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=weight.device)  # (B, T)
    capacity = min(longest + max_new_tokens, model.config.max_seq_len)
    cache = KVCache(model.config, len(prompts), capacity, weight.device, weight.dtype, bucket)
    h = model.hidden(ids, cache)  # (B, T, D)
    cache.set_lengths(lengths)
    return model.head(h[torch.arange(len(prompts), device=weight.device), cache.lengths - 1]), cache


def decode(model, turns, cache, token):
    """What model.hidden and model.head say of one token more in every row, (B,) -> (B, V), in half as many operators:
    without the dimension of time, with q, k and v turned and stored together. A small model waits for operators."""
    config, (positions, mask) = model.config, cache.append(1)
    H, Hkv = config.n_heads, config.n_kv_heads
    turn = turns[positions].view(-1, 1, config.head_dim // 2)  # (B or 1, 1, D/H/2)
    h = model.tok_embeddings(token).to(model.norm.weight.dtype)  # a low-bit embedding's is float32
    for layer, kv, seen in zip(model.layers, cache.kv.unbind(), cache.kv[..., : cache.keys, :].unbind(), strict=True):
        attention, x = layer.attention, layer.attention_norm(h)
        qkv = torch.cat([attention.wq(x), attention.wk(x), attention.wv(x)], -1).view(len(x), H + 2 * Hkv, -1)
        turned = (qk := qkv[:, : H + Hkv]).to(turn.dtype.to_real())  # qk itself, unless it is bfloat16
        turned.view(turn.dtype).mul_(turn)  # pairs as complex numbers
        if turned is not qk:
            qk.copy_(turned)
        q, new = qkv.split((H, 2 * Hkv), 1)
        kv[cache.slot] = new.view(len(x), 2, Hkv, -1).to(kv.dtype)
        k, v = seen.unbind(1)  # (B, Hkv, keys, D/H)
        # the heads that share keys stand as positions of one head
        y = F.scaled_dot_product_attention(q.view(len(x), Hkv, H // Hkv, -1), k, v, mask)
        h = h + attention.wo(y.reshape(len(x), -1))
        forward, x = layer.feed_forward, layer.ffn_norm(h)
        h = h + forward.w2(F.silu(forward.w1(x)).mul_(forward.w3(x)))
    return model.head(model.norm(h))


def uniform_numbers(prompts, seed, n):
    """The numbers in [0, 1) by which n tokens of each prompt are drawn, on the CPU whatever the device: (B, n)."""
    if isinstance(seed, list | tuple):
        seeds = [each % 2**64 for each, _ in zip(seed, prompts, strict=True)]  # numpy takes none below 0
    else:
        first, met, seeds = torch.randint(2**62, ()).item() if seed is None else seed, Counter(), []
        for prompt in map(tuple, prompts):
            seeds.append((first % 2**64, met[prompt], *prompt))
            met[prompt] += 1
    return torch.from_numpy(np.stack([np.random.default_rng(each).random(n, np.float32) for each in seeds]))


def prompt_tokens(prompts, vocab_size, device):
    """Which tokens stand in each prompt: (B, V) bool."""
    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
    for row, prompt in zip(seen, prompts, strict=True):
        row[prompt] = True
    return seen


def penalise(logits, seen, penalty):
    """Make tokens already there less likely: logits (B, V), seen (B, V) bool, or None for no penalty."""
    if seen is None:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(logits, uniform, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Draw one token a row from logits (B, V) by a number in [0, 1) each, uniform (B, 1): (B,).

    It is -1 where logits are not finite: to raise an error would be to wait for the device.
    """
    if temperature == 0:
        highest, token = logits.max(-1)  # argmax is three times slower on a CPU
        return token.where(highest.isfinite(), -1)
    probs = (logits / temperature).softmax(-1)  # (B, V)
    if top_k or top_p < 1:
        probs = probs.where(probs >= least_likely(probs, top_k, top_p), 0)
    if min_p:
        probs = probs.where(probs >= min_p * probs.amax(-1, keepdim=True), 0)
    # inverse CDF: one uniform number a row; on a CPU torch.multinomial draws one a token, which is slower
    cdf = probs.cumsum(-1)
    total = cdf[:, -1:]  # 1 but for what was left out and rounding, or not a number
    return torch.searchsorted(cdf, uniform.to(cdf.dtype) * total, right=True).where(total > 0, -1).squeeze(1)


def least_likely(probs, top_k, top_p):
    """The lowest probability in the smallest set of the likeliest tokens, of top_k of them, that has top_p of theirs.

    probs (B, V) -> (B, 1). Of equally likely ones all are in it: what else is in a batch changes no order among them.
    """
    V = probs.size(-1)
    most = min(top_k or V, V)
    few = min(LIKELIEST, most) if probs.is_cpu and not top_k else most  # to ask whether few do, a GPU would wait
    for k in (few, most):
        ranked = probs.topk(k).values if k < V else probs.sort(descending=True).values
        if top_p >= 1:
            return ranked[:, -1:]
        total = ranked.sum(-1, keepdim=True) if top_k else 1.0
        in_set = ranked.cumsum(-1) - ranked < top_p * total  # a token is out if those before it have top_p
        if k == most or not in_set[:, -1].any():
            return ranked.gather(1, in_set.sum(-1, keepdim=True).clamp(min=1) - 1)  # top_p 0 too leaves the likeliest
