"""The poems of chinese-poetry in its three layouts, in miniature.

Quoted in traditional characters: Wang Zhihuan's Climbing Stork Tower, Li Bai's Quiet Night Thought, Du Fu's quatrain on
two orioles and Wang Wei's Deer Park.
"""

import gzip
import io
import json
import tarfile

import pytest

from common.config import ConfigError
from corpora import poems
from corpora.clean import char_ngrams
from corpora.poems import Poem, clean_title, copied, main, ngrams_of, read_poems, unique
from dataset.formats import DataError

pytest.importorskip("opencc")

TOWER = dict(
    author="王之渙", title="登鸛雀樓", paragraphs=["白日依山盡，黃河入海流。", "欲窮千里目，更上一層樓。"], id="a"
)
NIGHT = dict(author="李白", title="靜夜思", paragraphs=["牀前明月光，疑是地上霜。", "舉頭望明月，低頭思故鄉。"], id="b")
ORIOLES = dict(
    author="杜甫",
    title="絕句四首 其三",
    paragraphs=["兩個黃鸝鳴翠柳，一行白鷺上青天。", "窗含西嶺千秋雪，門泊東吳萬里船。"],
    id="c",
)
PARK = dict(author="王維", title="鹿柴", paragraphs=["空山不見人，但聞人語響。", "返景入深林，復照青苔上。"], id="d")
HALF = dict(PARK, paragraphs=PARK["paragraphs"][:1], id="e")
TANG = [TOWER, ORIOLES, HALF]
SONG = [NIGHT, dict(PARK, title="輞川集二十首（并序） 鹿柴"), dict(TOWER, title="登樓", id="f")]
STRAINS = [dict(id="a", strains=["仄仄平平仄，平平仄仄平。", "仄平平仄仄，○仄仄平平。"])]
STRAINS += [dict(id="b", strains=["平平平仄平，平仄仄仄平。", "仄平仄平仄，平平○仄平。"])]
STRAINS += [dict(id="d", strains=["平平"])]  # not a sign a character
PLACES = dict(packed=("package/dist/quantangshi", "package/dist/strains/json"), clone=("全唐诗", "strains/json"))


def files(layout, strains=True):
    """{path: bytes} of a corpus of two files and what stands beside them."""
    place, tones = PLACES["clone" if layout == "clone" else "packed"]
    found = {f"{place}/poet.tang.0.json": TANG, f"{place}/poet.song.1000.json": SONG}
    if strains:
        found |= {f"{tones}/poet.tang.0.json": STRAINS, f"{tones}/poet.song.1000.json": STRAINS}
    found |= {f"{place}/error/poet.tang.0.json": [dict(PARK, title="錯")], f"{place}/authors.tang.json": [{}]}
    return {name: json.dumps(rows, ensure_ascii=False).encode() for name, rows in found.items()}


def write(tmp_path, layout, contents=None):
    """The path of a corpus: packed, unpacked or clone."""
    contents, path = files(layout) if contents is None else contents, tmp_path / layout
    if layout != "packed":
        for name, data in contents.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
        return path / "package" if layout == "unpacked" else path
    path = path.with_suffix(".tgz")
    with tarfile.open(path, "w:gz") as archive:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("layout", ["packed", "unpacked", "clone"])
def test_regular_poems_of_each_layout(tmp_path, layout):
    found = {poem.title: poem for poem in read_poems(write(tmp_path, layout))}
    assert sorted(found) == sorted(["登鹳雀楼", "绝句", "静夜思", "辋川集二十首 鹿柴", "登楼"])
    tower = found["登鹳雀楼"]
    assert tower.author == "王之涣"
    assert tower.lines == ["白日依山尽", "黄河入海流", "欲穷千里目", "更上一层楼"]
    assert tower.tones == ["仄仄平平仄", "平平仄仄平", "仄平平仄仄", "○仄仄平平"]
    assert tower.text == "登鹳雀楼\n白日依山尽，黄河入海流。\n欲穷千里目，更上一层楼。"
    assert found["绝句"].tones is None  # there are none of it
    assert found["辋川集二十首 鹿柴"].tones is None  # too few signs


def test_equal_texts_are_kept_once_in_an_order_of_their_own(tmp_path):
    found = [unique(read_poems(write(tmp_path, layout))) for layout in ("packed", "unpacked", "clone")]
    assert len(found[0]) == 4 and found[0] == found[1] == found[2]
    assert unique(found[0][::-1]) == found[0]


@pytest.mark.parametrize(
    "title, clean",
    [
        ("帝京篇十首 一", "帝京篇"),
        ("古詩一百首 其一○○", "古詩"),
        ("偶成 其三", "偶成"),
        ("詩一首", "詩"),
        ("春興（時在成都）二首 其二", "春興"),
        ("西亭夜[宴]陸郎中", "西亭夜宴陸郎中"),
        ("和  梅 梅開", "和 梅 梅開"),
        ("九日", "九日"),
        ("十首 其一", "十首"),  # never nothing
        ("", ""),
    ],
)
def test_titles(title, clean):
    assert clean_title(title) == clean


# what cannot be read


def refused(path):
    with pytest.raises(DataError) as error:
        list(read_poems(path))
    message = str(error.value)
    assert "\n" not in message and path.name in message
    return message


def test_an_archive_cut_short_at_any_length(tmp_path):
    path = write(tmp_path, "packed")
    whole = path.read_bytes()
    for length in (0, 1, 10, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path)


