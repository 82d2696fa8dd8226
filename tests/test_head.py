"""head.py: loss, log-probabilities and their gradients, a chunk of rows at a time, against the plain formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from models import assert_same_gradients, gradients, random_ids, shapes, tiny_model
from tiny import assert_same, float64
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import head
from dataset.batches import kept
from head import UNCACHED, LinearCrossEntropy, LinearLogps, fused_log_softmax_chunk, log_softmax_chunk
from model import Llama


def of_chunks(h, W, targets, weights, temperature):
    """The loss, its gradients, the log-probabilities and theirs, all as float64."""
    found = []
    for apply in (
        lambda h, W: LinearCrossEntropy.apply(h, W, targets, weights),
        lambda h, W: LinearLogps.apply(h, W, targets, temperature),
    ):
        h, W = (x.detach().requires_grad_() for x in (h, W))
        out = apply(h, W)
        (out * weights.to(out.dtype) if out.dim() else out).sum().backward()
        found += [out.detach(), h.grad, W.grad]
    return [x.double() for x in found]


def test_products_of_bfloat16_with_float32_sums_are_as_exact_as_their_operands():
    """What a GPU does under autocast, here by products of the same rounded numbers. Against the same in float64.

    The operands h and W are given in bfloat16, so losses and log-probabilities only have float32's error. Gradients
    are products with softmax - onehot rounded to bfloat16, 2^-9 each and partly cancelling, and are rounded again.
    """
    torch.manual_seed(0)
    h, W = (torch.randn(300, 64).bfloat16(), torch.randn(500, 64).bfloat16())
    targets, weights = torch.randint(0, 500, (300,)), torch.rand(300) / 300
    logits = h.double() @ W.double().T
    targets[:100] = logits[:100].argmax(1)  # well predicted, where softmax - onehot nearly vanishes
    found = of_chunks(h, W, targets, weights, 1.0)
    expected = of_chunks(h.double(), W.double(), targets, weights.double(), 1.0)
    for name, mine, exact in zip(("loss", "h", "W", "logps", "h", "W"), found, expected, strict=True):
        bound = 1e-5 if name in ("loss", "logps") else 2**-7
        assert (mine - exact).norm() <= bound * exact.norm(), name
    confident = logits.log_softmax(1).gather(1, targets[:, None]).squeeze(1) > -0.01
    assert confident.sum() > 10  # rounding p to bfloat16 would leave nothing of 1 - p below 2^-9
    mine, exact = (g[confident] for g in (found[1], expected[1]))
    assert (mine - exact).norm() <= 2**-6 * exact.norm()


@pytest.mark.parametrize("chunk", [log_softmax_chunk, fused_log_softmax_chunk])
def test_columns_that_fill_up_the_vocabulary_have_no_probability(chunk):
    logits, targets = torch.randn(5, 12, dtype=torch.float64), torch.tensor([0, 3, 9, 9, 4])
    expected = logits[:, :10].log_softmax(-1)
    picked, grad = chunk(logits.clone(), targets, 10, torch.float64)
    assert_same(picked, expected.gather(1, targets[:, None]))
    assert_same(grad[:, :10], expected.exp() - F.one_hot(targets, 10))
    assert not grad[:, 10:].any()
    assert_same(chunk(logits.clone(), targets, 10), picked)


def loss_reference(model, ids, targets, weights=None):
    nll = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), reduction="none")  # 0 where the target is -100
    return nll.sum() / (targets != -100).sum() if weights is None else (nll * weights.flatten()).sum()


@float64
@shapes
@pytest.mark.parametrize("weighted", [False, True], ids=["mean", "weights"])
@pytest.mark.parametrize("size", [(1, 20), (3, 100), (2, 128)], ids=["one chunk", "odd rows", "two whole chunks"])
def test_chunked_loss_equals_cross_entropy(shape, weighted, size):
    model, ids, targets = tiny_model(**shape), random_ids(*size), random_ids(*size, seed=2)
    weights = torch.rand(size) * (torch.rand(size) < 0.8) / math.prod(size) if weighted else None
    if size != (2, 128):
        targets[0, 1:4] = -100
    expected = loss_reference(model, ids, targets, weights)
    expected_gradients = gradients(model, expected)
    loss = model(ids, targets, weights)
    assert_same(loss, expected)
    assert_same_gradients(gradients(model, 3 * loss), {name: 3 * g for name, g in expected_gradients.items()})
    with torch.no_grad():  # the path of evaluation
        assert_same(model(ids, targets, weights), expected)


@pytest.mark.parametrize("weights", [None, torch.zeros(2, 9), torch.ones(2, 9)])
def test_loss_without_counted_targets_is_zero(weights):
    model, ids = tiny_model(), random_ids(2, 9)
    targets = torch.full((2, 9), -100)
    loss = model(ids, targets, weights)
    assert loss.item() == 0 and not any(g.any() for g in gradients(model, loss).values())
    with torch.no_grad():
        assert model(ids, targets, weights).item() == 0


@float64
def test_gradients_do_not_depend_on_the_micro_batches():
    model, ids, targets = tiny_model(n_kv_heads=2), random_ids(6, 50), random_ids(6, 50, seed=2)
    mask = (torch.rand(6, 50) < torch.linspace(0.1, 0.9, 6)[:, None]).double()  # rows of very unequal length
    whole = gradients(model, model(ids, targets, mask / mask.sum()))
    parts = zip(*(x.split([1, 2, 3]) for x in (ids, targets, mask / mask.sum())), strict=True)
    assert_same_gradients(gradients(model, sum(model(*part) for part in parts)), whole)
    assert_same_gradients(gradients(model, model(ids, targets.masked_fill(mask == 0, -100))), whole)


@float64
@shapes
@pytest.mark.parametrize("masked", [False, True], ids=["all", "mask"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logps_equal_log_softmax(shape, masked, temperature):
    model, ids = tiny_model(**shape), random_ids(3, 101)
    mask = (torch.rand(3, 100) < 0.5).float() if masked else None
    if masked:
        mask[1] = 0
    logps = (model(ids)[:, :-1] / temperature).log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    expected = logps if mask is None else logps * mask
    coefficients = torch.randn(3, 100)  # another gradient for every token
    expected_gradients = gradients(model, (expected * coefficients).mean())
    actual = model.token_logps(ids, temperature, mask)
    assert_same(actual, expected)
    assert_same_gradients(gradients(model, (actual * coefficients).mean()), expected_gradients)
    with torch.no_grad():
        assert_same(model.token_logps(ids, temperature, mask), expected)


@float64
@pytest.mark.parametrize("multiple", [1, 8, 500])
def test_only_kept_positions_are_computed_and_nothing_changes(multiple, monkeypatch):
    model, ids, targets = tiny_model(), random_ids(3, 41), random_ids(3, 40, seed=2)
    mask = (torch.rand(3, 40) < 0.4).double()
    mask[:, -1] = torch.tensor([0, 1, 0])  # the last position is a neighbour of what fills up
    keep, rows, logps = kept(mask, multiple), [], Llama._logps
    monkeypatch.setattr(Llama, "_logps", lambda self, h, *args: (rows.append(len(h)), logps(self, h, *args))[1])
    weights, coefficients = mask * torch.rand(3, 40), torch.randn(3, 40)
    for call in (
        lambda **keep: model(ids[:, :-1], targets, weights, **keep),
        lambda **keep: model(ids[:, :-1], targets.masked_fill(mask == 0, -100), **keep),
        lambda **keep: (model.token_logps(ids, 0.7, mask, **keep) * coefficients).sum(),
    ):
        expected = call()
        expected_gradients = gradients(model, expected)
        assert_same(call(keep=keep), expected)
        assert_same_gradients(gradients(model, call(keep=keep)), expected_gradients)
        rows.clear()
        with torch.no_grad():
            assert_same(call(keep=keep), expected)
        assert rows == [-(-int(mask.sum()) // multiple) * multiple]


def test_token_logps_of_nothing():
    model, ids = tiny_model(), random_ids(2, 9)
    assert model.token_logps(ids[:, :1]).shape == (2, 0)
    logps = model.token_logps(ids, mask=torch.zeros(2, 8))
    assert not logps.any() and not any(g.any() for g in gradients(model, logps.sum()).values())


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel] + [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)])
        return out


@pytest.mark.parametrize("tied", [True, False])
def test_training_never_holds_all_logits(tied):
    model = tiny_model(vocab_size=5008, n_layers=1, max_seq_len=129, tied=tied)
    ids = random_ids(32, 129, vocab_size=5008)  # 4,096 rows
    with LargestTensor() as largest:
        logits = model(ids[:, :-1])
    assert largest.numel == logits.numel()  # the measurement sees them where they are made
    with LargestTensor() as largest:
        model(ids[:, :-1], ids[:, 1:]).backward()
        model.token_logps(ids).mean().backward()
        with torch.no_grad():
            model(ids[:, :-1], ids[:, 1:])
            model.token_logps(ids)
    assert 0 < largest.numel <= logits.numel() / 8


@float64
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("amd", [True, False])
@pytest.mark.parametrize("shape", [(1,), (2,), (8,), (9,), (1, 1), (2, 3), (0,)], ids=str)
def test_the_head_of_a_large_vocabulary_is_the_same_for_few_rows(tied, amd, shape, monkeypatch):
    model = tiny_model(vocab_size=2**17, dim=32, n_layers=1, n_heads=2, n_kv_heads=1, tied=tied)
    h = torch.randn(*shape, 32, generator=torch.Generator().manual_seed(0))
    assert model.head_weight.numel() == UNCACHED
    monkeypatch.setattr(head, "is_amd", lambda: amd)
    with torch.no_grad():
        found = model.head(h)
    assert found.is_contiguous()
    torch.testing.assert_close(found, h @ model.head_weight.detach().T, atol=1e-12, rtol=1e-12)
