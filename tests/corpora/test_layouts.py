"""corpora/layouts.py and turns.py: what a row becomes, for every layout of documents, conversations and prompts."""

import datetime
import json

import pytest
from rows import adapt, chat, human_gpt, one


@pytest.mark.parametrize(
    "layout, row, text",
    [
        ("wikipedia", {"completion": "昭通机场位于云南。", "source": "wikipedia.zh2307"}, "昭通机场位于云南。"),
        ("pretrain_zh", {"dataType": "book", "title": None, "content": "正文", "dataId": 1}, "正文"),
        ("pretrain_zh", {"title": " 书名 ", "content": "正文"}, "书名\n正文"),
        ("text_rows", {"title": "数学", "text": "数学是一门学科。"}, "数学是一门学科。"),
        ("text_rows", {"title": float("nan"), "body": "正文"}, "正文"),
        ("text_rows", {"id": 1, "标题": "数学", "内容": "是一门学科。"}, "数学\n是一门学科。"),
        ("webnovel", {"title": "书", "chapter": "第一章", "text": "话说天下大势"}, "书\n第一章\n话说天下大势"),
        ("webnovel", {"title": "书", "chapter": "第一章", "text": "第一章 桃园"}, "书\n第一章 桃园"),
        ("zhihu", {"INSTRUCTION": "怎么办？", "RESPONSE": "等等看。", "METADATA": "{}"}, "怎么办？\n等等看。"),
        (
            "chinese_poetry",
            {"rhythmic": "词牌", "author": "某", "paragraphs": ["一，", "二"]},
            "词牌\n某\n一，\n二",
        ),
        ("chinese_poetry", {"title": "关雎", "content": ["关关雎鸠"]}, "关雎\n关关雎鸠"),
    ],
)
def test_pretraining_rows(layout, row, text):
    assert one(layout, row) == ({"text": text}, None)


def test_baike_joins_its_sections():
    row = {"title": "红楼梦", "summary": None, "tags": ["书"], "url": "u", "uid": "1"}
    row["sections"] = [{"title": "作者", "content": "曹雪芹。"}, {"title": "", "content": "又名石头记。"}]
    assert one("baike", row) == ({"text": "红楼梦\n作者\n曹雪芹。\n又名石头记。"}, None)
    assert one("baike", row | {"summary": "《红楼梦》", "sections": []})[0]["text"] == "红楼梦\n《红楼梦》"
    assert one("baike", row | {"summary": "红楼梦是小说。", "sections": None})[0]["text"] == "红楼梦是小说。"
    assert one("baike", row | {"sections": []}) == (None, "empty text")
    assert one("baike", row | {"sections": ["作者"]}) == (None, "no sections")


@pytest.mark.parametrize(
    "layout, row, reason",
    [
        ("wikipedia", {"completion": " \n"}, "empty text"),
        ("text_rows", {"text": None}, "no text"),
        ("text_rows", {"text": float("nan")}, "no text"),
        ("text_rows", {"text": ["文"], "title": "题"}, "text is a list"),
        ("chinese_poetry", {"name": "李白", "desc": "诗人"}, "no paragraphs"),
        ("chinese_poetry", {"title": "题", "author": "某", "paragraphs": [""]}, "empty text"),
        ("alpaca", {"input": "", "output": "答"}, "no instruction"),
        ("alpaca", {"instruction": "问", "input": {}, "output": "答"}, "input is an object"),
        ("alpaca", {"instruction": "问", "output": None}, "no output"),
        ("alpaca", {"instruction": "问", "output": " "}, "no answer"),
        ("alpaca", {"instruction": "", "input": " ", "output": "答"}, "no question"),
        ("alpaca", {"instruction": "问", "output": "答", "history": ["一"]}, "history not pairs"),
        ("alpaca", {"instruction": "问", "output": "答", "history": 7}, "history not pairs"),
        ("firefly", {"kind": "NER", "input": "问"}, "no target"),
        ("sharegpt", {"conversations": []}, "no conversations"),
        ("sharegpt", {"conversations": [3]}, "turn is a number"),
        ("sharegpt", {"conversations": [{"from": "narrator", "value": "1"}]}, "unknown role narrator"),
        ("sharegpt", {"conversations": [{"from": "human", "value": [1]}]}, "turn without text"),
        ("sharegpt", {"conversations": human_gpt("问")}, "no answer"),
        ("sharegpt", {"conversations": human_gpt("问", "答")[1:]}, "no question"),
        ("sharegpt", {"conversations": human_gpt("问", "\u200b")}, "no answer"),
        ("sharegpt", {"conversations": human_gpt("", "答")}, "no question"),
    ],
)  # fmt: skip
def test_row_is_dropped(layout, row, reason):
    assert one(layout, row) == (None, reason)


