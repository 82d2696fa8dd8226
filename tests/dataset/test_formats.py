"""dataset/formats.py: what is written is read back, bad files are refused, batches depend on (seed, row) alone."""

import hashlib
import os
import pickle
from collections import namedtuple

import numpy as np
import pytest
import torch
from packing import pack_examples

from dataset.batches import Examples, PackedOrder, epoch_order, pack_lengths, pad_batch
from dataset.corpus import Corpus
from dataset.formats import BinWriter, DataError, atomic_write, load_meta, load_pkl, save_meta, save_pkl, token_dtype

Example = namedtuple("Example", "ids loss_mask")


def make_bins(directory, sources, vocab_size=1000, split="train"):
    """train.<source>.bin of {source: ids}, and what meta.json says of them."""
    meta = dict(format_version=2, vocab_size=vocab_size, dtype=token_dtype(vocab_size).name, files={}, sources={})
    for name, ids in sources.items():
        with BinWriter(directory / f"{split}.{name}.bin", vocab_size) as writer:
            writer.write(ids[:3])
            writer.write(ids[3:])
        meta["files"][writer.path.name] = dict(tokens=writer.tokens)
        meta["sources"][name] = {split: dict(tokens=writer.tokens)}
    save_meta(directory, meta)
    return meta


@pytest.mark.parametrize("vocab_size, size", [(1 << 16, 2), ((1 << 16) + 1, 4)])
def test_bin_round_trip_at_the_edge_of_uint16(tmp_path, vocab_size, size):
    ids = [0, 1, 65535, vocab_size - 1, 7]
    make_bins(tmp_path, {"text": ids}, vocab_size)
    assert (tmp_path / "train.text.bin").stat().st_size == size * len(ids)
    found = Corpus(tmp_path, "train", vocab_size).read(0, 5)
    assert found.tolist() == ids and found.dtype == np.int64


def test_bin_writer_counts_and_hashes_what_it_wrote(tmp_path):
    with BinWriter(tmp_path / "a.bin", 1000) as writer:
        for ids in ([1, 2], np.array([3], np.uint16), [], np.arange(10)[::3]):
            writer.write(ids)
    data = (tmp_path / "a.bin").read_bytes()
    assert data == np.array([1, 2, 3, 0, 3, 6, 9], np.uint16).tobytes() and writer.tokens == 7
    assert writer.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("bad", [1000, 70000, -1])
def test_bin_writer_refuses_an_id_outside_the_vocabulary_and_leaves_nothing(tmp_path, bad):
    with pytest.raises(DataError, match=rf"train\.text\.bin: token id {bad} .*999"):
        make_bins(tmp_path, {"text": [1, 2, 3, bad]})
    assert os.listdir(tmp_path) == []


def test_atomic_write_keeps_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path, "w") as file:
        file.write("half of the n")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_corpus_refuses_what_meta_contradicts(tmp_path):
    meta = make_bins(tmp_path, {"a": range(10), "b": range(5)})

    def refused(match, changes, vocab_size=None, split="train"):
        save_meta(tmp_path, meta | changes)
        with pytest.raises(DataError, match=match):
            Corpus(tmp_path, split, vocab_size)

    refused("meta.json.* 1000.* 64793", {}, 64793)
    wrong = meta["files"] | {"train.b.bin": dict(tokens=6)}
    refused(r"train\.b\.bin has 10 bytes.*6 tokens of uint16, 12 bytes", dict(files=wrong))
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
        (["a=0"], "mixture: a=0: the weight must be a number above 0"),
        (["a=1", "b=-2"], "mixture: b=-2: the weight must be"),
        (["a=much"], "mixture: a=much: the weight must be"),
        (["a"], "mixture: a: the weight must be"),
        (["a=nan"], "mixture: a=nan: the weight must be"),
        (["a=inf"], "mixture: a=inf: the weight must be"),
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


def test_pkl_round_trip(tmp_path):
    data = dict(
        tokens=np.arange(5, dtype=np.uint16),
        offsets=np.array([0, 2, 5]),
        is_val=np.array([True, False]),
        empty=np.zeros(0, np.uint32),
        task_names=["write", "polarity"],
        share=np.float64(0.5),
        n=3,
    )
    save_pkl(tmp_path / "a.pkl", data)
    read = load_pkl(tmp_path / "a.pkl")
    assert read.keys() == data.keys()
    for key, value in data.items():
        assert np.array_equal(read[key], value)
        assert getattr(read[key], "dtype", None) == getattr(value, "dtype", None)
    assert os.listdir(tmp_path) == ["a.pkl"]


@pytest.mark.parametrize("protocol", range(6))
def test_pkl_of_every_protocol_is_read_and_refused_alike(tmp_path, protocol):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(dict(a=np.arange(3)), protocol))
    if protocol >= 3:  # the older ones write bytes through codecs.encode, which is not admitted
        assert load_pkl(tmp_path / "a.pkl")["a"].tolist() == [0, 1, 2]
    else:
        with pytest.raises(DataError, match="_codecs.encode is not allowed"):
            load_pkl(tmp_path / "a.pkl")


