"""corpora/tables.py: CSV with its quotes, Parquet and Arrow."""

import pytest
from reading import at, json_lines, read, write

from corpora import tables
from corpora.sources import list_units
from dataset.formats import DataError


def texts(record):
    return [message["content"] for message in record["messages"]]


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


def test_a_quote_that_is_never_closed(tmp_path):
    rows = [f"题{i},文字{i}" for i in range(60)]
    rows[10] = '题,"引文没有完'
    path = write(tmp_path / "a.csv", "title,text\n" + "\n".join(rows) + "\n")
    with pytest.raises(DataError, match=r"a.csv:12: .* a quote that opens in this row is not closed"):
        read("text_rows", path)
    for closing, why in (
        ('题,文"后', "is not closed"),
        ('题,文"', "is closed only after other rows"),
        ('题"', "is closed"),
    ):
        rows[30] = closing
        write(path, "title,text\n" + "\n".join(rows) + "\n")
        with pytest.raises(DataError, match=rf"a.csv:12: .*a quote that opens in this row {why}"):
            read("text_rows", path)


def test_a_stray_quote_among_rows_with_quotes(tmp_path):
    rows = [f'题目{i},"第一行, {i}\n\n第三行"' if i % 4 == 0 else f"题目{i},这是第{i}行文字" for i in range(60)]
    path = write(tmp_path / "a.csv", "title,text\n" + "\n".join(rows) + "\n")
    assert [note for _, _, note in read("text_rows", path)] == [None] * 60
    rows[21:24] = ['题目,"这是一行', *[f"题目{i},这是第{i}行文字" for i in range(9)], '题目,这是一行文字"']
    write(path, "title,text\n" + "\n".join(rows) + "\n")
    with pytest.raises(DataError, match=r"a.csv:35: a quote that opens in this row is closed only after other rows"):
        read("text_rows", path)


def test_a_short_poem_with_a_comma_in_each_line_is_one_field(tmp_path):
    lines = "风急天高猿啸哀,渚清沙白鸟飞回", "无边落木萧萧下,不尽长江滚滚来"
    poem = "\n".join([*lines, "万里悲秋常作客,百年多病独登台", "艰难苦恨繁霜鬓,潦倒新停浊酒杯"])
    path = write(tmp_path / "a.csv", f'title,content\n无题,暂缺\n登高,"{poem}"\n')
    assert read("text_rows", path)[-1][1:] == ({"text": f"登高\n{poem}"}, "lines between quotes that look like rows")


def test_quotes_that_are_not_csv(tmp_path):
    path = write(tmp_path / "a.csv", 'title,text\n一,"你好"他说\n二,他说"你好"\n三,"你,好"他说\n四,完\n')
    assert read("text_rows", path) == at(
        "a.csv",
        [
            (2, {"text": '一\n"你好"他说'}, "quotes that are not CSV's"),
            (3, {"text": '二\n他说"你好"'}, None),
            (4, None, "quotes that are not CSV's"),
            (5, {"text": "四\n完"}, None),
        ],
    )


def test_fields_of_many_lines_are_no_rows(tmp_path):
    matrix, poem = "1, 2, 3\n4, 5, 6\n7, 8, 9\n0, 0, 1", "First, a line\nThen, one more\nAnd, another\nEnd, here"
    text = (
        "instruction,input,output\n" + f'请把下面的矩阵转置以后写出来给我看,"{matrix}",好的这就是转置以后的矩阵\n' * 3
    )
    assert [note for _, _, note in read("alpaca", write(tmp_path / "a.csv", text))] == [None] * 3
    text = "title,text\n" + "很长的一行标题,很长的一行正文，比诗长得多，长得多的多\n" * 5 + f'诗,"{poem}"\n'
    assert read("text_rows", write(tmp_path / "b.csv", text))[-1][1] == {"text": f"诗\n{poem}"}


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_the_header_tells_what_separates_fields(tmp_path, name, separator):
    path = write(tmp_path / name, separator.join(["title", "text"]) + "\r\n" + separator.join("题文") + "\r\n")
    assert read("text_rows", path) == [(f"{name}:2", {"text": "题\n文"}, None)]


