"""The picture of a sweep: each method's accuracy with its interval, and every seed."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from hf_compress_cards import plot
from hf_compress_cards.text import plain

from hf_compress import files

from .summary import TEACHER
from .tables import Found

TEACHERS, OTHERS = "#3b4cc0", "#d1495b"


def draw(found: Found, path: Path) -> None:
    """Draws what sweep.json holds into an SVG file, whole or not at all; methods without a result are left out."""
    import matplotlib

    shown = [one for one in found["methods"] if one["accuracy"] is not None]
    with plot.drawing():
        figure, axes = plot.blank((7.2, 1.4 + 0.42 * max(len(shown), 1)))
        for place, one in enumerate(shown):
            colour = TEACHERS if one["method"] == TEACHER else OTHERS
            if one["accuracy_interval"] is not None:
                axes.plot([100 * bound for bound in one["accuracy_interval"]], [place, place], color=colour, zorder=2)
            seeds = [100 * run["accuracy"] for run in found["runs"] if _is_of(run, one)]
            axes.scatter(seeds, [place] * len(seeds), s=16, facecolor="white", edgecolor=colour, zorder=3)
            axes.scatter([100 * one["accuracy"]["mean"]], [place], s=34, color=colour, zorder=4)
        axes.set_yticks(range(len(shown)), [plain(one["method"], 60) for one in shown], parse_math=False)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlabel("accuracy (%); dots: mean; circles: seeds; bars: 95 % interval over the test rows")
        image = BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": "sweep"}):
            figure.savefig(image, format="svg", metadata={"Creator": None, "Date": None})
    with files.atomic_file(path) as part:
        part.write_bytes(image.getvalue())


def _is_of(run: Found, one: Found) -> bool:
    same = run["method"] == one["method"] and run["learning_rate"] == one["learning_rate"]
    return same and run["accuracy"] is not None
