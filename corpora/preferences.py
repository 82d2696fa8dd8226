"""Layouts of comparisons: adapters that turn a row into questions with a chosen and a rejected answer."""

import itertools
import re

from corpora.clean import is_blank
from corpora.fields import Drop, as_text, first_filled, required, turn, unpacked
from corpora.layouts import (
    ANSWERS,
    INPUTS,
    INSTRUCTIONS,
    QUESTIONS,
    adapter,
    conversation_in,
    messages_in,
    present,
    prompt_turns,
    shows,
    turns_name,
)
from corpora.marks import bare_answer, marked_turns, strip_template
from corpora.turns import CONTENTS, filled, read_turns, settle

CHOSEN = (
    "chosen chosen_response response_chosen chosen_answer answer_chosen output_chosen pos_resp pos positive accepted"
    " response_accepted accepted_response preferred preferred_output preferred_response better win winner good"
).split()
REJECTED = (
    "rejected rejected_response response_rejected rejected_messages rejected_answer answer_rejected output_rejected"
    " neg_resp neg negative dispreferred dispreferred_response non_preferred non_preferred_output worse lose loser bad"
).split()


def preference(turns, chosen, rejected, row, notes):
    """An rm record, of a prompt that ends with the user's question."""
    system, turns, cut = settle(turns, row, notes)
    if cut or shows(turns, row):
        raise Drop(cut or "images")
    last = turns[-1]["content"].strip() if turns and len(turns) % 2 == 0 else None
    if last is not None and (last in (chosen.strip(), rejected.strip()) or is_blank(last)):
        turns = turns[:-1]
        notes.append("answer at the end of the prompt left out")
    turns = filled(turns, notes)
    if len(turns) % 2 == 0:
        raise Drop("no question")
    chosen, rejected = bare_answer(chosen, notes), bare_answer(rejected, notes)
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if is_blank(text):
            raise Drop(f"no {name}")
    if chosen.strip() == rejected.strip():
        raise Drop("chosen equals rejected")
    plain = [turn(each["role"], each["content"]) for each in turns]  # the loss of a comparison is on its answers
    return {"messages": system + plain, "chosen": chosen, "rejected": rejected}


def texts_of_messages(row, notes):
    """Whether the chosen and the rejected answer are texts of messages as JSON, and not JSON that was asked for."""
    sides = [row[name] for names in ((*CHOSEN, *ANSWERS), REJECTED) if (name := present(row, names))]
    if len(sides) < 2 or not all(isinstance(side, str) and messages_in(side) for side in sides):
        return False
    (*before, last), (*other, _) = (read_turns(messages_in(side), "chosen", notes) for side in sides)
    question = next((row[name] for name in (*INSTRUCTIONS, *QUESTIONS) if isinstance(row.get(name), str)), None)
    said = [each["content"].strip() for each in before]
    return last["role"] == "assistant" and before == other and (not said or not question or question.strip() in said)


def read_side(row, notes, names):
    """(turns before the answer, the answer) of a text, a message, or messages of which the last is the answer."""
    name = present(row, names)
    value = row[name] if name else None
    turns = None
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        return [], value[0]
    value = unpacked(value)  # of text only now: a list that was asked for is an answer
    if name and messages_in(row[name]) and (not isinstance(row[name], str) or texts_of_messages(row, [])):
        turns = read_turns(value, name, notes)
    elif isinstance(value, str) and not (present(row, (*INSTRUCTIONS, *QUESTIONS, *INPUTS)) or turns_name(row)):
        turns = marked_turns(value)  # hh-rlhf: all of the conversation, in both
    if not turns:
        return [], required(row, notes, *names)
    *before, last = turns
    if last["role"] != "assistant":
        raise Drop("roles out of order")
    return before, last["content"]


def by_scores(chosen, rejected, row, notes):
    """The two answers in the order of their scores, if the row has some: score_chosen, rejected_rating and the like."""
    for kind in ("score", "rating", "reward", "scores", "ratings", "rewards"):
        for form in ("{1}_{0}", "{0}_{1}"):
            scores = [row.get(form.format(side, kind)) for side in ("chosen", "rejected")]
            try:
                high, low = map(float, scores)
            except (TypeError, ValueError, OverflowError):
                continue
            if high == low:
                raise Drop("answers of equal score")
            if high < low:
                notes.append("answers put in the order of their scores")
                return rejected, chosen
    return chosen, rejected


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
    chosen, rejected = by_scores(chosen, rejected, row, notes)
    if before and before[0]["role"] != "assistant":  # the prompt itself, also where the row repeats it
        return [preference(before, chosen, rejected, row, notes)]
    if turns is None:
        turns, _ = prompt_turns(row, notes)
    return [preference(turns + before, chosen, rejected, row, notes)]


def answer_text(answer, notes):
    """The text of one of several answers; "" if it holds none."""
    if isinstance(answer, dict):
        answer = answer.get(first_filled({name: answer.get(name) for name in (*CONTENTS, *ANSWERS)}, notes))
    return strip_template(as_text(answer, notes) or "", notes, answer=True)


def every_pair(answers, notes, record, scores=None):
    """record(better, worse) of each two answers, the best given first or by scores, and why others give none.

    Of equal answers the best placed stands for all.
    """
    scores = scores or range(0, -len(answers), -1)
    order = sorted(range(len(answers)), key=lambda i: scores[i], reverse=True)
    notes += ["answers put in the order of their scores"] if order != sorted(order) else []
    texts, found = [], []
    for i in order:
        text = answer_text(answers[i], notes)
        if is_blank(text):
            found.append("no answer")
        elif any(text.strip() == other.strip() for other, _ in texts):
            found.append("answer given twice")
        else:
            texts.append((text, scores[i]))
    for (better, high), (worse, low) in itertools.combinations(texts, 2):
        found.append(record(better, worse) if high > low else "answers of equal score")
    return found if len(texts) > 1 else [*found, "fewer than two answers"]


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
