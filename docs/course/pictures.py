"""The pictures of the course, drawn by the functions that the stages call: no run is needed.

python -m docs.course.pictures              # all
python -m docs.course.pictures pretrain     # one
"""

import sys
from pathlib import Path

import numpy as np

from common.optim import learning_rate
from common.plots import new_figure, png
from configs.pretrain import config as pretrain_config
from docs.course import pictures_alignment


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


PICTURES = dict(pretrain=pretrain) | pictures_alignment.PICTURES


def main(names):
    for name in names or PICTURES:
        (Path(__file__).parent / f"{name}.png").write_bytes(png(PICTURES[name]()))


if __name__ == "__main__":
    main(sys.argv[1:])