def test_instruction_rows():
    row = {"instruction": "翻译：", "input": "hello", "output": "你好"}
    assert one("belle", row) == ({"messages": chat("翻译：\nhello", "你好")}, None)
    for blank in (None, "", " ", float("nan")):
        assert one("sft_zh", row | {"input": blank}) == ({"messages": chat("翻译：", "你好")}, None)
    row |= {"history": [["一", "二"], ["三", "四"]], "system": "你是翻译。", "input": None}
    assert one("alpaca", row)[0]["messages"] == chat("一", "二", "三", "四", "翻译：", "你好", system="你是翻译。")
    assert one("alpaca", {"prompt": "问", "response": "答"})[0]["messages"] == chat("问", "答")
    assert one("firefly", {"kind": "NER", "input": "问", "target": "答"})[0]["messages"] == chat("问", "答")


def test_alpaca_template_is_removed():
    preamble = "Below is an instruction that describes a task.\n\n"
    question = f"{preamble}### Instruction:\n翻译\n\n### Input:\nhello\n\n### Response:"
    row = {"instruction": question, "output": "### Response:\n### Response: 你好\n\n### Instruction:"}
    record, note = one("alpaca", row)
    assert record["messages"] == chat("翻译\nhello", "你好")
    assert note == "prompt template removed; doubled response marker removed"
    row = {"instruction": "问", "output": "### Instruction:\n问\n\n### Response:\n答\n### 小结\n完"}
    assert one("alpaca", row) == ({"messages": chat("问", "答\n### 小结\n完")}, "doubled response marker removed")
    kept = {"instruction": "解释“### Response:”一词", "output": "### 标题\n正文 ### Response: 是标记"}
    assert one("alpaca", kept) == ({"messages": chat(kept["instruction"], kept["output"])}, None)


def test_conversations():
    turns = human_gpt("问", "答", "再问", "再答")
    assert one("sharegpt", {"conversations": turns}) == ({"messages": chat("问", "答", "再问", "再答")}, None)
    assert one("sharegpt", {"conversations": turns[:3]}) == ({"messages": chat("问", "答")}, "last human turn dropped")
    with_system = {"conversations": [{"from": "system", "value": "规则"}, *turns[:2]], "system": "别的"}
    assert one("sharegpt", with_system)[0]["messages"] == chat("问", "答", system="规则")
    assert one("sharegpt", with_system | {"conversations": turns[:2]})[0]["messages"] == chat("问", "答", system="别的")
    for name in ("messages", "conversations"):
        row = {name: chat("问", "答", system="规则"), "messages" if name == "conversations" else "other": None}
        assert one("messages", row)[0]["messages"] == chat("问", "答", system="规则")


# values of odd types


