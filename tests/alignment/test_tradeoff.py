"""alignment/tradeoff.py: best of n, and the picture of the positive share against KL."""

import itertools
import math

import numpy as np
import pytest
import torch

from alignment.tradeoff import best_of, best_of_kl, draw, obstacles, short_names, signed_sqrt
from common.metrics import wilson_interval
from common.plots import png


def row(name, kl, positive, n=200):
    low, high = wilson_interval(round(positive * n), n)
    return dict(checkpoint=name, kl=kl, positive=positive, positive_low=low, positive_high=high)


CHECKPOINTS = [
    row("out/sft", 0.0, 0.325),
    row("out/dpo", 4.76, 0.855),
    row("out/ppo", 4.65, 0.9),
    row("out/grpo", 4.7, 0.88),
    row("out/quantize", -0.01, 0.32),  # an estimate may be below zero
    row("out/pretrain", 31.0, 0.0),
]
YARDSTICK = [row("best of 2", 0.19, 0.495), row("best of 4", 0.64, 0.575), row("best of 8", 1.2, 1.0)]


def test_best_of_the_first_n():
    scores = torch.tensor([[0.0, 5.0, -1.0], [1.0, 4.0, -2.0], [0.5, 6.0, 9.0]])  # 3 samples of 3 prompts
    assert best_of(scores, 2).tolist() == [1, 0, 0]
    assert best_of(scores, 3).tolist() == [1, 2, 2]


def test_kl_of_best_of_n_is_that_of_replies_that_are_all_different():
    # of a continuous score the best of n has the density n u^(n-1) over the quantile u of its score
    u = (np.arange(200_000) + 0.5) / 200_000
    for n in (2, 4, 8):
        density = n * u ** (n - 1)
        assert best_of_kl(n) == pytest.approx(np.mean(density * np.log(density)), abs=1e-5)
    # of two replies, equally likely, it is less: 3/4 and 1/4 instead of 1/2
    assert 0.75 * math.log(1.5) + 0.25 * math.log(0.5) < best_of_kl(2)


def test_short_names():
    assert short_names(["out/demo/sft", "out/demo/ppo/ckpt.pt"]) == ["sft", "ppo"]
    assert short_names(["a/sft", "b/sft"]) == ["a/sft", "b/sft"]


def test_labels_cover_neither_each_other_nor_points_nor_the_yardstick():
    figure, labels = draw(CHECKPOINTS, YARDSTICK, "title")
    data = png(figure)
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    size = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    assert size == (1260, 690)  # 8.4 x 4.6 inches at 150 dpi
    names = ["sft", "dpo", "ppo", "grpo", "quantize", "pretrain", "best of 2", "best of 4", "best of 8"]
    assert [label.get_text() for label in labels] == names
    (axes,) = figure.axes
    boxes = [label.get_window_extent() for label in labels]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    line = [(r["kl"], r["positive"]) for r in [CHECKPOINTS[0], *YARDSTICK]]
    taken = obstacles(axes, CHECKPOINTS + YARDSTICK, line)
    assert not any(box.overlaps(other) for box in boxes for other in taken)
    frame = axes.get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)
    dashed = [drawn for drawn in axes.lines if drawn.get_linestyle() == "--"]
    assert len(dashed) == 1 and list(zip(*dashed[0].get_data(), strict=True)) == line


def test_one_checkpoint_alone_is_drawn():
    figure, labels = draw(CHECKPOINTS[:1], [], "title")
    assert png(figure).startswith(b"\x89PNG") and [label.get_text() for label in labels] == ["sft"]


def test_scale_is_symmetrical():
    x = np.array([-4.0, -1.0, 0.0, 0.25, 9.0])
    assert signed_sqrt(x).tolist() == [-2, -1, 0, 0.5, 3]
    (axes,) = draw(CHECKPOINTS, YARDSTICK, "title")[0].axes
    transform = axes.xaxis.get_transform()
    assert np.allclose(transform.inverted().transform(transform.transform(x)), x)
