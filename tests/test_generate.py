"""model.generate beside a loop without a cache: whenever tokens are fetched, in whatever shapes, replayed or not."""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from tiny import float64, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import generate
from generate import KVCache
from lowbit import layers
from model import Llama

# fetch_every and bucket: a CPU's, a GPU's but that its bucket is small enough to be outgrown, and others
MODES = [(1, 1), (16, 8), (3, 128)]
modes = pytest.mark.parametrize("mode", [dict(fetch_every=n, bucket=bucket) for n, bucket in MODES], ids=str)


def random_ids(n, seed=1):
    return torch.randint(3, 24, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def talker(**changes):
    """So few words that sampled and greedy texts meet an eos soon."""
    return tiny(**dict(vocab_size=24, tied=False, max_seq_len=40) | changes).eval()


PROMPTS = [random_ids(n, seed=10 + n) for n in (3, 11, 1, 7, 5, 2, 9, 4)]


@torch.no_grad()
def greedy_reference(model, prompt, max_new_tokens):
    """Without a cache and without eos: the whole text again for every token."""
    ids = list(prompt)
    while len(ids) < min(len(prompt) + max_new_tokens, model.config.max_seq_len):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(prompt) :]


def cut(text, eos):
    return text[: text.index(eos) + 1] if eos in text else text


@float64
@modes
@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_cached_generation_equals_uncached(n_kv_heads, mode):
    model = talker(n_kv_heads=n_kv_heads, tied=n_kv_heads == 4)
    for prompt in PROMPTS[:2]:
        expected = greedy_reference(model, prompt, 20)
        assert model.generate([prompt], 20, temperature=0, eos_id=-1, **mode).tokens == [expected]
    assert model.generate([prompt, prompt], 20, temperature=0, eos_id=-1, **mode).tokens == [expected] * 2


@float64
@modes
def test_ragged_batch_equals_single_rows_as_rows_stop_and_leave(monkeypatch, mode):
    model, left, keep = talker(), [], KVCache.keep
    monkeypatch.setattr(KVCache, "keep", lambda cache, rows: (left.append(len(rows)), keep(cache, rows))[1])
    free = [greedy_reference(model, prompt, 25) for prompt in PROMPTS]
    eos = max(range(24), key=lambda eos: len({len(cut(text, eos)) for text in free}))
    expected = [cut(text, eos) for text in free]
    assert len(set(map(len, expected))) >= 4 and sum(len(text) < 25 for text in expected) >= 4
    assert model.generate(PROMPTS, 25, temperature=0, eos_id=eos, **mode).tokens == expected
    assert left and left[0] <= (4 if mode["bucket"] > 1 else 7)  # rows did leave the batch

    options = dict(temperature=0, eos_id=eos, repetition_penalty=1.2, return_logps=True)
    batch = model.generate(PROMPTS, 25, **options, **mode)
    for prompt, text, logps in zip(PROMPTS, batch.tokens, batch.logps, strict=True):
        alone = model.generate([prompt], 25, **options)
        assert alone.tokens == [text]
        assert logps == pytest.approx(alone.logps[0], abs=1e-9)


@float64
@modes
def test_generation_ends_with_the_context(mode):
    model = talker(max_seq_len=14)
    tokens = model.generate(PROMPTS, 100, temperature=0, eos_id=-1, **mode).tokens
    assert [len(p) + len(t) for p, t in zip(PROMPTS, tokens, strict=True)] == [14] * len(PROMPTS)
    assert tokens == [greedy_reference(model, prompt, 100) for prompt in PROMPTS]
    longest = random_ids(13)
    out = model.generate([longest], 5, temperature=0, eos_id=-1, **mode)
    assert out.tokens == [greedy_reference(model, longest, 1)]


@float64
@modes
def test_a_seed_gives_the_same_text_in_every_mode(mode):
    model, streams = talker(max_seq_len=30), ([], [])
    options = dict(seed=3, top_p=0.95, top_k=20, repetition_penalty=1.1, return_logps=True)
    expected = model.generate(PROMPTS, 25, **options, on_token=lambda *token: streams[0].append(token))
    assert len(set(map(len, expected.tokens))) > 3  # rows end at different times and leave
    found = model.generate(PROMPTS, 25, **options, on_token=lambda *token: streams[1].append(token), **mode)
    assert found.tokens == expected.tokens and streams[0] == streams[1]
    for logps, expected_logps in zip(found.logps, expected.logps, strict=True):
        assert logps == pytest.approx(expected_logps, abs=1e-9)
    longest = max(map(len, found.tokens))  # step after step, and in each row after row
    assert streams[1] == [(row, ids[i]) for i in range(longest) for row, ids in enumerate(found.tokens) if i < len(ids)]


