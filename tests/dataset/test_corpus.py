"""dataset/corpus.py: what meta.json contradicts is refused, and rows depend on (seed, row) alone."""

import numpy as np
import pytest
import torch
from packing import make_bins

from dataset.corpus import Corpus
from dataset.formats import DataError, load_meta, save_meta


def test_corpus_refuses_what_meta_contradicts(tmp_path):
    meta = make_bins(tmp_path, {"a": range(10), "b": range(5)})

    def refused(match, changes, vocab_size=None, split="train"):
        save_meta(tmp_path, meta | changes)
        with pytest.raises(DataError, match=match):
            Corpus(tmp_path, split, vocab_size)

    refused("meta.json.* 1000.* 64793", {}, 64793)
    wrong = meta["files"] | {"train.b.bin": dict(part="pretrain", tokens=6)}
    refused(r"train\.b\.bin has 10 bytes.*6 tokens of uint16, 12 bytes", dict(files=wrong))
    for counts, words in (
        (dict(tokens=4, characters=5), r"train\.tokens is 4, train\.b\.bin has 5"),
        (dict(tokens=5, characters=0), r"train\.characters is 0, of 5 tokens"),
    ):
        changed = meta["sources"]["b"] | dict(train=dict(documents=1, **counts))
        refused(rf"meta\.json: sources\.b\.{words}", dict(sources=meta["sources"] | dict(b=changed)))
    refused("dtype uint16.*70000.*uint32", dict(vocab_size=70000))
    refused(r"does not describe train\.b\.bin: run", dict(files={"train.a.bin": meta["files"]["train.a.bin"]}))
    refused(r"does not describe val\.a\.bin", {}, split="val")
    refused(r"does not describe train\.\*\.bin", dict(sources={}))
    refused("format version 1, this code reads 2: run data_process.py again", dict(format_version=1))
    save_meta(tmp_path, meta)
    (tmp_path / "train.b.bin").unlink()
    with pytest.raises(DataError, match=r"train\.b\.bin not found"):
        Corpus(tmp_path, "train")
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(DataError, match="meta.json is not valid JSON"):
        load_meta(tmp_path)
    (tmp_path / "meta.json").unlink()
    with pytest.raises(DataError, match="meta.json not found"):
        load_meta(tmp_path)


@pytest.mark.parametrize(
    "place, key, found, message",
    [
        ("sources.a", "val", None, "sources.a has no val"),
        ("sources.a.train", "characters", None, "sources.a.train has no characters"),
        ("sources.a.train", "tokens", -1, "sources.a.train.tokens is -1, no count"),
        ("sources.a.train", "tokens", 1e3, "sources.a.train.tokens is 1000.0, no count"),
        ("sources.a.train", "tokens", True, "sources.a.train.tokens is true, no count"),
        ("sources.a.train", "tokens", 2**63, "sources.a.train.tokens is 9223372036854775808, no count"),
        ("sources", "a", [1], "sources.a is no object"),
        ("", "sources", "a\n", "sources is no object"),
        ("", "vocab_size", "x" * 1000, 'vocab_size is "x{39}, no count'),
        ("", "dtype", 16, "dtype is 16, no text"),
        ("", "val_share", -0.5, "val_share is -0.5, no count"),
        ("", "files", [], "files is no object"),
        ("files.train-a-bin", "tokens", None, "train.a.bin has no tokens"),
        ("files.train-a-bin", "part", None, "files.train.a.bin has no part"),
        ("", "tally", dict(sft=dict(a=dict(read=1))), "tally.sft.a has no answer_tokens_lost"),
        ("", "lengths", dict(sft=dict(a={"3": "many"})), 'lengths.sft.a.3 is "many", no count'),
        ("", "command", ["python"], "command is no object"),
    ],
)
def test_meta_is_as_it_was_written(tmp_path, place, key, found, message):
    meta = make_bins(tmp_path, {"a": range(10)})
    at = meta
    for name in filter(None, place.split(".")):
        at = at[name.replace("-", ".")]
    at[key] = found
    if found is None:
        del at[key]
    save_meta(tmp_path, meta)
    with pytest.raises(DataError, match=f"meta.json: {message}: it was changed or damaged; run data_process.py again"):
        load_meta(tmp_path)


def test_corpus_refuses_ids_beyond_the_vocabulary_when_read(tmp_path):
    meta = make_bins(tmp_path, {"a": range(5), "b": range(10)})
    save_meta(tmp_path, meta | dict(vocab_size=9))
    data = Corpus(tmp_path, "train")
    assert data.read(0, 14).tolist() == [*range(5), *range(9)]
    for read in (lambda: data.read(0, 15), lambda: data.batch(0, 3, 5, seed=0), lambda: data.windows(10, 15, 4)):
        with pytest.raises(DataError, match=r"train\.b\.bin: token id 9 "):
            read()


