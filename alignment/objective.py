"""Arithmetic over real tokens that PPO and GRPO share: means, the clipped loss, and what is measured beside it.

With an `env` a mean is one over all ranks, without one over this rank's entries alone.
"""

import torch

from common import distributed


def masked_mean(x, mask, env=None):
    """Mean over the entries where mask is 1, whatever the padding: scalar."""
    total, n = distributed.summed(torch.stack([(x * mask).sum(), mask.sum()]), env)
    return total / n


def wins(a, b):
    """1 where a is above b, 0 where it is below; a tie counts half."""
    return torch.heaviside(a - b, torch.full_like(a, 0.5))


def entropy_bonus(logps, mask, env=None):
    """An advantage of each token whose policy gradient is that of the entropy of the tokens' distributions: (B, T).

    grad H = -E[(log p - b) grad log p] for any baseline b, here the mean of log p; only the distributions at the states
    that were met count, so a longer reply earns nothing.
    """
    return (masked_mean(logps, mask, env) - logps) * mask


def policy_loss(logps, old_logps, advantages, weights, cliprange):
    """PPO's clipped surrogate (Schulman et al., arXiv:1707.06347, eq. 7), negated; all (B, T), advantages or (B, 1).

    Each entry is multiplied by its weight and all are summed, so that micro-batches add up: weights of 1 / (real tokens
    of the whole minibatch) make it a mean over tokens.
    """
    ratio = (logps - old_logps).exp()
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange)
    return (torch.max(-advantages * ratio, -advantages * clipped) * weights).sum()


@torch.no_grad()
def ratio_stats(logps, old_logps, weights, cliprange):
    """How far the policy went from the one that sampled, by name; the means are sums with weights as above."""
    log_ratio = logps - old_logps
    ratio = log_ratio.exp()
    return {
        "approx_kl": ((ratio - 1 - log_ratio) * weights).sum(),  # k3 of http://joschu.net/blog/kl-approx.html
        "clipfrac": (((ratio - 1).abs() > cliprange) * weights).sum(),
        "ratio": (ratio * weights).sum(),
        "ratio_max": torch.where(weights > 0, ratio, 0).max(),
    }


def add_up(parts, env=None):
    """Sums, by name, of dicts of scalar tensors, then their means over the ranks; of a name that ends in _max the
    largest. Floats, for which the host waits once."""
    table = torch.stack([torch.stack(list(part.values())) for part in parts]).detach()  # (parts, names)
    ranks = distributed.gathered(torch.stack([table.sum(0), table.amax(0)]), env)  # (ranks, 2, names)
    sums, largest = torch.stack([ranks[:, 0].mean(0), ranks[:, 1].amax(0)]).cpu().tolist()
    pairs = zip(parts[0], sums, largest, strict=True)
    return {name: most if name.endswith("_max") else total for name, total, most in pairs}


def average(parts):
    """Means, by name, of dicts of floats; of a name that ends in _max the largest."""
    columns = {name: [part[name] for part in parts] for name in parts[0]}
    return {name: max(some) if name.endswith("_max") else sum(some) / len(some) for name, some in columns.items()}
