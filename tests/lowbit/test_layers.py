"""lowbit/layers.py: the layers of int8 and int4 models, their storage, their two ways to multiply, and `build`."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F

from lowbit import layers
from model import Llama, ModelConfig

kernel_only = pytest.mark.skipif(not layers.HAS_KERNEL, reason="torch has no vectorised kernels on this CPU")
INT4 = {"method": "int4", "group_size": 32, "symmetric": False, "algorithm": "rtn", "int8": []}
KINDS = [(8,), (4, 32, False), (4, 64, False), (4, 128, False), (4, 32, True), (4, 128, True)]
KIND_NAMES = ["int8", "int4 32", "int4 64", "int4 128", "int4 32 symmetric", "int4 128 symmetric"]


def fill(layer, seed=0):
    """Every value that the storage can hold, in the columns beyond K too."""
    g = torch.Generator().manual_seed(seed)
    layer.q.copy_(
        torch.randint(*((-127, 128) if layer.q.dtype == torch.int8 else (0, 256)), layer.q.shape, generator=g)
    )
    layer.scale.copy_(0.01 + 0.02 * torch.rand(layer.scale.shape, generator=g))
    if "zero" in layer._buffers:
        layer.zero.copy_(torch.randint(0, 16, layer.zero.shape, generator=g))
    return layer


def make(kind, n, k, embedding=False):
    bits, *rest = kind
    classes = (layers.Int8Linear, layers.Int8Embedding) if bits == 8 else (layers.Int4Linear, layers.Int4Embedding)
    return fill(classes[embedding](n, k, *rest))


def slow_weight(layer):
    """The weight in float64, number by number, from the buffers as the format defines them."""
    n, k = layer.n_rows, layer.n_columns
    q, scale = layer.q.tolist(), layer.scale.double().tolist()
    w = torch.empty(n, k, dtype=torch.float64)
    for i in range(n):
        for j in range(k):
            if layer.q.dtype == torch.int8:
                w[i, j] = q[i][j] * scale[i]
            else:
                nibble = q[i][j // 2] // 16 if j % 2 else q[i][j // 2] % 16
                group = j // layer.group_size
                zero = layer.zero[i, group].item() if "zero" in layer._buffers else 8
                w[i, j] = (nibble - zero) * scale[i][group]
    return w


def relative_error(y, reference):
    return ((y.double() - reference.double()).norm() / reference.double().norm()).item()


# storage


def test_nibbles_by_hand():
    q = torch.tensor([[1, 2, 15, 0], [0, 15, 7, 8]], dtype=torch.uint8)
    packed = layers.pack_nibbles(q)
    assert packed.dtype == torch.uint8 and packed.tolist() == [[0x21, 0x0F], [0xF0, 0x87]]
    assert layers.unpack_nibbles(packed).tolist() == q.tolist()


def test_every_byte_survives_unpacking_and_packing():
    packed = torch.arange(256, dtype=torch.uint8).view(4, 64)
    q = layers.unpack_nibbles(packed)
    assert q.dtype == torch.uint8 and q.shape == (4, 128) and q.max() == 15
    assert torch.equal(layers.pack_nibbles(q), packed)


def test_int4_weight_by_hand():
    layer = layers.Int4Linear(2, 40, 32, symmetric=False)  # 40 columns: a whole group and 8 columns of a second
    assert layer.q.shape == (2, 32) and layer.scale.shape == layer.zero.shape == (2, 2)
    layer.q[0, 0], layer.q[0, 16], layer.q[1, 19] = 0xF0, 0x3A, 0x07
    layer.scale.copy_(torch.tensor([[0.5, 0.25], [1.0, 2.0]]))
    layer.zero.copy_(torch.tensor([[8, 10], [8, 3]]))
    w = layer.weight
    assert w.shape == (2, 40) and w.dtype == torch.float32
    assert w[0, :2].tolist() == [(0 - 8) * 0.5, (15 - 8) * 0.5]
    assert w[0, 32:34].tolist() == [(10 - 10) * 0.25, (3 - 10) * 0.25]
    assert w[1, 38:].tolist() == [(7 - 3) * 2.0, (0 - 3) * 2.0]


def test_symmetric_int4_has_zero_eight_and_no_buffer_for_it():
    layer = layers.Int4Linear(1, 32, 32, symmetric=True)
    layer.q[0, 0] = 0xF8
    layer.scale.fill_(0.5)
    assert set(layer.state_dict()) == {"q", "scale"}
    assert layer.weight[0, :3].tolist() == [0.0, 3.5, 0.0]  # untouched nibbles stand for zero


@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
@pytest.mark.parametrize("n, k", [(3, 128), (5, 172), (2, 7)])
def test_weight_is_what_the_format_says(kind, n, k):
    layer = make(kind, n, k)
    # scale has 8 bits and q - zero at most 8: the product is exact in float32
    assert torch.equal(layer.weight.double(), slow_weight(layer))
    state = layer.state_dict()
    assert state["scale"].dtype == torch.bfloat16 and not any(b.dtype == torch.float32 for b in state.values())


# the two products

SHAPES = [(1, 64), (16, 128), (65, 48), (40, 172), (33, 7), (64, 288)]


@kernel_only
@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
@pytest.mark.parametrize("n, k", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 5, 32])
def test_kernel_agrees_with_the_format(kind, n, k, rows):
    layer = make(kind, n, k)
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(1))
    exact, terms = x.double() @ layer.weight.double().T, x.double().abs() @ layer.weight.double().abs().T
    if kind == (8,) and k % layers.KERNEL_ALIGNMENT:
        assert not layers.use_kernel(x, layer.q)  # would read other rows
    else:
        assert layers.use_kernel(x, layer.q)
        y = layer.kernel()(x)
        assert y.shape == (rows, n) and y.dtype == torch.float32 and y.is_contiguous()
        # x, the result and in int4 the shift -zero * scale, up to twice the largest weight, are rounded to 8 bits
        bound = 2**-8 * (exact.abs() + terms + x.double().abs().sum(1, keepdim=True) * 8 * layer.scale.max().double())
        assert ((y.double() - exact).abs() <= bound).all()
        assert n * rows < 16 or relative_error(y, exact) < 0.02  # single sums may cancel
        assert torch.equal(layer(x), y)


@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
@pytest.mark.parametrize("n, k", SHAPES)
def test_many_rows_are_multiplied_exactly(kind, n, k):
    layer = make(kind, n, k)
    for rows in (33, 100):
        x = torch.randn(rows, k)
        y = layer(x)
        assert torch.equal(y, layer.linear_float32(x))
        assert relative_error(y, F.linear(x, layer.weight)) < 1e-6


@pytest.mark.parametrize("kind", [(8,), (4, 64, False), (4, 64, True)])
def test_a_vocabulary_of_64793(kind):
    table = make(kind, 64793, 32, embedding=True)
    weight = table.weight
    x = torch.randn(40, 32)
    for h in (x, x[:3], x[:1]):
        y = table.linear(h)
        assert y.shape == (len(h), 64793)
        assert relative_error(y, h @ weight.T) < (1e-6 if len(h) > layers.KERNEL_ROWS else 0.01)
    ids = torch.tensor([[0, 64792], [4095, 4096]])
    assert torch.equal(table(ids), weight[ids])


@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
@pytest.mark.parametrize("k", [64, 172])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_leading_dimensions_and_dtype_are_kept(kind, k, dtype):
    layer = make(kind, 21, k)
    for shape in [(k,), (1, 1, k), (2, 3, k), (2, 3, 4, k), (5, 16, k), (0, k), (2, 0, k)]:
        x = torch.randn(shape, dtype=dtype)
        y = layer(x)
        assert y.shape == (*shape[:-1], 21) and y.dtype == dtype and y.is_contiguous()
        if x.numel():
            assert relative_error(y, x.double() @ layer.weight.double().T) < 0.02


@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
def test_input_that_is_not_contiguous(kind):
    layer = make(kind, 24, 64)
    for x in (torch.randn(64, 5).T, torch.randn(2, 64, 3).transpose(1, 2), torch.randn(4, 128)[:, ::2]):
        assert relative_error(layer(x), x @ layer.weight.T) < 0.02


@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
@pytest.mark.parametrize("k", [64, 172])
@pytest.mark.parametrize("rows", [2, 40])
def test_wrong_number_of_columns_is_refused(kind, k, rows):
    layer = make(kind, 16, k)
    for columns in (k - 4, k // 2, 2 * k, k + 16):
        with pytest.raises(RuntimeError):
            layer(torch.randn(rows, columns))


@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
@pytest.mark.parametrize("rows", [2, 40])
def test_gradient_reaches_the_input(kind, rows):
    layer = make(kind, 5, 64)
    x = torch.randn(rows, 64, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(rows, -1))


@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
def test_without_kernels_every_product_is_exact(kind, monkeypatch):
    monkeypatch.setattr(layers, "HAS_KERNEL", False)
    layer = make(kind, 20, 96)
    x = torch.randn(1, 96)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight), atol=1e-5, rtol=1e-6)
    assert layer.made is None


@kernel_only
@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
@pytest.mark.parametrize("times, dense", [((1, 2, 2, 2), False), ((1, 9, 3, 3), True), ((5, 1, 1, 4), True)])
def test_of_two_kernels_the_faster_is_taken_for_all_of_a_shape(kind, times, dense, monkeypatch):
    monkeypatch.setattr(layers, "FASTEST", {})
    layer, again, x = make(kind, 20, 96), make(kind, 20, 96, embedding=True), torch.randn(2, 96)
    asked, left = [], list(times)

    def seconds(kernel, few):
        asked.append((len(few), kernel(few).shape))
        return left.pop(0)

    for each in (layer, again):  # the second is as the first
        y = each.fastest_kernel(seconds)(x)
        assert torch.equal(y, layer.make_dense()(x) if dense else layer.make_kernel()(x))
    assert asked == 2 * [(1, (1, 20)), (32, (32, 20))]
    assert relative_error(layer.make_dense()(x), x.double() @ slow_weight(layer).T) < 0.01


@kernel_only
@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
def test_untested_kernels_must_agree_with_float32(kind, monkeypatch):
    layer, x = make(kind, 20, 96), torch.randn(2, 96)
    right, dense = layer.make_kernel(), layer.make_dense()
    assert layer.agrees(right) and layer.agrees(dense)

    def absent():
        raise NotImplementedError("no kernel for this device")

    wrong = (lambda: lambda x: right(x)[..., :-1], lambda: lambda x: right(x).roll(1, -1))
    for make_kernel in (absent, *wrong):
        monkeypatch.setattr(layers, "FASTEST", {})
        layer.make_kernel = make_kernel
        assert torch.equal(layer.fastest_kernel(lambda kernel, few: 1.0)(x), dense(x))
    layer.make_dense = absent
    monkeypatch.setattr(layers, "FASTEST", {})
    assert layer.fastest_kernel(lambda kernel, few: 1.0) is None
    assert layer.fastest_kernel(lambda kernel, few: 1.0) is None  # as it was found before


# lookup


@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
@pytest.mark.parametrize("k", [64, 40])
def test_lookup_takes_rows_of_the_weight(kind, k):
    table = make(kind, 30, k, embedding=True)
    for ids in ([[3, 3, 29], [0, 1, 2]], [7], [[]]):
        ids = torch.tensor(ids, dtype=torch.long)
        assert torch.equal(table(ids), table.weight[ids]) and table(ids).dtype == torch.float32


# what is kept between calls


@kernel_only
@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
@pytest.mark.parametrize("assign", [False, True])
def test_a_used_layer_follows_its_buffers(kind, assign):
    layer, other, x = make(kind, 40, 64), fill(make(kind, 40, 64), seed=1), torch.randn(2, 64)
    before, after = layer(x), other(x)
    assert relative_error(before, after) > 0.1
    layer.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    assert torch.equal(layer(x), after)
    fill(layer, seed=0)  # written in place
    assert torch.equal(layer(x), before)
    for name, buffer in other.state_dict().items():
        setattr(layer, name, buffer)  # replaced
    assert torch.equal(layer(x), after)
    layer.scale = layer.scale * 2  # a power of two: exact
    assert torch.equal(layer(x), after * 2)


@kernel_only
@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
def test_the_packed_copy_is_made_once_and_stays_out_of_files_and_copies(kind):
    layer, fresh, x = make(kind, 40, 64), make(kind, 40, 64), torch.randn(2, 64)
    y = layer(x)
    kernel = layer.kernel()
    assert torch.equal(layer(x), y) and layer.kernel() is kernel
    assert layer.state_dict().keys() == fresh.state_dict().keys()
    assert len(pickle.dumps(layer)) == len(pickle.dumps(fresh))
    torch.save(layer, file := io.BytesIO())
    file.seek(0)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert twin.made is None and torch.equal(twin(x), y)
        twin.scale.mul_(2)
        assert torch.equal(twin(x), 2 * y) and torch.equal(layer(x), y)
    layer.to("cpu", torch.bfloat16)
    assert layer.made is None and torch.equal(layer(x), y)


@pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_changing_the_dtype_of_a_model_leaves_its_layers_as_they_are(kind, dtype):
    layer, x = make(kind, 20, 64), torch.randn(2, 64)
    layer.scale.mul_(2.0**-20)  # below what float16 holds
    before, y = copy.deepcopy(layer.state_dict()), layer(x)
    for change in (lambda m: m.to(dtype), lambda m: m.to(torch.float32), torch.nn.Module.half, torch.nn.Module.float):
        change(layer)
        assert all(torch.equal(b, before[n]) and b.dtype == before[n].dtype for n, b in layer.state_dict().items())
        assert torch.equal(layer(x), y)


def test_buffers_made_in_inference_mode():
    with torch.inference_mode():
        layer = make((4, 32, False), 20, 64)
        assert relative_error(layer(torch.ones(1, 64)), layer.weight.sum(1)[None]) < 0.02


# models

MODELS = [
    dict(),
    dict(n_kv_heads=2),
    dict(tied=False),
    dict(hidden_dim=172),
    dict(vocab_size=323),
    dict(tied=False, vocab_size=323),
]
MODEL_NAMES = ["tied, MHA", "GQA", "untied", "hidden 172", "odd vocabulary", "untied, odd vocabulary"]
QUANTS = [
    {"method": "int8"},
    INT4,
    INT4 | {"group_size": 64, "int8": ["tok_embeddings", "output"]},
    INT4 | {"group_size": 128, "symmetric": True, "int8": ["layers.0.*", "layers.*.wv"]},
    {"method": "int4", "group_size": 64, "symmetric": True, "algorithm": "gptq"},
]
QUANT_NAMES = ["int8", "int4", "int8 embedding", "mixed", "symmetric"]


def build(shape, quant, seed=0):
    torch.manual_seed(seed)
    config = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=4, vocab_size=320, max_seq_len=64) | shape
    model = layers.build(Llama(ModelConfig(**config)), quant).eval()
    for module in model.modules():
        if isinstance(module, layers.LowBitWeight):
            fill(module).scale.mul_(0.05 if module.q.dtype == torch.int8 else 0.5)
    return model


def dequantized(low):
    """The float32 model with exactly the weights that the quantized model stands for."""
    model = Llama(low.config).eval()
    state = {name: low.get_submodule(name.rpartition(".")[0]).weight for name in model.state_dict()}
    model.load_state_dict(state, strict=True)
    return model


@pytest.mark.parametrize("shape", MODELS, ids=MODEL_NAMES)
@pytest.mark.parametrize("quant", QUANTS, ids=QUANT_NAMES)
def test_model_computes_what_its_dequantized_weights_compute(shape, quant):
    model = build(shape, quant)
    reference = dequantized(model)
    ids = torch.randint(320, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = reference(ids)
        assert exact.std() > 0.1
        torch.testing.assert_close(model(ids), exact, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(model(ids, ids), reference(ids, ids), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.token_logps(ids), reference.token_logps(ids), atol=2e-5, rtol=1e-5)
        few = ids[:1, :5]  # through the kernels, where there are any
        assert relative_error(model(few), reference(few)) < 0.02


@pytest.mark.parametrize("quant", QUANTS, ids=QUANT_NAMES)
def test_model_generates_what_its_dequantized_weights_find_likely(quant):
    model = build({}, quant)
    prompts = [[5, 6, 7], [8], list(range(3, 45))]
    one, two = (model.generate(prompts, 12, temperature=0.8, seed=3, eos_id=-1, return_logps=True) for _ in range(2))
    assert one.tokens == two.tokens and [len(tokens) for tokens in one.tokens] == [12, 12, 12]
    reference = dequantized(model)
    for prompt, tokens, logps in zip(prompts, one.tokens, one.logps, strict=True):
        expected = reference.token_logps(torch.tensor([prompt + tokens]), 0.8)[0, -12:]
        torch.testing.assert_close(torch.tensor(logps), expected.detach(), atol=0.1, rtol=0.02)


@pytest.mark.filterwarnings("error:Mismatch dtype between input and weight")
def test_model_in_bfloat16_and_back():
    model = build({}, QUANTS[2])
    ids = torch.randint(320, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids)
        norms = {name: p for name, p in model.named_parameters()}
        assert all((p == 1).all() for p in norms.values())  # exact in bfloat16, so that the way back is too
        model.to(torch.bfloat16)
        assert model.hidden(ids).dtype == torch.bfloat16 and relative_error(model(ids), before) < 0.05
        model.to(torch.float32)
        assert torch.equal(model(ids)[:, :1], before[:, :1])  # position 0 does not depend on the rounded rotations


def test_scalar_head():
    model = build(dict(scalar_head=True), INT4)
    assert isinstance(model.scalar, layers.Int4Linear)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.values(ids), dequantized(model).values(ids), atol=1e-5, rtol=1e-5)


def test_which_layer_has_how_many_bits():
    quant = INT4 | {"int8": ["tok_embeddings", "layers.0.*", "*.wv"]}
    model = build(dict(tied=False), quant)
    linear, embedding = torch.nn.Linear, torch.nn.Embedding
    assert not [m for m in model.modules() if isinstance(m, linear | embedding)]
    bits = {"tok_embeddings": 8, "output": 4, "layers.0.attention.wq": 8, "layers.0.feed_forward.w2": 8}
    bits |= {"layers.1.attention.wv": 8, "layers.1.attention.wq": 4, "layers.1.feed_forward.w3": 4}
    for name, width in bits.items():
        assert layers.bits_of(name, quant) == width
        assert layers.bits_of(name, {"method": "int8"}) == 8
        assert isinstance(model.get_submodule(name), layers.Int8Weight if width == 8 else layers.Int4Weight)
    assert isinstance(model.tok_embeddings, layers.Int8Embedding) and isinstance(model.output, layers.Int4Linear)
    assert {name: p.dtype for name, p in model.named_parameters() if p.dtype != torch.float32} == {}
    assert all("norm" in name for name, _ in model.named_parameters())


def test_files_of_the_first_format_still_load():
    model = build(dict(tied=False), {"method": "int8"})
    names = {n.rpartition(".")[0] for n, p in Llama(model.config).named_parameters() if p.dim() == 2}
    expected = {f"{name}.{part}" for name in names for part in ("q", "scale")}
    assert {name for name in model.state_dict() if "norm" not in name} == expected
    assert model.output.q.dtype == torch.int8 and model.output.scale.shape == (320,)


@pytest.mark.parametrize("quant", QUANTS, ids=QUANT_NAMES)
def test_loading_is_strict(quant):
    model, state = build({}, quant), build({}, quant, seed=1).state_dict()
    model.load_state_dict(state, strict=True)
    for name in ("tok_embeddings.q", "layers.1.feed_forward.w1.scale"):
        with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
            model.load_state_dict({n: b for n, b in state.items() if n != name}, strict=True)
    with pytest.raises(RuntimeError, match='Unexpected key.*"output.q"'):
        model.load_state_dict(state | {"output.q": state["tok_embeddings.q"]}, strict=True)


def test_a_zero_too_few_or_too_many_is_refused():
    asymmetric, symmetric = (build({}, INT4 | {"symmetric": value}) for value in (False, True))
    with pytest.raises(RuntimeError, match='Missing key.*"tok_embeddings.zero"'):
        asymmetric.load_state_dict(symmetric.state_dict(), strict=True)
    with pytest.raises(RuntimeError, match='Unexpected key.*"tok_embeddings.zero"'):
        symmetric.load_state_dict(asymmetric.state_dict(), strict=True)
    with pytest.raises(RuntimeError, match="size mismatch for tok_embeddings.scale"):
        asymmetric.load_state_dict(build({}, INT4 | {"group_size": 64}).state_dict(), strict=True)


@pytest.mark.parametrize(
    "quant, message",
    [
        ({}, "method None"),
        ({"method": "int3"}, "method int3"),
        ({"method": ["int4"]}, "method .'int4'"),
        ({"method": "int8", "group_size": 32}, "key group_size"),
        (INT4 | {"group_size": 48}, "group_size 48"),
        ({k: v for k, v in INT4.items() if k != "group_size"}, "group_size None"),
        (INT4 | {"symmetric": None}, "symmetric None"),
        (INT4 | {"int8": "tok_embeddings"}, "int8 tok_embeddings"),
        (INT4 | {"act_order": True}, "key act_order"),
    ],
)
def test_other_specs_are_refused(quant, message):
    model = Llama(ModelConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=2, vocab_size=40, max_seq_len=8))
    with pytest.raises(ValueError, match=rf'quantization {message}.*: this code reads .*"int8".*"int4".*32, 64 or 128'):
        layers.build(model, quant)
    assert isinstance(model.tok_embeddings, torch.nn.Embedding)  # nothing was replaced
