"""Questions in the layouts of C-Eval and CMMLU, poems, and a model to ask."""

import csv
import io
import random

import torch

from common import checkpoint
from model import Llama, ModelConfig

QUESTIONS = {
    "law": [
        ("合同自何时成立？", "承诺生效时", "要约到达时", "签字前", "付款后", "A"),
        ("下列哪一项不是物权？", "所有权", "抵押权", "债权", "地役权", "C"),
        ("多少岁以上是成年人？", "16", "18", "20", "22", "B"),
    ],
    "logic": [
        ("“所有S都是P”的矛盾命题是", "所有S都不是P", "有的S不是P", "有的S是P", "以上都不是", "B"),
        ("若p则q，非q，所以：\n（　）", "p", "非p", "q", "p, q", "B"),
    ],
}
RENAMED = {"law": "college_law", "logic": "logical"}  # what CMMLU calls such subjects


def as_csv(rows, header):
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    return text.getvalue()


def write_ceval(folder, questions=QUESTIONS):
    """In C-Eval's layout, with columns of its dev files; dev and val hold the questions in opposite order."""
    header = ["id", "question", "A", "B", "C", "D", "answer", "explanation"]
    for split in ("dev", "val"):
        (folder / split).mkdir(parents=True)
        for subject, rows in questions.items():
            rows = [[i, *row, ""] for i, row in enumerate(rows[:: -1 if split == "dev" else 1])]
            (folder / split / f"{subject}_{split}.csv").write_text(as_csv(rows, header), encoding="utf-8")
    return folder


def write_cmmlu(folder, questions=QUESTIONS):
    for split in ("dev", "test"):
        (folder / split).mkdir(parents=True)
        for subject, rows in questions.items():
            rows = [[i, *row] for i, row in enumerate(rows[:: -1 if split == "dev" else 1])]
            text = as_csv(rows, ["", "Question", "A", "B", "C", "D", "Answer"])
            (folder / split / f"{RENAMED[subject]}.csv").write_text(text, encoding="utf-8")
    return folder


def poems(n, seed=0):
    """Poems whose second lines tell by their characters which first line they follow."""
    rng, made = random.Random(seed), []
    pairs = [
        ("山江月夜秋", "松波影霜寒"),
        ("春花鸟风晓", "绿香啼轻暖"),
        ("马剑沙关雪", "啸寒飞城战"),
        ("酒杯友别歌", "醉满情远长"),
    ]
    for _ in range(n):
        first, second = pairs[rng.randrange(4)]
        lines = [("".join(rng.choices(first, k=5)), "".join(rng.choices(second, k=5))) for _ in range(2)]
        made.append("\n".join(f"{a}，{b}。" for a, b in lines))
    return made


def make_checkpoint(folder, tok, stage, std=0.2, **shape):
    """A model whose letters are far from equally likely."""
    torch.manual_seed(0)
    shape = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=tok.vocab_size, max_seq_len=256) | shape
    model = Llama(ModelConfig(**shape)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(std=std)
    folder.mkdir()
    facts = dict(stage=stage, step=1, tokens_seen=9, tokenizer=tok.model_bytes, config={})
    checkpoint.save(folder, model=model, **facts)
    return folder
