"""Whether a classifier is right as often as it says.

Naeini et al.: Obtaining Well Calibrated Probabilities Using Bayesian Binning, AAAI 2015; Guo et al.: On Calibration of
Modern Neural Networks, ICML 2017, arXiv:1706.04599, section 2.

    ECE = Σ_b  n_b / n · | accuracy(b) - mean confidence(b) |

over 15 bins b of equal width of the confidence (0, 1/15], (1/15, 2/15], ..., (14/15, 1], as Guo et al. take. The
confidence of a row is the probability of its chosen class. The error of few rows is overestimated, as chance moves the
accuracy of every bin: 0 is not reached by a calibrated model either. Labels may also be a teacher's decisions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax

from hf_compress.errors import MismatchError, NumericalError

Floats = NDArray[np.float64]

BINS = 15


def confidence_rows(logits: ArrayLike) -> Floats:
    """Probability of each row's most likely class.

    Args:
        logits: (row, class), logits or log-probabilities; -inf excludes a class.

    Returns:
        (row,) in [1/classes, 1].

    Raises:
        MismatchError: if the shape is not (row, class), or there is no row.
        NumericalError: if a row holds a NaN or +inf, or excludes every class.
    """
    values = np.asarray(logits, np.float64)
    if values.ndim != 2 or values.size == 0:
        raise MismatchError(f"calibration: logits {values.shape}, expected (row, class) with at least one row.")
    bad = ~np.isfinite(values.max(-1))  # NaN wins a maximum
    if bad.any():
        row = int(bad.argmax())
        raise NumericalError(f"calibration: the logits of row {row} are {values[row][:8]}. Look for NaN weights.")
    return np.asarray(softmax(values, axis=-1).max(-1))


def calibration_error(logits: ArrayLike, labels: ArrayLike) -> float:
    """Expected calibration error, in [0, 1]: how far apart what is claimed and what is right are, mean over the rows.

    Args:
        logits: (row, class).
        labels: (row,) class ids.

    Raises:
        MismatchError, NumericalError: as `confidence_rows`; also if there is not one label a row.
    """
    confidence, true = confidence_rows(logits), np.asarray(labels)
    if true.shape != confidence.shape:
        raise MismatchError(f"calibration: labels {true.shape} for {len(confidence)} rows, expected one each.")
    correct = np.asarray(np.asarray(logits).argmax(-1) == true, np.float64)
    return float(binned_error(confidence, correct))


def binned_error(confidence: Floats, correct: Floats, axis: int = -1) -> Floats:
    """The error from (..., row) confidences and 0/1 scores, over the rows of each of the leading places."""
    gap = np.zeros(())
    bins = np.clip(np.ceil(confidence * BINS), 1, BINS)
    for each in range(1, BINS + 1):
        gap = gap + np.abs(((correct - confidence) * (bins == each)).sum(axis))
    return np.asarray(gap / confidence.shape[axis])
