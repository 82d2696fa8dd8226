"""The turns of a conversation, in the shapes that people write them in.

A turn is {"role", "content"}, of an answer that is not to be learnt also "train": False. `notes` is the list that
remarks on the row are added to; Drop is raised with the reason why a row gives no record.
"""

import numbers
import re

from corpora.clean import is_blank
from corpora.fields import (
    Drop,
    as_text,
    by_number,
    first_filled,
    given,
    kind,
    missing,
    optional,
    role_of,
    shown,
    turn,
    unpacked,
)
from corpora.marks import marked_texts, marked_turns

CUTS = dict(tool="tool calls", image="images")  # what a prompt cannot hold: a conversation ends before it
EMPTY = "pair with an empty turn left out"

# a message -> turns

CONTENTS = ("content", "value", "text", "utterance", "message")
THOUGHTS = ("reasoning", "reasoning_content", "thinking", "thoughts")
UNTHOUGHT = "inner thoughts left out"
MEDIA = "image images video videos audio audios".split()
_MEDIA = re.compile("image|audio|video|file|media")
_THOUGHT = re.compile("thinking|reasoning")
_CALL = re.compile(r"""(?i)<\W?(?:tool|function)[ _]?call|\A\s*\{\s*"name\"""")  # of a tool, as text


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
        if isinstance(part, dict) and _THOUGHT.search(str(part.get("type"))):
            notes.append(UNTHOUGHT)
            continue
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


def has_tools(content):
    """Whether a message's parts are calls of tools or what those gave, as Anthropic writes them."""
    parts = content if isinstance(content, list) else []
    return any(isinstance(part, dict) and str(part.get("type")).startswith("tool_") for part in parts)


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


def role_in(message):
    """What the role of a message is called; None where it has none."""
    return next((message[key] for key in ("role", "from", "speaker") if not missing(message.get(key))), None)


def turns_of(message, notes, whole=False):
    """The turns of an object: of {role, content}, or of {human, assistant} and the like, a question and its answer."""
    name = role_in(message)
    if name is None:
        return exchange(message, notes, whole)
    name = as_text(name, []) or kind(name)
    role = role_of(name)
    if role is None:
        raise Drop(f"unknown role {shown(name)}")
    content = message.get(first_filled({key: message[key] for key in CONTENTS if key in message}, notes))
    if role == "tool" or given(message, "tool_calls", "function_call") or has_tools(content):
        return [turn("tool", "")]
    notes += [UNTHOUGHT] if given(message, *THOUGHTS) else []
    text = content_of(content, notes)
    if text is None or given(message, *MEDIA):
        return [turn("image", "")]
    return [turn(role, text, role != "assistant" or is_trained(message, notes))]


# MOSS writes each part of a turn between its own marks; `None` between them is none.
_MOSS = re.compile(r"\A\s*(?:<\|[\w ]+\|>|\[(?:Human|MOSS)\])[:：]\s*|\s*<eo[a-z]>\s*\Z")


_SIDES = dict(
    system="system 系统",
    user="human user instruction prompt question query input q 用户 问题 问",
    assistant="assistant gpt chatgpt moss bot answer response output reply a 助手 答案 回答 答",
)


def sides(message):
    """{role: {field: value}} of an object that has question and answer in fields of their own."""
    fields = {str(name).lower(): value for name, value in message.items() if not missing(value)}
    named = {role: {name: fields[name] for name in names.split() if name in fields} for role, names in _SIDES.items()}
    return {role: values for role, values in named.items() if values}


