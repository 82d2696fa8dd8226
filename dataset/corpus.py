"""The text of a data directory: the .bin files of its sources, read as one sequence or mixed by weight."""

import functools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataset.formats import DataError, check_ids, load_meta, token_dtype

BLOCK = 1000  # training rows, in each of which every source of a mixture has its exact share


def tensors(*arrays):
    import torch  # takes seconds, and data_process.py checks what it wrote without

    return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]


def epoch_layout(n_windows, n_tokens, seed, epoch):
    """Order of one epoch's windows, and where on the ring of tokens the first of them starts."""
    rng = np.random.default_rng((seed, epoch))
    return rng.permutation(n_windows), int(rng.integers(n_tokens))


def block_layout(rows, seed, block):
    """Which ring each row of a block reads (BLOCK,), shuffled; ring i has rows[i] of them."""
    return np.random.default_rng((seed, block, 1)).permutation(np.repeat(np.arange(len(rows)), rows))


class Ring(NamedTuple):
    """Tokens start..stop of a corpus, read round and round; `rows` of each BLOCK training rows are of it."""

    name: str
    start: int
    stop: int
    rows: int


def mix(mixture, segments):
    """The rings of a mixture, ["source=weight", ...], over segments, {source: (start, stop)}."""
    weights = {}
    for item in map(str, mixture):
        source, _, text = item.partition("=")
        if source not in segments:
            raise DataError(f"mixture: {item}: no such source, known are {', '.join(segments)}")
        if source in weights:
            raise DataError(f"mixture: {item}: {source} is named twice")
        try:
            weights[source] = float(text.encode("ascii"))
        except ValueError:
            weights[source] = math.nan
        if not 0 < weights[source] <= 1e6:
            raise DataError(f"mixture: {item}: a number above 0 and at most a million is needed, as in {source}=1.5")
    exact = BLOCK * np.array(list(weights.values())) / sum(weights.values())
    rows = np.floor(exact).astype(int)
    rows[np.argsort(rows - exact, kind="stable")[: BLOCK - rows.sum()]] += 1  # the largest remainders
    names = [f"mixture: {source}={weight:g}" for source, weight in weights.items()]
    if not rows.all():
        raise DataError(f"{names[rows.argmin()]}: less than one row in {BLOCK}, leave it out")
    return [Ring(names[i], *segments[source], int(rows[i])) for i, source in enumerate(weights)]


