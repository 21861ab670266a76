"""Measurements as a reader wants them: tables of subjects and variants, values with units."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hf_compress.facts import Data, Measurement, Record

UNKNOWN = "not measured"
SUBJECTS = {
    "teacher": "teacher",
    "student": "student",
    "alone": "alone (same start, trained without the teacher)",
    "student-labelled": "student, trained with labels",
}
VARIANTS = ("torch", "onnx", "onnx_int8")
QUALITY = {
    "accuracy": "accuracy",
    "f1_macro": "F1 (macro)",
    "f1_micro": "F1 (micro)",
    "seqeval_f1": "F1 (entities)",
    "seqeval_precision": "precision (entities)",
    "seqeval_recall": "recall (entities)",
    "spearmanr": "Spearman correlation",
    "pearsonr": "Pearson correlation",
    "mean_squared_error": "mean squared error",
    "matthews_correlation": "Matthews correlation",
    "calibration_error": "calibration error",
    "label_loyalty": "same label as the teacher",
    "probability_loyalty": "probability loyalty",
    "kl": "KL from the teacher",
    "regression_loyalty": "Pearson correlation with the teacher",
    "rank_loyalty": "Spearman correlation with the teacher",
    "score_difference": "difference from the teacher's score",
    "teacher_cosine": "cosine with the teacher's embeddings",
}
SCORES = ("seqeval_f1", "accuracy", "f1_macro", "f1_micro", "spearmanr", "pearsonr", "mean_squared_error")
"""Those of `QUALITY` that need labels and no teacher; the first that was measured is what models are compared by."""
ERRORS = ("mean_squared_error",)
"""Those of which less is better."""
LOYALTY = ("label_loyalty", "probability_loyalty", "kl", "regression_loyalty", "rank_loyalty", "teacher_cosine")
SIZE = {"parameters": "parameters", "bytes": "size on disk"}
LATENCY = {"latency_median": "median", "latency_p90": "p90"}
COST = {
    "throughput": "throughput",
    "peak_memory": "peak memory of a process that serves",
    "peak_gpu_memory": "peak GPU memory",
    "energy_per_1000_rows": "energy per 1,000 rows",
}
DERIVED = {
    "retention": "{value} of the teacher's quality is kept",
    "gap_closed": "{value} of the gap between the same start trained without the teacher and the teacher is closed",
    "gain": "{value} is the difference in {metric} to the same start trained without the teacher",
}
BATCHES = (1, 32)


Cells = tuple[tuple[str, ...], list[tuple[str, ...]]]
"""Column heads and rows of a table: texts as they came, which whoever prints them escapes."""
Comparable = tuple[str, str, str]
"""Device, threads and padded length: what two latencies share that stand side by side."""


@dataclass(frozen=True, order=True)
class Condition:
    """What two latencies must have in common to be compared."""

    provider: str
    threads: str
    length: str

    @classmethod
    def of(cls, found: Measurement) -> Condition:
        return cls(*(str(found.how.get(key, "not recorded")) for key in ("provider", "threads", "length")))

    @property
    def device(self) -> str:
        """GPU or CPU: providers of one device may be compared, they are what is compared."""
        return "GPU" if re.search("cuda|gpu|tensorrt|rocm", self.provider, re.IGNORECASE) else "CPU"

    @property
    def comparable(self) -> Comparable:
        """What latencies of one table or picture share."""
        return self.device, self.threads, self.length


def show(found: Measurement | None) -> str:
    """A value with its unit, and its 95 % interval where there is one."""
    if found is None:
        return UNKNOWN
    write = _WRITERS.get(found.unit)
    if write is None:
        return f"{_interval(found, lambda value: f'{value:.4g}')} {found.unit}"
    return _interval(found, write)


def _interval(found: Measurement, write: Callable[[float], str]) -> str:
    if found.interval is None:
        return write(found.value)
    low, high = map(write, found.interval)
    return f"{write(found.value)} ({low.removesuffix(' %')} to {high})"


def percent(value: float) -> str:
    """A fraction as a percentage with one decimal."""
    return f"{100 * value:.1f} %"


def decimal(value: float) -> str:
    """A number without a unit, with three decimals."""
    return f"{value:.3f}"


def count(value: float) -> str:
    """A number of things: 812, 3.2 k, 22.7 M, 1.24 G."""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}"


def layers(number: int) -> str:
    """1 layer, 3 layers."""
    return f"{number} layer{'' if number == 1 else 's'}"


def size(value: float) -> str:
    """Bytes in powers of ten: 91.3 MB."""
    return f"{count(value)}{'B' if abs(value) >= 1e3 else ' B'}"


def seconds(value: float) -> str:
    """A latency in milliseconds with three digits."""
    return f"{1000 * value:.3g} ms"


def rate(value: float, unit: str) -> str:
    """A number of things a second: 8.21 rows/s, 1.24 k rows/s."""
    return f"{value:.3g} {unit}" if abs(value) < 1e3 else f"{count(value)} {unit}"


_WRITERS = {
    "fraction": percent,
    "ratio": percent,
    "count": count,
    "bytes": size,
    "seconds": seconds,
    "correlation": decimal,
    "cosine": decimal,
    "rows/s": lambda value: rate(value, "rows/s"),
    "tokens/s": lambda value: rate(value, "tokens/s"),
    "Wh": lambda value: f"{value:.3g} Wh",
}


def pairs(record: Record) -> list[tuple[str, str]]:
    """Subjects and variants that anything was measured for: teacher, student, alone, then others by name."""
    found = {(each.subject, each.variant) for each in record.measurements}
    return sorted(
        found, key=lambda pair: (_place(pair[0], [*SUBJECTS]), pair[0], _place(pair[1], [*VARIANTS]), pair[1])
    )


def _place(name: str, known: list[str]) -> int:
    return known.index(name) if name in known else len(known)


def quality_cells(record: Record, timed: Comparable | None = None) -> Cells | None:
    """Quality, agreement and size of every subject and variant, on each data set that something was measured on; a
    column that is empty throughout is left out.

    Args:
        record: of a model folder.
        timed: adds the median latencies that were taken so.
    """
    names = data_names(record)
    several = len(names) > 1
    cells = {
        (*pair, name): {key: _newest(record, key, *pair, name) for key in QUALITY} | _sizes(record, pair)
        for pair in pairs(record)
        for name in (names if several else [None])
    }
    shown = [key for key in QUALITY | SIZE if any(row[key] for row in cells.values())]
    batches = [] if timed is None else _batches(record)
    rows = []
    for (subject, variant, name), row in cells.items():
        took = [_median(record, (subject, variant), batch, timed) for batch in batches]
        if (any(row[key] for key in QUALITY) if several else any(row.values())) or any(took):
            named = (SUBJECTS.get(subject, subject), variant, *([name] if name is not None else []))
            rows.append((*named, *(_cell(subject, variant, key, row[key]) for key in shown), *map(show, took)))
    heads = (*("model", "variant"), *(["data"] if several else []), *((QUALITY | SIZE)[key] for key in shown))
    return ((*heads, *(f"latency, batch {n}" for n in batches)), rows) if rows else None


def _sizes(record: Record, pair: tuple[str, str]) -> dict[str, Measurement | None]:
    return {key: record.find(key, *pair) for key in SIZE}


def _newest(record: Record, metric: str, subject: str, variant: str, data: str | None) -> Measurement | None:
    """The newest measurement of that metric on the data of that name; None: on any."""
    for found in reversed(record.measurements):
        same = (found.metric, found.subject, found.variant) == (metric, subject, variant)
        if same and (data is None or (found.data is not None and found.data.name == data)):
            return found
    return None


def _median(record: Record, pair: tuple[str, str], batch: int, timed: Comparable | None) -> Measurement | None:
    for found in reversed(record.measurements):
        same = (found.metric, found.subject, found.variant) == ("latency_median", *pair)
        if same and _batch(found) == batch and Condition.of(found).comparable == timed:
            return found
    return None


def _cell(subject: str, variant: str, key: str, found: Measurement | None) -> str:
    """A dash where there is nothing to measure: the teacher's agreement with itself, the parameters of a graph."""
    itself = subject == "teacher" and (key in LOYALTY or key == "score_difference")
    graph = variant != "torch" and key == "parameters"
    return "–" if found is None and (itself or graph) else show(found)


