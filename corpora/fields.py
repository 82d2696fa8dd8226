"""What stands in the fields of a row: text, what is packed into text, and the names of roles.

`notes` is the list that remarks on the row are added to; Drop is raised with the reason why a row gives no record.
"""

import ast
import datetime
import decimal
import functools
import io
import json
import numbers
import re
import tokenize
import warnings

from corpora.clean import is_blank


class Drop(Exception):
    """Why a row gives no record; a short fixed text, as reasons are counted."""


# text


def missing(value):
    """Whether a value is none, or NaN, as pandas writes for none."""
    return value is None or isinstance(value, (float, decimal.Decimal)) and value != value


def kind(value):
    """What a value that is no text is, for people."""
    names = (
        (dict, "an object"),
        ((list, tuple), "a list"),
        (str, "text"),
        (bytes, "bytes"),
        (numbers.Number, "a number"),
    )
    return next((name for types, name in names if isinstance(value, types)), f"a {type(value).__name__}")


def as_text(value, notes):
    """A text, number, date or boolean (as JSON writes it) as text; None for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        notes.append("boolean taken as text")
        return str(value).lower()
    if isinstance(value, (numbers.Number, datetime.date, datetime.time)):
        try:
            text = str(value)
        except ValueError:  # an integer of more than 4,300 digits
            return None
        notes.append("number taken as text" if isinstance(value, numbers.Number) else "date taken as text")
        return text
    return None


def required(row, notes, *names):
    """The text of the first of these fields that holds any; a blank one, where none does."""
    blank = odd = None
    for name in names:
        value = row.get(name)
        if not isinstance(value, str) and missing(value):
            continue
        text = as_text(value, notes)
        if text is None:
            odd = odd or f"{name} is {kind(value)}"
        elif not is_blank(text):
            note_others(row, notes, names, name, text)
            return text
        elif blank is None:
            blank = text
    if odd or blank is None:
        raise Drop(odd or f"no {names[0]}")
    return blank


def note_others(row, notes, names, taken, text):
    """A remark on each other of these fields that holds another text than the one that is taken."""
    for name in names:
        value = row.get(name)
        if value is None or name == taken or isinstance(value, bool) or missing(value):
            continue
        other = as_text(value, [])
        if other is None and not nothing(value):
            notes.append(f"{name} left out: {kind(value)}")
        elif other and other.strip() != text.strip() and not is_blank(other):
            notes.append(f"{name} left out, {taken} taken")


def first_filled(fields, notes):
    """The name of the first field that holds more than a blank text, else of the first that is not missing, or None.

    Other texts in the fields are remarked on.
    """
    held = [name for name, value in fields.items() if not missing(value)]
    if len(held) < 2:
        return held[0] if held else None
    texts = {name: fields[name] for name in held if isinstance(fields[name], str)}
    name = next((name for name in held if name not in texts or not is_blank(texts[name])), held[0])
    note_others(texts, notes, texts, name, texts.get(name, ""))
    return name


def optional(row, notes, *names):
    """The same of fields that a row can do without: "" where none holds text."""
    if not any(name in row for name in names):
        return ""
    try:
        return required(row, notes, *names)
    except Drop:
        notes += [f"{n} left out: {kind(row[n])}" for n in names if not missing(row.get(n))][:1]
        return ""


_PYTHON = re.compile(r"""[\[({][\s\[({]*(?:['"\]})]|None)""")  # lists and objects of texts, not {{1}, {2}} or a formula
_NUMPY = re.compile(r"""['"\]}]\s+['"\[{]""")  # perhaps two elements without a comma


def integer(digits):
    """An int, or where Python refuses one of so many digits, its text."""
    return int(digits) if len(digits) < 4000 else digits


class AsWritten(float):
    """A float that is shown as it was written: 0.10, 1e3, more digits than a float has."""

    def __new__(cls, digits):
        number = super().__new__(cls, digits)
        number.digits = digits
        return number

    def __str__(self):
        return self.digits


NUMBERS = dict(parse_int=integer, parse_float=AsWritten)
CELL = json.JSONDecoder(strict=False, **NUMBERS)


def python_value(text):
    """What Python's text stands for; NumPy's too, which has blanks where Python has commas, as pandas writes a list."""
    if _NUMPY.search(text):
        ends, starts, last, parts = set("'\"]}"), set("'\"[{"), "", []
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            word = token.string.strip()
            parts += ["," if last and word and last in ends and word[0] in starts else " ", word]
            last = word[-1:] or last
        text = "".join(parts).strip()
    return ast.literal_eval(text)


def unpacked(value):
    """The list or object that a text holds as JSON or as Python writes it, as in a column of a CSV; else the value."""
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    text = value.strip()
    for decode in (CELL.decode, *([python_value] if _PYTHON.match(text) else [])):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an odd escape in what is no Python at all
                found = decode(text)
        except Exception:  # what the two raise is not a closed set: TypeError of {[]: 1}, MemoryError of deep nesting
            continue
        return found if isinstance(found, (list, dict)) else value
    return value


def nothing(value):
    """Whether a value is none, as CSV and JSON may write it, or a list or an object of nothing else."""
    value = unpacked(value)
    if isinstance(value, str):
        return value.strip().lower() in ("", "null", "none", "nan")
    if isinstance(value, (dict, list, tuple)):
        return all(map(nothing, value.values() if isinstance(value, dict) else value))
    return value is False or missing(value)


def given(row, *names):
    """Whether any of these fields holds something."""
    return not all(nothing(row[name]) for name in names if name in row)


def plain(value):
    """A value as JSON can hold it: dates and other objects as text, NaN as null, no lone surrogates."""
    if isinstance(value, (bool, int)) or value is None:
        return value
    if isinstance(value, float):
        return value if value - value == 0 else getattr(value, "digits", None)  # 1e400 as it was written
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    text = value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
    return text.encode("utf-8", "backslashreplace").decode()


def by_number(digits):
    """A key that sorts texts of digits by their number, also of more than the 4,300 that int() takes."""
    bare = digits.lstrip("0")
    return len(bare), bare


# roles

ROLES = dict(
    user="user usr human prompter customer client patient student question query prompt instruction input"
    " 用户 人类 客户 顾客 患者 病人 学生 提问者 问题 提问 问",
    assistant="assistant model bot chatbot ai agent gpt chatgpt bing bingchat bard claude gemini llama qwen"
    " chatglm deepseek moss llm doctor teacher answer response reply output"
    " 助手 助理 机器人 模型 客服 医生 老师 回答 答案 答",
    system="system sys developer 系统",
    tool="tool tools tooluse toolcall toolcalls toolresponse toolresult toolresults function functioncall functions"
    " functionresponse functionresult observation observations ipython 工具",
)
ROLES = {name: role for role, names in ROLES.items() for name in names.split()}


@functools.lru_cache(maxsize=1024)
def role_of(name):
    """user, assistant, system or tool of a role's name; None for one that is not known."""
    bare = re.sub(r"[\W_]", "", name).lower()
    return "assistant" if re.match(r"(chat)?gpt\d", bare) else ROLES.get(bare)


def shown(name):
    """A value out of the data, short and printable."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(name)[:20])


def turn(role, content, train=True):
    return {"role": role, "content": content} | ({} if train else {"train": False})
