"""corpora/files.py and corpora/kinds.py: every path below a source is read, or named with the reason."""

import bz2
import gzip
import json
import lzma
import os
import tempfile
from pathlib import Path

import pytest
from reading import files_read, json_lines, read, write

from corpora.sources import list_units, read_records
from dataset.formats import DataError

ROW = json_lines({"text": "一行"})


def zstd(data):
    pyarrow = pytest.importorskip("pyarrow", reason="reads .zst")
    out = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(out, "zstd") as file:
        file.write(data)
    return out.getvalue().to_pybytes()


COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}


def test_inputs_that_hold_nothing(tmp_path, capsys):
    with pytest.raises(DataError, match="nowhere not found"):
        list_units("x", "txt", tmp_path / "nowhere")
    write(tmp_path / "a.md", "文")
    empty = write(tmp_path / "a.jsonl", "")
    with pytest.raises(DataError, match=r"no data in it; alpaca sources are \.jsonl \.ndjson"):
        list_units("x", "alpaca", tmp_path)
    said = f"{tmp_path / 'a.md'}: not read: notes or metadata\n{empty}: empty\n"
    assert capsys.readouterr().err == said


def test_order_does_not_depend_on_the_file_system(tmp_path):
    for name in ("b.jsonl", "a/z.jsonl", "a.jsonl", "c.csv"):
        write(tmp_path / name, '{"text": "文"}\n')
    assert files_read("text_rows", tmp_path) == ["a.jsonl", "z.jsonl", "b.jsonl", "c.csv"]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_every_compression(tmp_path, suffix):
    rows = [{"text": f"{i * 7919 % 10007}一"} for i in range(9000)]
    data = COMPRESS[suffix](json_lines(*rows).encode())
    write(tmp_path / f"a.jsonl.{suffix}", data)
    write(tmp_path / f"B.NDJSON.{suffix.upper()}", data + data)  # some tools write several streams in a row
    write(tmp_path / f"c.csv.{suffix}", COMPRESS[suffix]("title,text\n题,文\n".encode()))
    write(tmp_path / f"d.tsv.{suffix}", COMPRESS[suffix]("title\ttext\n题\t文\n".encode()))
    records = [record for _, record, _ in read("text_rows", tmp_path)]
    assert records == rows * 3 + [{"text": "题\n文"}] * 2
    path = write(tmp_path / "cut" / f"a.jsonl.{suffix}", data[:-100])
    with pytest.raises(DataError, match=rf"a.jsonl.{suffix}: damaged or not fully downloaded"):
        read("text_rows", path)


def test_a_file_is_what_it_holds(tmp_path):
    write(tmp_path / "1.jsonl", gzip.compress(ROW.encode()))
    write(tmp_path / "2.json", ROW + ROW)
    write(tmp_path / "3.jsonl", json.dumps([{"text": "一行"}] * 2, indent=1))
    write(tmp_path / "4.csv", ROW)
    write(tmp_path / "5.txt", ROW)
    write(tmp_path / "part-00006", ROW)
    write(tmp_path / "7.jsonl.gz", ROW)  # decompressed by what downloaded it
    assert [record for _, record, _ in read("text_rows", tmp_path)] == [{"text": "一行"}] * 9
    write(tmp_path / "小说.第1卷", "正文")
    write(tmp_path / "wiki_00", "文")
    assert files_read("txt", tmp_path) == ["wiki_00", "小说.第1卷"]