@float64
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_returned_logps_score_the_finished_text(temperature):
    model = talker(max_seq_len=30)
    out = model.generate(PROMPTS, 25, temperature=temperature, seed=3, return_logps=True)
    assert {len(t) for t in out.tokens} != {25}  # some end early, or by the context
    for prompt, text, logps in zip(PROMPTS, out.tokens, out.logps, strict=True):
        with torch.no_grad():
            expected = model.token_logps(torch.tensor([prompt + text]), temperature or 1.0)[0, -len(text) :]
        assert logps == pytest.approx(expected.tolist(), abs=1e-9)
    assert model.generate(PROMPTS, 1).logps is None


@pytest.mark.parametrize("new, fetches", [(1, [1]), (16, [16]), (17, [16, 1]), (40, [16, 16, 8])])
def test_tokens_are_fetched_once_in_sixteen(new, fetches, monkeypatch):
    found, take = [], generate.take
    monkeypatch.setattr(
        generate, "take", lambda out, rows, ids, *args: found.append(len(ids)) or take(out, rows, ids, *args)
    )
    model = talker(max_seq_len=64)
    tokens = model.generate([[5], [6, 7]], new, eos_id=-1, fetch_every=16).tokens
    assert list(map(len, tokens)) == [new, new] and found == [2 * n for n in fetches]


@float64
def test_all_rows_end_within_one_fetch_or_one_long_before_the_others():
    model = talker()
    free = [greedy_reference(model, prompt, 25) for prompt in PROMPTS]
    ends = {eos: sorted(text.index(eos) if eos in text else 99 for text in free) for eos in range(24)}
    early = min(ends, key=lambda eos: ends[eos][0] - ends[eos][1])  # the first row ends long before the second
    assert ends[early][1] - ends[early][0] > 3
    tokens = model.generate(PROMPTS, 25, temperature=0, eos_id=early, fetch_every=16, bucket=8).tokens
    assert tokens == [cut(text, early) for text in free]
    rows = [i for i, text in enumerate(free) if early in text[:15]]
    tokens = model.generate(
        [PROMPTS[i] for i in rows], 25, temperature=0, eos_id=early, fetch_every=16, bucket=8
    ).tokens
    assert tokens == [cut(free[i], early) for i in rows] and max(map(len, tokens)) < 16


def test_one_candidate_is_greedy():
    model = talker()
    greedy = model.generate(PROMPTS, 15, temperature=0).tokens
    for options in (dict(top_k=1), dict(top_p=1e-6), dict(top_p=0.0)):
        assert model.generate(PROMPTS, 15, **options).tokens == greedy