def test_an_archive_with_a_flipped_bit(tmp_path):
    path = write(tmp_path, "packed")
    whole = bytearray(path.read_bytes())
    for place in range(30, len(whole), 97):  # before it there is gzip's own header, with a name and a time
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        refused(path)


def test_what_is_no_corpus(tmp_path):
    assert "not found" in refused(tmp_path / "none.tgz")
    path = tmp_path / "poems.txt"
    path.write_text("白日依山盡", encoding="utf-8")
    assert "not a whole .tgz" in refused(path)
    path.write_bytes(gzip.compress(b"text"))
    assert "not a whole .tgz" in refused(path)
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "no poet.tang.0.json" in refused(folder)
    (folder / "poet.tang.0.json").write_text("[]")  # in no folder of the corpus
    assert "no poet.tang.0.json" in refused(folder)


@pytest.mark.parametrize("data", [b"", b"[", b"\xff", b"{}x", b"5", b"[5]", b'[{"title": "x"}]', b"null"])
@pytest.mark.parametrize("name", ["全唐诗/poet.tang.0.json", "strains/json/poet.tang.0.json"])
def test_a_damaged_file_is_named(tmp_path, name, data):
    path = write(tmp_path, "clone", files("clone") | {name: data})
    assert "poet.tang.0.json" in refused(path)


@pytest.mark.parametrize(
    "kind, data, says",
    [
        ("全唐诗", json.dumps([dict(TOWER, title="\ud800")]).encode(), "row 1: title: text is needed"),
        ("全唐诗", json.dumps([TOWER, dict(NIGHT, paragraphs={"a": 1})]).encode(), "row 2: paragraphs: a list of text"),
        ("全唐诗", json.dumps([dict(TOWER, paragraphs="白日依山盡")]).encode(), "row 1: paragraphs: a list of text"),
        ("全唐诗", json.dumps([dict(TOWER, id=["a"])]).encode(), "row 1: id: text is needed"),
        ("全唐诗", json.dumps(dict(TOWER)).encode(), "a list is needed, not dict"),
        ("全唐诗", b"[" * 100_000, "not JSON"),
        ("全唐诗", b'["' + b"\xff" * 9000, "byte 2 is not utf-8"),
        ("strains/json", b'[{"id": "a", "strains": 5}]', "row 1: strains: a list of text is needed"),
        ("strains/json", b'[{"id": "a", "strains": [1, 2]}]', "row 1: strains: a list of text is needed"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, kind, data, says):
    name = f"{kind}/poet.tang.0.json"
    said = refused(write(tmp_path, "clone", files("clone") | {name: data}))
    assert name in said and says in said and len(said) < 500


def test_without_opencc(tmp_path, monkeypatch):
    monkeypatch.setattr(poems.importlib.util, "find_spec", lambda name: None)
    assert "opencc is needed (pip install opencc)" in refused(write(tmp_path, "clone"))


# the command


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_is_written(tmp_path, capsys):
    path, out = write(tmp_path, "packed"), tmp_path / "out"
    main([f"--poems={path}", f"--out={out}", "--held_out=0.4"])
    training, heldout = read_rows(out / "poems.jsonl"), read_rows(out / "heldout.jsonl")
    assert len(training) + len(heldout) == 4 and training and heldout
    titles = {row["text"].partition("\n")[0] for row in training}
    assert not titles & {row["title"] for row in heldout}
    assert heldout[0].keys() == {"title", "author", "lines", "tones", "form"}
    written = {file.name: file.read_bytes() for file in out.iterdir()}
    assert {"verse.json", "sft.jsonl", "rm.jsonl", "prompts.jsonl", "heldout_prompts.jsonl"} < written.keys()
    main([f"--poems={path}", f"--out={out}", "--held_out=0.4"])
    assert "made from the same poems before" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--overwrite"):
        main([f"--poems={path}", f"--out={out}", "--held_out=0.5"])
    assert written == {file.name: file.read_bytes() for file in out.iterdir()}
    main([f"--poems={write(tmp_path, 'clone')}", f"--out={out}", "--held_out=0.4", "--overwrite"])
    again = {file.name: file.read_bytes() for file in out.iterdir()}
    changed = {name for name in written if again[name] != written[name]}
    assert changed == {".written-by-tiny-llama2-zh.json", "source.json"}


def test_nothing_is_written_of_poems_without_tones(tmp_path):
    path, out = write(tmp_path, "clone", files("clone", strains=False)), tmp_path / "out"
    with pytest.raises(DataError, match="no regular poems with tones"):
        main([f"--poems={path}", f"--out={out}"])
    assert not out.exists()
    with pytest.raises(ConfigError, match="poems=: the npm package chinese-poetry"):
        main([f"--out={out}"])


# copies


def test_lines_that_a_training_poem_has():
    text = Poem("登鹳雀楼", "", ["白日依山尽", "黄河入海流", "欲穷千里目", "更上一层楼"], None).text
    ngrams = ngrams_of([text])
    assert len(ngrams) == 11  # of 20 characters, the title's none
    assert copied(["白日依山尽", "黄河入海流"], ngrams) == 1
    assert copied(["白日依山尽", "黄河入海楼"], ngrams) == 0
    assert copied(["床前明月光", "黄河入海流", "欲穷千里目", "低头思故乡"], ngrams) == 0.5
    assert copied(["前白日依山尽黄", "河入海流欲穷千"], ngrams) == 0.5  # all of the second, of the first not 前
    assert copied([], ngrams) == copied(["白日"], ngrams) == 0
    assert set(char_ngrams("白日依山尽黄河入海流", 10)) <= set(ngrams)
