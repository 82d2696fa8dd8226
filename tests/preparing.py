"""What the tests of data_process.py share: made-up texts, sources of them, and what was written of those."""

import json
import random

import numpy as np

from dataset.corpus import Corpus
from tokenizer import Tokenizer

WORDS = (
    "山川河流城市乡村老师学生清晨夜晚春天秋雨读书写字唱歌跳舞高兴安静美丽明亮温暖寒冷走过看见想起遇到一座一条一本一位"
)


def sentence(rng):
    words = [WORDS[i : i + 2] for i in range(0, len(WORDS), 2)]
    return "".join(rng.choice(words) for _ in range(rng.randint(8, 20))) + "。"


def texts_of(n, seed, sentences=4):
    rng = random.Random(seed)
    return [f"第{i}篇：" + "".join(sentence(rng) for _ in range(sentences)) for i in range(n)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def files_of(folder):
    """{name: bytes}, meta.json without the command that made it."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    files["meta.json"] = {k: v for k, v in json.loads(files["meta.json"]).items() if k != "command"}
    files["report.md"] = files["report.md"].rpartition(b"<!--")[0].replace(str(folder).encode(), b"")
    return files


def documents(folder, split, tokenizer_path):
    corpus, tokenizer = Corpus(folder, split), Tokenizer.load(tokenizer_path)
    ids = corpus.read(0, len(corpus))
    parts = np.split(ids, np.flatnonzero(ids == tokenizer.eos_id) + 1)
    return [tokenizer.decode(part) for part in parts if len(part)]


def two_sources(tmp_path, n=300):
    """--sources of two files, one of them with lines that cannot be used."""
    write_jsonl(tmp_path / "a.jsonl", [dict(text=text) for text in texts_of(n, 1)])
    write_jsonl(tmp_path / "b.jsonl", [dict(text=text) for text in texts_of(n, 2)])
    with open(tmp_path / "b.jsonl", "ab") as file:
        file.write('{"text": null}\n[1]\n{"text": "截断\n\n'.encode() + b"\xff\xfe\n")
    return f"--sources=a:text_rows={tmp_path / 'a.jsonl'},b:text_rows={tmp_path / 'b.jsonl'}"
