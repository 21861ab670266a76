"""95 % intervals of scores and of the figures that compare models on the same rows.

Rows are resampled with replacement (percentile bootstrap, Efron & Tibshirani 1993, chapter 13). Models that are
compared are resampled together: row i of the student goes with row i of the teacher, so what makes a row hard for
both cancels.

    retention   = student / teacher
    gap closed  = (student - alone) / (teacher - alone)      alone: the student's start, trained without a teacher
    gain        = student - alone

A quotient has no interval, or no value, where its denominator cannot be told from 0; no figure has one where every
resample gives the same, because no width would claim certainty. The estimate says so in `note`, never with a NaN.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import DegenerateDataWarning, binomtest, bootstrap, rankdata

from hf_compress.errors import MismatchError

from . import calibration

Floats = NDArray[np.float64]

RESAMPLES = 2000
"""Enough for the second digit of a 95 % bound; 1,500 rows take about 0.05 s."""
UNDEFINED = 0.025
"""Share of resamples with a denominator of 0 or below from which a quotient has no 95 % interval."""
ROUNDED = 1e-12
"""By how much resamples of one value differ: sums of rows in another order are rounded otherwise."""
_BLOCK = 2**21
"""Values drawn at once: 16 MiB of float64."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure with its 95 % interval; None where there is none, with the reason."""

    value: float | None
    interval: tuple[float, float] | None
    note: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistic:
    """A figure of some rows that can be resampled: columns of one value a row, and what is computed of them."""

    columns: tuple[Floats, ...]
    of: Callable[..., Any]
    """`of(*columns, axis=-1)`: over that axis; NaN where the figure is undefined."""


def average(rows: ArrayLike) -> Statistic:
    """Mean of (row,) values, e.g. accuracy."""
    return Statistic(columns=_columns(rows), of=np.mean)


def share(parts: ArrayLike, wholes: ArrayLike) -> Statistic:
    """Sum of (row,) parts over the sum of (row,) wholes, e.g. 2·hits over predicted + true entities: micro-F1."""

    def statistic(parts: Floats, wholes: Floats, axis: int = -1) -> Floats:
        above, below = parts.sum(axis), wholes.sum(axis)
        return np.where(below > 0, above / np.where(below > 0, below, 1.0), np.nan)

    return Statistic(columns=_columns(parts, wholes), of=statistic)


def pearson(one: ArrayLike, other: ArrayLike) -> Statistic:
    """Pearson's correlation of (row,) values; undefined where either is constant."""

    def statistic(x: Floats, y: Floats, axis: int = -1) -> Floats:
        varied = (x.max(axis) > x.min(axis)) & (y.max(axis) > y.min(axis))
        x, y = x - x.mean(axis, keepdims=True), y - y.mean(axis, keepdims=True)
        spread = np.sqrt((x * x).sum(axis) * (y * y).sum(axis))
        return np.where(varied, (x * y).sum(axis) / np.where(varied, spread, 1.0), np.nan)

    return Statistic(columns=_columns(one, other), of=statistic)


def spearman(one: ArrayLike, other: ArrayLike) -> Statistic:
    """Spearman's correlation of (row,) values, equal ones sharing their mean rank; undefined as `pearson`."""
    linear = pearson(one, other)

    def statistic(x: Floats, y: Floats, axis: int = -1) -> Floats:
        return np.asarray(linear.of(rankdata(x, axis=axis), rankdata(y, axis=axis), axis=axis))

    return Statistic(columns=linear.columns, of=statistic)


def estimate(figure: Statistic, *, seed: int = 0) -> Estimate:
    """The figure with its interval."""
    return _estimate(figure.of, *figure.columns, seed=seed, undefined="it is not defined on these rows")


