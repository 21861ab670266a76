"""Whether what a record says of a folder is still true of it: measured again on the same rows, and compared.

| measurement | holds if the value found is |
|---|---|
| scores, loyalty, retention | the recorded one up to 1e-6, or within its 95 % interval |
| bytes, parameters | the recorded one |
| median latency | at most `1 + tolerance` times the recorded one, and at least the recorded one over that |

Other processors and libraries round otherwise, above all with 8 bits, and a row between two classes then falls on the
other side. So a claim with an interval is held to the interval, and the finding says that the value differs. Whether
the weights are the very same is what hashes tell. A loss that is smaller than the interval shows in them alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_compress import facts, foreign
from hf_compress.errors import HfCompressError, MismatchError
from hf_compress.facts import Data, Measurement
from hf_compress.verifying import Finding, State

from . import latency, quality, scoring
from .candidates import Candidate, onnx_candidate, timed_call, torch_candidate
from .scoring import Scorer
from .task import Task, read_task

EQUAL = 1e-6
"""How far two scores of the same decisions may be apart: they are quotients of whole numbers, rounded once."""
SIZES = ("bytes", "parameters")
TIMED = "latency_median"
MOST_ROWS, MOST_TOKENS = 4096, 2**17
"""Of a recorded call that is timed again: a record may come from a stranger."""
_REASONS = {
    "gap_closed": "needs the baseline that was trained alone",
    "gain": "needs the baseline that was trained alone",
    "latency_p90": "the slowest of a few calls is no property of the folder",
    "throughput": "follows from the latency",
    "throughput_tokens": "follows from the latency",
    "peak_memory": "needs a process of its own: hf-compress evaluate --cost",
    "peak_gpu_memory": "needs a process of its own: hf-compress evaluate --cost",
    "energy_per_1000_rows": "needs codecarbon: hf-compress evaluate --cost",
    "parity_max_abs_diff": "taken whenever a graph is written",
    "accuracy_drop": "taken whenever a graph is written",
    "agreement_with_fp32": "taken whenever a graph is written",
}


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """The models that can be measured here, and why others cannot."""

    candidates: tuple[Candidate, ...]
    lacking: Mapping[tuple[str, str], Finding]
    """By subject and variant: the state and the note of all its measurements."""


def remeasure(
    folder: Path,
    *,
    task: Task | Path,
    teacher: str | Path | None = None,
    tolerance_latency: float = 0.5,
    device: str = "cpu",
    progress: bool = False,
) -> tuple[Finding, ...]:
    """Takes the newest measurement of each kind again and says which hold. Nothing is written.

    Args:
        folder: the student, with its record.
        task: a task, or its file; its rows must be those that the record's numbers were measured on.
        teacher: folder or hub id; without it what needs the teacher is not measured.
        tolerance_latency: 0.5: a call may take half as long again, or be as much faster.
        device: "cpu" or "cuda".
        progress: show bars.

    Raises:
        MismatchError: if no score of the record was measured on the task's rows, or the teacher has other classes.
        ForeignFileError: if record, task or teacher are malformed.
    """
    folder = Path(folder)
    task = task if isinstance(task, Task) else read_task(task)
    config = foreign.config(folder, use="to be measured")
    scorer = scoring.scorer(task.task, config)
    newest = _newest(facts.load(folder), scorer)
    rows = scorer.load(task, config)
    _check_rows(newest, rows.data, scorer)
    threads = next((n for m in newest if m.metric == TIMED and isinstance(n := m.how.get("threads"), int)), 1)
    with latency.torch_threads(threads):
        opened = _open(folder, newest, teacher, device, threads, scoring.AUTO[task.task])
        if opened.candidates:
            scorer.check(opened.candidates)
        every = task.model_copy(update={"metrics": _metrics(newest, scorer), "slices": False})
        scored, unscored = _scores(opened.candidates, scorer, rows, every, progress)
        found = {**scored, **_sizes(opened.candidates)}
        timed = _times(opened.candidates, newest, threads, progress)
    lacking = {**opened.lacking, **unscored}
    return tuple(
        _judge(m, found, timed.get(place), lacking, rows.data, scorer, teacher is not None, tolerance_latency)
        for place, m in enumerate(newest)
    )


def _newest(record: facts.Record, scorer: Scorer) -> list[Measurement]:
    """The last measurement of each kind: of subject, variant, metric, rows, and of a latency's conditions."""
    found: dict[object, Measurement] = {}
    for m in record.measurements:
        scored = m.data.fingerprint if m.data is not None and m.metric in scorer.scores else None
        conditions = [str(m.how.get(name)) for name in ("batch", "length", "threads", "provider")]
        timed = tuple(conditions) if m.metric.startswith("latency_") else None
        found[m.subject, m.variant, m.metric, scored, timed] = m
    return list(found.values())


