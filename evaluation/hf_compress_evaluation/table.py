"""The record as a table that a person reads, and the same rows as JSON. Every value comes from the record."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich import box
from rich.markup import escape
from rich.table import Table

from hf_compress import files
from hf_compress.facts import Measurement, Record, Setting

SUBJECTS = ("teacher", "alone", "student-labelled", "student")
VARIANTS = ("torch", "onnx", "onnx_int8")
BATCHES = (1, 32)
SCORES = {
    "accuracy": "accuracy",
    "f1_macro": "macro-F1",
    "seqeval_f1": "entity F1",
    "spearmanr": "Spearman",
    "pearsonr": "Pearson",
    "label_loyalty": "label loyalty",
    "probability_loyalty": "prob. loyalty",
    "regression_loyalty": "regr. loyalty",
    "rank_loyalty": "rank loyalty",
    "teacher_cosine": "teacher cosine",
}
"""Columns of the table, those that were measured of any row."""
LESS = ("f1_macro", "pearsonr", "probability_loyalty", "regression_loyalty")
"""Left out of a narrow table."""
FURTHER = {
    "f1_micro": "micro-F1",
    "seqeval_precision": "entity precision",
    "seqeval_recall": "entity recall",
    "mean_squared_error": "mean squared error",
    "score_difference": "mean difference from the teacher's score",
    "matthews_correlation": "Matthews correlation",
    "calibration_error": "calibration error",
    "kl": "KL from the teacher in nats",
}
"""Measured if a task asks for them; shown below the table."""
COST = {
    "throughput": (1.0, "{:,.1f} rows a second"),
    "throughput_tokens": (1.0, "{:,.0f} tokens a second"),
    "peak_memory": (1e-6, "{:,.1f} MB of memory"),
    "peak_gpu_memory": (1e-6, "{:,.1f} MB of GPU memory"),
    "energy_per_1000_rows": (1.0, "{:.3g} Wh for 1,000 rows"),
}
"""What serving costs, at the largest timed batch; a factor and words for the line below the table."""
DERIVED = ("retention", "gap_closed", "gain")
MISSING = "—"
NARROW = 110
"""Columns of a terminal below which the table leaves out its less important figures."""
_SAID = {
    "retention": "{} of the teacher's {metric} kept",
    "gap_closed": "{} of the teacher's lead over alone made up",
    "gain": "{} {metric} more than alone",
}
_ALONE = "alone: the student's start, trained on the labels without the teacher; what distillation has to beat"


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
    scores: dict[str, Value]
    """Those of `SCORES` that were measured."""
    metric: str
    """What the derived figures are of."""
    parameters: Value | None
    """Of the torch model where the variant has no count of its own: exporting does not change it."""
    bytes: Value | None
    latency: dict[int, tuple[Value | None, Value | None]]
    """Median and 90th percentile in seconds, by rows of the batch."""
    derived: dict[str, Value | None]
    further: dict[str, Value]
    """Those of `FURTHER` that were measured."""
    cost: dict[str, Value]
    """Those of `COST` that were measured."""


def rows(record: Record) -> tuple[Row, ...]:
    """One row for each subject and variant of the record, the newest measurement of each kind."""
    pairs = {(found.subject, found.variant) for found in record.measurements}
    return tuple(_row(record, *pair) for pair in sorted(pairs, key=_place))


def table(record: Record, *, width: int = 150) -> Table:
    """The rows as a table; below it what the words mean, the derived figures and the conditions of the latencies.

    Args:
        record: of a model folder.
        width: columns to show it in; below `NARROW` macro-F1, probability loyalty and 90th percentiles are left out.
    """
    found, narrow = rows(record), width < NARROW
    below = _below(record, found)
    if narrow:
        below.append(f"{NARROW} columns or --json show further scores and 90th percentiles too")
    shown = Table(
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
        show_edge=False,
        caption="\n".join(map(plain, below)),
        caption_justify="left",
    )
    for name in ("model", "variant"):
        shown.add_column(name, no_wrap=True)
    scores = [name for name in SCORES if any(name in row.scores for row in found) and not (narrow and name in LESS)]
    for name in scores or ["accuracy"]:
        shown.add_column(SCORES[name], justify="right", min_width=len("accuracy"))
    for name in ("params", "size"):
        shown.add_column(name, justify="right", no_wrap=True)
    for batch in BATCHES:
        shown.add_column(f"b{batch} ms" if narrow else f"b{batch} ms\nmedian / p90", justify="right", no_wrap=True)
    for row in found:
        shown.add_row(
            plain(row.subject),
            plain(row.variant),
            *(_fraction(row.scores.get(name)) for name in scores or ["accuracy"]),
            MISSING if row.parameters is None else f"{row.parameters.value / 1e6:,.2f} M",
            MISSING if row.bytes is None else f"{row.bytes.value / 1e6:,.1f} MB",
            *(_milliseconds(*row.latency[batch][: 1 if narrow else 2]) for batch in BATCHES),
        )
    return shown


def plain(text: str) -> str:
    """A text of a stranger's record as it stands, for a terminal: rich reads no markup in it."""
    return escape(files.printable(text))


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
        scores={name: found for name in SCORES if (found := value(name)) is not None},
        metric=_metric(record, subject, variant),
        parameters=value("parameters") or value("parameters", of="torch"),
        bytes=value("bytes"),
        latency={batch: (value("latency_median", batch=batch), value("latency_p90", batch=batch)) for batch in BATCHES},
        derived={name: value(name) for name in DERIVED},
        further={name: found for name in FURTHER if (found := value(name)) is not None},
        cost={name: found for name in COST if (found := value(name)) is not None},
    )