class Attack:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_malicious_pkl_is_refused_and_not_executed(tmp_path):
    target, path = tmp_path / "executed", tmp_path / "sft.pkl"
    attacks = [
        Attack(os.mkdir, str(target)),
        Attack(eval, f"__import__('os').mkdir({str(target)!r})"),
        dict(tokens=np.array([Attack(os.mkdir, str(target))], dtype=object)),
        Attack(np.load, str(target)),
        torch.zeros(1),
    ]
    for protocol in (2, 5):
        for data in attacks:
            path.write_bytes(pickle.dumps(data, protocol))
            with pytest.raises(DataError, match=r"sft\.pkl: .* is not allowed"):
                load_pkl(path)
            assert not target.exists()


def test_pkl_cannot_forge_object_arrays_or_call_numpy_types(tmp_path):
    path, rebuild = tmp_path / "sft.pkl", np.zeros(1).__reduce_ex__(5)[0]
    forged = [
        np.array([{}], dtype=object),
        Attack(np.ndarray, (1,), "O", b"12345678"),
        Attack(np.ndarray, (1,), np.dtype("i8"), b"12345678"),
        Attack(rebuild, b"12345678", "O", (1,), "C"),
        Attack(rebuild, b"12345678", np.dtype("i8"), (10**13,), "C"),
        np.dtype([("a", "O")]),
    ]
    for value in forged:
        path.write_bytes(pickle.dumps(dict(a=[value]), 5))
        with pytest.raises(DataError, match=r"sft\.pkl"):
            load_pkl(path)


def test_damaged_or_missing_pkl(tmp_path):
    path = tmp_path / "sft.pkl"
    with pytest.raises(DataError, match=r"sft\.pkl not found"):
        load_pkl(path)
    save_pkl(path, dict(tokens=np.arange(1000)))
    whole = path.read_bytes()
    for damaged in (b"", b"not a pickle", whole[:100], whole[:-1], pickle.dumps([1, 2])):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"sft\.pkl"):
            load_pkl(path)


def three_examples():
    return pack_examples([Example([5, 6], [0, 1]), Example([7], [1]), Example([8, 0, 2], [0, 1, 1])], 100)


def test_examples_and_selection():
    arrays = three_examples()
    assert arrays["offsets"].tolist() == [0, 2, 3, 6] and arrays["tokens"].dtype == np.uint16
    examples = Examples(arrays, vocab_size=100)
    assert len(examples) == 3 and examples.lengths.tolist() == [2, 1, 3]
    assert [list(map(list, examples[i])) for i in (0, 2)] == [[[5, 6], [0, 1]], [[8, 0, 2], [0, 1, 1]]]
    kept = examples.select(np.array([True, False, True])).select([1])
    assert len(kept) == 1 and kept.lengths.tolist() == [3] and kept[0][0].tolist() == [8, 0, 2]
    sides = Examples({f"chosen_{k}": v for k, v in arrays.items()}, prefix="chosen_")
    assert sides[1][0].tolist() == [7]
    prompts = Examples({k: arrays[k] for k in ("tokens", "offsets")})
    assert prompts[0][1].tolist() == [0, 0]


