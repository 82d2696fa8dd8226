"""Questions of C-Eval and CMMLU, found in training text, so that what contains one can be left out."""

import csv
import hashlib
from pathlib import Path

import numpy as np

from corpora.clean import char_ngrams, content_key
from dataset.formats import DataError

# In a question's letters and digits. Runs of 10 to 15 are often names and quotations (先天下之忧而忧后天下之乐而乐).
QUESTION_GRAM = 16
# A question shorter than QUESTION_GRAM but at least this long is looked for whole.
SHORTEST_QUESTION = 10


class Decontaminator:
    """Finds questions of C-Eval and CMMLU in a text, by runs of `n` of their letters and digits.

    `paths` are csv files, or folders that hold some. Questions shorter than n are looked for whole, those shorter
    than `shortest` not at all, being phrases that any text may have; `skipped` counts them among all `questions`.
    """

    def __init__(self, paths, n=QUESTION_GRAM, shortest=SHORTEST_QUESTION):
        keys = [content_key(question) for path in paths for question in _read_questions(Path(path))]
        self.questions, self.skipped = len(keys), sum(len(key) < shortest for key in keys)
        self.digest = hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()  # what it was made from
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
