"""Rows of the poet's tasks, on poems made up here: what is asked for is what the answer has."""

import json
import random

import pytest

from corpora.layouts import alpaca, prompts
from corpora.poem_tasks import (
    FAULTS,
    SFT_ROWS,
    fields_of,
    request,
    rhyme_row,
    rhyme_words,
    swapped,
    words_alike,
    write_tasks,
)
from corpora.poems import Poem
from corpora.preferences import pairs
from verse import FORMS, form_of, judge, parse, render, rhyme_class
from verse.tables import Tables

ONE, OTHER = "山川云天林泉", "书鱼车居初余"  # two rhyme classes, all of level tone
TABLES = Tables({c: "平" for c in ONE + OTHER}, {c: ("山",) for c in ONE} | {c: ("书",) for c in OTHER})


def poems(n, seed, title):
    """Poems of random characters with different rhyme words of one class."""
    rng, found = random.Random(seed), []
    for i in range(n):
        rows, size = FORMS[rng.choice(list(FORMS))]
        ends = rng.sample(rng.choice([ONE, OTHER]), rows // 2)
        lines = ["".join(rng.choices(ONE + OTHER, k=size)) for _ in range(rows)]
        for k, end in enumerate(ends):
            lines[2 * k + 1] = lines[2 * k + 1][:-1] + end
        found.append(Poem(title + "一二三四五六七八九十"[i % 10] * (1 + i // 10), "某", lines, None))
    return found


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(poems(100, 1, "训"), poems(20, 2, "留"), TABLES, folder, 0)
    return {p.stem: list(map(json.loads, p.read_text(encoding="utf-8").splitlines())) for p in folder.iterdir()}


def test_a_request_asks_for_what_its_poem_has():
    rng = random.Random(3)
    for poem in poems(40, 3, "题"):
        fields = fields_of(poem, TABLES)
        for task in ("write", "given_words", "acrostic"):
            text, asked = request(task, poem, fields, rng)
            kept = {key: asked[key] for key in ("form", "rhyme", "heads", "words")}
            assert judge(render(poem.lines), TABLES, **kept)["asked"]
            assert asked["form"] in text and f"押{asked['rhyme']}韵" in text and asked["heads"] in text
            assert asked["title"] in text and all(word in text for word in asked["words"])
            assert (task == "acrostic") == bool(asked["heads"]) and (task == "given_words") == bool(asked["words"])
        assert "韵" not in request("write", poem, fields, rng, named=False)[0]


def test_poems_that_make_no_short_request_are_left_out():
    (poem,) = poems(1, 4, "题")
    assert fields_of(poem, TABLES) == dict(
        title="题一", form=form_of(poem.lines), rhyme=rhyme_class(poem.lines, TABLES)
    )
    for title in ("", "春 夜", "题" * 13, "To"):
        assert fields_of(poem._replace(title=title), TABLES) is None
    unrhymed = [poem.lines[0], poem.lines[1][:-1] + "无", *poem.lines[2:]]
    assert fields_of(poem._replace(lines=unrhymed), TABLES) is None
    oblique = TABLES._replace(tones=TABLES.tones | {c: "仄" for c in ("山", "书")})
    assert fields_of(poem, oblique) is None


def test_rows_of_rhymes_tell_the_words_that_poems_end_on():
    found = poems(60, 6, "题")
    known = rhyme_words([(poem, fields_of(poem, TABLES)) for poem in found])
    assert {name: set(ends) for name, ends in known.items()} == {"书": set(OTHER), "山": set(ONE)}
    assert sum(map(len, known.values())) == sum(len(poem.lines) // 2 for poem in found)
    known, rng = dict(山=["山"] * 144 + ["云"], 书=["书"] * 9), random.Random(0)
    rows = [rhyme_row("rhyme_words", known, rng) for _ in range(300)]
    assert {row["output"] for row in rows} - {"云，山"} == {"山", "山，云", "书"}  # each word once
    assert all(("书" in row["instruction"]) == (row["output"] == "书") for row in rows)
    rare = sum(row["output"] == "书" for row in rows)
    assert 33 < rare < 87  # in the mean 300 * 3 / (3 + sqrt(145)) = 60 within 4 deviations; as often as used: 18
    row = rhyme_row("rhyme_of", dict(书=["鱼"]), rng)
    assert "鱼" in row["instruction"] and row["output"] == "书韵。"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_spoilt_poem_keeps_form_and_rhyme(fault):
    rng, changed, words = random.Random(5), 0, words_alike([(p, {}) for p in poems(60, 5, "题")], TABLES)
    for poem in (found := poems(60, 5, "题")):
        alike = [p for p in found if (form_of(p.lines), rhyme_class(p.lines, TABLES)) == (form_of(poem.lines),
                 rhyme_class(poem.lines, TABLES))]  # fmt: skip
        spoilt = fault(poem, alike, words, rng)
        changed += spoilt != poem.lines
        assert form_of(spoilt) == form_of(poem.lines) and rhyme_class(spoilt, TABLES) == rhyme_class(poem.lines, TABLES)
    assert changed > 40


def test_swapped_couplets_have_the_same_lines():
    poem = Poem("题", "某", ["甲甲", "乙山", "丙丙", "丁云"], None)
    assert swapped(poem, [], None, random.Random(0)) == ["丙丙", "乙山", "甲甲", "丁云"]


def test_no_poem_is_in_two_files_and_held_out_titles_in_one_alone(rows):
    assert {row["title"][:1] for row in rows["prompts"]} <= {"训", ""}
    assert {row["title"][:1] for row in rows["heldout_prompts"]} <= {"留", ""}
    assert all(row["form"] in ("五绝", "七绝") for name in ("prompts", "heldout_prompts") for row in rows[name])
    for name in ("sft", "rm", "prompts"):
        assert rows[name] and "留" not in json.dumps(rows[name], ensure_ascii=False)
    texts = [row["chosen"] for row in rows["rm"]] + [row["output"] for row in rows["sft"] if "\n" in row["output"]]
    assert len(set(texts)) == len(texts) and len(rows["prompts"]) <= 25 and len(rows["sft"]) == 50


def test_rows_are_read_as_they_are_meant(rows):
    for row in rows["sft"]:
        ((record, remark),) = alpaca(row)
        assert [m["content"] for m in record["messages"]] == [row["instruction"], row["output"]] and remark is None
    for row in rows["rm"]:
        ((record, remark),) = pairs(row)
        assert (record["chosen"], record["rejected"], remark) == (row["chosen"], row["rejected"], None)
        assert form_of(parse(row["rejected"])) == form_of(parse(row["chosen"]))
        assert form_of(parse(row["chosen"])) in FORMS
    for row in rows["prompts"]:
        ((record, remark),) = prompts(row)
        asked = {key: value for key, value in row.items() if key != "prompt"}
        assert (record["messages"][0]["content"], record["fields"], remark) == (row["prompt"], asked, None)
        assert list(asked) == ["title", "form", "rhyme", "heads", "words"]


def test_the_same_poems_give_the_same_rows(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_tasks(poems(40, 1, "训"), poems(9, 2, "留"), TABLES, tmp_path / name, 7)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_all_tasks_are_there_when_there_are_poems_enough(tmp_path, monkeypatch):
    monkeypatch.setitem(SFT_ROWS, "write", 10)
    for task in list(SFT_ROWS):
        monkeypatch.setitem(SFT_ROWS, task, 5)
    write_tasks(poems(100, 1, "训"), [], TABLES, tmp_path, 0)
    texts = [json.loads(line)["instruction"] for line in (tmp_path / "sft.jsonl").read_text("utf-8").splitlines()]
    assert len(texts) == 40
    for mark in ("题", "用", "藏头", "下", "体", "字"):
        assert any(mark in text for text in texts)