class Corpus:
    """The .bin files of a split, a source each, checked against meta.json and `vocab_size` if given.

    Their tokens count as one sequence, in the order of meta.json: source s has those of segments[s], (start, stop).
    """

    def __init__(self, directory, split, vocab_size=None, mixture=()):
        self.directory, self.split, self.meta = Path(directory), split, load_meta(directory)
        self.path = self.directory / f"{split}.*.bin"  # for messages
        meta_path, self.vocab_size = self.directory / "meta.json", self.meta.get("vocab_size")
        if not self.meta.get("sources") or self.vocab_size is None:
            raise DataError(f"{meta_path} does not describe {self.path.name}: run data_process.py again")
        if vocab_size is not None and vocab_size != self.vocab_size:
            raise DataError(f"{meta_path}: vocabulary of {self.vocab_size}, but {vocab_size} is asked for")
        dtype, found = token_dtype(self.vocab_size), self.meta.get("dtype")
        if found != dtype.name:
            raise DataError(f"{meta_path}: dtype {found}, but a vocabulary of {self.vocab_size} has {dtype.name}")
        self._tokens = {source: self._open(source, dtype) for source in self.meta["sources"]}
        stops = np.cumsum([len(tokens) for tokens in self._tokens.values()]).tolist()
        self.segments = dict(zip(self._tokens, zip([0, *stops], stops, strict=False), strict=True))
        if len(self) == 0:
            raise DataError(f"{self.path}: no tokens")
        self.sources = [str(item).partition("=")[0] for item in mixture] or list(self.segments)  # those that are read
        self.rings = mix(mixture, self.segments) if mixture else [Ring(str(self.path), 0, len(self), BLOCK)]
        self._epoch_layout = functools.lru_cache(2 * len(self.rings))(epoch_layout)
        self._block_layout = functools.lru_cache(2)(block_layout)

    def _open(self, source, dtype):
        path, meta_path = self.file(source), self.directory / "meta.json"
        entry = self.meta.get("files", {}).get(path.name)
        if entry is None:
            raise DataError(f"{meta_path} does not describe {path.name}: run data_process.py again")
        if not path.exists():
            raise DataError(f"{path} not found, though {meta_path} describes it")
        size, wanted = path.stat().st_size, entry["tokens"] * dtype.itemsize
        if size != wanted:
            claim = f"{entry['tokens']} tokens of {dtype.name}, {wanted} bytes"
            raise DataError(f"{path} has {size} bytes, but {meta_path} says {claim}")
        counts, key = self.meta["sources"][source][self.split], f"sources.{source}.{self.split}"
        if counts["tokens"] != entry["tokens"]:
            raise DataError(f"{meta_path}: {key}.tokens is {counts['tokens']}, {path.name} has {entry['tokens']}")
        if counts["tokens"] and not counts["characters"]:
            raise DataError(f"{meta_path}: {key}.characters is 0, of {counts['tokens']} tokens")
        return np.asarray(np.memmap(path, dtype, mode="r")) if size else np.empty(0, dtype)

    def file(self, source):
        return self.directory / f"{self.split}.{source}.bin"

    def __len__(self):
        return max(stop for _, stop in self.segments.values())

    def read(self, start, stop):
        """Tokens start..stop, int64."""
        pieces = [np.empty(0, np.int64)]
        for source, (first, last) in self.segments.items():
            if start < last and first < stop:
                pieces.append(self._tokens[source][max(start - first, 0) : stop - first])
                check_ids(pieces[-1], self.vocab_size, self.file(source))
        return np.concatenate(pieces)

    def _row(self, row, seq_len, seed):
        """Row `row` of the training sequence (T + 1,)."""
        block, place = divmod(row, BLOCK)
        layout = self._block_layout(tuple(ring.rows for ring in self.rings), seed, block)
        ring = self.rings[layout[place]]
        own = block * ring.rows + np.count_nonzero(layout[:place] == layout[place])  # in the ring's own sequence
        n_tokens = ring.stop - ring.start
        n_windows = n_tokens // seq_len
        epoch, window = divmod(own, n_windows)
        order, offset = self._epoch_layout(n_windows, n_tokens, seed, epoch)
        start = ring.start + int(offset + order[window] * seq_len) % n_tokens
        stop = start + seq_len + 1
        if stop <= ring.stop:
            return self.read(start, stop)
        return np.concatenate([self.read(start, ring.stop), self.read(ring.start, stop - n_tokens)])

    def batch(self, first_row, n_rows, seq_len, seed):
        """Rows first_row.. of the endless training sequence: x, y (B, T), y being the tokens after x.

        A ring, all tokens or those of a source, is read in epochs: len // seq_len windows in a shuffled order, laid on
        it from a random start, so that no token always falls off the end. Of each BLOCK rows every ring has the same
        number, in a shuffled order. Row i depends on (seed, i) alone: a resumed run, or one with another number of
        processes, reads the same data.
        """
        self.check_windows(seq_len)
        ids = np.stack([self._row(first_row + i, seq_len, seed) for i in range(n_rows)])
        return tensors(ids[:, :-1], ids[:, 1:])

    def check_windows(self, seq_len):
        for ring in self.rings:
            if (n := ring.stop - ring.start) < seq_len:
                raise DataError(f"{ring.name}: {n} tokens do not fill one window of {seq_len}")

    def epochs(self, n_rows, seq_len):
        """{ring: how often n_rows training rows read each of its tokens}."""
        self.check_windows(seq_len)
        return {r.name: n_rows * r.rows / BLOCK * seq_len / (r.stop - r.start) for r in self.rings}

    def windows(self, start, stop, seq_len):
        """Tokens start..stop in order, for evaluation: x, y (N, T), where y scores each token after the first
        exactly once; the last window is filled up with x = 0, y = -100."""
        return tensors(*self._windows(start, stop, seq_len))

    def _windows(self, start, stop, seq_len):
        ids = self.read(start, stop)
        n = -(-max(len(ids) - 1, 0) // seq_len)
        x, y = np.zeros(n * seq_len, np.int64), np.full(n * seq_len, -100, np.int64)
        x[: len(ids) - 1], y[: len(ids) - 1] = ids[:-1], ids[1:]
        return x.reshape(n, seq_len), y.reshape(n, seq_len)

    def spaced_windows(self, start, stop, seq_len, every, batch_size):
        """Every `every`-th row of windows(start, stop, seq_len): yields x, y (B, T), B up to batch_size."""
        firsts = range(start, stop - 1, every * seq_len)
        for i in range(0, len(firsts), batch_size):
            rows = (self._windows(j, min(j + seq_len + 1, stop), seq_len) for j in firsts[i : i + batch_size])
            yield tensors(*map(np.concatenate, zip(*rows, strict=True)))


def document_numbers(ids, eos_id):
    """Which document of its row each token is of (B, T), counted from 0; an <eos> is the last of its document."""
    ends = (ids == eos_id).long()
    return ends.cumsum(1) - ends
