"""corpora/rows.py, read through corpora/sources.py: lines, JSON and text, and what real files do to a reader."""

import gzip
import io
import json
import re
from collections import Counter

import pytest
from reading import at, json_lines, read, write

from corpora import encodings, rows
from corpora.files import Unit
from corpora.sources import list_units, read_records
from dataset.formats import DataError

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


@pytest.mark.parametrize("end", ['{"text": "断', '{"text": "断"', "{", "\xe6", "纯文字"])
def test_json_lines_that_break_off(tmp_path, end):
    path = write(tmp_path / "a.jsonl", json_lines({"text": "一"}).encode() + end.encode("latin-1", "replace"))
    with pytest.raises(DataError, match="a.jsonl:2: not .* and ends without a line break: it breaks off"):
        read("text_rows", path)
    write(path, json_lines({"text": "一"}).encode() + end.encode() + b"\n")  # a bad line, but all of it
    assert [record for _, record, _ in read("text_rows", path)] == [{"text": "一"}, None]


ROWS = [{"text": f"第{i}行"} for i in range(9)]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS, indent=2),
        json.dumps({"data": ROWS}),
        json.dumps({"version": "1.0", "训练": ROWS, "n": 9}, indent=2, ensure_ascii=False),
        "\n".join(json.dumps(row, indent=2) for row in ROWS),
        ",\n".join(map(json.dumps, ROWS)),
        " ".join(map(json.dumps, ROWS)),
        json.dumps([row["text"] for row in ROWS]),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson", "a"])
@pytest.mark.parametrize("block", [64, 1 << 20])
def test_shapes_of_json(tmp_path, monkeypatch, name, text, block):
    monkeypatch.setattr(rows, "BLOCK", block)
    results = read("text_rows", write(tmp_path / name, text))
    assert results == [(f"{name}:record {i}", row, None) for i, row in enumerate(ROWS, 1)]


def test_a_text_a_line(tmp_path):
    path = write(tmp_path / "a.jsonl", '"第一行"\n"第二行"\n')
    assert read("text_rows", path) == at("a.jsonl", [(1, {"text": "第一行"}, None), (2, {"text": "第二行"}, None)])
    assert [note for _, _, note in read("alpaca", path)] == ["not an object"] * 2


@pytest.mark.parametrize("names", [("role", "content"), ("from", "value")])
def test_a_list_of_messages_is_a_row(tmp_path, names):
    asked, answered = ({names[0]: role, names[1]: "文"} for role in ("user", "assistant"))
    several = write(tmp_path / "a.jsonl", json_lines([asked, answered], [asked, answered, asked]))
    one = write(tmp_path / "b.json", json.dumps([asked, answered], indent=1))
    (lines,), (value,) = list_units("x", "messages", several), list_units("x", "messages", one)
    assert [row for _, row, _ in rows.read_rows(lines)] == [[asked, answered], [asked, answered, asked]]
    assert list(rows.read_rows(value)) == [(f"{one}:record 1", [asked, answered], None)]
    write(one, json.dumps([{"from": "百科", "text": "文"}] * 2))  # where texts are from is no role
    assert [record for _, record, _ in read("text_rows", one)] == [{"text": "文"}] * 2


def test_one_object_a_file(tmp_path):
    for i, row in enumerate(ROWS):
        write(tmp_path / f"{i}.json", json.dumps(row | {"comments": [{"by": "甲"}]}, indent=2 if i % 2 else None))
    assert [record for _, record, _ in read("text_rows", tmp_path)] == ROWS


def test_objects_of_which_the_rows_cannot_be_told(tmp_path):
    path = write(tmp_path / "a.json", json.dumps({"train": ROWS, "test": ROWS}))
    with pytest.raises(DataError, match="a.json: holds several lists, train, test; write each to a file of its own"):
        read("text_rows", path)
    path = write(tmp_path / "b.json", json.dumps({"train": [{"text": "长" * 200_000}] * 9, "test": ROWS}))
    with pytest.raises(DataError, match="b.json: other data beside its list of 9 records: test"):
        read("text_rows", path)
    for cut in (-1, -20, -800_000):
        text = json.dumps({"data": [{"text": "长" * 200_000}] * 9}, ensure_ascii=False)[:cut]
        with pytest.raises(DataError, match="c.json: .*breaks off"):
            read("text_rows", write(tmp_path / "c.json", text))


@pytest.mark.parametrize("array", [False, True])
def test_numbers_of_too_many_digits(tmp_path, array):
    text = '{"n": -%s, "text": "文"}' % ("9" * 5000)
    path = write(tmp_path / "a.json", f"[{text}, {text}]" if array else f"{text}\n{text}\n")
    assert [record for _, record, _ in read("text_rows", path)] == [{"text": "文"}] * 2