def exchange(message, notes, whole=False):
    """The turns of {human, assistant}, {question, answer}, {system, input, output} or a turn of MOSS.

    In a `whole` one a side that is missing is an empty turn, lest its question get the answer of the next.
    """
    fields, turns, found = {str(name).lower(): value for name, value in message.items()}, [], sides(message)
    if given(fields, "tool_calls", "function_call"):
        return [turn("tool", "")]
    if given(fields, *MEDIA):
        return [turn("image", "")]
    notes += [UNTHOUGHT] if given(fields, *THOUGHTS) else []
    if "user" in found and isinstance(fields.get("context"), str):  # what the question is about, above it
        found["user"] = dict(context=fields["context"]) | found["user"]
    if whole and found.keys() & {"user", "assistant"}:
        found = {role: found.get(role, {"": ""}) for role in _SIDES if role in found or role != "system"}
    for role, values in found.items():
        for value in values.values() if role != "assistant" else [values[first_filled(values, notes)]]:
            text, train = content_of(value, notes), role != "assistant" or is_trained(message, notes)
            turns.append(turn("image", "") if text is None else turn(role, _MOSS.sub("", text), train))
    if not turns:
        raise Drop("turn without a role")
    thoughts, commands = (_MOSS.sub("", str(fields.get(name) or "None")) for name in ("inner thoughts", "commands"))
    if commands not in ("", "None"):
        return [turn("tool", "")]
    if thoughts not in ("", "None"):
        notes.append(UNTHOUGHT)
    return turns


def holds(part, text):
    """Whether a part holds a text as a line of its own or after a colon, as templates do; a long one, anywhere."""
    text = text.strip()
    alone = re.search(rf"(?m)(?:^|[:：])[ \t]*{re.escape(text)}[ \t]*$", part)
    return bool(alone) or len(text) >= 16 and text in part


def opened(turns, row, names, notes):
    """(turns, the fields that went into them): above the first question what stands beside it and no turn holds."""
    first, used = next((i for i, each in enumerate(turns) if each["role"] == "user"), None), set()
    for name in [] if first is None else reversed(names):
        text, said = row.get(name), [each["content"] for each in turns]
        if not isinstance(text, str) or is_blank(text) or any(holds(part, text) for part in said):
            continue
        if said[first].strip() and holds(text, said[first]):  # a prompt made of the turns
            notes.append(f"{name} left out, the turns taken")
            continue
        notes.append(f"{name} put before the first question")
        turns[first] = turns[first] | dict(content=f"{text}\n{said[first]}")
        used.add(name)
    return turns, used


# a field -> turns


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
    if turns := marked_texts(value):
        return turns
    exchanges = [item for item in value if isinstance(item, dict) and role_in(item) is None]
    if name == "data" and len(exchanges) > 1 and any(map(is_row, exchanges)):
        raise Drop("data holds rows, not turns")
    whole = any({"user", "assistant"} <= sides(item).keys() for item in exchanges)
    turns, named, texts = [], named_turns(value), all(isinstance(item, str) or missing(item) for item in value)
    for i, item in enumerate(value):
        if not texts and (missing(item) or item in ([], {}, ())):
            notes.append(EMPTY)
        elif isinstance(item, dict):
            turns += turns_of(item, notes, whole)
        elif named:
            turns += turns_of(dict(role=item[0], content=item[1]), notes)
        elif isinstance(item, (list, tuple)) and len(item) == 2:
            turns += [
                turn(role, content_of(text, notes)) for role, text in zip(("user", "assistant"), item, strict=True)
            ]
        elif isinstance(item, str) or missing(item):
            turns.append(turn(("user", "assistant")[i % 2], "" if missing(item) else item))
        else:
            raise Drop(f"turn is {kind(item)}")
    roles = [each["role"] for each in turns]
    if len(roles) > 2 and roles == [("user", "system")[i % 2] for i in range(len(roles))]:  # CrossWOZ, MultiWOZ
        notes.append("system taken as who answers")
        turns = [each | dict(role=("user", "assistant")[i % 2]) for i, each in enumerate(turns)]
    return turns


def is_row(item):
    """Whether an object is a question and its answer as rows have them, and not as turns of a conversation do."""
    names = {str(name).lower() for name in item}
    return bool(names & {"instruction", "prompt", "question", "query", "input", "output", "response", "answer"})


