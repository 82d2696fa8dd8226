"""Replies sampled from a policy, what models make of them, and what RL watches in them."""

import sys
from dataclasses import dataclass

import torch
from tqdm import tqdm

from alignment.objective import add_up, masked_mean
from common import distributed
from common.metrics import distinct_2
from dataset.batches import keep_multiple, kept, move, pad_batch


@dataclass
class Rollout:
    """B prompts with their replies, padded on the right; token-level tensors are aligned with model.token_logps(ids).

    Entry t of a (B, T-1) tensor belongs to the choice of ids[:, t+1] after ids[:, :t+1]. The tensors stay on the CPU,
    where they are made and chosen from; `rows` brings some to the device of the models.
    """

    ids: torch.Tensor  # (B, T)
    lengths: torch.Tensor  # (B,) tokens of prompt and reply
    mask: torch.Tensor  # (B, T-1) 1.0 where ids[:, t+1] is a reply token, its eos included
    ended: torch.Tensor  # (B,) whether eos came
    replies: list[list[int]]
    fields: list[dict] | None = None  # of the prompts' rows, for reward functions
    device: torch.device = torch.device("cpu")
    keep: torch.Tensor | None = None  # of `rows`: the flat positions in mask that count, for token_logps

    def rows(self, index):
        """The same for some rows (a list or tensor of indices), cut to their longest, on the device."""
        T = int(self.lengths[index].max())
        mask = self.mask[index, : T - 1]
        chosen = self.ids[index, :T], self.lengths[index], mask, self.ended[index]
        keep = kept(mask, keep_multiple(self.device))
        *chosen, keep = move((*chosen, keep), self.device)
        replies, fields = (rows and [rows[i] for i in index] for rows in (self.replies, self.fields))
        return Rollout(*chosen, replies, fields, self.device, keep)

    def by_length(self, index, size):
        """Some rows (a tensor of indices) in parts of at most `size`, each of similar length: little is padding."""
        return index[self.lengths[index].argsort(stable=True)].split(size)


def rollout(model, prompts, max_new_tokens, temperature=1.0, eos_id=2, seed=None, top_p=1.0, dtype=None):
    """Sample one reply to each prompt (ids, as a Prompt or a list) from softmax(logits / temperature).

    Training leaves top_p at 1; dtype as for generate.
    """
    sampling = dict(temperature=temperature, top_p=top_p, eos_id=eos_id, seed=seed, dtype=dtype)
    replies = model.generate(prompts, max_new_tokens, **sampling).tokens
    batch = pad_batch([(p + r, [0] * len(p) + [1] * len(r)) for p, r in zip(prompts, replies, strict=True)])
    ended = torch.tensor([r[-1] == eos_id for r in replies])
    fields = [getattr(prompt, "fields", {}) for prompt in prompts]
    mask, device = batch["loss_mask"][:, 1:], model.norm.weight.device
    return Rollout(batch["ids"], batch["lengths"], mask, ended, replies, fields, device)


@torch.no_grad()
def in_batches(function, batch, batch_size=32):
    """function(Rollout) -> (b, t) or (b,) over rows of similar length, joined to (B, T-1) or (B,) in the old order."""
    indices = batch.by_length(torch.arange(len(batch.ids)), batch_size)
    parts = []
    for index in indices:
        part = function(batch.rows(index))
        if part.dim() == 2:
            part = torch.nn.functional.pad(part, (0, batch.ids.size(1) - 1 - part.size(1)))
        parts.append(part)
    joined = torch.cat(parts)
    (back,) = move([torch.cat(indices).argsort()], joined.device)
    return joined[back]


def sequence_scores(model, ids, lengths):
    """A reward model's score at the last real token of each row, ids (B, T), lengths (B,): (B,)."""
    return model.values(ids).gather(1, lengths[:, None] - 1).squeeze(1)


@torch.no_grad()
def sequence_kl(policy, reference, batch, temperature=1.0, batch_size=32):
    """log policy - log reference of each reply, summed over its tokens: (B,); its mean estimates the KL in nats."""

    def difference(rows):
        logps = policy.token_logps(rows.ids, temperature, rows.mask, rows.keep)
        return logps - reference.token_logps(rows.ids, temperature, rows.mask, rows.keep)

    return in_batches(difference, batch, batch_size).sum(1)


def reply_logps(model, batch, env, config):
    """log p of each reply token at the sampling temperature: (B, T-1)."""

    def logps(rows):
        with env.autocast():  # as in the updates, so that the first ratio is 1 in bfloat16 too
            return model.token_logps(rows.ids, config["temperature"], rows.mask, rows.keep)

    return in_batches(logps, batch, config["micro_batch_size"])


def reply_metrics(batch, scores, logps, ref_logps, tokenizer, env=None):
    """What a step's replies were like before its updates; means over real tokens or over replies, of all ranks.

    Each rank has as many replies. ref_logps None: the KL to the reference is nan.
    """
    texts = distributed.joined([tokenizer.decode(reply) for reply in batch.replies], env)
    mask, ended = batch.mask.to(logps.device), batch.ended.to(logps)
    kl = torch.full_like(scores, torch.nan) if ref_logps is None else ((logps - ref_logps) * mask).sum(1)
    means = {
        "score": scores.mean(),
        "kl": kl.mean(),  # nats per reply
        "entropy": -masked_mean(logps, mask, env),  # nats per token, estimated on its own samples
        "length": mask.sum(1).mean(),
        "eos_rate": ended.mean(),
    }
    return add_up([means], env) | {"distinct_2": distinct_2(texts, sum(map(len, texts)))}


class Watch:
    """Warns on stderr of what spoils a run of RL, once each time that it begins.

    `state` is all that it remembers, for a checkpoint to keep.
    """

    STEPS = 10  # the KL of a step is an estimate, which may be negative by chance

    def __init__(self, state=None):
        self.state = state or dict(negative=0, distinct_2=None, warned=[])

    def look(self, step, metrics):
        """metrics as from reply_metrics, nan where something could not be measured."""
        state, kl, length, variety = self.state, metrics["kl"], metrics["length"], metrics["distinct_2"]
        if state["distinct_2"] is None and variety > 0:
            state["distinct_2"] = variety
        first = state["distinct_2"] or 0.0
        state["negative"] = state["negative"] + 1 if kl < 0 else 0
        self._warn(
            "kl", state["negative"] >= self.STEPS,
            f"step {step}: the mean KL to the reference was negative {state['negative']} steps in a row, now {kl:.3g} "
            "nats per reply: do sampling and log-probabilities disagree?",
        )  # fmt: skip
        self._warn(
            "silent", length <= 2,
            f"step {step}: replies have {length:.2g} tokens in the mean, <eos> included: the policy has gone silent",
        )  # fmt: skip
        self._warn(
            "alike", variety < first / 2,
            f"step {step}: distinct-2 of the replies is {variety:.2f}, below half of the first step's {first:.2f}: "
            "they have become alike; a larger kl_coef keeps them apart",
        )  # fmt: skip

    def _warn(self, name, holds, message):
        warned = self.state["warned"]
        if holds and name not in warned:
            tqdm.write(f"warning: {message}", file=sys.stderr)
            warned.append(name)
        elif not holds and name in warned:
            warned.remove(name)
