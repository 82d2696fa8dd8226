"""corpora/turns.py and fields.py: odd values of rows, and what is read as a conversation."""

import json

import pytest
from rows import chat, human_gpt, one

from corpora.sources import list_units, read_records

THOUGHTS = "inner thoughts left out"
TWO = chat("一", "甲", "二", "乙")
SAID = json.dumps(chat("你好", "您好"), ensure_ascii=False)


@pytest.mark.parametrize(
    "text",
    ["{{1}, {2}}", "{{1}: 2}", "[{1}, {[]: 1}]", "{'a'}", "['", "{" * 5000, "[" * 5000, "{'a': {[]: 1}}", SAID],
)
@pytest.mark.parametrize("question", ["instruction", "prompt", "query"])
def test_text_that_looks_packed_stays_text(question, text):
    assert one("alpaca", {question: "问", "output": text}) == ({"messages": chat("问", text)}, None)
    if question == "instruction" or text != SAID:
        assert one("alpaca", {question: text, "output": "答"}) == ({"messages": chat(text, "答")}, None)


def test_prompts_that_are_json():
    trips = '[{"from": "北京", "to": "上海"}]'
    assert one("alpaca", {"prompt": trips, "response": "答"}) == ({"messages": chat(trips, "答")}, None)
    packed = json.dumps(chat("一"))
    assert one("alpaca", {"prompt": packed, "response": "甲"}) == ({"messages": chat("一", "甲")}, None)
    answer = json.dumps(chat("", "甲")[1:])
    assert one("alpaca", {"prompt": packed, "completion": answer}) == ({"messages": chat("一", "甲")}, None)
    row = {"prompt": packed, "question": "何人？", "response": "甲"}
    assert one("alpaca", row) == ({"messages": chat(f"{packed}\n何人？", "甲")}, None)


@pytest.mark.parametrize(
    "turns, wanted",
    [
        ([["用户", "一"], ["助手", "甲"], ["用户", "二"], ["助手", "乙"]], TWO),
        ([["human", "一"], ("gpt", "甲"), ["human", "二"], ["gpt", "乙"]], TWO),
        ([["system", "规则"], ["user", "问"], ["assistant", "答"]], chat("问", "答", system="规则")),
        ([["问", "答"]], chat("问", "答")),
        ([["问题", "一"], ["提问", "二"]], chat("问题", "一", "提问", "二")),
    ],
)
def test_pairs_of_role_and_text(turns, wanted):
    assert one("sharegpt", {"conversations": turns}) == ({"messages": wanted}, None)


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"prompt": "问", "completion": "答", "label": False}, "answer marked bad"),
        ({"prompt": "问", "answer": "答", "label": "False"}, "answer marked bad"),
        ({"messages": chat("问", "答"), "label": False}, "answer marked bad"),
        ({"instruction": "问", "output": "答", "kto_tag": False}, "answer marked bad"),
        ({"prompt": "问", "completion": "答", "label": True}, None),
        ({"prompt": "问", "completion": "答", "label": 0}, None),
        ({"question": "问", "answer": "答", "label": False}, None),
    ],
)
def test_answers_marked_bad(row, reason):
    for layout in ("alpaca", "messages"):
        assert one(layout, row) == (None if reason else {"messages": chat("问", "答")}, reason)


