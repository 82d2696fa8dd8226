"""Arithmetic over real tokens that PPO and GRPO share: means, the clipped loss, and what is measured beside it."""

import torch


def masked_mean(x, mask):
    """Mean over the entries where mask is 1, whatever the padding: scalar."""
    return (x * mask).sum() / mask.sum()


def entropy_bonus(logps, mask):
    """An advantage of each token whose policy gradient is that of the entropy of the tokens' distributions: (B, T).

    grad H = -E[(log p - b) grad log p] for any baseline b, here the mean of log p; only the distributions at the states
    that were met count, so a longer reply earns nothing.
    """
    return (masked_mean(logps, mask) - logps) * mask


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
        "ratio_max": ratio[weights > 0].max(),
    }


def add_up(parts):
    """Sums, by name, of dicts of numbers; of a name that ends in _max the largest."""
    return {name: (max if name.endswith("_max") else sum)(float(part[name]) for part in parts) for name in parts[0]}


def average(parts):
    """Means, by name, of dicts of numbers; of a name that ends in _max the largest."""
    return {name: total if name.endswith("_max") else total / len(parts) for name, total in add_up(parts).items()}
