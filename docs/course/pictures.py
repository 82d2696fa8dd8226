"""The pictures of the course, drawn by the functions that the stages call: no run is needed.

python -m docs.course.pictures              # all
python -m docs.course.pictures pretrain     # one
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from common.optim import learning_rate
from common.plots import new_figure, png
from configs.pretrain import config as pretrain_config
from configs.tokenizer import config as tokenizer_config
from corpora.dedup import BANDS, ROWS, THRESHOLD
from docs.course import pictures_alignment
from model import ModelConfig, Rope, rope_table
from sft import loss_weights
from tokenizer import Tokenizer
from tokenizer.train import Corpus, characters_per_token, train_bpe

LINES = [
    f"{place}的{what}{how}。"
    for place in ("酒店", "宾馆", "前台", "餐厅")
    for what in ("房间", "早餐", "服务")
    for how in ("很好", "不错", "非常干净")
]


def tokenizer():
    """Characters per token against pieces beyond the single characters."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lines.txt"
        file.write_text("\n".join(LINES), encoding="utf-8")
        least = 3 + 256 + 95 + len(set("".join(LINES)))
        sizes, ratios = range(least, least + 31, 3), []
        for size in sizes:
            config = tokenizer_config | dict(vocab_size=size, character_coverage=1.0)
            trained = Tokenizer(train_bpe(Corpus([str(file)], config["max_line_bytes"]), config))
            ratios.append(characters_per_token(trained, LINES))
    figure = new_figure(6.4, 3.2)
    axes = figure.add_subplot()
    axes.plot(sizes, ratios, marker="o")
    axes.set_xlabel("词表大小（块）")
    axes.set_ylabel("每词元字数")
    return figure


def model():
    """The product of a vector at two positions by their distance, as RoPE turns it; a head of the demo's width."""
    config = ModelConfig(dim=160, n_heads=5, n_kv_heads=5, max_seq_len=257)
    cos, sin = rope_table(config)
    x = torch.ones(1, len(cos), 1, config.head_dim)
    turned = Rope.apply(x, cos, sin)[0, :, 0]  # (T, D/H)
    figure = new_figure(6.4, 3.2)
    axes = figure.add_subplot()
    axes.plot(turned @ turned[0] / config.head_dim)
    axes.set_xlabel("距离（词元）")
    axes.set_ylabel("内积 / 不旋转时的内积")
    return figure


def data():
    """Chance that two documents share a band of their signatures, by the similarity of their shingles."""
    similarity = np.linspace(0, 1, 201)
    figure = new_figure(6.4, 3.2)
    axes = figure.add_subplot()
    axes.plot(similarity, 1 - (1 - similarity**ROWS) ** BANDS, label="被拿来比较的机会")
    axes.axvline(THRESHOLD, color="C1", linestyle="--", label="算近似重复的界限")
    axes.set_xlabel("相似度 J")
    axes.set_ylabel("机会")
    axes.legend(frameon=False)
    return figure


def pretrain():
    """Learning rate against steps, of both schedules."""
    steps = np.arange(1, 1001)
    figure = new_figure(6.4, 3.2)
    axes = figure.add_subplot()
    for schedule in ("cosine", "wsd"):
        config = pretrain_config | dict(schedule=schedule, max_steps=1000, decay_steps=0, warmup_steps=50)
        axes.plot(steps, [learning_rate(step, config) for step in steps], label=schedule)
    axes.set_xlabel("步")
    axes.set_ylabel("学习率")
    axes.legend(frameon=False)
    return figure


def sft():
    """The share of an answer of three tokens in a step, beside one of n tokens."""
    lengths = range(1, 101)
    figure = new_figure(6.4, 3.2)
    axes = figure.add_subplot()
    for kind in ("token", "example"):
        shares = []
        for n in lengths:
            mask = torch.zeros(2, 101)
            mask[0, 1:4] = mask[1, 1 : n + 1] = 1
            weights = loss_weights(mask, kind)
            shares.append(float(weights[0].sum() / weights.sum()))
        axes.plot(lengths, shares, label=f"example_weight={kind}")
    axes.set_xlabel("另一段回答的长度（词元）")
    axes.set_ylabel("三个词元的回答占的份")
    axes.legend(frameon=False)
    return figure


PICTURES = dict(tokenizer=tokenizer, model=model, data=data, pretrain=pretrain, sft=sft) | pictures_alignment.PICTURES


def main(names):
    for name in names or PICTURES:
        (Path(__file__).parent / f"{name}.png").write_bytes(png(PICTURES[name]()))


if __name__ == "__main__":
    main(sys.argv[1:])
