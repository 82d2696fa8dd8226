"""corpora/rows.py and corpora/tables.py, read through corpora/sources.py: every file format, and what real files do to
a reader."""

import gzip
import json
from collections import Counter

import pytest
from reading import at, files_read, json_lines, read, write

from corpora import rows, tables
from corpora.files import Unit
from corpora.sources import list_units, read_records
from dataset.formats import DataError


def texts(record):
    return [message["content"] for message in record["messages"]]


LINES = '{"text": "一"}\r\n\n[1]\nnot json\n{"text": "带\t制表"}\n{"text": []}\n{"text": "最后\\n一行"}'
LINE_RESULTS = [
    ("1", {"text": "一"}, None),
    ("2", None, "blank"),
    ("3", None, "not an object"),
    ("4", None, "not JSON"),
    ("5", {"text": "带\t制表"}, None),
    ("6", None, "text is a list"),
    ("7", {"text": "最后\n一行"}, None),
]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gb18030"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
def test_json_lines_in_every_encoding(tmp_path, capsys, name, encoding):
    data = LINES.encode(encoding)
    path = write(tmp_path / name, gzip.compress(data) if name.endswith("gz") else data)
    assert read("text_rows", path) == at(name, LINE_RESULTS)
    said = capsys.readouterr().err
    assert said == (f"{path}: read as GB18030\n" if encoding == "gb18030" else "")