@pytest.mark.parametrize(
    "row, wanted, remark",
    [
        (
            {"question": "问", "A": "一", "B": 2, "C": "三", "D": "四", "answer": "B", "explanation": "因为"},
            chat("问\nA. 一\nB. 2\nC. 三\nD. 四", "B"),
            "number taken as text",
        ),
        ({"Question": "问", "A": "对", "B": "None", "Answer": "A"}, chat("问\nA. 对\nB. None", "A"), None),
        ({"problem": "问", "solution": "解", "answer": "7"}, chat("问", "解"), "answer left out, solution taken"),
        ({"problem": "问", "solution": None, "answer": "7"}, chat("问", "7"), None),
        ({"instruction": "问", "context": "景", "input": "入", "output": "答"}, chat("问\n景\n入", "答"), None),
        ({"instruction": "问", "context": "景", "input": "", "output": "答"}, chat("问\n景", "答"), None),
        ({"instruction": "问", "output": "答", "system_message": "规则"}, chat("问", "答", system="规则"), None),
        ({"question": "问", "reasoning": "想", "answer": "答"}, chat("问", "答"), THOUGHTS),
        ({"question": "问", "reasoning_content": "想", "answer": "答"}, chat("问", "答"), THOUGHTS),
        ({"question": "问", "thinking": " ", "answer": "答"}, chat("问", "答"), None),
    ],
)
def test_fields_beside_question_and_answer(row, wanted, remark):
    assert one("alpaca", row) == ({"messages": wanted}, remark)


@pytest.mark.parametrize("none", [None, "", "[]", "{}", "null", [], {}, {"name": None, "args": ""}, [{"id": None}]])
def test_tools_and_images_that_are_none(none):
    turns = chat("<image>怎么用？", "答")
    turns[1] |= {"tool_calls": none, "function_call": none, "reasoning_content": none}
    row = {"messages": turns, "tools": none, "functions": none, "images": none, "image": none}
    assert one("messages", row) == ({"messages": chat("<image>怎么用？", "答")}, None)


def test_tool_calls_and_thoughts_in_parts():
    parts = [{"type": "thinking", "thinking": "想"}, {"type": "text", "text": "答"}]
    turns = [*chat("问"), {"role": "assistant", "content": parts}]
    assert one("messages", {"messages": turns}) == ({"messages": chat("问", "答")}, THOUGHTS)
    turns = [*chat("问"), {"role": "assistant", "content": "答", "reasoning_content": "想"}]
    assert one("messages", {"messages": turns}) == ({"messages": chat("问", "答")}, THOUGHTS)
    turns = [*chat("问"), {"role": "assistant", "content": [{"type": "tool_use", "name": "查", "input": {}}]}]
    assert one("messages", {"messages": turns}) == (None, "tool calls")


@pytest.mark.parametrize(
    "history, before, remark",
    [
        ([["", "您好，我是助手"]], [], "greeting left out"),
        ([[None, "您好"]], [], "greeting left out"),
        ("[[None, '您好']]", [], "greeting left out"),
        ([["", "您好"], ["一", "甲"]], ["一", "甲"], "greeting left out"),
        (["一", "甲"], ["一", "甲"], None),
        ("用户：一\n助手：甲", ["一", "甲"], None),
        ("nan", [], None), ("NaN", [], None), ("None", [], None), ("null", [], None), ([[None, None]], [], None),
    ],
)  # fmt: skip
def test_histories(history, before, remark):
    row = {"instruction": "二", "output": "乙", "history": history}
    assert one("alpaca", row) == ({"messages": chat(*before, "二", "乙")}, remark)


def test_turns_with_numbers_of_any_length():
    turns = {"turn_" + "9" * 5000: {"Human": "二", "MOSS": "乙"}, "turn_8": {"Human": "一", "MOSS": "甲"}}
    assert one("moss", {"chat": turns}) == ({"messages": TWO}, None)


def test_a_row_that_is_a_list_of_messages(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ({"messages": TWO}, TWO, [1])) + "\n", encoding="utf-8")
    [unit] = list_units("x", "messages", str(path))
    results = [(record, note) for _, record, note in read_records(unit)]
    assert results == [({"messages": TWO}, None), ({"messages": TWO}, None), (None, "not an object")]


def test_lists_of_messages_after_one_that_is_odd(tmp_path):
    path, odd = tmp_path / "a.jsonl", [dict(role="user", content="一"), dict(role="assistant", tool_calls=[1])]
    path.write_text("\n".join(map(json.dumps, (odd, TWO))) + "\n", encoding="utf-8")
    [unit] = list_units("x", "messages", str(path))
    assert [record for _, record, _ in read_records(unit)] == [None, {"messages": TWO}]


