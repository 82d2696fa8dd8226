"""The pipeline of data_process.py on files written here and on real samples: what it writes depends on the input alone,
whatever the number of processes, machines or crashes, and everything that was read is accounted for."""

import json
import os
import random
from collections import Counter

import numpy as np
import pytest
import sentencepiece
from chains import ROOT, failure
from preparing import WORDS, documents, texts_of, two_sources, write_jsonl

from common.config import ConfigError
from configs.data_process import config
from corpora import sources
from corpora.clean import clean_document, content_key, is_validation
from corpora.shards import usable_cpus
from data_process import main
from dataset.corpus import Corpus
from dataset.examples import Examples
from dataset.formats import DataError, load_meta, load_pkl
from tokenizer import Tokenizer

try:
    import resource
except ImportError:
    resource = None

SAMPLES = ROOT.parent / "shared" / "data"


def test_the_result_does_not_depend_on_processes_or_units(tmp_path, build, tokenizer_path):
    sources = two_sources(tmp_path)
    one = build("one", sources, "--parts=text,pretrain", "--workers=1")
    assert build("two", sources, "--parts=text,pretrain", "--workers=2") == one
    small = build("small", sources, "--parts=text,pretrain", "--workers=2", "--unit_bytes=4096")
    same = set(one) - {"dropped.jsonl"}  # a sample of a duplicate names the unit it is in
    assert {name: small[name] for name in same} == {name: one[name] for name in same}

    train, val = (documents(tmp_path / "one", split, tokenizer_path) for split in ("train", "val"))
    assert sorted(train + val) == sorted(texts_of(300, 1) + texts_of(300, 2))
    assert [text for text in texts_of(300, 1) + texts_of(300, 2) if text not in set(val)] == train  # in order
    assert (tmp_path / "one" / "corpus.txt").read_text(encoding="utf-8").splitlines() == train
    assert 70 < len(val) < 170  # 120 expected
    tally = load_meta(tmp_path / "one")["tally"]["pretrain"]
    assert tally["a"]["read"] == tally["a"]["kept"] == 300
    assert tally["b"]["read"] == 305 and tally["b"]["kept"] == 300
    assert sum(tally["b"]["dropped"].values()) == 5
    assert not (tmp_path / "one" / "work").exists()


