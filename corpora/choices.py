"""The choices of a question, as lines below it: columns A, B, ... or one field that holds all of them."""

import re
import string

from corpora.clean import is_blank
from corpora.fields import Drop, as_text, kind, missing, nothing, unpacked

CHOICES = "options option choices 选项 Options Option Choices".split()
LABELS, TEXTS = (
    ("label", "key", "id", "letter", "标号"),
    ("text", "content", "value", "option", "choice", "选项", "内容"),
)

_COLUMN = re.compile(r"([A-H])|(?:[Oo]ption|[Cc]hoice|选项)[ _-]?([A-Ha-h])")
_LABEL = re.compile(r"\W*(?:(?:option|choice|选项)[ _-]?)?([A-Za-z]|\d{1,2})\W*", re.IGNORECASE)
_LABELLED = re.compile(r"\s*[(（【]?([A-Za-z]|\d{1,2})[)）】.．、:：]")


def choices(row, question, answered, notes):
    """(lines of choices that the question does not hold itself, the fields that they stand in)."""
    named = {}
    for name, value in row.items() if answered else ():
        if (match := _COLUMN.fullmatch(str(name))) and not missing(value) and value != "":
            named.setdefault((match[1] or match[2]).upper(), name)
    if {"A", "B"} <= named.keys():
        found, used = labelled({label: row[named[label]] for label in sorted(named)}, "A", notes), {*named.values()}
    elif name := next((name for name in CHOICES if name in row and not nothing(row[name])), None):
        value, used = unpacked(row[name]), {name}
        if isinstance(value, str):
            return [] if value.strip() in question else [value.strip()], used
        if isinstance(value, list) and any(isinstance(item, dict) and "finish_reason" in item for item in value):
            return [], set()  # replies, as OpenAI's API gives them
        found = labelled(value, name, notes)
    else:
        return [], set()
    if all(stands_in(question, label, text) for label, text in found):
        return [], used
    if all((match := _LABELLED.match(text)) and match[1].upper() == label.upper() for label, text in found):
        return [text for _, text in found], used
    return [f"{label}. {text}" for label, text in found], used


def is_index(answer, lines):
    """Whether an answer is a number that counts the choices, and neither labels nor ends one of them."""
    digits = (answer or "").strip()
    if not re.fullmatch(r"[0-9]{1,2}", digits) or int(digits) > len(lines):
        return False
    return not any(digits in re.findall(r"\w+", line) for line in lines)


def stands_in(question, label, text):
    """Whether a choice is in the question, A. text or A甲; the 1 of A1 is no choice A."""
    between, after = r"\W{1,3}" if text[:1].isascii() else r"\W{0,3}", r"(?![A-Za-z\d])" if text[-1:].isascii() else ""
    return re.search(rf"(?<![A-Za-z\d]){label}{between}{re.escape(text)}{after}", question)


def labelled(value, name, notes):
    """[(label, text), ...] of choices: {"A": text}, [text], [{label, text}], [{"A": text}] or {label: [], text: []}."""
    if isinstance(value, dict) and all(isinstance(column, (list, tuple)) for column in value.values()):
        if len({*map(len, value.values())}) > 1:
            raise Drop(f"{name} cannot be read")
        value = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    if not isinstance(value, (dict, list, tuple)):
        raise Drop(f"{name} is {kind(value)}")
    found = []
    for i, item in enumerate(value.items() if isinstance(value, dict) else value):
        label, text = item if isinstance(value, dict) else one_choice(item, string.ascii_uppercase[i : i + 1])
        label, text = _LABEL.fullmatch(str(label)), "" if missing(text) else as_text(text, notes)
        if label is None or text is None:
            raise Drop(f"{name} cannot be read")
        found += [] if is_blank(text) else [(label[1], text.strip())]
    if len({label for label, _ in found}) < len(found):
        raise Drop(f"{name} cannot be read")
    return found


def one_choice(item, letter):
    """(label, text) of one of a list of choices; the letter of its place where it has no label."""
    if isinstance(item, (list, tuple)) and len(item) == 2:
        return item
    if not isinstance(item, dict):
        return letter, item
    if len(item) == 1 and _LABEL.fullmatch(str(name := next(iter(item)))):
        return name, item[name]
    label = next((item[name] for name in LABELS if _LABEL.fullmatch(str(item.get(name)))), letter)
    return label, next((item[name] for name in TEXTS if not missing(item.get(name))), item)
