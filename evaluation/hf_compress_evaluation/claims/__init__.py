"""Each method's own claim, run small: `python -m hf_compress_evaluation.claims NAME` writes results/claims/NAME.json.

A claim is a module of this package with the method's name and one top-level `CLAIM = Claim(...)`. It is run for every
variant and seed; a finished row is never repeated, so a killed run goes on. What does not show at this scale is
reported as measured.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from hf_compress import files
from hf_compress.errors import ForeignFileError, PluginError, UnknownNameError
from hf_compress.facts import hardware, versions


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What the authors say, what is run here, and how."""

    published: str
    """The authors' claim, in one sentence."""
    check: str
    """What is run: models, data, steps."""
    expected: str
    """What shows if the claim holds at this scale."""
    variants: tuple[str, ...]
    """What is compared; each is run for each seed."""
    run: Callable[[str, int], Mapping[str, float]]
    """(variant, seed) to figures by name, units in the name, e.g. "bits per byte"."""
    examples: Callable[[], Sequence[Mapping[str, str]]] | None = None
    """Rows of text to read beside the figures, each with the same columns; made once, after the last figure."""


def names() -> tuple[str, ...]:
    """The methods that have a claim here."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name[0] != "_"))


def get(name: str) -> Claim:
    """The claim of that method.

    Raises:
        UnknownNameError: with the nearest names.
    """
    if name not in names():
        raise UnknownNameError("claim", name, names())
    claim = importlib.import_module(f"{__name__}.{name}").CLAIM
    if not isinstance(claim, Claim):
        raise PluginError(f"claims/{name}.py: CLAIM is a {type(claim).__name__}, not a Claim.")
    return claim


def measure(
    name: str,
    output: Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    claim: Claim | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Runs what is missing of a claim and writes each row as soon as it is there.

    Args:
        name: the method.
        output: the results file; rows that it has are kept.
        seeds: one row each for every variant.
        claim: None: the module of that name.
        progress: called with a line before each row.

    Returns:
        what the file holds.

    Raises:
        ForeignFileError: if the file is of another claim.
    """
    claim = claim or get(name)
    head = {"method": name, "published": claim.published, "check": claim.check, "expected": claim.expected}
    found: dict[str, Any] = files.read_json(output) if output.exists() else {"rows": []}
    changed = [key for key, text in head.items() if found.get(key, text) != text]
    if changed and found["rows"]:
        problem = f"holds rows of another claim: {', '.join(changed)} changed."
        raise ForeignFileError(output, problem, "Remove the file to measure anew.")
    output.parent.mkdir(parents=True, exist_ok=True)  # found out before the first row, not after
    done = {(row["variant"], row["seed"]) for row in found["rows"]}
    for seed in seeds:
        for variant in claim.variants:
            if (variant, seed) in done:
                continue
            if progress is not None:
                progress(f"{name}: {variant}, seed {seed}")
            started = time.monotonic()
            figures = {key: float(value) for key, value in claim.run(variant, seed).items()}
            row = {"variant": variant, "seed": seed, "figures": figures}
            found["rows"].append(row | {"seconds": round(time.monotonic() - started, 1)})
            about = {"date": date.today().isoformat(), "machine": hardware(), "versions": versions()}
            command = {"command": f"python -m hf_compress_evaluation.claims {name}"}
            found = head | command | about | {"rows": found["rows"]}
            files.write_text(output, json.dumps(found, indent=1) + "\n")
    if claim.examples is not None and "examples" not in found:
        if progress is not None:
            progress(f"{name}: examples")
        found["examples"] = [dict(row) for row in claim.examples()]
        files.write_text(output, json.dumps(found, indent=1) + "\n")
    return found


def table(found: Mapping[str, Any]) -> list[list[str]]:
    """Header and a line per variant: mean ± standard deviation over seeds of each figure."""
    rows = found["rows"]
    figures = list(dict.fromkeys(key for row in rows for key in row["figures"]))
    lines = [["variant", "seeds", *figures]]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row["figures"] for row in rows if row["variant"] == variant]
        cells = [[row[key] for row in own if key in row] for key in figures]
        lines.append([variant, str(len(own)), *(_cell(values) for values in cells)])
    return lines


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{mean(values):.4g}" + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")


def _quoted(text: str) -> str:
    """A text as code in a cell of a table: line breaks, bars and backticks would end it."""
    inside = text.replace("\n", "⏎").replace("|", "¦").replace("`", "'")
    return f"`{inside}`"


def markdown(found: Mapping[str, Any]) -> str:
    """One claim as a section of the results page."""
    header, *lines = table(found)
    text = [f"### {found['method']}", "", f"Published: {found['published']}", "", f"Run here: {found['check']}", ""]
    text += [f"Expected: {found['expected']}", "", f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    text += [f"| {' | '.join(line)} |" for line in lines]
    if shown := found.get("examples"):
        text += ["", f"| {' | '.join(shown[0])} |", "|" + "---|" * len(shown[0])]
        text += [f"| {' | '.join(map(_quoted, row.values()))} |" for row in shown]
    return "\n".join([*text, "", f"`{found['command']}`, {found['date']}, {found['machine']}.", ""])
