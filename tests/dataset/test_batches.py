"""dataset/batches.py: examples and their selection, padding, the orders that training reads them in, packing."""

import numpy as np
import pytest
import torch
from packing import pack, pack_examples

from dataset.batches import (
    BatchOrder,
    PackedOrder,
    epoch_order,
    kept,
    load_pairs,
    load_prompts,
    load_tasks,
    pack_lengths,
    pad_batch,
)
from dataset.examples import Examples
from dataset.formats import DataError, load_pkl, save_pkl
from tokenizer import Example


def three_examples():
    return pack_examples([Example([5, 6], [0, 1]), Example([7], [1]), Example([8, 0, 2], [0, 1, 1])], 100)


def three_pairs():
    """Questions and answers of a token each."""
    return pack_examples([Example(ids, [0, 1]) for ids in ([5, 6], [9, 7], [8, 2])], 100)


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
    assert [tuple(map(list, examples[i])) for i in range(len(rows))] == [(row.ids, row.loss_mask) for row in rows]
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


@pytest.mark.parametrize("mask, why", [([0, 0], "has no answer"), ([1, 1], "begins with its answer")])
def test_an_example_without_question_or_answer_is_named(mask, why):
    arrays = pack_examples([Example([5, 6], [0, 1]), Example([7, 8], mask)], 100) | dict(is_val=np.array([False, True]))
    with pytest.raises(DataError, match=f"sft.pkl: example 1 {why}, by its loss_mask"):
        Examples(arrays, path="sft.pkl").split()
    with pytest.raises(DataError, match="sft.pkl: no loss_mask"):
        Examples(arrays | dict(loss_mask=None), path="sft.pkl").split()


def test_every_column_has_its_type_its_length_and_its_range(tmp_path):
    path = tmp_path / "sft.pkl"
    rows = dict(is_val=np.array([False, True, True]), task=np.array([0, 1, 0], np.uint8))
    right = three_pairs() | rows | dict(task_names=["a", "b"], label=np.array([-1, 0, 1], np.int8))
    save_pkl(path, right)
    train, val = Examples(load_pkl(path)).split()
    assert (train.index.tolist(), val.index.tolist()) == ([0], [1, 2])
    assert load_tasks(path, 100) == {"a": [([8], [2], 1)], "b": [([9], [7], 0)]}
    wrong = [
        (dict(tokens=right["tokens"].tolist()), "tokens is a list, but must be a row of whole numbers"),
        (dict(tokens=right["tokens"].astype(float)), r"tokens is float64 \(6,\), but"),
        (dict(tokens=right["tokens"][None]), r"tokens is uint16 \(1, 6\), but"),
        (dict(offsets=right["offsets"].astype(float)), r"offsets is float64 \(4,\), but"),
        (dict(offsets=np.int64(6)), "offsets is a int64, but"),
        (dict(loss_mask=[34]), "loss_mask is a list, but"),
        (dict(is_val=rows["is_val"].astype(np.int64)), r"is_val is int64 \(3,\), but must be a row of true or false"),
        (dict(is_val=rows["is_val"][:2]), "is_val of 2 rows for 3 examples"),
        (dict(task=right["task"][:2]), "task of 2 rows for 3 examples"),
        (dict(task=right["task"] + np.uint8(1)), "task up to 2 of 2 task_names"),
        (dict(label=right["label"] - np.int8(1)), "task up to 1 of 2 task_names, label from -2"),
        (dict(label=rows["is_val"]), r"label is bool \(3,\), but"),
        (dict(task_names="ab"), "task_names are not a list of names"),
        (dict(task_names=["a", 1]), "task_names are not a list of names"),
    ]
    for change, message in wrong:
        save_pkl(path, right | change)
        with pytest.raises(DataError, match=rf"sft\.pkl: {message}"):
            load_tasks(path, 100)
    with pytest.raises(DataError, match="no is_val"):
        Examples(three_examples()).split()
    with pytest.raises(DataError, match="example 1 has no tokens"):
        Examples(right | dict(offsets=np.array([0, 3, 3, 6]))).split()


def test_both_sides_of_pairs_and_all_prompts_have_their_rows(tmp_path):
    path, arrays = tmp_path / "a.pkl", three_examples()
    sides = {f"{side}_{name}": value for name, value in three_pairs().items() for side in ("chosen", "rejected")}
    save_pkl(path, sides | dict(is_val=np.array([True, False, False])))
    (chosen, rejected), _ = load_pairs(path, 100)
    assert chosen.index.tolist() == rejected.index.tolist() == [1, 2]
    save_pkl(path, sides | dict(is_val=np.ones(3, bool), rejected_offsets=np.array([0, 2, 6])))
    with pytest.raises(DataError, match=r"a\.pkl: is_val of 3 rows for 2 examples"):
        load_pairs(path, 100)
    prompts = {name: arrays[name] for name in ("tokens", "offsets")} | dict(is_val=np.array([True, False, False]))
    save_pkl(path, prompts | dict(fields=['{"answer": 4}', "", '{"n": null}']))
    train, val = load_prompts(path, 100)
    assert (train, val) == ([[7], [8, 0, 2]], [[5, 6]])
    assert [prompt.fields for prompt in (*val, *train)] == [dict(answer=4, n=None), *[dict(answer=None, n=None)] * 2]
    wrong = {"of 2 rows for 3 prompts": ["", ""], "of prompt 1 are not JSON": ["", "{", ""]}
    wrong |= {"of prompt 2 are not a JSON object": ["", "", "[1]"], "of prompt 0 are not JSON": [1, "", ""]}
    wrong |= {"are a str for 3 prompts": "{}{}{}", "of prompt 1 are not JSON:": ["", "[" * 100_000, ""]}
    for message, fields in wrong.items():
        save_pkl(path, prompts | dict(fields=fields))
        with pytest.raises(DataError, match=rf"a\.pkl: fields {message}"):
            load_prompts(path, 100)