def mean(rows: ArrayLike, *, seed: int = 0) -> Estimate:
    """Mean of one value a row, e.g. accuracy from `predictions == labels`.

    Args:
        rows: (row,), at least one.
        seed: of the resampling.

    Returns:
        If all rows are 0 or all are 1, resampling would give an interval of no width; Wilson's takes its place.
    """
    values = _columns(rows)[0]
    value = float(values.mean())
    if (values == values[0]).all() and value in (0.0, 1.0):
        bounds = binomtest(round(values.sum()), len(values)).proportion_ci(method="wilson")
        return Estimate(value=value, interval=(float(bounds.low), float(bounds.high)), note="Wilson's interval")
    return _estimate(np.mean, values, seed=seed)


def macro_f1(predictions: ArrayLike, labels: ArrayLike, *, seed: int = 0) -> Estimate:
    """Macro-F1 of (row,) class ids, as `metrics.F1Macro`; each resample averages over the classes found in it."""
    p, y = _columns(predictions, labels)
    classes = np.union1d(p, y)

    def statistic(p: Floats, y: Floats, axis: int = -1) -> Floats:
        total, present = np.zeros(()), np.zeros(())
        for c in classes:
            hit = ((p == c) & (y == c)).sum(axis)
            seen = (p == c).sum(axis) + (y == c).sum(axis)
            total = total + 2 * hit / np.maximum(seen, 1)
            present = present + (seen > 0)
        return np.asarray(total / present)

    return _estimate(statistic, p, y, seed=seed)


def matthews_correlation(predictions: ArrayLike, labels: ArrayLike, *, seed: int = 0) -> Estimate:
    """Matthews correlation of (row,) class ids, as `metrics.MatthewsCorrelation`; 0 where either is one class only."""
    p, y = _columns(predictions, labels)
    classes = np.union1d(p, y)

    def statistic(p: Floats, y: Floats, axis: int = -1) -> Floats:
        rows = p.shape[axis]
        given = [(p == c).mean(axis) for c in classes]
        true = [(y == c).mean(axis) for c in classes]
        together = (p == y).mean(axis) - sum(g * t for g, t in zip(given, true, strict=True))
        spread = (1 - sum(g * g for g in given)) * (1 - sum(t * t for t in true))
        defined = spread > 1 / (2 * rows) ** 2  # a single other row on both sides gives about (2 / rows)²
        return np.asarray(np.where(defined, together / np.sqrt(np.where(defined, spread, 1.0)), 0.0))

    return _estimate(statistic, p, y, seed=seed)


def calibration_error(confidence: ArrayLike, correct: ArrayLike, *, seed: int = 0) -> Estimate:
    """Expected calibration error of (row,) confidences and 0/1 scores, as `calibration.calibration_error`.

    Chance raises the error of a resample above that of the rows as it raised theirs above the truth. So the resampled
    bounds are reflected at the value (basic bootstrap, Davison & Hinkley 1997, section 5.2), not below 0.
    """
    c, right = _columns(confidence, correct)
    found = _estimate(calibration.binned_error, c, right, seed=seed)
    if found.value is None or found.interval is None:
        return found
    low, high = found.interval
    reflected = max(0.0, 2 * found.value - high), max(0.0, 2 * found.value - low)
    return Estimate(value=found.value, interval=reflected, note="basic bootstrap")


def gain(student: ArrayLike | Statistic, alone: ArrayLike | Statistic, *, seed: int = 0) -> Estimate:
    """Student minus baseline, of the same rows; an interval above 0 says that the student wins.

    Args:
        student, alone: (row,) scores, whose means are compared, or figures.
    """
    return _combined(lambda s, a: s - a, student, alone, seed=seed, undefined="one of the two is not defined")


def mcnemar(student: ArrayLike, alone: ArrayLike) -> float:
    """Exact two-sided p-value of McNemar's test on (row,) 0/1 scores: only rows that one of the two gets right count.

    Returns:
        in (0, 1]; 1 if the two are right on the same rows.
    """
    s, a = _columns(student, alone)
    wins, losses = int(((s == 1) & (a == 0)).sum()), int(((s == 0) & (a == 1)).sum())
    return 1.0 if wins + losses == 0 else float(binomtest(wins, wins + losses).pvalue)


