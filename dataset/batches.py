"""Batches of examples: the conversations, pairs and prompts of a .pkl, their order, padded or packed, on a device."""

import json

import numpy as np
import torch
import torch.nn.functional as F

from dataset.examples import Examples, column, said
from dataset.formats import DataError, load_pkl


def load_pairs(path, vocab_size, max_len=None):
    """rm.pkl as (train, val), each [chosen, rejected] of Examples; DataError where none are held out.

    Those held out come in an order of chance, always the same, so that the first few are of every source.
    """
    arrays = load_pkl(path)
    sides = [Examples(arrays, prefix, vocab_size, path, max_len) for prefix in ("chosen_", "rejected_")]
    train, val = zip(*(side.split() for side in sides), strict=True)
    if not len(val[0]):
        raise DataError(
            f"{path}: no held-out pair, on which training is judged; more pairs or a larger val_share are needed"
        )
    order = epoch_order(len(val[0]), 0, 0)
    return list(train), [side.select(order) for side in val]


class Prompt(list):
    """The ids of a prompt; `fields` are the other fields of its row, a right answer say, by name."""

    def __init__(self, ids, fields):
        super().__init__(ids)
        self.fields = fields


def load_prompts(path, vocab_size, context=None, new_tokens=0, needed=("training", "held-out")):
    """prompts.pkl as (train, val), lists of Prompt; all have the same fields, None where a row lacks one.

    Both come in an order of chance, always the same, so that the first few are of every source.

    Given the context of the models that read prompts and replies, DataError unless the splits that are needed have
    prompts and the longest of them leaves room for a reply of `new_tokens`.
    """
    arrays = load_pkl(path)
    prompts = Examples(arrays, vocab_size=vocab_size, path=path)
    fields = read_fields(arrays.get("fields", [""] * len(prompts)), len(prompts), path)
    missing = dict.fromkeys(name for row in fields for name in row)
    found = [Prompt(prompts[i][0].tolist(), missing | row) for i, row in enumerate(fields)]
    shuffled = (part.index[epoch_order(len(part), 0, 0)] for part in prompts.split(False))
    train, val = ([found[i] for i in index] for index in shuffled)
    if context is not None:
        splits = [dict(zip(("training", "held-out"), (train, val), strict=True))[side] for side in needed]
        if not all(splits):
            side = needed[splits.index([])]
            raise DataError(f"{path}: no {side} prompt; make it of two or more, with prompts_val above 0")
        if (longest := max(len(prompt) for split in splits for prompt in split)) + new_tokens > context:
            raise DataError(
                f"{path}: a prompt of {longest} tokens and a reply of {new_tokens} exceed the context of {context}; "
                "fewer new tokens are needed, or a lower prompts_max_len of data_process.py"
            )
    return train, val


def read_fields(texts, n, path):
    """The JSON objects of `n` rows, {} of an empty text."""
    if not isinstance(texts, list) or len(texts) != n:
        what = f"fields of {len(texts)} rows" if isinstance(texts, list) else f"fields are {said(texts)}"
        raise DataError(f"{path}: {what} for {n} prompts")
    rows = []
    for i, text in enumerate(texts):
        try:
            rows.append(json.loads(text) if text else {})
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(f"{path}: fields of prompt {i} are not JSON: {error}") from None
        if not isinstance(rows[-1], dict):
            raise DataError(f"{path}: fields of prompt {i} are not a JSON object")
    return rows


