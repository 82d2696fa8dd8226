"""lowbit/gptq.py: int4 by hand and GPTQ against an independent, slow one; quantize.py: what it is calibrated on."""

import numpy as np
import pytest
import torch
from packing import pack

import quantize
from common import checkpoint
from common.checkpoint import CheckpointError
from common.config import ConfigError
from dataset.formats import BinWriter, DataError, save_meta, save_pkl, token_dtype
from lowbit import layers
from lowbit.gptq import SHRINK, gptq, quantize_int4
from model import Llama, ModelConfig


def dequantized(q, scale, zero, n_columns):
    """(N, K) float64, number by number."""
    size = q.size(1) // scale.size(1)
    w = torch.empty(q.size(0), n_columns, dtype=torch.float64)
    for i in range(q.size(0)):
        for j in range(n_columns):
            w[i, j] = (int(q[i, j]) - int(zero[i, j // size])) * float(scale[i, j // size])
    return w


# round to nearest


def test_a_grid_with_its_own_zero_by_hand():
    weight = torch.tensor([[-0.75, 3.0, 0.3, 1.0, 1.5, 3.75, 0.1, 0.9, -3.75, -1.0], [0.0] * 8 + [3.0, -0.75]])
    q, scale, zero = quantize_int4(weight, 4, symmetric=False)  # ten columns: two of the third group are padding
    assert (q.dtype, scale.dtype, zero.dtype) == (torch.uint8, torch.bfloat16, torch.uint8)
    assert scale.tolist() == [[0.25, 0.25, 0.25], [1.0, 1.0, 0.25]]
    assert zero.tolist() == [[3, 0, 15], [0, 0, 3]]
    assert q.tolist() == [[0, 15, 4, 7, 6, 15, 0, 4, 0, 11, 15, 15], [0] * 8 + [15, 0, 3, 3]]


def test_a_symmetric_grid_by_hand():
    weight = torch.tensor([[3.75, -3.75, 0.3, -1.0, 0.0, -7.5, 7.4, 0.6, 0.0, 0.0]])
    q, scale, zero = quantize_int4(weight, 4, symmetric=True)
    assert scale.tolist() == [[0.5, 1.0, 1.0]] and zero.tolist() == [[8, 8, 8]]
    # 3.75 is half a step beyond the last number, -3.75 half a step from the first two and rounded to even
    assert q.tolist() == [[15, 0, 9, 6, 8, 0, 15, 9, 8, 8, 8, 8]]


def test_the_scale_is_rounded_before_the_numbers_are_found():
    weight = torch.tensor([[0.0, 3.0]])
    q, scale, _ = quantize_int4(weight, 2, symmetric=False)
    # 0.2 is no bfloat16: the nearest is 205/1024; 3.0 is 14.985 steps of it
    assert scale.item() == 205 / 1024 and q.tolist() == [[0, 15]]


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e6])
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_weight_goes_to_the_nearest_number_of_its_grid(size, symmetric):
    weight = size * torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    q, scale, zero = quantize_int4(weight, 32, symmetric)
    steps = (weight.unflatten(1, (2, 32)) / scale.float()[..., None]).double()  # (N, groups, 32)
    numbers = torch.arange(16.0, dtype=torch.float64) - zero[..., None].double()  # (N, groups, 16)
    nearest = (steps[..., None] - numbers[:, :, None]).abs().amin(-1)
    found = steps - (q.unflatten(1, (2, 32)).double() - zero[..., None])
    torch.testing.assert_close(found.abs(), nearest, atol=1e-5, rtol=0)
    assert found.abs().max() <= 1.0 and q.min() == 0 and q.max() == 15


# GPTQ


def inputs_of(n_columns, n=400, seed=0, dead=()):
    """Correlated inputs (K, n), some much larger than others."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(n_columns, n_columns, generator=g, dtype=torch.float64)
    x = (mix / n_columns**0.5 + 0.3 * torch.eye(n_columns)) @ torch.randn(
        n_columns, n, generator=g, dtype=torch.float64
    )
    x = x + torch.randn(1, n, generator=g, dtype=torch.float64)
    x *= (1.5 * torch.randn(n_columns, 1, generator=g, dtype=torch.float64)).exp()
    x[list(dead)] = 0
    return x


def hessian_of(x):
    return (2 * x @ x.T / x.size(1)).float()


def lost(weight, result, x):
    """||(W - Q) X||"""
    return ((weight.double() - dequantized(*result, weight.size(1))) @ x).norm().item()


def slow_grid(values, symmetric, importance):
    """(scale, zero) for a group, from a list of numbers; importance None: of the whole range."""
    best = None
    for share in [1.0] if importance is None else SHRINK:
        low, high = min(0.0, min(values)) * share, max(0.0, max(values)) * share
        if symmetric:
            high = max(high, -low)
            low = -high
        scale = torch.tensor((high - low) / 15).bfloat16().item() or 1.0
        zero = 8 if symmetric else min(15, max(0, round(-low / scale)))
        error = sum(
            (v - (slow_round(v, scale, zero) - zero) * scale) ** 2 * (1.0 if importance is None else importance[i])
            for i, v in enumerate(values)
        )
        if best is None or error < best[0]:
            best = error, scale, zero
    return best[1:]


def slow_round(value, scale, zero):
    return min(15, max(0, round(value / scale + zero)))


def slow_gptq(weight, hessian, group_size, symmetric, damping, act_order, search):
    """Optimal brain quantization in a fixed order: an explicit inverse of the remaining Hessian for every column.

    In float64. Returns q, scale, zero with whole groups of columns, as gptq.
    """
    w, h = weight.double().clone(), hessian.double().clone()
    n_rows, n_columns = w.shape
    diagonal = h.diagonal().clone()
    for j in range(n_columns):
        if diagonal[j] == 0:
            h[j, j] = diagonal[diagonal > 0].mean()
    h += damping * h.diagonal().mean() * torch.eye(n_columns)
    n_groups = -(-n_columns // group_size)
    q = torch.zeros(n_rows, n_groups * group_size, dtype=torch.uint8)
    scale, zero = torch.ones(n_rows, n_groups, dtype=torch.float64), torch.zeros(n_rows, n_groups, dtype=torch.int64)

    def find_grids(g):
        columns = range(g * group_size, min((g + 1) * group_size, n_columns))
        weights = [diagonal[j].item() for j in columns] if search else None
        for i in range(n_rows):
            scale[i, g], zero[i, g] = slow_grid([w[i, j].item() for j in columns], symmetric, weights)

    remaining = list(range(n_columns))
    if act_order:
        remaining.sort(key=lambda j: -diagonal[j].item())
        for g in range(n_groups):
            find_grids(g)
    while remaining:
        j, g = remaining[0], remaining[0] // group_size
        if not act_order and j % group_size == 0:
            find_grids(g)
        inverse = torch.linalg.inv(h[remaining][:, remaining])
        for i in range(n_rows):
            q[i, j] = slow_round(w[i, j].item(), scale[i, g].item(), zero[i, g].item())
            error = w[i, j] - (int(q[i, j]) - zero[i, g]) * scale[i, g]
            w[i, remaining] -= error / inverse[0, 0] * inverse[0]
        remaining.pop(0)
    for j in range(n_columns, q.size(1)):
        q[:, j] = zero[:, j // group_size].to(torch.uint8)
    return q, scale, zero


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    "n_columns, group_size, block, dead",
    [(64, 16, 32, ()), (64, 32, 16, ()), (70, 32, 128, (3, 50)), (40, 16, 24, (0, 39)), (20, 32, 8, ())],
)
def test_the_objective_is_that_of_an_independent_reference(
    n_columns, group_size, block, dead, symmetric, act_order, search
):
    x = inputs_of(n_columns, dead=dead)
    weight = torch.randn(5, n_columns, generator=torch.Generator().manual_seed(1))
    options = dict(damping=0.01, act_order=act_order, search=search)
    result = gptq(weight, hessian_of(x), group_size, symmetric, block=block, **options)
    reference = slow_gptq(weight, hessian_of(x), group_size, symmetric, **options)
    assert [tensor.dtype for tensor in result] == [torch.uint8, torch.bfloat16, torch.uint8]
    assert lost(weight, result, x) == pytest.approx(lost(weight, reference, x), rel=1e-4)
    for ours, theirs in zip(result, reference, strict=True):
        assert torch.equal(ours.double(), theirs.double())


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [False, True])
def test_it_loses_less_than_rounding_to_nearest(symmetric, act_order):
    x, weight = inputs_of(128), torch.randn(16, 128, generator=torch.Generator().manual_seed(1))
    nearest = lost(weight, quantize_int4(weight, 32, symmetric), x)
    for search in (False, True):
        result = gptq(weight, hessian_of(x), 32, symmetric, act_order=act_order, search=search)
        assert lost(weight, result, x) < 0.7 * nearest


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("n_columns", [64, 70])
def test_uncorrelated_inputs_of_one_size_are_rounding_to_nearest(n_columns, symmetric, act_order):
    weight = torch.randn(9, n_columns, generator=torch.Generator().manual_seed(1))
    result = gptq(weight, 3 * torch.eye(n_columns), 32, symmetric, act_order=act_order, search=False)
    for ours, nearest in zip(result, quantize_int4(weight, 32, symmetric), strict=True):
        assert torch.equal(ours, nearest)


@pytest.mark.parametrize("act_order", [True, False])
def test_the_size_of_the_block_changes_nothing(act_order):
    x, weight = inputs_of(100), torch.randn(8, 100, generator=torch.Generator().manual_seed(1))
    results = [gptq(weight, hessian_of(x), 32, False, act_order=act_order, block=size) for size in (1, 7, 32, 128)]
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_inputs_that_were_always_zero_leave_their_columns_rounded_to_nearest():
    x, weight = inputs_of(64, dead=(3, 40)), torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    q, scale, zero = gptq(weight, hessian_of(x), 32, False)
    for j in (3, 40):
        g = j // 32
        expected = (weight[:, j] / scale[:, g].float() + zero[:, g]).round().clamp(0, 15)
        assert q[:, j].tolist() == expected.tolist()
    nothing = gptq(weight, torch.zeros(64, 64), 32, False, search=False)
    assert all(torch.equal(a, b) for a, b in zip(nothing, quantize_int4(weight, 32, False), strict=True))


@pytest.mark.parametrize("damping", [0.0, 1e-9, 0.01])
def test_fewer_inputs_than_columns(damping):
    x = inputs_of(64, n=5)
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    result = gptq(weight, hessian_of(x), 32, False, damping=damping)
    assert lost(weight, result, x) < 0.7 * lost(weight, quantize_int4(weight, 32, False), x)


def test_a_range_is_shrunk_where_that_helps():
    weight = torch.full((1, 32), 0.45)
    weight[0, :2] = torch.tensor([-1.0, 1.0])
    hessian = torch.eye(32)
    x = torch.eye(32, dtype=torch.float64)
    plain, searched = (gptq(weight, hessian, 32, True, search=search) for search in (False, True))
    assert searched[1].item() < plain[1].item()
    assert lost(weight, searched, x) < lost(weight, plain, x)


# calibration


def tiny_model(**changes):
    torch.manual_seed(0)
    shape = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=320, max_seq_len=32)
    model = Llama(ModelConfig(**shape | changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(std=0.1)
    return model


def spec(**changes):
    quant = dict(method="int4", group_size=32, symmetric=False, algorithm="gptq", int8=["tok_embeddings"])
    return quant | changes


def start(tmp_path, quant, **changes):
    """(float32 weights, the model rounded to nearest)"""
    checkpoint.save(
        tmp_path / "ckpt.pt", stage="sft", step=1, tokens_seen=1, model=tiny_model(**changes), tokenizer=b"t", config={}
    )
    ckpt = checkpoint.load(tmp_path)
    return ckpt.weights, checkpoint.build_model(quantize.quantize_checkpoint(ckpt, quant)).eval()


def batches(*lengths):
    """Random rows, in one batch of those lengths."""
    g, longest = torch.Generator().manual_seed(0), max(lengths)
    rows = [torch.randint(1, 320, (longest,), generator=g) for _ in lengths]
    real = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return [(torch.stack(rows), real)]


def inputs_seen(model, data):
    """{layer: its inputs (n, K)} in one pass of the whole model."""
    seen, hooks = {}, []
    (ids, real), *_ = data
    for name, layer in model.named_modules():
        if isinstance(layer, layers.LowBitWeight | torch.nn.Linear):
            keep = lambda _, inputs, name=name: seen.update({name: inputs[0]})  # noqa: E731
            hooks.append(layer.register_forward_pre_hook(keep))
    with torch.no_grad():
        model.values(ids) if model.scalar is not None else model(ids)
    for hook in hooks:
        hook.remove()
    return {name: x[real].double() for name, x in seen.items() if x.dim() == 3}


def spy(monkeypatch):
    """{layer: hessian} of all that calibration refits, in that order; filled as it goes."""
    calls, refit = {}, quantize.refit

    def noting(model, names, weights, hessian, quant, options):
        calls.update({name: hessian.clone() for name in names})
        refit(model, names, weights, hessian, quant, options)

    monkeypatch.setattr(quantize, "refit", noting)
    return calls


@pytest.mark.parametrize("shape", [{}, dict(tied=False), dict(scalar_head=True)], ids=["tied", "untied", "scalar"])
def test_each_layer_is_fitted_to_what_the_quantized_layers_before_it_make(tmp_path, monkeypatch, shape):
    weights, model = start(tmp_path, spec(), **shape)
    data, hessians = batches(32, 20, 32, 32), spy(monkeypatch)
    quantize.calibrate(model, weights, data, spec())
    names = [
        f"layers.{i}.{name}"
        for i in range(2)
        for name in "attention.wq attention.wk attention.wv attention.wo".split()
        + "feed_forward.w1 feed_forward.w3 feed_forward.w2".split()
    ]
    names += [name for name in ("output", "scalar") if getattr(model, name) is not None]
    assert list(hessians) == names
    quantized, original = inputs_seen(model, data), inputs_seen(tiny_model(**shape), data)
    for name in names:
        expected, other = (2 * x.T @ x / len(x) for x in (quantized[name], original[name]))
        torch.testing.assert_close(hessians[name].double(), expected, atol=1e-5, rtol=1e-4)
        assert (expected - other).norm() > 1e-3 * other.norm()  # so the line above would see unquantized inputs


def test_padding_is_not_calibrated_on(tmp_path, monkeypatch):
    (ids, real), *_ = batches(32, 20)
    calls = spy(monkeypatch)
    found = []
    for padding in (0, 7):
        weights, model = start(tmp_path, spec())
        quantize.calibrate(model, weights, [(torch.where(real, ids, padding), real)], spec())
        found.append(dict(calls))
    assert len(found[0]) == 14
    for name, hessian in found[0].items():
        assert torch.equal(hessian, found[1][name])


@pytest.mark.parametrize("symmetric", [False, True])
def test_calibrated_layers_lose_less_on_what_they_saw_and_the_others_stay(tmp_path, capsys, symmetric):
    quant = spec(symmetric=symmetric, int8=["tok_embeddings", "*.wo"])
    weights, model = start(tmp_path, quant)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = batches(*[32] * 20)
    quantize.calibrate(model, weights, data, quant)
    for name, x in inputs_seen(model, data).items():
        wanted, layer = weights[f"{name}.weight"].double(), model.get_submodule(name)
        was = (quantize_int4(wanted.float(), 32, symmetric), wanted.size(1))
        nearest = ((wanted - dequantized(*was[0], was[1])) @ x.T).norm()
        found = ((wanted - layer.weight.double()) @ x.T).norm()
        assert found < (0.98 * nearest if layers.bits_of(name, quant) == 4 else 0.2 * nearest)
        if name.endswith(".wo"):
            assert torch.equal(layer.q, before[f"{name}.q"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12 and lines[0].startswith("layers.0.attention.wq: relative error of its output 0.")


def test_inputs_that_are_not_finite_are_refused_by_the_layers_name(tmp_path):
    weights, model = start(tmp_path, spec())
    model.layers[1].ffn_norm.weight.data[3] = torch.inf
    with pytest.raises(CheckpointError, match=r"layers\.1\.feed_forward\.w1 cannot be quantized"):
        quantize.calibrate(model, weights, batches(32, 32), spec())


# calibration data


def write_data(folder, train, examples=(), is_val=()):
    """train.text.bin of ids and sft.pkl of id lists, of a vocabulary of 320."""
    folder.mkdir()
    with BinWriter(folder / "train.text.bin", 320) as file:
        file.write(train)
    counts = dict(documents=1, tokens=len(train), characters=len(train))
    sources = {"text": dict(train=counts, val=counts)}
    meta = dict(format_version=2, vocab_size=320, dtype=token_dtype(320).name, sources=sources)
    save_meta(folder, meta | dict(files={"train.text.bin": dict(part="pretrain", tokens=len(train))}))
    tokens, offsets = pack(list(examples), token_dtype(320))
    mask = np.packbits(np.ones_like(tokens, dtype=np.uint8))
    save_pkl(folder / "sft.pkl", dict(tokens=tokens, offsets=offsets, loss_mask=mask, is_val=np.array(is_val, bool)))
    return folder


def test_rows_of_the_training_text_are_evenly_spaced(tmp_path):
    data = write_data(tmp_path / "data", [i % 317 for i in range(1001)])
    found = quantize.calibration_batches(data, "train", 50, 10, 2, 320)
    assert [ids.shape for ids, _ in found] == [(2, 10), (2, 10), (1, 10)] and all(real.all() for _, real in found)
    firsts = torch.cat([ids[:, 0] for ids, _ in found]).tolist()
    assert firsts == [start % 317 for start in (0, 247, 495, 742, 990)]  # the last has 990..999
    assert found[2][0].tolist() == [[(990 + i) % 317 for i in range(10)]]


def test_examples_of_sft_pkl_are_those_to_train_on_and_evenly_spaced(tmp_path):
    examples = [[n + 1] * (1 + n // 2 % 4) for n in range(200)]  # 2.5 tokens each
    data = write_data(tmp_path / "data", [1, 2], examples, [n % 2 == 1 for n in range(200)])
    found = quantize.calibration_batches(data, "sft.pkl", 50, 32, 8, 320)
    rows = [ids[keep].tolist() for batch in found for ids, keep in zip(*batch, strict=True)]
    assert sum(map(len, rows)) == pytest.approx(50, abs=8)
    assert all(row == examples[row[0] - 1] and row[0] % 2 == 1 for row in rows)
    numbers = sorted(row[0] for row in rows)
    assert (numbers[0], numbers[-1]) == (1, 199)
    # 20 of 100 examples: every fifth or sixth, and every second number is one for validation
    assert {b - a for a, b in zip(numbers, numbers[1:], strict=False)} == {10, 12}


@pytest.mark.parametrize("name, file", [("train", r"train\.\*\.bin"), ("sft.pkl", r"sft\.pkl")])
def test_too_little_text_is_refused(tmp_path, name, file):
    data = write_data(tmp_path / "data", [5] * 100, [[5] * 10] * 10, [False] * 10)
    assert quantize.calibration_batches(data, name, 99, 32, 4, 320)
    with pytest.raises(ConfigError, match=rf"{file}: 100 tokens are too few for calibration_tokens=100"):
        quantize.calibration_batches(data, name, 100, 32, 4, 320)


def test_rows_longer_than_the_text_or_the_context_are_refused(tmp_path):
    data = write_data(tmp_path / "data", [5] * 100, [[5] * 10] * 10, [False] * 10)
    with pytest.raises(ConfigError, match=r"train\.\*\.bin: 100 tokens are too few"):
        quantize.calibration_batches(data, "train", 5, 200, 4, 320)
    with pytest.raises(DataError, match=r"sft\.pkl: an example of 10 tokens, the model's context has 9"):
        quantize.calibration_batches(data, "sft.pkl", 5, 9, 4, 320)
