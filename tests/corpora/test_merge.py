"""corpora/merge.py through data_process.py: which conversations go as copies, and what is said of them."""

import json
import re

import pytest

from data_process import main
from dataset.formats import load_meta

TASK = "你是图书馆的管理员。请读下面的借书记录，判断这本书应当放回哪一个书架，只回答书架的颜色，不要解释。"


@pytest.fixture
def tally(small, tmp_path, capsys):
    """tally(rows, *options): what meta.json counts of these Alpaca rows, the samples of what went, and stderr."""

    def run(rows, *options, layout="alpaca", part="sft"):
        rows = rows + OTHERS
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        command = [f"--tokenizer={small / 'tokenizer'}", f"--out={tmp_path / 'out'}", "--val_share=0.2", *options]
        main([*command, f"--sources=x:{layout}={path}", f"--parts={part}", "--max_seq_len=1024"])
        samples = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text("utf-8").splitlines()]
        return load_meta(tmp_path / "out")["tally"][part]["x"], samples, capsys.readouterr().err

    return run


def row(question, answer):
    return dict(instruction=question, output=answer)


OTHERS = [row(f"{a}字怎么写？", f"{a}字在字典的第{i}页。") for i, a in enumerate("山川河流城市乡村老师学生清晨夜晚")]


def test_questions_under_one_instruction_stay(tally):
    titles = [f"《{a}{b}的故事》" for a in "山川河流城市乡村" for b in "老师学生清晨夜晚"]
    rows = [row(f"{TASK}\n{title}", "红绿蓝"[i % 3] + "色") for i, title in enumerate(titles)]
    counts, _, said = tally(rows, "--dedup=near")
    assert counts["kept"] == counts["read"] == 64 + 16 and "dropped" not in said


def test_signs_and_emoji_tell_conversations_apart(tally):
    rows = [row(f"判断对错：{a}{sign}{b}", "对") for a in range(4) for b in range(4) for sign in ("<", "!=", "=", ">")]
    rows += [row(emoji, "好") for emoji in "😀😢👍👎"]
    for dedup in ("exact", "near"):
        assert tally(rows, f"--dedup={dedup}")[0]["kept"] == 68 + 16
    assert tally([row("你 好\n吗", "好"), row("你 好 吗 ", "好"), row("好吗", "好")])[0]["dropped"] == {"duplicate": 1}


def test_the_system_text_tells_conversations_apart(tally):
    rows = [row("病人来了，应该怎样接待他？", "请他坐下，倒一杯水，慢慢问他哪里不舒服。") | dict(system=f"你是{who}。")
            for who in ("医生", "律师", "老师")]  # fmt: skip
    assert tally(rows, "--dedup=near")[0]["kept"] == 3 + 16


def test_copies_are_named_with_what_they_repeat(tally):
    answer = "先把水烧开，再把面条放进锅里，煮三分钟以后捞出来，加一点盐和葱花。"
    rows = [row("怎样煮一碗好吃的面？", answer), row("怎样泡一壶茶？", "水要烧开，茶叶要少，先洗一遍再泡三分钟。")]
    rows += [
        row("怎么煮一碗好吃的面", answer.replace("捞出来", "盛出来").replace("再把", "再将")),
        row("怎样煮一碗好吃的面？", answer),
    ]
    counts, samples, said = tally(rows, "--dedup=near")
    assert counts["dropped"] == {"duplicate": 1, "near-duplicate": 1}
    lines = {sample["reason"]: re.findall(r"a\.jsonl:(\d+)", sample["place"]) for sample in samples}
    assert lines == {"duplicate": ["4", "1"], "near-duplicate": ["3", "1"]} and ", like " in samples[0]["place"]
    assert "sft: x: 10% of 20 records dropped, 1 as " in said and "look at them in dropped.jsonl" in said


def test_a_repeated_question_goes_if_asked(tally):
    rows = [row("讲一个故事", f"从前有座山，山上住着{who}。") for who in ("老和尚", "小猴子", "大灰狼")]
    rows += [row("写一首诗", "春风又绿江南岸。"), row("画一只猫", "我不会画画。")]
    assert tally(rows)[0]["kept"] == 5 + 16
    assert tally(rows, "--dedup_questions=True")[0]["dropped"] == {"duplicate": 2}
    near = [row("请给我讲一个关于大海和渔夫的故事，不要太长，最好一百字以内，结尾要让人意想不到。", "从前有一个渔夫。")]
    other = near[0]["instruction"].replace("请给", "请你给").replace("不要", "不能").replace("最好", "尽量")
    near += [row(other, "大海很大，渔夫很小。"), *rows]
    assert tally(near, "--dedup=near")[0]["kept"] == 7 + 16
    counts, _, _ = tally(near, "--dedup=near", "--dedup_questions=True")
    assert counts["dropped"] == {"duplicate": 2, "near-duplicate": 1}


@pytest.mark.parametrize("part", ["text", "pretrain"])
def test_short_documents_of_other_facts_stay(small, tmp_path, part):
    texts = [f"水的沸点是一百摄氏度，这个说法在一个标准大气压下是{right}的。" for right in "对错"]
    texts += ["国务院决定任命张三为财政部部长。", "国务院决定任命李四为教育部部长。"]
    page = "".join(
        f"{a}字在字典的第{i}页，它是一个常用字，小学生都会写。" for i, a in enumerate("山川河流城市乡村老师")
    )
    path = tmp_path / "a.jsonl"
    rows = [dict(text=text) for text in [*texts, page, page.replace("常用字", "常用的字").replace("小学生", "学生")]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = [f"--tokenizer={small / 'tokenizer'}", f"--out={tmp_path / 'out'}", "--clean.max_top_ngram=1.0"]
    options += ["--clean.max_repeated_ngrams=1.0", "--val_share=0.2", "--dedup=near"]
    main([*options, f"--sources=x:text_rows={path}", f"--parts={part}"])
    counts = load_meta(tmp_path / "out")["tally"][part]["x"]
    assert counts["kept"] == 5 and counts["dropped"] == {"near-duplicate": 1}
