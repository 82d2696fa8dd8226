"""The corpora of Chinese models: a table of layouts, SOURCES, whose adapters turn rows into records.

A source is given as NAME, NAME=PATH, LABEL:LAYOUT=PATH or, where the rows are to say their layout, LABEL:auto=PATH.
`list_units` cuts it into pieces that worker processes read on their own; `read_records` turns a piece into records, and
says of every row that gives none why. Records are

    pretrain  {"text": str}
    sft       {"messages": [{"role", "content"}, ...]}, maybe a system text, then user and assistant in turn; an answer
              with "train": False is not to be learnt
    rm        {"messages": [..., user], "chosen": str, "rejected": str}
    prompts   {"messages": [..., user], "fields": {...}}, the other fields of the row, as JSON can hold them

What a row becomes is in layouts.py and preferences.py, how the files themselves are found in files.py and read in
rows.py.
"""

import contextlib
import difflib
import functools
import io
import itertools
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from corpora import files, hints, hub, rows
from corpora import layouts as of
from corpora.encodings import escaped
from corpora.files import Unit
from corpora.kinds import ROW_SUFFIXES, Unread, is_conversation, suffix_of
from corpora.preferences import pairs, ranked_texts
from corpora.rankings import ranked
from dataset.formats import DataError

__all__ = ["SOURCES", "Source", "Unit", "list_sources", "list_units", "parse_sources", "read_records"]


@dataclass(frozen=True)
class Source:
    """A layout: its adapter turns one row into [(record or None, remark or reason)]."""

    stage: str  # "pretrain", "sft", "rm" or "prompts"
    adapter: Callable[[dict], Iterable[tuple[dict | None, str | None]]]
    fields: str  # what a row holds
    licence: str  # of the data, as stated by the source
    hub: str | None = None  # Hugging Face dataset id
    files: str = ""  # globs, separated by blanks, of its files in the hub repository or a copy of it; "" = all
    generate: Callable | None = None  # for sources that are made, not read
    read_as: str | None = None  # the layout whose files these are read like


# the table

_BARE = "as stated by whoever gives the file"
_UNKNOWN = "not stated"  # none could be confirmed when this was written; the dataset's card may have one by now
_ALPACA, _PAIR = "instruction, input, output", "chosen, rejected"
_WIKIPEDIA, _TIGER = "pleisto/wikipedia-cn-20230720-filtered", "TigerResearch/pretrain_zh"
_SINGLE_ROUND = "beyond/rlhf-reward-single-round-trans_chinese"

SOURCES = {
    "wikipedia": Source("pretrain", of.text_rows, "completion, source", "CC BY-SA (Wikipedia)", _WIKIPEDIA, "*.json"),
    "baike": Source("pretrain", of.baike, "title, summary, sections", _UNKNOWN, "xuqinyang/BaiduBaike-5.63M", "*.json"),
    "zhihu": Source("pretrain", of.zhihu, "INSTRUCTION, RESPONSE", _UNKNOWN, "wangrui6/Zhihu-KOL", "data/*.parquet"),
    "pretrain_zh": Source("pretrain", of.text_rows, "title, content", _UNKNOWN, _TIGER, "data/*.parquet"),
    "webnovel": Source("pretrain", of.webnovel, "title, chapter, text", _UNKNOWN, "wdndev/webnovel-chinese", "data/*"),
    "txt": Source("pretrain", of.text_rows, "a file is a document, a long one several", _BARE),
    "lines": Source("pretrain", of.text_rows, "a line is a document", _BARE),
    "text_rows": Source("pretrain", of.text_rows, "text | content | completion | body, title", _BARE),
    "chinese_poetry": Source("pretrain", of.chinese_poetry, "title | rhythmic, author, paragraphs | content", _BARE),
    "belle": Source("sft", of.alpaca, _ALPACA, "research use only (its README)", "BelleGroup/train_2M_CN"),
    "firefly": Source("sft", of.firefly, "kind, input, target", _UNKNOWN, "YeungNLP/firefly-train-1.1M"),
    "sft_zh": Source("sft", of.alpaca, _ALPACA, _UNKNOWN, "TigerResearch/sft_zh"),
    "alpaca": Source("sft", of.alpaca, "instruction | prompt | query ..., input, output | answer ..., history", _BARE),
    "sharegpt": Source("sft", of.messages, "conversations [{from, value}], system", _BARE),
    "messages": Source("sft", of.messages, "messages | conversation ... [{role, content}], system", _BARE),
    "moss": Source("sft", of.messages, "chat {turn_1: {Human, MOSS}}", _BARE),
    "cvalues": Source("rm", pairs, "prompt, pos_resp, neg_resp", _UNKNOWN),
    "rlhf_zh": Source("rm", pairs, f"prompt, {_PAIR}", _UNKNOWN, _SINGLE_ROUND),
    "zhihu_rlhf": Source("rm", pairs, f"prompt, {_PAIR}", _UNKNOWN, "liyucheng/zhihu_rlhf_3k"),
    "hh_rlhf_cn": Source("rm", pairs, f"context, {_PAIR} {{role, text}}", _UNKNOWN, "dikw/hh_rlhf_cn"),
    "pairs": Source("rm", pairs, f"prompt | instruction, input, history | conversations | messages, {_PAIR}", _BARE),
    "dpo_sharegpt": Source("rm", pairs, f"conversations, {_PAIR} {{from, value}}", _BARE),
    "ranked": Source("rm", ranked, "instruction, input, history, output = answers, the best first", _BARE),
    "ranked_texts": Source("rm", ranked_texts, "texts between tabs, the best first", _BARE, read_as="lines"),
    "prompts": Source("prompts", of.prompts, "prompt | question | messages, others for reward functions", _BARE),
}

