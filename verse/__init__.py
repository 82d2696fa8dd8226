"""Regulated verse as rules: what forms there are, how a poem is written down, and what is right in one.

A poem is a list of lines without marks. As a text it has a couplet a row: 线，线。 Rhymes and tones are told by tables
counted from a corpus (verse/tables.py): nothing here is trained.
"""

import math
import re
from collections import Counter

from verse.tables import LEVEL, OBLIQUE

FORMS = {"五绝": (4, 5), "七绝": (4, 7), "五律": (8, 5), "七律": (8, 7)}  # lines, characters of a line
HAN = re.compile("[\u3007\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U000323af]+")
MARKS = re.compile("[，。？！；、：\n]+")


def render(lines):
    """["床前明月光", "疑是地上霜"] -> "床前明月光，疑是地上霜。", a couplet a row."""
    ends = ("，", "。\n")
    return "".join(line + ends[i % 2] for i, line in enumerate(lines)).removesuffix("\n")


def parse(text):
    """The lines of a text, without marks; render(parse(text)) == text only if it is written as a poem is."""
    return [line for line in MARKS.split(text.strip()) if line]


def form_of(lines):
    """The name in FORMS of lines of Chinese characters, or None."""
    lengths = {len(line) for line in lines}
    shape = len(lines), lengths.pop() if len(lengths) == 1 else 0
    form = next((name for name, known in FORMS.items() if known == shape), None)
    return form if form and all(HAN.fullmatch(line) for line in lines) else None


def rhyme_class(lines, tables):
    """The class that the ends of all even lines are in, or None; of several that which most of them are foremost in."""
    ends = ends_of(lines)
    common = [name for name, n in classes_of(ends, tables).items() if n == len(ends)]
    return max(common, key=lambda name: sum(tables.rhymes[end][0] == name for end in ends), default=None)


def ends_of(lines):
    """The rhyme words: the last character of each even line that has one."""
    return [line[-1] for line in lines[1::2] if line]


def classes_of(ends, tables):
    """How many of some rhyme words are in each class: a character may be in several."""
    return Counter(name for end in ends for name in tables.rhymes.get(end, ()))


def rhyme_entropy(classes):
    """Entropy in nats of a list of rhyme classes; None, of a poem that does not rhyme, is left out."""
    counts = Counter(name for name in classes if name)
    return -sum(n / counts.total() * math.log(n / counts.total()) for n in counts.values())


def opposed(a, b):
    """Whether two tones may be one level and one oblique; what is neither may be either."""
    return a != b or a not in (LEVEL, OBLIQUE)


def right_patterns(tones):
    """Whether each line has right tones: [bool], from the tones of each line's characters.

    The 2nd, 4th and 6th alternate (the 1st, 3rd and 5th are free), and in the second line of a couplet they are
    opposite to those of the first.
    """
    tones = [line[1:6:2] for line in tones]
    right = [all(map(opposed, line, line[1:])) for line in tones]
    return [ok and (i % 2 == 0 or all(map(opposed, tones[i - 1], tones[i]))) for i, ok in enumerate(right)]


def right_tones(lines, tables):
    return right_patterns([[tables.tones.get(character) for character in line] for line in lines])


def judge(text, tables, form=None, rhyme=None, heads=None, words=None):
    """What is right in one reply, as a dict of bools and shares.

    form, rhyme, tones: as asked, or if nothing is asked any form and any class; all_right: these three.
    lines, rhymes, right_tones: shares of lines of the right length, of rhyme words that rhyme (of the asked class, else
    with the first of them) and of lines with right tones, for partial credit.
    heads, words: the shares of the asked first characters and words that are there; asked: form, rhyme, all heads and
    words. ValueError for a form that is none of FORMS.
    """
    if form and form not in FORMS:
        raise ValueError(f"form {form!r}: one of {', '.join(FORMS)} is needed")
    lines = parse(text)
    name = form_of(lines)
    shape = FORMS[form] if form else max(FORMS.values(), key=lambda shape: _fitting(lines, shape))
    whole = name is not None and form in (None, "", name) and render(lines) == text.strip()
    n = max(len(lines), shape[0])
    sized = [line if _fits(line, shape) else "" for line in lines[: shape[0]]]
    toned = [bool(line) and ok for line, ok in zip(sized, right_tones(sized, tables), strict=True)]
    rhymes = _rhyming(sized, n // 2, tables, rhyme)
    found = dict(lines=_fitting(lines, shape), rhymes=rhymes, right_tones=sum(toned) / n)
    found |= dict(form=whole, rhyme=whole and rhymes == 1, tones=whole and all(toned))
    found["heads"] = sum(map(str.startswith, lines, heads or "")) / len(heads) if heads else 1.0
    found["words"] = sum(word in text for word in words) / len(words) if words else 1.0
    found["asked"] = whole and (not rhyme or found["rhyme"]) and found["heads"] == found["words"] == 1
    found["all_right"] = found["form"] and found["rhyme"] and found["tones"]
    return found


def _fits(line, shape):
    return len(line) == shape[1] and HAN.fullmatch(line) is not None


def _fitting(lines, shape):
    """Share of the lines that are of the right length, among those asked or, if they are more, those there."""
    return sum(_fits(line, shape) for line in lines[: shape[0]]) / max(len(lines), shape[0])


def _rhyming(lines, n, tables, asked):
    """Share of n rhyme words that are different and in one class, the asked one; else in that of most, where the first
    word counts for nothing: any rhymes with itself."""
    counts = classes_of(sorted(set(ends_of(lines))), tables)
    if asked:
        return counts[asked] / n
    return max(max(counts.values(), default=0) - 1, 0) / (n - 1)
