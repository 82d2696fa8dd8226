"""corpora/choices.py: the choices of a question, however a row has them."""

import json

import pytest
from rows import adapt, chat, one

ASKED = {"question": "首选药物是", "answer": "B"}
WANTED = "首选药物是\nA. 甲\nB. 乙"


@pytest.mark.parametrize("name", ["options", "option", "choices", "选项", "Options"])
@pytest.mark.parametrize(
    "value",
    [
        {"A": "甲", "B": "乙"},
        {"A": "甲", "B": "乙", "C": None, "D": " "},
        {"option_A": "甲", "option_B": "乙"},
        {"A": "A. 甲", "B": "B. 乙"},
        {"label": ["A", "B"], "text": ["甲", "乙"]},
        ["甲", "乙"],
        ["甲", "乙", None],
        ["A. 甲", "B. 乙"],
        [["A", "甲"], ["B", "乙"]],
        [{"A": "甲"}, {"B": "乙"}],
        [{"label": "A", "text": "甲"}, {"label": "B", "text": "乙"}],
        [{"key": "A", "value": "甲"}, {"key": "B", "value": "乙"}],
        [{"text": "甲", "right": False}, {"text": "乙", "right": True}],
        "A. 甲\nB. 乙\n",
    ],
)
def test_choices_of_every_shape(name, value):
    for shape in (value, json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value):
        for layout in ("alpaca", "messages"):
            assert one(layout, ASKED | {name: shape}) == ({"messages": chat(WANTED, "B")}, None)
        assert one("prompts", ASKED | {name: shape}) == ({"messages": chat(WANTED), "fields": {"answer": "B"}}, None)
        pair = {"question": "首选药物是", name: shape, "chosen": "B", "rejected": "A"}
        assert one("pairs", pair) == ({"messages": chat(WANTED), "chosen": "B", "rejected": "A"}, None)


@pytest.mark.parametrize(
    "row, question, remark",
    [
        ({"A": "甲", "B": "乙", "options": ["丙"]}, WANTED, None),
        ({"option_a": "甲", "option_b": "乙"}, WANTED, None),
        ({"选项A": "甲", "选项B": "乙"}, WANTED, None),
        ({"options": {"1": "甲", "2": "乙"}}, "首选药物是\n1. 甲\n2. 乙", None),
        ({"options": ["A. 甲", "B、乙"]}, "首选药物是\nA. 甲\nB、乙", None),
        ({"options": ["A.I.", "B"]}, "首选药物是\nA. A.I.\nB. B", None),
        ({"options": [1, 2.5]}, "首选药物是\nA. 1\nB. 2.5", "number taken as text"),
        ({"options": ["甲", "", "丙"]}, "首选药物是\nA. 甲\nC. 丙", None),
        ({"question": "问\nA. 甲\nB. 乙", "options": ["甲", "乙"]}, "问\nA. 甲\nB. 乙", None),
        ({"question": "问\nA、甲 B、乙", "options": {"A": "甲", "B": "乙"}}, "问\nA、甲 B、乙", None),
        ({"question": "是不是", "options": ["是", "不是"]}, "是不是\nA. 是\nB. 不是", None),
        ({"options": []}, "首选药物是", None),
        ({"options": {"A": None}, "choices": "null"}, "首选药物是", None),
    ],
)
def test_what_is_asked(row, question, remark):
    assert one("alpaca", ASKED | row) == ({"messages": chat(question, "B")}, remark)


@pytest.mark.parametrize(
    "value, reason",
    [
        ({"temperature": 0.7}, "options cannot be read"),
        ({"A": {"x": "甲"}, "B": "乙"}, "options cannot be read"),
        ([["甲"], ["乙"]], "options cannot be read"),
        ([{"x": "甲"}, {"x": "乙"}], "options cannot be read"),
        ({"label": ["A"], "text": ["甲", "乙"]}, "options cannot be read"),
        (list(map(str, range(100, 127))), "options cannot be read"),
        (4, "options is a number"),
    ],
)
def test_choices_that_cannot_be_read(value, reason):
    assert one("alpaca", ASKED | {"options": value}) == (None, reason)


def test_an_answer_that_counts_the_choices():
    row = ASKED | {"choices": ["上海", "北京"]}
    for answer in (0, 1, "2"):  # from 0 or from 1 cannot be told
        assert one("alpaca", row | {"output": answer}) == (None, "answer is the number of a choice")
    record, _ = one("alpaca", row | {"choices": ["1", "2"], "output": "2"})
    assert record["messages"][1]["content"] == "2"
    assert one("alpaca", row | {"output": "3"})[0]["messages"][1]["content"] == "3"


def test_choices_that_are_none():
    replies = [{"text": "答", "index": 0, "finish_reason": "stop"}]  # of OpenAI's API
    row = {"prompt": "问", "choices": replies}
    assert one("prompts", row) == ({"messages": chat("问"), "fields": {"choices": replies}}, None)
    row = {"question": "首选药物是", "options": ["甲", "乙"], "answers": ["好", "坏"]}
    assert adapt("ranked", row) == [({"messages": chat(WANTED), "chosen": "好", "rejected": "坏"}, None)]


@pytest.mark.parametrize(
    "layout, more", [("prompts", {}), ("prompts", {"ground_truth": "B"}), ("pairs", {"chosen": "乙", "rejected": "甲"})]
)
def test_columns_are_choices_whatever_the_answer_is_called(layout, more):
    [(record, _)] = adapt(layout, {"question": "首选药物是", "A": "甲", "B": "乙"} | more)
    assert record["messages"][0]["content"] == WANTED


def test_a_name_in_the_question_is_no_choice():
    question = "点A1和点B2在同一直线上吗"
    [(record, _)] = adapt("prompts", {"question": question, "A": "1", "B": "2"})
    assert record["messages"][0]["content"] == question + "\nA. 1\nB. 2"


def test_a_field_whose_name_goes_on_after_a_dot_is_kept():
    [(record, _)] = adapt("prompts", {"question": "问", "question.id": 7, "answer": "答"})
    assert record["fields"] == {"question.id": 7, "answer": "答"}