@pytest.mark.parametrize(
    "layout, row, text, remark",
    [
        ("text_rows", {"title": 1984, "text": "正文"}, "1984\n正文", "number taken as text"),
        ("text_rows", {"title": {"a": 1}, "text": "正文"}, "正文", "title left out: an object"),
        ("text_rows", {"title": ["a"], "text": "正文"}, "正文", "title left out: a list"),
        ("text_rows", {"title": datetime.date(1984, 1, 2), "text": "正文"}, "1984-01-02\n正文", "date taken as text"),
        ("text_rows", {"text": {"a": 1}, "content": "正文"}, "正文", "text left out: an object"),
        ("text_rows", {"text": [], "content": "正文"}, "正文", None),
        ("text_rows", {"text": "", "content": "正文"}, "正文", None),
        ("text_rows", {"text": 3.5}, "3.5", "number taken as text"),
        ("baike", {"title": 7, "summary": "七。", "sections": "[]"}, "7\n七。", "number taken as text"),
        ("chinese_poetry", {"title": "题", "author": 5, "content": "一\n二"}, "题\n5\n一\n二", "number taken as text"),
        ("chinese_poetry", {"chapter": "学而", "para": ["子曰"]}, "学而\n子曰", None),
        (
            "chinese_poetry",
            {"title": "书", "author": "某", "content": [{"chapter": "甲", "para": ["一"]}, {"para": "二"}]},
            "书\n某\n甲\n一\n二",
            None,
        ),
    ],
)  # fmt: skip
def test_odd_values_of_documents(layout, row, text, remark):
    assert one(layout, row) == ({"text": text}, remark)


@pytest.mark.parametrize(
    "answer, result, note",
    [
        (3, "3", "number taken as text"),
        (0, "0", "number taken as text"),
        (2.5, "2.5", "number taken as text"),
        (False, "false", "boolean taken as text"),
        (float("nan"), None, "no output"),
        ({"人物": "老周"}, None, "output is an object"),
        (["甲", "乙"], None, "output is a list"),
        (b"\xff", None, "output is bytes"),
    ],
)
def test_an_answer_that_is_no_text(answer, result, note):
    record, said = one("alpaca", {"instruction": "问", "output": answer})
    assert (record and record["messages"] == chat("问", result), said) == (result and True, note)


# the shapes of a conversation

TURN = {"Inner Thoughts": "<|Inner Thoughts|>: None<eot>\n", "Commands": "<|Commands|>: None<eoc>\n"}
MOSS = {
    "turn_1": {"Human": "<|Human|>: 一<eoh>\n", **TURN, "MOSS": "<|MOSS|>: 甲<eom>\n"},
    "turn_2": {"Human": "<|Human|>: 二<eoh>\n", **TURN, "MOSS": "<|MOSS|>: 乙<eom>\n"},
    "turn_10": {"Human": "<|Human|>: 三<eoh>\n", **TURN, "MOSS": "<|MOSS|>: 丙<eom>\n"},
}
MARKED = "<s>Human: 一\n</s><s>Assistant: 甲\nHuman: 不是标记\n</s><s>Human: 二\n</s><s>Assistant: 乙\n</s>"
TWO = chat("一", "甲", "二", "乙")


@pytest.mark.parametrize("layout", ["messages", "alpaca", "firefly", "moss"])
@pytest.mark.parametrize(
    "row",
    [
        {"conversation": [{"human": "一", "assistant": "甲"}, {"human": "二", "assistant": "乙"}]},
        {"conversation": [{"input": "一", "output": "甲"}, {"input": "二", "output": "乙"}]},
        {"messages": [{"question": "一", "answer": "甲", "model": "m-1"}, {"question": "二", "answer": "乙"}]},
        {"messages": TWO},
        {"messages": json.dumps(TWO)},
        {"messages": str(TWO)},
        {"messages": {"role": ["user", "assistant"] * 2, "content": ["一", "甲", "二", "乙"]}},
        {"messages": None, "dialogue": [["一", "甲"], ["二", "乙"]]},
        {"data": ["一", "甲", "二", "乙"]},
        {"messages": [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in TWO]},
        {"chat": {name: MOSS[name] for name in ("turn_2", "turn_1")}},
        {
            "chat.turn_2.Human": "<|Human|>: 二<eoh>\n", "chat.turn_2.MOSS": "<|MOSS|>: 乙<eom>\n",
            "chat.turn_1.Human": "<|Human|>: 一<eoh>\n", "chat.turn_1.MOSS": "<|MOSS|>: 甲<eom>\n",
            "chat.turn_3.Human": "", "chat.turn_3.MOSS": "",
        },
        {"text": "<|im_start|>user\n一<|im_end|>\n<|im_start|>assistant\n甲<|im_end|>\n"
                 "<|im_start|>user\n二<|im_end|>\n<|im_start|>assistant\n乙<|im_end|>"},
        {"plain_text": "[Human]: 一<eoh>\n[MOSS]: 甲<eoa>\n[Human]: 二<eoh>\n[MOSS]: 乙<eoa>"},
        {"text": "### Human: 一\n### Assistant: 甲\n### Human: 二\n### Assistant: 乙"},
    ],
)  # fmt: skip
def test_shapes_of_a_conversation(layout, row):
    assert one(layout, row) == ({"messages": TWO}, None)


