"""corpora/sources.py: what is asked for, which layout fits, and the samples of real corpora."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from chains import ROOT
from rows import chat, human_gpt

import data_process
from corpora.encodings import escaped
from corpora.shards import Outcomes
from corpora.sources import SOURCES, list_sources, list_units, parse_source, parse_sources, read_records
from dataset.formats import DataError, load_meta

SAMPLES = ROOT.parent / "shared" / "data"


# what is asked for


def test_parse_source():
    assert parse_source("wikipedia") == ("wikipedia", "wikipedia", None)
    assert parse_source("wikipedia=a=b:c") == ("wikipedia", "wikipedia", "a=b:c")
    assert parse_source("my-books.1:txt=x/y") == ("my-books.1", "txt", "x/y")
    assert parse_source("wiki:wikipedia") == ("wiki", "wikipedia", None)
    assert parse_source("wiki:auto=x") == ("wiki", "auto", "x")


@pytest.mark.parametrize(
    "text, message",
    [
        ("wikipdia", "unknown layout wikipdia; did you mean wikipedia"),
        ("a:sharegtp=x", "did you mean sharegpt"),
        ("a/b:txt=x", "a label is made of letters"),
        (":txt=x", "a label is made of letters"),
        ("txt", "a path is needed, as in txt=PATH"),
        ("moss", "a path is needed"),
        ("wikipedia=", "a path is needed"),
        ("auto", "a path is needed, as in auto=PATH"),
        ("x:jsonl=a", "unknown layout jsonl; any layout is read from jsonl files.*text_rows.*auto"),
        ("x:CSV=a", "unknown layout CSV; .*auto"),
        ("x:zzzz=a", "unknown layout zzzz; --list_sources shows all, and auto has it found"),
        (__file__, f"a path needs a name and a layout, as in NAME:auto={__file__}"),
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
    assert all(source.licence and source.stage in ("pretrain", "sft", "rm", "prompts") for source in SOURCES.values())


# which layout fits


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "row, layout",
    [
        ({"conversations": human_gpt("问", "答")}, "sharegpt"),
        ({"messages": chat("问", "答"), "id": 1}, "messages"),
        ({"messages": chat("问"), "answer": "3"}, "prompts"),
        ({"conversation": [{"human": "问", "assistant": "答"}]}, "firefly"),
        ({"chat": {"turn_1": {"Human": "问", "MOSS": "答"}}}, "moss"),
        ({"text": "<s>Human: 问\n</s><s>Assistant: 答\n</s>"}, "messages"),
        ({"instruction": "问", "input": "", "output": "答"}, "alpaca"),
        ({"prompt": "问", "completion": "答"}, "alpaca"),
        ({"kind": "NER", "input": "问", "target": "答"}, "firefly"),
        ({"prompt": "问", "chosen": "好", "rejected": "坏"}, "pairs"),
        ({"conversations": human_gpt("问"), "chosen": "好", "rejected": "坏"}, "pairs"),
        ({"instruction": "问", "output": ["好", "坏"]}, "ranked"),
        ({"question": "问", "level": 3}, "prompts"),
        ({"question": "问", "turns": 3}, "prompts"),
        ({"question": "问", "answer": "答", "data": ["3,4"], "turns": 3}, "alpaca"),
        ({"data": chat("问", "答"), "turns": 1}, "messages"),
        ({"title": "题", "text": "正文"}, "text_rows"),
        ({"completion": "正文", "source": "w"}, "text_rows"),
        ({"title": "书", "chapter": "一", "text": "正文"}, "webnovel"),
        ({"title": "题", "author": "某", "paragraphs": ["一"]}, "chinese_poetry"),
        ({"title": "题", "sections": [{"title": "甲", "content": "乙"}]}, "baike"),
    ],
)
def test_auto_takes_the_layout_that_fits(tmp_path, capsys, row, layout):
    path = str(write_rows(tmp_path / "a.jsonl", *[row] * 3))
    for _ in range(2):  # the parts ask for it one after another
        assert parse_sources([f"x:auto={path}"]) == [("x", layout, path)]
    assert capsys.readouterr().err == f"x: layout {layout}\n"
    [unit] = list_units("x", layout, path)
    assert [note for _, record, note in read_records(unit) if record is None] == []


def test_auto_of_plain_text_and_of_what_fits_no_one_layout(tmp_path):
    (tmp_path / "a.txt").write_text("第一行\n第二行\n", encoding="utf-8")
    assert parse_sources([f"x:auto={tmp_path / 'a.txt'}"])[0][1] == "txt"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a.txt").write_text("正文", encoding="utf-8")
    assert parse_sources([f"x:auto={tmp_path / 'folder'}"])[0][1] == "txt"
    both = write_rows(tmp_path / "both.jsonl", {"instruction": "问", "output": "答", "text": "全文"})
    with pytest.raises(
        DataError, match="both.jsonl: no one layout fits rows of instruction, output, text; name one of"
    ):
        parse_sources([f"x:auto={both}"])
    none = write_rows(tmp_path / "none.jsonl", {"a\n": 1})
    with pytest.raises(DataError, match="no one layout fits rows of a.n; name one of txt, lines, text_rows"):
        parse_sources([f"x:auto={none}"])


def test_auto_of_rows_that_are_no_objects(tmp_path):
    (tmp_path / "a.json").write_text('["第一篇", "第二篇"]', encoding="utf-8")
    assert parse_sources([f"x:auto={tmp_path / 'a.json'}"])[0][1] == "text_rows"
    path = write_rows(tmp_path / "b.jsonl", chat("问", "答"), chat("问二", "答二"))
    assert parse_sources([f"x:auto={path}"])[0][1] == "messages"


def test_auto_leaves_bad_lines_to_the_reading(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "\xff"}\n' * 200 + '{"text": "正文"}\n'.encode() * 200)
    assert parse_sources([f"x:auto={path}"])[0][1] == "text_rows"
    assert capsys.readouterr().err == "x: layout text_rows\n"


def test_auto_knows_chinese_columns(tmp_path):
    for header, layout in (("id,标题,正文", "text_rows"), ("id,问题,回答", "alpaca")):
        path = tmp_path / f"{layout}.csv"
        path.write_bytes(f"\ufeff{header}\n1,题,文\n".encode())
        assert parse_sources([f"x:auto={path}"])[0][1] == layout


def test_auto_says_what_is_wrong_with_the_files(tmp_path, capsys):
    wrong = {
        "lists.json": (json.dumps({"train": [{"text": "一"}], "test": [{"text": "二"}]}), "holds several lists, train"),
        "page.jsonl": ("<html>\n<body>404</body>\n</html>\n", "page.jsonl: neither a JSON array nor JSON Lines"),
        "blank.jsonl": ("\n\n", "blank.jsonl: blank"),
        "head.csv": ("title,text\n", "head.csv: no rows in it"),
        "body.csv": (
            "你好,你好呀\n早,早安\n",
            r"no one layout fits rows of 你好, 你好呀 \(is the first line of .*a header",
        ),
    }
    for name, (text, message) in wrong.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=message):
            parse_sources([f"x:auto={tmp_path / name}"])
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a.zip").write_bytes(b"PK\x03\x04")
    with pytest.raises(DataError, match="folder: no data in it"):
        parse_sources([f"x:auto={tmp_path / 'folder'}"])
    said = capsys.readouterr().err
    assert "a.zip: not read: a .zip file; unpack it" in said and "layout" not in said


def test_auto_does_not_guess_at_what_is_not_reached(monkeypatch, capsys):
    pytest.importorskip("datasets", reason="reads the hub")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError, match="not found or not reached"):
        parse_sources(["x:auto=hf:nobody/nothing-of-that-name"])
    assert "layout" not in capsys.readouterr().err


def test_a_comma_within_a_path(tmp_path):
    path = write_rows(tmp_path / "a,b.jsonl", {"text": "一"})
    with pytest.raises(
        DataError, match=r"unknown layout b.jsonl; .*the form of a list, --sources=\['x:text_rows=.*a,b"
    ):
        parse_sources(f"x:text_rows={path}".split(","))
    with pytest.raises(DataError) as error:
        parse_sources(["x:text_rows=a", "y:txxt=b"])
    assert "comma" not in str(error.value)


def test_prompts_that_are_only_texts(tmp_path, capsys):
    lines, array = tmp_path / "a.txt", tmp_path / "b.json"
    lines.write_text("写一首诗\n\n讲一个故事\n", encoding="utf-8")
    array.write_text('["写一首诗", "讲一个故事"]', encoding="utf-8")
    for path in (lines, array):
        results = [item for unit in list_units("x", "prompts", path) for item in read_records(unit)]
        asked = [record["messages"] for _, record, _ in results if record]
        assert asked == [chat("写一首诗"), chat("讲一个故事")]
        assert [note for _, record, note in results if record is None] == ["blank"] * (path == lines)
    list_units("x", "prompts", tmp_path)
    assert "a.txt: not read: plain text beside rows; give it as a source of its own" in capsys.readouterr().err


def test_a_source_without_rows_says_so(tmp_path):
    (tmp_path / "a.csv").write_text("title,text\n", encoding="utf-8")
    options = ["--parts=text", f"--out={tmp_path / 'out'}", "--workers=1"]
    with pytest.raises(DataError, match=r"text: no record is left; x: no rows in .*a.csv"):
        data_process.main([f"--sources=x:text_rows={tmp_path / 'a.csv'}", *options])


def test_conversations_that_were_named_texts(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", *[chat("问", "答")] * 3)
    options = ["--parts=text", f"--out={tmp_path / 'out'}", "--workers=1"]
    with pytest.raises(DataError, match="3 not an object; x: these rows are lists of messages: layout messages"):
        data_process.main([f"--sources=x:text_rows={path}", *options])


def test_conversations_without_room(tmp_path, tokenizer_path):
    path = write_rows(tmp_path / "a.jsonl", *[chat("问", "一个很长的回答" * 20)] * 3)
    options = [
        "--parts=sft",
        f"--out={tmp_path / 'out'}",
        "--workers=1",
        "--max_seq_len=16",
        f"--tokenizer={tokenizer_path}",
    ]
    with pytest.raises(DataError, match="dropped: 3 answer too long; x: max_seq_len=16 is too small$"):
        data_process.main([f"--sources=x:messages={path}", *options])


def test_ranked_text_with_a_header_or_none(tmp_path):
    rows = {
        "none.tsv": "甲\t乙\t丙\n子\t丑\t寅\n",
        "texts.tsv": "text_a\ttext_b\n甲\t乙\n",
        "asked.tsv": "question\tanswer1\tanswer2\n问\t甲\t乙\n",
        "rows.txt": '{"question": "问", "answers": ["甲", "乙"]}\n',
    }
    wanted = {"none.tsv": ("ranked_texts", 6, 0), "texts.tsv": ("ranked_texts", 1, 1), "asked.tsv": ("ranked", 1, 0)}
    wanted["rows.txt"] = ("ranked", 1, 0)
    for name, text in rows.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        [(label, layout, path)] = parse_sources([f"x:ranked={tmp_path / name}"])
        records = [record for unit in list_units(label, layout, path) for _, record, _ in read_records(unit)]
        kept = [record for record in records if record]
        assert (layout, len(kept), len(records) - len(kept)) == wanted[name]
        assert (kept[0]["chosen"], kept[0]["rejected"]) == ("甲", "乙")


def test_a_source_that_gives_nothing_says_what_its_rows_hold(tmp_path, capsys):
    chats = write_rows(tmp_path / "a.jsonl", *({"id": i, "conversations": human_gpt(f"问{i}", "答")} for i in range(9)))
    texts = write_rows(tmp_path / "b.jsonl", *({"text": f"第{i}篇正文，写着{i}件不同的事情。"} for i in range(40)))
    hint = "x: these rows hold id, conversations: layout sharegpt"
    options = ["--parts=text", f"--out={tmp_path / 'out'}", "--workers=1", "--val_share=0.2"]
    with pytest.raises(DataError, match=f"text: no record is left; dropped: 9 no text; {hint}"):
        data_process.main([f"--sources=x:text_rows={chats}", *options])
    data_process.main([f"--sources=x:text_rows={chats},y:text_rows={texts}", *options])
    assert f"text: no record of {hint}\n" in capsys.readouterr().err


def test_lone_surrogates_and_odd_names_are_told_of(tmp_path):
    rows = [{"text": f"第{i}篇正文，写着{i}件不同的事情。"} for i in range(40)]
    path = Path(os.fsdecode(os.fsencode(tmp_path / "a") + b"\xd6\xd0.jsonl"))
    with open(path, "w", encoding="ascii") as file:
        file.writelines(json.dumps(row) + "\n" for row in [*rows, {"text": "短\ud83d"}])
    out = tmp_path / "out"
    data_process.main(
        [f"--sources=x:text_rows={path}", "--parts=text", f"--out={out}", "--workers=1", "--val_share=0.2"]
    )
    [sample] = [json.loads(line) for line in (out / "dropped.jsonl").read_text(encoding="utf-8").splitlines()]
    assert (sample["reason"], sample["text"], sample["place"]) == ("too short", "短\\ud83d", escaped(f"{path}:41"))
    assert load_meta(out)["tally"]["text"]["x"]["kept"] == 40


def test_few_distinct_reasons_name_a_value():
    one, other = Outcomes(), Outcomes()
    for i in range(30):
        one.drop(f"unknown role r{i}", i, "place")
        other.drop(f"unknown role s{i}", i, "place")
        one.drop("unknown role r3", i, "place")
    assert len(one.dropped) == 21 and one.dropped["unknown role"] == 10 and one.dropped["unknown role r3"] == 31
    one.add(other)
    assert len(one.dropped) == 21 and one.dropped.total() == 90 and one.dropped["unknown role"] == 40
    assert set(one.samples) == set(one.dropped)
    one.remark("a; b")
    one.remark("a")
    assert one.remarks == {"a": 2, "b": 1}


# real samples


@pytest.mark.parametrize(
    "layout, name, records, notes",
    [
        ("text_rows", "pretrain/readwiki_zh.jsonl", 100, {}),
        ("txt", "pretrain/三国演义.txt", 1, {}),
        ("lines", "pretrain/三国演义.txt", 1566, {"blank": 2046}),
        ("alpaca", "sft/llamafactory_alpaca_zh_demo.json", 1000, {}),
        ("alpaca", "sft/oaast_sft_zh.json", 689, {}),
        (
            "sharegpt",
            "sft/sharegpt_zh_200.jsonl",
            200,
            {"pair with an empty turn left out": 1, "last human turn dropped": 1},
        ),
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
