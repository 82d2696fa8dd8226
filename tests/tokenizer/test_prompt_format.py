"""The one prompt format: what a conversation becomes, and what of it fits."""

import random

import pytest

from tokenizer import (
    TokenizerError,
    encode_documents,
    encode_example,
    encode_examples,
    encode_opening,
    encode_pair,
    encode_prompt,
    fit_prompt,
    prompt_turns,
)


def chat(*texts, system=None):
    roles = ["user", "assistant"] * len(texts)
    messages = [dict(role=role, content=text) for role, text in zip(roles, texts, strict=False)]
    return messages if system is None else [dict(role="system", content=system), *messages]


def test_document_and_opening(tok):
    assert encode_documents(tok, ["好", ""]) == [[*tok.encode("好"), 2], [2]]
    assert encode_opening(tok, "好") == [2, *tok.encode("好")]


def test_conversation_layout_and_loss_mask(tok):
    q1, a1, q2, a2 = map(tok.encode, ("房间", "很好，干净", "书", "不好看"))
    example, note = encode_example(tok, chat("房间", "很好，干净", "书", "不好看"), 100)
    assert note is None
    assert example.ids == [*q1, 1, *a1, 2, *q2, 1, *a2, 2]
    mask = [0] * (len(q1) + 1) + [1] * (len(a1) + 1) + [0] * (len(q2) + 1) + [1] * (len(a2) + 1)
    assert example.loss_mask == mask
    prompt = encode_prompt(tok, chat("房间", "很好，干净", "书"))
    assert prompt == [*q1, 1, *a1, 2, *q2, 1] == example.ids[: len(prompt)]


def test_system_text_is_prefixed_to_the_first_question(tok):
    prompt = encode_prompt(tok, chat("房间", "很好", "书", system="你好"))
    assert prompt == encode_prompt(tok, chat("你好\n房间", "很好", "书"))


def test_control_pieces_typed_by_a_user_stay_text(tok):
    prompt = encode_prompt(tok, chat("</s><s>good"))
    assert prompt[-1] == 1 and all(i > 2 for i in prompt[:-1])
    assert tok.decode(prompt) == "</s><s>good"


def test_long_question_is_cut_on_its_left(tok):
    text = "这本书不好看" * 5
    question, answer = tok.encode(text), tok.encode("很好")
    messages = chat(text, "很好")
    room = len(answer) + 2  # <bos> and <eos>
    for fits in range(1, len(question)):
        example, note = encode_example(tok, messages, room + fits)
        kept = len(example.ids) - room
        assert note == "cut question" and example.ids[kept:] == [1, *answer, 2]
        assert text.endswith(tok.decode(example.ids[:kept])) and fits - 1 <= kept <= fits
        assert example.loss_mask == [0] * (kept + 1) + [1] * (len(answer) + 1)
    assert encode_example(tok, messages, room + len(question))[1] is None
    assert encode_example(tok, messages, room) == (None, "answer too long")
    with pytest.raises(TokenizerError, match="no room"):
        encode_prompt(tok, messages[:1], 1)


def test_oldest_turns_are_dropped_whole_and_the_system_text_stays(tok):
    messages = chat("房间", "很好", "书", "不好看", system="你好")
    last, _ = encode_example(tok, chat("书", "不好看", system="你好"))
    full, _ = encode_example(tok, messages)
    assert encode_example(tok, messages, len(full.ids)) == (full, None)
    for max_len in (len(full.ids) - 1, len(last.ids)):
        assert encode_example(tok, messages, max_len) == (last, "dropped turns")
    cut, note = encode_example(tok, messages, len(last.ids) - 1)
    assert (tok.decode(cut.ids), note) == ("好\n书不好看", "cut question")
    assert encode_prompt(tok, messages[:-1], len(last.ids) - len(tok.encode("不好看")) - 1) == encode_prompt(
        tok, chat("书", system="你好")
    )


def asked(tok, question, room, system=None):
    """(what is left of a question in `room` tokens, the note)."""
    ids, note = fit_prompt(tok, chat(question, system=system), room + 1)
    assert len(ids) <= room + 1 and ids[-1] == 1
    return tok.decode(ids), note


def test_a_long_prompt_begins_at_a_sentence(tok, glm):
    last = "这本书不好看，电脑很好"
    for t in (tok, glm):
        for before in ("酒店很好。", "房间干净！”\n", "hello world. ", "酒店很好，"):  # the last is a clause
            room = len(t.encode(before + last)) - 1
            assert asked(t, before * 9 + last, room) == (last, "cut question"), before
    room = len(tok.encode("LLO" + last))  # no word is cut
    assert asked(tok, "酒店HELLO" * 9 + last, room) == (last, "cut question")
    for t in (tok, glm):  # a sentence that begins behind the middle would leave too little
        text, note = asked(t, "酒店很好房间干净" * 9 + "。很好", 20)
        assert note == "cut question" and text.endswith("房间干净。很好") and len(text) > 10
        assert asked(t, "龘" * 50, len(t.encode("龘" * 7)))[0] == "龘" * 7  # characters of several tokens stay whole
        whole = len(t.encode("酒店。很好"))
        assert asked(t, "酒店。很好", whole) == ("酒店。很好", None)


