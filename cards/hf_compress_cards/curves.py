"""What a Trainer logged while the student was trained, from its `trainer_state.json`, drawn over the steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_compress import trainer_log

from . import plot
from .text import plain

COLOURS = ("#3b4cc0", "#d1495b", "#e09f3e", "#5b8e7d", "#8d99ae", "#7b2d8b")
POINTS = 300
"""Of a curve; of a longer one the means of as many equal parts are drawn."""
PANELS = 12
LARGEST = 1e30
"""Magnitude of a value that is drawn; beyond it, as for NaN and infinity, the curve has a gap."""
_TERM = "distill/"


@dataclass(frozen=True)
class Curve:
    """One logged value over the optimizer steps."""

    name: str
    steps: tuple[float, ...]
    values: tuple[float, ...]
    of: int
    """Values that were logged; more than there are points where means are drawn."""


@dataclass(frozen=True)
class Panel:
    """Curves of one picture."""

    title: str
    curves: tuple[Curve, ...]


def panels(path: Path) -> tuple[Panel, ...]:
    """The losses of training, those of evaluation, and each term of distillation before its weight.

    Raises:
        ForeignFileError: if the file is missing, malformed, or no Trainer's state.
    """
    log = trainer_log.read(path)
    names = list(dict.fromkeys(name for entry in log for name in entry))
    training: list[str] = [name for name in ("loss", "task_loss", "distill_loss") if name in names]
    held_out = [name for name in names if name.startswith("eval_") and name.endswith("loss")][: len(COLOURS)]
    terms = [(f"{plain(name, 60)}, before its weight", [name]) for name in names if name.startswith(_TERM)]
    found = []
    for title, wanted in [("Losses in training", training), ("Losses in evaluation", held_out), *terms]:
        if curves := tuple(curve for name in wanted if (curve := _curve(log, name)).values):
            found.append(Panel(title, curves))
    return tuple(found)


def _curve(log: list[dict[str, Any]], name: str) -> Curve:
    points: list[tuple[float, float]] = [
        (entry["step"], entry[name]) for entry in log if _drawable(entry.get("step")) and _drawable(entry.get(name))
    ]
    thin = [points[len(points) * at // POINTS : len(points) * (at + 1) // POINTS] for at in range(POINTS)]
    parts = thin if len(points) > POINTS else [[point] for point in points]
    steps = tuple(sum(step for step, _ in part) / len(part) for part in parts)
    values = tuple(sum(value for _, value in part) / len(part) for part in parts)
    return Curve(plain(name, 60), steps, values, len(points))


def _drawable(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def draw(panel: Panel) -> Any:
    """The curves of one panel as a figure of matplotlib, narrow enough for a phone."""
    with plot.drawing():
        figure, axes = plot.blank((4.7, 2.7))
        for curve, colour in zip(panel.curves, COLOURS, strict=False):
            mark = "o" if len(curve.values) < 25 else ""
            axes.plot(curve.steps, curve.values, color=colour, linewidth=1.6, marker=mark, markersize=3.5)
        axes.set_xlabel("step")
        values = [value for curve in panel.curves for value in curve.values]
        if min(values) > 0 and max(values) > 30 * min(values):
            from matplotlib.ticker import NullFormatter, StrMethodFormatter

            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
    return figure
