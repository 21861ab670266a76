"""Several seeds of the demo as one table: mean and spread of what each run's record says."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from statistics import mean, stdev
from typing import Any

from hf_compress.facts import Record, hardware, versions

Column = tuple[str, str, dict[str, int]]

COLUMNS: dict[str, Column] = {
    "accuracy": ("accuracy", "fraction", {}),
    "macro-F1": ("f1_macro", "fraction", {}),
    "label loyalty": ("label_loyalty", "fraction", {}),
    "retention": ("retention", "ratio", {}),
    "gap closed": ("gap_closed", "ratio", {}),
    "parameters": ("parameters", "count", {}),
    "bytes": ("bytes", "bytes", {}),
    "latency b1": ("latency_median", "seconds", {"batch": 1}),
    "latency b32": ("latency_median", "seconds", {"batch": 32}),
}
_FACTOR = {"fraction": 100.0, "ratio": 100.0, "count": 1e-6, "bytes": 1e-6, "seconds": 1e3}
_UNIT = {"fraction": "%", "ratio": "%", "count": "M", "bytes": "MB", "seconds": "ms"}


def summarise(records: Sequence[Record]) -> dict[str, Any]:
    """Values of every seed with their mean and sample standard deviation, by subject, variant and column."""
    pairs = list(dict.fromkeys((m.subject, m.variant) for record in records for m in record.measurements))
    rows = []
    for subject, variant in pairs:
        row: dict[str, Any] = {"subject": subject, "variant": variant}
        for name, (metric, unit, how) in COLUMNS.items():
            found = [record.find(metric, subject, variant, **how) for record in records]
            values = [measured.value for measured in found if measured is not None]
            if values:
                spread = stdev(values) if len(values) > 1 else None
                row[name] = {"values": values, "mean": mean(values), "spread": spread, "unit": unit}
        if len(row) > 2:
            rows.append(row)
    return {
        "date": date.today().isoformat(),
        "command": "hf-compress demo" + (f" --seeds {len(records)}" if len(records) > 1 else ""),
        "machine": hardware(),
        "versions": versions(),
        "seeds": len(records),
        "rows": rows,
    }


def markdown(summary: dict[str, Any]) -> str:
    """The summary as a table for a README; ± is the standard deviation over seeds."""
    names = [f"{name} ({_UNIT[unit]})" for name, (_, unit, _) in COLUMNS.items()]
    lines = [f"| model | variant | {' | '.join(names)} |", "|---|---|" + "---:|" * len(names)]
    for row in summary["rows"]:
        cells = [_cell(row.get(name)) for name in COLUMNS]
        lines.append(f"| {row['subject']} | {row['variant']} | {' | '.join(cells)} |")
    machine, seeds = summary["machine"], summary["seeds"]
    over = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    lines += ["", f"`{summary['command']}`, {over}, {summary['date']}, {machine}."]
    return "\n".join(lines)


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    factor = _FACTOR[found["unit"]]
    spread = found["spread"]
    shown = f"{factor * found['mean']:.1f}"
    return shown if spread is None or found["unit"] in ("count", "bytes") else f"{shown} ± {factor * spread:.1f}"
