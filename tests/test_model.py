"""model.py against transformers, plain PyTorch, hand-computed numbers and llama2.c's golden text."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from models import assert_same_gradients, gradients, random_ids, shapes, tiny_model
from tiny import assert_same, float64

from configs.sizes import count_parameters, sizes
from dataset.batches import kept
from dataset.corpus import document_numbers
from model import Llama, ModelConfig, document_mask, document_starts, has_varlen

COUNTS = [4_393_216, 24_636_096, 58_479_616, 134_714_880, 268_756_992]  # of the five sizes, tied


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
@pytest.mark.parametrize("head", ["loss", "logps", "logits", "scalar"])
@shapes
def test_the_embeddings_gradient_is_whole_and_sums_what_reading_and_predicting_give(shape, head):
    model, ids = tiny_model(**shape, scalar_head=head == "scalar"), random_ids(2, 30)

    def whole():
        if head == "scalar":
            return model.values(ids).sum()
        if head == "logits":
            return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        return model(ids[:, :-1], ids[:, 1:]) if head == "loss" else model.token_logps(ids).square().mean()

    found = gradients(model, whole() + whole() / 2)  # two passes, as for pairs
    assert found["tok_embeddings.weight"].layout == torch.strided
    model.tok_embeddings.sparse_gradient = False
    assert_same_gradients(found, gradients(model, whole() * 1.5))