# what stands beside questions and answers of a field each


@pytest.mark.parametrize(
    "more, wanted, note",
    [
        ({"image": "a.jpg"}, chat("一", "甲"), "cut at images"),
        ({"tool_calls": [{"name": "f"}]}, chat("一", "甲"), "cut at tool calls"),
        ({"image": None, "tool_calls": []}, TWO, None),
        ({"thinking": "想"}, TWO, THOUGHTS),
        ({"context": "文"}, chat("一", "甲", "文\n二", "乙"), "user turns joined"),
    ],
)
def test_fields_beside_the_sides_of_an_exchange(more, wanted, note):
    turns = [{"human": "一", "assistant": "甲"}, {"human": "二", "assistant": "乙"} | more]
    assert one("sharegpt", {"conversation": turns}) == ({"messages": wanted}, note)


@pytest.mark.parametrize("name", ["instruction", "input", "context"])
def test_a_text_beside_a_conversation_is_not_lost(name):
    above = {"messages": chat("关于张三的文章\n一", "甲", "二", "乙")}
    row = {name: "关于张三的文章", "conversations": TWO}
    assert one("sharegpt", row) == (above, f"{name} put before the first question")
    assert one("sharegpt", row | {name: "一"}) == ({"messages": TWO}, None)
    whole = "user: 一\nassistant: 甲"
    assert one("sharegpt", row | {name: whole}) == ({"messages": TWO}, f"{name} left out, the turns taken")
    kept = {name: ["张三", "李四"], "messages": chat("一"), "answer": "甲"}  # for reward functions
    assert one("prompts", kept)[0]["fields"] == {name: ["张三", "李四"], "answer": "甲"}
    asked = {name: "关于张三的文章", "prompt": chat("一"), "output": "甲"}
    assert one("alpaca", asked)[0] == {"messages": chat("关于张三的文章\n一", "甲")}


def test_who_answers_as_the_system():
    said = [dict(role=role, content=text) for role, text in zip(("usr", "sys") * 2, "一甲二乙", strict=True)]
    assert one("messages", {"messages": said}) == ({"messages": TWO}, "system taken as who answers")
    assert one("messages", {"messages": said[:2]})[0] is None  # one question, and a system text after it


def test_calls_of_tools_that_are_written_as_text():
    call = '<functioncall> {"name": "f"}'
    text = f"USER: 一\nASSISTANT: 甲\nUSER: 二\nASSISTANT: {call} <|endoftext|>\nFUNCTION RESPONSE: 3\nASSISTANT: 乙"
    assert one("messages", {"chat": text}) == ({"messages": chat("一", "甲")}, "cut at tool calls")
    turns = [*chat("一", "甲", "二", f"<tool_call>{call}"), dict(role="tool", content="3"), *chat("三", "乙")]
    assert one("messages", {"messages": turns}) == ({"messages": chat("一", "甲")}, "cut at tool calls")


# turns that are empty

EMPTY = "pair with an empty turn left out"