def test_marks_in_a_text():
    wanted = chat("一", "甲\nHuman: 不是标记", "二", "乙")
    assert one("messages", {"text": MARKED}) == ({"messages": wanted}, None)
    row = {"input": "<s>Human: 一\n</s><s>Assistant: ", "target": "甲</s>"}
    assert one("alpaca", row) == ({"messages": chat("一", "甲")}, "marks of turns removed")
    row = {"instruction": "Human:一\nAssistant:甲\nHuman:二\nAssistant:", "input": "", "output": "乙"}
    assert one("belle", row) == ({"messages": TWO}, "marks of turns removed")
    for text in ("问：为什么？\n请回答。", "Human: 一\nAssistant: 甲"):
        assert one("alpaca", {"instruction": text, "output": "答"}) == ({"messages": chat(text, "答")}, None)
    assert one("messages", {"text": "没有标记的正文"}) == (None, "no messages")


def test_moss_turns_stand_in_order_and_tools_end_a_conversation():
    row = {"meta_instruction": "You are an AI assistant", "chat": dict(reversed(MOSS.items()))}
    wanted = chat("一", "甲", "二", "乙", "三", "丙")
    assert one("moss", row) == ({"messages": wanted}, "meta_instruction left out")
    called = MOSS["turn_2"] | {"Commands": '<|Commands|>: Search("x")<eoc>\n'}
    assert one("moss", {"chat": MOSS | {"turn_2": called}}) == ({"messages": chat("一", "甲")}, "cut at tool calls")
    thought = MOSS["turn_1"] | {"Inner Thoughts": "<|Inner Thoughts|>: 想一想<eot>\n"}
    assert one("moss", {"chat": {"turn_1": thought}}) == ({"messages": chat("一", "甲")}, "inner thoughts left out")


@pytest.mark.parametrize(
    "row",
    [
        {"query": "问", "response": "答"},
        {"question": "问", "answer": "答"},
        {"prompt": "问", "completion": "答"},
        {"prompt": chat("问"), "completion": chat("", "答")[1:]},
        {"question": "问", "class": "math", "std_answer": "答"},
        {"input": "问", "target": "答"},
        {"ask": "问", "answer": "答", "department": "内科"},
        {"instruction": "问", "input": "", "output": "答", "history": "[]"},
        {"instruction": "问", "output": "答", "history": float("nan")},
        {"prompt": "问", "question": "问", "answer": "答"},
    ],
)
def test_names_of_question_and_answer(row):
    for layout in ("alpaca", "messages", "firefly"):
        assert one(layout, row) == ({"messages": chat("问", "答")}, None)


def test_other_fields_of_a_question():
    row = {"instruction": "翻译", "context": "hello", "response": "你好"}
    assert one("alpaca", row)[0]["messages"] == chat("翻译\nhello", "你好")
    assert one("alpaca", {"instruction": "回答", "question": "为何", "output": "答"})[0]["messages"] == chat(
        "回答\n为何", "答"
    )
    assert one("alpaca", {"instruction": "重复：是", "input": "是", "output": "是"})[0]["messages"] == chat(
        "重复：是\n是", "是"
    )
    for history in ('[["一", "甲"]]', "[('一', '甲')]", [["一", "甲"]], chat("一", "甲")):
        row = {"query": "二", "response": "乙", "system": "规则", "history": history}
        assert one("alpaca", row) == ({"messages": chat("一", "甲", "二", "乙", system="规则")}, None)
    seeds = {"instruction": "翻译", "instances": [{"input": "a", "output": "甲"}, {"input": "", "output": "乙"}]}
    assert [record["messages"] for record, _ in adapt("belle", seeds)] == [chat("翻译\na", "甲"), chat("翻译", "乙")]


# roles and the order of turns


