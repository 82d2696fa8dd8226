"""corpora/encodings.py: which encoding a file is in, told by what it holds."""

from contextlib import suppress

import pytest
from reading import at, read, write

from corpora.encodings import BLOCK, decode
from corpora.sources import list_units
from dataset.formats import DataError

SIMPLIFIED = "清晨，老渔夫在旧桥上修好了一只木箱，谁也没有多问。这个时候他们都说，这里的人是不会来了。"
TRADITIONAL = "清晨，老漁夫在舊橋上修好了一隻木箱，誰也沒有多問。這個時候他們都說，這裡的人是不會來了。"
ASCII = '{"text": "%s"}\n' % ("plain English, a long line of it " * 50)


def test_neither_encoding(tmp_path):
    path = write(tmp_path / "a.jsonl", b"\xff\xff\n" * 9)
    with pytest.raises(DataError, match=r"a.jsonl: neither UTF-8 nor GB18030 nor Big5 beyond doubt; convert it"):
        list_units("x", "text_rows", path)


@pytest.mark.parametrize(
    "text, encoding, said",
    [
        (SIMPLIFIED, "gb18030", "GB18030"),
        (SIMPLIFIED, "gb2312", "GB18030"),
        (TRADITIONAL, "gbk", "GB18030"),
        (TRADITIONAL, "big5", "Big5"),
        (TRADITIONAL + "嘅咗", "big5hkscs", "Big5"),
        (SIMPLIFIED, "utf-16-le", "UTF-16"),
        (SIMPLIFIED, "utf-16-be", "UTF-16"),
        (SIMPLIFIED, "utf-16", None),
        (SIMPLIFIED, "utf-32", None),
        (SIMPLIFIED, "utf-32-le", "UTF-32"),
        (SIMPLIFIED, "utf-32-be", "UTF-32"),
        (SIMPLIFIED, "utf-8-sig", None),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_every_encoding(tmp_path, capsys, name, text, encoding, said):
    files = {"a.txt": text, "a.jsonl": f'{{"text": "{text}"}}\n', "a.csv": f"title,text\r\n,{text}\r\n"}
    path = write(tmp_path / name, files[name].encode(encoding))
    assert [record for _, record, _ in read("txt" if name == "a.txt" else "text_rows", path)] == [{"text": text}]
    assert capsys.readouterr().err == (f"{path}: read as {said}\n" if said else "")


# What GB 18030-2022 has where Python, as in 2000, decodes to private use.
STANDARD = {
    **{"A6D9": "︐", "A6DA": "︒", "A6DB": "︑", "A6DC": "︓", "A6DD": "︔", "A6DE": "︕", "A6DF": "︖", "A6EC": "︗"},
    **{"A6ED": "︘", "A6F3": "︙", "A8BC": "ḿ", "A8BF": "ǹ", "FE51": "\U00020087", "FE52": "\U00020089"},
    **{"FE53": "\U000200cc", "FE59": "\u9fb4", "FE61": "\u9fb5", "FE66": "\u9fb6", "FE67": "\u9fb7"},
    **{"FE6C": "\U000215d7", "FE6D": "\u9fb8", "FE76": "\U0002298f", "FE7E": "\u9fb9", "FE90": "\u9fba"},
    **{"FE91": "\U000241fe", "FEA0": "\u9fbb"},
}


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.json"])
def test_characters_newer_than_the_codec_of_python(tmp_path, name):
    start, text, end = (part.encode("gb18030") for part in (SIMPLIFIED, '"text": "', SIMPLIFIED))
    data = start + bytes.fromhex("".join(STANDARD)) + end
    files = {"a.txt": data, "a.jsonl": b"{" + text + data + b'"}\n', "a.csv": b"title,text\r\n," + data + b"\r\n"}
    files["a.json"] = b"[{" + text + data + b'"}]'
    read_back = [record["text"] for _, record, _ in read("txt" if name == "a.txt" else "text_rows",
                                                         write(tmp_path / name, files[name]))]  # fmt: skip
    assert read_back == [SIMPLIFIED + "".join(STANDARD.values()) + SIMPLIFIED]


def test_what_the_standard_leaves_to_users_stays_private():
    codes = [f"{a:02X}{b:02X}" for a in range(0xA1, 0xFF) for b in range(0xA1, 0xFF)]
    for code in {*codes, *(f"FE{b:02X}" for b in range(0x50, 0xA1) if b != 0x7F)} - STANDARD.keys():
        with suppress(UnicodeDecodeError):
            assert decode(bytes.fromhex(code), "gb18030") == bytes.fromhex(code).decode("gb18030")


@pytest.mark.parametrize("data", ["Où était-elle ? Être à Málaga, señor.".encode("latin-1"), b"\0\1\2\xff" * 99])
def test_no_chinese_encoding_is_an_error(tmp_path, data):
    with pytest.raises(DataError, match="a.txt: neither UTF-8 nor GB18030 nor Big5 beyond doubt; convert it: iconv"):
        list_units("x", "txt", write(tmp_path / "a.txt", data))


def test_a_file_in_doubt_is_read_like_the_others(tmp_path, capsys):
    write(tmp_path / "a.txt", "鼾齉龘麤的".encode("gb18030"))
    write(tmp_path / "b.txt", SIMPLIFIED.encode("gb18030"))
    write(tmp_path / "c.txt", SIMPLIFIED)
    assert [record["text"] for _, record, _ in read("txt", tmp_path)] == ["鼾齉龘麤的", SIMPLIFIED, SIMPLIFIED]
    assert capsys.readouterr().err == f"{tmp_path}: 2 files read as GB18030: a.txt, b.txt\n"


@pytest.mark.parametrize("at_end", [True, False])
def test_the_whole_file_decides(tmp_path, at_end):
    english = ASCII * (3 * BLOCK // len(ASCII))
    line = f'{{"text": "{SIMPLIFIED}"}}\n'
    text = english + line if at_end else english + line * 9 + english
    path = write(tmp_path / "a.jsonl", text.encode("gb18030"))
    results = read("text_rows", path)
    assert all(note is None for _, _, note in results) and {"text": SIMPLIFIED} in [r for _, r, _ in results]


def test_byte_order_marks_within_joined_files(tmp_path):
    def joined(*texts):
        return b"".join(text.encode("utf-8-sig") for text in texts)

    path = write(tmp_path / "a.jsonl", joined('{"text": "一"}\n', '{"text": "二"}\n'))
    assert read("text_rows", path) == at("a.jsonl", [(1, {"text": "一"}, None), (2, {"text": "二"}, None)])
    path = write(tmp_path / "b.txt", joined("一\n", "二\n"))
    assert read("lines", path) == at("b.txt", [(1, {"text": "一"}, None), (2, {"text": "二"}, None)])
    assert read("txt", path) == at("b.txt", [(1, {"text": "一\n二\n"}, None)])
    path = write(tmp_path / "c.csv", joined("title,text\n,一\n", "title,text\n,二\n"))
    rows = [(2, {"text": "一"}, None), (3, None, "header once more"), (4, {"text": "二"}, None)]
    assert read("text_rows", path) == at("c.csv", rows)
    path = write(tmp_path / "d.json", joined('{\n"text": "一"\n}\n', '{\n"text": "二"\n}\n'))
    assert [record for _, record, _ in read("text_rows", path)] == [{"text": "一"}, {"text": "二"}]
