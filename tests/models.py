"""A tiny model that is far from its initial weights, in four shapes, and its gradients by name."""

import pytest
import torch
from tiny import assert_same

from model import Llama, ModelConfig

SHAPES = {"MHA": dict(), "GQA": dict(n_kv_heads=2), "untied": dict(tied=False), "MQA": dict(n_kv_heads=1, tied=False)}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def tiny_model(**changes):
    torch.manual_seed(0)
    shape = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=4, vocab_size=97, max_seq_len=128)
    model = Llama(ModelConfig(**shape | changes)).eval()
    with torch.no_grad():
        for p in model.parameters():  # far from the initial weights, so that no distribution is flat and no norm is 1
            p.normal_(std=0.25) if p.dim() == 2 else p.uniform_(0.5, 1.5)
    return model


def random_ids(*size, vocab_size=97, seed=1):
    return torch.randint(3, vocab_size, size, generator=torch.Generator().manual_seed(seed))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(actual, expected):
    empty = [name for name, g in expected.items() if g.abs().max() < 1e-4]
    assert not empty, f"nothing to compare in {empty}"
    assert_same(actual, expected)
