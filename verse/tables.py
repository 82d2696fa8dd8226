"""Tables of tones and rhymes, counted from poems: the tone of each character, and the classes of those that rhyme."""

import functools
import json
from collections import Counter, defaultdict
from typing import NamedTuple

from dataset.formats import DataError, escaped

LEVEL, OBLIQUE = "平", "仄"
SURE = 0.9  # a character has a tone if so large a share of its marks in the corpus says so
ROUNDS = 8  # of label propagation; on the Tang and Song poems it is at its fixed point before
SHARE = 0.2  # of a character's rhymes that lie in a second class, for it to be in that too


class Tables(NamedTuple):
    """tones: {character: 平 or 仄}, of both kinds absent; rhymes: {character: the classes it is in, its own first}.

    A class is named by its commonest character.
    """

    tones: dict
    rhymes: dict


def count_tables(poems):
    """Tables of poems, each (lines, tones): tones of the same lengths as lines, a sign a character, or None."""
    marks, ends = Counter(), []
    for lines, tones in poems:
        ends.append([line[-1] for line in lines[1::2]])
        if tones:
            marks.update(zip("".join(lines), "".join(tones), strict=True))
    return Tables(count_tones(marks), rhyme_classes(ends))


def count_tones(marks):
    """{character: tone} where at least SURE of its marks are of one tone; marks: Counter of (character, sign)."""
    total = Counter()
    for (character, _), n in marks.items():
        total[character] += n
    sure = {pair for pair, n in marks.items() if n >= SURE * total[pair[0]]}
    return {character: tone for character, tone in sorted(sure) if tone in (LEVEL, OBLIQUE)}


def rhyme_classes(ends):
    """{character: classes} from the rhyme words of each poem, by label propagation over the graph of who rhymes.

    Each character begins as a class of its own. From the commonest down each takes the class that its rhymes are most
    in, a rhyme's vote being how often the two rhyme / the square root of how often it rhymes at all.
    """
    common, edges = Counter(), defaultdict(Counter)
    for words in ends:
        words = list(dict.fromkeys(words))
        common.update(words)
        for word in words:
            edges[word].update(other for other in words if other != word)
    degree = {word: edges[word].total() for word in edges}
    order = sorted(common, key=lambda word: (-common[word], word))
    label = {word: word for word in order}

    def votes(word):
        counts = Counter()
        for other, n in edges[word].items():
            counts[label[other]] += n / degree[other] ** 0.5
        return counts

    for _ in range(ROUNDS):
        before = dict(label)
        for word in order:
            if counts := votes(word):
                label[word] = min(counts, key=lambda name: (-counts[name], -common[name], name))
        if label == before:
            break
    name = {}  # of a label: its commonest character, not that in which it began
    for word in order:
        name.setdefault(label[word], word)
    classes = {}
    for word in order:
        counts = votes(word)
        least = SHARE * counts.total()
        others = sorted(name[other] for other, n in counts.items() if other != label[word] and n >= least)
        classes[word] = (name[label[word]], *others)
    return classes


def as_json(tables):
    """Tables with their characters in a text for each tone, each class, and each class that is not their own."""
    found = dict(tones=defaultdict(str), rhymes=defaultdict(str), also=defaultdict(str))
    for character, tone in tables.tones.items():
        found["tones"][tone] += character
    for character, (own, *others) in tables.rhymes.items():
        found["rhymes"][own] += character
        for name in others:
            found["also"][name] += character
    return found


def from_json(found):
    """The Tables of what `as_json` gave."""
    tones = {character: tone for tone, characters in found["tones"].items() for character in characters}
    rhymes = {character: (name,) for name, characters in found["rhymes"].items() for character in characters}
    for name, characters in sorted(found["also"].items()):
        for character in characters:
            rhymes[character] += (name,)
    return Tables(tones, rhymes)


@functools.lru_cache(maxsize=4)
def load_tables(path):
    """The Tables of a file that corpora/poems.py wrote."""
    try:
        with open(path, encoding="utf-8") as file:
            tables = from_json(json.load(file))
        if not all(tables):  # which would find every line right
            raise ValueError
        return tables
    except OSError as error:
        raise DataError(f"{escaped(path)}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{escaped(path)}: not tables of tones and rhymes; corpora/poems.py writes them") from None
