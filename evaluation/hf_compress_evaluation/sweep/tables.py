"""A sweep as tables. Every number in them is one of sweep.json, whose content each function gets."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
from hf_compress_cards import text

from hf_compress.entries import ALONE

MISSING = "—"
Found = Mapping[str, Any]
"""What sweep.json holds."""


def columns(found: Found) -> dict[str, Callable[[Found], str]]:
    """Heading to the cell of a method's summary; what no method has, as without a baseline, is left out."""
    made: dict[str, Callable[[Found], str]] = {
        "method": lambda one: one["method"],
        "learning rate": lambda one: MISSING if one["learning_rate"] is None else f"{one['learning_rate']:g}",
        "accuracy (%)": lambda one: _spread(one["accuracy"], 100, 1) if one["accuracy"] else "failed",
    }
    if any(one["gap_closed"] for one in found["methods"]):
        made["gap closed (%)"] = lambda one: _estimate(one["gap_closed"])
    made |= {
        "label loyalty (%)": lambda one: _spread(one["label_loyalty"], 100, 1),
        "retention (%)": lambda one: _estimate(one["retention"]),
        "parameters (M)": lambda one: MISSING if one["parameters"] is None else f"{one['parameters'] / 1e6:.2f}",
        "seconds": lambda one: _spread(one["seconds"], 1, 1),
    }
    for other in _others(found):
        made[f"over {other} (points)"] = _beside(other, _difference)
        made[f"p over {other}"] = _beside(other, _chances)
    return made


def rows(found: Found) -> list[dict[str, str]]:
    """A method a row, the teacher first, by heading."""
    made = columns(found)
    return [{heading: cell(one) for heading, cell in made.items()} for one in found["methods"]]


def below(found: Found) -> list[str]:
    """What every method was given, what the words mean, and what failed."""
    budget, methods = found["budget"], found["methods"]
    many = len(budget["seeds"]) > 1
    lines = _given(budget)
    if any(one["method"] == ALONE for one in methods):
        rows = f"{budget['labelled_rows']:,} labelled rows"
        lines.append(f"{ALONE}: trained without the teacher on the {rows}, for as many steps.")
    spread = f"± is the standard deviation over {len(budget['seeds'])} seeds" if many else _ONE_SEED
    lines.append(f"{spread}; ranges are 95 % intervals over the test rows.")
    if any(one["gap_closed"] and not one["gap_closed"]["interval"] for one in methods):
        lines.append(_NO_LEAD)
    if _others(found):
        lines.append(
            f"{_SEVERAL if many else _MCNEMAR}; each Holm-corrected over the methods compared with the same one."
        )
    for one in methods:
        if one["error"]:
            lines.append(f"{one['method']}: {one['failed']} of {budget['runs_per_method']} runs failed. {one['error']}")
    return [*lines, f"{found['command']}, {found['date']}, {'; '.join(found['machines'])}."]


_ONE_SEED = "One seed: nothing is said of the spread over seeds"
_NO_LEAD = (
    "gap closed: without a range where the teacher's lead over alone could be chance, without a value if it has none."
)
_MCNEMAR = "p: McNemar's exact test over the test rows"
_SEVERAL = (
    "p: first a sign-flip test over the test rows, whose scores are summed over the seeds, then a paired t-test over "
    "the seeds"
)


def _given(budget: Found) -> list[str]:
    rates = ", ".join(f"{rate:g}" for rate in budget["learning_rates"])
    by = " with the first seed" if budget["chosen_with_first_seed"] else ""
    chosen = f", of which the best on {budget['choice_rows']:,} choice rows{by} is shown" if "," in rates else ""
    time = "" if budget["seconds_per_run"] is None else f" of {budget['seconds_per_run']:.1f} seconds"
    return [
        f"Every method had the same start of the student and {budget['steps']:,} steps of at most "
        f"{budget['batch_size']} rows ({budget['epochs']:g} epochs of {budget['rows']:,} rows).",
        f"Runs per method: {budget['runs_per_method']}{time}; seeds {', '.join(map(str, budget['seeds']))}; learning "
        f"rates {rates}{chosen}. Scored on {budget['test_rows']:,} test rows.",
    ]