def test_loss_mask_takes_a_bit_a_token_and_is_read_at_any_offset():
    rng = np.random.default_rng(0)
    rows = [Example(list(range(n)), rng.integers(0, 2, n).tolist()) for n in [0, 1, 7, 8, 9, 0, 64, 3, 16, 17]]
    arrays = pack_examples(rows, 100)
    assert arrays["loss_mask"].nbytes == -(-sum(len(row.ids) for row in rows) // 8)
    assert arrays["loss_mask"][0] == sum(bit << i for i, bit in enumerate(rows[1].loss_mask + rows[2].loss_mask))
    examples = Examples(arrays)
    assert [tuple(map(list, examples[i])) for i in range(len(rows))] == rows
    assert all(mask.dtype == np.int64 for _, mask in map(examples.__getitem__, range(len(rows))))


def test_examples_refuse_inconsistent_arrays():
    arrays = three_examples()
    with pytest.raises(DataError, match="sft.pkl: no chosen_tokens"):
        Examples(arrays, prefix="chosen_", path="sft.pkl")
    with pytest.raises(DataError, match="token id 8 "):
        Examples(arrays, vocab_size=8)
    for bad in ([0, 2, 3, 5], [1, 2, 3, 6], [0, 3, 2, 6], []):
        with pytest.raises(DataError, match="offsets do not cover its 6 tokens"):
            Examples(arrays | dict(offsets=np.array(bad, dtype=np.int64)))
    whole = arrays["loss_mask"]
    wrong = {r"uint8 \(0,\)": whole[:0], r"uint8 \(6,\)": np.ones(6, np.uint8), r"bool \(1,\)": whole > 0}
    for found, bad in wrong.items():
        with pytest.raises(DataError, match=rf"loss_mask is .*{found}, .* 6 tokens is uint8 \(1,\)"):
            Examples(arrays | dict(loss_mask=bad))


def test_pad_batch_tells_length_apart_from_padding():
    examples = Examples(three_examples())
    batch = pad_batch([examples[i] for i in range(3)], pad_id=0)
    assert batch["ids"].tolist() == [[5, 6, 0], [7, 0, 0], [8, 0, 2]]
    assert batch["loss_mask"].tolist() == [[0, 1, 0], [1, 0, 0], [0, 1, 1]]
    assert batch["lengths"].tolist() == [2, 1, 3]
    assert batch["ids"].dtype == torch.int64 and batch["loss_mask"].dtype == torch.float32


@pytest.mark.parametrize("n", [0, 1, 7, 1000, 1003])
def test_epoch_order_is_a_permutation(n):
    lengths = np.random.default_rng(0).integers(1, 500, n)
    for order in (epoch_order(n, 1, 0), epoch_order(n, 1, 0, lengths, 8)):
        assert sorted(order.tolist()) == list(range(n))
    assert np.array_equal(epoch_order(n, 1, 4, lengths, 8), epoch_order(n, 1, 4, lengths, 8))
    if n > 7:
        assert not np.array_equal(epoch_order(n, 1, 4, lengths, 8), epoch_order(n, 1, 5, lengths, 8))


def test_length_buckets_save_padding_and_keep_full_batches_full():
    n, size = 1003, 8
    lengths = np.random.default_rng(0).integers(1, 500, n)

    def padded(order):
        return sum(len(b) * lengths[b].max() for b in np.split(order, range(size, n, size)))

    assert padded(epoch_order(n, 0, 0, lengths, size)) < 1.1 * lengths.sum()
    assert padded(epoch_order(n, 0, 0)) > 1.5 * lengths.sum()
    firsts = [lengths[b].mean() for b in np.split(epoch_order(n, 0, 0, lengths, size), range(size, n, size))]
    assert abs(np.corrcoef(np.arange(len(firsts)), firsts)[0, 1]) < 0.3  # batches do not come by length


@pytest.mark.parametrize("n, room", [(1, 500), (7, 499), (1000, 512), (3000, 2048)])
def test_packed_rows_hold_each_example_once_and_no_more_than_fits(n, room):
    lengths = np.random.default_rng(0).integers(1, 500, n)
    order = PackedOrder(lengths, room, 1, seed=1)
    for epoch in (0, 3):
        rows = [order[epoch * order.per_epoch + i][0] for i in range(order.per_epoch)]
        assert sorted(np.concatenate(rows).tolist()) == list(range(n))
        assert max(lengths[row].sum() for row in rows) <= room
    assert order.fill == pytest.approx(lengths.sum() / (order.per_epoch * room))
    assert n < 1000 or order.fill > 0.95  # uniform up to 500 in 512 is hard: two long ones seldom share a row


def test_pack_lengths_by_hand():
    rows = pack_lengths([3, 7, 3, 3, 5, 5, 2, 10, 3], 10)
    # the longest first, each into the fullest row it fits: 7 takes a 3, the 5s each other, then 3 3 3 have 1 left
    assert sorted((row, n) for row, n in rows) == [((2,), 1), ((3, 3, 3), 1), ((5, 5), 1), ((7, 3), 1), ((10,), 1)]
    assert pack_lengths([4] * 7, 10) == [((4, 4), 3), ((4,), 1)]
    assert pack_lengths([1] * 3, 1) == [((1,), 3)]


def test_packed_batches_depend_on_seed_and_number_alone():
    lengths = np.random.default_rng(0).integers(1, 100, 200)

    def batch(i, seed=1, visited=()):
        order = PackedOrder(lengths, 128, 4, seed)
        for j in visited:
            order[j]
        return [row.tolist() for row in order[i]]

    per_epoch = PackedOrder(lengths, 128, 4, 1).per_epoch
    for i in (0, 5, per_epoch + 2, 40 * per_epoch):
        assert batch(i) == batch(i, visited=(0, 7 * per_epoch, 3)) and len(batch(i)) == 4
        assert batch(i) != batch(i, seed=2) and batch(i) != batch(i + per_epoch)
    # rows do not come by length: the first of an epoch are as full of examples as the last
    order = PackedOrder(lengths, 128, 1, 1)
    counts = [len(order[i][0]) for i in range(order.per_epoch)]
    assert abs(np.corrcoef(np.arange(len(counts)), counts)[0, 1]) < 0.3


def test_packing_refuses_what_does_not_fit_or_fill():
    with pytest.raises(DataError, match="an example of 12 tokens does not fit into a row of 11"):
        PackedOrder([3, 12], 11, 1, 0)
    for lengths, rows in (([5, 5, 5], 2), ([], 0)):
        with pytest.raises(DataError, match=f"{rows} packed rows do not fill one batch of 3"):
            PackedOrder(np.array(lengths, int), 10, 3, 0)
