"""The family tree of checkpoints as an SVG: a box each, and an arrow to it from its parent."""

from dataclasses import dataclass

from common.markup import Html, tag

WIDTH, HEIGHT = 176, 70  # of a box, pixels
ACROSS, BETWEEN = 44, 18  # from one to its child, and to the one below
LETTERS = 22  # of a box's title: more are cut


@dataclass(frozen=True)
class Box:
    """What stands in a box, a title and smaller lines; `parent` is the id of another. One that is lost is dashed."""

    id: str  # the sha256
    title: str
    lines: tuple[str, ...]
    parent: str | None = None
    lost: bool = False


def place(boxes: list[Box]) -> dict[str, tuple[float, float]]:
    """{id: (x, y)}, generations from left to right; a parent is as high as the middle of its children."""
    children = {box.id: [] for box in boxes}
    for box in boxes:
        if box.parent in children:
            children[box.parent].append(box.id)
    placed, bottom = {}, 0

    def put(name, generation):
        nonlocal bottom
        below = [put(child, generation + 1) for child in children[name]]
        y = (below[0] + below[-1]) / 2 if below else bottom
        bottom += 0 if below else HEIGHT + BETWEEN
        placed[name] = generation * (WIDTH + ACROSS), y
        return y

    for box in boxes:
        if box.parent not in children:
            put(box.id, 0)
    return placed


def draw(boxes: list[Box]) -> Html:
    """The tree; its colours are those of the page's classes."""
    placed, drawn = place(boxes), []
    for box in boxes:
        x, y = placed[box.id]
        if box.parent in placed:
            from_x, from_y = placed[box.parent][0] + WIDTH, placed[box.parent][1] + HEIGHT / 2
            middle = (from_x + x) / 2
            curve = f"M{from_x},{from_y} C{middle},{from_y} {middle},{y + HEIGHT / 2} {x - 6},{y + HEIGHT / 2}"
            names = dict(data_parent=box.parent, data_child=box.id)
            drawn.append(tag("path", d=curve, class_="arrow", marker_end="url(#tip)", **names))
        inner = [tag("title", "\n".join((box.title, *box.lines)))]
        inner.append(tag("rect", x=x, y=y, width=WIDTH, height=HEIGHT, rx=8))
        for i, line in enumerate((box.title, *box.lines)):
            shown = line if len(line) <= LETTERS else f"{line[: LETTERS // 2]}…{line[-LETTERS // 2 + 1 :]}"
            inner.append(tag("text", shown, x=x + 10, y=y + 20 + 16 * i, class_="name" if i == 0 else "fact"))
        drawn.append(tag("g", *inner, class_="box lost" if box.lost else "box", data_id=box.id))
    width = max(x for x, _ in placed.values()) + WIDTH
    height = max(y for _, y in placed.values()) + HEIGHT
    tip = tag("path", d="M0,0 L8,4 L0,8 z", class_="tip")
    marker = tag("marker", tip, id="tip", markerWidth=8, markerHeight=8, refX=3, refY=4, orient="auto")
    size = dict(width=width + 2, height=height + 2, viewBox=f"-1 -1 {width + 2} {height + 2}")
    return tag("svg", tag("defs", marker), *drawn, role="img", aria_label="检查点的家谱", **size)
