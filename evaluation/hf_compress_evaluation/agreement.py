"""How closely a student's predictions follow its teacher's; gold labels play no part.

Xu et al.: Beyond Preserved Accuracy: Evaluating Loyalty and Robustness of BERT Compression, EMNLP 2021,
arXiv:2109.03228.

    label loyalty        L_l = mean_n [ argmax P_T = argmax P_S ]          also known as top-1 agreement
    probability loyalty  L_p = mean_n ( 1 - sqrt(JS(P_T ‖ P_S)) )
                         JS(P ‖ Q) = KL(P ‖ M)/2 + KL(Q ‖ M)/2,  M = (P + Q)/2

Of models that give a number a row, regression loyalty is Pearson's correlation of the two models' scores. Avram et al.:
Distilling the Knowledge of Romanian BERTs Using Multiple Teachers, LREC 2022, arXiv:2112.12650, introduce the name
without a formula; the correlation is our reading. It ignores scale and offset, which `score_difference` shows.

For the first two the authors call `scipy.spatial.distance.jensenshannon`, which already returns the square root, in
nats. Ours differs in one point: a divergence that rounding makes negative is 0 instead of NaN.

Functions whose name ends in `_rows` give one value a row, which is what an interval is made from.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_softmax, rel_entr, softmax
from scipy.stats import pearsonr, spearmanr

from hf_compress.errors import MismatchError, NumericalError

Floats = NDArray[np.float64]


def label_loyalty_rows(student_logits: ArrayLike, teacher_logits: ArrayLike) -> Floats:
    """Whether both models choose the same class.

    Args:
        student_logits: (row, class), logits or log-probabilities; -inf excludes a class.
        teacher_logits: (row, class).

    Returns:
        (row,) of 1.0 or 0.0. Among equal logits the first class counts as chosen.

    Raises:
        MismatchError: if the shapes differ, are not (row, class), or there is no row.
        NumericalError: if a row holds a NaN or +inf, or excludes every class.
    """
    student, teacher = _pair(student_logits, teacher_logits)
    return np.asarray(student.argmax(-1) == teacher.argmax(-1), np.float64)


def label_loyalty(student_logits: ArrayLike, teacher_logits: ArrayLike) -> float:
    """Fraction of rows in which both models choose the same class, in [0, 1]; arguments as `label_loyalty_rows`."""
    return float(label_loyalty_rows(student_logits, teacher_logits).mean())


def js_distance(student_probs: ArrayLike, teacher_probs: ArrayLike, *, base: float = math.e) -> Floats:
    """Square root of the Jensen-Shannon divergence, row by row.

    Args:
        student_probs: (row, class), each row sums to 1.
        teacher_probs: (row, class).
        base: of the logarithm, above 1: e gives nats, 2 gives bits.

    Returns:
        (row,) in [0, sqrt(log_base 2)]: [0, 0.833] in nats, [0, 1] in bits.
    """
    student, teacher = np.asarray(student_probs, np.float64), np.asarray(teacher_probs, np.float64)
    middle = (student + teacher) / 2
    divergence = (rel_entr(teacher, middle) + rel_entr(student, middle)).sum(-1) / 2
    return np.asarray(np.sqrt(np.maximum(divergence, 0.0) / math.log(base)))


def probability_loyalty_rows(student_logits: ArrayLike, teacher_logits: ArrayLike, *, base: float = math.e) -> Floats:
    """One minus the Jensen-Shannon distance of the two predicted distributions.

    Args:
        student_logits: (row, class), logits or log-probabilities; -inf excludes a class.
        teacher_logits: (row, class).
        base: of the logarithm; e is the authors' choice.

    Returns:
        (row,) in [1 - sqrt(log_base 2), 1]: [0.167, 1] in nats, [0, 1] in bits.

    Raises:
        MismatchError, NumericalError: as `label_loyalty_rows`.
        ValueError: if the base is not above 1.
    """
    if not 1 < base < math.inf:
        raise ValueError(f"probability_loyalty: the logarithm's base must be above 1 and finite, got {base}.")
    student, teacher = _pair(student_logits, teacher_logits)
    return 1.0 - js_distance(softmax(student, axis=-1), softmax(teacher, axis=-1), base=base)


def probability_loyalty(student_logits: ArrayLike, teacher_logits: ArrayLike, *, base: float = math.e) -> float:
    """Mean of `probability_loyalty_rows`: 1 if all distributions agree, 1 - sqrt(log_base 2) if none overlap."""
    return float(probability_loyalty_rows(student_logits, teacher_logits, base=base).mean())


def kl_rows(student_logits: ArrayLike, teacher_logits: ArrayLike) -> Floats:
    """KL divergence from the teacher's to the student's distribution, KL(P_T ‖ P_S), at temperature 1.

    Args:
        student_logits: (row, class), logits or log-probabilities.
        teacher_logits: (row, class).

    Returns:
        (row,) nats, at least 0; inf where the student excludes a class that the teacher does not.

    Raises:
        MismatchError, NumericalError: as `label_loyalty_rows`.
    """
    student, teacher = _pair(student_logits, teacher_logits)
    log_s, log_t = log_softmax(student, axis=-1), log_softmax(teacher, axis=-1)
    p_t = np.exp(log_t)
    seen = p_t > 0  # 0·log 0 = 0, also if both exclude the class
    terms = np.zeros_like(p_t)
    terms[seen] = p_t[seen] * (log_t[seen] - log_s[seen])
    return np.asarray(np.maximum(terms.sum(-1), 0.0))


def kl(student_logits: ArrayLike, teacher_logits: ArrayLike) -> float:
    """Mean of `kl_rows`, in nats."""
    return float(kl_rows(student_logits, teacher_logits).mean())


def regression_loyalty(student_scores: ArrayLike, teacher_scores: ArrayLike) -> float:
    """Pearson's correlation of the two models' scores.

    Args:
        student_scores: (row,), at least two.
        teacher_scores: (row,).

    Returns:
        in [-1, 1]; 1 if the student's scores are the teacher's up to a positive scale and an offset.

    Raises:
        MismatchError: if the shapes differ or are not (row,), or all scores of a model are equal, so that the
            correlation is not defined.
        NumericalError: if a score is NaN or infinite.
    """
    return float(pearsonr(*_varied_scores("regression_loyalty", student_scores, teacher_scores)).statistic)


def rank_loyalty(student_scores: ArrayLike, teacher_scores: ArrayLike) -> float:
    """Spearman's correlation of the two models' scores, in [-1, 1]; arguments as `regression_loyalty`."""
    return float(spearmanr(*_varied_scores("rank_loyalty", student_scores, teacher_scores)).statistic)


def score_difference_rows(student_scores: ArrayLike, teacher_scores: ArrayLike) -> Floats:
    """(row,) absolute difference of the two models' scores, in the scores' unit; arguments as `regression_loyalty`.

    Raises:
        MismatchError, NumericalError: as `regression_loyalty`; constant scores are taken.
    """
    student, teacher = _scores("score_difference", student_scores, teacher_scores)
    return np.asarray(np.abs(student - teacher))


def score_difference(student_scores: ArrayLike, teacher_scores: ArrayLike) -> float:
    """Mean of `score_difference_rows`, in the scores' unit: 0 if the models agree."""
    return float(score_difference_rows(student_scores, teacher_scores).mean())


