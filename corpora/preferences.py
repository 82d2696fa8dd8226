"""Layouts of comparisons: adapters that turn a row into questions with a chosen and a rejected answer."""

import itertools
import re

from corpora.layouts import (
    ANSWERS,
    INPUTS,
    INSTRUCTIONS,
    QUESTIONS,
    TURNS,
    adapter,
    conversation_in,
    messages_in,
    present,
    prompt_turns,
    strip_template,
)
from corpora.turns import (
    CONTENTS,
    Drop,
    as_text,
    marked_turns,
    missing,
    read_turns,
    required,
    settle,
    turn,
    unpacked,
)

CHOSEN = (
    "chosen chosen_response response_chosen chosen_answer answer_chosen output_chosen pos_resp pos positive accepted"
    " response_accepted accepted_response preferred preferred_output preferred_response better win winner good"
).split()
REJECTED = (
    "rejected rejected_response response_rejected rejected_messages rejected_answer answer_rejected output_rejected"
    " neg_resp neg negative dispreferred dispreferred_response non_preferred non_preferred_output worse lose loser bad"
).split()
RANKED = ("output", "outputs", "responses", "answers", "completions", "candidates", "replies")


def preference(turns, chosen, rejected, row, notes):
    """An rm record, of a prompt that ends with the user's question."""
    system, turns, cut = settle(turns, row, notes)
    if cut:
        raise Drop(cut)
    if len(turns) % 2 == 0 and turns and turns[-1]["content"].strip() in (chosen.strip(), rejected.strip()):
        turns = turns[:-1]
        notes.append("answer at the end of the prompt left out")
    if len(turns) % 2 == 0 or not all(each["content"].strip() for each in turns):
        raise Drop("no question")
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise Drop(f"no {name}")
    if chosen.strip() == rejected.strip():
        raise Drop("chosen equals rejected")
    plain = [turn(each["role"], each["content"]) for each in turns]  # the loss of a comparison is on its answers
    return {"messages": system + plain, "chosen": chosen, "rejected": rejected}


def read_side(row, notes, names):
    """(turns before the answer, the answer) of a text, a message, or messages of which the last is the answer."""
    name = present(row, names)
    value = unpacked(row[name]) if name else None
    turns = None
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        return [], value[0]
    if messages_in(value):
        turns = read_turns(value, name, notes)
    elif isinstance(value, str) and not any(present(row, group) for group in (INSTRUCTIONS, QUESTIONS, INPUTS, TURNS)):
        turns = marked_turns(value)  # hh-rlhf: all of the conversation, in both
    if not turns:
        return [], required(row, notes, *names)
    *before, last = turns
    if last["role"] != "assistant":
        raise Drop("roles out of order")
    return before, last["content"]


@adapter
def pairs(row, notes):
    if isinstance(inner := unpacked(row.get("input")), dict) and "messages" in inner:
        row = row | inner | {"input": None}  # OpenAI: {"input": {"messages"}, "preferred_output", ...}
    before_rejected, rejected = read_side(row, notes, REJECTED)
    turns = None
    if not present(row, (*CHOSEN, *ANSWERS)) and (found := conversation_in(row, notes)):
        turns = found[0]  # ms-swift: the chosen answer ends the messages
        if not turns or turns[-1]["role"] != "assistant":
            raise Drop("no chosen")
        chosen = turns.pop()["content"]
        before = turns if before_rejected else []
    else:
        before, chosen = read_side(row, notes, (*CHOSEN, *ANSWERS))
    if before != before_rejected:
        raise Drop("chosen and rejected have different prompts")
    if before and before[0]["role"] != "assistant":  # the prompt itself, also where the row repeats it
        return [preference(before, chosen, rejected, row, notes)]
    if turns is None:
        turns, _ = prompt_turns(row, notes)
    return [preference(turns + before, chosen, rejected, row, notes)]


def answer_text(answer, notes):
    """The text of one of several answers; "" if it holds none."""
    if isinstance(answer, dict):
        if any(name in answer for name in ("score", "rank", "reward")):
            raise Drop("answers with scores, not in order")
        answer = next((answer[name] for name in (*CONTENTS, *ANSWERS) if not missing(answer.get(name))), None)
    return strip_template(as_text(answer, notes) or "", notes, answer=True)


def every_pair(answers, notes, record):
    """record(better, worse) of each two answers, the best given first, and why others give none.

    Of equal answers the best placed stands for all.
    """
    texts, found = [], []
    for text in (answer_text(answer, notes) for answer in answers):
        if not text.strip():
            found.append("no answer")
        elif text.strip() in (other.strip() for other in texts):
            found.append("answer given twice")
        else:
            texts.append(text)
    found += [record(better, worse) for better, worse in itertools.combinations(texts, 2)]
    return found if len(texts) > 1 else [*found, "fewer than two answers"]


_ABOUT = re.compile(r"(?i)(.*[ _-])?(id|idx|index|no|num|source|lang|language|type|category|label|score|split)")


def answer_columns(row, used, notes):
    """The answers in columns of their own: answer1, answer2, ... or, without such, all that are not the question's."""
    others = [name for name in row if name not in used and not missing(row[name]) and row[name] != ""]
    numbered = {name: found for name in others if (found := re.fullmatch(r"[^\d]+(\d+)", str(name)))}
    names = sorted(numbered, key=lambda name: int(numbered[name][1]))
    names = names or [name for name in others if not _ABOUT.fullmatch(str(name))]
    if not names:
        raise Drop("no output")
    notes.append("columns taken as answers, the best first")
    return [row[name] for name in names]


@adapter
def ranked(row, notes):
    turns, used = prompt_turns(row, notes)
    name = present(row, RANKED)
    answers = unpacked(row[name]) if name else None
    if isinstance(answers, dict):
        raise Drop(f"{name} is an object")
    if not isinstance(answers, (list, tuple)):
        answers = answer_columns(row, used, notes)
    return every_pair(answers, notes, lambda better, worse: preference(turns, better, worse, row, notes))


_HEADER = re.compile(
    "(?i)(text|rank|answer|response|output|sentence|chosen|rejected|best|better|good|worse|worst|bad"
    r"|回答|答案|句子|文本|排名|排序)[ _-]?\w{0,2}"
)


@adapter
def ranked_texts(row, notes):
    """Texts alone between tabs, the best first: judged under an empty question, each line as a question of its own."""
    value = row.get("text")
    texts = value.split("\t") if isinstance(value, str) else value
    if not isinstance(texts, list):
        raise Drop("no text")
    if all(isinstance(text, str) and _HEADER.fullmatch(text.strip()) for text in texts):
        return ["header"]
    question = dict(messages=[turn("user", "")], key="\n".join(map(str, texts)))
    return every_pair(texts, notes, lambda better, worse: question | dict(chosen=better, rejected=worse))
