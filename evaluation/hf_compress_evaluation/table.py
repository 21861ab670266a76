"""The record as a table that a person reads, and the same rows as JSON. Every value comes from the record."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.table import Table

from hf_compress.facts import Measurement, Record, Setting

SUBJECTS = ("teacher", "alone", "student-labelled", "student")
VARIANTS = ("torch", "onnx", "onnx-int8")
BATCHES = (1, 32)
DERIVED = ("retention", "gap_closed", "gain")
MISSING = "—"
_SAID = {
    "retention": "of the teacher's accuracy kept",
    "gap_closed": "of the teacher's lead over the baseline made up",
    "gain": "accuracy over the baseline",
}


@dataclass(frozen=True, kw_only=True)
class Value:
    """A measured number with its 95 % interval, if it has one."""

    value: float
    unit: str
    interval: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is known of one subject in one variant; None: not measured."""

    subject: str
    variant: str
    accuracy: Value | None
    f1_macro: Value | None
    label_loyalty: Value | None
    probability_loyalty: Value | None
    parameters: Value | None
    """Of the torch model where the variant has no count of its own: exporting does not change it."""
    bytes: Value | None
    latency: dict[int, tuple[Value | None, Value | None]]
    """Median and 90th percentile in seconds, by rows of the batch."""
    derived: dict[str, Value | None]


def rows(record: Record) -> tuple[Row, ...]:
    """One row for each subject and variant of the record, the newest measurement of each kind."""
    pairs = {(found.subject, found.variant) for found in record.measurements}
    return tuple(_row(record, *pair) for pair in sorted(pairs, key=_place))


def table(record: Record) -> Table:
    """The rows as a table; below it the derived figures and the conditions of the latencies."""
    found = rows(record)
    shown = Table(title="Measured", caption="\n".join(_below(record, found)), caption_justify="left")
    for name in ("model", "variant"):
        shown.add_column(name)
    for name in ("accuracy", "macro-F1", "label loyalty", "prob. loyalty", "parameters", "size"):
        shown.add_column(name, justify="right")
    for batch in BATCHES:
        shown.add_column(f"b{batch} ms\nmedian / p90", justify="right")
    for row in found:
        shown.add_row(
            row.subject,
            row.variant,
            *map(_fraction, (row.accuracy, row.f1_macro, row.label_loyalty, row.probability_loyalty)),
            MISSING if row.parameters is None else f"{row.parameters.value / 1e6:,.2f} M",
            MISSING if row.bytes is None else f"{row.bytes.value / 1e6:,.1f} MB",
            *(_milliseconds(*row.latency[batch]) for batch in BATCHES),
        )
    return shown


def as_json(record: Record) -> str:
    """The rows as a JSON list, units as in the record, null where nothing was measured."""
    return json.dumps([asdict(row) for row in rows(record)], indent=1, allow_nan=False)


def _row(record: Record, subject: str, variant: str) -> Row:
    def value(metric: str, *, of: str = variant, **how: Setting) -> Value | None:
        found = record.find(metric, subject, of, **how)
        return None if found is None else Value(value=found.value, unit=found.unit, interval=found.interval)

    return Row(
        subject=subject,
        variant=variant,
        accuracy=value("accuracy"),
        f1_macro=value("f1_macro"),
        label_loyalty=value("label_loyalty"),
        probability_loyalty=value("probability_loyalty"),
        parameters=value("parameters") or value("parameters", of="torch"),
        bytes=value("bytes"),
        latency={batch: (value("latency_median", batch=batch), value("latency_p90", batch=batch)) for batch in BATCHES},
        derived={name: value(name) for name in DERIVED},
    )


def _place(pair: tuple[str, str]) -> tuple[int, str, int, str]:
    """Known subjects and variants in their order, others after them by name."""
    subject, variant = pair
    first = SUBJECTS.index(subject) if subject in SUBJECTS else len(SUBJECTS)
    second = VARIANTS.index(variant) if variant in VARIANTS else len(VARIANTS)
    return first, subject, second, variant


def _below(record: Record, found: Sequence[Row]) -> list[str]:
    lines = [
        f"{row.subject} ({row.variant}): {_range(value)} {_SAID[name]}"
        for row in found
        for name, value in row.derived.items()
        if value is not None
    ]
    scored = {m.data.name: m.data.rows for m in record.measurements if m.data is not None}
    lines += [f"scored on {name}, {count:,} rows; ± is half the 95 % interval" for name, count in scored.items()]
    return lines + _conditions([m for m in record.measurements if m.metric == "latency_median"])


def _conditions(timed: Sequence[Measurement]) -> list[str]:
    said = {
        f"latency: length {m.how.get('length')}, threads {m.how.get('threads')}, {m.how.get('provider')}" for m in timed
    }
    return sorted(said)


def _fraction(value: Value | None) -> str:
    if value is None:
        return MISSING
    if value.interval is None:
        return f"{value.value:.3f}"
    low, high = value.interval
    return f"{value.value:.3f} ± {(high - low) / 2:.3f}"


def _range(value: Value) -> str:
    """With both bounds: the interval of a quotient is lopsided."""
    if value.interval is None:
        return f"{value.value:.3f}"
    return "{:.3f} ({:.3f} to {:.3f})".format(value.value, *value.interval)


def _milliseconds(median: Value | None, p90: Value | None) -> str:
    return " / ".join(MISSING if value is None else f"{1000 * value.value:.1f}" for value in (median, p90))
