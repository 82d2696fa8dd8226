"""model.py against transformers, plain PyTorch, hand-computed numbers and llama2.c's golden text."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from tiny import assert_same, float64
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configs.sizes import count_parameters, sizes
from dataset.batches import kept
from dataset.corpus import document_numbers
from model import (
    UNCACHED,
    LinearCrossEntropy,
    LinearLogps,
    Llama,
    ModelConfig,
    document_mask,
    document_starts,
    fused_log_softmax_chunk,
    has_varlen,
    log_softmax_chunk,
)

SHAPES = {"MHA": dict(), "GQA": dict(n_kv_heads=2), "untied": dict(tied=False), "MQA": dict(n_kv_heads=1, tied=False)}
COUNTS = [4_393_216, 24_636_096, 58_479_616, 134_714_880, 268_756_992]  # of the five sizes, tied
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


def to_hugging_face(model):
    transformers = pytest.importorskip("transformers")
    c = model.config
    shape = dict(vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.hidden_dim)
    shape |= dict(num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads)
    shape |= dict(max_position_embeddings=c.max_seq_len)
    constants = dict(rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta, tie_word_embeddings=c.tied)
    hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **constants)).eval()
    renames = dict(wq="q_proj", wk="k_proj", wv="v_proj", wo="o_proj", w1="gate_proj", w2="down_proj", w3="up_proj")
    renames |= {"attention.": "self_attn.", "feed_forward.": "mlp.", "tok_embeddings": "embed_tokens"}
    renames |= {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    weights = {"lm_head.weight": model.head_weight}
    for name, w in model.state_dict().items():
        heads = c.n_heads if "wq" in name else c.n_kv_heads if "wk" in name else None
        if heads:  # Meta rotates the pairs (2i, 2i+1), Hugging Face (i, i + head_dim/2)
            w = w.view(heads, c.head_dim // 2, 2, c.dim).transpose(1, 2).reshape(w.shape)
        for old, new in renames.items():
            name = name.replace(old, new)
        if not name.startswith("output"):
            weights["model." + name] = w
    hf.load_state_dict(weights)
    return hf


@shapes
def test_logits_equal_hugging_face(shape):
    model, ids = tiny_model(**shape, norm_eps=1e-3, rope_theta=500.0), random_ids(2, 100)
    assert ("output.weight" in model.state_dict()) == (not model.config.tied)  # a tied embedding is stored once
    with torch.no_grad():
        torch.testing.assert_close(model(ids), to_hugging_face(model)(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name, expected", list(zip(sizes, COUNTS, strict=True)))
def test_parameter_counts_of_the_five_sizes(name, expected):
    assert count_parameters(**sizes[name]) == expected
    with torch.device("meta"):  # shapes without memory
        assert Llama(ModelConfig(**sizes[name])).num_params() == expected
        untied = Llama(ModelConfig(**sizes[name], tied=False)).num_params()
    assert count_parameters(**sizes[name], tied=False) == untied == expected + 64793 * sizes[name]["dim"]


@pytest.mark.parametrize("bad", [dict(n_heads=5), dict(n_kv_heads=3), dict(n_heads=32, n_kv_heads=32)])
def test_config_refuses_impossible_heads(bad):
    with pytest.raises(ValueError, match="n_heads"):
        ModelConfig(**dict(dim=32, n_heads=4, n_kv_heads=4) | bad)


@pytest.mark.parametrize(
    "odd",
    [dict(dropout=float("nan")), dict(dropout=-0.1), dict(dropout=1.0), dict(norm_eps=0.0), dict(rope_theta=-1.0)],
)
def test_config_refuses_numbers_that_compute_nothing(odd):
    with pytest.raises(ValueError, match=f"{next(iter(odd))}="):
        ModelConfig(**odd)


@pytest.mark.parametrize(
    "odd", [dict(dim=32.0), dict(n_layers=True), dict(tied=1), dict(norm_eps="1e-5"), dict(hidden_dim="")]
)
def test_config_refuses_values_of_another_type(odd):
    (name, value), *_ = odd.items()
    with pytest.raises(TypeError, match=f"^{name}={value!r}: .* is needed"):
        ModelConfig(**odd)


@pytest.mark.parametrize("name", "dim n_layers n_heads n_kv_heads vocab_size max_seq_len hidden_dim".split())
def test_config_refuses_sizes_below_one(name):
    for size in (0, -32):
        with pytest.raises(ValueError, match=f"{name}={size}: at least 1 is needed"):
            ModelConfig(**dict(dim=32, n_heads=4, n_kv_heads=4, hidden_dim=96) | {name: size})


@pytest.mark.parametrize(
    "dim, n_heads, vocab_size, tied",
    [(64, 8, 64793, True), (160, 5, 6144, True), (512, 8, 6144, False), (1024, 16, 64793, True)],
)
def test_fresh_model_guesses_uniformly(dim, n_heads, vocab_size, tied):
    torch.manual_seed(0)
    shape = dict(n_layers=1, n_heads=n_heads, n_kv_heads=n_heads, vocab_size=vocab_size, max_seq_len=64, tied=tied)
    ids = random_ids(2, 64, vocab_size=vocab_size)
    with torch.no_grad():
        loss = Llama(ModelConfig(dim=dim, **shape))(ids[:1], ids[1:])
    assert loss.item() == pytest.approx(math.log(vocab_size), rel=0.02)


@float64
def test_padding_on_the_right_changes_no_earlier_logits():
    model, ids = tiny_model(n_kv_heads=2), random_ids(2, 30)
    with torch.no_grad():
        padded = model(F.pad(ids, (0, 10)))[:, :30]
        assert_same(padded, model(ids))


def test_text_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match="9 tokens .* max_seq_len=8"):
        tiny_model(max_seq_len=8)(random_ids(1, 9))


@float64
def test_values_read_the_scalar_head_at_every_position():
    fresh = Llama(ModelConfig(dim=32, n_layers=1, n_heads=4, n_kv_heads=4, vocab_size=97, scalar_head=True))
    ids = random_ids(2, 7)
    assert fresh.values(ids).shape == (2, 7) and not fresh.values(ids).any()
    model = tiny_model(scalar_head=True, tied=False)
    assert "output.weight" not in model.state_dict()
    assert_same(model.values(ids), model.hidden(ids) @ model.scalar.weight[0])


def test_autocast_rounds_no_values():
    model, ids = tiny_model(scalar_head=True), random_ids(4, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        h, values = model.hidden(ids), model.values(ids)
    assert h.dtype == values.dtype == torch.float32
    torch.testing.assert_close(values, h @ model.scalar.weight[0], rtol=1e-5, atol=1e-5)  # of size 1; bfloat16's: 4e-3


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
    ids = random_ids(16, 129, vocab_size=5008)  # 2,048 rows
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


def load_llama2c(path):
    """Version 0 of its format: 7 int32, then float32 weights, each kind for all layers, and the rotary tables."""
    data = np.fromfile(path, dtype=np.int32, count=7)
    names = "dim hidden_dim n_layers n_heads n_kv_heads vocab_size max_seq_len".split()
    config = ModelConfig(**dict(zip(names, data.tolist(), strict=True)))
    model, weights = Llama(config), torch.from_numpy(np.fromfile(path, dtype=np.float32, offset=28))
    kinds = ["attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo"]
    kinds += ["ffn_norm", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
    layers = [f"layers.{i}.{kind}.weight" for kind in kinds for i in range(config.n_layers)]
    parameters, start = dict(model.named_parameters()), 0
    with torch.no_grad():
        for name in ["tok_embeddings.weight", *layers, "norm.weight"]:
            p = parameters.pop(name)
            p.copy_(weights[start : start + p.numel()].view_as(p))
            start += p.numel()
    assert not parameters and start + config.max_seq_len * config.head_dim == len(weights)
    return model


def test_llama2c_stories_260k_tells_its_story(shared_data):
    folder = shared_data / "llama2c"
    expected = json.loads((folder / "expected_stories260K.json").read_text())
    ids = load_llama2c(folder / "stories260K.bin").generate([[1]], 200, temperature=0, eos_id=1).tokens[0]
    assert [1, *ids][:40] == expected["greedy_ids_first"]
    text = sentencepiece.SentencePieceProcessor(str(folder / "tok512.model")).decode(ids)
    assert text == expected["expected_stdout"]


@float64
@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_with_documents_a_row_is_as_its_documents_alone(n_kv_heads):
    torch.manual_seed(0)
    model = Llama(ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=n_kv_heads, vocab_size=50, max_seq_len=32))
    rows = [[[5, 6, 7, 2], [8, 9, 2], [10, 11, 12, 13]], [[14, 2], [2], [15, 16, 17, 18, 19, 20, 2], [22]]]
    ids = torch.tensor([sum(row, []) for row in rows])
    documents = document_numbers(ids, 2)
    assert documents.tolist() == [[0] * 4 + [1] * 3 + [2] * 4, [0] * 2 + [1] + [2] * 7 + [3]]
    logits = model(ids, documents=documents)
    for row, parts in zip(logits, rows, strict=True):
        alone = torch.cat([model(torch.tensor([part]))[0] for part in parts])
        assert_same(row, alone)
    assert not torch.allclose(logits, model(ids), atol=1e-3)  # without it, earlier documents are seen
    assert_same(model(ids, documents=document_starts(documents)), logits)
    targets = ids.roll(-1, 1)
    loss = model(ids, targets, documents=documents)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert_same(loss, expected)


def test_document_starts_and_the_mask_they_stand_for():
    documents = torch.tensor([[4, 4, 7, 7], [7, 7, 7, 9], [9, 1, 2, 3]])  # a row's first token starts one in any case
    starts = [0, 2, 4, 7, 8, 9, 10, 11]
    assert document_starts(documents, multiple=1).tolist() == [*starts, 12]
    assert document_starts(documents, multiple=6).tolist() == [*starts, 12, 12, 12, 12]
    assert document_starts(documents).shape == (256,) and document_starts(documents).dtype == torch.int32
    mask = document_mask(documents, 3, 4, False)
    assert torch.equal(document_mask(document_starts(documents), 3, 4, False), mask)
    assert mask[0, 0].tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize(
    "device, dtype, head_dim, varlen",
    [
        ("cuda", torch.bfloat16, 64, True),
        ("cuda", torch.bfloat16, 20, False),  # the kernel wants a multiple of 8
        ("cuda", torch.bfloat16, 264, False),
        ("cuda", torch.float32, 64, False),
        ("cpu", torch.bfloat16, 64, False),
    ],
)
def test_where_documents_have_a_kernel(device, dtype, head_dim, varlen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert has_varlen(torch.device(device), dtype, head_dim) == varlen
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not has_varlen(torch.device(device), dtype, head_dim)


@float64
def test_attention_from_start_to_start_equals_attention_under_the_mask():
    """What the kernel for documents is asked for: the rows end to end, causal from each start to the next."""
    documents = torch.randint(0, 2, (3, 20)).cumsum(1)
    q, k, v = torch.randn(3, 3, 2, 20, 8)  # (B, H, T, D/H) each
    expected = F.scaled_dot_product_attention(q, k, v, document_mask(documents, 3, 20, False))
    flat = [x.transpose(1, 2).flatten(0, 1).transpose(0, 1) for x in (q, k, v)]  # (H, B * T, D/H)
    parts = [
        F.scaled_dot_product_attention(*(x[:, start:stop] for x in flat), is_causal=True)
        for start, stop in pairwise(document_starts(documents).tolist())
    ]
    assert_same(torch.cat(parts, 1), expected.transpose(1, 2).flatten(0, 1).transpose(0, 1))
    with torch.device("meta"):  # no kernel runs, but it is called with shapes that it takes
        model = tiny_model(n_kv_heads=2).train()
        x, starts = torch.empty(3, 20, 32, requires_grad=True), document_starts(documents).to("meta")
        y = model.layers[0].attention(x, model.rope_cos[:20], model.rope_sin[:20], None, 0, starts)
        y.sum().backward()
    assert y.shape == x.grad.shape == (3, 20, 32)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_the_training_forward_is_one_graph(autocast):
    model, ids = tiny_model(n_layers=1, n_kv_heads=2), random_ids(3, 41)
    mask = (torch.rand(3, 40) < 0.5).float()
    keep, documents = kept(mask, 128), torch.arange(40).div(7, rounding_mode="floor").expand(3, -1)
    x, y, starts = ids[:, :-1], ids[:, 1:], document_starts(documents)
    for call in (
        lambda: model(x, y),
        lambda: model(x, y, mask, starts, keep),
        lambda: model.token_logps(ids, 0.7, mask, keep),
    ):
        torch._dynamo.reset()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = torch._dynamo.explain(call)()
        assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


def test_recomputed_activations_give_the_same_gradients():
    model = Llama(ModelConfig(dim=32, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=50, max_seq_len=32, dropout=0.2))
    ids = torch.randint(0, 50, (3, 17), generator=torch.Generator().manual_seed(0))
    saved, gradients = [], []
    for recompute in (False, True):
        model.recompute, kept = recompute, 0

        def count(tensor):
            nonlocal kept
            kept += tensor.numel()
            return tensor

        model.zero_grad()
        torch.manual_seed(1)  # of dropout, which has to fall alike twice
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        saved.append(kept)
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)
    assert saved[1] < saved[0] / 2


@float64
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shape", [(1,), (2,), (8,), (9,), (1, 1), (2, 3), (0,)], ids=str)
def test_the_head_of_a_large_vocabulary_is_the_same_for_few_rows(tied, shape):
    model = tiny_model(vocab_size=2**17, dim=32, n_layers=1, n_heads=2, n_kv_heads=1, tied=tied)
    h = torch.randn(*shape, 32, generator=torch.Generator().manual_seed(0))
    assert model.head_weight.numel() == UNCACHED
    with torch.no_grad():
        found = model.head(h)
    assert found.is_contiguous()
    torch.testing.assert_close(found, h @ model.head_weight.detach().T, atol=1e-12, rtol=1e-12)
