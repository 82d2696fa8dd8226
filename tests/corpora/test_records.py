"""corpora/records.py and what the merge makes of records: examples that fit, what the context costs, fields, splits."""

import dataclasses
import json

import pytest

from configs.tokenizer import config as tokenizer_defaults
from corpora import sources
from corpora.clean import is_validation
from corpora.records import encode_records
from data_process import SOURCES, main
from dataset.batches import load_pairs, load_prompts
from dataset.examples import Examples
from dataset.formats import DataError, load_meta, load_pkl
from tokenizer import Tokenizer
from tokenizer.train import Corpus, train_bpe


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A vocabulary in which letters and digits are a token each."""
    folder = tmp_path_factory.mktemp("model")
    letters = "".join(map(chr, range(32, 127)))
    (folder / "text.txt").write_text(letters + "\n山川河流\n春秋" * 20, encoding="utf-8")
    config = tokenizer_defaults | dict(vocab_size=3 + 256 + 95 + 6 + 4, character_coverage=1.0)
    (folder / "tokenizer.model").write_bytes(train_bpe(Corpus([str(folder / "text.txt")], 1000), config))
    return folder


@pytest.fixture
def build(tmp_path, model):
    """build(part, layout, rows, *options): (meta's tally of the part, the arrays of its .pkl)."""

    def run(part, layout, rows, *options):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
        common = [f"--out={tmp_path / 'data'}", f"--tokenizer={model}", f"--parts={part}", "--workers=1"]
        main([*common, f"--sources=x:{layout}={tmp_path / 'rows.jsonl'}", *options])
        main([common[0], "--verify"])
        return load_meta(tmp_path / "data")["tally"][part]["x"], load_pkl(tmp_path / "data" / f"{part}.pkl")

    return run


def talk(number, turns):
    """A conversation of turns of 10 tokens: questions like 12Q3, answers like 12A3, <bos> and <eos>."""
    texts = [f"{number:02}{letter}{turn}" for turn in range(turns) for letter in "QA"]
    return [dict(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(texts)]


def test_a_long_conversation_is_one_row_and_several_examples(build, model):
    rows = [dict(messages=talk(i, 7 if i % 3 == 0 else 2)) for i in range(30)]
    counts, arrays = build("sft", "messages", rows, "--max_seq_len=31", "--val_share=0.3")
    tokenizer, splits = Tokenizer.load(model), {}
    examples = Examples(arrays, vocab_size=tokenizer.vocab_size, max_len=31)
    for i in range(len(examples)):
        ids, mask = examples[i]
        texts = tokenizer.decode(ids[mask == 1])
        for text in (texts[k : k + 4] for k in range(0, len(texts), 4)):
            splits.setdefault(int(text[:2]), []).append((text, bool(arrays["is_val"][i])))
    for number, found in splits.items():  # every answer once, in order, and all of a conversation on one side
        assert [text for text, _ in found] == [f"{number:02}A{turn}" for turn in range(7 if number % 3 == 0 else 2)]
        assert len({side for _, side in found}) == 1
    assert len(splits) == 30
    # 7 turns: three; one more as context and two; one more as context and two
    assert len(examples) == 20 + 10 * 3 == len(arrays["is_val"]) == len(arrays["task"]) == len(arrays["label"])
    assert (counts["read"], counts["kept"], counts["dropped"], counts["remarks"]) == (30, 30, {}, {"split": 10})
    total = {name: counts["train"][name] + counts["val"][name] for name in counts["train"]}
    assert (total["documents"], total["examples"], total["answer_tokens"]) == (30, 50, 5 * (10 * 7 + 20 * 2))
    assert total["tokens"] == 10 * (20 * 2 + 10 * 9) == len(arrays["tokens"])
    assert counts["answer_tokens_lost"] == 0
    held_out = [i for i, found in splits.items() if found[0][1]]
    assert counts["val"]["documents"] == len(held_out) and 0 < len(held_out) < 30
    assert counts["val"]["examples"] == arrays["is_val"].sum() == sum(3 if i % 3 == 0 else 1 for i in held_out)


def test_lost_answer_tokens_are_counted(build, tmp_path):
    long = [dict(role="user", content="Q"), dict(role="assistant", content="A" * 40)]
    rows = [dict(messages=talk(i, 2)) for i in range(10)]
    rows += [dict(messages=talk(10, 1) + long), dict(messages=talk(11, 1) + long), dict(messages=long)]
    rows += [rows[-2]]  # a copy loses nothing more
    counts, arrays = build("sft", "messages", rows, "--max_seq_len=31", "--val_share=0.3")
    assert counts["dropped"] == {"answer too long": 1, "duplicate": 1} and counts["remarks"] == {"answer left out": 3}
    assert counts["answer_tokens_lost"] == 3 * 41
    assert sum(counts[split]["answer_tokens"] for split in ("train", "val")) == 5 * (10 * 2 + 2)
    report = (tmp_path / "data" / "report.md").read_text(encoding="utf-8")
    assert "| examples | answer tokens |" in report and "| 12 | 110 of 233 |" in report


def test_pairs_keep_one_cut_prompt_and_lose_only_long_answers(build, model, tmp_path):
    rows = [dict(prompt=f"{i:02}", chosen="Y" * (i + 1), rejected="N") for i in range(10)]
    rows += [dict(prompt="P" * 40 + f"{i:02}", chosen="Y", rejected="N" * (i - 8)) for i in range(10, 20)]
    rows += [dict(prompt="Q", chosen="Y", rejected="N" * 40)]
    rows += [dict(prompt="Q", history=[["H" * 20, "h"]], chosen="Y", rejected="N")]
    counts, arrays = build("rm", "pairs", rows, "--max_seq_len=24", "--val_share=0.3")
    assert counts["dropped"] == {"answer too long": 1} and counts["remarks"] == {"cut question": 10, "dropped turns": 1}
    assert counts["answer_tokens_lost"] == 2 + 41
    tokenizer = Tokenizer.load(model)
    for chosen, rejected in load_pairs(tmp_path / "data" / "rm.pkl", tokenizer.vocab_size, 24):
        for i in range(len(chosen)):
            prompts = [ids[mask == 0].tolist() for ids, mask in (chosen[i], rejected[i])]
            assert prompts[0] == prompts[1] and prompts[0][-1] == tokenizer.bos_id
            longest = max(len(chosen[i][0]), len(rejected[i][0]))
            assert longest == 24 or tokenizer.decode(prompts[0]) in [f"{n:02}" for n in range(10)] + ["Q"]


def test_prompts_are_cut_under_the_right_name(model):
    tokenizer = Tokenizer.load(model)
    records = [dict(messages=talk(1, 2)[:-1]), dict(messages=[dict(role="user", content="山川。" + "春秋" * 9)])]
    for max_len, expected in ((15, ("01Q0\x0101A0\x0201Q1\x01", None)), (14, ("01Q1\x01", "dropped turns"))):
        [(streams, note, _)] = encode_records("prompts", records[:1], tokenizer, max_len)
        text = "".join({1: "\x01", 2: "\x02"}.get(i) or tokenizer.decode([i]) for i in streams["tokens"])
        assert (text, note) == expected
    [(streams, note, _)] = encode_records("prompts", records[1:], tokenizer, len(tokenizer.encode("春秋" * 9)) + 2)
    assert (tokenizer.decode(streams["tokens"]), note) == ("春秋" * 9, "cut question")
    assert encode_records("prompts", records[1:], tokenizer, 1) == [(None, "no room for the question", (0, 0))]


@pytest.fixture
def prompt_rows(monkeypatch):
    """A layout of prompts: all but the question are fields."""

    def adapt(row):
        question = dict(role="user", content=row.pop("question"))
        return [(dict(messages=[question], **(dict(fields=row) if row else {})), None)]

    layout = dataclasses.replace(sources.SOURCES["text_rows"], stage="prompts", adapter=adapt)
    for table in (SOURCES, sources.SOURCES):
        monkeypatch.setitem(table, "prompt_rows", layout)


def test_fields_of_prompts_are_kept_for_rewards(build, model, prompt_rows, tmp_path):
    rows = [dict(question=f"{i:02}", answer=f"答{i}", steps=[i, None, {"乙": 1.5}]) for i in range(20)]
    rows += [dict(question=f"{i:02}") for i in range(20, 30)]
    _, arrays = build("prompts", "prompt_rows", rows, "--val_share=0.3", "--prompts_train=15")
    tokenizer = Tokenizer.load(model)
    train, val = load_prompts(tmp_path / "data" / "prompts.pkl", tokenizer.vocab_size)
    assert len(train) == 15 and len(val) == arrays["is_val"].sum() > 0
    for prompt in train + val:
        number = int(tokenizer.decode(prompt))
        expected = rows[number]
        assert prompt.fields == dict(answer=expected.get("answer"), steps=expected.get("steps"))
    _, arrays = build("prompts", "prompt_rows", [dict(question=f"{i:02}") for i in range(30)], "--val_share=0.3")
    assert "fields" not in arrays
    train, _ = load_prompts(tmp_path / "data" / "prompts.pkl", tokenizer.vocab_size)
    assert train[0].fields == {}


def sides(build, questions, val_share, *options):
    """Which of the questions are held out, as conversations."""
    rows = [dict(instruction=question, output=f"答{i}") for i, question in enumerate(questions)]
    _, arrays = build("sft", "alpaca", rows, f"--val_share={val_share}", *options)
    return arrays["is_val"].tolist()


@pytest.mark.parametrize("n", [2, 12, 45])
def test_a_split_that_chance_left_empty_gets_the_nearest_hash(build, capsys, n):
    questions = [f"{i:02}" for i in range(n)]
    few = sides(build, questions, 1e-9)
    out = capsys.readouterr().out
    assert f"sft: val_share = 1e-09: by their hashes none of {n} records is held out; the one with the nearest" in out
    # the one held out is the first that a larger share would hold out
    shares = [k / 1000 for k in range(1, 1000)]
    assert few == next(found for k in shares if sum(found := [is_validation(q, k) for q in questions]))
    most = sides(build, questions, 1 - 1e-9)
    assert sum(most) == n - 1 and (n == 2 or most != few)
    assert f"none of {n} records is left to train on; the one with the nearest hash" in capsys.readouterr().out
    usual = [is_validation(q, 0.4) for q in questions]
    if any(usual) and not all(usual):
        assert sides(build, questions, 0.4) == usual and "by their hashes" not in capsys.readouterr().out


def test_records_that_cannot_be_parted_are_refused(build, tmp_path):
    with pytest.raises(DataError, match="sft: 1 of 1 records is left, so that none can be held out; add others"):
        sides(build, ["问"], 0.3)
    with pytest.raises(DataError, match="sft: 9 of 9 records are left, all with the same beginning, so that none"):
        sides(build, ["问"] * 9, 0.3)
    assert not (tmp_path / "data" / "sft.pkl").exists()


def test_few_prompts_are_parted_too(build, prompt_rows, capsys):
    def held_out(n, val_share, *options):
        rows = [dict(question=f"{i:02}") for i in range(n)]
        return build("prompts", "prompt_rows", rows, f"--val_share={val_share}", *options)[1]["is_val"].tolist()

    assert sum(held_out(12, 1e-9)) == 1
    assert "prompts: val_share = 1e-09: by their hashes none of 12 records is held out" in capsys.readouterr().out
    assert held_out(12, 1e-9, "--prompts_val=0") == [False] * 12
    assert "by their hashes" not in capsys.readouterr().out
    assert held_out(1, 1e-9) == held_out(1, 1 - 1e-9) == [False]  # one prompt can only be trained on
