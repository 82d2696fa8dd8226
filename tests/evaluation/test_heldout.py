"""Questions made of held-out documents: what they are made of, and that a model which learnt more answers more."""

import random

import pytest
import torch
from preparing import texts_of, write_jsonl
from questions import poems

from common.metrics import wilson_interval
from configs.tokenizer import config as tokenizer_defaults
from dataset.formats import DataError
from evaluation.heldout import TASKS, ask, couplets_of, excerpts_of, of_data, of_file, of_files, pieces_of
from evaluation.scoring import by_character, chosen, score
from model import Llama, ModelConfig
from tokenizer import Tokenizer
from tokenizer.train import Corpus, train_bpe

POEM = "春晓\n春眠不觉晓，处处闻啼鸟。\n夜来风雨声，花落知多少。"


def stories(n, seed=0):
    """Documents of one topic each, whose sentences come in a fixed order."""
    rng, made = random.Random(seed), []
    topics = ["山川河流森林草原湖泊", "老师学生课本考试黑板", "医生护士药品病人手术", "厨师饭菜米面油盐酱醋"]
    for _ in range(n):
        topic = topics[rng.randrange(4)]
        orders = ["首先说到", "其次说到", "然后说到", "最后说到"]
        made.append("".join(f"{order}{''.join(rng.choices(topic, k=8))}。" for order in orders))
    return made


@pytest.mark.parametrize(
    "text",
    [
        *texts_of(5, 3),
        POEM,
        "没有标点的一长串字" * 40,
        "短。",
        "",
        "。。。！！",
        "他说：“走吧。”然后他们就一起走了，走了很远很远的路。\n\n第二段从这里开始……",
        "no Chinese at all. Just words, and more words! 3.14 is a number",
    ],
)
def test_pieces_joined_are_the_text(text):
    pieces = pieces_of(text)
    assert "".join(pieces) == text
    assert all(12 <= len(piece) <= 100 for piece in pieces) or len(pieces) <= 1


def test_a_long_document_is_several_excerpts():
    long, short = "".join(texts_of(1, 0, sentences=40)), "一句话就是一篇文章。"
    excerpts = excerpts_of([long, short])
    assert "".join(piece for each in excerpts if each.document == 0 for piece in each.pieces) == long
    assert [each.document for each in excerpts][-2:] == [0, 1] and max(len(each.pieces) for each in excerpts) == 16


@pytest.mark.parametrize("task", TASKS)
def test_questions_are_drawn_by_the_seed(task):
    documents = dict(a=poems(40) + stories(40), b=poems(40, seed=1) + stories(40, seed=1))
    asked = ask(task, documents, 25, seed=0)
    assert asked == ask(task, documents, 25, seed=0) != ask(task, documents, 25, seed=1)
    assert [sum(q.group == source for q in asked) for source in "ab"] == [25, 25]
    whole = {source: "\0".join(texts) for source, texts in documents.items()}
    for q in asked:
        n = 4 if task == "couplets" else 2
        assert len(q.choices) == len(set(q.choices)) == n
        assert q.context + q.choices[q.answer] in whole[q.group]
    answers = [q.answer for q in asked]
    assert len(set(answers)) == n  # the right one may stand at every place


def test_what_is_wrong_comes_from_where_it_should():
    documents = dict(a=stories(60))
    for q in ask("continuations", documents, 50, 0):  # another topic, as a rule, and never the same piece
        assert any(q.choices[1 - q.answer] in text and q.context not in text for text in documents["a"])
    for q in ask("near_continuations", documents, 50, 0):
        [text] = [text for text in documents["a"] if q.context + q.choices[q.answer] in text][:1]
        assert text.index(q.choices[1 - q.answer]) > text.index(q.choices[q.answer])
    for q in ask("order", documents, 50, 0):
        assert q.context == "" and sorted(q.choices[0]) == sorted(q.choices[1])
    for q in ask("couplets", dict(a=poems(60)), 50, 0):
        assert len({len(choice) for choice in q.choices}) == 1 and q.context.endswith("，")


def test_couplets_are_found_in_verse_alone():
    assert [line for _, line, _ in couplets_of(POEM)] == ["处处闻啼鸟", "花落知多少"]
    assert couplets_of("房间干净，服务周到。" + "这是一家开了很多年的老酒店，我们一家人住了三个晚上。" * 3) == []
    assert ask("couplets", dict(a=stories(50)), 10, 0) == []