def _metric(record: Record, subject: str, variant: str) -> str:
    """What the derived figures are of, in words."""
    found = [record.find(name, subject, variant) for name in DERIVED]
    named = next((one.how.get("metric") for one in found if one is not None), None) or "accuracy"
    return SCORES.get(str(named), str(named))


def _place(pair: tuple[str, str]) -> tuple[int, str, int, str]:
    """Known subjects and variants in their order, others after them by name."""
    subject, variant = pair
    first = SUBJECTS.index(subject) if subject in SUBJECTS else len(SUBJECTS)
    second = VARIANTS.index(variant) if variant in VARIANTS else len(VARIANTS)
    return first, subject, second, variant


def _below(record: Record, found: Sequence[Row]) -> list[str]:
    lines = [_ALONE] if any(row.subject == "alone" for row in found) else []
    if any("label_loyalty" in row.scores for row in found):
        lines.append("loyalty: agreement with the teacher, right or wrong; of decisions, and of probabilities")
    for row in found:
        said = [
            _SAID[name].format(_range(value), metric=row.metric)
            for name, value in row.derived.items()
            if value is not None
        ]
        if row.variant == "torch" and said:  # the same model in another format: its row above says what differs
            lines.append(f"{row.subject}: {'; '.join(said)}")
    for row in found:
        if row.further:
            said = [f"{FURTHER[name]} {_range(value)}" for name, value in row.further.items()]
            lines.append(f"{row.subject} {row.variant}: {'; '.join(said)}")
    for row in found:
        if row.cost:
            parts = [(*COST[name], value.value) for name, value in row.cost.items()]
            said = [words.format(factor * value) for factor, words, value in parts]
            lines.append(f"{row.subject} {row.variant}: {', '.join(said)}")
    if (lost := record.find("accuracy_drop", variant="onnx_int8")) is not None:
        kept = record.find("agreement_with_fp32", variant="onnx_int8")
        same = "" if kept is None else f"; decides like float32 in {kept.value:.3f} of the rows"
        change = -lost.value or 0.0  # no minus before a zero
        lines.append(f"int8: accuracy {change:+.3f}{same}, on the rows that decided to keep it")
    scored = {m.data.name: m.data.rows for m in record.measurements if m.metric in SCORES and m.data is not None}
    lines += [f"scored on {name}, {count:,} rows; ± is half the 95 % interval" for name, count in scored.items()]
    return lines + _conditions([m for m in record.measurements if m.metric == "latency_median"])


def _conditions(timed: Sequence[Measurement]) -> list[str]:
    said: dict[str, set[str]] = {}
    for m in timed:
        where = f"latency: {m.how.get('length')} tokens, threads {m.how.get('threads')}"
        said.setdefault(where, set()).add(str(m.how.get("provider")))
    return [f"{where}, {' and '.join(sorted(providers))}" for where, providers in sorted(said.items())]


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


def _milliseconds(*values: Value | None) -> str:
    return " / ".join(MISSING if value is None else f"{1000 * value.value:.1f}" for value in values)
