"""The corpora of Chinese models: a table of layouts, SOURCES, whose adapters turn rows into records.

A source is given as NAME, NAME=PATH or LABEL:LAYOUT=PATH. `list_units` cuts it into pieces that worker processes read
on their own; `read_records` turns a piece into records, and says of every row that gives none why. Records are

    pretrain  {"text": str}
    sft       {"messages": [{"role", "content"}, ...]}, maybe a system text, then user and assistant in turn
    rm        {"messages": [..., user], "chosen": str, "rejected": str}

How the files themselves are read is in files.py.
"""

import difflib
import functools
import itertools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from corpora import files, hub
from corpora.files import Unit
from dataset.formats import DataError

__all__ = ["SOURCES", "Source", "Unit", "list_sources", "list_units", "parse_sources", "read_records"]

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

# The prompt of Stanford Alpaca, which some corpora left around their instructions and answers.
_OPENING = re.compile(r"(?:Below is an instruction[^\n]*\n\s*)?###\s?Instruction[:：]\s*")
_INPUT = re.compile(r"###\s?Input[:：]")
_RESPONSE = re.compile(r"###\s?Response[:：]\s*")
_CLOSING = re.compile(r"###\s?(?:Response|Instruction)[:：]\Z")


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


# rows -> records


class Drop(Exception):
    """Why a row gives no record; a fixed text, as reasons are counted."""


def adapter(function):
    """Let a function from a row to [(record, remark)] raise Drop."""

    @functools.wraps(function)
    def adapt(row):
        try:
            return function(row)
        except Drop as reason:
            return [(None, str(reason))]

    return adapt


def required(row, *names):
    """The first of these fields that holds text, blank or not."""
    for name in names:
        if isinstance(row.get(name), str):
            return row[name]
    raise Drop(f"no {names[0]}")


def optional(row, name):
    """A field's text, "" where it is missing, null or NaN; anything else is an error, lest it be lost."""
    value = row.get(name)
    if value is None or value != value:
        return ""
    return required(row, name)


def document(text, title=""):
    """A pretraining record: the title on a line of its own, unless the text begins with it."""
    if not text.strip():
        raise Drop("empty text")
    title = title.strip()
    return [({"text": text if text.lstrip().startswith(title) else f"{title}\n{text}"}, None)]


@adapter
def text_rows(row):
    return document(required(row, "text", "content", "completion", "body"), optional(row, "title"))


@adapter
def baike(row):
    parts = [optional(row, "summary")]
    sections = row.get("sections") or []
    if not isinstance(sections, list) or not all(isinstance(section, dict) for section in sections):
        raise Drop("no sections")
    for section in sections:
        parts += [optional(section, "title"), optional(section, "content")]
    return document("\n".join(part for part in parts if part.strip()), optional(row, "title"))


@adapter
def zhihu(row):
    return document(required(row, "RESPONSE"), optional(row, "INSTRUCTION"))


@adapter
def webnovel(row):
    [(chapter, _)] = document(required(row, "text"), optional(row, "chapter"))
    return document(chapter["text"], optional(row, "title"))


@adapter
def chinese_poetry(row):
    lines = row.get("paragraphs") or row.get("content")  # some of its collections say content
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise Drop("no paragraphs")
    title = optional(row, "title") or optional(row, "rhythmic") or optional(row, "chapter")
    if not "".join(lines).strip():
        raise Drop("empty text")
    heading = [part for part in (title, optional(row, "author")) if part.strip()]
    return document("\n".join(heading + lines))


def strip_template(text, answer=False):
    """(text without the Alpaca prompt around it, [remark if there was one])."""
    if "###" not in text:
        return text, []
    bare = text.strip()
    if answer:
        if (opening := _OPENING.match(bare)) and (response := _RESPONSE.search(bare, opening.end())):
            bare = bare[response.start() :]
        while response := _RESPONSE.match(bare):
            bare = bare[response.end() :]
    elif _OPENING.match(bare):
        while opening := _OPENING.match(bare):
            bare = bare[opening.end() :]
        bare = "\n".join(part.strip() for part in _INPUT.split(bare))
    while closing := _CLOSING.search(bare):
        bare = bare[: closing.start()].rstrip()
    if bare == text.strip():
        return text, []
    return bare, ["doubled response marker removed" if answer else "prompt template removed"]


def read_turns(messages, name):
    """[(role, text)] of messages {role, content}, {from, value} or {role, text}."""
    if not isinstance(messages, list) or not messages:
        raise Drop(f"no {name}")
    turns = []
    for message in messages:
        if not isinstance(message, dict):
            raise Drop("turn not an object")
        role = ROLES.get(str(message.get("role") or message.get("from")).lower())
        if role is None:
            raise Drop("unknown role")
        text = next((message[key] for key in ("content", "value", "text") if message.get(key) is not None), "")
        if not isinstance(text, str):
            raise Drop("turn without text")
        turns.append((role, text))
    return turns