@pytest.mark.skipif(resource is None, reason="Windows has no such limit")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_named_and_nothing_is_left(tmp_path, capsys, workers):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    options = [f"--out={tmp_path / 'out'}", "--parts=text", f"--workers={workers}", "--unit_bytes=20000"]
    sources = two_sources(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # the kernel stops the write half-way
    try:
        line = failure(capsys, main, [sources, *options])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert line == f"error: File too large: {tmp_path / 'out'}"
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_equal_documents_are_dropped_within_and_across_sources(tmp_path, build, tokenizer_path):
    texts = texts_of(100, 1)
    write_jsonl(tmp_path / "a.jsonl", [dict(text=text) for text in texts + texts[:10]])
    signs = [text.replace("：", "——").replace("。", " ！") for text in texts[50:70]]  # other signs, the same words
    write_jsonl(tmp_path / "b.jsonl", [dict(text=text) for text in signs + texts_of(30, 2)])
    sources = f"--sources=a:text_rows={tmp_path / 'a.jsonl'},b:text_rows={tmp_path / 'b.jsonl'}"
    build("data", sources, "--parts=pretrain")
    tally = load_meta(tmp_path / "data")["tally"]["pretrain"]
    assert tally["a"]["dropped"] == {"duplicate": 10} and tally["b"]["dropped"] == {"duplicate": 20}
    splits = [set(map(content_key, documents(tmp_path / "data", split, tokenizer_path))) for split in ("train", "val")]
    assert not splits[0] & splits[1] and len(splits[0] | splits[1]) == 130
    samples = [json.loads(line) for line in (tmp_path / "data" / "dropped.jsonl").read_text("utf-8").splitlines()]
    assert Counter((row["source"], row["reason"]) for row in samples) == {
        ("a", "duplicate"): 10,
        ("b", "duplicate"): 20,
    }
    assert {row["text"] for row in samples if row["source"] == "a"} == set(texts[:10])
    build("data", sources, "--parts=pretrain", "--dedup=none")
    assert not any(counts["dropped"] for counts in load_meta(tmp_path / "data")["tally"]["pretrain"].values())


def test_near_duplicates_of_validation_leave_training(tmp_path, build, tokenizer_path):
    rng = random.Random(5)
    texts = ["".join(rng.choice(WORDS) for _ in range(300)) for _ in range(60)]

    def edit(text):
        return "".join(rng.choice(WORDS) if rng.random() < 0.03 else c for c in text)

    copies = [edit(text) for text in texts]
    write_jsonl(tmp_path / "a.jsonl", [dict(text=text) for text in texts + copies])
    options = [f"--sources=a:text_rows={tmp_path / 'a.jsonl'}", "--parts=pretrain"]
    build("data", *options, "--dedup=near")
    tally = load_meta(tmp_path / "data")["tally"]["pretrain"]["a"]
    assert tally["dropped"] == {"near-duplicate": 60} and tally["read"] == 120
    val = set(documents(tmp_path / "data", "val", tokenizer_path))
    train = set(documents(tmp_path / "data", "train", tokenizer_path))
    pairs = list(zip(texts, copies, strict=True))
    assert all(len({first, second} & (train | val)) == 1 for first, second in pairs)
    build("all", *options, "--dedup=none")
    held_out = set(documents(tmp_path / "all", "val", tokenizer_path))
    mixed = [pair for pair in pairs if len(held_out & set(pair)) == 1]
    assert len(mixed) > 5 and all(held_out & set(pair) <= val for pair in mixed)
    assert {first for first, second in pairs if not held_out & {first, second}} <= train  # else the first stays


def test_new_sources_move_no_document(tmp_path, build, tokenizer_path):
    sources = two_sources(tmp_path)
    build("both", sources, "--parts=pretrain")
    build("one", sources.split(",")[0], "--parts=pretrain")
    for split in ("train", "val"):
        alone = documents(tmp_path / "one", split, tokenizer_path)
        assert documents(tmp_path / "both", split, tokenizer_path)[: len(alone)] == alone
    build("both", sources.split(",")[0], "--parts=pretrain")  # one that is no longer named leaves no file
    assert not list((tmp_path / "both").glob("*.b.bin"))
    assert set(load_meta(tmp_path / "both")["sources"]) == {"a"}


def test_conversations_and_pairs_of_one_question_share_a_split(tmp_path, build, tokenizer_path):
    questions = texts_of(80, 3, sentences=1)
    write_jsonl(tmp_path / "sft.jsonl", [dict(instruction=q, input=None, output=f"答{q}") for q in questions])
    pairs = [dict(prompt=q, chosen=f"好{q}", rejected=f"坏{i}{q}") for q in questions for i in range(2)]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    sources = f"--sources=chat:alpaca={tmp_path / 'sft.jsonl'},better:pairs={tmp_path / 'pairs.jsonl'}"
    build("data", sources, "--parts=sft,rm,prompts", "--prompts_train=10", "--prompts_val=1000")
    tokenizer, splits = Tokenizer.load(tokenizer_path), {}
    for name, sides in (("sft", [""]), ("rm", ["chosen_", "rejected_"]), ("prompts", [""])):
        arrays = load_pkl(tmp_path / "data" / f"{name}.pkl")
        for side in sides:
            examples = Examples(arrays, side, tokenizer.vocab_size, name)
            for i in range(len(examples)):
                ids, mask = examples[i]
                question = tokenizer.decode(ids[: list(ids).index(tokenizer.bos_id)])
                splits.setdefault(question, set()).add(bool(arrays["is_val"][i]))
                assert name == "prompts" or tokenizer.decode(ids[mask == 1]).endswith(question)
    assert set(splits) == set(questions) and all(len(found) == 1 for found in splits.values())
    prompts = load_pkl(tmp_path / "data" / "prompts.pkl")["is_val"]  # of the pairs, each once, as no source gives any
    held_out = sum(True in found for found in splits.values())
    assert (~prompts).sum() == 10 and prompts.sum() == held_out
    tally = load_meta(tmp_path / "data")["tally"]
    assert tally["rm"]["better"]["kept"] == 160
    assert tally["prompts"]["better"]["dropped"] == {"duplicate": 80, "not needed": 70 - held_out}


def test_verify_reads_everything_again(tmp_path, build, capsys):
    sources = two_sources(tmp_path)
    write_jsonl(tmp_path / "sft.jsonl", [dict(instruction=t, input="", output=t) for t in texts_of(50, 3)])
    build("data", f"{sources},chat:alpaca={tmp_path / 'sft.jsonl'}", "--parts=text,pretrain,sft")
    verify = [f"--out={tmp_path / 'data'}", "--verify"]
    capsys.readouterr()
    main(verify)
    assert "6 files are what meta.json says" in capsys.readouterr().out
    for name in ("train.a.bin", "val.b.bin", "sft.pkl", "corpus.txt"):
        path = tmp_path / "data" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        with pytest.raises(DataError, match=f"{name} has {len(whole) - 1} bytes, but meta.json says {len(whole)}"):
            main(verify)
        path.write_bytes(whole[:10] + bytes([whole[10] ^ 1]) + whole[11:])
        with pytest.raises(DataError, match=f"{name}: its sha256 is not the one in meta.json"):
            main(verify)
        path.unlink()
        with pytest.raises(DataError, match=f"{name} not found"):
            main(verify)
        path.write_bytes(whole)
    main(verify)


def test_benchmark_questions_leave_training_text(tmp_path, build):
    question = "下列关于细胞有丝分裂过程中染色体行为变化的叙述哪一项是正确的"
    folder = tmp_path / "ceval"
    folder.mkdir()
    (folder / "biology_dev.csv").write_text(
        f"id,question,A,B,C,D,answer\n0,{question},甲,乙,丙,丁,A\n", encoding="utf-8"
    )
    texts = texts_of(50, 4)
    texts[7] += f"问：{question}？"
    write_jsonl(tmp_path / "a.jsonl", [dict(text=text) for text in texts])
    sources = f"--sources=a:text_rows={tmp_path / 'a.jsonl'}"
    build("data", sources, "--parts=pretrain", f"--decontaminate={folder}")
    assert load_meta(tmp_path / "data")["tally"]["pretrain"]["a"]["dropped"] == {"in a benchmark": 1}
    samples = (tmp_path / "data" / "dropped.jsonl").read_text(encoding="utf-8")
    assert json.loads(samples)["place"].endswith("a.jsonl:8")
    build("data", sources, "--parts=pretrain", f"--decontaminate={folder}", "--keep_work")
    (folder / "more_dev.csv").write_text(f"id,question,A,B,C,D,answer\n0,{texts[20]},甲,乙,丙,丁,A\n", encoding="utf-8")
    build(
        "data", sources, "--parts=pretrain", f"--decontaminate={folder}", "--keep_work"
    )  # no shard of before is taken
    assert load_meta(tmp_path / "data")["tally"]["pretrain"]["a"]["dropped"] == {"in a benchmark": 2}


def test_what_cleaning_leaves_without_a_question_or_a_difference_is_dropped(tmp_path, build):
    pairs = [dict(prompt=f"问题{i}", chosen=f"好的回答{i}", rejected=f"坏的回答{i}") for i in range(40)]
    pairs += [dict(prompt="问甲", chosen="第一行\r\n第二行", rejected="第一行\n第二行")]
    pairs += [
        dict(prompt="问乙", chosen="好\u200b的", rejected="好的"),
        dict(prompt="\u200b", chosen="是", rejected="否"),
    ]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    asked = [dict(instruction=f"问题{i}", output=f"回答{i}") for i in range(40)] + [
        dict(instruction="\u200b", output="好")
    ]
    write_jsonl(tmp_path / "sft.jsonl", asked)
    sources = f"--sources=p:pairs={tmp_path / 'pairs.jsonl'},s:alpaca={tmp_path / 'sft.jsonl'}"
    build("data", sources, "--parts=rm,sft")
    tally = load_meta(tmp_path / "data")["tally"]
    assert tally["rm"]["p"]["dropped"] == {"chosen equals rejected": 2, "no question": 1}
    assert tally["sft"]["s"]["dropped"] == {"no question": 1}


def test_files_of_a_source_that_is_no_longer_named_go_with_a_word(tmp_path, build, capsys):
    sources = two_sources(tmp_path)
    build("data", sources, "--parts=pretrain")
    build("data", f"--sources=c:text_rows={tmp_path / 'a.jsonl'}", "--parts=pretrain")
    assert (
        "removed train.a.bin, train.b.bin, val.a.bin, val.b.bin: this run names no such source"
        in capsys.readouterr().err
    )


def test_samples_of_what_was_dropped_are_limited(tmp_path, build):
    rows = [dict(text=text) for text in texts_of(60, 1)] + [dict(text="短")] * 50 + [dict(other="文")] * 30
    write_jsonl(tmp_path / "a.jsonl", rows)
    build("data", f"--sources=a:text_rows={tmp_path / 'a.jsonl'}", "--parts=pretrain", "--unit_bytes=3000")
    dropped = load_meta(tmp_path / "data")["tally"]["pretrain"]["a"]["dropped"]
    samples = [json.loads(line) for line in (tmp_path / "data" / "dropped.jsonl").read_text("utf-8").splitlines()]
    assert dropped == {"too short": 50, "no text": 30}
    assert {row["text"] for row in samples if row["reason"] == "too short"} == {"短"}
    assert Counter(row["reason"] for row in samples) == dict.fromkeys(dropped, 20)
    assert len({row["place"] for row in samples}) == 40
    report = (tmp_path / "data" / "report.md").read_text(encoding="utf-8")
    assert all(f"{why} {n}" for why, n in dropped.items()) and "| a | 140 | 60 |" in report


def test_small_files_are_what_they_are_in_one(tmp_path, build):
    """A file a document, in few shards: the same bytes as from one file, for any number of processes."""
    texts = texts_of(300, 1)
    write_jsonl(tmp_path / "one.jsonl", [dict(text=text) for text in texts])
    for i, text in enumerate(texts):
        (tmp_path / "in" / f"{i % 7}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / f"{i % 7}" / f"{i:03d}.txt").write_text(text, encoding="utf-8")
    options = (f"--sources=a:txt={tmp_path / 'in'}", "--parts=pretrain")
    small = build("small", *options, "--keep_work")
    folder = tmp_path / "small" / "work" / "pretrain"
    assert [path.name for path in folder.iterdir()] == ["a-00000"]
    assert build("two", *options, "--unit_bytes=20000", "--workers=2") == small
    write_jsonl(tmp_path / "one.jsonl", [dict(text=text) for i in range(7) for text in texts[i::7]])
    one = build("one", f"--sources=a:text_rows={tmp_path / 'one.jsonl'}", "--parts=pretrain")
    assert [one[f"{split}.a.bin"] == small[f"{split}.a.bin"] for split in ("train", "val")] == [True, True]
    (tmp_path / "in" / "3" / "003.txt").write_text(texts[3].replace("第3篇", "第9篇"), encoding="utf-8")
    after = build("small", *options)
    assert after == build("fresh", *options) and after != small


def test_a_novel_becomes_documents(tmp_path, build, tokenizer_path):
    novel = "".join(f"第{i}章 起\n" + "\n".join(texts_of(20, i)) + "\n" for i in range(20))
    (tmp_path / "novel.txt").write_text(novel, encoding="utf-8")
    options = (f"--sources=a:txt={tmp_path / 'novel.txt'}", "--parts=pretrain", "--dedup=none")
    build("data", *options, "--txt_characters=2000", "--keep_work")
    read = load_meta(tmp_path / "data")["tally"]["pretrain"]["a"]["read"]
    assert len(novel) / 3000 <= read <= len(novel) / 1000
    build("data", *options, "--txt_characters=4000", "--keep_work")  # makes the shard anew
    assert len(novel) / 6000 <= load_meta(tmp_path / "data")["tally"]["pretrain"]["a"]["read"] <= len(novel) / 2000


def test_names_and_texts_that_cannot_be_written_are_escaped(tmp_path, build):
    folder = os.fsencode(tmp_path / "in")
    os.makedirs(folder)
    for i, text in enumerate([*texts_of(20, 1), "短"]):
        with open(os.path.join(folder, f"三国{i}.txt".encode("gbk")), "wb") as file:
            file.write(text.encode())
    write_jsonl(tmp_path / "a.jsonl", [dict(text=text) for text in texts_of(20, 2)])
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('{"text": "half a pair \\ud800, all of it"}\n')
    build("data", f"--sources=a:txt={os.fsdecode(folder)},b:text_rows={tmp_path / 'a.jsonl'}", "--parts=pretrain")
    tally = load_meta(tmp_path / "data")["tally"]["pretrain"]
    assert tally["a"]["dropped"] == {"too short": 1} and tally["b"]["dropped"] == {"not Chinese enough": 1}
    samples = (tmp_path / "data" / "dropped.jsonl").read_text(encoding="utf-8")
    places, texts = zip(*((row["place"], row["text"]) for row in map(json.loads, samples.splitlines())), strict=True)
    assert places[0].endswith(r"\udcc8\udcfd\udcb9\udcfa20.txt:1")
    assert texts == ("短", r"half a pair \ud800, all of it")
    name = os.fsdecode(os.path.join(folder, "三国1.txt".encode("gbk")))
    build("one", f"--sources=a:lines={name},b:text_rows={tmp_path / 'a.jsonl'}", "--parts=pretrain")
    assert r"\udcc8" in load_meta(tmp_path / "one")["command"]["pretrain"]


def test_workers_are_the_cpus_that_may_be_used():
    if hasattr(os, "sched_getaffinity"):
        allowed = os.sched_getaffinity(0)
        try:
            os.sched_setaffinity(0, [min(allowed)])
            assert usable_cpus() == 1
        finally:
            os.sched_setaffinity(0, allowed)
    assert 1 <= usable_cpus() <= os.cpu_count()


def test_mistakes_are_one_clear_error_and_leave_nothing(tmp_path, build, tokenizer_path):
    sources = two_sources(tmp_path)
    cases = [
        ((f"{sources},a:lines={tmp_path / 'b.jsonl'}",), DataError, "sources: a is named twice"),
        ((f"--sources=a:text_rows={tmp_path / 'none.jsonl'}",), DataError, "none.jsonl"),
        ((f"--sources=wikipedai={tmp_path / 'a.jsonl'}",), DataError, "wikipedai.*wikipedia"),
        ((sources, "--parts=sft"), ConfigError, "parts: sft needs a sft source; sources = a:text_rows="),
        ((sources, "--dedup=fuzzy"), ConfigError, "dedup=fuzzy: none, exact or near is needed"),
        ((sources, "--unit_bytes=0"), ConfigError, "unit_bytes=0: at least 1 is needed"),
        ((sources, "--decontaminate=nowhere"), DataError, "nowhere"),
    ]
    for options, kind, message in cases:
        with pytest.raises(kind, match=message):
            build("bad", "--parts=pretrain", *options)
        assert not (tmp_path / "bad").exists(), options


def test_characters_that_a_vocabulary_loses_are_told(tmp_path, build, capsys):
    options = dict(vocab_size=90, model_type="unigram", unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2)
    text, model = texts_of(1, 1)[0], tmp_path / "foreign.model"
    with open(model, "wb") as file:  # without byte fallback, as SentencePiece's defaults are
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts_of(50, 1)), model_writer=file, **options)
    ids = Tokenizer.load(model).encode(text)
    missing, rows = "龘" * 3 + "的", [dict(text=f"{text}{i}") for i in "山川河流城"]
    write_jsonl(tmp_path / "a.jsonl", [*rows[:4], dict(text=rows[4]["text"] + missing), rows[0]])  # the last is dropped
    conversations = [dict(instruction=f"{text}{i}", output=f"{i}{missing}") for i in "山川河流城"]
    write_jsonl(tmp_path / "sft.jsonl", conversations)
    sources = f"--sources=a:text_rows={tmp_path / 'a.jsonl'},chat:alpaca={tmp_path / 'sft.jsonl'}"
    build("data", sources, f"--tokenizer={model}", "--parts=pretrain,sft", "--val_share=0.5")
    bins = [np.fromfile(tmp_path / "data" / f"{split}.a.bin", np.uint16) for split in ("train", "val")]
    pkl = load_pkl(tmp_path / "data" / "sft.pkl")["tokens"]
    found = dict(a=np.concatenate(bins), chat=pkl)
    assert all((tokens == 0).any() for tokens in found.values()) and 0 not in ids
    shares = {source: f"{(tokens == 0).mean():.2%}" for source, tokens in found.items()}
    said, report = capsys.readouterr().err, (tmp_path / "data" / "report.md").read_text(encoding="utf-8")
    assert f"{model} changes text: nmt_nfkc; spaces in a row become one" in said
    assert f"warning: pretrain: {shares['a']} of the tokens of a are unknown to {model}" in said
    assert f"warning: sft: {shares['chat']} of the tokens of chat are unknown" in said
    assert all(f"unknown tokens: {share} |" in report for share in shares.values())


