"""What stands in a row: text in its fields, and the turns of a conversation in the shapes that people write them in.

A turn is {"role", "content"}, of an answer that is not to be learnt also "train": False. `notes` is the list that
remarks on the row are added to; Drop is raised with the reason why a row gives no record.
"""

import ast
import datetime
import decimal
import functools
import json
import numbers
import re
import warnings


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
        elif text.strip():
            return text
        elif blank is None:
            blank = text
    if odd or blank is None:
        raise Drop(odd or f"no {names[0]}")
    return blank


def optional(row, notes, *names):
    """The same of fields that a row can do without: "" where none holds text."""
    if not any(name in row for name in names):
        return ""
    try:
        return required(row, notes, *names)
    except Drop:
        notes += [f"{n} left out: {kind(row[n])}" for n in names if not missing(row.get(n))][:1]
        return ""


def unpacked(value):
    """The list or object that a text holds as JSON or as Python writes it, as in a column of a CSV; else the value."""
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    for decode in (json.JSONDecoder(strict=False).decode, ast.literal_eval):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an odd escape in what is no Python at all
                found = decode(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return found if isinstance(found, (list, dict)) else value
    return value


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
CUTS = dict(tool="tool calls", image="images")  # what a prompt cannot hold: a conversation ends before it


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


# a message -> turns

CONTENTS = ("content", "value", "text", "utterance", "message")
_MEDIA = re.compile("image|audio|video|file|media")


def content_of(value, notes):
    """The text of a message's content, which may be a list of parts; None if it holds an image or the like."""
    if isinstance(value, str):
        return value
    if missing(value):
        return ""
    parts = [value] if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else None
    if parts is None:
        text = as_text(value, notes)
        if text is None:
            raise Drop("turn without text")
        return text
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else part
        text = text.get("value") if isinstance(text, dict) else text
        if isinstance(text, str):
            texts.append(text)
        elif isinstance(part, dict) and _MEDIA.search(" ".join([str(part.get("type")), *map(str, part)])):
            return None
        else:
            raise Drop("turn without text")
    notes += ["text parts joined"] if len(texts) > 1 else []
    return "\n".join(texts)


def is_trained(message, notes):
    """Whether an answer counts in the loss: the fields of OpenAI, mistral-finetune, ms-swift, xtuner and axolotl."""
    for name in ("weight", "loss_mask", "loss", "train", "training", "trainable"):
        if name not in message:
            continue
        value = message[name]
        if isinstance(value, str) and value.strip():
            value = value.strip().lower() not in ("0", "0.0", "false", "no")
        if isinstance(value, numbers.Real) and not missing(value):
            if value not in (0, 1):
                notes.append("turn weight taken as 1")
            if not value:
                return False
    return True


def turns_of(message, notes):
    """The turns of an object: of {role, content}, or of {human, assistant} and the like, a question and its answer."""
    name = next((message[key] for key in ("role", "from", "speaker") if not missing(message.get(key))), None)
    if name is None:
        return exchange(message, notes)
    role = role_of(str(name))
    if role is None:
        raise Drop(f"unknown role {shown(name)}")
    if role == "tool" or message.get("tool_calls") or message.get("function_call"):
        return [turn("tool", "")]
    text = content_of(next((message[key] for key in CONTENTS if not missing(message.get(key))), None), notes)
    if text is None:
        return [turn("image", "")]
    return [turn(role, text, role != "assistant" or is_trained(message, notes))]


# MOSS writes each part of a turn between its own marks; `None` between them is none.
_MOSS = re.compile(r"\A\s*(?:<\|[\w ]+\|>|\[(?:Human|MOSS)\])[:：]\s*|\s*<eo[a-z]>\s*\Z")


_SIDES = dict(
    system="system 系统",
    user="human user instruction prompt question query input q 用户 问题 问",
    assistant="assistant gpt chatgpt moss bot answer response output reply a 助手 答案 回答 答",
)


def exchange(message, notes):
    """The turns of {human, assistant}, {question, answer}, {system, input, output} or a turn of MOSS."""
    fields, turns = {str(name).lower(): value for name, value in message.items()}, []
    for role, names in _SIDES.items():
        values = [fields[name] for name in names.split() if not missing(fields.get(name))]
        for value in values[:1] if role == "assistant" else values:
            text, train = content_of(value, notes), role != "assistant" or is_trained(message, notes)
            turns.append(turn("image", "") if text is None else turn(role, _MOSS.sub("", text), train))
    if not turns:
        raise Drop("turn without a role")
    thoughts, commands = (_MOSS.sub("", str(fields.get(name) or "None")) for name in ("inner thoughts", "commands"))
    if commands not in ("", "None"):
        return [turn("tool", "")]
    if thoughts not in ("", "None"):
        notes.append("inner thoughts left out")
    return turns


# a field -> turns

# Conversations in one text, by what opens a turn: Llama-Chinese's, ChatML's, MOSS's, Guanaco's, hh-rlhf's and BELLE's.
_OPENINGS = [
    re.compile(r"<s>\s*(Human|User|Assistant|Bot|System)\s*[:：][ \t]*"),
    re.compile(r"<\|im_start\|>[ \t]*(\w+)[ \t]*\n"),
    re.compile(r"(?:<\||\[)(Human|MOSS)(?:\|>|\])[:：][ \t]*"),
    re.compile(r"(?im)^###[ \t]*(Human|User|Assistant|System)[:：][ \t]*"),
    re.compile(r"(?im)^[ \t]*(Human|User|Assistant|Bot|用户|助手|问|答)[:：][ \t]*"),
]
_CLOSING = re.compile(r"(?:\s|</s>|<\|im_end\|>|<\|endoftext\|>|<eo[a-z]>)*\Z")


def marked_turns(text):
    """The turns of a text that begins with the mark of a turn and holds that of an answer; [] if it is none."""
    for opening in _OPENINGS:
        if opening.match(text.lstrip()):
            _, *found = opening.split(text)
            turns = [
                turn(role_of(role), _CLOSING.sub("", part)) for role, part in zip(found[::2], found[1::2], strict=True)
            ]
            roles = {each["role"] for each in turns}
            return turns if "assistant" in roles and None not in roles else []
    return []


def bare_answer(text):
    """An answer without the marks that close it, for one whose question had marks as well."""
    return _CLOSING.sub("", text)


def read_turns(value, name, notes):
    """The turns of a field: messages, pairs, texts in turn, an object of them, or a text that holds any of these."""
    value = unpacked(value)
    if isinstance(value, str) and (turns := marked_turns(value)):
        return turns
    if isinstance(value, dict):
        value = listed(value)
    if missing(value) or not value:
        raise Drop(f"no {name}")
    if not isinstance(value, (list, tuple)):
        raise Drop(f"{name} is {kind(value)}")
    turns = []
    for i, item in enumerate(value):
        if isinstance(item, dict):
            turns += turns_of(item, notes)
        elif isinstance(item, (list, tuple)) and len(item) == 2:
            turns += [
                turn(role, content_of(text, notes)) for role, text in zip(("user", "assistant"), item, strict=True)
            ]
        elif isinstance(item, str):
            turns.append(turn(("user", "assistant")[i % 2], item))
        else:
            raise Drop(f"turn is {kind(item)}")
    return turns


def listed(value):
    """The messages of an object: numbered ones ({"turn_1": ...}), columns of them, or itself as one."""
    numbered = {key: re.fullmatch(r"\D*(\d+)", str(key)) for key in value}
    if value and all(numbered.values()):
        return [value[key] for key in sorted(value, key=lambda key: int(numbered[key][1]))]
    columns = list(value.values())
    if columns and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    return [value]


def nested(row):
    """A row whose columns chat.turn_1.Human or messages[0].content become one field, as before it was flattened."""
    tree = {}
    for name, value in row.items():
        *path, last = re.split(r"\]?[.\[]", str(name).removesuffix("]"))
        if path and not missing(value) and value != "":
            place = tree
            for part in path:
                place = place.setdefault(part, {})
                if not isinstance(place, dict):
                    return row
            place[last] = value
    return tree | row


# turns in order


def settle(turns, row, notes):
    """(system turn or none, the turns user, assistant, user, ... and why they end early, or None).

    Keeps what is usable: a greeting before the first question is left out, turns of one role running are joined, and
    a system turn further on joins the user's, as the prompt format has the system text before the question too.
    """
    cut = next((i for i, each in enumerate(turns) if each["role"] in CUTS), len(turns))
    why = CUTS[turns[cut]["role"]] if cut < len(turns) else None
    joined, later = [], False  # whether the last turn joined is a later system turn
    for each in turns[:cut]:
        role, text = each["role"], each["content"]
        if role == "system" and not text.strip():
            continue
        before, later = later, role == "system" and bool(joined) and joined[-1]["role"] != "system"
        if later:
            notes.append("later system turn joined to the user's")
            role = "user"
        if joined and joined[-1]["role"] == role:
            texts = [part for part in (joined[-1]["content"], text) if part.strip()]
            if len(texts) == 2 and not before and not later:
                notes.append(f"{role} turns joined")
            train = joined[-1].get("train", True) and each.get("train", True)
            joined[-1] = turn(role, "\n".join(texts), train)
        elif role == "assistant" and (not joined or joined[-1]["role"] == "system"):
            notes += ["greeting left out"] if text.strip() else []
        else:
            joined.append(turn(role, text, each.get("train", True)))
    system = optional(row, notes, "system", "system_prompt")
    if joined and joined[0]["role"] == "system":
        notes += ["system field left out"] if system.strip() not in ("", joined[0]["content"].strip()) else []
        return joined[:1], joined[1:], why
    return [turn("system", system)] if system.strip() else [], joined, why