def split_system(turns, row):
    """([system turn] or [], the other turns), checked to be user and assistant in turn."""
    system = [("system", optional(row, "system"))]
    if turns and turns[0][0] == "system":
        system, turns = turns[:1], turns[1:]
    if any(role != ("user", "assistant")[i % 2] for i, (role, _) in enumerate(turns)):
        raise Drop("roles out of order")
    return [turn for turn in system if turn[1].strip()], turns


def as_messages(turns):
    return [{"role": role, "content": text} for role, text in turns]


def conversation(turns, row, remarks=()):
    """An sft record of the complete pairs before the first empty turn."""
    system, turns = split_system(turns, row)
    pairs, remarks = len(turns) // 2, list(remarks)
    empty = next((i for i, (_, text) in enumerate(turns) if not text.strip()), None)
    if empty is not None:
        pairs = empty // 2
        remarks.append("cut at an empty turn")
    elif len(turns) % 2:
        remarks.append("last human turn dropped")
    if not pairs:
        raise Drop("no question" if empty == 0 else "no answer")
    return [({"messages": as_messages(system + turns[: 2 * pairs])}, "; ".join(remarks) or None)]


def question_turns(row):
    """([(role, text)] of the history and the question, remarks) of an Alpaca row."""
    turns, history = [], row.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise Drop("history not pairs")
        turns += zip(("user", "assistant"), pair, strict=True)
    parts = [required(row, "instruction", "prompt"), optional(row, "input")]
    question, remarks = strip_template("\n".join(part for part in parts if part.strip()))
    return [*turns, ("user", question)], remarks


@adapter
def alpaca(row):
    turns, remarks = question_turns(row)
    answer, more = strip_template(required(row, "output", "response"), answer=True)
    return conversation([*turns, ("assistant", answer)], row, remarks + more)


@adapter
def firefly(row):
    return conversation([("user", required(row, "input")), ("assistant", required(row, "target"))], row)


@adapter
def messages(row):
    name = "messages" if row.get("messages") is not None else "conversations"
    return conversation(read_turns(row.get(name), name), row)


def preference(turns, chosen, rejected, row, remarks=()):
    """An rm record, of a prompt that ends with the user's question."""
    system, turns = split_system(turns, row)
    if len(turns) % 2 == 0 or not all(text.strip() for _, text in turns):
        raise Drop("no question")
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise Drop(f"no {name}")
    if chosen.strip() == rejected.strip():
        raise Drop("chosen equals rejected")
    record = {"messages": as_messages(system + turns), "chosen": chosen, "rejected": rejected}
    return [(record, "; ".join(remarks) or None)]


def read_side(row, name):
    """(turns before the answer, the answer) of a string, a message, or messages of which the last is the answer."""
    value = row.get(name)
    if isinstance(value, str):
        return [], value
    *before, (role, text) = read_turns([value] if isinstance(value, dict) else value, name)
    if role != "assistant":
        raise Drop("roles out of order")
    return before, text


@adapter
def pairs(row):
    (before, chosen), (before_rejected, rejected) = read_side(row, "chosen"), read_side(row, "rejected")
    if before != before_rejected:
        raise Drop("chosen and rejected have different prompts")
    if before and before[0][0] != "assistant":  # the prompt itself, also where the row repeats it
        return preference(before, chosen, rejected, row)
    names = ("conversations", "messages", "context", "prompt")
    name = next((name for name in names if isinstance(row.get(name), list)), None)
    turns, remarks = (read_turns(row[name], name), []) if name else question_turns(row)
    return preference(turns + before, chosen, rejected, row, remarks)


def cvalues(row):
    return pairs({"prompt": row.get("prompt"), "chosen": row.get("pos_resp"), "rejected": row.get("neg_resp")})


@adapter
def ranked(row):
    """Every pair of a better with a worse answer; of equal answers the best placed stands for all."""
    turns, remarks = question_turns(row)
    if not isinstance(row.get("output"), list):
        raise Drop("no output")
    answers, results = [], []
    for answer in row["output"]:
        if not isinstance(answer, str) or not answer.strip():
            results.append((None, "no answer"))
            continue
        answer, more = strip_template(answer, answer=True)
        if answer.strip() in (text.strip() for text, _ in answers):
            results.append((None, "answer given twice"))
        else:
            answers.append((answer, more))
    for (better, a), (worse, b) in itertools.combinations(answers, 2):
        results += preference(turns, better, worse, row, dict.fromkeys(remarks + a + b))
    return results if len(answers) > 1 else [*results, (None, "fewer than two answers")]


# the table

_BARE = "as stated by whoever gives the file"
_UNKNOWN = "not stated"  # none could be confirmed when this was written; the dataset's card may have one by now
_ALPACA, _PAIR = "instruction, input, output", "chosen, rejected"
_WIKIPEDIA, _TIGER = "pleisto/wikipedia-cn-20230720-filtered", "TigerResearch/pretrain_zh"
_SINGLE_ROUND = "beyond/rlhf-reward-single-round-trans_chinese"

