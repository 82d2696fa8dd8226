"""Hard-wrapped text: the lines that a fixed width cut are joined to paragraphs again."""

import re
import unicodedata
from collections import Counter

from corpora.fences import CODE

NARROWEST = 30  # columns, two a Chinese character: below it stand verse and couplets, which no width has cut
SLACK = 10  # columns: an indent of four, two signs that hang over or take a character along to the next line
LEAST = 5  # full lines that show a width
# Share of the breaks that lie within a phrase. In prose 0.9 to 0.5: less where phrases are short and signs hang over.
WITHIN = 0.45
# List items, headings, table rows, columns, code: their line breaks are meant.
_NO_PROSE = re.compile(
    r"\s*(?:[|•●]|[-*+#>·]\s|[\d一二三四五六七八九十]+[.、．)）](?!\d)|第\S{1,7}[章回节卷](?:\s|$))"
    rf"|.*(?:\S[|\t]|\S(?:  |\u3000)\s*\S|{CODE})"
)
_PHRASE_ENDS = re.compile(r"[^\w“‘「『（(《]\s*$")
_BEGINS_ANEW = re.compile(r"[“‘「『\"—]|[^，。！？]{1,8}[：:]")  # speech, a speaker, a label
_SENTENCE_ENDS = re.compile(r"[。！？!?；;…]”?[^\W\d]|\.\s")


def columns(line):
    """Columns that a line takes up in a terminal."""
    return len(line) + sum(unicodedata.east_asian_width(c) in "WFA" for c in line)


def _is_prose(line):
    stripped = line.strip()
    drawing = 2 * sum(map(str.isalnum, stripped)) < len(stripped) - 4
    return bool(stripped) and not drawing and not _NO_PROSE.match(line)


def _are_cut(lines, breaks):
    """Whether a width has cut these lines: the breaks fall anywhere in the sentences, which go on in the next line."""
    within = sum(not _PHRASE_ENDS.search(lines[i]) and not _BEGINS_ANEW.match(lines[i + 1]) for i in breaks)
    sentences = sum(bool(_SENTENCE_ENDS.search(lines[i])) for i in breaks)
    signs = Counter(tuple(m.start() for m in re.finditer(r"\W", lines[i].strip())) for i in breaks)
    starts = Counter(lines[i + 1][:2] for i in breaks)
    return (
        within >= WITHIN * len(breaks)
        and sentences >= len(breaks) / 6  # verse and directories may have no signs
        and signs.most_common(1)[0][1] <= len(breaks) / 2  # verse and tables have theirs in the same places
        and sum(n for _, n in starts.most_common(2)) <= len(breaks) / 2  # speakers in turn
    )


def join_lines(text):
    """The text with its paragraphs in a line each, where one width has cut them; as it is, where none clearly has.

    A third of the lines must be of that width, hardly any longer, and most of these must stop within a phrase. A
    paragraph ends at a shorter line, and before a blank or indented one, a list item, a heading or a row of a table.
    """
    lines = text.split("\n")
    prose = [_is_prose(line) for line in lines]
    widths = [columns(line.rstrip()) for line in lines]
    shown = sorted(width for width, is_prose in zip(widths, prose, strict=True) if is_prose)
    width = shown[len(shown) * 99 // 100] if shown else 0  # a heading may be longer
    full = [is_prose and width - SLACK <= w <= width for w, is_prose in zip(widths, prose, strict=True)]
    breaks = [i for i in range(len(lines) - 1) if full[i] and prose[i + 1] and not lines[i + 1][:1].isspace()]
    clear = width >= NARROWEST and sum(full) >= max(LEAST, len(shown) / 3) and breaks
    if not clear or not _are_cut(lines, breaks):
        return text
    joins = set(breaks)
    joined = lines[:1]
    for i, line in enumerate(lines[1:]):
        if i in joins:
            space = " " if (joined[-1].rstrip()[-1:] + line[:1]).isascii() else ""
            joined[-1] = joined[-1].rstrip() + space + line
        else:
            joined.append(line)
    return "\n".join(joined)