def load_tasks(path, vocab_size):
    """The validation examples of sft.pkl as {task: [(prompt ids, answer ids, label), ...]}, label -1 where none."""
    arrays = load_pkl(path)
    examples, names = Examples(arrays, vocab_size=vocab_size, path=path), arrays.get("task_names", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{path}: task_names are not a list of names")
    if not names:
        return {}
    tasks = {name: [] for name in names}
    task, label = column(arrays, "task", "u", path, len(examples)), column(arrays, "label", "i", path, len(examples))
    if task.max(initial=0) >= len(names) or label.min(initial=0) < -1:
        raise DataError(f"{path}: task up to {task.max()} of {len(names)} task_names, label from {label.min()}")
    for i in examples.split()[1].index:
        ids, loss_mask = examples[i]
        prompt, answer = np.split(ids, [loss_mask.argmax()])
        tasks[names[task[i]]].append((prompt.tolist(), answer.tolist(), int(label[i])))
    return tasks


def kept(mask, multiple=1):
    """Flat positions of what is not zero in `mask` (B, T), on the CPU: (N,) int64, what model.forward computes.

    B * T, one past the end, fills them up to a multiple: few different shapes let a GPU reuse what is compiled.
    """
    positions = mask.flatten().nonzero().squeeze(1)
    return F.pad(positions, (0, -len(positions) % multiple), value=mask.numel())


def keep_multiple(device):
    """What `kept` positions are a multiple of on a device: the rows of a GPU's tile of products, but 1 on a CPU."""
    return 1 if device.type == "cpu" else 128


def pad_batch(rows, pad_id=0, multiple=1):
    """[(ids, loss_mask), ...] padded on the right: ids (B, T) int64, loss_mask (B, T) float, lengths (B,).

    Where a row ends is told by lengths, never by the padding id, which may also be a real token. `keep` has the
    positions in loss_mask[:, 1:], whose tokens are predicted, that are not zero, as `kept` with this multiple.
    """
    lengths = torch.tensor([len(ids) for ids, _ in rows])
    ids = torch.full((len(rows), int(lengths.max())), pad_id, dtype=torch.int64)
    loss_mask = torch.zeros(ids.shape)
    for row, (row_ids, row_mask) in enumerate(rows):
        ids[row, : len(row_ids)] = torch.as_tensor(row_ids)
        loss_mask[row, : len(row_ids)] = torch.as_tensor(row_mask, dtype=torch.float32)
    return {"ids": ids, "loss_mask": loss_mask, "lengths": lengths, "keep": kept(loss_mask[:, 1:], multiple)}


def pack_batch(rows, multiple=1):
    """[[(ids, loss_mask), ...], ...], several examples a row, padded as by pad_batch.

    documents (B, T) tells which example of its row each token is of; the padding is one more. Nothing predicts the
    first token of an example, so its loss_mask is 0.
    """
    batch = pad_batch([tuple(map(np.concatenate, zip(*row, strict=True))) for row in rows])
    documents = torch.zeros_like(batch["ids"])
    for row, examples in zip(documents, rows, strict=True):
        ends = np.cumsum([len(ids) for ids, _ in examples])
        row[:] = torch.from_numpy(np.searchsorted(ends, np.arange(len(row)), side="right"))
    batch["loss_mask"][:, 0] = 0
    batch["loss_mask"][:, 1:] *= documents[:, 1:] == documents[:, :-1]
    return batch | {"documents": documents, "keep": kept(batch["loss_mask"][:, 1:], multiple)}


def move(tensors, device):
    """Tensors on their way to a device; from pinned memory CUDA copies while it computes.

    MPS would read the memory of a tensor that is gone by then (pytorch/pytorch#139550, #189690).
    """
    if device.type != "cuda":
        return [t.to(device) for t in tensors]
    return [t.pin_memory().to(device, non_blocking=True) for t in tensors]


def to_device(batch, device):
    return dict(zip(batch, move(batch.values(), device), strict=True))


def epoch_order(n, seed, epoch, lengths=None, batch_size=None):
    """Order (n,) in which one epoch visits the examples; batches are its consecutive runs of batch_size.

    With lengths, each batch holds examples of similar length, so that little is padding: shuffled pools of 50
    batches are sorted by length, then the batches are shuffled. The last ones, too few for a batch, are of any length.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(n)
    if lengths is None or n < batch_size:
        return order
    lengths = np.asarray(lengths)
    full, rest = np.split(order, [n // batch_size * batch_size])  # before sorting, or the longest were always the rest
    pools = [full[i : i + 50 * batch_size] for i in range(0, len(full), 50 * batch_size)]
    batches = np.concatenate([p[np.argsort(lengths[p], kind="stable")] for p in pools]).reshape(-1, batch_size)
    return np.concatenate([batches[rng.permutation(len(batches))].reshape(-1), rest])


class BatchOrder:
    """Which examples batch i of an endless training sequence holds; depends on (seed, i) alone, as Corpus.batch.

    Every epoch is a new shuffle of the examples; the few that do not fill a last batch sit that epoch out.
    """

    def __init__(self, n, batch_size, seed, lengths=None, path="data", key="batch_size"):
        if n < batch_size:
            raise DataError(
                f"{path}: {n} training examples do not fill one batch of {batch_size}: choose a smaller {key}"
            )
        self.n, self.batch_size, self.seed, self.lengths = n, batch_size, seed, lengths
        self.per_epoch = n // batch_size
        self._epoch = None

    def __getitem__(self, i):
        epoch, i = divmod(i, self.per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = epoch_order(self.n, self.seed, epoch, self.lengths, self.batch_size)
        return self._order[i * self.batch_size : (i + 1) * self.batch_size]


def pack_lengths(lengths, room):
    """Which lengths share a row of `room` tokens: [(lengths in the row, how many such rows)], best fit, longest first.

    It works on the histogram of the lengths, not on examples (Krell et al., arXiv:2107.02027), so that its time grows
    with the number of different rows and not with the data.
    """
    rows = [[] for _ in range(room + 1)]  # by the space left in them
    counts = np.bincount(lengths)
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            space = next((s for s in range(length, room) if rows[s]), room)
            row, there = rows[space].pop() if rows[space] else ((), left)  # else new ones
            fit = min(space // length, left)
            used = min(there, left // fit)
            left -= used * fit
            rows[space - fit * length].append((row + (length,) * fit, used))
            if row and there > used:
                rows[space].append((row, there - used))
    return [each for some in rows for each in some]


class PackedOrder:
    """As BatchOrder, but with several examples a row: item i is a list of batch_size arrays of examples.

    Which lengths share a row is the same in every epoch, which examples of these lengths, and in what order the rows
    come, is shuffled. So an epoch has always as many rows, and a batch is found without those before it.
    """

    def __init__(self, lengths, room, batch_size, seed, path="data"):
        if (longest := np.max(lengths, initial=0)) > room:
            raise DataError(f"{path}: an example of {longest} tokens does not fit into a row of {room}")
        self.lengths, self.batch_size, self.seed = np.asarray(lengths), batch_size, seed
        packed = pack_lengths(self.lengths, room)
        sizes, times = np.array([(len(row), n) for row, n in packed], np.int64).reshape(-1, 2).T
        sizes = np.repeat(sizes, times)  # examples of each row
        if len(sizes) < batch_size:
            raise DataError(
                f"{path}: {len(sizes)} packed rows do not fill one batch of {batch_size}: choose a smaller one"
            )
        row_lengths = np.concatenate([np.tile(row, n) for row, n in packed])
        self.starts = np.cumsum(np.append(0, sizes))  # row r holds the slots starts[r] to starts[r + 1]
        self.slots = np.argsort(row_lengths, kind="stable")  # by length
        self.rows = len(sizes)
        self.fill = self.lengths.sum() / (self.rows * room)  # share of tokens that are not padding
        self.per_epoch = self.rows // batch_size
        self._epoch = None

    def _shuffle(self, epoch):
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.lengths))
        self._examples = np.empty_like(order)  # of each slot
        self._examples[self.slots] = order[np.argsort(self.lengths[order], kind="stable")]
        self._rows = rng.permutation(self.rows)
        self._epoch = epoch

    def __getitem__(self, i):
        epoch, i = divmod(i, self.per_epoch)
        if epoch != self._epoch:
            self._shuffle(epoch)
        rows = self._rows[i * self.batch_size : (i + 1) * self.batch_size]
        return [self._examples[self.starts[r] : self.starts[r + 1]] for r in rows]