def roles(*names):
    return {"conversations": [{"from": name, "value": "问答"[i % 2]} for i, name in enumerate(names)]}


@pytest.mark.parametrize("user", ["Human", "user", "prompter", "customer", "用户", "<|user|>"])
@pytest.mark.parametrize(
    "assistant", ["chatgpt", "bing", "bard", "model", "bot", "AI", "gpt4", "gpt-3.5-turbo", "助手"]
)
def test_roles_by_other_names(user, assistant):
    assert one("sharegpt", roles(user, assistant)) == ({"messages": chat("问", "答")}, None)


def test_system_by_other_names_and_unknown_roles():
    for name in ("system", "developer", "系统"):
        row = {"messages": [{"role": name, "content": "规则"}, *chat("问", "答")]}
        assert one("messages", row) == ({"messages": chat("问", "答", system="规则")}, None)
    assert one("sharegpt", roles("human", "narrator")) == (None, "unknown role narrator")
    assert one("sharegpt", roles("human", "旁白\n\udc00" + "长" * 99)) == (
        None,
        "unknown role 旁白\\n\\udc00" + "长" * 16,
    )


def says(*turns, **row):
    return row | {"messages": [{"role": role, "content": text} for role, text in turns]}


U, A, S = "user", "assistant", "system"


@pytest.mark.parametrize(
    "row, wanted, remark",
    [
        (says((A, "您好"), (U, "问"), (A, "答")), chat("问", "答"), "greeting left out"),
        (says((S, "规则"), (A, "您好"), (U, "问"), (A, "答")), chat("问", "答", system="规则"), "greeting left out"),
        (says((U, "问"), (U, "再问"), (A, "答")), chat("问\n再问", "答"), "user turns joined"),
        (says((U, "问"), (A, "答"), (A, "再答")), chat("问", "答\n再答"), "assistant turns joined"),
        (says((S, "甲"), (S, "乙"), (U, "问"), (A, "答")), chat("问", "答", system="甲\n乙"), "system turns joined"),
        (
            says((U, "一"), (A, "甲"), (S, "换成散文"), (U, "二"), (A, "乙")),
            chat("一", "甲", "换成散文\n二", "乙"), "later system turn joined to the user's",
        ),
        (says((U, "一"), (S, "简短"), (A, "甲")), chat("一\n简短", "甲"), "later system turn joined to the user's"),
        (says((U, "一"), (A, "甲"), (S, " "), (U, "二"), (A, "乙")), TWO, None),
        (
            says((U, "问"), (A, "答"), (U, "再问"), (U, "又问")),
            chat("问", "答"), "user turns joined; last human turn dropped",
        ),
        (says((S, "甲"), (U, "问"), (A, "答"), system="乙"), chat("问", "答", system="甲"), "system field left out"),
        (says((U, "问"), (A, "答"), system={"a": 1}), chat("问", "答"), "system left out: an object"),
        (says((U, "问"), (A, "答"), tools='[{"name": "weather"}]'), chat("问", "答"), "tools left out"),
        (says((U, "问"), (A, "答"), tools="[]", images=[]), chat("问", "答"), None),
        (says((U, "问"), (A, "答"), (U, "天"), ("tool", "3"), (A, "晴")), chat("问", "答"), "cut at tool calls"),
        (says((U, 1), (A, 2)), chat("1", "2"), "number taken as text"),
    ],
)  # fmt: skip
def test_usable_turns_are_kept(row, wanted, remark):
    assert one("messages", row) == ({"messages": wanted}, remark)


