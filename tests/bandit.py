"""A policy of one token whose optimum is known, and prompts for policies of more."""

from types import SimpleNamespace

import torch
from tiny import ENV, TEMPERATURE

from alignment.rollout import Rollout

PROMPTS = [[5, 6, 1], [7, 1], [8, 9, 10, 11, 1], [12, 13, 14, 1], [15, 1], [16, 17, 1]]


def logps_of(model, rows):
    return model.token_logps(rows.ids, TEMPERATURE, rows.mask, rows.keep)


class Bandit(torch.nn.Module):
    """A policy whose replies are one token after the prompt [0], whatever the state; a value of that state."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.value = (torch.nn.Parameter(x) for x in (logits.clone(), torch.zeros(1)))

    def token_logps(self, ids, temperature, mask, keep):
        return (self.logits / temperature).log_softmax(0)[ids[:, 1:]]

    def values(self, ids):
        return self.value.expand(ids.shape)

    def sample(self, n, generator):
        tokens = torch.multinomial(self.logits.detach().softmax(0), n, replacement=True, generator=generator)
        ids = torch.stack([torch.zeros_like(tokens), tokens], 1)
        return Rollout(ids, torch.full((n,), 2), torch.ones(n, 1), torch.ones(n) > 0, [[0]] * n)


BANDIT_SCORES, BANDIT_REFERENCE, BETA = torch.tensor([1.0, 0, -1, 0.5, 0.8]), torch.tensor([-2.0, 0.5, 1, 0, -1]), 0.5


def play(step_of, n=480, steps=300, lr=0.03, entropy_coef=0.0):
    """Train a Bandit by step_of(stage, policy, batch, scores, logps, ref_logps, generator) and check where it ends.

    The optimum of E[score] - beta KL is ref * exp(score / beta) / Z; with c times the entropy as well, that of the sum
    is (ref^beta * exp(score))^(1 / (beta + c)) / Z.
    """
    policy, generator = Bandit(BANDIT_REFERENCE), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(policy.parameters(), lr)

    def apply(step, loss):
        optimizer.step()
        optimizer.zero_grad()
        return 1.0

    stage = SimpleNamespace(env=ENV, clip_and_step=apply)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        batch = policy.sample(n, generator)
        tokens = batch.ids[:, 1:]
        logps, ref_logps = policy.logits.detach().log_softmax(0)[tokens], BANDIT_REFERENCE.log_softmax(0)[tokens]
        step_of(stage, policy, batch, BANDIT_SCORES[tokens[:, 0]], logps, ref_logps, generator)
    expected = ((BETA * BANDIT_REFERENCE + BANDIT_SCORES) / (BETA + entropy_coef)).softmax(0)
    torch.testing.assert_close(policy.logits.detach().softmax(0), expected, rtol=0.02, atol=0)
    assert (expected / BANDIT_REFERENCE.softmax(0)).max() > 2