BARE = dict(pretrain="text", prompts="prompt")  # the field that a row stands for which is only a text


def list_sources(sources=SOURCES):
    """The table of sources for people."""
    rows = [("name", "stage", "Hugging Face", "ModelScope", "licence", "fields")]
    for name, source in sources.items():
        ids = source.hub or "-", hub.MODELSCOPE.get(name, "-")
        rows.append((name, source.stage, *ids, source.licence, source.fields))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


# what is asked for -> units -> records


def parse_source(text, sources=SOURCES):
    """(label, layout, path or None) of NAME, NAME=PATH or LABEL:LAYOUT=PATH; layout "auto" is yet to be found."""
    name, equals, path = text.partition("=")
    label, colon, layout = name.partition(":")
    layout = layout if colon else label
    if layout not in sources and layout != "auto":
        raise DataError(f"source {escaped(text)}: {unknown_layout(text, layout, sources)}")
    if not re.fullmatch(r"[\w.-]+", label):
        raise DataError(f"source {escaped(text)}: a label is made of letters, digits, _ . and -")
    source = sources.get(layout)
    if not path and (equals or source is None or not (source.hub or source.generate or layout in hub.MODELSCOPE)):
        raise DataError(f"source {escaped(text)}: a path is needed, as in {name}=PATH")
    return label, layout, path or None


def unknown_layout(text, layout, sources):
    """What to write instead of a layout that there is none of."""
    if "=" not in text and Path(text).expanduser().exists():
        return f"a path needs a name and a layout, as in NAME:auto={escaped(text)}"
    if layout.lower() in hints.CONTAINERS:
        return (
            f"unknown layout {escaped(layout)}; any layout is read from {layout} files, it says what a row holds: "
            "text_rows for documents, --list_sources for all, or auto to have it found"
        )
    near = difflib.get_close_matches(layout, [*sources, "auto"], 1, 0.5)
    said = f"did you mean {near[0]}?" if near else "--list_sources shows all, and auto has it found"
    return f"unknown layout {escaped(layout)}; {said}"


def parse_sources(texts, sources=SOURCES):
    """parse_source of each, under distinct labels and with the layout that was found for `auto`."""
    parsed = []
    for before, text in itertools.pairwise(["", *texts]):
        try:
            parsed.append(parse_source(text, sources))
        except DataError as error:
            if "=" in text or "=" not in before:
                raise
            hint = f"a path with a comma needs the form of a list, --sources={[f'{before},{text}']}"
            raise DataError(f"{error}; {hint}") from None
    labels = [label.casefold() for label, _, _ in parsed]  # as the disks of Windows and macOS name files
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise DataError(f"sources: {twice} is named twice; write LABEL:LAYOUT=PATH to tell them apart")
    return [(label, settled_layout(label, layout, path), path) for label, layout, path in parsed]


@functools.cache  # asked for once a part
def settled_layout(label, layout, path):
    """The layout itself, or what `auto` is by the first rows; `ranked` text without a question is ranked_texts."""
    if layout == "ranked" and path and path.lower().endswith((".tsv", ".txt")):
        try:
            first = "".join(row["text"] for row in objects(quiet_units("ranked_texts", path))[:1]).strip()
        except Unread:
            return layout
        if first[:1] in ("", "{", "[") or {*first.split("\t")} & {*of.INSTRUCTIONS, *of.QUESTIONS, *of.INPUTS}:
            return layout
        found = "ranked_texts"
    elif layout == "auto":
        units = units_of_rows(path)
        found = "txt" if units is None else layout_of(path, units)
    else:
        return layout
    print(f"{label}: layout {found}", file=sys.stderr)
    return found