def speed_cells(record: Record) -> Cells | None:
    """Latency, one row for each subject, variant and condition."""
    latencies = [each for each in record.measurements if each.metric in LATENCY]
    keys = [
        (pair, c) for pair in pairs(record) for c in conditions(x for x in latencies if (x.subject, x.variant) == pair)
    ]
    batches, rows = _batches(record), []
    for (subject, variant), condition in keys:
        row = [SUBJECTS.get(subject, subject), variant]
        for batch in batches:
            found = {m: _latency(latencies, m, subject, variant, condition, batch) for m in LATENCY}
            row.append(" / ".join(map(show, found.values())) if any(found.values()) else UNKNOWN)
        rows.append((*row, condition.provider, condition.threads, condition.length))
    columns = (
        "model",
        "variant",
        *(f"batch {batch}: median / p90" for batch in batches),
        "provider",
        "threads",
        "length",
    )
    return (columns, rows) if rows else None


def _batches(record: Record) -> list[int]:
    timed = (_batch(each) for each in record.measurements if each.metric in LATENCY)
    return sorted({*BATCHES, *(batch for batch in timed if batch is not None)})


def conditions(latencies: Iterable[Measurement]) -> list[Condition]:
    """The distinct conditions, in order."""
    return sorted({Condition.of(each) for each in latencies})


