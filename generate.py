"""model.generate: prompts of any lengths in one batch, keys and values cached, finished rows leaving."""

from dataclasses import dataclass

import torch


@dataclass
class Generation:
    tokens: list[list[int]]  # the new tokens of each prompt, its eos included when it came
    logps: list[list[float]] | None  # of those tokens, under softmax(logits / temperature) before top-k and top-p

    def add(self, rows, tokens, logps=None, on_token=None):
        """One token more for some of the prompts: all (n,)."""
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            self.tokens[row].append(token)
            if on_token:
                on_token(row, token)
        if logps is not None:
            for row, logp in zip(rows.tolist(), logps.tolist(), strict=True):
                self.logps[row].append(logp)


class KVCache:
    """Keys and values already computed. Row b holds `lengths[b]` tokens, so ragged prompts need no left padding."""

    def __init__(self, config, batch_size, capacity, device, dtype):
        shape = (config.n_layers, 2, batch_size, config.n_kv_heads, capacity, config.head_dim)
        self.kv, self.capacity = torch.zeros(shape, device=device, dtype=dtype), capacity
        self.set_lengths([0] * batch_size)

    def set_lengths(self, lengths):
        """Row b keeps its first lengths[b] tokens. `longest` and `even` spare each step a look at the tensor."""
        self.lengths = torch.tensor(lengths, device=self.kv.device)  # (B,)
        self.longest, self.even = max(lengths), min(lengths) == max(lengths)

    def append(self, T):
        """Make room for T tokens more in every row. Their positions (B, T), or a slice where that says all: the same
        for every row, and no key to hide but those that causal attention hides."""
        first, device = self.longest, self.kv.device
        self.longest = min(first + T, self.capacity)
        if self.even and (T == 1 or first == 0):
            self.lengths = self.lengths + T
            self.positions = slice(first, self.longest)
        else:
            # a row that goes on although the cache is full writes over its last slot
            self.positions = (self.lengths[:, None] + torch.arange(T, device=device)).clamp(max=self.capacity - 1)
            self.lengths = self.positions[:, -1] + 1
        return self.positions

    def write(self, layer, k, v):
        """Store the keys and values of those tokens (B, Hkv, T, D/H); returns all up to the longest row."""
        for cached, new in zip(self.kv[layer], (k, v), strict=True):
            if isinstance(self.positions, slice):
                cached[:, :, self.positions] = new
            else:
                rows = torch.arange(len(new), device=new.device)[:, None]
                cached[rows, :, self.positions] = new.transpose(1, 2).to(cached.dtype)
        return self.kv[layer, :, :, :, : self.longest].unbind()

    def keep(self, rows):
        self.kv, self.lengths = self.kv[:, :, rows], self.lengths[rows]


@torch.no_grad()
def generate(
    model,
    prompts,
    max_new_tokens,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    repetition_penalty=1.0,
    eos_id=2,
    seed=None,
    on_token=None,
    return_logps=False,
):
    """Continue prompts (a list of id lists of any lengths) until eos, max_new_tokens or the end of the context.

    temperature 0 is greedy; top_k 0 and top_p 1 are off; repetition_penalty as in CTRL (arXiv:1909.05858, 4.1).
    on_token(row, id) is called as each token comes. The same seed and prompts give the same tokens.
    """
    limit, device, was_training = model.config.max_seq_len, model.norm.weight.device, model.training
    if not all(0 < len(prompt) < limit for prompt in prompts):
        raise ValueError(f"a prompt must have 1 to {limit - 1} tokens; got {sorted({len(p) for p in prompts})}")
    model.eval()
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    out = Generation([[] for _ in prompts], [[] for _ in prompts] if return_logps else None)
    seen = None if repetition_penalty == 1.0 else prompt_tokens(prompts, model.config.vocab_size, device)
    wide = torch.promote_types(model.norm.weight.dtype, torch.float32)  # for softmax and sums
    h, cache = prefill(model, prompts, max_new_tokens)  # (B, D)
    rows = torch.arange(len(prompts), device=device)  # which prompt each row of the batch still continues
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for _ in range(max_new_tokens):
        logits = penalise(model.head(h).to(wide), seen, repetition_penalty)  # (B, V)
        token = sample(logits, temperature, top_k, top_p, generator)  # (B,)
        live, logps = ~done, None
        if return_logps:
            logps = (logits / (temperature or 1.0)).log_softmax(-1).gather(1, token[:, None])[live, 0]
        out.add(rows[live], token[live], logps, on_token)
        if seen is not None:
            seen.scatter_(1, token[:, None], True)
        # the text, its newest token included, never outgrows max_seq_len, so that token_logps can score it
        done = done | (token == eos_id) | (cache.lengths + 1 >= cache.capacity)
        if done.all():
            break
        if done.sum() * 2 >= len(done):  # finished rows leave when they are half the batch
            alive = (~done).nonzero().squeeze(1)
            cache.keep(alive)
            rows, token, done = rows[alive], token[alive], done[alive]
            seen = seen[alive] if seen is not None else None
        h = model.hidden(token[:, None], cache)[:, -1]
    model.train(was_training)
    return out


def prefill(model, prompts, max_new_tokens):
    """The state after the last token of each prompt (B, D), and a cache that holds them and has room to go on."""
    lengths, device = [len(prompt) for prompt in prompts], model.norm.weight.device
    longest = max(lengths)
    # right padding is harmless: causal attention never looks at it, and decoding overwrites it in the cache
    ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device)  # (B, T)
    capacity = min(longest + max_new_tokens, model.config.max_seq_len)
    cache = KVCache(model.config, len(prompts), capacity, device, model.norm.weight.dtype)
    last = torch.tensor(lengths, device=device) - 1
    h = model.hidden(ids, cache)[torch.arange(len(prompts), device=device), last]
    cache.set_lengths(lengths)
    return h, cache


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


def sample(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Draw one token a row from logits (B, V): (B,)."""
    if temperature == 0:
        return logits.max(-1).indices  # argmax is three times slower on a CPU
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ranked, order = logits.sort(descending=True)
        probs = ranked.softmax(-1)
        # keep the smallest set whose probability reaches top_p: drop a token if those before it already do
        drop = probs.cumsum(-1) - probs >= top_p
        drop[:, 0] = False  # top_p 0 too leaves the likeliest
        ranked = ranked.masked_fill(drop, -torch.inf)
        logits = torch.empty_like(ranked).scatter(1, order, ranked)
    # inverse CDF: one uniform number a row; on a CPU torch.multinomial draws one a token, which is slower
    cdf = logits.softmax(-1).cumsum(-1)  # (B, V)
    if not cdf[:, -1].isfinite().all():
        raise ValueError("cannot sample: the logits are not finite")
    # the last of a row is 1 but for rounding
    draw = torch.rand(len(cdf), 1, generator=generator, device=cdf.device) * cdf[:, -1:]
    return torch.searchsorted(cdf, draw, right=True).squeeze(1)
