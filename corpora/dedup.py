"""Near-duplicate documents and benchmark questions in training text, found in bounded memory.

A document becomes a MinHash signature (Broder 1997): two signatures agree in about the share of shingles that
their documents have in common (Jaccard similarity). Locality-sensitive hashing finds the pairs worth comparing:
those whose signatures agree in a whole band. Only the signatures are kept, on disk if they are many.
"""

import csv
from pathlib import Path

import numpy as np
import rensa

from corpora.clean import char_ngrams, content_key
from dataset.formats import DataError

# A copy with 10 % of its characters edited keeps a shingle of three with 0.9**3 = 0.73, so its Jaccard similarity
# is s = 0.73 / (2 - 0.73) = 0.57 (measured on 500 characters: 0.58 to 0.60 +- 0.02); neighbouring pages of one novel
# have 0.01. With pairs of characters the copy has 0.70, the neighbours 0.03; with four, 0.49 and 0.002.
SHINGLE = 3
# A pair shares a band with 1 - (1 - s**ROWS)**BANDS: 0.995 at s = 0.57, 0.96 at 0.5, 0.3 at 0.3, 5e-7 at 0.01.
# Four values of 16 bits are one uint64, so a band's key is read from the signature as it lies.
BANDS, ROWS = 48, 4
# Share of equal values. It errs by 0.03 with 192 values, so that hardly a copy edited by 10 % falls below, and fewer
# than 1 in 1,000 of the pairs that share half their shingles (s = 0.33) reach it.
THRESHOLD = 0.45
# In a question's letters and digits. Runs of 10 to 15 are often names and quotations (先天下之忧而忧后天下之乐而乐).
QUESTION_GRAM = 16
# A question shorter than QUESTION_GRAM but at least this long is looked for whole.
SHORTEST_QUESTION = 10

# rensa errs less than as many independent hash functions (0.029 against 0.036 at s = 0.58) and takes 8 us a document
# where numpy takes 50 and datasketch 370. Its digests change between its versions and with the seed: pin both.
_SEED = 42
_BLOCK = 1 << 12  # documents handled at once: two pairs each, 10 MB in all


def signature(text):
    """MinHash of the shingles of the text's letters and digits: (BANDS * ROWS,) uint16.

    The low 16 bits of each minimum: two different minima agree in them once in 65,536. A text shorter than one
    shingle is one shingle.
    """
    key = content_key(text)
    shingles = char_ngrams(key, max(1, min(SHINGLE, len(key))))
    rows = np.array([0, len(shingles)], np.uint64)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(shingles, rows, BANDS * ROWS, _SEED)
    return np.array(matrix.to_rows()[0], np.uint32).astype(np.uint16)


