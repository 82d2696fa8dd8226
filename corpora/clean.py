"""Pure text functions: repair a text, judge a document; hashes to split and compare by."""

import datetime
import functools
import hashlib
import html
import re
import unicodedata
from collections import Counter

import numpy as np

from corpora.fences import CODE, outside_code
from corpora.junk import drop_junk
from corpora.wrapping import join_lines

# Full-width letters and digits become ASCII, so that the year １９９８ shares its tokens with 1998.
# Full-width punctuation stays: it is how Chinese is typeset.
_HALF_WIDTH = {c: c - 0xFEE0 for a, z in ("０９", "ＡＺ", "ａｚ") for c in range(ord(a), ord(z) + 1)}
_REPEATED_SIGN = re.compile(r"([^\w\s])\1{6,}")


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
    return int.from_bytes(
        hashlib.blake2b(f"{salt}\0{text}".encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
    )


def char_ngrams(text, n):
    """A 64-bit hash of every run of n characters of the text: (len - n + 1,) uint64, the same on every machine."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
    hashes = np.zeros(max(len(codes) - n + 1, 0), np.uint64)
    for i in range(n):  # a polynomial in an odd multiplier modulo 2**64
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + codes[i : i + len(hashes)]
    hashes ^= hashes >> np.uint64(32)  # the high bits are mixed, the low ones not yet
    return hashes * np.uint64(0xD6E8FEB86659FD93)


def is_validation(text, share):
    """Whether a document is for validation, by its content alone: adding documents moves none."""
    return text_hash(content_key(text), "split") < share * 2**64


# Cleaning. An option that is missing is off; so is a switch that is False, a minimum of 0 and a maximum of 1.0.
_INVISIBLE = (
    "\0-\x08\x0e-\x1f\x7f-\x84\x86-\x9f"  # control characters
    "\xad\u034f\u061c\u180b-\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff"  # zero width, direction, byte order
    "\ufdd1-\ufdef\ufe00-\ufe0f\ufff0-\uffff"  # no characters, variation selectors, U+FFFD for what was lost
    "\ud800-\uf8ff\U000e0000-\U0010ffff"  # unpaired surrogates, tags, private use
)
_EMOJI = "\xa9\xae\u203c-\u2bff\u3030\u303d\u3297\u3299\U0001f000-\U0001fbff"
_SHAPING = (  # where such characters choose what a sign looks like, they are part of the text
    "\U0001f3f4[\U000e0020-\U000e007e]+\U000e007f"  # the flag of a region
    "|(?<=[#*\\d])\ufe0f(?=\u20e3)"  # a keycap
    f"|(?<=[{_EMOJI}])[\ufe0e\ufe0f]|(?<=[{_EMOJI}\ufe0f])\u200d(?=[{_EMOJI}])"
    "|(?<=[\u0600-\u109f\u1780-\u18af])[\u200c\u200d]|(?<=[\u1800-\u18af])[\u180b-\u180e]"  # Arabic, Indic, Mongolian
    "|(?<=[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])[\ufe00-\ufe02\U000e0100-\U000e01ef]"  # variants of 葛
)
_SPOKEN_OF = "(?<!\ufffd)\ufffd(?!\ufffd)"  # in a conversation; what a wrong encoding left comes in runs
_ANSI = r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b\n]{,200}(?:\x07|\x1b\\)"  # ECMA-48: colours, titles
# Letters of other scripts with their marks. NFC would make other characters of U+FA19 or the sign for ohm.
_MARKED = re.compile(
    "[^\\W\uf900-\ufaff\U0002f800-\U0002fa1f][\u0300-\u036f\u0591-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\u3099\u309a]+"
)
_LINE_BREAKS = "\r\v\f\x85\u2028\u2029"
_ODD_SPACES = "\xa0\u1680\u2000-\u200a\u202f\u205f"
_FULL_WIDTH = "０-９Ａ-Ｚａ-ｚ"
_SUSPECT = re.compile(f"[{_INVISIBLE}{_LINE_BREAKS}{_ODD_SPACES}\u3000{_FULL_WIDTH}\t<&]")
_UNSEEN = re.compile(f"[{_INVISIBLE}]")
# `<` and letters may be mathematics (n <p, q> 2) or generics (List<P>): a tag has nothing in it but attributes.
_ATTRIBUTES = rf"""(?:(?:\s+|(?<=["']))(?:
    [@:\w][\w:.@-]*\s*=\s*(?:"[^"<{CODE}]*"|'[^'<{CODE}]*')
    |[@:\w][\w:.@-]+\s*=\s*[\w.,:;/#%?&+()-]+
    |(?:hidden|nowrap|noshade|compact|disabled|draggable|contenteditable|itemscope|data-[\w-]+|v-[\w-]+)(?![\w=-])
))*"""
_HTML = re.compile(
    rf"(?sia)(?P<tag>\n?</?(?:br|p){''.join(_ATTRIBUTES.split())}\s*/?(?-i:(?<![A-Za-z]<P))>\n?)"
    r"|&(?:amp;|#38;)*(?:#\d{1,7}|#x[\da-f]{1,6}|[a-z]{2,8}\d{0,2});"
)


def repair(text, document=True, tags=True):
    """Prose as it was typed: without invisible characters, odd spaces and what ends a line; accents in NFC.

    A document was scraped or typeset, so there HTML leftovers, full-width letters and digits, runs of spaces and
    blank lines go as well, and all is in NFC. In a conversation they may be what it is about, as may a single U+FFFD;
    two spaces at a line's end are Markdown's line break. Chinese punctuation and indents stay, and without `tags`
    those of HTML.
    """
    padded = f"\n\n{text}\n\n"  # a line break at either end is one of three
    if not (_SUSPECT.search(text) or any(run in padded for run in ("  ", " \n", "\n\n\n"))):
        if unicodedata.is_normalized("NFC", text):
            return text  # most text: one look at each character
    text = re.sub(f"\r\n|[{_LINE_BREAKS}]", "\n", text)
    if document and ("<" in text or "&" in text):
        text = _HTML.sub(_plain if tags else _without_entity, text)
    if re.search(f"[{_INVISIBLE}]", text):
        kept = _SHAPING if document else f"{_SHAPING}|{_SPOKEN_OF}"
        text = re.sub(f"({kept})|{_ANSI}|[{_INVISIBLE}]", r"\1", text)
    text = unicodedata.normalize("NFC", text) if document else _MARKED.sub(_composed, text)
    text = re.sub(f"[{_ODD_SPACES}]", " ", text)
    if document:
        text = re.sub(f"[{_FULL_WIDTH}]+", lambda run: run[0].translate(_HALF_WIDTH), text)
        if "\u3000" in text:  # the indent of a Chinese paragraph
            text = re.sub(r"(?m)^[^\S\n]*\u3000[^\S\n]*", "", text).replace("\u3000", " ")
        text = re.sub(r" (?<=\S )[ \t]+|\t(?<=\S\t)[ \t]*", " ", text)  # not what indents a line
    text = "\n".join(_without_end(line, document) for line in text.split("\n"))
    return (re.sub(r"\n{3,}", "\n\n", text) if document else text).strip("\n").rstrip(" ")


def _without_end(line, document):
    """The line without spaces at its end, but for Markdown's line break in a conversation."""
    rest = line.rstrip(" \t\u3000")
    return line if rest and not document and line == rest + "  " else rest


def _composed(match):
    return unicodedata.normalize("NFC", match[0])


def _plain(match):
    """What a piece of HTML stands for."""
    return "\n" if match["tag"] else _without_entity(match)


def _without_entity(match):
    return match[0] if match["tag"] else html.unescape(re.sub("&(?:amp;|#38;)+", "&", match[0]))


# As people type numbers: full-width, with other dashes and spaces. One character for one, so that places stay.
_TYPED = _HALF_WIDTH | str.maketrans("＠．－＋‐‑‒–—−·\xa0\u2002\u2003\u3000", "@.-+-------    ")
_UNUSUAL = re.compile("[０-９＠．－‐-—−·\xa0\u2002\u2003\u3000](?:(?<=[０-９＠．])|(?<=\\d.)(?=\\d))")
# An address ends in letters: react@18.2.0 is a version, root@192.168.1.10 a machine, logo@2x.png a picture,
# git@github.com:a/b a repository. What has decimals or a currency is no telephone, nor is 150-20240501.
_PERSONAL = re.compile(
    r"""(?aix)
    (?<![\w.%+-])(?P<email>(?!git@)[\w.%+-]{1,64}@(?!v?\d+\.\d|\dx\.)(?:[\w-]{1,63}\.){1,8}[a-z]{2,24})
        (?![\w-]|\.[a-z]|:[\w~.-]*/)
    |(?<![\da-z])(?P<identity>[1-8](?:
        \d{5}[- ]?(?:18|19|20)\d\d[- ]?\d{4}[- ]?\d{3}[- ]?[\dx]
        |\d{3}(?P<by>[- ])\d{4}(?P=by)\d{4}(?P=by)\d{4}(?P=by)\d[\dx]
        |\d{14}|\d{5}(?P<apart>[- ])\d{6}(?P=apart)\d{3}))(?![\da-z])
    |(?<!\d)(?<!\d\.)(?<![¥￥$€£])(?:(?:\+|00)?86[-. ]?)?(?P<mobile>1[3-9]\d(?:
        (?P<gap>[-. ]?)\d{4}(?P=gap)\d{4}|\d{4}[- ]\d{4}
        |[- ](?!(?:19|20)\d\d[01]\d[0-3]\d)\d{8}))(?!\d|\.\d+(?![\d.、])|\ ?(?:[%％]|[美日欧港]?元(?![旦宵])))
    """
)
_LIKELY = re.compile(r"(?a)[1-8](?:(?<=1)[3-9]\d[-. ]?\d{4}[-. ]?\d{4}(?!\d)|\d{3}[- ]?\d{2}(?:[- ]?\d){9})")


def mask_personal(text):
    """The text without e-mail addresses, Chinese identity numbers and mobile numbers."""
    plain = text.translate(_TYPED) if _UNUSUAL.search(text) else text
    if "@" not in plain and not _LIKELY.search(plain):
        return text
    pieces, end = [], 0
    for match in _PERSONAL.finditer(plain):
        if name := _name(match):
            pieces += [text[end : match.start()], name]
            end = match.end()
    return "".join(pieces) + text[end:]


def _name(match):
    """What stands for a match; None for an identity number that is none."""
    if match["identity"] is None:
        return "【邮箱】" if match["email"] else "【手机号】"
    number = re.sub("[- ]", "", match["identity"])
    born = number[6:14] if len(number) == 18 else f"19{number[6:12]}"
    try:
        datetime.datetime.strptime(born, "%Y%m%d")
    except ValueError:
        return None
    # GB 11643-1999 (ISO 7064, MOD 11-2): the last digit makes sum(digit * 2**place) = 1 modulo 11. X is ten.
    total = sum((10 if digit in "xX" else int(digit)) << (17 - i) for i, digit in enumerate(number))
    return "【身份证号】" if len(number) == 15 or total % 11 == 1 else None


@functools.lru_cache(maxsize=1)
def _opencc():
    try:
        import opencc
    except ImportError as error:
        raise ImportError("to_simplified needs the package opencc (pip install opencc)") from error
    return opencc.OpenCC("t2s")


def simplify(text):
    """Traditional to Simplified Chinese."""
    return _opencc().convert(text)


def clean_text(text, options, document=False, notes=None):
    """The text after the transforms that options switch on; code in fences and backticks stays as it is.

    What should be counted is added to the list `notes`.
    """
    for turn in range(8):  # mending may uncover more to mend (&amp;lt;); what is nested deeper is no text
        # what looks like a tag only now was written as &lt;br&gt;: the text speaks of it
        transform = functools.partial(_transform, options=options, document=document, tags=turn == 0, notes=notes)
        before, text = text, outside_code(transform, text, options.get("repair"))
        if text == before:
            break
    return text


def is_blank(text):
    """Whether nothing of a turn is left after its repair."""
    text = text.strip()
    return not text or bool(_UNSEEN.match(text)) and not clean_text(text, dict(repair=True)).strip()


def _transform(text, options, document, tags, notes):
    if document and options.get("join_lines"):
        text = join_lines(text)  # first: an indent tells where a paragraph begins
    if options.get("repair"):
        text = repair(text, document, tags)
        if document:  # spaces before a Chinese paragraph; what is indented and no Chinese may be code
            text = re.sub("\n[ \t]+(?=[\u2010-\u2026\u3001-\u9fff\uff00-\uffef])", "\n", f"\n{text}")[1:]
    if options.get("to_simplified"):
        text = simplify(text)
    if options.get("mask_personal"):
        text = mask_personal(text)
    return drop_junk(text, notes) if document and options.get("web_junk") else text


def clean_document(text, options, notes=None):
    """(text, None), or (None, why it was dropped): clean_text with join_lines and web_junk, then the filters."""
    if _too_many(text.count("\ufffd"), text, options):
        return None, "broken characters"
    text = clean_text(text, options, True, notes)
    why = find_fault(text, options)
    return (None, why) if why else (text, None)


# Filters. The measures of repetition are Gopher's (arXiv:2112.11446, A1.1), in letters and digits instead of words,
# made for pages of the web. What comes again in a poem or a song is its refrain: there it takes more to be too much.
SONG = 2000  # letters: a text that is shorter may be one
REFRAIN = 8  # times that a line or a phrase of it may come
STANZA = 150  # letters of it that may come again, if they are less than half of it
FEW = 2  # lost characters that no text is dropped for: each may be one that the text speaks of
NGRAM_WINDOW = 1 << 16  # characters judged together: a long novel may say again what it said long ago
NGRAM_SHORTEST = 100  # a shorter text is taken for one of this length: a name said three times is much of it


def repeated_line_share(text, free=1):
    """Share of the characters in lines that occurred before: `free` times, or twice for each line there is."""
    lines = Counter(text.split("\n"))
    free = min(free, 2 * len(lines))
    return sum(len(line) * max(n - free, 0) for line, n in lines.items()) / max(len(text) - lines.total() + 1, 1)


def top_ngram_share(text, n, free=1):
    """Share of the characters that the most frequent n-gram covers, its first `free` times left out."""
    hashes = np.sort(char_ngrams(text, n))
    starts = np.flatnonzero(np.concatenate(([True], hashes[1:] != hashes[:-1], [True])))
    return min(max(int(np.diff(starts).max()) - free, 0) * n / max(len(text), NGRAM_SHORTEST), 1.0)


def repeated_ngram_share(text, n):
    """Share of the characters covered by n-grams that occurred before."""
    hashes = char_ngrams(text, n)
    in_order = np.sort(hashes)
    if not (in_order[1:] == in_order[:-1]).any():
        return 0.0  # most text
    again = np.delete(np.arange(len(hashes)), np.unique(hashes, return_index=True)[1])
    covered = np.zeros(len(text), bool)
    for i in range(n):
        covered[again + i] = True
    return float(covered.mean())


def _mean(measure, text, n):
    windows = [text[i : i + NGRAM_WINDOW] for i in range(0, len(text), NGRAM_WINDOW)]
    return sum(measure(window, n) * len(window) for window in windows) / len(text)


# UTF-8 read as GBK: ，(EF BC 8C) and 。(E3 80 82) with the first byte of what follows become 锛 or 銆 and one of these
# rare characters; U+FFFD twice becomes 锟斤拷. Text about 锛, a tool, or 锟, a name, has other characters behind them.
_RARE = "".join(bytes([a, b]).decode("gbk") for a in range(0x81, 0xA0) for b in range(0xE1, 0xF0))
_MOJIBAKE = re.compile(f"[锛銆][{_RARE}]|锟斤拷")


def _too_many(lost, text, options):
    return lost > max(options.get("max_broken", 1.0) * len(text), FEW)


@functools.lru_cache(maxsize=1)
def _kinds_of_characters():
    """0, 1 for letters and digits, 2 for Chinese characters, by UTF-16 unit; the planes 2 and 3 are Chinese."""
    kinds = np.array([chr(code).isalnum() for code in range(1 << 16)], np.uint8)
    kinds[np.r_[0x3007, 0x3400:0x4DC0, 0x4E00:0xA000, 0xF900:0xFB00, 0xD840:0xD8C0]] = 2
    return kinds


def find_fault(text, options):
    """Why a document is no good Chinese text, or None: the first filter that it fails."""
    units = np.frombuffer(text.encode("utf-16-le", "surrogatepass"), "<u2")
    kinds = _kinds_of_characters()[units]
    _, others, chinese = np.bincount(kinds, minlength=3).tolist()
    if others + chinese < max(options.get("min_characters", 0), 1):
        return "too short"
    if any(sign in text for sign in "锛銆锟") and _too_many(len(_MOJIBAKE.findall(text)), text, options):
        return "broken characters"
    if chinese < options.get("min_chinese", 0) * (others + chinese):
        return "not Chinese enough"
    letters = units[kinds > 0].tobytes().decode("utf-16-le", "surrogatepass")  # dots and rules may repeat
    stanza = min(STANZA, len(letters) // 2)
    lines, phrase, runs = repeated_line_share, top_ngram_share, repeated_ngram_share
    for why, key, share, share_of_song in (
        ("repeated lines", "max_repeated_lines", lambda: lines(text), lambda: lines(text, REFRAIN)),
        ("repeated phrase", "max_top_ngram", lambda: _mean(phrase, letters, 4), lambda: phrase(letters, 4, REFRAIN)),
        ("repeated n-grams", "max_repeated_ngrams", lambda: _mean(runs, letters, 10), lambda: runs(letters, stanza)),
    ):
        most = options.get(key, 1.0)
        if most < 1 and share() > most and (len(letters) >= SONG or share_of_song() > most):
            return why
