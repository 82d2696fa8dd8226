"""Replies sampled from a policy, and the arithmetic over their real tokens that RL, DPO and evaluation share."""

from dataclasses import dataclass

import torch

from common.config import UserError
from dataset import pad_batch


@dataclass
class Rollout:
    """B prompts with their replies, padded on the right; token-level tensors are aligned with model.token_logps(ids).

    Entry t of a (B, T-1) tensor belongs to the choice of ids[:, t+1] after ids[:, :t+1].
    """

    ids: torch.Tensor  # (B, T)
    lengths: torch.Tensor  # (B,) tokens of prompt and reply
    mask: torch.Tensor  # (B, T-1) 1.0 where ids[:, t+1] is a reply token, its eos included
    ended: torch.Tensor  # (B,) whether eos came
    replies: list[list[int]]

    def rows(self, index):
        """The same for some rows (a list or tensor of indices), cut to their longest."""
        lengths = self.lengths[index]
        T = int(lengths.max())
        replies = [self.replies[i] for i in index]
        return Rollout(self.ids[index, :T], lengths, self.mask[index, : T - 1], self.ended[index], replies)


def rollout(model, prompts, max_new_tokens, temperature=1.0, eos_id=2, seed=None, top_p=1.0):
    """Sample one reply to each prompt (id lists) from softmax(logits / temperature); training leaves top_p at 1."""
    replies = model.generate(
        prompts, max_new_tokens, temperature=temperature, top_p=top_p, eos_id=eos_id, seed=seed
    ).tokens
    rows = [(p + r, [0] * len(p) + [1] * len(r)) for p, r in zip(prompts, replies, strict=True)]
    device = model.norm.weight.device
    batch = {name: tensor.to(device) for name, tensor in pad_batch(rows).items()}
    ended = torch.tensor([r[-1] == eos_id for r in replies], device=device)
    return Rollout(batch["ids"], batch["lengths"], batch["loss_mask"][:, 1:], ended, replies)


def masked_mean(x, mask):
    """Mean over the entries where mask is 1, whatever the padding: scalar."""
    return (x * mask).sum() / mask.sum()


def masked_whiten(x, mask):
    """x with mean 0 and variance 1 over the entries where mask is 1; zero elsewhere."""
    centred = (x - masked_mean(x, mask)) * mask
    return centred * torch.rsqrt(masked_mean(centred.square(), mask) + 1e-8)


@torch.no_grad()
def in_batches(function, batch, batch_size=32):
    """function(Rollout) -> (b, t) or (b,) over rows of similar length, joined to (B, T-1) or (B,) in the old order."""
    order = batch.lengths.argsort()
    parts = []
    for index in order.split(batch_size):
        part = function(batch.rows(index))
        if part.dim() == 2:
            part = torch.nn.functional.pad(part, (0, batch.ids.size(1) - 1 - part.size(1)))
        parts.append(part)
    joined = torch.cat(parts)
    out = torch.empty_like(joined)
    out[order] = joined
    return out


def sequence_scores(model, ids, lengths):
    """A reward model's score at the last real token of each row, ids (B, T), lengths (B,): (B,)."""
    return model.values(ids).gather(1, lengths[:, None] - 1).squeeze(1)


@torch.no_grad()
def sequence_kl(policy, reference, batch, temperature=1.0, batch_size=32):
    """log policy - log reference of each reply, summed over its tokens: (B,); its mean estimates the KL in nats."""

    def difference(rows):
        logps = policy.token_logps(rows.ids, temperature, rows.mask)
        return logps - reference.token_logps(rows.ids, temperature, rows.mask)

    return in_batches(difference, batch, batch_size).sum(1)


def snownlp_judge():
    """text -> 1 positive, 0 negative, -1 nothing to tell, by SnowNLP's own classifier."""
    try:
        from snownlp import SnowNLP
    except ImportError:
        raise UserError("replies are judged by the package snownlp: pip install snownlp") from None

    def polarity(text):
        try:
            return int(SnowNLP(text).sentiments > 0.5) if text.strip() else -1
        except Exception:  # whatever it makes of text that an untrained model may write
            return -1

    return polarity