def test_sources_are_read_end_to_end(tmp_path):
    make_bins(tmp_path, {"first": range(4), "empty": [], "z": range(4, 10), "a": range(10, 11)})
    data = Corpus(tmp_path, "train")
    assert len(data) == 11
    assert list(data.segments.items()) == [("first", (0, 4)), ("empty", (4, 4)), ("z", (4, 10)), ("a", (10, 11))]
    for start in range(12):
        for stop in range(start, 12):
            assert data.read(start, stop).tolist() == list(range(start, stop))


def test_a_corpus_without_tokens_is_refused(tmp_path):
    make_bins(tmp_path, {"a": [], "b": []}, split="val")
    with pytest.raises(DataError, match=r"val\.\*\.bin: no tokens"):
        Corpus(tmp_path, "val")


def reference_row(ids, row, seq_len, seed):
    """Row of the training sequence over one ring of ids: the definition, in plain numpy."""
    epoch, i = divmod(row, len(ids) // seq_len)
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(ids) // seq_len)
    start = rng.integers(len(ids)) + order[i] * seq_len
    return np.take(ids, np.arange(start, start + seq_len + 1), mode="wrap")


def reference_batch(ids, first_row, n_rows, seq_len, seed):
    rows = np.stack([reference_row(ids, first_row + i, seq_len, seed) for i in range(n_rows)])
    return torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, 1:])


@pytest.mark.parametrize("first_row", [0, 7, 990, 2995])
@pytest.mark.parametrize("seq_len", [1, 8, 50])
def test_batches_are_of_one_ring_over_all_sources(tmp_path, first_row, seq_len):
    ids = np.random.default_rng(0).integers(0, 1000, 50)
    make_bins(tmp_path, {"a": ids[:13], "empty": [], "b": ids[13:14], "c": ids[14:]})
    found = Corpus(tmp_path, "train").batch(first_row, 20, seq_len, seed=3)
    wanted = reference_batch(ids, first_row, 20, seq_len, seed=3)
    assert all(torch.equal(x, y) and x.is_contiguous() for x, y in zip(found, wanted, strict=True))


def test_one_epoch_of_batches_covers_the_tokens_once(tmp_path):
    tokens, seq_len = 50, 8
    make_bins(tmp_path, {"a": range(20), "b": range(20, 50)})
    data = Corpus(tmp_path, "train")
    n = tokens // seq_len
    for epoch in range(3):
        x, y = data.batch(epoch * n, n, seq_len, seed=1)
        assert x.shape == y.shape == (n, seq_len) and x.dtype == torch.int64
        assert torch.equal(y, (x + 1) % tokens)  # the ids count up, so the next token is the next number
        assert len(set(x.flatten().tolist())) == n * seq_len
    assert not torch.equal(data.batch(0, n, seq_len, 1)[0], data.batch(n, n, seq_len, 1)[0])
    assert not torch.equal(data.batch(0, n, seq_len, 1)[0], data.batch(0, n, seq_len, 2)[0])


@pytest.mark.parametrize("mixture", [[], ["b=1", "a=2"]])
def test_rows_do_not_depend_on_how_they_are_fetched(tmp_path, mixture):
    make_bins(tmp_path, {"a": range(50), "b": range(100, 120)})

    def batch(first_row, n_rows):
        return Corpus(tmp_path, "train", mixture=mixture).batch(first_row, n_rows, 8, seed=3)[0]

    whole = batch(990, 20)  # over several epochs and the end of a block
    assert torch.equal(whole[7:], batch(997, 13))
    assert torch.equal(whole, torch.cat([batch(i, 1) for i in range(990, 1010)]))


def test_too_few_tokens_for_one_window(tmp_path):
    make_bins(tmp_path, {"a": range(10), "b": range(5)})
    with pytest.raises(DataError, match=r"train\.\*\.bin: 15 tokens do not fill one window of 16"):
        Corpus(tmp_path, "train").batch(0, 1, 16, seed=0)
    data = Corpus(tmp_path, "train", mixture=["a=100", "b=2"])
    assert data.epochs(1, 5) and data.batch(0, 1, 5, seed=0)
    for use in (lambda: data.batch(0, 1, 6, seed=0), lambda: data.epochs(1, 6)):
        with pytest.raises(DataError, match="mixture: b=2: 5 tokens do not fill one window of 6"):
            use()


@pytest.mark.parametrize(
    "mixture, rows",
    [
        (["a=3", "b=1"], [750, 250]),
        (["b=0.1", "a=0.7", "c=.2"], [100, 700, 200]),
        (["a=1", "b=1", "c=1"], [334, 333, 333]),
        (["a=2", "b=2", "c=3"], [286, 286, 428]),  # 285.71, 285.71, 428.57: the two largest remainders
        (["a=1e3", "b=1"], [999, 1]),
        (["c=5"], [1000]),
    ],
)
def test_every_thousand_rows_have_the_exact_shares(tmp_path, mixture, rows):
    numbers = {"a": 0, "b": 1, "c": 2}
    make_bins(tmp_path, {name: [n] * 40 for name, n in numbers.items()})
    x, _ = Corpus(tmp_path, "train", mixture=mixture).batch(0, 3000, 1, seed=5)
    blocks = x.reshape(3, 1000).tolist()
    for block in blocks:
        assert [block.count(numbers[item[0]]) for item in mixture] == rows
    if len(mixture) > 1:
        assert blocks[0] != blocks[1] != sorted(blocks[1])


