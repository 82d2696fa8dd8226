"""The Tang and Song poems of chinese-poetry (MIT): regular ones, simplified, split by title, with tables of verse.

Reads the npm package chinese-poetry, packed or unpacked, or a clone of its repository, and writes into a folder

    poems.jsonl    {"text": "title\\nline，line。\\n..."}, a training poem a row
    heldout.jsonl  {"title", "author", "form", "lines"}: poems whose titles no training poem has
    verse.json     tones and rhyme classes, counted from the training poems
"""

import functools
import json
import re
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from corpora.clean import _opencc, char_ngrams, text_hash
from dataset.formats import DataError, escaped
from verse import form_of, parse, render

POEMS = re.compile(r"(?:^|/)(strains/json|quantangshi|全唐诗|json)/(poet\.(?:tang|song)\.\d+)\.json$")
HELD_OUT = 0.026  # of the titles: more than 5,000 poems
COPIED = 10  # characters in a row that are in the training text too, for them to count as copied


class Poem(NamedTuple):
    """lines: without marks; tones: 平, 仄 or ○ (either) of each character, or None."""

    title: str
    author: str
    lines: list
    tones: list | None

    @property
    def text(self):
        return f"{self.title}\n{render(self.lines)}"


def read_poems(path):
    """Every regular poem of an archive or a folder, simplified, as Poem."""
    simplify = _opencc().convert
    for poems, strains in pairs(path):
        tones = {row["id"]: row["strains"] for row in strains}
        for row in poems:
            lines = parse("".join(row["paragraphs"]))
            if form_of(lines):
                signs = parse("".join(tones.get(row["id"], ())))
                aligned = [len(line) for line in signs] == [len(line) for line in lines]
                title, author, *lines = simplify("\n".join([row["title"], row["author"], *lines])).split("\n")
                if form_of(lines):
                    yield Poem(clean_title(title), author, lines, signs if aligned else None)


def clean_title(title):
    return re.sub(r"\s+", " ", re.sub("[（(].*?[)）]", "", title)).strip()


def pairs(path):
    waiting = {}
    for name, data in members(path):
        kind, stem = POEMS.search(name).groups()
        waiting.setdefault(stem, {})[kind == "strains/json"] = json.loads(data)
        if len(waiting[stem]) == 2:
            found = waiting.pop(stem)
            yield found[False], found[True]
    yield from ((found[False], []) for found in waiting.values() if False in found)


def members(path):
    path = Path(path)
    if path.is_dir():
        for file in sorted(path.rglob("*.json")):
            if POEMS.search(file.as_posix()):
                yield file.as_posix(), file.read_bytes()
        return
    with tarfile.open(path, "r|*") as archive:
        for member in archive:
            if member.isfile() and POEMS.search(member.name):
                yield member.name, archive.extractfile(member).read()


def is_held_out(title):
    return text_hash(title, "poems") < HELD_OUT * 2**64


# copies


def ngrams_of(texts):
    """A hash of every COPIED characters in a row of the poems: sorted (N,) uint64."""
    return np.unique(np.concatenate([char_ngrams("".join(parse(text)[1:]), COPIED) for text in texts]))


def copied(lines, ngrams):
    """Share of the lines of a poem of which every character is in COPIED characters that the training text has too."""
    text = "".join(lines)
    hashes = char_ngrams(text, COPIED)
    found = ngrams[np.minimum(np.searchsorted(ngrams, hashes), len(ngrams) - 1)] == hashes
    covered = np.zeros(len(text), bool)
    for i in np.flatnonzero(found):
        covered[i : i + COPIED] = True
    ends = np.cumsum([len(line) for line in lines])
    return sum(covered[end - len(line) : end].all() for line, end in zip(lines, ends)) / len(lines) if lines else 0.0