def layout_of(path, units):
    """The layout that fits the first rows of some units."""
    first, path = first_rows(units), escaped(path)
    if not first:
        raise DataError(f"{path}: no rows in it that can be read")
    if all(isinstance(row, str) for row in first):
        return "text_rows"
    if all(is_conversation(row) for row in first):
        return "messages"
    rows = [row for row in first if isinstance(row, dict)]
    if found := rows and hints.likeliest(rows):
        return found
    names = ", ".join(name for name, source in SOURCES.items() if source.licence == _BARE)
    held = hints.fields_of(rows) if rows else "no fields"
    raise DataError(f"{path}: no one layout fits rows of {held}{ask_header(units)}; name one of {names}")


def quiet_units(layout, path):
    """The units of a path; what is worth saying of its files is said when they are read."""
    with contextlib.redirect_stderr(io.StringIO()):
        return list_units("", layout, path, 1 << 62)


def units_of_rows(path):
    """The units of a path as rows; None if in their stead it is plain text."""
    try:
        return quiet_units("text_rows", path)
    except Unread:
        with contextlib.suppress(Unread):
            if suffix_of(path) not in ROW_SUFFIXES and quiet_units("txt", path):
                return None
    return list_units("", "text_rows", path)  # the error again, after what is to be said of the files


def ask_header(units):
    """A question, if it may be that the first row was taken for the names of columns."""
    csv = next((part.path for unit in units for part in unit.parts or (unit,) if part.kind == "csv"), None)
    return f" (is the first line of {escaped(csv)} a header?)" if csv else ""


def first_rows(units):
    """Some rows, of the first that can be read; what is wrong with others is said when all are read."""
    found = itertools.islice((row for unit in units for _, row, _ in rows_of(unit)), 100 * hints.SAMPLE)
    with contextlib.redirect_stderr(io.StringIO()):
        return list(itertools.islice((row for row in found if row is not None), hints.SAMPLE))


def objects(units):
    """The objects among the first rows of some units."""
    return [row for row in first_rows(units) if isinstance(row, dict)]


def explain(units):
    """What the first rows of a source that gave no record hold, and which layout reads them; None if no objects."""
    if not any(True for unit in units for _ in rows_of(unit)):
        return f"{units[0].source}: no rows in {escaped(units[0].path)}"
    if all(map(is_conversation, first := first_rows(units))) and first:
        return f"{units[0].source}: these rows are lists of messages: layout messages"
    if not (first := [row for row in first if isinstance(row, dict)]):
        return None
    found = hints.likeliest(first)
    other = found and SOURCES[found].adapter is not SOURCES[units[0].layout].adapter
    better = f": layout {found}" if other else "" if found else ask_header(units)
    return f"{units[0].source}: these rows hold {hints.fields_of(first)}{better}"


def list_units(label, layout, path, unit_bytes=64 << 20, default_hub="huggingface", characters=0):
    """The units of what path names, always in one order.

    It is a file, a folder, a pattern of them, hf:OWNER/NAME or ms:OWNER/NAME, or None for the layout's own dataset on
    the default hub. Of layout txt, a file longer than `characters` becomes several documents of about that many, if
    that is not 0.
    """
    source = SOURCES[layout]
    if path is None:
        path = hub.path_of(layout, source.hub, default_hub)
    place, name = hub.on_hub(path)
    if place == "huggingface":
        return hub.hub_units(label, layout, name, source.files)
    path = hub.download(name) if place else path
    units = files.file_units(label, source.read_as or layout, path, source.files, unit_bytes, characters)
    return [replace(unit, layout=layout) for unit in units]


def rows_of(unit):
    """(place, row or None, remark or the reason for None) of everything in the unit."""
    source = SOURCES[unit.layout]
    if unit.kind == "hub":
        return hub.read_hub(unit, source.files)
    return rows.read_rows(replace(unit, layout=source.read_as or unit.layout))


def read_records(unit):
    """(place, record or None, remark or the reason for None); at least one of everything in the unit."""
    source = SOURCES[unit.layout]
    for place, row, remark in rows_of(unit):
        if isinstance(row, str) and source.stage in BARE:  # an array of texts, or one a line
            row = {BARE[source.stage]: row}
        elif isinstance(row, list) and source.stage in ("sft", "prompts") and of.messages_in(row):
            row = {"messages": row}
        if row is None and remark:
            yield place, None, remark
        elif not isinstance(row, dict):
            yield place, None, "not an object"
        else:
            for record, note in source.adapter(row):
                yield place, record, note if record is None else "; ".join(filter(None, (note, remark))) or None