def messages_in(value):
    """The list of messages that a value is or holds as JSON, there with known roles alone; None if it is none."""
    found = unpacked(value)
    found = [found] if isinstance(found, dict) else found
    if not isinstance(found, list) or not found or not isinstance(found[0], dict):
        return None
    if isinstance(value, str):  # which may be JSON that is talked of
        known = all(
            isinstance(item, dict)
            and role_of(str(item.get("role", item.get("from"))))
            and any(name in item for name in CONTENTS)
            for item in found
        )
        return found if known else None
    return found if "role" in found[0] or "from" in found[0] else None


def is_spoken(value):
    """Whether a field holds messages or pairs, and not a number, a text without marks or texts."""
    value = unpacked(value)
    if isinstance(value, str):
        return bool(marked_turns(value))
    items = listed(value) if isinstance(value, dict) else value
    return isinstance(items, (list, tuple)) and any(
        len(item) == 2 if isinstance(item, (list, tuple)) else isinstance(item, dict) and (role_in(item) or sides(item))
        for item in items
    )


def named_turns(items):
    """Whether items are [role, text], of both sides, rather than [question, answer]."""
    if not all(isinstance(item, (list, tuple)) and len(item) == 2 and isinstance(item[0], str) for item in items):
        return False
    roles = {role_of(item[0]) for item in items}
    return None not in roles and {"user", "assistant"} <= roles


def listed(value):
    """The messages of an object: numbered ones ({"turn_1": ...}), columns of them, or itself as one."""
    numbered = {key: re.fullmatch(r"\D*(\d+)", str(key)) for key in value}
    if value and all(numbered.values()):
        return [value[key] for key in sorted(value, key=lambda key: by_number(numbered[key][1]))]
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

SYSTEMS = ("system", "system_prompt", "system_message", "System", "系统")


def settle(turns, row, notes):
    """(system turn or none, the turns user, assistant, user, ... and why they end early, or None).

    Keeps what is usable: a greeting before the first question, or after an empty one, is left out, turns of one role
    running are joined, and a system turn further on joins the user's, as the prompt format has the system text before
    the question too.
    """
    cut = next((i for i, each in enumerate(turns) if each["role"] in CUTS), len(turns))
    why = CUTS[turns[cut]["role"]] if cut < len(turns) else None
    if why and cut and turns[cut - 1]["role"] == "assistant" and _CALL.search(turns[cut - 1]["content"]):
        cut -= 1
    joined, later = [], False  # whether the last turn joined is a later system turn
    for each in turns[:cut]:
        role, text = each["role"], each["content"]
        opens = not joined or joined[-1]["role"] == "system"
        if (role == "system" or role == "user" and opens) and is_blank(text):
            continue
        before, later = later, role == "system" and bool(joined) and joined[-1]["role"] != "system"
        if later:
            notes.append("later system turn joined to the user's")
            role = "user"
        if joined and joined[-1]["role"] == role:
            texts = [part for part in (joined[-1]["content"], text) if not is_blank(part)]
            if len(texts) == 2 and not before and not later:
                notes.append(f"{role} turns joined")
            train = joined[-1].get("train", True) and each.get("train", True)
            joined[-1] = turn(role, "\n".join(texts), train)
        elif role == "assistant" and opens:
            notes += [] if is_blank(text) else ["greeting left out"]
        else:
            joined.append(turn(role, text, each.get("train", True)))
    system = optional(row, notes, *SYSTEMS)
    if joined and joined[0]["role"] == "system":
        notes += ["system field left out"] if system.strip() not in ("", joined[0]["content"].strip()) else []
        return joined[:1], joined[1:], why
    return [turn("system", system)] if system.strip() else [], joined, why


def filled(turns, notes):
    """Settled turns without the pairs of which a side is empty, nor an empty question at the end."""
    kept = []
    for i in range(0, len(turns), 2):
        pair = turns[i : i + 2]
        empty = any(is_blank(each["content"]) for each in pair)
        kept += [] if empty else pair
        notes += [EMPTY] if empty else []
    return kept