def test_only_the_prompts_that_are_needed_must_be_there_and_fit(tmp_path):
    path = tmp_path / "prompts.pkl"
    tokens, offsets = pack([[5] * 9, [6] * 2, [7] * 3], np.uint16)
    save_pkl(path, dict(tokens=tokens, offsets=offsets, is_val=np.array([False, True, True])))
    with pytest.raises(DataError, match="a prompt of 9 tokens and a reply of 4 exceed the context of 8"):
        load_prompts(path, 100, 8, 4)
    _, val = load_prompts(path, 100, 8, 4, needed=["held-out"])
    assert sorted(map(len, val)) == [2, 3]
    save_pkl(path, dict(tokens=tokens, offsets=offsets, is_val=np.zeros(3, bool)))
    train, _ = load_prompts(path, 100, 16, 4, needed=["training"])
    assert len(train) == 3
    with pytest.raises(DataError, match="no held-out prompt"):
        load_prompts(path, 100, 16, 4)


def test_pad_batch_tells_length_apart_from_padding():
    examples = Examples(three_examples())
    batch = pad_batch([examples[i] for i in range(3)], pad_id=0)
    assert batch["ids"].tolist() == [[5, 6, 0], [7, 0, 0], [8, 0, 2]]
    assert batch["loss_mask"].tolist() == [[0, 1, 0], [1, 0, 0], [0, 1, 1]]
    assert batch["lengths"].tolist() == [2, 1, 3]
    assert batch["ids"].dtype == torch.int64 and batch["loss_mask"].dtype == torch.float32
    assert batch["keep"].tolist() == [0, 4, 5]  # of the 6 that predict: loss_mask without its first column
    filled = pad_batch([examples[i] for i in range(3)], multiple=4)
    assert filled["keep"].tolist() == [0, 4, 5, 6] and filled["keep"].dtype == torch.int64  # 6: one past the end


def test_kept_positions_fill_up_with_one_past_the_end():
    mask = torch.tensor([[0, 2.0, 0], [1, 0, 1]])
    assert kept(mask).tolist() == [1, 3, 5] and kept(mask, 3).tolist() == [1, 3, 5]
    assert kept(mask, 5).tolist() == [1, 3, 5, 6, 6]
    assert kept(torch.zeros(2, 3), 5).tolist() == []


@pytest.mark.parametrize("n", [0, 1, 7, 1000, 1003])
def test_epoch_order_is_a_permutation(n):
    lengths = np.random.default_rng(0).integers(1, 500, n)
    for order in (epoch_order(n, 1, 0), epoch_order(n, 1, 0, lengths, 8)):
        assert sorted(order.tolist()) == list(range(n))
    assert np.array_equal(epoch_order(n, 1, 4, lengths, 8), epoch_order(n, 1, 4, lengths, 8))
    if n > 7:
        assert not np.array_equal(epoch_order(n, 1, 4, lengths, 8), epoch_order(n, 1, 5, lengths, 8))


@pytest.mark.parametrize("n, size", [(47, 16), (100, 16), (5000, 32)])
def test_whoever_sits_an_epoch_out_is_trained_in_another(n, size):
    lengths = np.arange(n)
    order = BatchOrder(n, size, 1, lengths)
    left_out = [set(range(n)).difference(*(order[e * order.per_epoch + i].tolist() for i in range(order.per_epoch)))
                for e in range(30)]  # fmt: skip
    assert {len(each) for each in left_out} == {n % size} and set.intersection(*left_out) == set()
    middle = np.mean([lengths[list(each)].mean() for each in left_out])
    assert abs(middle / n - 0.5) < 0.1  # neither long nor short ones: the mean of 30 * (n % size) of them


def test_the_first_prompts_and_pairs_are_of_every_source(tmp_path):
    """Which stand one after the other in the files; a validation takes as many as it has time for."""
    n = 40
    tokens, offsets = pack([[10 + i // 10] for i in range(2 * n)], np.uint16)
    is_val = np.arange(2 * n) >= n
    save_pkl(tmp_path / "prompts.pkl", dict(tokens=tokens, offsets=offsets, is_val=is_val))
    train, val = load_prompts(tmp_path / "prompts.pkl", 100)
    assert {ids[0] for ids in train[:16]} == {10, 11, 12, 13} and {ids[0] for ids in val[:16]} == {14, 15, 16, 17}
    assert sorted(ids[0] for ids in train + val) == tokens.tolist()
    made = [Example([10 + i // 10, 2], [0, 1]) for i in range(2 * n)]
    packed = pack_examples(made, 100)
    arrays = {f"{side}_{key}": value for side in ("chosen", "rejected") for key, value in packed.items()}
    save_pkl(tmp_path / "rm.pkl", arrays | dict(is_val=is_val))
    _, (chosen, rejected) = load_pairs(tmp_path / "rm.pkl", 100)
    assert {chosen[i][0][0] for i in range(16)} == {14, 15, 16, 17}
    assert [chosen[i][0][0] for i in range(n)] == [rejected[i][0][0] for i in range(n)]


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