SOURCES = {
    "wikipedia": Source("pretrain", text_rows, "completion, source", "CC BY-SA (Wikipedia)", _WIKIPEDIA, "*.json"),
    "baike": Source("pretrain", baike, "title, summary, sections", _UNKNOWN, "xuqinyang/BaiduBaike-5.63M", "*.json"),
    "zhihu": Source("pretrain", zhihu, "INSTRUCTION, RESPONSE", _UNKNOWN, "wangrui6/Zhihu-KOL", "data/*.parquet"),
    "pretrain_zh": Source("pretrain", text_rows, "title, content", _UNKNOWN, _TIGER, "data/*.parquet"),
    "webnovel": Source("pretrain", webnovel, "title, chapter, text", _UNKNOWN, "wdndev/webnovel-chinese", "data/*"),
    "txt": Source("pretrain", text_rows, "a file is a document", _BARE),
    "lines": Source("pretrain", text_rows, "a line is a document", _BARE),
    "text_rows": Source("pretrain", text_rows, "text | content | completion | body, title", _BARE),
    "chinese_poetry": Source("pretrain", chinese_poetry, "title | rhythmic, author, paragraphs", _BARE),
    "belle": Source("sft", alpaca, _ALPACA, "research use only (its README)", "BelleGroup/train_2M_CN"),
    "firefly": Source("sft", firefly, "kind, input, target", _UNKNOWN, "YeungNLP/firefly-train-1.1M"),
    "sft_zh": Source("sft", alpaca, _ALPACA, _UNKNOWN, "TigerResearch/sft_zh"),
    "alpaca": Source("sft", alpaca, "instruction | prompt, input, output | response, history, system", _BARE),
    "sharegpt": Source("sft", messages, "conversations [{from, value}], system", _BARE),
    "messages": Source("sft", messages, "messages | conversations [{role, content}], system", _BARE),
    "cvalues": Source("rm", cvalues, "prompt, pos_resp, neg_resp", _UNKNOWN),
    "rlhf_zh": Source("rm", pairs, f"prompt, {_PAIR}", _UNKNOWN, _SINGLE_ROUND),
    "zhihu_rlhf": Source("rm", pairs, f"prompt, {_PAIR}", _UNKNOWN, "liyucheng/zhihu_rlhf_3k"),
    "hh_rlhf_cn": Source("rm", pairs, f"context, {_PAIR} {{role, text}}", _UNKNOWN, "dikw/hh_rlhf_cn"),
    "pairs": Source("rm", pairs, f"prompt | instruction, input, history | conversations | messages, {_PAIR}", _BARE),
    "dpo_sharegpt": Source("rm", pairs, f"conversations, {_PAIR} {{from, value}}", _BARE),
    "ranked": Source("rm", ranked, "instruction, input, history, output = answers, the best first", _BARE),
}


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
    """(label, layout, path or None) of NAME, NAME=PATH or LABEL:LAYOUT=PATH."""
    name, equals, path = text.partition("=")
    label, colon, layout = name.partition(":")
    layout = layout if colon else label
    if layout not in sources:
        near = difflib.get_close_matches(layout, sources, 1, 0)
        raise DataError(f"source {text}: unknown layout {layout}; did you mean {near[0]}?")
    if not re.fullmatch(r"[\w.-]+", label):
        raise DataError(f"source {text}: a label is made of letters, digits, _ . and -")
    source = sources[layout]
    if not path and (equals or not (source.hub or source.generate or layout in hub.MODELSCOPE)):
        raise DataError(f"source {text}: a path is needed, as in {name}=PATH")
    return label, layout, path or None


def parse_sources(texts, sources=SOURCES):
    """parse_source of each, under distinct labels."""
    parsed = [parse_source(text, sources) for text in texts]
    labels = [label for label, _, _ in parsed]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise DataError(f"sources: {twice} is named twice; write LABEL:LAYOUT=PATH to tell them apart")
    return parsed


def list_units(label, layout, path, unit_bytes=64 << 20, default_hub="huggingface"):
    """The units of what path names, always in one order.

    It is a file, a folder, hf:OWNER/NAME or ms:OWNER/NAME, or None for the layout's own dataset on the default hub.
    """
    source = SOURCES[layout]
    if path is None:
        path = hub.path_of(layout, source.hub, default_hub)
    place, name = hub.on_hub(path)
    if place == "huggingface":
        return hub.hub_units(label, layout, name, source.files)
    return files.file_units(label, layout, hub.download(name) if place else path, source.files, unit_bytes)


def read_records(unit):
    """(place, record or None, remark or the reason for None); at least one of everything in the unit."""
    source = SOURCES[unit.layout]
    rows = hub.read_hub(unit, source.files) if unit.kind == "hub" else files.read_rows(unit)
    for place, row, remark in rows:
        if row is None and remark:
            yield place, None, remark
        elif not isinstance(row, dict):
            yield place, None, "not an object"
        else:
            for record, note in source.adapter(row):
                yield place, record, note or remark
