"""What the fields of rows say of their layout, for `auto` and for messages that help."""

import re
from collections import Counter

from corpora.fields import Drop, shown, unpacked
from corpora.layouts import (
    ANSWERS,
    INSTRUCTIONS,
    LOOSE,
    MARKED,
    QUESTIONS,
    TEXTS,
    TURNS,
    baike,
    chinese_poetry,
    conversation_in,
    is_texts,
    messages_in,
    present,
    turns_name,
    zhihu,
)
from corpora.marks import begins_marked, marked_turns
from corpora.preferences import CHOSEN, REJECTED
from corpora.rankings import RANKED

SAMPLE = 100  # rows that are looked at
CONTAINERS = ("json", "jsonl", "ndjson", "csv", "tsv", "parquet", "arrow", "xlsx", "gz", "zst")
_ANSWERING = re.compile("(?i)answer|response|output|reply|replies|completion|chosen|reject|[回解]答|答案|回复")
NAMES = {"conversations": "sharegpt", "conversation": "firefly", "chat": "moss"}  # by the field of the turns


def is_answered(row):
    """Whether the turns of a row hold an answer; also where they cannot be read, as that should be told."""
    try:
        found = conversation_in(row, [])
    except Drop:
        return True
    return found is None or any(each["role"] == "assistant" for each in found[0])


def is_question(value):
    """Whether a field holds one question: text or messages, and not a column of them."""
    return isinstance(value, str) or bool(messages_in(value))


def is_several(value):
    """Whether a field holds answers, and not one that is JSON of messages."""
    return isinstance(unpacked(value), list) and not (isinstance(value, str) and messages_in(value))


def fitting(row):
    """The layouts that a row's fields speak for, at most one of conversations, comparisons and prompts."""
    question = present(row, (*INSTRUCTIONS, *QUESTIONS, "input"))
    question = question if question and is_question(row[question]) else None
    heads = {re.split(r"[.\[]", str(name))[0] for name in row if name not in TURNS}
    heads = [name for name in TURNS if name in heads and not (question and name in LOOSE)]
    turns = turns_name(row) or next(iter(heads), None)  # or chat.turn_1.Human
    if turns == "data" and not (is_texts(row.get("data")) or messages_in(row.get("data"))):
        turns = None
    found = set()
    if present(row, REJECTED) and present(row, (*CHOSEN, *ANSWERS, *TURNS)):
        found.add("pairs")
    elif question and any(is_several(row.get(name)) for name in RANKED):
        found.add("ranked")
    elif turns:
        found.add(NAMES.get(turns, "messages") if is_answered(row) else "prompts")
    elif any(isinstance(row.get(name), str) and marked_turns(row[name]) for name in MARKED):
        return {"messages"}
    elif question and present(row, ANSWERS) or present(row, ("instances",)):
        found.add("firefly" if present(row, ("target",)) else "alpaca")
    elif question and not any(_ANSWERING.search(str(name)) for name in row):
        found.add("prompts")
    texts = [name for name in TEXTS if isinstance(row.get(name), str) and not (found and name == "completion")]
    if any(begins_marked(row[name]) for name in texts):
        return found
    if texts:
        found.add("webnovel" if present(row, ("chapter",)) else "text_rows")
    if found or question:
        return found
    others = dict(chinese_poetry=("paragraphs", "para", "content"), baike=("sections",), zhihu=("RESPONSE",))
    adapters = dict(chinese_poetry=chinese_poetry, baike=baike, zhihu=zhihu)
    return {name for name, fields in others.items() if present(row, fields) and adapters[name](row)[0][0]}


def fields_of(rows):
    """The fields of some rows, for people."""
    names = list(dict.fromkeys(shown(name) for row in rows for name in row))
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "no fields"


def likeliest(rows):
    """The layout of most rows; None where they speak for none or a row for several."""
    found = [fitting(row) for row in rows]
    counts = Counter(name for names in found for name in names)
    if not counts or any(len(names) > 1 for names in found):
        return None
    name, n = counts.most_common(1)[0]
    return name if n > len(rows) / 2 else None
