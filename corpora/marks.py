"""Marks in texts: those of the turns of a conversation that is written as one text, and the Alpaca prompt."""

import re

from corpora.fields import role_of, turn

# Conversations in one text, by what opens a turn: Llama-Chinese's, ChatML's, Llama 3's, Llama 2's, MOSS's, ChatGLM3's,
# Guanaco's, which need not begin a line, and Alpaca's.
_OPENINGS = [
    re.compile(r"<s>\s*(Human|User|Assistant|Bot|System)\s*[:：][ \t]*"),
    re.compile(r"<\|im_start\|>[ \t]*(\w+)[ \t]*\n"),
    re.compile(r"<\|start_header_id\|>[ \t]*(\w+)[ \t]*<\|end_header_id\|>\s*"),
    re.compile(r"(?:<s>\s*)?(\[/?INST\]|<</?SYS>>)\s*"),
    re.compile(r"(?:<\||\[)(Human|MOSS)(?:\|>|\])[:：][ \t]*"),
    re.compile(r"<\|(user|assistant|system|observation)\|>\s*"),
    re.compile(r"(?i)###[ \t]*(Human|User|Assistant|System)[:：][ \t]*"),
    re.compile(r"(?im)^(?:Below is an instruction[^\n]*\n\s*)?###[ \t]*(Instruction|Input|Response)[:：]\s*"),
]
# Those of hh-rlhf, BELLE and ChatGLM, which ordinary text may begin with as well; another pair of them inside is text.
_PLAIN = [
    re.compile(rf"(?im)^[ \t]*(?:\[Round[ \t]*\d+\]\s*)?({names})[:：][ \t]*")
    for names in ("Human|Assistant|Bot", "User|Assistant|Bot|Function Response", "用户|助手", "问|答")
]
_ROLES = {"[INST]": "user", "[/INST]": "assistant", "<<SYS>>": "system", "<</SYS>>": "user"}
_START = re.compile(r"\A\s*(?:(?:<s>|<\|begin_of_text\|>|\[gMASK\]|<sop>)\s*)+")
_END = r"</s>|<\|(?:im_end|endoftext|eot_id|end_of_text|end)\|>|<eo[a-z]>"
_CLOSING = re.compile(rf"(?:\s|<s>|\[Round[ \t]*\d+\]|{_END})*\Z")
_CLOSED = re.compile(rf"(?:{_END})\s*\Z")
_ALONE = re.compile(r"\s*Human[:：][ \t]*(?=\S)")  # no way to begin a question, other than 问： or User:
MARKS = "marks of turns removed"


def parts_of(text):
    """[(role or None, text), ...] of a text that begins with the mark of a turn; [] of any other."""
    for bare in (text.lstrip(), _START.sub("", text)):
        begins = [opening for opening in _OPENINGS if opening.match(bare)][:1]
        plain = [opening for opening in _PLAIN if not begins and opening.match(bare)]
        if begins or plain:
            opening = max(begins or plain, key=lambda opening: len(opening.findall(bare)))
            marks = in_template(list(opening.finditer(bare)))
            ends = [mark.start() for mark in marks[1:]] + [len(bare)]
            parts = [_CLOSING.sub("", bare[mark.end() : end]) for mark, end in zip(marks, ends, strict=True)]
            return [
                (_ROLES.get(mark[1].upper()) or role_of(mark[1]), part) for mark, part in zip(marks, parts, strict=True)
            ]
    return []


def in_template(marks):
    """The marks of turns without those inside an answer to Alpaca's prompt, after which only another prompt comes."""
    kept = []
    for mark in marks:
        name, before = mark[1].lower(), kept[-1] if kept else None
        doubled = before and not mark.string[before.end() : mark.start()].strip()
        if name in ("input", "response") and before and before[1].lower() == "response" and not doubled:
            continue
        kept.append(mark)
    return kept


def marked_texts(items):
    """The turns of a list of texts that each begin with the mark of one, 问：... and 答：...; [] of any other."""
    if len(items) < 2 or not all(isinstance(item, str) for item in items):
        return []
    parts = [parts_of(item) for item in items]
    turns = [turn(*part[0]) for part in parts if len(part) == 1]
    both = {"user", "assistant"} <= {each["role"] for each in turns} <= {"user", "assistant", "system"}
    return turns if both and len(turns) == len(items) else []


def marked_turns(text):
    """The turns of a text that begins with the mark of a turn and holds that of an answer; [] if it is none."""
    turns = []
    for role, part in parts_of(text):
        if role == "user" and turns and turns[-1]["role"] == role:  # Alpaca's input after its instruction
            part = "\n".join(each for each in (turns.pop()["content"], part) if each.strip())
        turns.append(turn(role, part))
    roles = {each["role"] for each in turns}
    return turns if "assistant" in roles and None not in roles else []


def begins_marked(text):
    """Whether a text begins as a conversation does, and neither a question nor a document."""
    return bool(parts_of(text)) and bool(not any(each.match(text.lstrip()) for each in _PLAIN) or _ALONE.match(text))


def bare_question(text, notes):
    """A question that stands between the marks of a turn, without them."""
    if not begins_marked(text) or [role for role, _ in parts_of(text)] != ["user"]:
        return text
    notes.append(MARKS)
    return parts_of(text)[0][1]


def bare_answer(text, notes):
    """An answer without the marks that close it; <s>...</s> may well be HTML."""
    if MARKS not in notes:
        if "<s>" in text or not _CLOSED.search(text):
            return text
        notes.append(MARKS)
    return _CLOSING.sub("", text)


# The prompt of Stanford Alpaca, which some corpora left around their instructions and answers.
_OPENING = re.compile(r"(?:Below is an instruction[^\n]*\n\s*)?###\s?Instruction[:：]\s*")
_INPUT = re.compile(r"###\s?Input[:：]")
_RESPONSE = re.compile(r"###\s?Response[:：]\s*")
_TRAILING = re.compile(r"###\s?(?:Response|Instruction)[:：]\Z")


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
    while closing := _TRAILING.search(bare):
        bare = bare[: closing.start()].rstrip()
    if bare == text.strip():
        return text
    notes.append("doubled response marker removed" if answer else "prompt template removed")
    return bare
