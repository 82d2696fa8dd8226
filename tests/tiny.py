"""Tiny models and batches that the tests of every stage use, and how closely they compare."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from packing import pack_examples

from alignment.rollout import Rollout
from common.distributed import Env
from dataset.batches import kept, pad_batch
from dataset.examples import Examples
from model import Llama, ModelConfig
from tokenizer import Example

ENV = Env(0, 1, torch.device("cpu"))
VOCAB, EOS, TEMPERATURE = 40, 2, 0.7
float64 = pytest.mark.usefixtures("float64")


def assert_same(found, expected):
    """Equal but for the order of sums, in float64."""
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    shape = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=VOCAB, max_seq_len=32)
    model = Llama(ModelConfig(**shape | changes))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(std=0.15)  # at 0.02 every distribution is flat and every comparison easy
    return model


def conversations(*sizes, seed=0):
    """[(ids, loss_mask)]: prompts and answers of the given (question, answer) lengths."""
    rng = np.random.default_rng(seed)
    return [(rng.integers(3, VOCAB, q + a).tolist(), [0] * q + [1] * a) for q, a in sizes]


def examples(rows):
    return Examples(pack_examples([Example(*row) for row in rows], VOCAB))


def gradients(*models):
    """Every gradient, flat; the models are left without."""
    flat = torch.cat([p.grad.flatten() for model in models for p in model.parameters()])
    for model in models:
        model.zero_grad()
    return flat


def widen(batch, n):
    """A padded batch with n more columns of padding, which are no zeros."""
    loss_mask = F.pad(batch["loss_mask"], (0, n))
    return batch | {"ids": F.pad(batch["ids"], (0, n), value=7), "loss_mask": loss_mask, "keep": kept(loss_mask[:, 1:])}


def ragged(*sizes, seed=0):
    rows = conversations(*sizes, seed=seed)
    batch = pad_batch(rows)
    replies = [ids[len(mask) - sum(mask) :] for ids, mask in rows]
    ended = torch.tensor([reply[-1] == EOS for reply in replies])
    return Rollout(batch["ids"], batch["lengths"], batch["loss_mask"][:, 1:], ended, replies)
