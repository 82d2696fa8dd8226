"""What benchmarks/poems_judge.py refuses to count: each in one line that names the file and the line."""

import json

import pytest
from test_verse import TABLES, TOWER

from common.config import ConfigError
from dataset.formats import DataError
from verse.tables import as_json

ROW = dict(title="登楼", author="王之涣", lines=TOWER, tones=["仄仄平平仄", "平平仄仄平", "仄平平仄仄", "仄仄仄平平"])


@pytest.fixture
def count(tmp_path, from_benchmarks):
    """main over heldout.jsonl of these lines of text."""
    main = from_benchmarks("poems_judge").main
    (tmp_path / "verse.json").write_text(json.dumps(as_json(TABLES)), encoding="utf-8")

    def call(*lines, poems=5000):
        (tmp_path / "heldout.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        main([f"--data={tmp_path}", f"--poems={poems}"])

    return call


@pytest.mark.parametrize(
    "line, says",
    [
        ("{", "heldout.jsonl:2: not a poem"),
        ("5", "heldout.jsonl:2: not a poem"),
        (json.dumps(dict(ROW, lines=TOWER[:3])), "heldout.jsonl:2: .*lines of a regular poem are needed"),
        (json.dumps(dict(ROW, tones=5)), "heldout.jsonl:2: .*tones: null or a sign a character is needed"),
        (json.dumps(dict(ROW, tones=["平"] * 4)), "heldout.jsonl:2: .*tones: null or a sign a character is needed"),
        (json.dumps(dict(title="登楼")), "heldout.jsonl:2: .*lines"),
    ],
)
def test_a_row_that_is_no_poem_is_named(count, line, says):
    with pytest.raises(DataError, match=says):
        count(json.dumps(ROW), line)


def test_too_few_poems_are_refused(count):
    with pytest.raises(DataError, match="too few poems to break"):
        count(json.dumps(ROW))
    with pytest.raises(DataError, match="no poem in it whose tones keep the rules"):
        count(json.dumps(dict(ROW, tones=None)))
    with pytest.raises(DataError, match="no poem in it whose tones keep the rules"):
        count()
    with pytest.raises(ConfigError, match="poems=0: at least 1 is needed"):
        count(json.dumps(ROW), poems=0)
