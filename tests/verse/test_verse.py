"""The rules of verse on lines whose tones and rhymes are told by hand. Quoted: Wang Zhihuan, Climbing Stork Tower."""

import math

import pytest

from verse import form_of, judge, parse, render, rhyme_class, rhyme_entropy, right_patterns, right_tones
from verse.tables import Tables

TOWER = ["白日依山尽", "黄河入海流", "欲穷千里目", "更上一层楼"]
TONES = dict.fromkeys("依山黄河流穷千层楼", "平") | dict.fromkeys("白日尽入海欲里目更上一", "仄")
TABLES = Tables(TONES, {"流": ("秋",), "楼": ("秋",), "秋": ("秋",), "山": ("山",), "看": ("山", "寒")})
TEXT = "白日依山尽，黄河入海流。\n欲穷千里目，更上一层楼。"


def test_a_couplet_is_a_row():
    assert render(TOWER) == TEXT
    assert parse(TEXT) == TOWER
    assert parse(TEXT + "\n") == TOWER
    assert render([]) == "" and parse("") == []
    assert parse("白日依山尽、黄河入海流！") == TOWER[:2]


def test_forms():
    assert [form_of(["一" * length] * n) for n, length in ((4, 5), (4, 7), (8, 5), (8, 7))] == [
        "五绝",
        "七绝",
        "五律",
        "七律",
    ]
    assert [form_of(lines) for lines in ([], TOWER[:3], [*TOWER[:3], "更上层楼"], ["一" * 6] * 4)] == [None] * 4
    assert form_of([*TOWER[:3], "更上一层□"]) is None and form_of([*TOWER[:3], "abcde"]) is None


def test_a_right_poem():
    found = judge(TEXT, TABLES)
    assert found == dict.fromkeys("lines rhymes right_tones heads words".split(), 1) | dict.fromkeys(
        "form rhyme tones asked all_right".split(), True
    )
    asked = judge(TEXT, TABLES, form="五绝", rhyme="秋", heads="白黄欲更", words=["千里", "楼"])
    assert asked["asked"] and asked["all_right"]


@pytest.mark.parametrize(
    "text",
    [
        "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。",  # in one row
        "白日依山尽，黄河入海流。\n欲穷千里目，更上一层楼",
        "白日依山尽。黄河入海流。\n欲穷千里目。更上一层楼。",
        "白日依山尽，黄河入海流。\n\n欲穷千里目，更上一层楼。",
        "登鹳雀楼\n" + TEXT,
        "白日依山尽，黄河入海流。\n欲穷千里目，更上层楼。",
        "白日依山尽，黄河入海流。",
        "",
        "，。",
    ],
)
def test_what_is_not_written_as_a_poem_is_not_right(text):
    found = judge(text, TABLES)
    assert not any(found[rule] for rule in ("form", "rhyme", "tones", "all_right", "asked"))


def test_another_form_than_asked():
    found = judge(TEXT, TABLES, form="七绝")
    assert not found["form"] and not found["asked"] and not found["all_right"] and found["lines"] == 0


def test_rhyme():
    other = [*TOWER[:3], "更上一层山"]
    assert not judge(render(other), TABLES)["rhyme"] and judge(render(other), TABLES)["rhymes"] == 0
    twice = [*TOWER[:3], "更上一层流"]
    assert not judge(render(twice), TABLES)["rhyme"]
    unknown = [*TOWER[:3], "更上一层台"]
    assert not judge(render(unknown), TABLES)["rhyme"]
    wrong = judge(TEXT, TABLES, rhyme="山")
    assert not wrong["rhyme"] and not wrong["asked"] and wrong["rhymes"] == 0


def test_a_character_may_be_in_two_classes():
    assert rhyme_class(["", "山", "", "看"], TABLES) == "山"
    assert rhyme_class(["", "看", "", "看"], TABLES) == "山"  # its own class before the other
    assert rhyme_class(["", "流", "", "看"], TABLES) is None
    assert rhyme_class([], TABLES) is None


def test_partial_credit():
    lines = [
        "白日依山尽",
        "黄河入海流",
        "欲穷千里",
        "更上一层楼",
        "白日依山尽",
        "黄河入海山",
        "欲穷千里目",
        "更上一层秋",
    ]
    found = judge(render(lines), TABLES, form="五律")
    assert not found["form"]
    assert found["lines"] == 7 / 8
    assert found["rhymes"] == 2 / 3  # 流 楼 秋 of four: two rhyme with the first
    assert judge(render(lines), TABLES, form="五律", rhyme="秋")["rhymes"] == 3 / 4
    assert found["right_tones"] == 7 / 8
    assert judge(render(TOWER), TABLES, form="五律")["lines"] == 4 / 8  # those that are missing count
    more = judge(render(TOWER * 2), TABLES, form="五绝")  # and those that are too many
    assert more["lines"] == more["right_tones"] == 4 / 8 and more["rhymes"] == 1 / 3


def test_tones_within_a_line_and_a_couplet():
    level, oblique = "平平平仄仄", "仄仄仄平平"
    assert right_patterns([level, oblique]) == [True, True]
    assert right_patterns(["仄平仄仄平", "平仄平平仄"]) == [True, True]  # the 1st, 3rd and 5th are free
    assert right_patterns([level, level]) == [True, False]
    assert right_patterns(["平平平平仄", oblique]) == [False, False]
    assert right_patterns([level, oblique, level, oblique]) == [True] * 4
    assert right_patterns(["平平仄仄仄平平", "仄仄平平平仄仄"]) == [True, True]
    assert right_patterns(["平平仄仄仄仄平", "仄仄平平平仄仄"]) == [False, False]
    assert right_patterns(["平○平仄仄", oblique]) == [True, True]  # ○ is either


def test_tones_of_lines_by_the_table():
    assert right_tones(TOWER, TABLES) == [True] * 4
    assert right_tones(["白山依山尽", *TOWER[1:]], TABLES) == [False, False, True, True]
    assert right_tones(["白字依山尽", *TOWER[1:]], TABLES) == [True] * 4  # of no known tone: either


def test_heads_and_words():
    found = judge(TEXT, TABLES, heads="白黄欲上", words=["千里", "明月"])
    assert (found["heads"], found["words"]) == (3 / 4, 1 / 2)
    assert not found["asked"] and found["all_right"]
    assert judge(TEXT, TABLES, heads="白黄")["heads"] == 1
    assert judge("", TABLES, heads="白黄")["heads"] == 0


def test_entropy_of_rhymes():
    assert rhyme_entropy(["秋", "秋", "山", "山", None]) == pytest.approx(math.log(2), abs=1e-12)
    assert rhyme_entropy(["秋"] * 9) == 0
    assert rhyme_entropy([]) == 0
