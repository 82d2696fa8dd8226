"""Questions that held-out documents ask by themselves: no labels, and a small model is above chance on them.

Each compares what was written with what was not, made from the same documents: a continuation with another one, an
order of sentences with another, the second line of a couplet with those of other poems. All is drawn by the seed. The
right choice stands at a drawn place, so that a model which finds all alike is right as often as a guess.
"""

import json
import random
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import checkpoint, resume
from dataset.corpus import Corpus
from dataset.formats import DataError, escaped
from evaluation.scoring import Question
from verse import HAN

BLOCK = 1 << 20  # tokens that are searched for the ends of documents at once
SHORTEST, LONG = 12, 24  # characters: a piece ends with a sentence from the first on, with a clause from the second
PIECES = 16  # of an excerpt: what a long document is cut into, so that a book asks more than one question
CONTEXT = 6  # pieces that a continuation follows at most
_ENDS = "。！？!?…\n"
_PART = re.compile(rf"[^，、；：,;:{_ENDS}]{{0,40}}(?:[，、；：,;:{_ENDS}]+[”’」』）)]*)?")
_HAN = HAN.pattern.removesuffix("+")
_COUPLET = re.compile(rf"(?<!{_HAN})({_HAN}{{4,7}})[，,]({_HAN}{{4,7}})([。？！])")


class Excerpt(NamedTuple):
    document: int  # which one it is of
    pieces: list[str]  # of which it is joined


def pieces_of(text):
    """A text cut after sentences, or after clauses where these are long: pieces that joined are the text."""
    pieces, piece = [], ""
    for part in _PART.findall(text):
        piece += part
        ended = re.search(rf"[{_ENDS}][”’」』）)]*$", part)
        if len(piece) >= LONG or (ended and len(piece) >= SHORTEST):
            pieces.append(piece)
            piece = ""
    if piece and pieces and len(piece) < SHORTEST:
        pieces[-1] += piece
    elif piece:
        pieces.append(piece)
    return pieces


def excerpts_of(texts):
    cut = ((i, pieces_of(text)) for i, text in enumerate(texts))
    return [Excerpt(i, pieces[j : j + PIECES]) for i, pieces in cut for j in range(0, len(pieces), PIECES)]


def question(context, right, wrong, source, rng):
    """A Question whose right choice stands anywhere."""
    answer = rng.randrange(len(wrong) + 1)
    return Question(context, [*wrong[:answer], right, *wrong[answer:]], answer, source)


def other_document(excerpts, document, like, rng):
    """Of a few pieces of other documents the one nearest to `like` in length, or None."""
    drawn = [rng.choice(excerpts) for _ in range(24)]
    others = [rng.choice(excerpt.pieces) for excerpt in drawn if excerpt.document != document]
    return min(
        (piece for piece in others if piece != like), key=lambda piece: abs(len(piece) - len(like)), default=None
    )


def continuations(excerpts, source, rng):
    """What follows, or a piece of another document."""
    for excerpt in excerpts:
        if len(excerpt.pieces) > 1:
            i = rng.randrange(1, len(excerpt.pieces))
            other = other_document(excerpts, excerpt.document, excerpt.pieces[i], rng)
            if other:
                context = "".join(excerpt.pieces[max(0, i - CONTEXT) : i])
                yield question(context, excerpt.pieces[i], [other], source, rng)


def near_continuations(excerpts, source, rng):
    """What follows, or what stands later in the same document."""
    for excerpt in excerpts:
        if len(excerpt.pieces) > 2:
            i = rng.randrange(1, len(excerpt.pieces) - 1)
            later = rng.choice(excerpt.pieces[i + 1 :])
            if later != excerpt.pieces[i]:
                context = "".join(excerpt.pieces[max(0, i - CONTEXT) : i])
                yield question(context, excerpt.pieces[i], [later], source, rng)


def order(excerpts, source, rng):
    """Three or four pieces as they were written, or in another order."""
    for excerpt in excerpts:
        if len(excerpt.pieces) > 2:
            i = rng.randrange(max(1, len(excerpt.pieces) - 3))
            real = excerpt.pieces[i : i + 4]
            other = rng.sample(real, len(real))
            if other != real:
                yield question("", "".join(real), ["".join(other)], source, rng)