def _metrics(newest: Sequence[Measurement], scorer: Scorer) -> tuple[str, ...]:
    """All of the scorer's, first the one that the recorded retention is of: it is of the first that is asked for."""
    kept = [str(m.how.get("metric")) for m in newest if m.metric == "retention"]
    return tuple(dict.fromkeys((*(name for name in kept if name in scorer.metrics), *scorer.metrics)))


def _check_rows(newest: Sequence[Measurement], data: Data, scorer: Scorer) -> None:
    """Refuses rows on which nothing of the record was measured."""
    known = {m.data.fingerprint: m.data for m in newest if m.data is not None and m.metric in scorer.scores}
    if known and data.fingerprint not in known:
        said = " and ".join(f"{each.name!r} ({each.rows} rows, {key})" for key, each in known.items())
        raise MismatchError(
            f"verify: the task's rows are {data.name!r} ({data.rows} rows, {data.fingerprint}), and the record's "
            f"scores were measured on {said}. Other rows, labels or ids of the classes give other numbers: name the "
            "same data."
        )


def _open(
    folder: Path, newest: Sequence[Measurement], teacher: str | Path | None, device: str, threads: int, auto: Any
) -> _Opened:
    found: list[Candidate] = []
    lacking: dict[tuple[str, str], Finding] = {}
    pairs = dict.fromkeys((m.subject, m.variant) for m in newest)
    for subject, variant in sorted(pairs, key=lambda pair: pair[0] == "student"):  # classes are compared with the last
        source = {"student": folder, "teacher": teacher}.get(subject)
        if source is None:
            why = "give --teacher" if subject == "teacher" else f"the folder of {subject} is not at hand"
            lacking[subject, variant] = _finding(state="not checked", note=why)
        elif variant == "torch":
            try:
                found.append(torch_candidate(subject, source, device, auto))
            except HfCompressError as error:
                if subject == "teacher":
                    raise
                lacking[subject, variant] = _finding(state="fails", note=f"cannot be measured: {error}")
        elif not (Path(source) / variant / "model.onnx").is_file():
            state: State = "fails" if subject == "student" else "not checked"
            lacking[subject, variant] = _finding(state=state, note=f"there is no {variant}/model.onnx")
        else:
            try:
                found.append(onnx_candidate(subject, Path(source), variant, device, threads))
            except HfCompressError as error:
                lacking[subject, variant] = _finding(state="fails", note=f"cannot be measured: {error}")
    return _Opened(candidates=tuple(found), lacking=lacking)


def _finding(*, state: State, note: str) -> Finding:
    return Finding(kind="measurement", what="", state=state, note=note)


def _scores(
    candidates: Sequence[Candidate], scorer: Scorer, rows: Any, task: Task, progress: bool
) -> tuple[dict[tuple[str, str, str], float], dict[tuple[str, str], Finding]]:
    """Scores by subject, variant and metric; and the models that give none, such as those with NaN weights."""
    said: dict[tuple[str, str], Any] = {}
    lacking: dict[tuple[str, str], Finding] = {}
    for one in candidates:
        try:
            said[one.subject, one.variant] = scorer.predict(one, rows, task, progress=progress)
        except HfCompressError as error:
            lacking[one.subject, one.variant] = _finding(state="fails", note=f"cannot be measured: {error}")
    teacher = said.get(("teacher", "torch"))
    found: dict[tuple[str, str, str], float] = {}
    for one in candidates:
        if (own := said.get((one.subject, one.variant))) is not None:
            beside = None if one.subject == "teacher" else teacher
            for m in scorer.measure(one, own, rows, task, teacher=beside):
                found[one.subject, one.variant, m.metric] = m.value
    return found, lacking


def _sizes(candidates: Sequence[Candidate]) -> dict[tuple[str, str, str], float]:
    measured = [
        m for one in candidates if one.folder for m in quality.measure_size(one.subject, one.variant, one.folder)
    ]
    return {(m.subject, m.variant, m.metric): m.value for m in measured}