def test_the_system_text_of_a_long_prompt_stays_where_there_is_room(tok, glm):
    question = "这本书不好看。" * 20 + "电脑很好"
    for t in (tok, glm):
        text, note = asked(t, question, 60, system="你好")
        assert note == "cut question" and text.startswith("你好\n这本书不好看。这本书") and text.endswith("电脑很好")
        text, note = asked(t, "电脑很好", 20, system=question)
        assert note == "cut question" and text.startswith("这本书不好看。") and text.endswith("\n电脑很好")


def test_the_turns_of_a_prompt_come_back(tok):
    for texts in (["好"], ["房间", "很好，干净", "书"], [" a ", "</s>", "龘 b"]):
        assert prompt_turns(tok, encode_prompt(tok, chat(*texts))) == texts
    assert prompt_turns(tok, tok.encode("好 吗")) == ["好 吗"]  # none that a model has to answer


def test_prompts_drop_turns_before_they_cut(tok):
    messages = chat("房间", "很好", "书", system="你好")
    whole, last = encode_prompt(tok, messages), encode_prompt(tok, chat("书", system="你好"))
    assert fit_prompt(tok, messages, len(whole)) == (whole, None)
    assert fit_prompt(tok, messages, len(whole) - 1) == (last, "dropped turns")
    assert fit_prompt(tok, messages, len(last) - 1)[1] == "cut question"
    assert fit_prompt(tok, messages, 1) == (None, "no room for the question")


def test_the_system_text_stays_in_training_too(tok):
    question, answer = "酒店很好。" + "房间" * 9, "干净" * 5
    room = len(tok.encode("你好\n" + "房间" * 9)) + len(tok.encode(answer)) + 2
    messages = [*chat("书", "很好", question, answer, system="你好")]
    examples, note, lost = encode_examples(tok, messages, room)
    assert (note, lost) == ("split; cut question", 0)
    assert [tok.decode(e.ids) for e in examples] == ["你好\n书很好", "你好\n" + "房间" * 9 + answer]


def trained(tok, example):
    """The answers with loss, in order."""
    ids = [i for i, bit in zip(example.ids, example.loss_mask, strict=True) if bit]
    return [tok.decode(part) for part in split_at(ids, tok.eos_id)]


def split_at(ids, end):
    parts = [[]]
    for i in ids:
        parts[-1].append(i)
        if i == end:
            parts.append([])
    assert parts.pop() == []
    return parts


def test_a_long_conversation_is_split_at_turns(tok):
    assert [len(tok.encode(text)) for text in ("AAAA", "S\nAAAA")] == [4, 6]  # a token a letter; a turn has 10
    texts = [letter * 4 for letter in "ABCDEFGHIJ"]
    messages = chat(*texts, system="S")
    whole, _ = encode_example(tok, messages)
    assert len(whole.ids) == 52 and encode_examples(tok, messages, 52) == ([whole], None, 0)
    assert [example.ids for example in encode_examples(tok, messages, 32)[0]] == [
        encode_prompt(tok, messages[:6]) + tok.encode("FFFF") + [2],
        encode_prompt(tok, [messages[0], *messages[5:10]]) + tok.encode("JJJJ") + [2],
    ]
    # 32: three turns under the system text, then one as context, which has 12 of at most 16 tokens, and two more
    assert encode_examples(tok, messages, 32)[0][1].loss_mask == [0] * 12 + ([0] * 5 + [1] * 5) * 2
    assert [trained(tok, example) for example in encode_examples(tok, messages, 32)[0]] == [
        ["BBBB", "DDDD", "FFFF"],
        ["HHHH", "JJJJ"],
    ]
    # 23: two turns, and none as context, which would have 12 of at most 11
    assert [trained(tok, example) for example in encode_examples(tok, messages, 23)[0]] == [
        ["BBBB", "DDDD"],
        ["FFFF", "HHHH"],
        ["JJJJ"],
    ]
    assert [len(example.ids) for example in encode_examples(tok, messages, 23)[0]] == [22, 22, 12]
    # 24: it fits, and leaves room for one more each time
    assert [len(example.ids) for example in encode_examples(tok, messages, 24)[0]] == [22] * 4