@pytest.mark.parametrize("blank", [None, "", " \n", "\u200b", "\ufeff\u3000", "\x1b[0m"])
def test_a_pair_with_an_empty_turn_costs_no_other(blank):
    said = ["一", "甲", "二", "乙", "三", "丙"]
    for i in range(1, 6):
        turns = human_gpt(*said)
        turns[i]["value"] = blank
        left = said[: i // 2 * 2] + said[i // 2 * 2 + 2 :]
        assert one("sharegpt", {"conversations": turns}) == ({"messages": chat(*left)}, EMPTY)
        texts = [each["value"] for each in turns]
        assert one("messages", {"dialogue": texts}) == ({"messages": chat(*left)}, EMPTY)
    asked = {"instruction": "问", "output": "答"}
    for history in ([["一", blank]], ["一", blank], [["", ""], ["一", blank]]):
        assert one("alpaca", asked | {"history": history}) == ({"messages": chat("问", "答")}, EMPTY)
    wanted = {"messages": chat("一", "甲", "问")}
    for pair in ([blank, blank], ["二", blank], [blank, "乙"], [], None):
        row = asked | {"history": [["一", "甲"], pair]}
        assert one("alpaca", row) == ({"messages": chat("一", "甲", "问", "答")}, EMPTY)
        row = {"prompt": "问", "history": row["history"]}
        assert one("prompts", row) == (wanted | {"fields": {}}, EMPTY)
        assert one("pairs", row | {"chosen": "好", "rejected": "坏"}) == (
            wanted | dict(chosen="好", rejected="坏"),
            EMPTY,
        )


def test_a_question_does_not_get_the_answer_of_the_next():
    two = {"human": "二", "assistant": "乙"}
    for one_sided in ({"human": "一"}, {"human": "一", "assistant": None}, {"human": None, "assistant": "甲"}):
        assert one("firefly", {"conversation": [two, one_sided, two]}) == ({"messages": chat("二", "乙") * 2}, EMPTY)
    sides = [{"human": "一", "assistant": None}, {"human": None, "assistant": "甲"}]  # a turn each, as Arrow has them
    assert one("firefly", {"conversation": sides}) == ({"messages": chat("一", "甲")}, None)


@pytest.mark.parametrize(
    "pairs, wanted, note",
    [
        ([["user", "一"], ["assistant", "甲"]], chat("一", "甲"), None),
        ([["user", "一"], ["user", "二"], ["assistant", "甲"]], chat("一\n二", "甲"), "user turns joined"),
        ([["human", "一"], ["gpt", "甲"], ["tool", "x"], ["gpt", "乙"]], chat("一", "甲"), "cut at tool calls"),
        ([["user", "甲"], ["user 二", "乙"]], chat("user", "甲", "user 二", "乙"), None),
    ],
)
def test_pairs_of_a_role_and_a_text(pairs, wanted, note):
    assert one("messages", {"messages": pairs}) == ({"messages": wanted}, note)


@pytest.mark.parametrize(
    "row, question",
    [
        ({"instruction": "把中文词语翻译成英文", "query": "中文"}, "把中文词语翻译成英文\n中文"),
        ({"prompt": "判断17这样的数是不是质数", "question": "7"}, "判断17这样的数是不是质数\n7"),
        ({"prompt": "Question: 1+1=?\nAnswer:", "question": "1+1=?"}, "Question: 1+1=?\nAnswer:"),
        ({"prompt": "请回答。\n1+1=?", "question": "1+1=?"}, "请回答。\n1+1=?"),
        ({"prompt": "请问一加一等于几，为什么等于它，说说看", "question": "一加一等于几，为什么等于它，说说"}, None),
    ],
)
def test_a_question_that_stands_in_the_prompt_already(row, question):
    record, note = one("alpaca", row | {"output": "答"})
    question = question or row["prompt"]
    assert record == {"messages": chat(question, "答")}
    again = question == row.get("prompt")
    assert note == ("question stands in the question already" if again else None)


@pytest.mark.parametrize("digits", ["0.10", "1e3", "3.14159265358979323846", "-0.0"])
def test_numbers_stay_as_they_are_written(tmp_path, digits):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"instruction": "问", "output": {digits}}}\n')
    [unit] = list_units("x", "alpaca", path)
    [(_, record, note)] = read_records(unit)
    assert (record, note) == ({"messages": chat("问", digits)}, "number taken as text")


def test_a_key_given_twice_in_a_file_that_is_one_row(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"role": "user", "content": "甲", "content": "乙"},\n {"role": "assistant", "content": "丙"}]\n')
    [unit] = list_units("x", "messages", path)
    [(_, record, note)] = read_records(unit)
    assert (record, note) == ({"messages": chat("乙", "丙")}, "content given twice, the last taken")
