"""What the runs of a sweep say of each method. Learning rates are chosen on the choice rows, never on the test rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from hf_compress.entries import ALONE
from hf_compress_evaluation import intervals

from . import paired

TEACHER = "teacher"
"""Whom the others learn from; its rows stand beside theirs."""
Scores = NDArray[np.float64]


class Row(BaseModel):
    """One run, as its file holds it: a method at a learning rate with a seed, or the teacher of a seed."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: str
    seed: int
    learning_rate: float | None = None
    """None: the teacher."""
    fingerprint: str
    """Of everything that the rows of a sweep share."""
    error: str | None = None
    """Why there is no result; then the figures below are None."""
    predictions: tuple[int, ...] = ()
    """Class id of each test row."""
    accuracy: float | None = None
    """Fraction of the test rows."""
    choice_accuracy: float | None = None
    """Fraction of the choice rows; None also where there are none."""
    label_loyalty: float | None = None
    """Fraction of the test rows that are given the teacher's class."""
    parameters: int | None = None
    steps: int | None = None
    """Of the optimizer, as the Trainer counted them."""
    seconds: float | None = None
    """Of the training; of a run that was resumed, the time of its last part scaled to all steps."""
    objectives: tuple[dict[str, Any], ...] = ()
    """Name, weight and settings of each objective, as the student's record has them."""
    date: str
    machine: str
    versions: dict[str, str]

    @property
    def finished(self) -> bool:
        return self.error is None


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A figure over seeds."""

    mean: float
    sd: float | None
    """Sample standard deviation; None with one seed."""


@dataclass(frozen=True, kw_only=True)
class Against:
    """A method beside another one, on the same rows with the same seeds."""

    difference: float
    """In mean accuracy, as a fraction."""
    interval: tuple[float, float] | None
    """95 %, paired bootstrap over the rows of scores that are averaged over the seeds."""
    p_rows: float
    p_rows_holm: float
    p_seeds: float | None
    p_seeds_holm: float | None
    """See `paired`; corrected over the methods that are compared with that one."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A method over its seeds at the learning rate that was chosen; without figures if a run of it failed."""

    method: str
    error: str | None = None
    """Of its first run that failed."""
    failed: int = 0
    """Runs that failed."""
    learning_rate: float | None = None
    choice: Mapping[str, float] = field(default_factory=dict)
    """Mean accuracy on the choice rows by learning rate, over the seeds that all rates were tried with."""
    seeds: int = 0
    accuracy: Spread | None = None
    accuracy_interval: tuple[float, float] | None = None
    """95 %, bootstrap over the rows of scores that are averaged over the seeds."""
    label_loyalty: Spread | None = None
    gap_closed: intervals.Estimate | None = None
    retention: intervals.Estimate | None = None
    parameters: int | None = None
    steps: int | None = None
    seconds: Spread | None = None
    against: Mapping[str, Against] = field(default_factory=dict)


def choose(rows: Sequence[Row]) -> tuple[float | None, dict[str, float]]:
    """The learning rate with the best mean accuracy on the choice rows, the first of equals, and all those means.

    Args:
        rows: every run of one method. A rate of which a run failed is out: the seeds that are left are not those of
            the other methods. Where rates were tried with the first seed alone, it alone is what they are compared by.

    Returns:
        None and no means if no rate was finished by every seed.
    """
    by_rate: dict[float, dict[int, Row]] = {}
    for row in rows:
        if row.learning_rate is not None:
            by_rate.setdefault(row.learning_rate, {})[row.seed] = row
    seeds = {row.seed for row in rows}
    finished = {rate: own for rate, own in by_rate.items() if all(row.finished for row in own.values())}
    whole = [rate for rate, own in finished.items() if own.keys() == seeds]
    if not whole:
        return None, {}
    shared = set.intersection(*(set(own) for own in finished.values()))
    scored = {rate: [own[seed].choice_accuracy for seed in sorted(shared)] for rate, own in finished.items()}
    means = {rate: mean(score for score in own if score is not None) for rate, own in scored.items() if None not in own}
    best = max(whole, key=lambda rate: means[rate]) if all(rate in means for rate in whole) else whole[0]
    return best, {f"{rate:g}": score for rate, score in means.items()}


