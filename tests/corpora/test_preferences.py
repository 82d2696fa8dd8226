"""corpora/preferences.py: what a row becomes, for every layout of comparisons."""

import json

import pytest
from rows import adapt, chat, human_gpt, one

GOOD, BAD = {"role": "assistant", "content": "好"}, {"role": "assistant", "content": "坏"}


@pytest.mark.parametrize(
    "layout, row, reason",
    [
        ("pairs", {"prompt": "问", "chosen": "好", "rejected": "好 "}, "chosen equals rejected"),
        ("pairs", {"prompt": "问", "chosen": "好", "rejected": ""}, "no rejected"),
        ("pairs", {"prompt": "问", "rejected": "坏"}, "no chosen"),
        ("pairs", {"prompt": "问", "chosen": chat("甲", "好"), "rejected": chat("乙", "坏")},
         "chosen and rejected have different prompts"),
        ("pairs", {"messages": chat("问", "答"), "chosen": "好", "rejected": "坏"}, "no question"),
        ("pairs", {"prompt": "问", "chosen": {"from": "human", "value": "好"}, "rejected": "坏"}, "roles out of order"),
        ("ranked", {"instruction": "问", "output": {"甲": 1}}, "output is an object"),
    ],
)  # fmt: skip
def test_row_is_dropped(layout, row, reason):
    assert one(layout, row) == (None, reason)


@pytest.mark.parametrize("good, bad", [('["苹果"]', '["苹果", "石头"]'), ('["苹果"]', "苹果"), ("['苹果' '梨']", "无")])
def test_an_answer_that_is_a_list_as_asked_stays_one(good, bad):
    wanted = {"messages": chat("用 JSON 列出水果"), "chosen": good, "rejected": bad}
    assert one("pairs", {"prompt": "用 JSON 列出水果", "chosen": good, "rejected": bad}) == (wanted, None)
    asked = {"messages": chat("用 JSON 列出水果", good), "rejected": bad}
    assert one("pairs", asked) == (wanted, None)
    assert one("pairs", {"prompt": "问", "chosen": ["好"], "rejected": ["坏"]})[0]["chosen"] == "好"  # UltraFeedback's


def test_preference_rows_of_every_shape():
    wanted = {"messages": chat("问"), "chosen": "好", "rejected": "坏"}
    good, bad = {"from": "gpt", "value": "好"}, {"role": "assistant", "content": "坏"}
    rows = {
        "cvalues": [{"prompt": "问", "pos_resp": "好", "neg_resp": "坏", "pos_type": "拒绝为主"}],
        "rlhf_zh": [{"prompt": "问", "chosen": "好", "rejected": "坏"}],
        "zhihu_rlhf": [{"prompt": "问", "chosen": "好", "rejected": "坏"}],
        "hh_rlhf_cn": [
            {
                "context": [{"role": "human", "text": "问"}],
                "chosen": {"role": "assistant", "text": "好"},
                "rejected": {"role": "assistant", "text": "坏"},
            }
        ],
        "dpo_sharegpt": [{"conversations": human_gpt("问"), "chosen": good, "rejected": bad}],
        "pairs": [
            {"instruction": "问", "input": None, "chosen": good, "rejected": "坏"},
            {"messages": chat("问"), "chosen": "好", "rejected": [bad]},
            {"prompt": chat("问"), "chosen": [good], "rejected": [bad]},
            {"chosen": chat("问", "好"), "rejected": chat("问", "坏")},
            {"prompt": "问", "chosen": chat("问", "好"), "rejected": chat("问", "坏")},
        ],
    }
    for layout, examples in rows.items():
        for row in examples:
            assert one(layout, row) == (wanted, None), (layout, row)
    row = {"instruction": "三", "history": [["一", "二"]], "chosen": "好", "rejected": "坏"}
    assert one("pairs", row)[0]["messages"] == chat("一", "二", "三")
    row = {"prompt": chat("一"), "chosen": [bad, *chat("三"), good], "rejected": [bad, *chat("三"), bad]}
    assert one("pairs", row)[0]["messages"] == chat("一", "坏", "三")