def test_every_answer_that_fits_is_trained_once_whatever_the_length(tok):
    rng = random.Random(7)
    for _ in range(300):
        texts = [f"{i}" + "Z" * rng.choice([1, 5, 10, 40, 90]) for i in range(rng.choice([2, 6, 16]))]
        messages = chat(*texts, system=rng.choice([None, "S" * 4, "S" * 40]))
        max_len = rng.randrange(10, 120)
        examples, note, lost = encode_examples(tok, messages, max_len)
        notes = (note or "").split("; ")
        assert all(len(e.ids) == len(e.loss_mask) <= max_len for e in examples)
        fit = [
            text for text in texts[1::2] if len(tok.encode(text)) + 3 <= max_len
        ]  # a token of the question, two ends
        assert [text for e in examples for text in trained(tok, e)] == fit
        assert lost == sum(len(tok.encode(text)) + 1 for text in texts[1::2] if text not in fit)
        assert (lost > 0) == (("answer left out" in notes) or note == "answer too long") and (len(examples) > 1) == (
            "split" in notes
        )
        whole, _ = encode_example(tok, messages)
        assert (note is None) == (len(whole.ids) <= max_len) and (note is not None or examples == [whole])


def test_one_long_turn_costs_no_other(tok):
    examples, note, lost = encode_examples(tok, chat("A", "B", "C", "D" * 30, "E", "F"), 30)
    assert [trained(tok, e) for e in examples] == [["B"], ["F"]] and (note, lost) == ("split; answer left out", 31)
    examples, note, lost = encode_examples(tok, chat("A", "B", "C" * 30, "D"), 30)
    assert [trained(tok, e) for e in examples] == [["B"], ["D"]] and (note, lost) == ("split; cut question", 0)
    assert tok.decode(examples[1].ids) == "C" * 27 + "D"
    assert encode_examples(tok, chat("A", "B" * 30), 30) == ([], "answer too long", 31)


def test_an_answer_that_is_not_trained_is_context(tok):
    messages = chat("房间", "很好", "书", "不好看")
    whole, _ = encode_example(tok, messages)
    for untrained, texts in ((1, ["不好看"]), (3, ["很好"])):
        marked = [m | dict(train=False) if i == untrained else m for i, m in enumerate(messages)]
        for example, note in (encode_example(tok, marked), encode_examples(tok, marked, 100)[0:2]):
            [example] = example if isinstance(example, list) else [example]
            assert (example.ids, note) == (whole.ids, None) and trained(tok, example) == texts
    none = [m | dict(train=False) for m in messages]
    assert encode_example(tok, none) == (None, "no answer to train on")
    assert encode_examples(tok, none, 100) == ([], "no answer to train on", 0)
    # those too long make no example and lose nothing
    marked = chat("A", "B" * 30, "C", "D", "E", "F" * 30)
    marked = [m | dict(train=False) if len(m["content"]) == 30 else m for m in marked]
    [example], note, lost = encode_examples(tok, marked, 30)
    assert (tok.decode(example.ids), note, lost) == ("CD", "dropped turns", 0)


def test_both_answers_of_a_pair_stand_under_one_prompt(tok):
    messages, short, long = chat("房间", "很好", "这本书不好看。电脑very  good"), "很好", "干净，hello hello"
    prompt, answers = encode_prompt(tok, messages), [[*tok.encode(text), 2] for text in (short, long)]
    whole = len(prompt) + len(answers[1])
    pair, note, _ = encode_pair(tok, messages, [short, long], whole)
    assert note is None and [e.ids for e in pair] == [prompt + answer for answer in answers]
    assert [e.loss_mask for e in pair] == [[0] * len(prompt) + [1] * len(answer) for answer in answers]
    for less, note in ((1, "dropped turns"), (8, "cut question")):
        for order in (1, -1):
            pair, found, _ = encode_pair(tok, messages, [short, long][::order], whole - less)
            cut = fit_prompt(tok, messages, len(prompt) - less)[0]
            assert found == note and [e.ids for e in pair] == [cut + answer for answer in answers[::order]]
    assert encode_pair(tok, messages, [short, long], len(answers[1]) + 1) == (
        [],
        "answer too long",
        sum(map(len, answers)),
    )
    assert encode_pair(tok, messages, [short, ""], 100) == ([], "empty answer", 0)


def test_malformed_conversations(tok):
    assert encode_example(tok, chat("房间"), 50) == (None, "no last answer")
    assert encode_example(tok, chat("房间", ""), 50) == (None, "empty answer")
    for messages in (
        [],
        chat("a", "b")[1:],
        chat("a") * 2,
        [dict(role="tool", content="a")],
        chat(system="a"),
    ):
        assert encode_example(tok, messages, 50) == (None, "roles out of order")
        with pytest.raises(TokenizerError, match="roles out of order"):
            encode_prompt(tok, messages)
    with pytest.raises(TokenizerError, match="must be the user's"):
        encode_prompt(tok, chat("a", "b"))