def markdown(found: Found) -> str:
    """A table of GitHub's Markdown and the lines below it; names and errors stay literal text."""
    made = rows(found)
    return "\n\n".join([text.table(made[0], (row.values() for row in made)), *map(text.escape, below(found))]) + "\n"


def latex(found: Found) -> str:
    r"""A tabular for `\usepackage{booktabs}`, names escaped; the lines below it as comments."""
    frame = pd.DataFrame(rows(found)).map(lambda cell: _ascii(text.plain(cell)))
    frame.columns = [text.plain(each) for each in frame.columns]
    made = frame.to_latex(index=False, escape=True, column_format="l" + "r" * (len(frame.columns) - 1))
    return "".join(f"% {text.plain(line, 2000)}\n" for line in below(found)) + str(made)


def csv(found: Found) -> str:
    """The figures unrounded, one column each: fractions, seconds, counts; empty where there is none."""
    frame = pd.json_normalize([_flat(one) for one in found["methods"]], sep="_")
    return str(frame.convert_dtypes().to_csv(index=False))


FORMATS: Mapping[str, tuple[str, Callable[[Found], str]]] = {
    "markdown": ("sweep.md", markdown),
    "csv": ("sweep.csv", csv),
    "latex": ("sweep.tex", latex),
}
"""File and function of each format."""


def _flat(one: Found) -> dict[str, Any]:
    """Without nested lists: the bounds of an interval become two figures."""
    made = {name: value for name, value in one.items() if name not in ("against", "choice", "accuracy_interval")}
    made |= _bounds(one["accuracy_interval"], "accuracy_")
    for name in ("gap_closed", "retention"):
        value = one[name] or {"value": None, "interval": None}
        made[name] = {"value": value["value"], **_bounds(value["interval"])}
    for name in ("accuracy", "label_loyalty", "seconds"):
        made[name] = one[name] or {"mean": None, "sd": None}
    for other, beside in one["against"].items():
        figures = {name: value for name, value in beside.items() if name != "interval"}
        made[f"over_{other}"] = figures | _bounds(beside["interval"])
    return made


def _bounds(interval: Any, before: str = "") -> dict[str, float | None]:
    low, high = interval or (None, None)
    return {f"{before}low": low, f"{before}high": high}


def _others(found: Found) -> list[str]:
    return list(dict.fromkeys(other for one in found["methods"] for other in one["against"]))


def _beside(other: str, cell: Callable[[Found], str]) -> Callable[[Found], str]:
    return lambda one: cell(one["against"][other]) if other in one["against"] else MISSING


def _spread(value: Found | None, factor: float, digits: int) -> str:
    if value is None:
        return MISSING
    shown = f"{factor * value['mean']:.{digits}f}"
    return shown if value["sd"] is None else f"{shown} ± {factor * value['sd']:.{digits}f}"


def _estimate(value: Found | None) -> str:
    if value is None or value["value"] is None:
        return MISSING
    shown = f"{100 * value['value']:.1f}"
    return shown + ("" if value["interval"] is None else _range(value["interval"], ".1f"))


def _difference(one: Found) -> str:
    shown = f"{100 * one['difference']:+.1f}"
    return shown + ("" if one["interval"] is None else _range(one["interval"], "+.1f"))


def _chances(one: Found) -> str:
    shown = f"{one['p_rows_holm']:.2g}"
    return shown if one["p_seeds_holm"] is None else f"{shown}, {one['p_seeds_holm']:.2g}"


def _range(bounds: Any, form: str) -> str:
    low, high = (100 * bound for bound in bounds)
    return f" ({low:{form}} to {high:{form}})"


def _ascii(cell: str) -> str:
    """A dash for what is missing, and no sign that the font at hand draws as another (< and > do)."""
    return re.sub("[<>|]", lambda sign: {"<": "(", ">": ")", "|": "/"}[sign[0]], cell.replace(MISSING, "--"))