def retention(student: ArrayLike | Statistic, teacher: ArrayLike | Statistic, *, seed: int = 0) -> Estimate:
    """Student's score over the teacher's, of the same rows; 1 is all of it. Arguments as `gain`."""
    return _combined(_quotient, student, teacher, seed=seed, undefined="the teacher's score is not above 0")


def gap_closed(
    student: ArrayLike | Statistic, teacher: ArrayLike | Statistic, alone: ArrayLike | Statistic, *, seed: int = 0
) -> Estimate:
    """Share of the teacher's lead over the baseline that the student has made up; arguments as `gain`.

    Returns:
        1 at the teacher's level, 0 at the baseline's; may be negative or above 1. No value if the teacher does not
        lead; a value without an interval if its lead could be chance.
    """
    return _combined(
        lambda s, t, a: _quotient(s - a, t - a),
        *(student, teacher, alone),
        seed=seed,
        undefined="the teacher's lead over the baseline is not above 0",
    )


def _quotient(above: Floats, below: Floats) -> Floats:
    """Undefined where the denominator is 0 or below: differences of means of equal rows are 0 up to rounding."""
    defined = below > 1e-12
    return np.where(defined, above / np.where(defined, below, 1.0), np.nan)


def _combined(combine: Callable[..., Floats], *scores: ArrayLike | Statistic, seed: int, undefined: str) -> Estimate:
    """What is computed of several models' figures, whose rows are resampled together."""
    figures = [score if isinstance(score, Statistic) else average(score) for score in scores]
    ends = np.cumsum([len(figure.columns) for figure in figures])[:-1]

    def statistic(*columns: Floats, axis: int = -1) -> Floats:
        parts = np.split(np.arange(len(columns)), ends)
        values = [
            np.asarray(figure.of(*(columns[i] for i in part), axis=axis))
            for figure, part in zip(figures, parts, strict=True)
        ]
        return np.asarray(combine(*values))

    columns = _columns(*(column for figure in figures for column in figure.columns))
    return _estimate(statistic, *columns, seed=seed, undefined=undefined)


def _estimate(
    statistic: Callable[..., Any], *columns: Floats, seed: int, undefined: str = "it is not defined"
) -> Estimate:
    """The statistic of the columns and its interval; the statistic is NaN where it is undefined."""
    value = float(statistic(*columns, axis=-1))
    if np.isnan(value):
        return Estimate(value=None, interval=None, note=undefined)
    if len(columns[0]) == 1:
        return Estimate(value=value, interval=None, note="one row says nothing of its spread")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # NaN resamples, counted below
        drawn = bootstrap(
            columns,
            statistic,
            n_resamples=RESAMPLES,
            batch=max(1, _BLOCK // len(columns[0])),
            vectorized=True,
            paired=True,
            axis=-1,
            method="percentile",
            random_state=np.random.default_rng(seed),
        ).bootstrap_distribution
    if (lost := float(np.isnan(drawn).mean())) > UNDEFINED:
        note = f"{undefined} in {lost:.0%} of the resamples"
        return Estimate(value=value, interval=None, note=note)
    low, high = np.nanquantile(drawn, (0.025, 0.975))
    if high - low <= ROUNDED * max(1.0, abs(value)):
        return Estimate(value=value, interval=None, note="every resample gives the same")
    return Estimate(value=value, interval=(float(low), float(high)))


def _columns(*rows: ArrayLike) -> tuple[Floats, ...]:
    columns = tuple(np.asarray(column, np.float64) for column in rows)
    shapes = [column.shape for column in columns]
    if len(set(shapes)) > 1 or columns[0].ndim != 1 or columns[0].size == 0:
        raise MismatchError(
            f"intervals: expected (row,) arrays of one length, at least one row, got shapes {shapes}. "
            "Score all models on the same rows."
        )
    return columns
