"""corpora/rankings.py: scores beside and in several answers, and answers in columns."""

import pytest
from rows import adapt, chat

ORDERED = "answers put in the order of their scores"
BETTER = dict(response_0="甲", response_1="乙", is_response_0_safe=True, safer_response_id=0)


@pytest.mark.parametrize(
    "row",
    [
        {"query": "问", "responses": ["甲", "乙"], "scores": [0.1, 0.9]},
        {"query": "问", "responses": ["甲", "乙"], "scores": "[0.1, 0.9]"},
        {"query": "问", "responses": ["甲", "乙"], "scores": [1, 2], "response_ids": [7, 8]},
        {"prompt": "问", "answers": ["甲", "乙"], "rank": [2, 1]},
        {"prompt": "问", "answers": [{"text": "甲", "score": 1}, {"text": "乙", "score": "2"}]},
        {"prompt": "问", "answers": [{"answer": "甲", "rank": 2}, {"answer": "乙", "rank": 1}]},
        {
            "instruction": "问",
            "completions": [
                {"response": "甲", "overall_score": 6.5, "fine-grained_score": 9},
                {"response": "乙", "overall_score": 8.0, "fine-grained_score": 1},
            ],
        },
        {"prompt": "问", "better_response_id": 1} | BETTER,
        {"prompt": "问", "responses": ["甲", "乙"], "better_response_id": 1.0},
        {"question": "问", "answer1": "甲", "answer2": "乙", "score1": 0.1, "score2": 0.9},
        {"question": "问", "answer_b": "乙", "answer_a": "甲", "score_a": 0.1, "score_b": 0.9, "model_a": "x"},
    ],
)
def test_scores_order_the_answers(row):
    assert adapt("ranked", row) == [({"messages": chat("问"), "chosen": "乙", "rejected": "甲"}, ORDERED)]


def test_answers_of_equal_score_are_no_pair():
    results = adapt("ranked", {"prompt": "问", "answers": ["甲", "乙", "丙"], "scores": [1, 2, 1]})
    assert [(r["chosen"], r["rejected"]) for r, _ in results if r] == [("乙", "甲"), ("乙", "丙")]
    assert [note for r, note in results if r is None] == ["answers of equal score"]
    row = {"prompt": "问", "better_response_id": -1} | BETTER
    assert adapt("ranked", row) == [(None, "answers of equal score")]


@pytest.mark.parametrize(
    "row",
    [
        {"answers": ["甲", "乙"], "scores": [1]},
        {"answers": ["甲", "乙"], "scores": [1, None]},
        {"answers": ["甲", "乙"], "goodness": [0.1, 0.9]},
        {"answers": ["甲", "乙"], "label": 1},
        {"answers": ["甲", "乙"], "winner": "model_b"},
        {"answers": [{"text": "甲", "my_score": 1}, {"text": "乙", "my_score": 2}]},
        {"answers": [{"text": "甲", "score": 1}, {"text": "乙"}]},
        {"answer1": "甲", "answer2": "乙", "overall_preference": -2},
        {"answer1": "甲", "answer2": "乙", "vote1": 1, "vote2": 2},
        {"answers": [{"text": "甲", "like_count": 1}, {"text": "乙", "like_count": 9}]},
        {"answers": [{"text": "甲", "点赞数": 1}, {"text": "乙", "点赞数": 9}]},
        {"answers": [{"text": "甲", "helpfulness": 1.5}, {"text": "乙", "helpfulness": 4}]},
        {"answer1": "甲", "answer2": "乙", "likes1": 1, "likes2": 9},
    ],
)
def test_scores_that_cannot_be_told(row):
    assert adapt("ranked", {"prompt": "问"} | row) == [(None, "answers with scores, not in order")]


def test_numbers_that_are_no_scores():
    row = {"prompt": "问", "output": ["甲", "乙"], "token_counts": [3, 4], "score": 5, "label": "医疗"}
    assert adapt("ranked", row) == [({"messages": chat("问"), "chosen": "甲", "rejected": "乙"}, None)]
    answers = [{"text": "甲", "answer_id": 1, "created": 3}, {"text": "乙", "answer_id": 2, "created": 4}]
    assert [record["chosen"] for record, _ in adapt("ranked", {"prompt": "问", "answers": answers})] == ["甲"]
    row = {
        "prompt": "问",
        "answer2": "乙",
        "answer" + "9" * 5000: "丙",
        "answer1": "甲",
        "source1": "x",
        "source2": "y",
    }
    found = [(record["chosen"], record["rejected"]) for record, _ in adapt("ranked", row)]
    assert found == [("甲", "乙"), ("甲", "丙"), ("乙", "丙")]


@pytest.mark.parametrize(
    "row",
    [
        {"output": [{"text": "坏", "label": 0}, {"text": "好", "label": 1}]},
        {"output": [{"text": "坏", "is_best": False}, {"text": "好", "is_best": True}]},
        {"output": [{"text": "坏", "quality": "low"}, {"text": "好", "quality": "high"}]},
        {"output": ["坏", "好"], "rankings": ["2", "1"]},
        {"output": ["坏", "好"], "labels": ["bad", "good"]},
        {"output": ["坏", "好"], "best": "b"},
        {"output": ["坏", "好"], "correct": 1},
        {"answer_a": "坏", "answer_b": "好", "better": "B"},
        {"answer_a": "坏", "answer_b": "好", "chosen": "answer_b"},
    ],
)
def test_a_label_that_cannot_be_read_drops_the_row(row):
    assert adapt("ranked", {"question": "问"} | row) == [(None, "answers with scores, not in order")]


@pytest.mark.parametrize("beside", [{"label": "体育"}, {"category": "A"}, {"level": 3}])
def test_what_says_nothing_of_the_answers_is_passed_over(beside):
    [(record, note)] = adapt("ranked", {"question": "问", "output": ["好", "坏"]} | beside)
    assert (record["chosen"], record["rejected"], note) == ("好", "坏", None)
    answers = [{"text": "好", "label": "回答"}, {"text": "坏", "label": "回答"}]
    [(record, note)] = adapt("ranked", {"question": "问", "output": answers} | beside)
    assert (record["chosen"], record["rejected"]) == ("好", "坏")