def test_nesting_without_end(tmp_path):
    deep = '{"text": "文", "a": ' + "[" * 100_000 + "]" * 100_000 + "}"
    path = write(tmp_path / "a.jsonl", '{"text": "一"}\n' + deep + "\n")
    assert [note for _, _, note in read("text_rows", path)] == [None, "nested too deeply"]
    path = write(tmp_path / "a.json", f'[{{"text": "一"}}, {deep}]')
    with pytest.raises(DataError, match="a.json: record 2 is nested too deeply"):
        read("text_rows", path)


# long texts


def novel(chapters=30, lines=40):
    parts = []
    for i in range(1, chapters + 1):
        parts.append(f"第{i}章 风起\n")
        parts += [f"第{i}章的第{j}句话，写在这里。他说：“走罢！”\n" for j in range(1, lines + 1)]
    return "".join(parts)


@pytest.mark.parametrize("block", [97, 1 << 20])
def test_a_long_text_is_cut_before_its_chapters(tmp_path, monkeypatch, block):
    monkeypatch.setattr(rows, "BLOCK", block)
    text = novel()
    path = write(tmp_path / "a.txt", text.replace("\n", "\r\n"))
    results = read("txt", path, characters=2000)
    pieces = [record["text"] for _, record, _ in results]
    assert "".join(pieces) == text
    assert all(re.match("第[0-9]+章 风起\n", piece) and 1000 <= len(piece) <= 3000 for piece in pieces)
    assert 8 <= len(pieces) <= 25
    lines = [1 + text[: text.index(piece)].count("\n") for piece in pieces]
    assert [place for place, _, _ in results] == [f"a.txt:{line}" for line in lines]
    assert read("txt", path) == [("a.txt:1", {"text": text}, None)]
    assert len(read("txt", path, characters=len(text))) == 1


@pytest.mark.parametrize(
    "text, ending",
    [("一行字\n" * 3000, "\n"), ("一句话。" * 3000, "。"), ("“一句话！”" * 2000, "”"), ("字" * 12000, "字")],
)
@pytest.mark.parametrize("block", [7, 1000, 1 << 20])
@pytest.mark.parametrize("size", [10, 100, 5000, 11999])
def test_a_long_text_without_chapters(tmp_path, monkeypatch, text, ending, block, size):
    monkeypatch.setattr(rows, "BLOCK", block)
    pieces = list(rows.cut_text(io.StringIO(text), size))
    assert "".join(pieces) == text and len(pieces) > 1
    assert all(piece.endswith(ending) for piece in pieces)
    assert all(size // 4 <= len(piece) <= size + size // 2 for piece in pieces)


def test_a_bad_byte_is_said_of_its_piece_alone(tmp_path):
    path = write(tmp_path / "a.txt", "一行字\n".encode() * 50 + b"\xff\n" + "一行字\n".encode() * 50)
    notes = [note for _, _, note in read("txt", path, characters=100)]
    assert notes.count("bytes that are not UTF-8 replaced") == 1 and len(notes) >= 4


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_line_without_end_is_passed_over_and_not_held(tmp_path, monkeypatch, encoding):
    monkeypatch.setattr(encodings, "LONGEST", 100)
    monkeypatch.setattr(encodings, "BLOCK", 30)
    fits, long = [json.dumps({"text": "a" * n}) for n in (87, 89)]  # 99 characters and the break; one more
    text = "\n".join([fits, long, fits, "b" * 1000, fits, long])
    path = write(tmp_path / "a.jsonl", text.encode(encoding))
    results = [({"text": "a" * 87}, None), (None, "longer than 32 MB"), ({"text": "a" * 87}, None)]
    results += [(None, "longer than 32 MB"), ({"text": "a" * 87}, None), (None, "longer than 32 MB")]
    results = at("a.jsonl", [(number, *result) for number, result in enumerate(results, 1)])
    assert read("text_rows", path) == results
    if encoding == "utf-8":
        for size in range(1, 300, 7):  # units that begin and end within it
            assert read("text_rows", path, size) == results


def test_what_is_no_record_for_its_length_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(encodings, "LONGEST", 1 << 20)
    unclosed = json.dumps([{"text": "a"}, {"text": "b" * (5 << 20)}])[:-3]
    with pytest.raises(DataError, match=r"a\.json: record 2 is longer than 32 MB: or a .* not closed"):
        read("text_rows", write(tmp_path / "a.json", unclosed))
    with pytest.raises(DataError, match=r"a\.csv: a line of 2,097,152 characters is no row"):
        read("text_rows", write(tmp_path / "a.csv", "text\n" + "b" * (2 << 20)))
    path = write(tmp_path / "a.txt.gz", gzip.compress(b"c" * (2 << 20)))
    with pytest.raises(DataError, match=r"a\.txt\.gz: longer than 32 MB for one document: txt_characters"):
        read("txt", path)
    assert len(read("txt", path, characters=10_000)) == 210