def test_what_is_not_read_is_named(tmp_path, capsys):
    for name in ("README.md", "LICENSE", "dataset_infos.json", "readme.txt"):
        write(tmp_path / name, "{}")
    for i in range(9):
        write(tmp_path / "pictures" / f"{i}.png", b"\x89PNG")
    write(tmp_path / "a.xlsx", b"PK\x03\x04")
    write(tmp_path / "archive", b"PK\x03\x04")
    write(tmp_path / "b.zip", b"PK\x03\x04")
    write(tmp_path / "c.txt", "文字")
    write(tmp_path / "data" / ".hidden.jsonl", ROW)
    write(tmp_path / "data" / "d.jsonl", ROW)
    assert files_read("text_rows", tmp_path) == ["d.jsonl"]
    said = capsys.readouterr().err.replace(f"{tmp_path}/", "").replace(f"{tmp_path}", "")
    assert sorted(said.splitlines()) == [
        ": 4 files not read: notes or metadata: LICENSE, README.md, dataset_infos.json, ...",
        ": 9 files not read: a .png file: pictures/0.png, pictures/1.png, pictures/2.png, ...",
        "a.xlsx: not read: a .xlsx file; save it as .csv",
        "archive: not read: a zip archive, .xlsx or .docx; unpack it, or save it as .csv or .txt",
        "b.zip: not read: a .zip file; unpack it",
        "c.txt: not read: plain text, not rows; the layouts txt and lines read it",
    ]
    assert files_read("webnovel", tmp_path) == ["d.jsonl"]  # the layout reads data/*
    write(tmp_path / "e.jsonl", ROW)
    capsys.readouterr()
    assert files_read("webnovel", tmp_path) == ["d.jsonl"]
    assert "3 files not read: not among data/*: archive, c.txt, e.jsonl" in capsys.readouterr().err
    assert files_read("txt", tmp_path) == ["c.txt"]
    assert "d.jsonl, e.jsonl" in (said := capsys.readouterr().err)
    assert "2 files not read: rows, not text, which the layout txt reads" in said


def test_a_folder_of_the_files_of_a_layout_alone(tmp_path, capsys):
    write(tmp_path / "a.json", json_lines({"title": "题", "summary": "文"}))
    assert files_read("baike", tmp_path) == ["a.json"]
    assert capsys.readouterr().err == ""


def test_what_datasets_has_cached_is_not_read(tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    for name, text in (("data-00000-of-00001.arrow", "原文"), ("cache-1f3a.arrow", "改过的")):
        with pyarrow.OSFile(str(tmp_path / name), "wb") as file:
            table = pyarrow.table(dict(text=[text]))
            with pyarrow.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)
    assert len(files_read("text_rows", tmp_path)) == 2
    listed = [{"filename": "data-00000-of-00001.arrow"}]
    write(tmp_path / "state.json", json.dumps({"_data_files": listed, "_split": "train"}))
    capsys.readouterr()
    assert files_read("text_rows", tmp_path) == ["data-00000-of-00001.arrow"]
    assert "cache-1f3a.arrow: not read: not among the files of its state.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "layout, name, data, message",
    [
        ("text_rows", "a.zip", b"PK\x03\x04", "a.zip: a zip archive, .xlsx or .docx; unpack it"),
        (
            "text_rows",
            "a.tar.gz",
            gzip.compress(b"x" * 257 + b"ustar\0" + b"x" * 300, mtime=0),
            "a.tar.gz: an archive; unpack it",
        ),
        ("txt", "a.pdf", b"%PDF-1.7", "a.pdf: a document of an office program"),
        ("alpaca", "a.txt", "文字".encode(), "a.txt: plain text, not rows; the layouts txt and lines read it"),
        ("lines", "a.txt", ROW.encode(), "a.txt: JSON, not text, .* a layout such as text_rows reads it"),
        ("lines", "a.txt", "一行\r又一行\r".encode(), r"a.txt: its lines end in \\r alone"),
        ("prompts", "a.txt", "一问\r又一问".encode(), r"a.txt: its lines end in \\r alone"),
        ("txt", "a", b"PAR1", "a: rows, not text"),
        ("text_rows", "a.parquet", b"<html>404</html>", "a.parquet: does not begin as such a file does"),
        ("text_rows", "a.json", b"'text'", "a.json: neither a JSON array nor JSON Lines"),
    ],
)
def test_a_file_given_by_name_that_cannot_be_read_is_an_error(tmp_path, layout, name, data, message):
    with pytest.raises(DataError, match=message):
        list_units("x", layout, write(tmp_path / name, data))


@pytest.mark.parametrize("name", ["b.jsonl", "b.json", "b.parquet", "b.txt"])
def test_git_lfs_pointers(tmp_path, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 99\n"
    path, layout = write(tmp_path / name, pointer), "txt" if name == "b.txt" else "text_rows"
    write(tmp_path / "a.jsonl", ROW)
    for source in (path, tmp_path):
        with pytest.raises(DataError, match=f"{name}: a Git LFS pointer, the data was not downloaded: git lfs pull"):
            list_units("x", layout, source)


def test_links(tmp_path, capsys):
    write(tmp_path / "elsewhere" / "a.jsonl", ROW)
    folder = tmp_path / "in"
    write(folder / "b" / "b.jsonl", ROW)
    (folder / "a").symlink_to(tmp_path / "elsewhere")
    (folder / "b" / "loop").symlink_to(folder)
    (folder / "again").symlink_to(folder / "b")
    (folder / "gone").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "pipe")
    assert files_read("text_rows", folder) == ["a.jsonl", "b.jsonl"]
    assert sorted(capsys.readouterr().err.replace(f"{folder}", "in").splitlines()) == [
        "in/gone: not read: a broken link",
        "in/pipe: not read: neither a file nor a folder",
        "in: 2 files not read: the same folder as one that is read, by a link: b/loop, again",
    ]
    for name, message in (("gone", "neither a file nor a folder"), ("pipe", "neither a file nor a folder")):
        with pytest.raises(DataError, match=message):
            list_units("x", "text_rows", folder / name)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs users")