def test_what_a_prompt_cannot_hold():
    image = {
        "role": "user",
        "content": [{"type": "text", "text": "看"}, {"type": "image_url", "image_url": {"url": "u"}}],
    }
    answer = {"role": "assistant", "content": "答"}
    assert one("messages", {"messages": [image, answer]}) == (None, "images")
    row = {"messages": [*chat("问", "答"), image, answer]}
    assert one("messages", row) == ({"messages": chat("问", "答")}, "cut at images")
    assert one("sharegpt", {"conversations": human_gpt("<image>看", "答"), "images": ["a.png"]}) == (None, "images")
    qwen = "Picture 1: <img>a.jpg</img>\n看"
    for media, text in (({"video": "a.mp4"}, "<video>\n看"), ({"audios": ["a"]}, "<audio>看"), ({}, qwen)):
        assert one("alpaca", media | {"instruction": text, "output": "答"}) == (None, "images")
        assert one("pairs", media | {"prompt": text, "chosen": "好", "rejected": "坏"}) == (None, "images")
        assert one("prompts", media | {"prompt": text}) == (None, "images")
    assert one("alpaca", {"instruction": "<video> 怎么用？", "output": "答"})[1] is None
    beside = {"instruction": "问", "output": "答", "image": "a.jpg"}
    assert one("alpaca", beside) == ({"messages": chat("问", "答")}, "images left out")
    ollama = [{"role": "user", "content": "看", "images": ["aGk="]}, answer]
    assert one("messages", {"messages": chat("问", "答") + ollama}) == ({"messages": chat("问", "答")}, "cut at images")
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    row = {"messages": [*chat("天气"), call, {"role": "tool", "content": "3"}, answer], "tools": "[1]"}
    assert one("messages", row) == (None, "tool calls")


@pytest.mark.parametrize(
    "flag", [{"weight": 0}, {"loss_mask": 0}, {"loss": False}, {"train": "false"}, {"weight": "0"}]
)
def test_an_answer_that_is_not_to_be_learnt(flag):
    turns = chat("一", "甲", "二", "乙")
    turns[1] |= flag
    wanted = chat("一", "甲", "二", "乙")
    wanted[1]["train"] = False
    assert one("messages", {"messages": turns}) == ({"messages": wanted}, "answers of weight 0 left untrained")
    assert one("messages", {"messages": turns[:2]}) == (None, "no answer to train on")
    turns[3] |= {name: 1 for name in flag}
    assert one("messages", {"messages": turns})[0]["messages"] == wanted
    pair = {"prompt": turns[:3], "chosen": "好", "rejected": "坏"}
    assert one("pairs", pair)[0]["messages"] == chat("一", "甲", "二")


# prompts


@pytest.mark.parametrize(
    "row, messages, fields, remark",
    [
        ({"question": "1+2=?", "answer": 3}, chat("1+2=?"), {"answer": 3}, None),
        ({"instruction": "翻译", "input": "a", "output": "甲"}, chat("翻译\na"), {"output": "甲"}, None),
        ({"prompt": chat("问"), "reward_model": {"truth": "7"}}, chat("问"), {"reward_model": {"truth": "7"}}, None),
        ({"messages": chat("问", "答"), "n": 1}, chat("问"), {"n": 1}, "answer at the end left out"),
        ({"query": "二", "history": [["一", "甲"]], "system": "规"}, chat("一", "甲", "二", system="规"), {}, None),
        ({"text": "问"}, chat("问"), {}, None),
        ({"prompt": "问", "text": "别的"}, chat("问"), {"text": "别的"}, None),
        ({"messages": json.dumps(chat("问"))}, chat("问"), {}, None),
    ],
)
def test_prompts_keep_the_other_fields(row, messages, fields, remark):
    assert one("prompts", row) == ({"messages": messages, "fields": fields}, remark)


def test_fields_of_prompts_are_what_json_can_hold():
    odd = {
        "day": datetime.date(2024, 5, 1),
        "raw": b"\xffa",
        "none": float("nan"),
        "half": "\ud83d",
        "list": (1, {2: 3}),
    }
    fields = one("prompts", {"prompt": "问"} | odd)[0]["fields"]
    assert fields == {"day": "2024-05-01", "raw": "\\xffa", "none": None, "half": "\\ud83d", "list": [1, {"2": 3}]}
    assert json.loads(json.dumps(fields).encode()) == fields
    assert one("prompts", {"prompt": "问", "cases": "长" * 22_000}) == (None, "fields over 64 KB")
    assert one("prompts", {"prompt": " ", "answer": 3}) == (None, "no question")
    assert one("prompts", {"answer": 3}) == (None, "no instruction")
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert one("prompts", {"prompt": "问", "cases": deep}) == (None, "fields that JSON cannot hold")