def _times(
    candidates: Sequence[Candidate], newest: Sequence[Measurement], threads: int, progress: bool
) -> dict[int, float | str]:
    """Seconds of recorded calls by their place in `newest`, or why there are none; models of one batch are timed in
    turn, as they were."""
    by_name = {(one.subject, one.variant): one for one in candidates}
    wanted: dict[tuple[int, int], dict[int, Candidate]] = defaultdict(dict)
    found: dict[int, float | str] = {}
    for key, m in enumerate(newest):
        one = by_name.get((m.subject, m.variant))
        if m.metric != TIMED or one is None or (place := _conditions(m)) is None:
            continue
        if m.how.get("threads") != threads or m.how.get("provider") != one.provider:
            found[key] = f"taken with threads {m.how.get('threads')} on {m.how.get('provider')}"
        elif place[1] > quality.longest(one.model, one.tokenizer):
            found[key] = f"the model does not take {place[1]} tokens"
        else:
            wanted[place][key] = one
    for (batch, length), models in wanted.items():
        runs = max([n for key in models if isinstance(n := newest[key].how.get("runs"), int)], default=20)
        calls = {one.name: timed_call(one, batch, length, 0) for one in models.values()}
        taken = latency.measure_all(
            calls, batch=batch, length=length, runs=min(max(runs, 5), 100), warmup=3, threads=threads, progress=progress
        )
        found |= {key: taken[one.name].median for key, one in models.items()}
    return found


def _conditions(m: Measurement) -> tuple[int, int] | None:
    """Rows and tokens of a recorded call; None where they are not known, or are none that are timed here."""
    batch, length = m.how.get("batch"), m.how.get("length")
    if not (isinstance(batch, int) and isinstance(length, int)):
        return None
    return (batch, length) if 1 <= batch <= MOST_ROWS and 1 <= length <= MOST_TOKENS else None


def _judge(
    m: Measurement,
    found: Mapping[tuple[str, str, str], float],
    timed: float | str | None,
    lacking: Mapping[tuple[str, str], Finding],
    data: Data,
    scorer: Scorer,
    taught: bool,
    tolerance: float,
) -> Finding:
    place = _conditions(m) if m.metric.startswith("latency_") else None
    said = f"{m.subject} {m.variant} {m.metric}{'' if place is None else f', {place[0]} x {place[1]} tokens'}"
    known = Finding(kind="measurement", what=said, state="not checked", recorded=m.value, unit=m.unit)
    if m.metric in _REASONS:
        return replace(known, note=_REASONS[m.metric])
    if m.metric not in (*scorer.scores, *SIZES, TIMED):
        return replace(known, note="not a measurement that is taken here")
    if m.metric in scorer.scores and (m.data is None or m.data.fingerprint != data.fingerprint):
        return replace(known, note="measured on other rows")
    if m.metric in (*scorer.loyalty, "retention") and not taught:
        return replace(known, note="give --teacher")
    if (key := (m.subject, m.variant, m.metric)) in found:
        return _compared(known, m, found[key])
    if m.metric == TIMED and place is None:
        return replace(known, note="its conditions are not recorded")
    if timed is not None:
        return replace(known, note=timed) if isinstance(timed, str) else _timed(known, m, timed, tolerance)
    why = lacking.get((m.subject, m.variant), _finding(state="not checked", note="has no value here"))
    return replace(known, state=why.state, note=why.note)


def _timed(known: Finding, m: Measurement, value: float, tolerance: float) -> Finding:
    factor = value / m.value if m.value > 0 else math.inf
    holds = 1 / (1 + tolerance) <= factor <= 1 + tolerance
    note = "" if holds else f"{factor:.2f} times the recorded one; another machine has another latency"
    return replace(known, state="holds" if holds else "fails", found=value, note=note)


def _compared(known: Finding, m: Measurement, value: float) -> Finding:
    away = abs(value - m.value)
    if m.metric in SIZES or away <= EQUAL:
        return replace(known, state="holds" if away <= EQUAL else "fails", found=value)
    if m.interval is not None and m.interval[0] <= value <= m.interval[1]:
        return replace(known, state="holds", found=value, note=f"differs, within {_range(m.interval)}")
    outside = "and no interval was recorded" if m.interval is None else f"outside {_range(m.interval)}"
    return replace(known, state="fails", found=value, note=outside)


def _range(interval: tuple[float, float]) -> str:
    return f"the recorded {interval[0]:.4f} to {interval[1]:.4f}"
