"""dataset.py: what is written is read back, bad files are refused, batches depend on (seed, row) alone."""

import os
import pickle
from collections import namedtuple

import numpy as np
import pytest
import torch

from dataset import (
    BinWriter,
    DataError,
    Examples,
    TokenBin,
    atomic_write,
    epoch_order,
    load_meta,
    load_pkl,
    pack_examples,
    pad_batch,
    save_meta,
    save_pkl,
    token_dtype,
)

Example = namedtuple("Example", "ids loss_mask")


def make_bin(directory, ids, vocab_size=1000, sources=None):
    with BinWriter(directory / "train.bin", vocab_size) as writer:
        writer.write(ids[:3])
        writer.write(ids[3:])
    meta = dict(
        format_version=1,
        vocab_size=vocab_size,
        dtype=token_dtype(vocab_size).name,
        files={"train.bin": dict(tokens=writer.tokens)},
        sources=sources or {},
    )
    save_meta(directory, meta)
    return directory / "train.bin", meta


@pytest.mark.parametrize("vocab_size, size", [(1 << 16, 2), ((1 << 16) + 1, 4)])
def test_bin_round_trip_at_the_edge_of_uint16(tmp_path, vocab_size, size):
    ids = [0, 1, 65535, vocab_size - 1, 7]
    path, _ = make_bin(tmp_path, ids, vocab_size)
    assert path.stat().st_size == size * len(ids)
    assert TokenBin(path, vocab_size).tokens.tolist() == ids


@pytest.mark.parametrize("bad", [1000, 70000, -1])
def test_bin_writer_refuses_an_id_outside_the_vocabulary_and_leaves_nothing(tmp_path, bad):
    with pytest.raises(DataError, match=rf"train\.bin: token id {bad} .*999"):
        make_bin(tmp_path, [1, 2, 3, bad])
    assert os.listdir(tmp_path) == []


def test_atomic_write_keeps_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path, "w") as file:
        file.write("half of the n")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_token_bin_refuses_what_meta_contradicts(tmp_path):
    path, meta = make_bin(tmp_path, range(10))
    with pytest.raises(DataError, match="meta.json.* 1000.* 64793"):
        TokenBin(path, 64793)
    save_meta(tmp_path, meta | dict(files={"train.bin": dict(tokens=11)}))
    with pytest.raises(DataError, match="train.bin has 20 bytes.*22 bytes"):
        TokenBin(path)
    save_meta(tmp_path, meta | dict(vocab_size=70000))
    with pytest.raises(DataError, match="dtype uint16.*70000.*uint32"):
        TokenBin(path)
    save_meta(tmp_path, meta | dict(files={}))
    with pytest.raises(DataError, match="does not describe train.bin"):
        TokenBin(path)
    save_meta(tmp_path, meta | dict(format_version=99))
    with pytest.raises(DataError, match="format version 99"):
        TokenBin(path)
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(DataError, match="meta.json is not valid JSON"):
        load_meta(tmp_path)
    (tmp_path / "meta.json").unlink()
    with pytest.raises(DataError, match="meta.json not found"):
        load_meta(tmp_path)
    save_meta(tmp_path, meta)
    path.unlink()
    with pytest.raises(DataError, match="train.bin not found"):
        TokenBin(path)


def test_token_bin_refuses_ids_beyond_the_vocabulary_when_read(tmp_path):
    path, meta = make_bin(tmp_path, range(10))
    save_meta(tmp_path, meta | dict(vocab_size=9))
    with pytest.raises(DataError, match="token id 9 "):
        TokenBin(path).batch(0, 2, 5, seed=0)
    with pytest.raises(DataError, match="token id 9 "):
        TokenBin(path).windows(0, 10, 4)


def test_one_epoch_of_batches_covers_the_tokens_once(tmp_path):
    tokens, seq_len = 50, 8
    path, _ = make_bin(tmp_path, range(tokens))
    data = TokenBin(path)
    n = tokens // seq_len
    for epoch in range(3):
        x, y = data.batch(epoch * n, n, seq_len, seed=1)
        assert x.shape == y.shape == (n, seq_len) and x.dtype == torch.int64
        assert torch.equal(y, (x + 1) % tokens)  # the ids count up, so the next token is the next number
        assert len(set(x.flatten().tolist())) == n * seq_len
    assert not torch.equal(data.batch(0, n, seq_len, 1)[0], data.batch(n, n, seq_len, 1)[0])
    assert not torch.equal(data.batch(0, n, seq_len, 1)[0], data.batch(0, n, seq_len, 2)[0])


def test_rows_do_not_depend_on_how_they_are_fetched(tmp_path):
    path, _ = make_bin(tmp_path, range(50))
    whole = TokenBin(path).batch(0, 20, 8, seed=3)[0]  # over three epochs
    resumed = TokenBin(path).batch(7, 13, 8, seed=3)[0]
    one_by_one = torch.cat([TokenBin(path).batch(i, 1, 8, seed=3)[0] for i in range(20)])
    assert torch.equal(whole[7:], resumed) and torch.equal(whole, one_by_one)


def test_too_few_tokens_for_one_window(tmp_path):
    path, _ = make_bin(tmp_path, range(10))
    with pytest.raises(DataError, match="10 tokens do not fill one window of 11"):
        TokenBin(path).batch(0, 1, 11, seed=0)


def test_segments_and_windows_score_every_token_after_the_first_once(tmp_path):
    counts = [dict(train=dict(tokens=4, token_offset=0)), dict(train=dict(tokens=6, token_offset=4))]
    path, _ = make_bin(tmp_path, range(10, 20), sources=dict(zip(("a", "b"), counts, strict=True)))
    data = TokenBin(path)
    assert data.segments == {"a": (0, 4), "b": (4, 10)}
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


def test_examples_refuse_inconsistent_arrays():
    arrays = three_examples()
    with pytest.raises(DataError, match="sft.pkl: no chosen_tokens"):
        Examples(arrays, prefix="chosen_", path="sft.pkl")
    with pytest.raises(DataError, match="token id 8 "):
        Examples(arrays, vocab_size=8)
    for bad in ([0, 2, 3, 5], [1, 2, 3, 6], [0, 3, 2, 6], []):
        with pytest.raises(DataError, match="offsets do not cover its 6 tokens"):
            Examples(arrays | dict(offsets=np.array(bad, dtype=np.int64)))
    with pytest.raises(DataError, match="5 loss_mask values for 6 tokens"):
        Examples(arrays | dict(loss_mask=arrays["loss_mask"][:5]))


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
