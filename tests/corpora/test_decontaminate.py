"""corpora/decontaminate.py: benchmark questions found in texts, whatever the signs between their letters."""

import json

import pytest

from corpora.clean import content_key
from corpora.decontaminate import Decontaminator
from dataset.formats import DataError

LONG = "下列关于三国时期赤壁之战的叙述，正确的是哪一项？"  # 22 letters
SHORT = "写下坛经的禅宗六祖是（  ）"  # 10 letters


@pytest.fixture
def questions(tmp_path):
    """A folder with a C-Eval file and, one level down, a CMMLU file."""
    (tmp_path / "cmmlu").mkdir()
    (tmp_path / "ceval.csv").write_text(f"id,question,A,answer\n0,{LONG},甲,A\n1,肾在液为,唾,A\n", encoding="utf-8")
    (tmp_path / "cmmlu" / "a.csv").write_text(f"Question,A,Answer\n{SHORT},惠能,A\n", encoding="utf-8-sig")
    return tmp_path


def test_questions_are_found_through_signs_and_only_from_n_letters_on(questions):
    found = Decontaminator([questions])
    key = content_key(LONG)
    assert len(key) == 22 and (found.questions, found.skipped) == (3, 1)
    assert found.contaminated("前文。" + LONG + "后文")
    assert found.contaminated("前文，" + "、".join(key[3:19]) + "。后文")  # 16 letters of it
    assert not found.contaminated("前文，" + key[3:18] + "。后文")  # 15
    assert not found.contaminated("")


def test_short_questions_are_found_whole_and_the_shortest_not_at_all(questions):
    found = Decontaminator([questions])
    key = content_key(SHORT)
    assert len(key) == 10 and found.contaminated(f"请问：{SHORT}惠能")
    assert not found.contaminated(f"请问：{key[:9]}") and not found.contaminated(f"请问：{key[1:]}")
    assert not found.contaminated("按五行学说，肾在液为唾。")
    assert Decontaminator([questions], shortest=4).contaminated("按五行学说，肾在液为唾。")


def test_files_and_folders_are_read_alike(questions):
    one, other = questions / "ceval.csv", questions / "cmmlu" / "a.csv"
    assert Decontaminator([one, other]).questions == Decontaminator([str(questions)]).questions == 3
    assert not Decontaminator([other]).contaminated(LONG)
    assert not Decontaminator([]).contaminated(LONG)


def test_every_question_finds_itself_and_books_are_clean(shared_data):
    found = Decontaminator([shared_data / "multiple_choice"])
    assert (found.questions, found.skipped, len(found.short)) == (595, 61, 176)
    assert all(found.contaminated(f"第{i}题{question}答") for i, question in enumerate(found.short))
    novel = (shared_data / "pretrain" / "三国演义.txt").read_text(encoding="utf-8")
    assert not found.contaminated(novel)
    answers = json.loads((shared_data / "sft" / "llamafactory_alpaca_zh_demo.json").read_text(encoding="utf-8"))
    assert not any(found.contaminated(answer["output"]) for answer in answers)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"id,stem,A\n0,x,y\n", "no column named question"),
        (b"", "no column named question"),
        ("id,question\n0,下列\n".encode("gbk"), "not a csv file in UTF-8"),
    ],
)
def test_bad_question_file_is_named(tmp_path, content, message):
    (tmp_path / "bad.csv").write_bytes(content)
    with pytest.raises(DataError, match=rf"bad\.csv.*{message}"):
        Decontaminator([tmp_path])


def test_missing_questions_are_named(tmp_path):
    with pytest.raises(DataError, match="none.csv not found"):
        Decontaminator([tmp_path / "none.csv"])
    with pytest.raises(DataError, match="holds no csv file"):
        Decontaminator([tmp_path])