def summarise(rows: Sequence[Row], labels: Sequence[int], *, seed: int = 0) -> list[Summary]:
    """Each method in the order of the rows, the teacher among them.

    Args:
        rows: of every method, learning rate and seed, each with the same seeds, or further seeds at the chosen rate
            alone; and the teacher's, one for each seed or one for all.
        labels: (row,) class ids of the test rows.
        seed: of the resampling.

    Returns:
        Each method is compared with `alone` and with the first method, which is named before anything is measured:
        the best one is found on the test rows, and a comparison with it would be biased.
    """
    truth = np.asarray(labels)
    names = list(dict.fromkeys(row.method for row in rows))
    chosen = {name: _chosen([row for row in rows if row.method == name]) for name in names}
    scores = {
        name: np.array([np.asarray(row.predictions) == truth for row in own], np.float64)
        for name, own in chosen.items()
        if own
    }
    against = _against(scores, [name for name in names if name not in (ALONE, TEACHER)], seed)
    return [
        _summary(name, [row for row in rows if row.method == name], chosen[name], scores, against.get(name, {}), seed)
        for name in names
    ]


def _chosen(rows: Sequence[Row]) -> list[Row]:
    """The runs at the learning rate that was chosen, by seed."""
    rate, _ = choose(rows)
    own = [row for row in rows if row.finished and row.learning_rate == rate]  # of the teacher, None
    return sorted(own, key=lambda row: row.seed)


def _summary(
    name: str,
    rows: Sequence[Row],
    own: Sequence[Row],
    scores: Mapping[str, Scores],
    against: Mapping[str, Against],
    seed: int,
) -> Summary:
    failed = [row for row in rows if not row.finished]
    error = failed[0].error if failed else None
    if not own:
        return Summary(method=name, error=error, failed=len(failed))
    by_row = {other: found.mean(0) for other, found in scores.items()}
    student = name not in (ALONE, TEACHER)
    rate, means = choose(rows)
    return Summary(
        method=name,
        error=error,
        failed=len(failed),
        learning_rate=rate,
        choice=means,
        seeds=len(own),
        accuracy=_spread([row.accuracy for row in own]),
        accuracy_interval=intervals.mean(by_row[name], seed=seed).interval,
        label_loyalty=_spread([row.label_loyalty for row in own]),
        gap_closed=intervals.gap_closed(by_row[name], by_row[TEACHER], by_row[ALONE], seed=seed)
        if student and ALONE in by_row
        else None,
        retention=intervals.retention(by_row[name], by_row[TEACHER], seed=seed) if name != TEACHER else None,
        parameters=own[0].parameters,
        steps=own[0].steps,
        seconds=_spread([row.seconds for row in own]),
        against=against,
    )


def _spread(values: Sequence[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Spread(mean=mean(known), sd=stdev(known) if len(known) > 1 else None)


def _against(scores: Mapping[str, Scores], names: Sequence[str], seed: int) -> dict[str, dict[str, Against]]:
    """By method and by the one it is compared with."""
    found: dict[str, dict[str, Against]] = {name: {} for name in names}
    for other in (ALONE, *names[:1]):
        compared = [name for name in names if name != other and name in scores and other in scores]
        p_rows = {name: paired.sign_flip(scores[name], scores[other]) for name in compared}
        p_seeds = {name: p for name in compared if (p := paired.over_seeds(scores[name], scores[other])) is not None}
        rows_holm, seeds_holm = paired.holm(p_rows), paired.holm(p_seeds)
        for name in compared:
            gained = intervals.gain(scores[name].mean(0), scores[other].mean(0), seed=seed)
            found[name][other] = Against(
                difference=float(scores[name].mean() - scores[other].mean()),
                interval=gained.interval,
                p_rows=p_rows[name],
                p_rows_holm=rows_holm[name],
                p_seeds=p_seeds.get(name),
                p_seeds_holm=seeds_holm.get(name),
            )
    return found
