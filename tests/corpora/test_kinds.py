"""corpora/kinds.py and rows.py: rows in a list of an object, among other fields; keys that are repeated."""

import json

import pytest
from reading import read, write

from dataset.formats import DataError

ROW_OF = {
    "belle": {"instruction": "问", "input": "", "output": "答"},
    "firefly": {"kind": "NER", "input": "问", "target": "答"},
    "messages": {"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]},
    "sft_zh": {"instruction": "问", "output": "答"},
    "alpaca": {"question": "问", "answer": "答"},
    "pairs": {"prompt": "问", "chosen": "好", "rejected": "坏"},
    "prompts": {"question": "问"},
    "text_rows": {"title": "题", "text": "正文"},
    "baike": {"title": "题", "summary": "文", "sections": []},
}


@pytest.mark.parametrize("layout", ROW_OF)
@pytest.mark.parametrize("value", ["说明", "", None, 3])
def test_rows_beside_other_fields(tmp_path, layout, value):
    rows = [ROW_OF[layout]] * 3
    wanted = read(layout, write(tmp_path / "rows" / "a.json", json.dumps(rows)))
    assert [note for _, record, note in wanted if record] == [None] * 3
    for name in ("title", "prompt", "content", "context", "output", "history", "chat", "description"):
        for i, fields in enumerate(({name: value, "data": rows}, {"训练": rows, name: value})):
            write(tmp_path / name / f"{i}.json", json.dumps(fields, indent=i or None, ensure_ascii=False))
        assert read(layout, tmp_path / name) == [
            (f"{i}.json:record {n}", record, note) for i in (0, 1) for n, (_, record, note) in enumerate(wanted, 1)
        ]


@pytest.mark.parametrize(
    "layout, row",
    [
        ("alpaca", {"instruction": "问", "output": "答", "references": [{"title": "题", "content": "文"}]}),
        ("alpaca", {"question": "问", "answer": "答", "data": [{"text": "3"}, {"text": "4"}]}),
        ("belle", {"instruction": "问", "instances": [{"input": "", "output": "答"}]}),
        ("prompts", {"question": "问", "test_cases": [{"input": "1", "output": "2"}]}),
        ("prompts", {"prompt": "问", "examples": [{"input": "1", "output": "2"}]}),
        ("text_rows", {"title": "题", "content": "全文", "comments": [{"content": "好"}]}),
        ("text_rows", {"comments": [{"content": "好"}], "content": "全文"}),
        ("text_rows", {"content": "全文", "qas": [{"question": "问", "answer": "答"}]}),
        ("messages", {"title": "题", "data": ROW_OF["messages"]["messages"]}),
        ("messages", {"data": ROW_OF["messages"]["messages"]}),
        ("messages", {"title": "题", "conversation": [{"human": "问", "assistant": "答"}] * 2}),
        ("messages", {"conversation": [{"input": "问", "output": "答"}] * 2}),
        ("ranked", {"prompt": "问", "answers": [{"text": "好", "score": 2}, {"text": "坏", "score": 1}]}),
        ("baike", {"title": "题", "sections": [{"title": "题", "content": "文"}]}),
    ],
)
def test_an_object_with_lists_of_its_own_is_a_row(tmp_path, layout, row):
    [(_, wanted, _)] = read(layout, write(tmp_path / "a.json", json.dumps([row])))
    assert wanted
    assert [record for _, record, _ in read(layout, write(tmp_path / "b.json", json.dumps(row)))] == [wanted]


@pytest.mark.parametrize(
    "table",
    [
        {"0": {"instruction": "问", "output": "答"}, "1": {"instruction": "再问", "output": "再答"}},
        {"391": {"messages": [{"role": "user", "content": "问"}]}, "10001": {"messages": []}},
        {"instruction": {"0": "问", "1": "再问"}, "output": {"0": "答", "1": "再答"}},
        {"instruction": ["问", "再问"], "output": ["答", "再答"]},
        {"columns": ["instruction", "output"], "index": [0, 1], "data": [["问", "答"], ["再问", "再答"]]},
        {"instruction": ["问" * 600_000, "再问"], "output": ["答", "再答"]},  # of which only the beginning is looked at
    ],
)
def test_a_table_turned_to_columns_is_no_row(tmp_path, table):
    for indent in (None, 1):
        path = write(tmp_path / "a.json", json.dumps(table, ensure_ascii=False, indent=indent))
        with pytest.raises(DataError, match="a.json: rows by number or columns.* lines=True"):
            read("alpaca", path)


def test_conversations_of_a_list_named_so(tmp_path):
    for name, layout in (("conversations", "sharegpt"), ("dialogues", "messages"), ("chat", "messages")):
        path = write(tmp_path / "a.json", json.dumps({"title": "题", name: [ROW_OF[layout]] * 3}))
        assert [bool(record) for _, record, _ in read(layout, path)] == [True] * 3


def test_fields_after_more_rows_than_are_looked_at(tmp_path):
    rows = [{"text": "长" * 200_000}] * 9
    path = write(tmp_path / "a.json", json.dumps({"data": rows, "title": "题", "prompt": "说明"}, ensure_ascii=False))
    assert [record for _, record, _ in read("text_rows", path)] == rows
    path = write(tmp_path / "b.json", json.dumps({"comments": rows, "text": "文"}, ensure_ascii=False))
    with pytest.raises(DataError, match="b.json: other data beside its list of 9 records: text; write each"):
        read("text_rows", path)


@pytest.mark.parametrize("array", [False, True])
def test_repeated_keys_are_named(tmp_path, array):
    lines = [
        '{"text": "甲", "text": "乙"}',
        '{"text": "甲", "text": "甲"}',
        '{"text": "", "text": "甲"}',
        '{"text": "甲", "content": "丙", "tags": {"a": 1, "a": 2}}',
    ]
    path = write(tmp_path / "a.json", f"[{','.join(lines)}]" if array else "\n".join(lines))
    assert [(record["text"], note) for _, record, note in read("text_rows", path)] == [
        ("乙", "text given twice, the last taken"),
        ("甲", None),
        ("甲", None),
        ("甲", "content left out, text taken; a given twice, the last taken"),
    ]
