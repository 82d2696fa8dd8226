"""The rules as a reward and as the judge of a comparison."""

import json

import pytest

from alignment.functions import call, fields_taken, reward_function
from common.config import ConfigError
from dataset.formats import DataError
from verse.rewards import figures, rules
from verse.tables import Tables, as_json

GOOD = "月水山云山，山天水月川。\n山云月水月，月水山云泉。"
ASKED = dict(form="五绝", rhyme="山", heads="", words=[])


@pytest.fixture
def tables(tmp_path, monkeypatch):
    path = tmp_path / "verse.json"
    level, oblique = "山川云天泉", "月水夜"
    tones = {c: "平" for c in level} | {c: "仄" for c in oblique}
    rhymes = {c: ("山",) for c in level} | {c: ("月",) for c in oblique}
    path.write_text(json.dumps(as_json(Tables(tones, rhymes))), encoding="utf-8")
    monkeypatch.setenv("VERSE_TABLES", str(path))


def reward(text, **asked):
    fields = {key: [value] for key, value in (ASKED | asked).items()}
    return rules([""], [text], **fields)[0]


def test_every_right_part_counts(tables):
    assert reward(GOOD) == 7
    assert reward(GOOD, rhyme="月") == 4  # three shares of rhyme
    assert reward(GOOD.replace("泉", "夜")) == pytest.approx(5.5)  # half of the rhyme words; the 5th has free tones
    assert reward(GOOD.replace("泉", "川")) == pytest.approx(5.5)  # the same word twice
    assert reward(GOOD, heads="月山山水") == pytest.approx(6.75) and reward(GOOD, words=["云山", "无此"]) == 6.5
    assert reward("") == 2.0  # nothing more was asked
    assert reward(GOOD[:-1]) == 7 > reward("月水山云山，") > reward("")  # a dense reward, not all or nothing


def test_the_judge_of_a_comparison_tells_truths_and_the_reward(tables):
    (row,) = figures([""], [GOOD], *([value] for value in ASKED.values()))
    assert row == dict(reward=7, form=True, rhyme=True, tones=True, all_right=True, asked=True)
    assert list(row)[0] == "reward"  # by which best of n picks


def test_the_reward_takes_the_fields_of_the_requests(tables, monkeypatch, tmp_path):
    function, _ = reward_function(dict(reward="verse.rewards:rules"))
    assert fields_taken("reward", function, dict(title="") | ASKED) == list(ASKED)
    monkeypatch.setenv("VERSE_TABLES", str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match=r"reward raised DataError: .*none\.json: cannot be read"):
        call("reward", function, [""], [GOOD], {key: [value] for key, value in ASKED.items()})


def test_tables_that_would_find_all_right_are_refused(tables, tmp_path, monkeypatch):
    path = tmp_path / "empty_tables.json"
    path.write_text(json.dumps(as_json(Tables({}, {}))), encoding="utf-8")
    monkeypatch.setenv("VERSE_TABLES", str(path))
    with pytest.raises(DataError, match=r"empty_tables\.json: not tables of tones and rhymes"):
        reward(GOOD)
    monkeypatch.setenv("VERSE_TABLES", "")  # as if it were not set
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"data/poems/rows/verse\.json: cannot be read"):
        reward(GOOD)


def test_a_form_that_is_none_is_named(tables):
    with pytest.raises(ValueError, match="form '词': one of 五绝, 七绝, 五律, 七律 is needed"):
        reward(GOOD, form="词")
