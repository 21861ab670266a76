"""The card's one picture: quality against latency, a mark for each model and variant, its area the size on disk."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from hf_compress.facts import Measurement, Record

from . import figures
from .text import plain

COLOURS = {"teacher": "#3b4cc0", "student": "#d1495b", "alone": "#8d99ae", "student-labelled": "#e09f3e"}
OTHER_COLOUR = "#5b8e7d"
SMALLEST, LARGEST = 60.0, 1400.0
"""Areas of the marks in square points; the largest is that of the largest model."""
MARKS = 40
"""More marks than this are no picture any more."""


@dataclass(frozen=True)
class Mark:
    """One model and variant."""

    subject: str
    variant: str
    latency: float
    score: Measurement
    bytes: float | None


def marks(record: Record) -> tuple[figures.Comparable | None, list[Mark]]:
    """The pairs with a score and a latency at batch 1, under the condition that most of them share.

    None for an error, of which less is better: the picture says that up is.
    """
    metric = figures.main_score(record)
    if metric in figures.ERRORS:
        return None, []
    scored = {pair: found for pair in figures.pairs(record) if (found := record.find(metric, *pair))}
    timed: dict[figures.Comparable, dict[tuple[str, str], float]] = {}
    for each in record.measurements:  # a later measurement replaces an earlier one
        pair, at = (each.subject, each.variant), figures.Condition.of(each)
        if each.metric == "latency_median" and each.how.get("batch") == 1 and pair in scored and each.value > 0:
            timed.setdefault(at.comparable, {})[pair] = each.value
    if not timed:
        return None, []
    condition = max(timed, key=lambda each: (len(timed[each]), each))
    shown = [pair for pair in scored if pair in timed[condition]][:MARKS]
    return condition, [
        Mark(*pair, timed[condition][pair], scored[pair], size.value if (size := record.find("bytes", *pair)) else None)
        for pair in shown
    ]


def draw(record: Record, path: Path) -> Path | None:
    """Draws the picture into a PNG file, whole or not at all; None, and no file, without a single mark."""
    condition, found = marks(record)
    if condition is None or not found:
        return None
    image = BytesIO()
    with drawing():
        figure, axes = _figure(found, (8.2, 4.8))
        _tell(axes, condition)
        _label(axes, found)
        figure.savefig(image, format="png", dpi=130, metadata={"Software": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(image.getvalue())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def figure(record: Record) -> tuple[Any, figures.Comparable] | None:
    """The picture without its words around it, narrow enough for a phone, and how its latencies were taken."""
    condition, found = marks(record)
    if condition is None or not found:
        return None
    with drawing():
        drawn, axes = _figure(found, (4.7, 3.8))
        _label(axes, found)
    return drawn, condition


@contextmanager
def drawing() -> Iterator[None]:
    """In it a name in a script that the font lacks is drawn as boxes, without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def blank(size: tuple[float, float]) -> tuple[Any, Any]:
    """An empty figure of so many inches and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second to import, so only where it is used
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(color="#e5e5e5", linewidth=0.7, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _figure(found: list[Mark], size: tuple[float, float]) -> tuple[Any, Any]:
    figure, axes = blank(size)
    largest = _largest(found)
    for mark in found:
        _draw_mark(axes, mark, largest)
    _scale(axes, found)
    axes.set_xlabel("latency at batch 1, median (ms)")
    score = found[0].score
    axes.set_ylabel(f"{figures.QUALITY[score.metric]} ({'%' if score.unit == 'fraction' else '× 100'})")
    return figure, axes


def _tell(axes: Any, condition: figures.Comparable) -> None:
    """Title above the axes, and below them how the latencies were taken."""
    axes.set_title("Quality against speed: up and to the left is better", loc="left", fontsize=11, fontweight="bold")
    axes.text(
        0,
        -0.17,
        f"{plain(told(condition), 90)}; area: bytes on disk; bars: 95 % interval",
        transform=axes.transAxes,
        fontsize=8,
        color="#555555",
        parse_math=False,
    )


def told(condition: figures.Comparable) -> str:
    """The condition in words."""
    device, threads, length = condition
    return f"{device}, threads: {threads}, padded length: {length}"


def _largest(found: list[Mark]) -> float:
    return max((mark.bytes or 0.0 for mark in found), default=0.0)


def _area(size: float | None, largest: float) -> float:
    return SMALLEST if not size or not largest else max(SMALLEST, LARGEST * size / largest)


def _draw_mark(axes: Any, mark: Mark, largest: float) -> None:
    colour = COLOURS.get(mark.subject, OTHER_COLOUR)
    x, y = 1000 * mark.latency, 100 * mark.score.value
    if mark.score.interval:
        low, high = (100 * value for value in mark.score.interval)
        axes.plot([x, x], [low, high], color=colour, linewidth=1.2, alpha=0.6, zorder=2)
    axes.scatter([x], [y], s=_area(mark.bytes, largest), color=colour, alpha=0.45, linewidth=0, zorder=3)
    axes.scatter([x], [y], s=14, color=colour, zorder=4)


def _scale(axes: Any, found: list[Mark]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    xs = [1000 * mark.latency for mark in found]
    ys = [100 * value for mark in found for value in (mark.score.value, *(mark.score.interval or ()))]
    if max(xs) > 8 * min(xs):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(min(xs) / 1.9, max(xs) * 1.9)
    else:
        axes.set_xlim(0, max(xs) * 1.2)
    room = max(0.15 * (max(ys) - min(ys)), 2.0)
    axes.set_ylim(min(ys) - room, max(ys) + room)


Box = tuple[float, float, float, float]
"""Left, bottom, right, top in points."""


def _label(axes: Any, found: list[Mark]) -> None:
    """A label beside each mark, on the side where it covers least of the other marks and labels."""
    largest = _largest(found)
    axes.figure.canvas.draw()  # lays the axes out, so that data have a place in points
    scale = 72 / axes.figure.dpi
    window = axes.get_window_extent()
    inside = (window.x0 * scale, window.y0 * scale, window.x1 * scale, window.y1 * scale)
    centres = [axes.transData.transform((1000 * m.latency, 100 * m.score.value)) * scale for m in found]
    radii = [(_area(mark.bytes, largest) / 3.1416) ** 0.5 for mark in found]
    taken = [(x - r, y - r, x + r, y + r) for (x, y), r in zip(centres, radii, strict=True)]
    for mark, (x, y), radius in zip(found, centres, radii, strict=True):
        size = "" if mark.bytes is None else f"\n{figures.size(mark.bytes)}"
        name = plain(f"{mark.subject}, {mark.variant}", 40)
        width, height = 4.6 * max(len(name), len(size)), 21.0 if size else 11.0
        far = radius + 3
        sides = [(far + width / 2, 0), (0, far + height / 2), (0, -far - height / 2), (-far - width / 2, 0)]
        sides += [(dx * 0.8, dy) for dx in (far + width / 2, -far - width / 2) for dy in (far, -far)]
        boxes = {side: _box(x + side[0], y + side[1], width, height) for side in sides}
        side = min(sides, key=lambda each: _cost(boxes[each], taken, inside))
        taken.append(boxes[side])
        axes.annotate(
            f"{name}{size}",
            (1000 * mark.latency, 100 * mark.score.value),
            side,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8.5,
            linespacing=1.1,
            parse_math=False,
            zorder=5,
            bbox={"facecolor": "white", "alpha": 0.65, "edgecolor": "none", "pad": 0.6},
        )


def _box(x: float, y: float, width: float, height: float) -> Box:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _cost(box: Box, taken: list[Box], inside: Box) -> float:
    """Area of other things that a label would cover, and of itself that would lie outside the axes."""
    own = (box[2] - box[0]) * (box[3] - box[1])
    return sum(_overlap(box, other) for other in taken) + 3 * (own - _overlap(box, inside))


def _overlap(one: Box, two: Box) -> float:
    width, height = min(one[2], two[2]) - max(one[0], two[0]), min(one[3], two[3]) - max(one[1], two[1])
    return max(width, 0.0) * max(height, 0.0)
