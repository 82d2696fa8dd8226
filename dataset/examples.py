"""The token sequences of a .pkl, each a conversation, a side of a pair or a prompt; without torch, as data is made."""

import numpy as np

from dataset.formats import DataError, check_ids


def column(arrays, name, kind, path, length=None):
    """The array (N,) of that name, its dtype of that kind ("b", "i" or "u"), N the given length; else DataError."""
    if name not in arrays:
        raise DataError(f"{path}: no {name}; it holds {', '.join(arrays)}")
    found = arrays[name]
    if not isinstance(found, np.ndarray) or found.dtype.kind != kind or found.ndim != 1:
        kinds = dict(b="true or false", i="whole numbers with a sign", u="whole numbers without a sign")
        raise DataError(f"{path}: {name} is {said(found)}, but must be a row of {kinds[kind]}")
    if length is not None and len(found) != length:
        raise DataError(f"{path}: {name} of {len(found)} rows for {length} examples")
    return found


def said(value):
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"


class Examples:
    """The token sequences of a .pkl. Item i is (ids, loss_mask), both (T,) int64; a prompt's mask is zero.

    `prefix` picks one side of a preference pair ("chosen_" or "rejected_"). `path` is for error messages; examples
    longer than `max_len`, the context of the model, are refused.
    """

    def __init__(self, arrays, prefix="", vocab_size=None, path="examples", max_len=None):
        self.path, self.tokens = path, column(arrays, f"{prefix}tokens", "u", path)
        self.offsets = o = column(arrays, f"{prefix}offsets", "i", path)
        if len(o) < 1 or o[0] != 0 or o[-1] != len(self.tokens) or (np.diff(o) < 0).any():
            raise DataError(f"{path}: {prefix}offsets do not cover its {len(self.tokens)} tokens")
        self.loss_mask = mask = arrays.get(f"{prefix}loss_mask")
        wanted = -(-len(self.tokens) // 8)
        if mask is not None and (getattr(mask, "dtype", None), np.shape(mask)) != (np.uint8, (wanted,)):
            claim = f"{said(mask)}, but a bit for each of {len(self.tokens)} tokens is uint8 ({wanted},)"
            raise DataError(f"{path}: {prefix}loss_mask is {claim}")
        if vocab_size is not None:
            check_ids(self.tokens, vocab_size, path)
        longest = int(np.diff(o).max(initial=0))
        if max_len is not None and longest > max_len:
            raise DataError(f"{path}: an example of {longest} tokens, the model's context has {max_len}")
        self.index = np.arange(len(o) - 1)
        self.is_val = column(arrays, "is_val", "b", path, len(self)) if "is_val" in arrays else None

    def __len__(self):
        return len(self.index)

    @property
    def lengths(self):
        """Tokens of each example (N,)."""
        return np.diff(self.offsets)[self.index]

    def __getitem__(self, i):
        start, stop = self.offsets[self.index[i]], self.offsets[self.index[i] + 1]
        ids = self.tokens[start:stop].astype(np.int64)
        if self.loss_mask is None:
            return ids, np.zeros_like(ids)
        bits = np.unpackbits(self.loss_mask[start // 8 : -(-stop // 8)], bitorder="little")
        return ids, bits[start % 8 :][: len(ids)].astype(np.int64)

    def split(self, answered=True):
        """(training, validation) examples; DataError for one that by its loss_mask has no question or no answer."""
        if self.is_val is None:
            raise DataError(f"{self.path}: no is_val, which tells validation examples from others")
        if not self.lengths.all():
            raise DataError(f"{self.path}: example {self.lengths.argmin()} has no tokens")
        if answered and len(self):
            if self.loss_mask is None:
                raise DataError(f"{self.path}: no loss_mask, which tells the answers")
            bits = np.unpackbits(self.loss_mask, count=len(self.tokens), bitorder="little")
            answers, starts = np.maximum.reduceat(bits, self.offsets[:-1]), bits[self.offsets[:-1]]
            for wrong, what in ((answers == 0, "has no answer"), (starts == 1, "begins with its answer")):
                if wrong.any():
                    raise DataError(f"{self.path}: example {wrong.argmax()} {what}, by its loss_mask")
        return self.select(~self.is_val), self.select(self.is_val)

    def select(self, mask):
        """The examples where the boolean `mask` (N,) is true, or at the given indices; arrays are shared."""
        chosen = object.__new__(Examples)
        chosen.__dict__.update(self.__dict__, index=self.index[mask])
        return chosen