def test_a_source_of_a_mixture_has_the_rows_that_it_would_have_alone(tmp_path):
    numbers = {"a": range(100), "left_out": range(100, 400), "b": range(400, 437)}
    make_bins(tmp_path, numbers)
    x, y = Corpus(tmp_path, "train", mixture=["b=1", "a=3"]).batch(0, 2100, 5, seed=7)
    assert not ((x >= 100) & (x < 400)).any()
    for name, belongs in (("a", x[:, 0] < 100), ("b", x[:, 0] >= 400)):
        wanted = reference_batch(np.array(numbers[name]), 0, int(belongs.sum()), 5, seed=7)
        assert torch.equal(x[belongs], wanted[0]) and torch.equal(y[belongs], wanted[1])
    of_a = x[x[:, 0] < 100]
    for epoch in of_a[: len(of_a) // 20 * 20].reshape(-1, 100):  # 20 windows of 5
        assert sorted(epoch.tolist()) == list(range(100))
    for epoch in x[x[:, 0] >= 400][:70].reshape(-1, 35):  # 7 windows of 5, of 37 tokens
        assert len(set(epoch.tolist())) == 35


def test_epochs_of_a_mixture(tmp_path):
    make_bins(tmp_path, {"a": range(100), "b": range(50)})
    # of 400 rows of 5 tokens a has 300, b 100
    found = Corpus(tmp_path, "train", mixture=["a=3", "b=1"]).epochs(400, 5)
    assert found == {"mixture: a=3": 15, "mixture: b=1": 10}
    assert list(Corpus(tmp_path, "train").epochs(300, 5).values()) == [10]


@pytest.mark.parametrize(
    "mixture, message",
    [
        (["a=0"], "mixture: a=0: a number above 0 and at most a million is needed"),
        (["a=1", "b=-2"], "mixture: b=-2: a number above 0 and"),
        (["a=much"], "mixture: a=much: a number above 0 and"),
        (["a"], "mixture: a: a number above 0 and"),
        (["a=２"], "mixture: a=２: a number above 0 and"),
        (["a=nan"], "mixture: a=nan: a number above 0 and"),
        (["a=inf"], "mixture: a=inf: a number above 0 and"),
        (["a=1e308", "b=1e308"], "mixture: a=1e308: a number above 0 and"),
        (["a=1", "wiki=2"], "mixture: wiki=2: no such source, known are a, b"),
        ([3], "mixture: 3: no such source"),
        (["a=1", "b=1", "a=2"], "mixture: a=2: a is named twice"),
        (["a=1", "b=5000"], "mixture: a=1: less than one row in 1000"),
    ],
)
def test_a_mixture_that_makes_no_sense_is_refused(tmp_path, mixture, message):
    make_bins(tmp_path, {"a": range(10), "b": range(10)})
    with pytest.raises(DataError, match=message):
        Corpus(tmp_path, "train", mixture=mixture)


def test_windows_score_every_token_after_the_first_once(tmp_path):
    make_bins(tmp_path, {"a": range(10, 14), "b": range(14, 20)}, split="val")
    data = Corpus(tmp_path, "val")
    x, y = data.windows(*data.segments["b"], 3)
    assert x.tolist() == [[14, 15, 16], [17, 18, 0]]
    assert y.tolist() == [[15, 16, 17], [18, 19, -100]]
    for empty in ((4, 4), (4, 5)):
        assert data.windows(*empty, 3)[0].shape == (0, 3)


@pytest.mark.parametrize("every", [1, 2, 3, 9])
@pytest.mark.parametrize("batch_size", [1, 2, 50])
def test_spaced_windows_are_some_of_the_windows(tmp_path, every, batch_size):
    make_bins(tmp_path, {"a": range(10, 14), "b": range(14, 40), "one": [3]}, split="val")
    data = Corpus(tmp_path, "val")
    for start, stop in data.segments.values():
        found = list(data.spaced_windows(start, stop, 3, every, batch_size))
        wanted = [side[::every] for side in data.windows(start, stop, 3)]
        assert [len(x) for x, _ in found] == [len(x) for x in wanted[0].split(batch_size) if len(x)]
        for i, side in enumerate(wanted):
            assert torch.equal(torch.cat([torch.empty(0, 3, dtype=torch.int64), *(each[i] for each in found)]), side)


def test_what_is_not_scored_is_not_read(tmp_path):
    meta = make_bins(tmp_path, {"a": [0, 1, 2, 3, *[9] * 5, 4, 5, 6, 7, *[9] * 5]}, split="val")
    save_meta(tmp_path, meta | dict(vocab_size=9))  # reading a 9 is an error
    ((x, y),) = Corpus(tmp_path, "val").spaced_windows(0, 18, 3, every=3, batch_size=4)
    assert x.tolist() == [[0, 1, 2], [4, 5, 6]] and y.tolist() == [[1, 2, 3], [5, 6, 7]]