def test_documents_of_files(tmp_path):
    (tmp_path / "parted.txt").write_text("一行\n又一行\n\n\n第二篇\n", encoding="utf-8")
    (tmp_path / "lines.txt").write_text("\ufeff第一篇\n第二篇\n", encoding="utf-8")
    write_jsonl(tmp_path / "rows.jsonl", [dict(text="甲\n\n乙"), dict(text="丙", more=1)])
    assert of_file(tmp_path / "parted.txt") == ["一行\n又一行", "第二篇"]
    (tmp_path / "wide.txt").write_text("一行\n又一行\n　　\n第二篇\n \n第三篇\n又一行\n", encoding="utf-8")
    assert of_file(tmp_path / "wide.txt") == ["一行\n又一行", "第二篇", "第三篇\n又一行"]
    assert of_file(tmp_path / "lines.txt") == ["第一篇", "第二篇"]
    assert of_file(tmp_path / "rows.jsonl") == ["甲\n\n乙", "丙"]
    found = of_files([str(tmp_path / "parted.txt"), str(tmp_path / "rows.jsonl")], 1, 0)
    assert {name: len(texts) for name, texts in found.items()} == dict(parted=1, rows=1)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"", "a.txt: no document in it"),
        ("a.txt", "文字".encode("gbk"), "a.txt: not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"content": "b"}\n', r'a.jsonl:2: not a JSON object with a "text"'),
        ("a.jsonl", b'{"text": 3}\n', "a.jsonl:1: not a JSON object"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1: not a JSON object"),
    ],
)
def test_a_file_without_documents_is_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        of_files([str(tmp_path / name)], 10, 0)


def test_documents_of_a_data_folder_are_its_validation_texts(tmp_path, build, tokenizer_path):
    write_jsonl(tmp_path / "a.jsonl", [dict(text=text) for text in texts_of(200, 1)])
    build("data", f"--sources=a:text_rows={tmp_path / 'a.jsonl'}", "--parts=pretrain")
    tok = Tokenizer.load(tokenizer_path)
    found = of_data(tmp_path / "data", tok, "ckpt", 10**6, 0)["a"]
    assert 20 < len(found) < 60 and set(found) <= set(texts_of(200, 1))
    few = of_data(tmp_path / "data", tok, "ckpt", 5, 0)["a"]
    assert len(few) == 5 and set(few) <= set(found)


# a model that learnt more


def trained(tok, texts, steps):
    """A tiny model after some steps on texts, a window of each a step."""
    torch.manual_seed(0)
    shape = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=4, vocab_size=tok.vocab_size, max_seq_len=128)
    model = Llama(ModelConfig(**shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = [([tok.eos_id] + tok.encode(text))[:129] for text in texts]
    rows = torch.tensor([ids + [0] * (129 - len(ids)) for ids in rows])
    targets = rows[:, 1:].masked_fill(rows[:, 1:] == 0, -100)
    for step in range(steps):
        batch = torch.arange(step * 16, step * 16 + 16) % len(rows)
        model(rows[batch, :-1], targets[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.slow
def test_a_longer_trained_model_is_better(tmp_path):
    """After 80 steps each task is told better than after 4, by more than the 95 % intervals are wide."""
    texts = stories(600) + poems(600)
    (tmp_path / "text.txt").write_text("\n".join(texts), encoding="utf-8")
    sample = Corpus([str(tmp_path / "text.txt")], 16384)
    tok = Tokenizer(train_bpe(sample, tokenizer_defaults | dict(vocab_size=460)))
    random.Random(0).shuffle(texts)
    held_out, found = dict(prose=stories(300, seed=1), verse=poems(300, seed=1)), {}
    for steps in (4, 80):
        model = trained(tok, texts, steps)
        for task in TASKS:
            asked = ask(task, held_out, 200, 0)
            logps = score(model, tok, asked, [tok.eos_id]).logps
            choices = chosen(by_character(logps, asked))
            right = sum(choice == q.answer for choice, q in zip(choices, asked, strict=True))
            found[task, steps] = wilson_interval(right, len(asked))
    for task in TASKS:
        assert found[task, 80][0] > found[task, 4][1], task
