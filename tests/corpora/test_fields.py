"""corpora/fields.py and layouts.py: of several fields of a row, those that count, and what is said of the others."""

import json

import numpy as np
import pytest
from rows import chat, human_gpt, one

from corpora.fields import unpacked

TWO = chat("一", "甲", "二", "乙")


@pytest.mark.parametrize(
    "layout, row, record, remark",
    [
        ("text_rows", {"text": "摘要", "content": "全文"}, {"text": "摘要"}, "content left out, text taken"),
        ("text_rows", {"text": "正文", "content": "正文 ", "body": "\u200b"}, {"text": "正文"}, None),
        ("text_rows", {"text": "\u200b", "content": "正文"}, {"text": "正文"}, None),
        ("chinese_poetry", {"title": "题", "paragraphs": ["一"], "content": "另一"},
         {"text": "题\n一"}, "content left out, paragraphs taken"),
        (
            "alpaca", {"instruction": "问", "prompt": "另问", "output": "答", "response": "另答"},
            {"messages": chat("问", "答")}, "prompt left out, instruction taken; response left out, output taken",
        ),
        (
            "messages", {"messages": chat("问", "答"), "conversations": human_gpt("另问", "另答")},
            {"messages": chat("问", "答")}, "conversations left out, messages taken",
        ),
        ("messages", {"messages": chat("问", "答"), "conversations": human_gpt("问", "答")},
         {"messages": chat("问", "答")}, None),
        (
            "sharegpt", {"conversations": [{"from": "human", "value": "问", "text": "另问"}, *human_gpt("", "答")[1:]]},
            {"messages": chat("问", "答")}, "text left out, value taken",
        ),
        ("sharegpt", {"conversations": [*human_gpt("问"), {"from": "gpt", "value": "", "text": "答"}]},
         {"messages": chat("问", "答")}, None),
        ("messages", {"chat": [{"human": "问", "assistant": "答", "response": "另答"}]},
         {"messages": chat("问", "答")}, "response left out, assistant taken"),
        ("pairs", {"prompt": "问", "chosen": "好", "good": "另一好", "rejected": "坏"},
         {"messages": chat("问"), "chosen": "好", "rejected": "坏"}, "good left out, chosen taken"),
    ],
)  # fmt: skip
def test_of_two_texts_of_one_kind_the_other_is_named(layout, row, record, remark):
    assert one(layout, row) == (record, remark)


def test_columns_go_by_chinese_and_capital_names_too():
    for asked in (
        {"指令": "译", "输入": "你好", "输出": "hello"},
        {"Instruction": "译", "Context": "你好", "Answer": "hello"},
    ):
        assert one("alpaca", asked) == ({"messages": chat("译\n你好", "hello")}, None)
    row = {"系统": "简短", "问题": "问", "回答": "答"}
    assert one("alpaca", row) == ({"messages": chat("问", "答", system="简短")}, None)


def test_lists_in_cells_as_json_python_and_numpy_print_them():
    wanted = ["甲 '乙'", "丙\n丁"]
    for text in (json.dumps(wanted), str(wanted), str(np.array(wanted, object)), "[\"甲 '乙'\"\n '丙\\n丁']"):
        assert unpacked(text) == wanted
    messages = chat("问", "答", "再问", "再答")
    assert unpacked(str(np.array(messages, object))) == messages
    assert one("messages", {"messages": str(np.array(messages, object))}) == ({"messages": messages}, None)
    assert unpacked("['a' + 'b']") == "['a' + 'b']" and unpacked("[1, 2") == "[1, 2"
    assert list(map(str, unpacked("[1.50, 1e3, 7]"))) == ["1.50", "1e3", "7"]


@pytest.mark.parametrize("value", [3, "3", True, "2024-05-01", ["3,4", "5,6"], [["3", "4"]], {"id": 3}, [{"x": 3}]])
@pytest.mark.parametrize("name", ["data", "turns"])
def test_data_beside_a_question(name, value):
    asked = {"question": "哪个大", name: value}
    assert one("prompts", asked) == ({"messages": chat("哪个大"), "fields": {name: value}}, None)
    assert one("prompts", {"text": "哪个大", name: value})[0]["messages"] == chat("哪个大")
    for layout in ("alpaca", "messages"):
        assert one(layout, asked | {"answer": "后者"}) == ({"messages": chat("哪个大", "后者")}, None)
    pair = {"chosen": "好", "rejected": "坏"}
    assert one("pairs", asked | pair) == ({"messages": chat("哪个大")} | pair, None)
    assert one("firefly", {"input": "哪个大", "target": "后者", name: value})[0]["messages"] == chat("哪个大", "后者")
    assert one("messages", {"messages": TWO, name: value}) == ({"messages": TWO}, None)


def test_a_conversation_is_messages_where_the_row_asks():
    row = {"question": "问", "answer": "答"}
    assert one("messages", row | {"chat": "文本"}) == ({"messages": chat("问", "答")}, "chat left out: text")
    assert one("messages", row | {"chat": {"id": 3}}) == ({"messages": chat("问", "答")}, "chat left out: an object")
    assert one("messages", row | {"chat": TWO}) == ({"messages": TWO}, None)
    assert one("messages", {"turns": 3, "text": "### Human: 一\n### Assistant: 甲"})[0]["messages"] == chat("一", "甲")
    answers = {"chosen": "\n\nHuman: 问\n\nAssistant: 好", "rejected": "\n\nHuman: 问\n\nAssistant: 坏"}
    assert one("pairs", answers | {"turns": 3})[0] == {"messages": chat("问"), "chosen": "好", "rejected": "坏"}


@pytest.mark.parametrize("layout", ["alpaca", "messages", "firefly", "prompts"])
@pytest.mark.parametrize("names", [("instruction", "output"), ("question", "answer"), ("input", "output")])
def test_rows_in_a_field_are_no_turns(layout, names):
    rows = [dict(zip(names, texts, strict=True)) for texts in (("一", "甲"), ("二", "乙"))]
    assert one(layout, {"title": "数据集", "data": rows}) == (None, "data holds rows, not turns")