@pytest.mark.skipif(not SAMPLES.exists(), reason="needs the real samples in ../shared/data")
def test_chatglm_vocabulary_loses_and_changes_nothing(tmp_path, build, capsys):
    model = SAMPLES / "tokenizer" / "chatglm3_tokenizer.model"
    write_jsonl(tmp_path / "a.jsonl", [dict(text=f"{text}龘👋\u0301　Ａ") for text in texts_of(20, 1)])
    build("data", f"--sources=a:text_rows={tmp_path / 'a.jsonl'}", f"--tokenizer={model}", "--parts=pretrain")
    said = capsys.readouterr().err
    assert "changes text" not in said and "unknown" not in said
    assert "unknown" not in (tmp_path / "data" / "report.md").read_text(encoding="utf-8")


@pytest.mark.skipif(not SAMPLES.exists(), reason="needs the real samples in ../shared/data")
def test_real_samples_of_every_stage(tmp_path):
    tokenizer_path = SAMPLES / "tokenizer" / "chatglm3_tokenizer.model"
    sources = [
        f"wiki:text_rows={SAMPLES / 'pretrain' / 'readwiki_zh.jsonl'}",
        f"sanguo:txt={SAMPLES / 'pretrain' / '三国演义.txt'}",
        f"alpaca={SAMPLES / 'sft' / 'llamafactory_alpaca_zh_demo.json'}",
        f"oaast:alpaca={SAMPLES / 'sft' / 'oaast_sft_zh.json'}",
        f"sharegpt={SAMPLES / 'sft' / 'sharegpt_zh_200.jsonl'}",
        f"dpo_sharegpt={SAMPLES / 'preference' / 'llamafactory_dpo_zh_demo.json'}",
        f"ranked={SAMPLES / 'preference' / 'oaast_rm_zh.json'}",
    ]
    out = tmp_path / "data"
    options = [f"--out={out}", f"--tokenizer={tokenizer_path}", f"--sources={','.join(sources)}", "--max_seq_len=1024"]
    main([*options, "--parts=pretrain,sft,rm,prompts", "--dedup=near"])
    main([f"--out={out}", "--verify"])
    tally = load_meta(out)["tally"]
    assert {part: set(rows) for part, rows in tally.items()} == {
        "pretrain": {"wiki", "sanguo"},
        "sft": {"alpaca", "oaast", "sharegpt"},
        "rm": {"dpo_sharegpt", "ranked"},
        "prompts": {"dpo_sharegpt", "ranked"},
    }
    for rows in tally.values():
        for row in rows.values():
            assert row["read"] == row["kept"] + sum(row["dropped"].values())
            assert row["kept"] == row["train"]["documents"] + row["val"]["documents"]
    assert tally["pretrain"]["wiki"]["read"] == 100 and tally["pretrain"]["wiki"]["kept"] >= 98
    assert [tally["sft"][name]["read"] for name in ("alpaca", "oaast", "sharegpt")] == [1000, 689, 200]
    assert tally["sft"]["alpaca"]["kept"] > 980
    assert tally["rm"]["ranked"]["read"] >= 434 + 3 * 263 + 6 * 63


