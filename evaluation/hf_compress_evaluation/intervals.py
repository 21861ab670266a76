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
from scipy.stats import DegenerateDataWarning, binomtest, bootstrap

from hf_compress.errors import MismatchError

from . import calibration

Floats = NDArray[np.float64]

RESAMPLES = 2000
"""Enough for the second digit of a 95 % bound; 1,500 rows take about 0.05 s."""
UNDEFINED = 0.025
"""Share of resamples with a denominator of 0 or below from which a quotient has no 95 % interval."""
_BLOCK = 2**21
"""Values drawn at once: 16 MiB of float64."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure with its 95 % interval; None where there is none, with the reason."""

    value: float | None
    interval: tuple[float, float] | None
    note: str | None = None


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


def gain(student: ArrayLike, alone: ArrayLike, *, seed: int = 0) -> Estimate:
    """Student minus baseline, from (row,) scores of the same rows; an interval above 0 says that the student wins."""
    s, a = _columns(student, alone)

    def difference(s: Floats, a: Floats, axis: int = -1) -> Floats:
        return np.asarray(s.mean(axis) - a.mean(axis))

    return _estimate(difference, s, a, seed=seed)


def mcnemar(student: ArrayLike, alone: ArrayLike) -> float:
    """Exact two-sided p-value of McNemar's test on (row,) 0/1 scores: only rows that one of the two gets right count.

    Returns:
        in (0, 1]; 1 if the two are right on the same rows.
    """
    s, a = _columns(student, alone)
    wins, losses = int(((s == 1) & (a == 0)).sum()), int(((s == 0) & (a == 1)).sum())
    return 1.0 if wins + losses == 0 else float(binomtest(wins, wins + losses).pvalue)


def retention(student: ArrayLike, teacher: ArrayLike, *, seed: int = 0) -> Estimate:
    """Student's mean score over the teacher's, from (row,) scores of the same rows; 1 is all of it."""
    s, t = _columns(student, teacher)
    return _quotient(lambda s, t: (s, t), s, t, seed=seed, denominator="the teacher's score")


def gap_closed(student: ArrayLike, teacher: ArrayLike, alone: ArrayLike, *, seed: int = 0) -> Estimate:
    """Share of the teacher's lead over the baseline that the student has made up, from (row,) scores.

    Returns:
        1 at the teacher's level, 0 at the baseline's; may be negative or above 1. No value if the teacher does not
        lead; a value without an interval if its lead could be chance.
    """
    s, t, a = _columns(student, teacher, alone)
    return _quotient(
        lambda s, t, a: (s - a, t - a), s, t, a, seed=seed, denominator="the teacher's lead over the baseline"
    )


def _quotient(parts: Callable[..., tuple[Floats, Floats]], *columns: Floats, seed: int, denominator: str) -> Estimate:
    """Quotient of two combinations of the columns' means; undefined where the denominator is 0 or below."""

    def statistic(*columns: Floats, axis: int = -1) -> Floats:
        above, below = parts(*(column.mean(axis) for column in columns))
        defined = below > 1e-12  # differences of means of equal rows are 0 up to rounding
        return np.where(defined, above / np.where(defined, below, 1.0), np.nan)

    return _estimate(statistic, *columns, seed=seed, denominator=denominator)


def _estimate(
    statistic: Callable[..., Any], *columns: Floats, seed: int, denominator: str = "the denominator"
) -> Estimate:
    """The statistic of the columns and its interval; the statistic is NaN where it is undefined."""
    value = float(statistic(*columns, axis=-1))
    if np.isnan(value):
        return Estimate(value=None, interval=None, note=f"{denominator} is not above 0")
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
    undefined = float(np.isnan(drawn).mean())
    if undefined > UNDEFINED:
        note = f"{denominator} is not above 0 in {undefined:.0%} of the resamples"
        return Estimate(value=value, interval=None, note=note)
    low, high = np.nanquantile(drawn, (0.025, 0.975))
    if low == high:
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