@pytest.mark.parametrize("size", [1, 2, 7, 13, 100, 10**9])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "gb18030"])
def test_units_of_any_size_read_each_line_once(tmp_path, size, encoding):
    path = write(tmp_path / "a.jsonl", LINES.encode(encoding))
    assert read("text_rows", path, size) == at("a.jsonl", LINE_RESULTS)
    whole = LINES.encode(encoding)
    assert len(list_units("x", "text_rows", path, size)) == -(-len(whole) // size)


def test_lines_and_txt(tmp_path):
    write(tmp_path / "b" / "二.txt", "甲\r\n\r\n 乙 \r\n")
    write(tmp_path / "a.txt.gz", gzip.compress("丙".encode()))
    write(tmp_path / ".cache" / "no.txt", "隐藏")
    write(tmp_path / "rows.jsonl", json_lines({"text": "不是文本"}))
    assert read("txt", tmp_path) == [
        ("a.txt.gz:1", {"text": "丙"}, None),
        ("b/二.txt:1", {"text": "甲\n\n 乙 \n"}, None),
    ]
    assert read("lines", tmp_path)[1:] == at(
        "b/二.txt", [("1", {"text": "甲"}, None), ("2", None, "blank"), ("3", {"text": " 乙 "}, None)]
    )
    assert [record for _, record, _ in read("text_rows", tmp_path)] == [{"text": "不是文本"}]


def test_a_few_bad_lines(tmp_path, capsys):
    good = json_lines({"text": "好" * 9}).encode()
    path = write(tmp_path / "a.jsonl", (good + b'{"text": "\xff\xfe"}\n') * 7 + good)
    results = read("text_rows", path)
    assert Counter(note for _, _, note in results) == {None: 8, "not UTF-8": 7}
    assert results[1] == ("a.jsonl:2", None, "not UTF-8")
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"{path}:2: not UTF-8: invalid start byte, byte 10"
    assert [line.split(":")[1] for line in said] == ["2", "4", "6", "8", "10"]

    path = write(tmp_path / "a.txt", "书".encode() * 9 + b"\xff\n" + "�".encode())
    assert read("txt", path) == [("a.txt:1", {"text": "书" * 9 + "�\n�"}, "bytes that are not UTF-8 replaced")]
    path = write(tmp_path / "b.txt", "有�".encode())
    assert read("txt", path) == [("b.txt:1", {"text": "有�"}, None)]


def test_bad_bytes_of_gb18030_and_utf16(tmp_path, capsys):
    row = json_lines({"text": "中文字"}).encode("gb18030")
    path = write(tmp_path / "a.jsonl", row * 20 + b'{"text": "\x81\x20"}\n' + b"\x81\x30\n")
    assert Counter(note for _, _, note in read("text_rows", path)) == {None: 20, "not GB18030": 2}
    path = write(tmp_path / "a.json", b"[" + b",".join([row] * 20 + [b'"\x81\x20"', row]) + b"]")
    assert [note for _, _, note in read("text_rows", path)] == [None] * 20 + ["not GB18030", None]
    path = write(tmp_path / "b.jsonl", "\ufeff{}\n".encode("utf-16-le") + b"\x00\xd8\x0a\x00")
    assert [note for _, _, note in read("text_rows", path)] == ["no text", "not UTF-16"]


def test_neither_encoding(tmp_path):
    path = write(tmp_path / "a.jsonl", b"\xff\xff\n" * 9)
    with pytest.raises(DataError, match=r"a.jsonl: neither UTF-8 nor GB18030 nor Big5 beyond doubt; convert it"):
        list_units("x", "text_rows", path)


@pytest.mark.parametrize("block", [4, 5, 50, 1 << 20])
def test_json_array_through_a_moving_window(tmp_path, monkeypatch, block):
    monkeypatch.setattr(rows, "BLOCK", block)
    values = [
        {"text": '引"号]\\'},
        12345,
        None,
        {"text": float("nan")},
        [1],
        {"text": "长" * 3000},
        {"text": "😀\n"},
        True,
    ]
    path = write(tmp_path / "a.json", "\ufeff \n" + json.dumps(values, indent=1, ensure_ascii=block == 5) + " \n")
    results = list(read_records(Unit("x", "text_rows", str(path), "json")))
    assert [place for place, _, _ in results] == [f"{path}:record {i}" for i in range(1, 9)]
    assert [record for _, record, _ in results if record] == [values[0], values[5], values[6]]
    assert [note for _, _, note in results[1:5]] == ["not an object", "not an object", "no text", "not an object"]
    assert results[7][2] == "not an object"


@pytest.mark.parametrize("cut", [1, 5, 30, 50, 51, 52, 53, 54, 100])
def test_array_that_breaks_off(tmp_path, cut):
    text = json.dumps([{"text": "一" * 30, "n": i} for i in range(9)], ensure_ascii=False)[:cut]
    path, whole, got = write(tmp_path / "a.json", text), text.count("}"), []
    with pytest.raises(DataError, match=f"a.json: record {whole + 1} breaks off, as after a partial download"):
        got.extend(read_records(Unit("x", "text_rows", str(path), "json")))
    assert len(got) == whole


def test_arrays_with_mistakes(tmp_path):
    path = write(tmp_path / "a.json", '[{"text": "一"}, {"text" "二"}, ' + '{"text": "三"},' * 99999 + "]")
    with pytest.raises(DataError, match="a.json: record 2 is not JSON: Expecting ':' delimiter"):
        read("text_rows", path)
    path = write(tmp_path / "b.json", '[{"text": "一"}]\n[{"text": "二"}]')
    with pytest.raises(DataError, match="more data after its JSON array of 1 records"):
        read("text_rows", path)
    path = write(tmp_path / "c.json", "train")
    with pytest.raises(DataError, match="c.json: neither a JSON array nor JSON Lines"):
        read("text_rows", path)
    path = write(tmp_path / "d.json", b'[{"text": "\xff"},\n{"text": "' + "好".encode() + b'"}]')
    assert [note for _, _, note in read("text_rows", path)] == ["not UTF-8", None]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_long_lines(tmp_path, name):
    rows = [{"text": "长" * 700_000}, {"text": "短"}]  # 2.1 MB: longer than what encoding is told from
    path = write(tmp_path / name, json_lines(*rows))
    units = list_units("x", "text_rows", path, 300_000)
    assert len(units) == 8 and sum(bool(list(read_records(unit))) for unit in units) == 2
    assert read("text_rows", path, 300_000) == [(f"{name}:{i + 1}", row, None) for i, row in enumerate(rows)]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.txt.gz"])
def test_gz_that_breaks_off(tmp_path, name):
    rows = [{"text": f"{i * 7919 % 10007}一"} for i in range(9000)]
    text = json.dumps(rows) if name == "a.json.gz" else json_lines(*rows)
    path = write(tmp_path / name, gzip.compress(text.encode())[:-1000])
    layout = "txt" if name == "a.txt.gz" else "text_rows"
    with pytest.raises(DataError, match=rf"{name}: damaged or not fully downloaded"):
        read(layout, path)


def test_csv(tmp_path):
    text = "﻿instruction,input,output\r\n"
    text += '问一,,"第一行\r\n第二行，带""引号"""\r\n\r\n问二,多,余,列\r\n问三,,答\r\n'
    path = write(tmp_path / "a.csv", text + f"问四,,{'长' * 200_000}\n")
    results = read("alpaca", path)
    assert [(place, note) for place, _, note in results] == [
        ("a.csv:2", None),
        ("a.csv:4", "blank"),
        ("a.csv:5", "wrong number of columns"),
        ("a.csv:6", None),
        ("a.csv:7", None),
    ]
    assert texts(results[0][1]) == ["问一", '第一行\r\n第二行，带"引号"']
    assert texts(results[4][1])[1] == "长" * 200_000
    path = write(tmp_path / "b.tsv", "prompt\tchosen\trejected\n问\t好,\t坏\n问\t好\n")
    assert [(r and r["chosen"], note) for _, r, note in read("pairs", path)] == [
        ("好,", None),
        (None, "wrong number of columns"),
    ]


def test_csv_with_an_open_quote_is_not_swallowed(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "CSV_FIELD", 1000)
    path = write(tmp_path / "a.csv", 'text\n好\n"开\n' + "行\n" * 2000)
    with pytest.raises(DataError, match=r"a.csv:3: field larger than field limit"):
        read("text_rows", path)


def test_parquet_by_row_groups(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="reads Parquet files")
    import pyarrow.parquet as parquet

    rows = [{"INSTRUCTION": f"问{i}", "RESPONSE": "答" * i * 20} for i in range(1, 11)]
    rows[0]["INSTRUCTION"], rows[3]["RESPONSE"] = None, ""
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=3)
    whole = read("zhihu", tmp_path)
    assert whole[0] == ("a.parquet:record 1", {"text": "答" * 20}, None)
    assert whole[3] == ("a.parquet:record 4", None, "empty text")
    assert [place for place, _, _ in whole] == [f"a.parquet:record {i}" for i in range(1, 11)]
    assert len(list_units("x", "zhihu", tmp_path)) == 1
    assert len(list_units("x", "zhihu", tmp_path, 1)) == 4
    assert read("zhihu", tmp_path, 1) == whole
    damaged = write(tmp_path / "b.parquet", (tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(DataError, match="b.parquet: "):
        list_units("x", "zhihu", damaged)


def test_inputs_that_hold_nothing(tmp_path, capsys):
    with pytest.raises(DataError, match="nowhere not found"):
        list_units("x", "txt", tmp_path / "nowhere")
    write(tmp_path / "a.md", "文")
    empty = write(tmp_path / "a.jsonl", "")
    with pytest.raises(DataError, match=r"no data in it; a alpaca source is \.jsonl \.ndjson"):
        list_units("x", "alpaca", tmp_path)
    said = f"{tmp_path / 'a.md'}: not read: notes or metadata\n{empty}: empty\n"
    assert capsys.readouterr().err == said


def test_order_does_not_depend_on_the_file_system(tmp_path):
    for name in ("b.jsonl", "a/z.jsonl", "a.jsonl", "c.csv"):
        write(tmp_path / name, '{"text": "文"}\n')
    assert files_read("text_rows", tmp_path) == ["a.jsonl", "z.jsonl", "b.jsonl", "c.csv"]