@pytest.mark.skipif(not SAMPLES.exists(), reason="needs the real samples in ../shared/data")
def test_ids_are_those_of_sentencepiece(tmp_path):
    """Every real sample that is text, through the whole stage, against SentencePiece alone on the cleaned text."""
    model = SAMPLES / "tokenizer" / "chatglm3_tokenizer.model"
    wiki, novel = SAMPLES / "pretrain" / "readwiki_zh.jsonl", SAMPLES / "pretrain" / "三国演义.txt"
    options = [f"--sources=wiki:text_rows={wiki},novel:lines={novel}", "--parts=pretrain", "--dedup=none"]
    main([f"--out={tmp_path}", f"--tokenizer={model}", *options])
    sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    expected = {"train": [], "val": []}
    for layout, path in (("text_rows", wiki), ("lines", novel)):
        for unit in sources.list_units("x", layout, path):
            for _, record, _ in sources.read_records(unit):
                text = record and clean_document(record["text"], config["clean"])[0]
                if text:
                    split = "val" if is_validation(text, config["val_share"]) else "train"
                    expected[split] += sp.encode(text) + [2]
    for split, ids in expected.items():
        assert Corpus(tmp_path, split).read(0, 1 << 40).tolist() == ids
    assert len(expected["train"]) > 900_000
