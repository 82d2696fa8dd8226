"""Tables in Markdown."""

import re

# what Markdown takes for markup; an underscore within a word is none
MARKUP = re.compile(r"[\\|<>&`*~$\[\]]|(?<![^\W_])_|_(?![^\W_])")


NONE = re.compile(r"\Anan%?(?: to nan%?)?\Z")  # a figure that is NaN, or its interval


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown that shows the texts as they are: line ends and what would be markup are escaped."""

    def line(cells):
        escaped = [MARKUP.sub(r"\\\g<0>", cell) for cell in cells]
        return "| " + " | ".join(escaped).replace("\r", "\\r").replace("\n", "\\n") + " |"

    return "\n".join([line(header), "|---" * len(header) + "|", *map(line, rows)])


def format_table(columns: dict[str, str], rows: list[dict]) -> str:
    """The table of rows under columns {title: format string over a row's keys}; "-" where a figure is NaN."""
    cells = [[form.format(**row) for form in columns.values()] for row in rows]
    return markdown_table(list(columns), [[NONE.sub("-", cell) for cell in row] for row in cells])
