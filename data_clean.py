"""Pure text functions: normalise a document, drop repeats, key it for splitting, undo word/tag annotation;
and the tally of what was kept and what was dropped and why."""

import hashlib
import re
from collections import Counter, defaultdict

# Full-width letters and digits become ASCII, so that the year １９９８ shares its tokens with 1998.
# Full-width punctuation stays: it is how Chinese is typeset.
_HALF_WIDTH = {c: c - 0xFEE0 for a, z in ("０９", "ＡＺ", "ａｚ") for c in range(ord(a), ord(z) + 1)}
_REPEATED_SIGN = re.compile(r"([^\w\s])\1{6,}")
_QUOTES = "\"'“”‘’「」『』＂\n"  # not in an opening, which stands in “”
_TAG = re.compile(r"/[A-Za-z]+$")

# Words that tell what a review is about.
KINDS = {
    "酒店": re.compile("酒店|宾馆|房间|客房|入住|前台|携程|早餐|大堂|住宿|退房|服务员"),
    "图书": re.compile("书|作者|故事|小说|阅读|读者|情节"),
    "电脑": re.compile("电脑|笔记本|本本|键盘|屏幕|硬盘|显卡|内存|散热|驱动|系统|电池|配置"),
}


def normalise(text):
    """One line of text: no control, format or private-use characters, single spaces, half-width letters and
    digits, at most six equal signs in a row (as in ......)."""
    text = re.sub(r"\s+", " ", text)
    if not text.isprintable():
        text = "".join(c for c in text if c.isprintable())
    return _REPEATED_SIGN.sub(r"\1" * 6, text.translate(_HALF_WIDTH)).strip()


def content_key(text):
    """The letters and digits alone, lower case: equal for texts that differ in signs and spaces only."""
    return re.sub(r"[\W_]+", "", text).lower()


def text_hash(text, salt=""):
    """A 64-bit number that depends on (text, salt) alone: the same on every machine and in every run."""
    return int.from_bytes(hashlib.blake2b(f"{salt}\0{text}".encode(), digest_size=8).digest(), "little")


def is_validation(text, share):
    """Whether a document is for validation, by its content alone: adding documents moves none."""
    return text_hash(content_key(text), "split") < share * 2**64


def strip_tags(line):
    """'[中央/n  电视台/n]nt  播出/v' -> '中央电视台播出', from the word/tag form of the People's Daily.

    Words without a tag are kept whole; a leading article number (19980101-01-001-001/m) is dropped.
    """
    words = []
    for i, word in enumerate(line.split()):
        word = re.sub(r"\][A-Za-z]*$", "", word)
        word = re.sub(r"^\[(?!/)", "", word)  # a bare [ opens a compound, [/w is the sign itself
        word = _TAG.sub("", word)
        if not (i == 0 and re.fullmatch(r"\d{8}-\d\d-\d{3}-\d{3}", word)):
            words.append(word)
    return "".join(words)


def find_kind(text):
    """The kind whose words are found more often than those of any other, or None."""
    (second, _), (most, best) = sorted((len(words.findall(text)), kind) for kind, words in KINDS.items())[-2:]
    return best if most > second else None


def find_opening(text, seed):
    """The first 2 to 8 characters of a review, without quotes and never all of it, or None."""
    quote = next((i for i, c in enumerate(text) if c in _QUOTES), len(text))
    longest = min(8, quote, len(text) - 1)
    if longest < 2:
        return None
    opening = text[: 2 + text_hash(text, f"opening {seed}") % (longest - 1)].rstrip()
    return opening if len(content_key(opening)) >= 2 else None


class Tally:
    """What became of all that was read: {row: {"kept" or why dropped: count}}, with remarks on the kept."""

    def __init__(self):
        self.outcomes, self.remarks = defaultdict(Counter), defaultdict(Counter)

    def count(self, row, outcome, n=1):
        self.outcomes[row][outcome] += n

    def remark(self, row, what, n=1):
        if n:
            self.remarks[row][what] += int(n)

    def counts(self, row):
        """{read, kept, dropped: {why: count}, remarks: {what: count}}; read = kept + dropped."""
        dropped = {why: n for why, n in self.outcomes[row].most_common() if n and why != "kept"}
        kept = self.outcomes[row]["kept"]
        return dict(read=kept + sum(dropped.values()), kept=kept, dropped=dropped, remarks=dict(self.remarks[row]))

    def table(self):
        """All rows as aligned text columns."""
        lines = [("", "read", "kept", "dropped and why; of the kept")]
        for row in self.outcomes:
            c = self.counts(row)
            why, remarks = (", ".join(f"{k} {n:,}" for k, n in c[part].items()) for part in ("dropped", "remarks"))
            last = f"{why or 'none'}; {remarks}" if remarks else why or "none"
            lines.append((row, f"{c['read']:,}", f"{c['kept']:,}", last))
        a, b, c = (max(len(line[i]) for line in lines) for i in range(3))
        return "\n".join(f"{line[0]:<{a}}  {line[1]:>{b}}  {line[2]:>{c}}  {line[3]}" for line in lines)


def unique(texts, row, min_characters, tally):
    """Each text that has enough letters and digits, the first time it comes; the others are counted."""
    seen = set()
    for text in texts:
        if len(content_key(text)) < min_characters:
            tally.count(row, "too short")
        elif text in seen:
            tally.count(row, "duplicate")
        else:
            seen.add(text)
            yield text