def _batch(found: Measurement) -> int | None:
    batch = found.how.get("batch")
    return batch if isinstance(batch, int) and not isinstance(batch, bool) else None


def _latency(
    latencies: list[Measurement], metric: str, subject: str, variant: str, condition: Condition, batch: int
) -> Measurement | None:
    for found in reversed(latencies):
        same = (found.metric, found.subject, found.variant) == (metric, subject, variant)
        if same and _batch(found) == batch and Condition.of(found) == condition:
            return found
    return None


def other_cells(record: Record) -> Cells | None:
    """The newest value of every metric that has no place in the other tables."""
    placed = {*QUALITY, *SIZE, *LATENCY, *DERIVED, "throughput_tokens"}  # rows times length, both told with throughput
    newest = {(x.metric, x.subject, x.variant, str(x.how)): x for x in record.measurements if x.metric not in placed}
    rows: list[tuple[str, ...]] = [
        (_named(x), SUBJECTS.get(x.subject, x.subject), x.variant, show(x)) for x in newest.values()
    ]
    return (("metric", "model", "variant", "value"), rows) if rows else None


def _named(found: Measurement) -> str:
    """A metric in words, with the learning rate, the class or the length where each of several was measured."""
    name, how = found.metric.replace("_", " "), found.how
    if isinstance(rate := how.get("learning_rate"), float):
        return f"{name} at learning rate {rate:g}"
    if found.metric in COST:
        at = f"batch {how.get('batch')}, {how.get('length')} tokens, threads {how.get('threads')}"
        return f"{COST[found.metric]} ({at})"
    if found.metric == "accuracy_by_class":
        return f"{name}: {how.get('class')}"
    if found.metric == "accuracy_by_length":
        return f"{name}: {how.get('tokens')} tokens"
    return name


def derived(record: Record) -> list[str]:
    """Sentences on what follows from the measurements of the student, and of its int8 variant.

    A float32 graph equals torch within the tolerance that its export enforced, so it gets no sentences of its own.
    """
    variants = [variant for subject, variant in pairs(record) if subject == "student"]
    variants = [variant for variant in variants if variant != "onnx" or "torch" not in variants]
    names = data_names(record)
    several = len(names) > 1
    found = [
        (variant, value, f" on {name}" if several else "")
        for name in (names if several else [None])
        for key in DERIVED
        for variant in variants
        if (value := _newest(record, key, "student", variant, name)) is not None
    ]
    return [
        f"{DERIVED[value.metric].format(value=show(value), metric=_metric(value))}"
        f"{'' if variant == 'torch' else f' with {variant}'}{where}{_test(value)}."
        for variant, value, where in found
    ]


def data_names(record: Record) -> list[str]:
    """Of the data sets on which quality was measured."""
    return list(dict.fromkeys(x.data.name for x in record.measurements if x.metric in QUALITY and x.data is not None))


def main_score(record: Record) -> str:
    """The metric by which the models of the record are compared."""
    return next((name for name in SCORES if any(x.metric == name for x in record.measurements)), "accuracy")


def _metric(found: Measurement) -> str:
    named = str(found.how.get("metric", "accuracy"))
    return QUALITY.get(named, named)


def _test(found: Measurement) -> str:
    p = found.how.get("mcnemar_p")
    return f" (McNemar p = {p:.2g})" if isinstance(p, int | float) else ""


def measured_on(record: Record) -> list[Data]:
    """The data sets of the measurements, each once; without those on which learning rates were chosen."""
    found = [x.data for x in record.measurements if x.data is not None and x.metric != "choice_accuracy"]
    return list({(data.name, data.fingerprint): data for data in found}.values())


def missing(record: Record) -> list[str]:
    """What a reader would expect and nobody measured: of the student, and of what it is compared with."""

    def first(names: Iterable[str], subject: str = "student") -> Measurement | None:
        return next((found for name in names if (found := record.find(name, subject)) is not None), None)

    score = first(SCORES)
    wanted = {"quality against labels": score}
    if score is not None and score.metric == "accuracy" and first(("seqeval_f1",)) is None:
        wanted["F1 (macro)"] = record.find("f1_macro")
    if record.training is None or record.training.teacher is not None:
        wanted["the teacher's quality on the same data"] = first(SCORES, "teacher")
        wanted["the same start trained without the teacher"] = first(SCORES, "alone")
        wanted["agreement with the teacher"] = first(LOYALTY)
    wanted["size on disk"] = record.find("bytes")
    wanted["peak memory"] = record.find("peak_memory") or record.find("peak_gpu_memory")
    wanted["energy per 1,000 rows"] = record.find("energy_per_1000_rows")
    timed = {_batch(x) for x in record.measurements if (x.metric, x.subject) == ("latency_median", "student")}
    absent = [name for name, found in wanted.items() if found is None]
    return absent + [f"latency at batch {batch}" for batch in BATCHES if batch not in timed]