def test_seed_gives_the_same_text_whatever_the_global_generator():
    model = talker()
    first = model.generate(PROMPTS, 15, seed=7).tokens
    state = torch.get_rng_state()
    assert model.generate(PROMPTS, 15, seed=7).tokens == first
    model.generate(PROMPTS, 15, temperature=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.generate(PROMPTS, 15, seed=8).tokens != first


@float64
@pytest.mark.parametrize("options", [dict(), dict(top_p=0.9, min_p=0.01, repetition_penalty=1.1)], ids=str)
def test_a_row_draws_the_same_whatever_else_is_in_its_batch(options):
    model = talker()
    texts = model.generate(PROMPTS, 25, seed=7, **options).tokens
    backwards = model.generate(PROMPTS[::-1], 25, seed=7, **options).tokens
    assert backwards[::-1] == texts and len(set(map(len, texts))) > 2
    for prompt, text in zip(PROMPTS, texts, strict=True):
        assert model.generate([prompt], 25, seed=7, **options).tokens == [text]
        assert model.generate([prompt], 7, seed=7, **options).tokens == [text[:7]]
    group = model.generate([PROMPTS[0]] * 4 + PROMPTS[1:] + [PROMPTS[0]], 25, seed=7, eos_id=-1, **options).tokens
    same = [*group[:4], group[-1]]
    assert len(set(map(tuple, same))) == 5  # replies to one prompt differ
    assert model.generate([PROMPTS[0]] * 5, 25, seed=7, eos_id=-1, **options).tokens == same


@float64
def test_a_list_of_seeds_has_one_for_each_prompt():
    model, seeds = talker(), [3, -1, 2**63, 3, 5, 6, 7, 8]
    prompts = [*PROMPTS[:3], PROMPTS[0], *PROMPTS[4:]]
    texts = model.generate(prompts, 25, seed=seeds).tokens
    assert texts[0] == texts[3]  # the same prompt and seed
    assert model.generate(prompts[::-1], 25, seed=seeds[::-1]).tokens == texts[::-1]
    assert [model.generate([p], 25, seed=[s]).tokens[0] for p, s in zip(prompts, seeds, strict=True)] == texts
    assert model.generate(prompts, 25, seed=[seed + 1 for seed in seeds]).tokens != texts
    with pytest.raises(ValueError):
        model.generate(prompts, 25, seed=seeds[1:])


def test_without_a_seed_torchs_generator_decides():
    model, texts = talker(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(model.generate(PROMPTS, 15).tokens)
    assert texts[0] == texts[1] != texts[2]


def test_uniform_numbers_are_uniform_and_of_one_row_alone():
    one = generate.uniform_numbers([[1, 2], [1, 2], [3]], 0, 4000)  # (3, n)
    assert one.dtype == torch.float32 and 0 <= one.min() and one.max() < 1
    assert one.mean(1).tolist() == pytest.approx([0.5] * 3, abs=0.025)  # 5 standard deviations of 1 / sqrt(12 n)
    assert torch.corrcoef(one).triu(1).abs().max() < 0.08  # 5 of 1 / sqrt(n)
    assert torch.equal(generate.uniform_numbers([[3], [1, 2]], 0, 9), one[[2, 0], :9])


class Counted(TorchDispatchMode):
    """How many of torch's operators run."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "prompts, options, outside",
    [
        (PROMPTS[:1], dict(temperature=0), 30),
        (PROMPTS[:4], dict(temperature=0), 45),  # of several lengths
        (PROMPTS[:1], dict(seed=1, top_p=0.9, min_p=0.1), 55),
    ],
)
def test_a_token_takes_few_operators(prompts, options, outside):
    """45 in a layer, 14 of them its products and 12 its norms, and some to draw. Each takes microseconds, of which a
    small model has few."""
    counts = {}
    for n_layers in (2, 3):
        model, found = talker(n_layers=n_layers), []
        for n in (5, 15):
            with Counted() as counted:
                model.generate(prompts, n, eos_id=-1, **options)
            found.append(counted.count)
        counts[n_layers] = (found[1] - found[0]) / 10
    in_a_layer = counts[3] - counts[2]
    assert in_a_layer <= 45 and counts[2] - 2 * in_a_layer <= outside


def test_streamed_tokens_are_the_returned_ones():
    model, streamed = talker(), [[] for _ in PROMPTS]
    tokens = model.generate(PROMPTS, 25, seed=7, on_token=lambda row, token: streamed[row].append(token)).tokens
    assert len({len(t) for t in tokens}) > 2  # rows ended at different times
    assert streamed == tokens
    assert model.generate(PROMPTS, 0).tokens == [[] for _ in PROMPTS]
    assert model.generate([], 5).tokens == []


@pytest.mark.parametrize("prompts, lengths", [([[]], "0"), ([[3], []], "0, 1"), ([[3], [3] * 40], "1, 40")])
def test_empty_or_too_long_prompts_are_refused(prompts, lengths):
    with pytest.raises(ValueError, match=rf"1 to 39 tokens; got \[{lengths}\]"):
        talker().generate(prompts, 5)


def test_generation_is_without_dropout_and_leaves_the_model_alone():
    model = talker(dropout=0.5)
    expected = model.generate(PROMPTS, 15, temperature=0).tokens
    assert not model.training
    before = {name: (p, p.dtype) for name, p in model.named_parameters()}
    assert model.train().generate(PROMPTS, 15, temperature=0, dtype=torch.bfloat16).tokens
    assert model.generate(PROMPTS, 15, temperature=0).tokens == expected
    assert all(module.training for module in model.modules())
    assert all(before[name] == (p, p.dtype) and p.requires_grad for name, p in model.named_parameters())


def test_generation_does_not_run_what_was_compiled():
    def refuse(graph, inputs):
        raise AssertionError("a length of text was compiled")

    model = talker()
    expected = model.generate(PROMPTS, 5, temperature=0).tokens
    for layer in model.layers:
        layer.compile(backend=refuse)
    assert model.generate(PROMPTS, 5, temperature=0).tokens == expected


def test_dtype_is_that_of_weights_and_cache(monkeypatch):
    model, dtypes, write = talker(), set(), KVCache.write
    monkeypatch.setattr(
        KVCache, "write", lambda cache, i, k, v: dtypes.update((cache.kv.dtype, k.dtype)) or write(cache, i, k, v)
    )
    half = copy.deepcopy(model)
    for p in half.parameters():
        p.data = p.data.bfloat16()
    expected = half.generate(PROMPTS, 15, seed=1)
    assert dtypes == {torch.bfloat16}
    found = model.generate(PROMPTS, 15, seed=1, dtype=torch.bfloat16, return_logps=True)
    assert dtypes == {torch.bfloat16} and found.tokens == expected.tokens
    assert all(logp < 0 for logps in found.logps for logp in logps)
    model.generate(PROMPTS, 5, seed=1)
    assert dtypes == {torch.bfloat16, torch.float32}


@pytest.mark.parametrize("quant", [dict(method="int8"), dict(method="int4", group_size=32, symmetric=True)])
def test_quantized_models_decode_in_half_precision_with_the_layers_they_have(quant):
    model = layers.build(talker(), quant)
    low = [module for module in model.modules() if isinstance(module, layers.LowBitWeight)]
    for module in low:
        module.q.random_(0, 100)
        module.scale.fill_(1e-3)
    twin = generate.decoder(model, torch.bfloat16)
    assert [module for module in twin.modules() if isinstance(module, layers.LowBitWeight)] == low
    assert twin.norm.weight.dtype == torch.bfloat16
    h = twin.hidden(torch.tensor([[3, 4, 5]]))
    assert h.dtype == torch.bfloat16
    torch.testing.assert_close(h.float(), model.hidden(torch.tensor([[3, 4, 5]])), atol=0.1, rtol=0.1)
    assert model.generate(PROMPTS, 5, dtype=torch.bfloat16, fetch_every=16, bucket=8).tokens


class Recorded(TorchDispatchMode):
    """What a CUDA graph is, on a CPU: capture runs nothing and lets the host look at nothing; replay runs on the memory
    that the capture saw, whatever Python thinks of by then."""

    captured, replayed = [], 0

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError("operation not permitted when stream is capturing\nand more lines")
        if function._schema.is_mutable:
            self.before += [
                (tensor, tensor.clone()) for tensor in (args[0], (kwargs or {}).get("out")) if tensor is not None
            ]
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    @contextlib.contextmanager
    def capture(self):
        self.captured.append(self)
        try:
            with self:
                yield
        except RuntimeError as error:  # the one that reaches the caller says nothing of the cause
            raise RuntimeError("operation failed due to a previous error during capture") from error
        finally:
            for tensor, content in reversed(self.before):
                tensor.copy_(content)

    def replay(self):
        type(self).replayed += 1
        for function, args, kwargs, out in self.calls:
            again = function(*args, **kwargs)
            if not any(result.alias_info for result in function._schema.returns):  # neither a view nor in place
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor):
                        old.copy_(new)


@pytest.fixture
def graphs(monkeypatch):
    """CUDA's graphs and streams on a CPU."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    names = dict(
        CUDAGraph=Recorded, graph=lambda graph, **_: graph.capture(), stream=lambda _: contextlib.nullcontext()
    )
    names |= dict(Stream=lambda device: stream, current_stream=lambda device: stream)
    for name, value in names.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(generate, "has_graphs", lambda device: True)
    monkeypatch.setattr(generate.Graphed, "failed", False)
    monkeypatch.setattr(Recorded, "captured", [])
    monkeypatch.setattr(Recorded, "replayed", 0)
    return Recorded


@float64
@pytest.mark.parametrize(
    "options", [dict(temperature=0), dict(seed=5), dict(seed=5, repetition_penalty=1.2, top_p=0.9)]
)
@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_replayed_graphs_give_the_same_text(graphs, options, n_kv_heads):
    model = talker(max_seq_len=100, n_kv_heads=n_kv_heads)
    options = options | dict(eos_id=3, return_logps=True)
    expected = model.generate(PROMPTS, 80, **options, bucket=1)
    assert not graphs.captured and len(set(map(len, expected.tokens))) >= 3
    found = model.generate(PROMPTS, 80, **options, bucket=32, fetch_every=4)
    assert found.tokens == expected.tokens
    for logps, expected_logps in zip(found.logps, expected.logps, strict=True):
        assert logps == pytest.approx(expected_logps, abs=1e-9)
    assert 1 <= len(graphs.captured) <= 7 <= graphs.replayed  # 4 buckets and the batches of 8, 4, 2 and 1 rows


def test_a_graph_is_captured_only_where_it_is_repaid(graphs):
    talker().generate(PROMPTS, 12, eos_id=-1, bucket=32)
    assert not graphs.captured
    talker(max_seq_len=64).generate([[5]], 60, eos_id=-1, bucket=32)
    # the first token is prefill's; of each bucket one step is the warm-up
    assert len(graphs.captured) == 2 and graphs.replayed == 59 - 2


def test_without_a_graph_generation_goes_on_with_one_warning(graphs, capsys):
    class Looks(Llama):
        def head(self, h):
            logits = super().head(h)
            assert logits.sum().item() == logits.sum()  # the host looks at the device
            return logits

    model = talker(max_seq_len=100)
    model.__class__ = Looks
    expected = model.generate(PROMPTS, 80, temperature=0, bucket=1).tokens
    assert model.generate(PROMPTS, 80, temperature=0, bucket=32).tokens == expected
    line = "warning: generation goes on without a CUDA graph, and slower: operation not permitted when stream is captur"
    assert capsys.readouterr().err == line + "ing\n" and not graphs.replayed
