"""corpora/marks.py: conversations in one text, by the marks of many models."""

import pytest
from rows import chat, one

from corpora import hints

TWO = chat("一", "甲", "二", "乙")
REMOVED = "marks of turns removed"
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"


@pytest.mark.parametrize(
    "text",
    [
        "[Round 1]\n\n问：一\n\n答：甲\n\n[Round 2]\n\n问：二\n\n答：乙",
        "[Round 1]\n问：一\n答：甲\n[Round 2]\n问：二\n答：乙",
        "Human: 一\n\nAssistant: 甲\n\nHuman: 二\n\nAssistant: 乙",
        "<s>[INST] 一 [/INST] 甲 </s><s>[INST] 二 [/INST] 乙 </s>",
        "[INST] 一 [/INST]甲</s>[INST] 二 [/INST]乙</s>",
        "<|user|>\n一<|assistant|>\n甲<|user|>\n二<|assistant|>\n乙",
        "[gMASK]<sop><|user|>\n一<|assistant|>\n甲<|user|>\n二<|assistant|>\n乙<|endoftext|>",
        "<|begin_of_text|>" + "".join(HEADER.format(turn["role"], turn["content"]) for turn in TWO),
        "### Instruction:\n一\n\n### Response:\n甲\n\n### Instruction:\n二\n\n### Response:\n乙",
    ],
)
def test_marks_of_a_conversation(text):
    assert one("messages", {"text": text}) == ({"messages": TWO}, None)
    assert hints.fitting({"text": text}) == {"messages"}


def test_system_and_input_between_marks():
    text = "<s>[INST] <<SYS>>\n规则\n<</SYS>>\n\n问 [/INST] 答 </s>"
    assert one("messages", {"text": text}) == ({"messages": chat("问", "答", system="规则")}, None)
    text = "<|system|>\n规则</s>\n<|user|>\n问</s>\n<|assistant|>\n答</s>"
    assert one("messages", {"text": text}) == ({"messages": chat("问", "答", system="规则")}, None)
    text = "Below is an instruction that asks.\n\n### Instruction:\n翻译\n\n### Input:\na\n\n### Response:\n甲</s>"
    assert one("messages", {"text": text}) == ({"messages": chat("翻译\na", "甲")}, None)


@pytest.mark.parametrize(
    "question, answer, wanted, remark",
    [
        ("Human: 一\n\nAssistant: 甲\n\nHuman: 二", "乙", TWO, REMOVED),
        ("Human: 一\n\nAssistant: 甲\n\nHuman: 二\n\nAssistant:", "乙", TWO, REMOVED),
        ("[Round 1]\n\n问：一\n\n答：甲\n\n[Round 2]\n\n问：二\n\n答：", "乙", TWO, REMOVED),
        ("<s>[INST] 一 [/INST]", "甲 </s>", chat("一", "甲"), REMOVED),
        ("Human: 问", "答", chat("问", "答"), REMOVED),
        ("<|user|>\n问", "答", chat("问", "答"), REMOVED),
        ("问", "答</s>", chat("问", "答"), REMOVED),
        ("问", "答<|im_end|>\n", chat("问", "答"), REMOVED),
        ("问：为何？", "答", chat("问：为何？", "答"), None),
        ("Human:", "答", chat("Human:", "答"), None),
        ("划掉", "<s>旧</s>", chat("划掉", "<s>旧</s>"), None),
    ],
)
def test_marks_around_questions_and_answers(question, answer, wanted, remark):
    assert one("alpaca", {"instruction": question, "output": answer}) == ({"messages": wanted}, remark)


def test_marks_speak_against_documents():
    for text in ("Human: 问", "<|user|>\n问", "[INST] 问"):
        assert hints.fitting({"text": text}) == set()
    assert hints.fitting({"text": "问：为何？没有人知道。"}) == {"text_rows"}


@pytest.mark.parametrize(
    "row, layouts",
    [
        ({"title": "题", "paragraphs": [{"context": "文", "qas": [{"question": "问"}]}]}, set()),
        ({"id": "1", "context": "文", "question": "问", "answers": {"text": ["答"], "answer_start": [0]}}, set()),
        ({"instruction": ["一", "二"], "output": ["甲", "乙"]}, set()),
        ({"prompt": "问", "response_0": "甲", "response_1": "乙", "better_response_id": 1}, set()),
        ({"instruction": "写成消息", "output": '[{"role": "user", "content": "你好"}]'}, {"alpaca"}),
        ({"title": "题", "paragraphs": ["一", "二"]}, {"chinese_poetry"}),
        ({"prompt": "问", "reward_model": {"ground_truth": "7"}}, {"prompts"}),
        ({"prompt": chat("问"), "responses": ["甲", "乙"]}, {"ranked"}),
        ({"title": "题", "summary": "述", "sections": [{"title": "", "content": "文"}]}, {"baike"}),
    ],
)
def test_layouts_that_fields_speak_for(row, layouts):
    assert hints.fitting(row) == layouts


@pytest.mark.parametrize("between", ["\n", "", " "])
def test_marks_that_need_no_line_of_their_own(between):
    text = f"### Human: 一{between}### Assistant: 甲{between}### Human: 二{between}### Assistant: 乙"
    assert one("messages", {"text": text}) == ({"messages": TWO}, None)


@pytest.mark.parametrize(
    "question, answer",
    [
        ("User: 写一段问答\nBot: ", "好的：\n问：多少钱？\n答：10元。\n就是这样。"),
        ("Human: 写一段问答\nAssistant: ", "好的：\n用户：多少钱？\n助手：10元。"),
        ("问：写一段问答\n答：", "User: how much?\nBot: 10"),
        ("### Instruction:\n写一段问答\n\n### Response:\n", "# 用法\n### Input:\n一个数\n### Response:\n一个数"),
    ],
)
def test_marks_of_another_kind_inside_an_answer_are_text(question, answer):
    assert one("messages", {"text": question + answer}) == ({"messages": chat("写一段问答", answer)}, None)


def test_a_doubled_mark_is_one():
    text = "### Instruction:\n问\n\n### Response:\n### Response:\n答"
    assert one("messages", {"text": text}) == ({"messages": chat("问", "答")}, None)


def test_texts_that_each_begin_with_a_mark():
    assert one("messages", {"data": ["问：一", "答：甲", "问：二", "答：乙"]}) == ({"messages": TWO}, None)
    texts = ["一：", "甲", "二", "乙"]
    assert one("messages", {"data": texts}) == ({"messages": chat(*texts)}, None)
