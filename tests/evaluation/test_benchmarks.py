"""What eval_generate.py --benchmark prints and writes: figures by hand, words about chance, and what is refused."""

import json
import math

import pytest
from preparing import texts_of, write_jsonl
from questions import RENAMED, make_checkpoint, poems, write_ceval, write_cmmlu

import eval_generate
from common.checkpoint import CheckpointError
from common.config import ConfigError
from common.metrics import source_losses, wilson_interval
from dataset.corpus import Corpus
from dataset.formats import DataError
from evaluation.benchmarks import in_words, parse, tallies, tally
from evaluation.scoring import Question
from tokenizer import Tokenizer


def questions(*answers, choices=4, group="law"):
    return [Question("", ["x"] * choices, answer, group) for answer in answers]


def test_a_tally_by_hand():
    row = tally(questions(0, 1, 2, 3), [0, 1, 0, 0])
    assert (row["n"], row["right"], row["accuracy"], row["chance"]) == (4, 2, 0.5, 0.25)
    assert (row["low"], row["high"]) == wilson_interval(2, 4)
    assert row["chance_high"] == pytest.approx(0.25 + 1.96 * math.sqrt(0.25 * 0.75 / 4)) and row["chance_low"] == 0
    full = tally(questions(*[0] * 1346), [0] * 1346)  # as many as C-Eval's val has
    assert full["chance_high"] - 0.25 == pytest.approx(0.0231, abs=1e-4)
    assert tally(questions(0, choices=4) + questions(0, choices=2), [0, 0])["chance"] == 0.375


def test_the_mean_weighs_subjects_by_size():
    asked = questions(0, 0, 0) + questions(0, group="logic")
    [rows] = tallies("ceval", asked, {"by letter": [0, 1, 1, 0]}).values()
    assert [(row["group"], row["accuracy"]) for row in rows] == [("law", 1 / 3), ("logic", 1.0), ("all", 0.5)]


@pytest.mark.parametrize(
    "right, of, words",
    [(340, 1346, "25.3% proves nothing: its interval"), (500, 1346, "is above chance"), (20, 1346, "is below chance")],
)
def test_chance_is_put_in_words(right, of, words):
    assert words in in_words(tally(questions(*[0] * of), [0] * right + [1] * (of - right)))


@pytest.mark.parametrize(
    "items, message",
    [
        (["cevals"], "benchmark=cevals: ceval, cmmlu, continuations, .* or a folder is needed"),
        (["order=x"], "benchmark=order=x"),
        (["ceval="], "benchmark=ceval="),
        (["ceval", "ceval=x"], "ceval is named twice"),
        ([".", ".."], "at most one folder"),
    ],
)
def test_what_is_asked_for_must_be_known(items, message):
    with pytest.raises(ConfigError, match=message):
        parse(items)