@pytest.mark.parametrize("end", ["题", "题,文".encode()[:-1], '题,"文', '题,"文\n字', '"题"字'])
def test_csv_that_breaks_off(tmp_path, end):
    head = "title,text\n" + "一,二\n" * 20
    path = write(tmp_path / "a.csv", head.encode() + (end if isinstance(end, bytes) else end.encode()))
    with pytest.raises(DataError, match="a.csv:22: .*breaks off"):
        read("text_rows", path)


def test_csv_that_only_lacks_its_last_line_break(tmp_path):
    path = write(tmp_path / "a.csv", 'title,text\n一,"二"\n \n三,四')
    assert [(record, note) for _, record, note in read("text_rows", path)] == [
        ({"text": "一\n二"}, None),
        (None, "blank"),
        ({"text": "三\n四"}, None),
    ]


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


def test_values_that_python_cannot_hold(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="reads Parquet files")
    import pyarrow.parquet as parquet

    when = pyarrow.array([-(10**18), 0, 10**18], pyarrow.timestamp("us"))
    nested = pyarrow.StructArray.from_arrays([when], ["at"])
    table = pyarrow.table({"text": ["甲", "乙", "丙"], "when": when, "nested": nested})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert [record for _, record, _ in read("text_rows", tmp_path)] == [{"text": text} for text in "甲乙丙"]
    (values,) = [tables.to_python(when)]
    assert values[0] is values[2] is None and values[1].year == 1970


@pytest.mark.parametrize("stream", [True, False])
def test_arrow_files(tmp_path, capsys, stream):
    pyarrow = pytest.importorskip("pyarrow", reason="reads Arrow files")
    table = pyarrow.table({"text": [f"第{i}篇" for i in range(1000)]})
    path = tmp_path / "data-00000-of-00001.arrow"
    with (pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file)(str(path), table.schema) as file:
        file.write_table(table)
    write(tmp_path / "state.json", json_lines({"_fingerprint": "0"}))  # what save_to_disk writes beside it
    write(tmp_path / "dataset_info.json", "{}")
    assert [record["text"] for _, record, _ in read("text_rows", tmp_path)] == table["text"].to_pylist()
    assert "2 files not read: notes or metadata" in capsys.readouterr().err
    for cut in (4, 8, 100, 3000):
        damaged = write(tmp_path / "cut" / "a.arrow", path.read_bytes()[:-cut])
        with pytest.raises(DataError, match="a.arrow: (breaks off|damaged)"):
            read("text_rows", damaged)


def notes_and_texts(path):
    return [(record and record["text"], note) for _, record, note in read("text_rows", path)]


def test_one_column_whose_quotes_hold_lines_like_rows(tmp_path):
    rows = [f"这是第{i}行，写着一件事" for i in range(20)]
    rows[5], rows[7] = '"这是开头的引号，没有完', '这是后面的引号，到这里"'
    found = notes_and_texts(write(tmp_path / "a.csv", "text\n" + "\n".join(rows) + "\n"))
    merged = "\n".join(rows[5:8]).strip('"')
    assert found == [(row, None) for row in rows[:5]] + [(merged, "lines between quotes that look like rows")] + [
        (row, None) for row in rows[8:]
    ]
    rows[5:8] = ['"题目\n\n短\n又短"']
    found = notes_and_texts(write(tmp_path / "b.csv", "text\n" + "\n".join(rows) + "\n"))
    assert all(note is None for _, note in found)