@pytest.mark.parametrize("closed", ["closed", "closed/b.jsonl"])
def test_what_may_not_be_read_is_an_error(closed):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        write(Path(folder) / "a.jsonl", ROW)
        write(Path(folder) / "closed" / "b.jsonl", ROW)
        os.chmod(folder, 0o755)
        os.chmod(Path(folder) / closed, 0)
        user = os.geteuid()
        try:
            os.seteuid(user or 65534)  # root may read anything
            with pytest.raises(DataError, match=rf"{closed}: cannot be read: Permission denied"):
                list_units("x", "text_rows", folder)
        finally:
            os.seteuid(user)
            os.chmod(Path(folder) / closed, 0o755)


def test_patterns_and_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("x/a1.jsonl", "x/a2.jsonl", "y/a3.jsonl", "y/.a4.jsonl", "y/b.png", "z/sub/a5.jsonl", "a[1].jsonl"):
        write(tmp_path / name, ROW)
    assert files_read("text_rows", "~/x/a1.jsonl") == ["a1.jsonl"]
    assert files_read("text_rows", "~/[xy]/a?.jsonl") == ["a1.jsonl", "a2.jsonl", "a3.jsonl"]
    assert files_read("text_rows", f"{tmp_path}/?/*.jsonl") == ["a1.jsonl", "a2.jsonl", "a3.jsonl"]
    assert files_read("text_rows", tmp_path / "z*") == ["a5.jsonl"]
    assert files_read("text_rows", tmp_path / "a[1].jsonl") == ["a[1].jsonl"]  # a path wins over a pattern
    monkeypatch.chdir(tmp_path)
    assert files_read("text_rows", "x/*2*") == files_read("text_rows", "*/a2.jsonl") == ["a2.jsonl"]
    with pytest.raises(DataError, match=r"w\*: no file matches"):
        list_units("x", "text_rows", "w*")
    with pytest.raises(DataError, match=r"name the folder, whose subfolders are read too"):
        list_units("x", "text_rows", "**/a*")


def test_names_that_are_not_utf8(tmp_path, capsys):
    name = os.fsdecode("三国.txt".encode("gbk"))
    write(tmp_path / name, "正文")
    write(tmp_path / os.fsdecode("画.png".encode("gbk")), "")
    escaped = r"\udcc8\udcfd\udcb9\udcfa.txt"
    assert read("txt", tmp_path) == [(f"{escaped}:1", {"text": "正文"}, None)]
    assert r"\udcbb\udcad.png: not read" in capsys.readouterr().err
    pyarrow = pytest.importorskip("pyarrow", reason="reads Parquet files")
    from pyarrow import parquet

    with open(tmp_path / name, "wb") as file:
        parquet.write_table(pyarrow.table({"text": ["文"]}), file)
    assert read("text_rows", tmp_path) == [(f"{escaped}:record 1", {"text": "文"}, None)]


