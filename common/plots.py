"""Pictures: loss curves in panels, and the figure that every other plot is drawn on."""

import io
import logging
import math
import warnings
from dataclasses import dataclass

import numpy as np

from dataset.formats import OURS

CHINESE_FONTS = (  # of Linux, Windows and macOS, for the characters that matplotlib's own font lacks
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Microsoft YaHei",
    "SimHei",
    "PingFang SC",
    "Heiti SC",
)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average; near the ends it averages what there is."""
    ones = np.ones(window)
    half = window // 2
    total = np.convolve(values, ones)[half : half + len(values)]
    count = np.convolve(np.ones(len(values)), ones)[half : half + len(values)]
    return total / count


@dataclass(frozen=True)
class Line:
    """One metric of one run, as it is drawn."""

    name: str  # of the metric, which decides the style
    label: str  # in the legend
    x: np.ndarray
    y: np.ndarray


def new_figure(width: float, height: float):
    """An empty matplotlib Figure of that many inches, drawn by Agg, which needs no display."""
    import matplotlib  # slow to import, and only needed here
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import get_font_names

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # a Chinese font of one weight is no fault
    matplotlib.rcParams["font.family"] = ["DejaVu Sans", *filter(set(get_font_names()).__contains__, CHINESE_FONTS)]
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # where no font has them, boxes say as much
        figure.canvas.print_png(file, metadata={"Software": OURS})  # savefig would lay all out twice
    return file.getvalue()


def draw(panels: list[tuple[str, str, list[Line]]]) -> bytes:
    """PNG of the panels (x label, y label, lines) that have lines, two a row; 8.4 inches at 150 dpi stay legible at the
    800 pixels of a README."""
    panels = [panel for panel in panels if panel[2]]
    columns = min(2, len(panels))
    n_rows = math.ceil(len(panels) / columns)
    figure = new_figure(8.4, (3.2 if columns == 2 else 4.0) * n_rows)
    for i, (x_label, y_label, lines) in enumerate(panels):
        axes = figure.add_subplot(n_rows, columns, i + 1)
        for color, line in enumerate(lines):
            style = dict(color=f"C{color}", label=line.label)
            if line.name == "train/learning_rate":
                axes.plot(line.x, line.y, linewidth=1.6, **style)
            elif line.name.startswith("val/") or len(line.y) < 20:
                axes.plot(line.x, line.y, marker="o", markersize=4, linewidth=1.2, zorder=3, **style)
            else:
                axes.plot(line.x, line.y, color=f"C{color}", linewidth=0.6, alpha=0.35)
                axes.plot(line.x, smooth(line.y, len(line.y) // 20 | 1), linewidth=1.6, **style)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    return png(figure)
