"""Layouts of corpora: adapters that turn a row into records, of documents, conversations and prompts.

An adapter gives [(record, remark or None) or (None, reason), ...]; those of comparisons are in preferences.py. Most
fields go by several names; where a row holds some of one kind, the first that holds text counts.
"""

import functools
import json
import re

from corpora.turns import (
    Drop,
    as_text,
    bare_answer,
    marked_turns,
    missing,
    nested,
    optional,
    read_turns,
    required,
    settle,
    turn,
    unpacked,
)

TEXTS = ("text", "content", "completion", "body")
TURNS = ("messages", "conversations", "conversation", "dialog", "dialogue", "dialogues", "chat", "turns", "data")
INSTRUCTIONS = "instruction prompt Instruction Prompt 指令".split()
QUESTIONS = "question query ask problem Question Query 问题".split()
INPUTS = "input context Input".split()
ANSWERS = (
    "output response answer completion target std_answer reply solution Output Response Answer Completion 回答 答案"
).split()
MARKED = ("text", "plain_text", "content")  # fields that may hold a whole conversation between marks
MARKS = "marks of turns removed"
FIELDS_BYTES = 1 << 16  # of a prompt's other fields as JSON: a right answer and some test cases, not a book

# The prompt of Stanford Alpaca, which some corpora left around their instructions and answers.
_OPENING = re.compile(r"(?:Below is an instruction[^\n]*\n\s*)?###\s?Instruction[:：]\s*")
_INPUT = re.compile(r"###\s?Input[:：]")
_RESPONSE = re.compile(r"###\s?Response[:：]\s*")
_CLOSING = re.compile(r"###\s?(?:Response|Instruction)[:：]\Z")


def adapter(function):
    """An adapter out of a function from (row, notes) to what the row gives: records, and reasons for the others.

    The function may raise Drop; what it adds to `notes` becomes the remark on all records of the row.
    """

    @functools.wraps(function)
    def adapt(row):
        notes = []
        try:
            found = function(row, notes)
        except Drop as reason:
            return [(None, str(reason))]
        remark = "; ".join(dict.fromkeys(notes)) if notes else None
        return [(None, item) if isinstance(item, str) else (item, remark) for item in found]

    return adapt


def present(row, names):
    """The first of these fields that is not missing, of those that are not empty if there are any; or None."""
    found = [name for name in names if name in row and not missing(row[name])]
    return next((name for name in found if row[name] not in ("", [], {})), found[0] if found else None)


# documents


def document(text, title=""):
    """A pretraining record: the title on a line of its own, unless the text begins with it."""
    if not text.strip():
        raise Drop("empty text")
    title = title.strip()
    return [{"text": text if text.lstrip().startswith(title) else f"{title}\n{text}"}]


@adapter
def text_rows(row, notes):
    return document(required(row, notes, *TEXTS), optional(row, notes, "title"))


@adapter
def baike(row, notes):
    parts = [optional(row, notes, "summary")]
    sections = unpacked(row.get("sections") or [])
    if not isinstance(sections, list) or not all(isinstance(section, dict) for section in sections):
        raise Drop("no sections")
    for section in sections:
        parts += [optional(section, notes, "title"), optional(section, notes, "content")]
    return document("\n".join(part for part in parts if part.strip()), optional(row, notes, "title"))


@adapter
def zhihu(row, notes):
    return document(required(row, notes, "RESPONSE"), optional(row, notes, "INSTRUCTION"))


@adapter
def webnovel(row, notes):
    [chapter] = document(required(row, notes, "text"), optional(row, notes, "chapter"))
    return document(chapter["text"], optional(row, notes, "title"))


_VERSES = ("paragraphs", "content", "para")  # the names in the collections of chinese-poetry


def verses(value, notes):
    """The lines of a poem, or of a book that holds chapters or poems of its own."""
    if isinstance(value, dict):
        heading = [optional(value, notes, "title", "rhythmic", "chapter", "type"), optional(value, notes, "author")]
        name = present(value, _VERSES)
        if name is None:
            raise Drop("no paragraphs")
        lines = verses(unpacked(value[name]), notes)
        return [part for part in heading if part.strip()] + lines if "".join(lines).strip() else []
    if isinstance(value, list):
        return [line for item in value for line in verses(item, notes)]
    if (text := as_text(value, notes)) is None:
        raise Drop("no paragraphs")
    return [text]


@adapter
def chinese_poetry(row, notes):
    return document("\n".join(verses(row, notes)))


# conversations


def strip_template(text, notes, answer=False):
    """A text without the Alpaca prompt around it."""
    if "###" not in text:
        return text
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
        return text
    notes.append("doubled response marker removed" if answer else "prompt template removed")
    return bare


def messages_in(value):
    """The list of messages that a value is or holds as JSON; None if it is anything else, text above all."""
    value = unpacked(value)
    if isinstance(value, dict) and ("role" in value or "from" in value):
        return [value]
    if isinstance(value, list) and value and isinstance(value[0], dict) and ("role" in value[0] or "from" in value[0]):
        return value
    return None


def history(row, notes):
    """The turns of a `history`: [question, answer] pairs, or messages."""
    value = unpacked(row.get("history"))
    if missing(value) or value in ("", []):
        return []
    if not isinstance(value, list) or not all(
        isinstance(item, dict) or isinstance(item, (list, tuple)) and len(item) == 2 for item in value
    ):
        raise Drop("history not pairs")
    return read_turns(value, "history", notes)


