"""The protocol of a sweep for models that a sweep does not train: rates by the first seed, figures over all seeds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal
from urllib.parse import quote

import numpy as np

from hf_compress import facts, files
from hf_compress.entries import ALONE
from hf_compress_evaluation import intervals

Kind = Literal["share", "spearman", "average"]
KINDS: Mapping[Kind, Callable[..., intervals.Statistic]] = {
    "share": intervals.share,
    "spearman": intervals.spearman,
    "average": intervals.average,
}
Row = Mapping[str, Any]
"""A run, as its file holds it: method, learning_rate, seed, choice, figures, seconds."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """A figure as what it is computed of, one value a row of the data, so that runs can be resampled together."""

    kind: Kind
    columns: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, kind: Kind, figure: intervals.Statistic) -> Columns:
        return cls(kind=kind, columns=tuple(tuple(map(float, column)) for column in figure.columns))


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What is found of a model."""

    choice: float
    """Its score on the rows for choosing; higher is better."""
    figures: Mapping[str, Columns]
    """On the rows for the reported numbers, the main one first."""


def mean_over_seeds(figures: Sequence[Mapping[str, Any]]) -> intervals.Statistic:
    """The mean of several runs' figure, whose rows are resampled together."""
    made = [KINDS[one["kind"]](*one["columns"]) for one in figures]
    ends = np.cumsum([len(one.columns) for one in made])[:-1]

    def statistic(*columns: Any, axis: int = -1) -> Any:
        parts = np.split(np.arange(len(columns)), ends)
        values = [one.of(*(columns[i] for i in part), axis=axis) for one, part in zip(made, parts, strict=True)]
        return np.mean(values, axis=0)

    return intervals.Statistic(columns=tuple(column for one in made for column in one.columns), of=statistic)


def run(
    methods: Sequence[str],
    folder: Path,
    *,
    rates: Sequence[float],
    seeds: Sequence[int],
    made: Callable[[str, float, int, Path], Scored],
    tell: Callable[[str], None],
) -> list[Row]:
    """Every run of a table, with the rate that a method chose with the first seed for the other seeds.

    Args:
        methods: in the table's order.
        folder: one file for each finished run, which is never made again.
        rates: tried with the first seed.
        seeds: at least one.
        made: trains (method, learning rate, seed) into a folder and scores it.
        tell: gets a line for each run.
    """
    found: list[Row] = []
    for seed in seeds:
        for method in methods:
            own = [row for row in found if row["method"] == method]
            best = [max(own, key=lambda row: row["choice"])["learning_rate"]] if own else list(rates)
            for rate in rates if seed == seeds[0] else best:
                found.append(_row(method, rate, seed, folder, made, tell))
    return found


def _row(method: str, rate: float, seed: int, folder: Path, made: Callable[..., Scored], tell: Any) -> Row:
    path = folder / "rows" / f"{quote(method, safe='+=,')}-{rate:g}-seed-{seed}.json"
    if not path.exists():
        tell(f"{method}, learning rate {rate:g}, seed {seed}")
        began = time.monotonic()
        scored = made(method, rate, seed, folder / "models" / path.stem)
        about = {"method": method, "learning_rate": rate, "seed": seed, "date": date.today().isoformat()}
        path.parent.mkdir(parents=True, exist_ok=True)
        made_of = about | asdict(scored) | {"seconds": time.monotonic() - began}
        files.write_text(path, json.dumps(made_of) + "\n")
    row: Row = files.read_json(path)
    return row


def summarise(rows: Sequence[Row], others: Mapping[str, Scored], *, about: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a table: each method at its rate, mean and spread over seeds, intervals, gap closed.

    Args:
        rows: as `run` gives them.
        others: models that are not trained here, by name: the teacher, the student's start.
        about: command, budget.
    """
    by = {method: _chosen([row for row in rows if row["method"] == method]) for method in _names(rows)}
    fixed = {name: asdict(one)["figures"] for name, one in others.items()}
    main = next(iter(next(iter(fixed.values()))))
    baseline = [row["figures"] for row in by[ALONE]] if ALONE in by else None
    methods = [
        {"method": name, "figures": {key: _figure([own], key) for key in own}} for name, own in fixed.items()
    ]  # one model each: no spread
    for name, chosen in by.items():
        given = [row["figures"] for row in chosen]
        one: dict[str, Any] = {
            "method": name,
            "learning_rate": chosen[0]["learning_rate"],
            "choice": {f"{row['learning_rate']:g}": row["choice"] for row in rows if _first(row, rows, name)},
            "seeds": [row["seed"] for row in chosen],
            "figures": {key: _figure(given, key) for key in given[0]},
        }
        if baseline is not None and name != ALONE and "teacher" in fixed:
            parts = [mean_over_seeds([each[main] for each in group]) for group in (given, [fixed["teacher"]], baseline)]
            one["gap_closed"] = asdict(intervals.gap_closed(*parts))
        methods.append(one)
    machine = {"machine": facts.hardware(), "versions": facts.versions(), "date": max(row["date"] for row in rows)}
    return {**about, **machine, "main": main, "methods": methods}


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows))


def _first(row: Row, rows: Sequence[Row], name: str) -> bool:
    return bool(row["method"] == name and row["seed"] == rows[0]["seed"])


def _chosen(rows: Sequence[Row]) -> list[Row]:
    """The runs at the rate that was best with the first seed."""
    first = [row for row in rows if row["seed"] == rows[0]["seed"]]
    rate = max(first, key=lambda row: row["choice"])["learning_rate"]
    return [row for row in rows if row["learning_rate"] == rate]


def _figure(figures: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any]:
    own = [one[key] for one in figures]
    values = [intervals.estimate(KINDS[one["kind"]](*one["columns"])).value for one in own]
    known = [value for value in values if value is not None]
    spread = stdev(known) if len(known) > 1 else None
    interval = intervals.estimate(mean_over_seeds(own)).interval
    return {"values": values, "mean": mean(known), "sd": spread, "interval": interval}
