"""Hard-wrapped text: the lines that a fixed width cut are joined to paragraphs again."""

import re
import unicodedata

from corpora.fences import CODE

NARROWEST = 40  # columns, two a Chinese character: below it stand verse and couplets, which no width has cut
SLACK = 10  # columns: an indent of four, two signs that hang over or take a character along to the next line
LEAST = 5  # full lines that show a width
# List items, headings, table rows, columns, code: their line breaks are meant.
_NO_PROSE = re.compile(
    r"\s*(?:[|•●]|[-*+#>·]\s|[\d一二三四五六七八九十]+[.、．)）](?!\d)|第\S{1,7}[章回节卷](?:\s|$))"
    rf"|.*(?:\S[|\t]|\S(?:  |\u3000)\s*\S|{CODE})"
)
_END = re.compile(r"[。！？!?…；;：:”’」』）)》—.]\s*$")


def columns(line):
    """Columns that a line takes up in a terminal."""
    return len(line) + sum(unicodedata.east_asian_width(c) in "WFA" for c in line)


def _is_prose(line):
    stripped = line.strip()
    drawing = 2 * sum(map(str.isalnum, stripped)) < len(stripped) - 4
    return bool(stripped) and not drawing and not _NO_PROSE.match(line)


def join_lines(text):
    """The text with its paragraphs in a line each, where one width has cut them; as it is, where none clearly has.

    A third of the lines must be of that width, hardly any longer, and most of these must stop within a sentence. A
    paragraph ends at a shorter line, and before a blank or indented one, a list item, a heading or a row of a table.
    """
    lines = text.split("\n")
    prose = [_is_prose(line) for line in lines]
    widths = [columns(line.rstrip()) for line in lines]
    shown = sorted(width for width, is_prose in zip(widths, prose, strict=True) if is_prose)
    width = shown[len(shown) * 99 // 100] if shown else 0  # a heading may be longer
    full = [is_prose and width - SLACK <= w <= width for w, is_prose in zip(widths, prose, strict=True)]
    within = sum(is_full and not _END.search(line) for is_full, line in zip(full, lines, strict=True))
    if width < NARROWEST or sum(full) < max(LEAST, len(shown) / 3) or within < sum(full) / 2:
        return text
    joined = lines[:1]
    for before, line, is_prose in zip(full, lines[1:], prose[1:], strict=False):
        if before and is_prose and not line[:1].isspace():
            space = " " if (joined[-1].rstrip()[-1:] + line[:1]).isascii() else ""
            joined[-1] = joined[-1].rstrip() + space + line
        else:
            joined.append(line)
    return "\n".join(joined)
