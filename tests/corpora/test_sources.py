"""corpora/sources.py: what a row of every layout becomes, and the samples of real corpora."""

from collections import Counter

import pytest
from chains import ROOT

from corpora.sources import SOURCES, list_sources, list_units, parse_source, read_records
from dataset.formats import DataError

SAMPLES = ROOT.parent / "shared" / "data"


def adapt(layout, row):
    return list(SOURCES[layout].adapter(row))


def one(layout, row):
    [result] = adapt(layout, row)
    return result


def chat(*texts, system=None):
    """The messages of a conversation that the user begins."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def human_gpt(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


# what is asked for


def test_parse_source():
    assert parse_source("wikipedia") == ("wikipedia", "wikipedia", None)
    assert parse_source("wikipedia=a=b:c") == ("wikipedia", "wikipedia", "a=b:c")
    assert parse_source("my-books.1:txt=x/y") == ("my-books.1", "txt", "x/y")
    assert parse_source("wiki:wikipedia") == ("wiki", "wikipedia", None)


@pytest.mark.parametrize(
    "text, message",
    [
        ("wikipdia", "unknown layout wikipdia; did you mean wikipedia"),
        ("a:sharegtp=x", "did you mean sharegpt"),
        ("a/b:txt=x", "a label is made of letters"),
        (":txt=x", "a label is made of letters"),
        ("txt", "a path is needed, as in txt=PATH"),
        ("cvalues", "a path is needed"),
        ("wikipedia=", "a path is needed"),
    ],
)
def test_parse_source_refuses(text, message):
    with pytest.raises(DataError, match=message):
        parse_source(text)


def test_list_sources_is_a_table():
    header, *rows = list_sources().splitlines()
    assert [row.split()[0] for row in rows] == list(SOURCES)
    column = header.index("licence")
    assert all(row[column - 2 : column] == "  " and row[column] != " " for row in rows)
    assert all(source.licence and source.stage in ("pretrain", "sft", "rm") for source in SOURCES.values())


# adapters


@pytest.mark.parametrize(
    "layout, row, text",
    [
        ("wikipedia", {"completion": "昭通机场位于云南。", "source": "wikipedia.zh2307"}, "昭通机场位于云南。"),
        ("pretrain_zh", {"dataType": "book", "title": None, "content": "正文", "dataId": 1}, "正文"),
        ("pretrain_zh", {"title": " 书名 ", "content": "正文"}, "书名\n正文"),
        ("text_rows", {"title": "数学", "text": "数学是一门学科。"}, "数学是一门学科。"),
        ("text_rows", {"title": float("nan"), "body": "正文"}, "正文"),
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
        ("text_rows", {"text": 3, "title": "题"}, "no text"),
        ("text_rows", {"text": "文", "title": 3}, "no title"),
        ("chinese_poetry", {"name": "李白", "desc": "诗人"}, "no paragraphs"),
        ("chinese_poetry", {"title": "题", "author": "某", "paragraphs": [""]}, "empty text"),
        ("alpaca", {"input": "", "output": "答"}, "no instruction"),
        ("alpaca", {"instruction": "问", "input": 5, "output": "答"}, "no input"),
        ("alpaca", {"instruction": "问", "output": None}, "no output"),
        ("alpaca", {"instruction": "问", "output": " "}, "no answer"),
        ("alpaca", {"instruction": "", "input": " ", "output": "答"}, "no question"),
        ("alpaca", {"instruction": "问", "output": "答", "history": ["一", "二"]}, "history not pairs"),
        ("alpaca", {"instruction": "问", "output": "答", "history": 7}, "history not pairs"),
        ("firefly", {"kind": "NER", "input": "问"}, "no target"),
        ("sharegpt", {"conversations": []}, "no conversations"),
        ("sharegpt", {"conversations": ["你好"]}, "turn not an object"),
        ("sharegpt", {"conversations": [{"from": "tool", "value": "1"}]}, "unknown role"),
        ("sharegpt", {"conversations": [{"from": "human", "value": 1}]}, "turn without text"),
        ("sharegpt", {"conversations": human_gpt("问")}, "no answer"),
        ("sharegpt", {"conversations": human_gpt("问", "答")[1:]}, "roles out of order"),
        ("sharegpt", {"conversations": human_gpt("问", "答") * 2 + human_gpt("问") * 2}, "roles out of order"),
        ("sharegpt", {"conversations": human_gpt("问", " ", "问", "答")}, "no answer"),
        ("sharegpt", {"conversations": human_gpt("", "答")}, "no question"),
        ("pairs", {"prompt": "问", "chosen": "好", "rejected": "好 "}, "chosen equals rejected"),
        ("pairs", {"prompt": "问", "chosen": "好", "rejected": ""}, "no rejected"),
        ("pairs", {"prompt": "问", "rejected": "坏"}, "no chosen"),
        ("pairs", {"prompt": "问", "chosen": chat("甲", "好"), "rejected": chat("乙", "坏")},
         "chosen and rejected have different prompts"),
        ("pairs", {"messages": chat("问", "答"), "chosen": "好", "rejected": "坏"}, "no question"),
        ("pairs", {"prompt": "问", "chosen": {"from": "human", "value": "好"}, "rejected": "坏"}, "roles out of order"),
        ("ranked", {"instruction": "问", "output": "答"}, "no output"),
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
    for i in (2, 3):
        cut = [turn | {"value": None} if j == i else turn for j, turn in enumerate(turns)]
        assert one("sharegpt", {"conversations": cut}) == ({"messages": chat("问", "答")}, "cut at an empty turn")
    with_system = {"conversations": [{"from": "system", "value": "规则"}, *turns[:2]], "system": "别的"}
    assert one("sharegpt", with_system)[0]["messages"] == chat("问", "答", system="规则")
    assert one("sharegpt", with_system | {"conversations": turns[:2]})[0]["messages"] == chat("问", "答", system="别的")
    for name in ("messages", "conversations"):
        row = {name: chat("问", "答", system="规则"), "messages" if name == "conversations" else "other": None}
        assert one("messages", row)[0]["messages"] == chat("问", "答", system="规则")


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


# real samples


@pytest.mark.parametrize(
    "layout, name, records, notes",
    [
        ("text_rows", "pretrain/readwiki_zh.jsonl", 100, {}),
        ("txt", "pretrain/三国演义.txt", 1, {}),
        ("lines", "pretrain/三国演义.txt", 1566, {"blank": 2046}),
        ("alpaca", "sft/llamafactory_alpaca_zh_demo.json", 1000, {}),
        ("alpaca", "sft/oaast_sft_zh.json", 689, {}),
        ("sharegpt", "sft/sharegpt_zh_200.jsonl", 200, {"cut at an empty turn": 1, "last human turn dropped": 1}),
        ("dpo_sharegpt", "preference/llamafactory_dpo_zh_demo.json", 300, {}),
        ("ranked", "preference/oaast_rm_zh.json", 1798, {"answer given twice": 6, "fewer than two answers": 3}),
        ("cvalues", "one_record_schemas/cvalues_comparison.jsonl", 1, {}),
        ("firefly", "one_record_schemas/firefly_train_1.1M.jsonl", 1, {}),
        ("hh_rlhf_cn", "one_record_schemas/hh_rlhf_cn.jsonl", 1, {}),
        ("alpaca", "one_record_schemas/safety_prompts.jsonl", 1, {}),
    ],
)
def test_real_sample(layout, name, records, notes, capsys):
    if not (SAMPLES / name).exists():
        pytest.skip(f"no sample {SAMPLES / name}")
    results = [item for unit in list_units("x", layout, SAMPLES / name) for item in read_records(unit)]
    assert sum(record is not None for _, record, _ in results) == records
    assert Counter(note for _, _, note in results if note) == notes
    assert capsys.readouterr().err == ""
