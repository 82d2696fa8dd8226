"""corpora/fields.py and layouts.py: of several fields of a row, those that count, and what is said of the others."""

import pytest
from rows import chat, human_gpt, one

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
