"""What a policy gains against how far it went: best of n, which needs no training, and the pictures."""

import math
from pathlib import Path

import numpy as np

from common.files import write_file
from common.metrics import is_number, points
from common.plots import new_figure, png

# of the KL axis, those that are in view
TICKS = [-1, -0.1, 0, 0.1, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000]
LABELS = {"positive": "share of positive replies", "score": "mean score of the replies"}
# where a label may stand beside its point: points to the right or left, points up
PLACES = [(x, y) for y in (5, -12, 17, -24, 29, -36, 41, -48, 53, -60) for x in (8, -8)]
GRAY = "0.35"


def best_of(scores, n):
    """Which of the first n samples of each prompt scores highest: scores (samples, N) -> (N,)."""
    return scores[:n].argmax(0)


def best_of_kl(n):
    """At most how many nats a reply the best of n is away from the policy that drew it (arXiv:2401.01879)."""
    return math.log(n) - (n - 1) / n


def short_names(paths):
    """The last part of each run directory, or the paths where two of these are alike."""
    names = [(path.parent if path.suffix == ".pt" else path).name for path in map(Path, paths)]
    return names if len(set(names)) == len(names) else list(map(str, paths))


def signed_sqrt(x):
    """A square root, which spreads small KLs, also of the negative ones that an estimate may have."""
    return np.sign(x) * np.sqrt(np.abs(x))


def draw(checkpoints, yardstick, title, judge="positive"):
    """(figure, labels) of the positive share, or the score, against KL; rows as in the JSON of a comparison.

    The yardstick's points, best of n, are joined by a dashed line that starts at the first checkpoint, best of one.
    """
    figure = new_figure(8.4, 4.6)
    axes = figure.add_subplot()
    axes.set_xscale("function", functions=(signed_sqrt, lambda x: x * np.abs(x)))
    names = short_names([row["checkpoint"] for row in checkpoints]) + [row["checkpoint"] for row in yardstick]
    styles = [dict(color=f"C{i % 10}", markersize=6) for i in range(len(checkpoints))]
    styles += [dict(color=GRAY, markersize=4)] * len(yardstick)
    points = [(row["kl"], row[judge]) for row in checkpoints + yardstick]
    line = [points[0], *points[len(checkpoints) :]]
    axes.plot(*zip(*line, strict=True), "--", color=GRAY, linewidth=1.2, zorder=1)
    for row, point, style in zip(checkpoints + yardstick, points, styles, strict=True):
        low, high = row[judge] - row[f"{judge}_low"], row[f"{judge}_high"] - row[judge]
        errors = [[max(low, 0)], [max(high, 0)]]  # rounding may leave -1e-17
        axes.errorbar(*point, errors, fmt="o", capsize=2, linewidth=1, **style)
    axes.margins(x=0.12, y=0.08)
    least, high = min(kl for kl, _ in points), axes.get_xlim()[1]
    axes.set_xticks(ticks := [tick for tick in TICKS if least <= tick <= high], [f"{tick:g}" for tick in ticks])
    axes.set_xlabel("KL to the first checkpoint (nats per reply, square-root scale)")
    axes.set_ylabel(f"{LABELS.get(judge, judge)}, 95 % interval")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.25)
    figure.draw_without_rendering()  # now it is known where the points are
    texts = [(*point, name, style["color"]) for point, name, style in zip(points, names, styles, strict=True)]
    return figure, label(axes, texts, obstacles(axes, checkpoints + yardstick, line, judge))


def obstacles(axes, rows, line, judge="positive"):
    """Boxes, in pixels, over the points with their intervals, and along a line of (x, y)."""
    from matplotlib.transforms import Bbox

    boxes = []
    for row in rows:
        ends = [[row["kl"], row[key]] for key in (f"{judge}_low", judge, f"{judge}_high")]
        (x, low), (_, y), (_, high) = axes.transData.transform(ends)
        boxes += [Bbox.from_extents(x - 3, low, x + 3, high), Bbox.from_extents(x - 8, y - 8, x + 8, y + 8)]
    corners = axes.transData.transform(line)
    for start, end in zip(corners, corners[1:], strict=False):
        between = start + np.linspace(0, 1, 50)[:, None] * (end - start)
        boxes += [Bbox.from_extents(x - 4, y - 4, x + 4, y + 4) for x, y in between]
    return boxes


def label(axes, texts, taken):
    """Write each (x, y, text, color) where it covers least of the boxes `taken`, of earlier labels and of the frame."""
    from matplotlib.transforms import Bbox

    frame, renderer, labels, taken = axes.get_window_extent(), axes.figure.canvas.get_renderer(), [], list(taken)

    def shared(a, b):
        return max(0, min(a.x1, b.x1) - max(a.x0, b.x0)) * max(0, min(a.y1, b.y1) - max(a.y0, b.y0))

    for x, y, text, color in texts:
        note = axes.annotate(text, (x, y), PLACES[0], textcoords="offset points", color=color, fontsize=8)
        note.set_in_layout(False)
        found = []
        for place in PLACES:
            note.set(position=place, horizontalalignment="left" if place[0] > 0 else "right")
            box = Bbox.from_extents(*note.get_window_extent(renderer).extents)
            covered = box.width * box.height - shared(box, frame) + sum(shared(box, other) for other in taken)
            found.append((covered, place, box))
        _, place, box = min(found, key=lambda one: one[0])  # the first of equals
        note.set(position=place, horizontalalignment="left" if place[0] > 0 else "right")
        labels.append(note)
        taken.append(box)
    return labels


def plot_score_kl(metric_log, prefix):
    """Draw score_kl.png: what a run paid in KL for its score, its training steps and its validations by colour of step.

    Where a run went too far, the score still climbs while the KL runs away.
    """
    rows = metric_log.read()
    figure = new_figure(6.4, 4.4)
    axes, last = figure.add_subplot(), max(row["step"] for row in rows)
    for source, style in ((prefix, dict(s=9, alpha=0.6)), ("val", dict(s=42, edgecolors="black", zorder=3))):
        pairs = [row for row in rows if is_number(row.get(f"{source}/kl")) and is_number(row.get(f"{source}/score"))]
        steps, kl = points(pairs, f"{source}/kl")
        _, score = points(pairs, f"{source}/score")
        if source == "val":
            axes.plot(kl, score, color="black", linewidth=0.8, zorder=2)
        label = "validation" if source == "val" else "training step"
        dots = axes.scatter(kl, score, c=steps, vmin=0, vmax=last, cmap="viridis", label=label, **style)
    axes.set_xlabel("KL to the reference (nats per reply)")
    axes.set_ylabel("score (standard deviations of the reference)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right")
    figure.colorbar(dots, label="step")
    write_file(metric_log.out_dir / "score_kl.png", png(figure))
