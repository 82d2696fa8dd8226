"""Layouts of corpora: adapters that turn a row into records, of documents, conversations and prompts.

An adapter gives [(record, remark or None) or (None, reason), ...]; those of comparisons are in preferences.py. Most
fields go by several names; where a row holds some of one kind, the first that holds text counts.
"""

import functools
import json
import re

from corpora.choices import choices, is_index
from corpora.clean import is_blank
from corpora.fields import (
    Drop,
    as_text,
    given,
    kind,
    missing,
    nothing,
    optional,
    plain,
    required,
    turn,
    unpacked,
)
from corpora.marks import MARKS, bare_answer, bare_question, marked_turns, strip_template
from corpora.turns import (
    MEDIA,
    SYSTEMS,
    THOUGHTS,
    UNTHOUGHT,
    filled,
    holds,
    is_spoken,
    messages_in,
    nested,
    opened,
    read_turns,
    settle,
)

TEXTS = ("text", "content", "completion", "body", "正文", "内容", "文本")
TURNS = ("messages", "conversations", "conversation", "dialog", "dialogue", "dialogues", "chat", "turns", "data")
LOOSE = ("turns", "data")  # may be anything: a number of turns, a table that is asked about
INSTRUCTIONS = "instruction prompt Instruction Prompt 指令".split()
QUESTIONS = "question query ask problem Question Query 问题 问".split()
INPUTS = "context Context input Input 输入".split()
BESIDE = ["instruction", "Instruction", "指令", *INPUTS]  # what a conversation may be about
ANSWERS = (
    "output response solution answer completion target std_answer reply Output Response Answer Completion"
    " 回答 答案 答 输出"
).split()
MARKED = ("text", "plain_text", "content")  # fields that may hold a whole conversation between marks
FIELDS_BYTES = 1 << 16  # of a prompt's other fields as JSON: a right answer and some test cases, not a book


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
    return document(required(row, notes, *TEXTS), optional(row, notes, "title", "标题"))


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
        others = [other for other in _VERSES if other != name and given(value, other) and value[other] != value[name]]
        notes += [f"{other} left out, {name} taken" for other in others]
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


def asks(row, *but):
    """Whether a row has a question in a field of its own, other than these."""
    return given(row, *(name for name in (*INSTRUCTIONS, *QUESTIONS) if name not in but))


def history(row, notes):
    """The turns of a `history`: [question, answer] pairs, questions and answers in turn, messages or a marked text."""
    value = unpacked(row.get("history"))
    if nothing(value):
        return []
    if isinstance(value, str) and (turns := marked_turns(value)):
        return turns
    items = value if isinstance(value, list) else [0]
    flat = len(items) % 2 == 0 and all(isinstance(item, str) or missing(item) for item in items)
    held = [item for item in items if not missing(item) and item != []]
    if not flat and not all(isinstance(x, dict) or isinstance(x, (list, tuple)) and len(x) == 2 for x in held):
        raise Drop("history not pairs")
    return read_turns(value, "history", notes)


def question_text(row, notes, *names, replies=False):
    """(the question, the fields it stands in); `names` are more fields that it may stand in.

    `replies`: columns A, B, ... may be answers to it, unless one stands elsewhere.
    """
    used, parts = set(), []
    others = [name for name in INPUTS if name.lower() != "context"]
    context = [name for name in INPUTS if name not in others] if present(row, others) else []
    for group in (INSTRUCTIONS, [*QUESTIONS, *names], context, [name for name in INPUTS if name not in context]):
        if name := present(row, group):
            used.add(name)
            text = optional(row, notes, name) if group is context else required(row, notes, *group)
            again = name not in INPUTS and any(holds(part, text) for part in parts)  # a prompt made of the question
            notes += [f"{name} stands in the question already"] if again and text not in parts else []
            parts += [] if is_blank(text) or again else [text]
    if not parts and used <= set(INPUTS):
        raise Drop("no instruction")
    lines, fields = choices(row, "\n".join(parts), not replies or bool(present(row, ANSWERS)), notes)
    number = next((as_text(row[name], []) for name in [present(row, ANSWERS)] if name), None)
    if len(lines) > 1 and not replies and is_index(number, lines):
        raise Drop("answer is the number of a choice")  # from 0 or from 1
    parts, used = parts + lines if parts else [], used | fields
    return "\n".join(parts), used


def question_turns(row, notes, *names, replies=False):
    """(the history and the question, the fields they stand in); `names` are more fields that it may stand in."""
    prompt = row.get("prompt")
    if (found := messages_in(prompt)) and not (isinstance(prompt, str) and asks(row, "prompt")):
        turns, used = opened(read_turns(found, "prompt", notes), row, BESIDE, notes)
        return turns, used | {"prompt", *SYSTEMS}
    question, used = question_text(row, notes, *names, replies=replies)
    question = strip_template(question, notes)
    turns = marked_turns(question)
    if turns and turns[-1]["role"] == "assistant":
        if turns[-1]["content"]:  # a conversation that is talked of
            turns = [turn("user", question)]
        else:  # "Human: ...\nAssistant:"
            turns.pop()
            notes.append(MARKS)
    elif turns:
        notes.append(MARKS)
    else:
        turns = [turn("user", bare_question(question, notes))]
    return history(row, notes) + turns, used | {"history", *SYSTEMS}


