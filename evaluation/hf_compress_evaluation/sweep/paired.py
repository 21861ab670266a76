"""p-values of two models that were scored on the same rows with the same seeds, and their correction for many methods.

Over rows: a sign-flip (permutation) test. Under the null hypothesis the two models of a row could be exchanged, so the
row's difference, summed over the seeds, has either sign with probability 1/2. With one seed this is McNemar's exact
test (McNemar 1947). It says whether other rows would show the same, for these trained models.

Over seeds: Student's paired t-test of the accuracies. It says whether other seeds would show the same, on these rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.signal import convolve
from scipy.stats import binom, ttest_rel

from hf_compress.errors import MismatchError


def sign_flip(one: ArrayLike, two: ArrayLike) -> float:
    """Exact two-sided p-value of the difference in mean score, over the rows.

    Args:
        one: (seed, row) of 0 or 1.
        two: (seed, row), of the same seeds and rows.

    Returns:
        in [0, 1]; 1 if the two score the same in every row.

    Raises:
        MismatchError: if the shapes differ or are not (seed, row).
    """
    a, b = _pair(one, two)
    difference = np.rint((a - b).sum(0)).astype(np.int64)
    sizes, counts = np.unique(np.abs(difference[difference != 0]), return_counts=True)
    total = int((sizes * counts).sum())
    chances = np.ones(1)  # of the sums -total, …, total
    for size, count in zip(sizes, counts, strict=True):
        flipped = np.zeros(2 * size * count + 1)
        flipped[:: 2 * size] = binom.pmf(np.arange(count + 1), count, 0.5)
        chances = convolve(chances, flipped)
    extreme = np.abs(np.arange(-total, total + 1)) >= abs(int(difference.sum()))
    return float(np.clip(chances[extreme].sum(), 0.0, 1.0))  # a long convolution rounds


def over_seeds(one: ArrayLike, two: ArrayLike) -> float | None:
    """Two-sided p-value of Student's paired t-test on the mean scores of each seed.

    Args:
        one: (seed, row).
        two: (seed, row), of the same seeds and rows.

    Returns:
        in (0, 1]; None with one seed, or where every seed gives the same difference, which has no spread to test it
        by; 1 if that difference is 0.
    """
    a, b = (scores.mean(1) for scores in _pair(one, two))
    difference = a - b
    if len(difference) < 2:
        return None
    if np.ptp(difference) < 1e-12:
        return 1.0 if abs(difference[0]) < 1e-12 else None
    return float(ttest_rel(a, b).pvalue)


def holm(values: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected for their number (Holm 1979): below a level α, wrong ones appear with probability at most α.

    The i-th smallest of m is multiplied by m - i + 1; none becomes smaller than one before it, or larger than 1.
    """
    found: dict[str, float] = {}
    least = 0.0
    for place, name in enumerate(sorted(values, key=lambda each: values[each])):
        least = max(least, min(1.0, (len(values) - place) * values[name]))
        found[name] = least
    return {name: found[name] for name in values}


def _pair(one: ArrayLike, two: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    a, b = np.asarray(one, np.float64), np.asarray(two, np.float64)
    if a.shape != b.shape or a.ndim != 2 or a.size == 0:
        raise MismatchError(
            f"sweep: expected (seed, row) scores of one shape, got {a.shape} and {b.shape}. Score both on the same "
            "rows, with the same seeds."
        )
    return a, b