def couplets_of(text):
    """[(where its second line begins, that line, its mark)] of a text that is mostly verse, else []."""
    found = [match for match in _COUPLET.finditer(text) if len(match[1]) == len(match[2])]
    if 2 * sum(len(match[0]) for match in found) < len(text):
        return []
    return [(match.start(2), match[2], match[3]) for match in found]


def couplets(texts, source, rng):
    """The second line of a couplet, or those of three other poems, of the same length."""
    poems = [(text, found) for text in texts if (found := couplets_of(text))]
    lines = {}
    for number, (_, found) in enumerate(poems):
        for _, line, _ in found:
            lines.setdefault(len(line), []).append((number, line))
    for number, (text, found) in enumerate(poems):
        start, line, mark = rng.choice(found)
        drawn = rng.sample(lines[len(line)], min(24, len(lines[len(line)])))
        others = list(dict.fromkeys(other for poem, other in drawn if poem != number and other != line))[:3]
        if len(others) == 3:
            yield question(text[:start], line + mark, [other + mark for other in others], source, rng)


TASKS = dict(
    continuations=("which continuation is the real one, the other from another document", continuations),
    near_continuations=("which continuation is the real one, the other from later in the document", near_continuations),
    order=("which order of the sentences is the real one", order),
    couplets=("which of four second lines closes the couplet", couplets),
)


def ask(task, documents, most, seed):
    """Up to `most` Questions of each source of documents, {source: [text]}."""
    found = []
    for source, texts in documents.items():
        rng = random.Random(f"{seed} {task} {source}")
        parts = list(texts) if task == "couplets" else excerpts_of(texts)
        rng.shuffle(parts)
        made = TASKS[task][1](parts, source, rng)
        found += [asked for _, asked in zip(range(most), made)]  # noqa: B905 - as many as there are
    return found


# documents


def of_data(data, tokenizer, source_path, most, seed):
    """{source: [text]} of the validation documents of a data folder, `most` of each source, evenly drawn.

    `source_path` names the checkpoint whose tokenizer must be the data's.
    """
    corpus = Corpus(data, "val")
    checkpoint.check_data(tokenizer, source_path, corpus.meta, corpus.directory / "meta.json")
    resume.verify_data(data, resume.hashes_of(data, [corpus.file(source).name for source in corpus.sources]))
    found = {}
    for source, (start, stop) in corpus.segments.items():
        blocks = ((i, corpus.read(i, min(i + BLOCK, stop))) for i in range(start, stop, BLOCK))
        ends = [i + np.flatnonzero(ids == tokenizer.eos_id) for i, ids in blocks]
        ends = np.concatenate([[start - 1], *ends]).tolist()
        drawn = random.Random(f"{seed} {source}").sample(range(len(ends) - 1), min(most, len(ends) - 1))
        found[source] = [tokenizer.decode(corpus.read(ends[i] + 1, ends[i + 1])) for i in drawn]
    return found


def of_file(path):
    """The documents of a text file, parted by blank lines or else a line each, or of a .jsonl file of {"text": ...}."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{escaped(path)}: not UTF-8; convert it: iconv -f GB18030 -t UTF-8") from None
    if Path(path).suffix.lower() != ".jsonl":
        blank = re.compile(r"\n\s*\n")  # lines of spaces too, wide ones among them
        parts = (blank if blank.search(text.strip()) else re.compile("\n")).split(text)
        return [part.strip("\n") for part in parts if part.strip()]
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                found.append(json.loads(line)["text"])
            except (ValueError, LookupError, TypeError, RecursionError):
                found.append(None)
            if not isinstance(found[-1], str):
                raise DataError(f'{escaped(path)}:{number}: not a JSON object with a "text"')
    return found


def of_files(paths, most, seed):
    """{name of the file: [text]}, `most` of each, evenly drawn."""
    found = {}
    for path in paths:
        texts, name = of_file(path), Path(path).stem
        if not texts:
            raise DataError(f"{escaped(path)}: no document in it")
        if name in found:
            raise DataError(f"{escaped(path)}: another file is called {name} as well: rename one")
        found[name] = random.Random(f"{seed} {name}").sample(texts, min(most, len(texts)))
    return found