def test_small_files_share_a_unit(tmp_path):
    for i in range(40):
        write(tmp_path / "small" / f"{i:02d}.txt", f"第{i}篇" * 10)  # 70 or 80 bytes: less than a sixteenth of a unit
    write(tmp_path / "small" / "20-large.txt", "长" * 1000)
    whole = read("txt", tmp_path / "small", 1)
    assert [len(unit.parts) for unit in list_units("x", "txt", tmp_path / "small", 1)] == [0] * 41
    units = list_units("x", "txt", tmp_path / "small", 1300)
    assert [len(unit.parts) for unit in units] == [17, 3, 0, 16, 4]
    assert read("txt", tmp_path / "small", 1300) == whole
    write(tmp_path / "rows" / "a.jsonl", ROW)
    write(tmp_path / "rows" / "b.jsonl", ROW + "{")
    (unit,) = list_units("x", "text_rows", tmp_path / "rows")
    with pytest.raises(DataError, match="b.jsonl:2: not JSON and ends without a line break: it breaks off"):
        list(read_records(unit))


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_last_line_in_another_encoding_is_no_cut_file(tmp_path, end):
    other = '{"text": "另一行"}'.encode("gbk")
    path = write(tmp_path / "a.jsonl", (ROW * 3).encode() + other + b"\n" + other + end)
    (unit,) = list_units("x", "text_rows", path)
    assert [why for _, _, why in read_records(unit)] == [None] * 3 + ["not UTF-8"] * 2
    write(path, (ROW * 3 + ROW).encode()[: -len('"}\n') - 1])  # within a character
    (unit,) = list_units("x", "text_rows", path)
    with pytest.raises(DataError, match="a.jsonl:4: not UTF-8 and ends without a line break: it breaks off"):
        list(read_records(unit))


@pytest.mark.parametrize("size", [20, 1000])
def test_a_file_that_changes_after_it_was_listed(tmp_path, size):
    path = write(tmp_path / "a.jsonl", ROW * 9)
    units = list_units("x", "text_rows", path, size)
    write(path, ROW * 8)
    with pytest.raises(DataError, match="a.jsonl: its size changed while it was read"):
        for unit in units:
            list(read_records(unit))
    path.unlink()
    with pytest.raises(DataError, match="a.jsonl: cannot be read: No such file"):
        list(read_records(units[0]))


def test_only_notes_are_passed_over_by_their_stem(tmp_path, capsys):
    for stem in ("readme", "license", "notice", "changelog", "requirements"):
        write(tmp_path / f"{stem}.jsonl", ROW)
        write(tmp_path / f"{stem}.txt", "说明")
    assert files_read("text_rows", tmp_path) == [
        f"{stem}.jsonl" for stem in ("changelog", "license", "notice", "readme", "requirements")
    ]
    assert "5 files not read: notes or metadata" in capsys.readouterr().err
    with pytest.raises(DataError, match="no data in it"):
        files_read("txt", tmp_path)
    names = ", ".join(f"{stem}.jsonl" for stem in ("changelog", "license", "notice", "readme", "requirements"))
    said = capsys.readouterr().err
    assert f"5 files not read: rows, not text, which the layout txt reads: {names}\n" in said
    assert f"5 files not read: notes or metadata: {names.replace('.jsonl', '.txt')}\n" in said


def test_backups_of_editors_and_other_prose(tmp_path, capsys):
    for name in ("a.jsonl~", "#a.jsonl#", "~$a.jsonl"):
        write(tmp_path / name, ROW)
    write(tmp_path / "a.jsonl", ROW)
    assert files_read("text_rows", tmp_path) == ["a.jsonl"]
    assert "3 files not read: a backup of an editor: #a.jsonl#, a.jsonl~, ~$a.jsonl" in capsys.readouterr().err
    write(tmp_path / "b" / "第一回.md", "正文")
    with pytest.raises(DataError, match="no data in it"):
        files_read("txt", tmp_path / "b")
    assert capsys.readouterr().err == f"{tmp_path}/b/第一回.md: not read: a .md file; rename it to .txt\n"


def test_a_folder_of_a_thousand_levels(tmp_path):
    folder, here = tmp_path, os.getcwd()
    try:
        for _ in range(1100):
            (folder := folder / "d").mkdir()
        os.chdir(folder)
        Path("a.jsonl").write_text(ROW, encoding="utf-8")
        assert files_read("text_rows", tmp_path) == ["a.jsonl"]
        os.unlink("a.jsonl")
    finally:
        os.chdir(here)
        while folder != tmp_path:  # what removes pytest's folders recurses
            folder.rmdir()
            folder = folder.parent


def test_what_is_compressed_twice(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(gzip.compress(ROW.encode())))
    with pytest.raises(DataError, match="a.jsonl.gz: compressed twice; decompress it once"):
        list_units("x", "text_rows", path)


def test_names_that_would_steer_a_terminal(tmp_path, capsys):
    write(tmp_path / "a\n\x1b[31m.jsonl", ROW)
    write(tmp_path / "b\n.png", "")
    assert [place for place, _, _ in read("text_rows", tmp_path)] == [r"a\n\x1b[31m.jsonl:1"]
    assert capsys.readouterr().err == f"{tmp_path}/b\\n.png: not read: a .png file\n"