def question_turns(row, notes, *names):
    """(the history and the question, the fields they stand in); `names` are more fields that it may stand in."""
    if found := messages_in(row.get("prompt")):
        return read_turns(found, "prompt", notes), {"prompt", "system"}
    used, parts = set(), []
    for group in (INSTRUCTIONS, [*QUESTIONS, *names], INPUTS):
        if name := present(row, group):
            used.add(name)
            text = required(row, notes, *group)
            again = group is not INPUTS and any(text in part for part in parts)  # a prompt made out of the question
            parts += [text] if text.strip() and not again else []
    if not parts and used <= set(INPUTS):
        raise Drop("no instruction")
    question = strip_template("\n".join(parts), notes)
    turns = marked_turns(question)
    if turns and turns[-1]["role"] == "assistant" and not turns[-1]["content"]:  # "Human: ...\nAssistant:"
        turns.pop()
        notes.append(MARKS)
    else:
        turns = [turn("user", question)]
    return history(row, notes) + turns, used | {"history", "system"}


def prompt_turns(row, notes, *names):
    """The same of a row that may hold its question as messages."""
    if found := conversation_in(row, notes):
        return found
    if messages := messages_in(row.get("context")):
        return read_turns(messages, "context", notes), {"context"}
    return question_turns(row, notes, *names)


def answer_turns(row, notes, *names):
    """The turns of an answer: of its text, or of messages."""
    name = present(row, names)
    if name and (found := messages_in(row[name])):
        return read_turns(found, name, notes)
    answer = strip_template(required(row, notes, *names), notes, answer=True)
    if MARKS in notes:
        answer = bare_answer(answer)
    return [turn("assistant", answer)]


def conversation(turns, row, notes):
    """An sft record of the complete pairs before the first empty turn."""
    system, turns, cut = settle(turns, row, notes)
    pairs = len(turns) // 2
    empty = next((i for i, each in enumerate(turns) if not each["content"].strip()), None)
    if empty is not None:
        pairs = empty // 2
        notes.append("cut at an empty turn")
    elif cut:
        notes.append(f"cut at {cut}")
    elif len(turns) % 2:
        notes.append("last human turn dropped")
    if not pairs:
        raise Drop(cut or ("no answer" if turns and empty != 0 else "no question"))
    turns = turns[: 2 * pairs]
    if any(row.get(name) for name in ("image", "images")) and any("<image>" in each["content"] for each in turns):
        raise Drop("images")
    if (name := present(row, ("tools", "functions"))) and unpacked(row[name]) not in ("", [], {}):
        notes.append("tools left out")
    untrained = sum("train" in each for each in turns)
    if untrained == pairs:
        raise Drop("no answer to train on")
    notes += ["answers of weight 0 left untrained"] if untrained else []
    return [{"messages": system + turns}]


_DOTTED = re.compile(rf"({'|'.join(TURNS)})[.\[]")  # chat.turn_1.Human, a column of a table that was flattened


def conversation_in(row, notes):
    """(turns, the fields they stand in) of a field that holds a conversation as messages or in one text; or None."""
    if any(_DOTTED.match(str(name)) for name in row):
        row = nested(row)
    if name := present(row, TURNS):
        return read_turns(row[name], name, notes), {name, "system"}
    for name in MARKED:
        if isinstance(row.get(name), str) and (turns := marked_turns(row[name])):
            return turns, {name, "system"}
    return None


@adapter
def messages(row, notes):
    if found := conversation_in(row, notes):
        turns = found[0]
    elif present(row, ANSWERS):
        turns = question_turns(row, notes)[0] + answer_turns(row, notes, *ANSWERS)
    else:
        raise Drop("no messages")
    if optional(row, notes, "meta_instruction"):
        notes.append("meta_instruction left out")  # MOSS: a page on its name and its plugins, which are off
    return conversation(turns, row, notes)


def question_and_answer(row, notes, first="output"):
    names = (first, *ANSWERS)
    if not present(row, names) and (found := conversation_in(row, notes)):
        return conversation(found[0], row, notes)
    return conversation(question_turns(row, notes)[0] + answer_turns(row, notes, *names), row, notes)


_alpaca = adapter(question_and_answer)


def alpaca(row):
    """A question and its answer, or one of each of a list of `instances`, as BELLE's seed tasks have."""
    found = unpacked(row.get("instances"))
    if isinstance(found, list) and found and all(isinstance(item, dict) for item in found):
        return [result for item in found for result in _alpaca(row | item)]
    return _alpaca(row)


firefly = adapter(functools.partial(question_and_answer, first="target"))


# prompts


def plain(value):
    """A value as JSON can hold it: dates and other objects as text, NaN as null, no lone surrogates."""
    if isinstance(value, (bool, int)) or value is None:
        return value
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    text = value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
    return text.encode("utf-8", "backslashreplace").decode()


@adapter
def prompts(row, notes):
    """The question alone; all other fields of the row are kept for reward functions, such as a right answer."""
    named = present(row, (*INSTRUCTIONS, *QUESTIONS, *INPUTS))
    turns, used = prompt_turns(row, notes, *([] if named else ["text"]))
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
        notes.append("answer at the end left out")
    system, turns, cut = settle(turns, row, notes)
    notes += [f"cut at {cut}"] if cut else []
    if len(turns) % 2 == 0 or not all(each["content"].strip() for each in turns):
        raise Drop(cut or "no question")
    try:
        others = {name: plain(value) for name, value in row.items() if re.split(r"[.\[]", str(name))[0] not in used}
        size = len(json.dumps(others, ensure_ascii=False).encode())
    except (RecursionError, ValueError):  # ValueError: an integer of more than 4,300 digits
        raise Drop("fields that JSON cannot hold") from None
    if size > FIELDS_BYTES:
        raise Drop(f"fields over {FIELDS_BYTES >> 10} KB")
    return [{"messages": system + [turn(each["role"], each["content"]) for each in turns], "fields": others}]