def near_duplicates(signatures, prefer=None, threshold=THRESHOLD, memory=256 << 20):
    """Which of N documents to drop (N,) bool, from their signatures (N, BANDS * ROWS) uint16, maybe an np.memmap.

    Documents are linked when their signatures agree in a whole band and in a `threshold` share of all values.
    Of each group of linked documents the first stays; those of `prefer` (N,) bool count as before all others.

    Uses about `memory` bytes, or 40 N where that is more: 32 N for the groups and to sort one band, and 8 N for
    each band read in one pass over the signatures, so that 430 N is enough to read them once.
    """
    n = len(signatures)
    parent = np.arange(n)  # a forest: following it ends at the first document of the group
    together = int(np.clip(memory // (8 * max(n, 1)) - 4, 1, BANDS))
    for low in range(0, BANDS, together):
        keys = _band_keys(signatures, low, min(low + together, BANDS))
        for band in keys:
            for a, b in _candidates(band):
                apart = _roots(parent, a) != _roots(parent, b)
                a, b = a[apart], b[apart]
                alike = np.count_nonzero(signatures[a] == signatures[b], axis=1) >= threshold * BANDS * ROWS
                _join(parent, a[alike], b[alike])
        del keys, band
    everyone = np.arange(n)
    roots = _roots(parent, everyone)
    stays = everyone.copy()  # of each root, the document that stays in its group
    if prefer is not None:
        preferred = np.flatnonzero(prefer)
        groups, first = np.unique(roots[preferred], return_index=True)
        stays[groups] = preferred[first]
    return stays[roots] != everyone


def _band_keys(signatures, low, high):
    """The keys of bands low..high of all documents: (high - low, N) uint64."""
    keys = np.empty((high - low, len(signatures)), np.uint64)
    for start in range(0, len(signatures), _BLOCK):
        block = np.ascontiguousarray(signatures[start : start + _BLOCK, low * ROWS : high * ROWS])
        keys[:, start : start + _BLOCK] = block.view(np.uint64).T
    return keys


def _candidates(keys):
    """Pairs (a, b) of documents with equal keys, in blocks: each with the first of its key and with the one before
    it, so that a thousand documents with one key make two thousand pairs, not half a million."""
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    first = 0  # where in `order` the run of equal keys began
    for start in range(1, len(keys), _BLOCK):
        stop = min(start + _BLOCK, len(keys))
        same = keys[start:stop] == keys[start - 1 : stop - 1]
        place = np.arange(start, stop)
        firsts = np.maximum.accumulate(np.where(same, first, place))
        first = firsts[-1]
        place, firsts = place[same], firsts[same]
        later = place - 1 > firsts  # the second of a run has one partner, not two
        a = np.concatenate([firsts, place[later] - 1])
        b = np.concatenate([place, place[later]])
        if len(a):
            yield order[a], order[b]


def _roots(parent, documents):
    """The root of each document; paths are halved on the way."""
    while True:
        up = parent[documents]
        upper = parent[up]
        if np.array_equal(up, upper):
            return up
        parent[documents] = upper


def _join(parent, a, b):
    """Unite the groups of each pair; the lower root becomes the root of both."""
    while len(a):
        a, b = _roots(parent, a), _roots(parent, b)
        apart = a != b
        a, b = np.minimum(a, b)[apart], np.maximum(a, b)[apart]
        np.minimum.at(parent, b, a)  # of several lower roots the lowest; the others come round again


class Decontaminator:
    """Finds questions of C-Eval and CMMLU in a text, by runs of `n` of their letters and digits.

    `paths` are csv files, or folders that hold some. Questions shorter than n are looked for whole, those shorter
    than `shortest` not at all, being phrases that any text may have; `skipped` counts them among all `questions`.
    """

    def __init__(self, paths, n=QUESTION_GRAM, shortest=SHORTEST_QUESTION):
        keys = [content_key(question) for path in paths for question in _read_questions(Path(path))]
        self.questions, self.skipped = len(keys), sum(len(key) < shortest for key in keys)
        self.short = sorted({key for key in keys if shortest <= len(key) < n})
        self.grams = _GramSet([key for key in keys if len(key) >= max(n, shortest)], n)
        self.hints = _GramSet([key for key in keys if len(key) >= shortest], min(n, shortest))

    def contaminated(self, text):
        """Whether a run of n characters of a question, or a whole short question, stands in the text."""
        if not self.questions:
            return False
        key = content_key(text)
        if not self.hints.meets(key):  # as most texts; the rest of the work is for the others
            return False
        return self.grams.meets(key) or any(question in key for question in self.short)


class _GramSet:
    """All runs of n characters of some strings, as hashes."""

    def __init__(self, keys, n):
        self.n = n
        self.hashes = np.unique(np.concatenate([np.empty(0, np.uint64), *(char_ngrams(key, n) for key in keys)]))
        bits = 4 + max(len(self.hashes), 1).bit_length()  # at most 1 hash in 16 passes the filter by chance
        self.shift = np.uint64(64 - bits)
        self.filter = np.zeros(1 << bits, bool)  # ten times as fast as a search among the sorted hashes
        self.filter[self.hashes >> self.shift] = True

    def meets(self, key):
        """Whether any run of n characters of the key is in the set."""
        hashes = char_ngrams(key, self.n)
        hashes = hashes[self.filter[hashes >> self.shift]]
        places = np.searchsorted(self.hashes, hashes)
        return bool((self.hashes[np.minimum(places, len(self.hashes) - 1)] == hashes).any())


def _read_questions(path):
    """The column question or Question of a csv file, or of every csv file in a folder."""
    files = sorted(path.rglob("*.csv")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} holds no csv file")
    for file in files:
        try:
            with open(file, encoding="utf-8-sig", newline="") as opened:
                reader = csv.DictReader(opened)
                column = next((name for name in reader.fieldnames or () if name.lower() == "question"), None)
                if column is None:
                    raise DataError(f"{file} has no column named question")
                yield from (row[column] or "" for row in reader)
        except FileNotFoundError:
            raise DataError(f"{file} not found: questions to keep out of training text") from None
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{file} is not a csv file in UTF-8: {error}") from None