@pytest.mark.parametrize("text, wanted", [(r"公式\\frac 好", r"公式\frac 好"), (r"公式\frac{1}\n", r"公式\frac{1}\n")])
def test_quotes_after_backslashes(tmp_path, monkeypatch, text, wanted):
    rows = [r'"题","他说\"你好\"。"', f'"题","{text}"', r"题,\"引\"文"]
    path = write(tmp_path / "a.csv", "title,text\n" + "\n".join(rows) + "\n")
    assert notes_and_texts(path) == [(f"题\n{part}", None) for part in ('他说"你好"。', wanted, '"引"文')]
    monkeypatch.setattr(tables, "BLOCK", 1000)  # told from the beginning
    many = write(tmp_path / "b.csv", "title,text\n" + "\n".join(rows * 99) + "\n")
    assert notes_and_texts(many) == notes_and_texts(path) * 99


def test_backslashes_in_plain_csv_stay(tmp_path):
    path = write(tmp_path / "a.csv", 'title,text\n一,"C:\\目录\\"\n二,"说\\""是"\n三,\\alpha\n')
    assert notes_and_texts(path) == [("一\nC:\\目录\\", None), ('二\n说\\"是', None), ("三\n\\alpha", None)]


def test_headers_of_joined_files_in_another_order(tmp_path):
    path = write(tmp_path / "a.csv", "title,text\n题,文\ntext,title\n文二,题二\n")
    assert notes_and_texts(path) == [("题\n文", None), (None, "header once more"), ("题二\n文二", None)]


@pytest.mark.parametrize(
    "head", ["title,text", "title,text,,", "sep=,\ntitle,text,", ' title ,"text "', "\ufefftitle,text"]
)
def test_what_spreadsheets_write(tmp_path, head):
    path = write(tmp_path / "a.csv", head + '\n题,文\n题,文,,\n,,,\n题,文,\n题,"文\n字",,\n题,文,多,余\n')
    found, row = notes_and_texts(path), ("题\n文", None)
    assert found[:-1] == [row, row, (None, "blank"), row, ("题\n文\n字", None)]
    assert found[-1] == (None, "wrong number of columns")


def test_a_bare_comma_where_the_last_column_has_no_name(tmp_path):
    path = write(tmp_path / "a.csv", ",title,text,\n1,题,文,\n2,题二,先文二,再文三\n")
    assert notes_and_texts(path) == [("题\n文", None), (None, "wrong number of columns")]


def test_the_separator_that_a_first_line_names(tmp_path):
    path = write(tmp_path / "a.csv", "sep=;\ntitle;text\n一, 二, 三;文\n")
    assert read("text_rows", path) == [("a.csv:3", {"text": "一, 二, 三\n文"}, None)]


def test_blanks_before_quotes(tmp_path):
    path = write(tmp_path / "a.csv", 'title, "text"\n题, "一, 二"\n')
    assert notes_and_texts(path) == [("题\n一, 二", None)]


def test_two_columns_of_one_name(tmp_path):
    path = write(tmp_path / "a.csv", "text,title,text\n一,二,三\n")
    with pytest.raises(DataError, match="a.csv:1: two columns are named text; rename one"):
        read("text_rows", path)
    pyarrow = pytest.importorskip("pyarrow", reason="reads Parquet files")
    import pyarrow.parquet as parquet

    table = pyarrow.Table.from_arrays([pyarrow.array(["一"]), pyarrow.array(["二"])], ["text", "text"])
    parquet.write_table(table, tmp_path / "b.parquet")
    with pytest.raises(DataError, match="b.parquet: two columns are named text"):
        read("text_rows", tmp_path / "b.parquet")


def test_tables_without_rows(tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow", reason="reads Parquet files")
    import pyarrow.parquet as parquet

    with parquet.ParquetWriter(tmp_path / "a.parquet", pyarrow.schema([("text", pyarrow.string())])):
        pass
    write(tmp_path / "b.csv", "title,text\n题,文\n")
    assert read("text_rows", tmp_path) == [("b.csv:2", {"text": "题\n文"}, None)]
    assert capsys.readouterr().err == f"{tmp_path}/a.parquet: no rows in it\n"
