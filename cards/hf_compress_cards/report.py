"""One page about a student for the one who made it: everything in its record, and rows of the user's data.

It is one HTML file that needs no other, and it stays on this machine. A browser is told to load and run nothing.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from hf_compress import facts, files, trainer_log
from hf_compress.comparison import Comparison
from hf_compress.errors import ConfigurationError
from hf_compress.facts import Record
from hf_compress.outgoing import ALLOWED

from . import curves, figures, plot, svg
from .card import architecture_of, settings
from .text import plain

_ORDER = [figures.SUBJECTS[name] for name in ("teacher", "alone", "student-labelled", "student")]
"""Of the results: first what the student is compared with."""
TEXT = 1000
"""Characters that are shown of a row of the user's data."""


def render(folder: Path, *, history: Path | None = None, comparison: Comparison | None = None) -> str:
    """The page, from `compression.json`, `config.json`, the Trainer's log and what was just compared.

    Args:
        folder: a model folder.
        history: a `trainer_state.json`; None: the one in the folder or in its newest checkpoint, if there is one.
        comparison: of student and teacher on rows of the user's; None: left out.

    Raises:
        ForeignFileError: if one of these files is malformed.
    """
    folder = Path(folder).resolve()
    config_file = folder / "config.json"
    config = files.read_json(config_file) if config_file.is_file() else {}
    log = history or trainer_log.find(folder)
    panels = curves.panels(log) if log else ()
    return _template().render(_context(facts.load(folder), config, folder.name, panels, comparison)) + "\n"


def write(folder: Path, output: Path, *, history: Path | None = None, comparison: Comparison | None = None) -> Path:
    """Writes the page whole or not at all; the folder's record and card are left as they are.

    Raises:
        ConfigurationError: as `check_name`.
        ForeignFileError: as `render`; nothing is written then.
        OSError: if the page cannot be written; an old one is untouched.
    """
    check_name(output)
    files.write_text(output, render(folder, history=history, comparison=comparison))
    return output


def check_name(output: Path) -> None:
    """Refuses a name under which a push would send the page: it holds rows of the user's data.

    Raises:
        ConfigurationError: for a name that does not end in .html, or that may leave a model folder.
    """
    if output.suffix != ".html" or ALLOWED.fullmatch(output.name):
        raise ConfigurationError(
            f"{output}: a report may hold rows of your data and must never be pushed, so its name ends in .html and "
            "is none that a push sends. Call it report.html."
        )


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("hf_compress_cards"),
        undefined=StrictUndefined,
        autoescape=True,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja")


def _shown(value: object) -> str:
    """A text in one line, which the environment then escapes; a figure is markup already."""
    return value if isinstance(value, Markup) else plain(value, TEXT)


def _context(
    record: Record,
    config: dict[str, Any],
    name: str,
    panels: tuple[curves.Panel, ...],
    comparison: Comparison | None,
) -> dict[str, Any]:
    """What the template prints. Texts are as they came."""
    drawn = plot.figure(record)
    return {
        "name": name,
        "architecture": architecture_of(record, config) or "model",
        "record": record,
        "training": record.training,
        "stages": (*record.training.before, record.training) if record.training else (),
        "count": figures.count,
        "layers": figures.layers,
        "percent": figures.percent,
        "settings": settings,
        "quality": _results(record, drawn[1] if drawn else None),
        "condition": plot.told(drawn[1]) if drawn else None,
        "plot": svg.inline(drawn[0], name="Quality against latency", salt="plot") if drawn else None,
        "speed": figures.speed_cells(record),
        "other": figures.other_cells(record),
        "derived": figures.derived(record),
        "measured_on": figures.measured_on(record),
        "curves": [
            (panel, svg.inline(curves.draw(panel), name=panel.title, salt=f"curve {place}"))
            for place, panel in enumerate(panels[: curves.PANELS])
        ],
        "colours": curves.COLOURS,
        "left_out": [panel.title for panel in panels[curves.PANELS :]],
        "compared": comparison,
        "missing": _missing(record, panels, comparison),
    }


def _results(record: Record, timed: figures.Comparable | None) -> figures.Cells | None:
    if (found := figures.quality_cells(record, timed)) is None:
        return None
    heads, rows = found
    return heads, sorted(rows, key=lambda row: _ORDER.index(row[0]) if row[0] in _ORDER else len(_ORDER))


def _missing(record: Record, panels: tuple[curves.Panel, ...], comparison: Comparison | None) -> list[str]:
    absent = figures.missing(record)
    if record.training is None:
        absent.append("how the student was trained")
    if not panels:
        absent.append(f"the course of the training (no {trainer_log.FILE} was given or lies in the folder)")
    if comparison is None:
        absent.append("which rows student and teacher decide differently (--task and --teacher were not given)")
    return absent