def test_ranked_answers_give_every_pair_once():
    row = {"instruction": "问", "input": "", "history": [], "output": ["甲", "乙", "甲", "", "丙"]}
    results = adapt("ranked", row)
    assert [note for record, note in results if record is None] == ["answer given twice", "no answer"]
    found = [(record["chosen"], record["rejected"]) for record, _ in results if record]
    assert found == [("甲", "乙"), ("甲", "丙"), ("乙", "丙")]
    assert all(record["messages"] == chat("问") for record, _ in results if record)
    assert adapt("ranked", row | {"output": ["甲", "甲"]})[-1] == (None, "fewer than two answers")
    assert adapt("ranked", row | {"instruction": ""}) == [(None, "no question")]


@pytest.mark.parametrize(
    "row",
    [
        {"question": "问", "response_chosen": "好", "response_rejected": "坏", "system": "", "history": []},
        {"prompt": "问", "chosen_response": "好", "rejected_response": "坏"},
        {"query": "问", "response": "好", "rejected_response": "坏"},
        {"query": "问", "pos": ["好"], "neg": ["坏"]},
        {"question": "问", "response_accepted": "好", "response_rejected": "坏"},
        {"messages": chat("问", "好"), "rejected_response": "坏"},
        {"messages": chat("问", "好"), "rejected_messages": chat("问", "坏")},
        {"input": {"messages": chat("问")}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
        {"chosen": "\n\nHuman: 问\n\nAssistant: 好", "rejected": "\n\nHuman: 问\n\nAssistant: 坏"},
        {"chosen": json.dumps(chat("问", "好")), "rejected": json.dumps(chat("问", "坏"))},
        {"conversation": chat("问"), "chosen": GOOD, "rejected": BAD},
    ],
)  # fmt: skip
def test_names_of_the_better_and_the_worse(row):
    assert one("pairs", row) == ({"messages": chat("问"), "chosen": "好", "rejected": "坏"}, None)


def test_prompts_of_pairs_are_put_in_order():
    row = {"messages": chat("", "您好", "问")[1:], "chosen": "好", "rejected": "坏"}
    assert one("pairs", row) == ({"messages": chat("问"), "chosen": "好", "rejected": "坏"}, "greeting left out")
    record, remark = one("pairs", {"messages": chat("问", "好"), "chosen": "好", "rejected": "坏"})
    assert (record["messages"], remark) == (chat("问"), "answer at the end of the prompt left out")
    row = {"prompt": "1+1", "chosen": 2, "rejected": 3}
    assert one("pairs", row) == ({"messages": chat("1+1"), "chosen": "2", "rejected": "3"}, "number taken as text")
    row = {"messages": chat("问", "好"), "rejected_messages": chat("另问", "坏")}
    assert one("pairs", row) == (None, "chosen and rejected have different prompts")
    answers = {"chosen": '{"a": 1}', "rejected": "[1, 2]"}  # JSON may well be the answer
    assert one("pairs", {"prompt": "问"} | answers) == ({"messages": chat("问")} | answers, None)


@pytest.mark.parametrize(
    "row",
    [
        {"question": "问", "output": '["甲", "乙"]'},
        {"prompt": "问", "responses": [{"text": "甲"}, {"role": "assistant", "content": "乙"}]},
        {"prompt": "问", "answer2": "乙", "answer1": "甲", "answer3": "", "id": "7"},
        {"question": "问", "best": "甲", "worst": "乙", "source_id": 7},
    ],
)
def test_ranked_answers_of_every_shape(row):
    [(record, remark)] = adapt("ranked", row)
    assert record == {"messages": chat("问"), "chosen": "甲", "rejected": "乙"}
    assert remark in (None, "columns taken as answers, the best first")


def test_ranked_answers_that_cannot_be_told():
    why = "no output: answers are known by their columns' names, such as answer1, answer2"
    assert one("ranked", {"prompt": "问", "id": 3}) == (None, why)
    about = {"question": "怎么学习？", "qid": 11227, "date": "2010-09-08", "url": "http://a", "author": "张三"}
    assert one("ranked", about) == one("ranked", about | {"response": "好"}) == (None, why)
    for better, worse in (("response_j", "response_k"), ("answer_good", "answer_bad"), ("好回答", "差回答")):
        record, _ = one("ranked", about | {better: "好", worse: "差"})
        assert (record["chosen"], record["rejected"]) == ("好", "差")
    assert adapt("ranked", {"prompt": "问", "answers": ["甲", ["乙"]]}) == [
        (None, "no answer"),
        (None, "fewer than two answers"),
    ]


def test_ranked_texts_stand_under_an_empty_question():
    results = adapt("ranked_texts", {"text": '甲\t"乙"\t丙'})
    assert [(r["chosen"], r["rejected"]) for r, _ in results] == [("甲", '"乙"'), ("甲", "丙"), ('"乙"', "丙")]
    assert all(r["messages"] == chat("") and r["key"] == '甲\n"乙"\n丙' for r, _ in results)
    for header in ("text_a\ttext_b", "rank 1\trank 2\trank 3", "回答1\t回答2"):
        assert adapt("ranked_texts", {"text": header}) == [(None, "header")]
    assert adapt("ranked_texts", {"text": "好吃\t回答1"})[0][0]["chosen"] == "好吃"


@pytest.mark.parametrize(
    "scores, chosen",
    [
        ({"score_chosen": 7, "score_rejected": 5}, "好"),
        ({"score_chosen": 5, "score_rejected": 7.5}, "坏"),
        ({"chosen_rating": "2", "rejected_rating": "4"}, "坏"),
        ({"chosen_score": None, "rejected_score": 5}, "好"),
    ],
)
def test_scores_tell_the_better_of_a_pair(scores, chosen):
    record, remark = one("pairs", {"prompt": "问", "chosen": "好", "rejected": "坏"} | scores)
    assert (record["chosen"], {record["chosen"], record["rejected"]}) == (chosen, {"好", "坏"})
    assert remark == ("answers put in the order of their scores" if chosen == "坏" else None)


def test_a_pair_of_equal_scores_is_none():
    row = {"prompt": "问", "chosen": "好", "rejected": "坏", "score_chosen": 3, "score_rejected": 3}
    assert one("pairs", row) == (None, "answers of equal score")


def test_answers_that_are_json_of_messages():
    asked = {"chosen": json.dumps(chat("你好", "好")), "rejected": json.dumps(chat("你好", "坏"))}
    assert one("pairs", {"prompt": "写成消息"} | asked) == ({"messages": chat("写成消息")} | asked, None)
    wanted = {"messages": chat("问"), "chosen": "好", "rejected": "坏"}
    sides = {"chosen": json.dumps(chat("问", "好")), "rejected": json.dumps(chat("问", "坏"))}
    assert one("pairs", {"prompt": "问"} | sides) == (wanted, None)
    assert one("pairs", {"prompt": "问", "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD])}) == (wanted, None)
    assert one("pairs", {"prompt": json.dumps(chat("问")), "chosen": "好", "rejected": "坏"}) == (wanted, None)
    mixed = {"chosen": json.dumps([GOOD]), "rejected": "坏"}
    assert one("pairs", {"prompt": "问"} | mixed) == ({"messages": chat("问")} | mixed, None)


def test_marks_around_comparisons():
    wanted = {"messages": chat("问"), "chosen": "好", "rejected": "坏"}
    assert one("pairs", {"chosen": "[INST] 问 [/INST] 好</s>", "rejected": "[INST] 问 [/INST] 坏</s>"}) == (
        wanted,
        None,
    )
    row = {"prompt": "Human: 问", "chosen": "好</s>", "rejected": "坏</s>"}
    assert one("pairs", row) == (wanted, "marks of turns removed")