def _scores(name: str, student_scores: ArrayLike, teacher_scores: ArrayLike) -> tuple[Floats, Floats]:
    student, teacher = np.asarray(student_scores, np.float64), np.asarray(teacher_scores, np.float64)
    if student.shape != teacher.shape or student.ndim != 1 or student.size == 0:
        raise MismatchError(
            f"{name}: student scores {student.shape} and teacher scores {teacher.shape} must be two (row,) arrays of "
            "one length with at least one row. Score both models on the same rows."
        )
    for who, scores in (("student", student), ("teacher", teacher)):
        if not np.isfinite(scores).all():
            row = int((~np.isfinite(scores)).argmax())
            raise NumericalError(f"{name}: the {who}'s score of row {row} is {scores[row]}. Look for NaN weights.")
    return student, teacher


def _varied_scores(name: str, student_scores: ArrayLike, teacher_scores: ArrayLike) -> tuple[Floats, Floats]:
    student, teacher = _scores(name, student_scores, teacher_scores)
    for who, scores in (("student", student), ("teacher", teacher)):
        if (scores == scores[0]).all():
            raise MismatchError(
                f"{name}: the {who} gives {scores[0]:g} for all {len(scores)} rows, so that the correlation is not "
                "defined. Look whether it has collapsed, or score more rows."
            )
    return student, teacher


def _pair(student_logits: ArrayLike, teacher_logits: ArrayLike) -> tuple[Floats, Floats]:
    student, teacher = np.asarray(student_logits, np.float64), np.asarray(teacher_logits, np.float64)
    if student.shape != teacher.shape or student.ndim != 2 or student.size == 0:
        raise MismatchError(
            f"agreement: student logits {student.shape} and teacher logits {teacher.shape} must be two (row, class) "
            "arrays of one shape with at least one row. Score both models on the same rows and the same classes."
        )
    for who, logits in (("student", student), ("teacher", teacher)):
        bad = ~np.isfinite(logits.max(-1))  # NaN wins a maximum
        if bad.any():
            row = int(bad.argmax())
            raise NumericalError(
                f"agreement: the {who}'s logits of row {row} are {logits[row][:8]}; no distribution follows from "
                "them. Look for NaN weights or an overflow in half precision."
            )
    return student, teacher
