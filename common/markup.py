"""HTML that is escaped by construction: text is escaped where it enters an element; only what `tag` made is not.

Reports in Markdown, as this project writes them, become such HTML too.
"""

import base64
import html
import re
from pathlib import Path

from dataset.formats import CONTROLS, writable

PNG = b"\x89PNG\r\n\x1a\n"
VOID = ("meta", "img")  # elements without an end tag
LARGEST_PICTURE = 1 << 24  # bytes
IMAGE = re.compile(r"!\[(.*)\]\(([\w.-]+)\)")
COMMENT = re.compile(r"<!--.*-->")


class Html(str):
    """Text that is markup already."""


def text(value) -> Html:
    """Any value as text of a page; what steers a terminal or turns the writing becomes backslashes."""
    shown = CONTROLS.sub(
        lambda found: found[0] if found[0] in "\t\n" else found[0].encode("unicode_escape").decode(),
        writable(str(value).replace("\r\n", "\n")),
    )
    return Html(html.escape(shown))


def tag(name: str, /, *inside, **attributes) -> Html:
    """<name ...>inside</name>; `class_` is class, a `_` within an attribute is a hyphen, None inside is nothing."""
    said = "".join(f' {key.strip("_").replace("_", "-")}="{text(value)}"' for key, value in attributes.items())
    if name in VOID:
        return Html(f"<{name}{said}>")
    return Html(f"<{name}{said}>{join(inside)}</{name}>")


def join(parts) -> Html:
    return Html("".join(part if isinstance(part, Html) else text(part) for part in parts if part is not None))


def table(header: list, rows: list[list]) -> Html:
    """A table that scrolls by itself where it is too wide."""
    head = tag("tr", *(tag("th", cell) for cell in header))
    body = (tag("tr", *(tag("td", cell) for cell in row)) for row in rows)
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="wide")


def picture(path: Path, label: str) -> Html:
    """A PNG within the page, or why there is none."""
    try:
        data = path.read_bytes() if path.stat().st_size <= LARGEST_PICTURE else b""
    except OSError as error:
        return problem(f"{path.name}：{error.strerror}")
    if not data.startswith(PNG):
        return problem(f"{path.name}：不是 PNG 图，或大于 {LARGEST_PICTURE >> 20} MB")
    source = "data:image/png;base64," + base64.b64encode(data).decode()
    return tag("figure", tag("img", src=source, alt=label), tag("figcaption", label))


def problem(said: str) -> Html:
    return tag("p", said, class_="problem")


def from_markdown(source: str, folder: Path, level: int = 3) -> Html:
    """Headings, tables, lists, pictures of `folder` and paragraphs, which is what the reports of this project have.

    Its largest heading becomes <h{level}>. Anything else, HTML too, stays the text that it is.
    """
    blocks, lines = [], source.replace("\r\n", "\n").split("\n")
    while lines:
        line = lines.pop(0)
        if not line.strip() or COMMENT.fullmatch(line):
            continue
        if match := re.match(r"(#{1,6}) +(.*)", line):
            blocks.append(tag(f"h{min(6, level - 1 + len(match[1]))}", plain(match[2])))
        elif line.startswith("|"):
            rows = [cells(line)]
            while lines and lines[0].startswith("|"):
                rows.append(cells(lines.pop(0)))
            blocks.append(table(rows[0], [row for row in rows[1:] if not all(re.fullmatch(":?-+:?", c) for c in row)]))
        elif match := IMAGE.fullmatch(line.strip()):
            blocks.append(picture(folder / match[2], plain(match[1])))
        else:
            pattern = r"- " if line.startswith("- ") else rf"(?!\||#|- |{COMMENT.pattern}$)."
            group = [line]
            while lines and re.match(pattern, lines[0]):
                group.append(lines.pop(0))
            if line.startswith("- "):
                blocks.append(tag("ul", *(tag("li", plain(each[2:])) for each in group)))
            else:
                blocks.append(tag("p", plain(" ".join(group))))
    return join(blocks)


def cells(line: str) -> list[str]:
    """The texts of a row of a table, in which \\| is no border."""
    found = re.findall(r"\|((?:\\.|[^\\|])*)", line)
    return [plain(cell.strip()) for cell in (found if found[-1].strip() else found[:-1])]


def plain(source: str) -> str:
    """The text that Markdown's backslashes stand before; line ends that a table wrote as \\n are such again."""
    return re.sub(r"\\(.)", lambda found: "\n" if found[1] == "n" else found[1] if found[1] != "r" else "", source)
