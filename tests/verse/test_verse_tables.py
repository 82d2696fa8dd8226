"""Tables of tones and rhymes counted from a few made-up lines."""

import json
import random
from collections import Counter

import pytest

from dataset.formats import DataError
from verse.tables import as_json, count_tables, count_tones, from_json, load_tables, rhyme_classes


def test_a_tone_has_nine_in_ten_of_the_marks():
    marks = {"春平": 9, "春仄": 1, "看平": 8, "看仄": 1, "月仄": 3, "教平": 8, "教○": 2, "□？": 5}
    assert count_tones(Counter({tuple(pair): n for pair, n in marks.items()})) == {"春": "平", "月": "仄"}


ENDS = [["春", "人"], ["春", "新"], ["人", "新"], ["春", "人", "新"], ["秋", "流"], ["流", "楼"], ["秋", "楼"]]


def test_who_rhymes_is_a_class_named_by_its_commonest():
    ends = [*ENDS, ["春", "秋"]]  # once, as poets do
    classes = rhyme_classes(ends)
    assert {character: found[0] for character, found in classes.items()} == (
        dict.fromkeys("春人新", "春") | dict.fromkeys("秋流楼", "秋")
    )
    for seed in range(5):  # in whatever order they come
        assert rhyme_classes(random.Random(seed).sample(ends, len(ends))) == classes


def test_of_two_readings_is_in_both_classes():
    classes = rhyme_classes([*ENDS * 3, ["看", "春"], ["看", "春", "人"], ["看", "秋"]])
    assert classes["看"] == ("春", "秋")
    assert all(len(found) == 1 for character, found in classes.items() if character != "看")


def test_a_word_that_rhymes_with_itself_alone():
    assert rhyme_classes([["春", "春"]]) == {"春": ("春",)}


def test_tables_of_poems_and_their_file(tmp_path):
    poems = [(["白日依山尽", "黄河入海流"], ["仄仄平平仄", "平平仄仄平"]), (["欲穷千里目", "更上一层楼"], None)]
    tables = count_tables(poems)
    assert tables.tones == dict.fromkeys("依山黄河流", "平") | dict.fromkeys("白日尽入海", "仄")
    assert tables.rhymes == {"流": ("流",), "楼": ("楼",)}
    tables = tables._replace(rhymes={"春": ("春",), "看": ("秋", "春", "流"), "秋": ("秋",), "流": ("流",)})
    path = tmp_path / "verse.json"
    path.write_text(json.dumps(as_json(tables)), encoding="utf-8")
    assert load_tables(path) == tables
    assert from_json(as_json(tables)) == tables


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"tones": {}, "rhymes": [], "also": {}}', '{"tones": 1, "rhymes": {}, "also": {}}']
)
def test_what_is_no_file_of_tables(tmp_path, text):
    path = tmp_path / "verse.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="verse.json: not tables"):
        load_tables(path)
    with pytest.raises(DataError, match="none.json: cannot be read"):
        load_tables(tmp_path / "none.json")