def test_folders_stand_where_they_are_named(tmp_path):
    write_ceval(tmp_path / "ceval")
    assert parse([str(tmp_path)]) == [("ceval", str(tmp_path))]
    assert parse(["cmmlu=x", "ceval", str(tmp_path), "order"])[1:] == [("ceval", str(tmp_path)), ("order", None)]
    assert parse(["cmmlu"]) == [("cmmlu", "hf:haonan-li/cmmlu")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no questions of C-Eval, such as val/SUBJECT_val.csv or CMMLU, such as"):
        parse([str(tmp_path / "empty")])


# through the stage


@pytest.fixture
def ckpt(tmp_path, tokenizer_path):
    return make_checkpoint(tmp_path / "run", Tokenizer.load(tokenizer_path), "pretrain", max_seq_len=512)


def run(capsys, *argv):
    capsys.readouterr()
    eval_generate.main([*map(str, argv), "--device=cpu"])
    return capsys.readouterr()


def test_both_benchmarks_through_the_stage(tmp_path, ckpt, capsys):
    write_ceval(tmp_path / "sets" / "ceval")
    write_cmmlu(tmp_path / "sets" / "cmmlu")
    subjects = ",".join(["law", "logic", *RENAMED.values()])
    report = tmp_path / "report.md"
    options = [f"--ckpt={ckpt}", f"--benchmark=ceval,cmmlu,{tmp_path / 'sets'}", f"--subjects={subjects}", "--shots=1"]
    out, err = run(capsys, *options, f"--report={report}")
    again, _ = run(capsys, *options)
    assert out == again  # to the digit
    *text, last = out.splitlines()
    rows = json.loads(last)["benchmarks"]
    assert len(rows) == 2 * 3 * 3  # benchmarks, scorings, two subjects and all
    assert all(row["n"] == 5 for row in rows if row["group"] == "all")
    assert all(row["chance"] == 0.25 and row["low"] <= row["accuracy"] <= row["high"] for row in rows)
    assert "## C-Eval" in out and "## CMMLU" in out and "proves nothing" in out and "Letters chosen: A" in out
    assert report.read_text(encoding="utf-8").splitlines()[:-2] == text[:-1]
    assert "ceval: " in err


def test_scorings_are_asked_for_one_by_one(tmp_path, ckpt, capsys):
    write_ceval(tmp_path / "ceval")
    options = [f"--ckpt={ckpt}", f"--benchmark=ceval={tmp_path / 'ceval'}", "--subjects=law"]
    scored = {}
    for scoring in ("letter", "text", "letter,text"):
        out, _ = run(capsys, *options, f"--scoring={scoring}")
        scored[scoring] = {row["scored"]: row["right"] for row in json.loads(out.splitlines()[-1])["benchmarks"]}
    assert len(scored["letter"]) == 1 and len(scored["text"]) == 2
    assert scored["letter,text"] == scored["letter"] | scored["text"]


def test_a_context_that_is_too_short_is_said(tmp_path, tokenizer_path, capsys):
    short = make_checkpoint(tmp_path / "short", Tokenizer.load(tokenizer_path), "sft", max_seq_len=64)
    write_ceval(tmp_path / "ceval")
    out, _ = run(capsys, f"--ckpt={short}", f"--benchmark=ceval={tmp_path / 'ceval'}", "--subjects=law")
    assert "3 of 3 were longer than the context of 64 tokens and lost their left." in out


def test_held_out_documents_through_the_stage(tmp_path, ckpt, capsys):
    write_jsonl(tmp_path / "prose.jsonl", [dict(text=text) for text in texts_of(60, 1)])
    (tmp_path / "verse.txt").write_text("\n\n".join(poems(60)), encoding="utf-8")
    documents = f"--documents={tmp_path / 'prose.jsonl'},{tmp_path / 'verse.txt'}"
    options = [f"--ckpt={ckpt}", documents, "--questions=20", "--seed=3"]
    names = "continuations,near_continuations,order,couplets,bits"
    out, _ = run(capsys, *options, f"--benchmark={names}")
    assert run(capsys, *options, f"--benchmark={names}")[0] == out
    rows = json.loads(out.splitlines()[-1])["benchmarks"]
    assert list(dict.fromkeys(row["benchmark"] for row in rows)) == names.split(",")
    whole = {row["benchmark"]: row for row in rows if row["group"] == "all"}
    assert {name: row["chance"] for name, row in whole.items()} == dict(
        continuations=0.5, near_continuations=0.5, order=0.5, couplets=0.25
    )
    assert whole["order"]["scored"] == "by text, per character"  # it has no context to compare with
    assert {row["group"] for row in rows if row["benchmark"] == "couplets"} == {"verse", "all"}
    assert all(row["bits_per_char"] > 0 for row in rows if row["benchmark"] == "bits")


def test_validation_text_of_a_data_folder_through_the_stage(tmp_path, build, ckpt, capsys):
    write_jsonl(tmp_path / "a.jsonl", [dict(text=text) for text in texts_of(200, 1)])
    build("data", f"--sources=a:text_rows={tmp_path / 'a.jsonl'}", "--parts=pretrain")
    options = [f"--ckpt={ckpt}", f"--data={tmp_path / 'data'}", "--benchmark=bits,order", "--questions=1000"]
    bits, *_ = json.loads(run(capsys, *options)[0].splitlines()[-1])["benchmarks"]
    loaded = eval_generate.load(ckpt, env := eval_generate.setup("cpu", "float32"))
    total, _ = source_losses(loaded.model, Corpus(tmp_path / "data", "val"), env)
    # of the same documents, but windows end elsewhere, and <eos> is not predicted here
    assert bits["bits_per_char"] == pytest.approx(total.bits_per_char, rel=0.1)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--benchmark=couplets"], "couplets: documents from which no question can be made: prose"),
        (["--benchmark=ceval=ceval", "--subjects=laws"], "subjects=laws: not a subject of ceval"),
        (["--benchmark=ceval=none"], "none: no such folder"),
        (["--benchmark=ceval=ceval", "--scoring="], "scoring=: letter, text or both are needed"),
        (["--benchmark=ceval", "--ppl"], "--ppl and --benchmark exclude each other"),
        (["--benchmark=ceval", "--shots=6"], "shots=6: at least 0 and at most 5 is needed"),
        (["--benchmark=ceval", "--scoring=word"], "scoring=word: letter or text is needed"),
        (["--benchmark=order", "--questions=0"], "questions=0: at least 1 is needed"),
    ],
)
def test_what_cannot_be_measured_is_one_line(tmp_path, ckpt, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    write_ceval(tmp_path / "ceval")
    write_jsonl(tmp_path / "prose.jsonl", [dict(text=text) for text in texts_of(9, 1)])
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        eval_generate.main([f"--ckpt={ckpt}", "--documents=prose.jsonl", *options, "--device=cpu"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("later", ["cmmlu=none", "cmmlu=cmmlu,--subjects=law", "couplets"])
def test_what_cannot_be_measured_is_told_before_any_is(tmp_path, ckpt, capsys, monkeypatch, later):
    monkeypatch.chdir(tmp_path)
    write_ceval(tmp_path / "ceval")
    write_cmmlu(tmp_path / "cmmlu")
    write_jsonl(tmp_path / "prose.jsonl", [dict(text=text) for text in texts_of(9, 1)])
    named, *more = f"--benchmark=ceval=ceval,{later}".split(",--")
    with pytest.raises(DataError):
        eval_generate.main([f"--ckpt={ckpt}", named, *(f"--{each}" for each in more), "--documents=prose.jsonl"])
    assert "ceval: " not in capsys.readouterr().err  # its seconds


def test_an_option_longer_than_the_context_costs_no_other(tmp_path, tokenizer_path, capsys):
    short = make_checkpoint(tmp_path / "short", Tokenizer.load(tokenizer_path), "sft", max_seq_len=64)
    path = tmp_path / "ceval" / "val" / "law_val.csv"
    write_ceval(tmp_path / "ceval")
    header, first, *others = path.read_text(encoding="utf-8").splitlines()
    columns, fields = header.split(","), first.split(",")
    fields[columns.index("B")] = "长" * 200
    path.write_text("\n".join([header, ",".join(fields), *others]) + "\n", encoding="utf-8")
    out, _ = run(capsys, f"--ckpt={short}", f"--benchmark=ceval={tmp_path / 'ceval'}", "--subjects=law")
    assert "2 questions (val)" in out and " 1 with an option that does not fit the context were left out." in out
    assert json.loads(out.splitlines()[-1])["benchmarks"][-1]["n"] == 2


@pytest.mark.parametrize("option", ["subjects=law", "shots=1", "documents=a.txt"])
def test_what_belongs_to_a_benchmark_needs_one(option):
    with pytest.raises(ConfigError, match=f"--{option.partition('=')[0]} needs --benchmark"):
        eval_generate.main([f"--{option}"])


def test_a_model_whose_weights_are_no_numbers_is_named(tmp_path, tokenizer_path, capsys):
    folder = make_checkpoint(tmp_path / "bad", Tokenizer.load(tokenizer_path), "sft", std=1e18)
    write_ceval(tmp_path / "ceval")
    with pytest.raises(CheckpointError, match="bad/ckpt.pt: log-likelihoods are not finite"):
        run(capsys, f"--ckpt={folder}", f"--benchmark=ceval={tmp_path / 'ceval'}", "--subjects=law")