def prompt_turns(row, notes, *names, replies=False):
    """The same of a row that may hold its question as messages."""
    if found := conversation_in(row, notes):
        return found
    if not asks(row) and (messages := messages_in(row.get("context"))):
        return read_turns(messages, "context", notes), {"context"}
    return question_turns(row, notes, *names, replies=replies)


def answer_turns(row, notes, *names):
    """The turns of an answer: of its text, or of messages."""
    name = present(row, names)
    told = name and isinstance(row[name], str) and not messages_in(row.get("prompt"))  # JSON that was asked for
    if name and not told and (found := messages_in(row[name])):
        return read_turns(found, name, notes)
    answer = strip_template(required(row, notes, *names), notes, answer=True)
    return [turn("assistant", bare_answer(answer, notes))]


def is_bad(row):
    """Whether a row is one of KTO's with an answer that is not wanted: {prompt, completion, label: false}."""
    marks = [row.get("label") if "prompt" in row or turns_name(row) else None, row.get("kto_tag")]
    return any(mark is False or isinstance(mark, str) and mark.strip().lower() == "false" for mark in marks)


_SHOWN = re.compile(r"<(?:image|video|audio)>")
_QWEN = re.compile(r"(?:Picture|Audio) \d+: ?<(?:img|audio)>[^<]*</")


def shows(turns, row):
    """Whether turns are on images, films or sounds, which stand beside them or, as Qwen-VL has them, within."""
    held = given(row, *MEDIA)
    return any(_QWEN.search(each["content"]) or held and _SHOWN.search(each["content"]) for each in turns)


def conversation(turns, row, notes):
    """An sft record of the pairs of a question and its answer."""
    if is_bad(row):
        raise Drop("answer marked bad")
    system, turns, cut = settle(turns, row, notes)
    kept = filled(turns, notes)
    pairs = len(kept) // 2
    if cut:
        notes.append(f"cut at {cut}")
    elif len(kept) % 2:
        notes.append("last human turn dropped")
    if not pairs:
        raise Drop(cut or ("no answer" if turns else "no question"))
    turns = kept[: 2 * pairs]
    if shows(turns, row):
        raise Drop("images")
    notes += ["images left out"] if given(row, *MEDIA) else []
    notes += ["tools left out"] if given(row, "tools", "functions") else []
    notes += [UNTHOUGHT] if given(row, *THOUGHTS) else []
    untrained = sum("train" in each for each in turns)
    if untrained == pairs:
        raise Drop("no answer to train on")
    notes += ["answers of weight 0 left untrained"] if untrained else []
    return [{"messages": system + turns}]


_DOTTED = re.compile(rf"({'|'.join(TURNS)})[.\[]")  # chat.turn_1.Human, a column of a table that was flattened


def turns_name(row):
    """The field that holds the conversation of a row; where nothing else asks, also one that it should be in."""
    held = [name for name in TURNS if name in row and not missing(row[name]) and row[name] not in ("", [], {})]
    asked = given(row, *INSTRUCTIONS, *QUESTIONS, *INPUTS)
    said = asked or given(row, *MARKED)
    for name in held:
        beside = said and name in LOOSE and (asks(row) or not messages_in(row[name]))  # what the question is about
        if not beside and is_spoken(row[name]):
            return name
    if asked:
        return None
    texts = [name for name in held if name not in LOOSE or is_texts(row[name]) and not said]
    return next(iter(texts), None) or present(row, [name for name in TURNS if name not in LOOSE])


def is_texts(value):
    value = unpacked(value)
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) or missing(item) for item in value)


def note_unread(row, taken, turns, notes):
    """Remarks on other fields of a conversation: that hold another one, or what is none beside a question."""
    for name in [name for name in TURNS if name != taken and name not in LOOSE and name in row]:
        value = unpacked(row[name])
        if not isinstance(value, (str, list, dict)) or nothing(value):
            continue
        try:
            other = read_turns(value, name, []) if taken else None
        except Drop:
            other = None
        if other is None or other != turns:
            notes.append(f"{name} left out, {taken} taken" if taken else f"{name} left out: {kind(value)}")


def conversation_in(row, notes):
    """(turns, the fields they stand in) of a field that holds a conversation as messages or in one text; or None."""
    if any(_DOTTED.match(str(name)) for name in row):
        row = nested(row)
    if name := turns_name(row):
        turns = read_turns(row[name], name, notes)
        note_unread(row, name, turns, notes)
        turns, used = opened(turns, row, BESIDE, notes)
        return turns, used | {name, *SYSTEMS}
    note_unread(row, None, None, notes)
    for name in MARKED:
        if isinstance(row.get(name), str) and (turns := marked_turns(row[name])):
            return turns, {name, *SYSTEMS}
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
    turns = filled(turns, notes)
    if len(turns) % 2 == 0 or shows(turns, row):
        raise Drop(cut or ("no question" if len(turns) % 2 == 0 else "images"))
    try:
        roots = {name: re.split(r"[.\[]", name)[0] if _DOTTED.match(name) else name for name in map(str, row)}
        others = {name: plain(value) for name, value in row.items() if roots[str(name)] not in used}
        size = len(json.dumps(others, ensure_ascii=False).encode())
    except (RecursionError, ValueError):  # ValueError: an integer of more than 4,300 digits
        raise Drop("fields that JSON cannot hold") from None
    if size > FIELDS_BYTES:
        raise Drop(f"fields over {FIELDS_BYTES >> 10} KB")
    return [{"messages": system + [turn(each["role"], each["content"]) for each in turns], "fields": others}]
