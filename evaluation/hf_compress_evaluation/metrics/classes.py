"""Scores of class ids, and correlations of numbers, by scikit-learn and SciPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import datasets
import numpy as np
from numpy.typing import NDArray

from hf_compress.errors import MismatchError, UnknownNameError

from ._base import Offline

AVERAGES = ("binary", "micro", "macro", "weighted", "samples")
Average = Literal["binary", "micro", "macro", "weighted", "samples"]


class _Classes(Offline):
    """Of predicted and true class ids, one each a row; of lists of 0 and 1 with `config_name="multilabel"`."""

    INPUTS = "predictions: class ids; references: class ids"
    CITATION = """@article{scikit-learn,
  title = {Scikit-learn: Machine Learning in {P}ython},
  author = {Pedregosa, F. and Varoquaux, G. and Gramfort, A. and Michel, V. and Thirion, B. and Grisel, O. and others},
  journal = {Journal of Machine Learning Research},
  volume = {12},
  pages = {2825--2830},
  year = {2011}
}"""

    def _features(self) -> datasets.Features:
        kind = datasets.Value("int64")
        row = datasets.List(kind) if self.config_name == "multilabel" else kind
        return datasets.Features({"predictions": row, "references": row})


class Accuracy(_Classes):
    """Fraction of rows whose predicted class is the true one, in [0, 1]; their number with `normalize=False`.

    With `sample_weight` (row,) the rows' share of the weight. Of several labels all must be right.
    """

    def score(
        self,
        *,
        predictions: Sequence[int],
        references: Sequence[int],
        normalize: bool = True,
        sample_weight: Sequence[float] | None = None,
    ) -> dict[str, float]:
        from sklearn.metrics import accuracy_score

        found = accuracy_score(references, predictions, normalize=normalize, sample_weight=sample_weight)
        return {"accuracy": float(found)}


class F1(_Classes):
    """Harmonic mean of precision and recall, in [0, 1]; 0 where a class is neither predicted nor true.

    `average`: "binary", the class `pos_label` alone, which needs two classes; "micro", of the counts of all classes,
    equal to the accuracy where each row has one class; "macro", unweighted mean over the classes that are predicted or
    true somewhere; "weighted", mean by the number of true rows; None, an array of (class,), in the order of `labels`.

    >>> F1(keep_in_memory=True).compute(predictions=[0, 0, 1, 1, 0], references=[0, 1, 0, 1, 0])
    {'f1': 0.5}
    """

    def score(
        self,
        *,
        predictions: Sequence[int],
        references: Sequence[int],
        labels: Sequence[int] | None = None,
        pos_label: int = 1,
        average: Average | None = "binary",
        sample_weight: Sequence[float] | None = None,
    ) -> dict[str, float | NDArray[np.float64]]:
        from sklearn.metrics import f1_score

        if average is not None and average not in AVERAGES:
            raise UnknownNameError("average of f1", average, AVERAGES)
        if average == "binary" and self.config_name != "multilabel":
            found = np.union1d(predictions, references)
            if len(found) > 2:
                raise MismatchError(
                    f"f1: average='binary' scores one of two classes, but the rows hold {len(found)}. "
                    "Choose average='macro', 'micro' or 'weighted'."
                )
            if pos_label not in found:  # scikit-learn calls that an error where the rows hold two other classes
                return {"f1": 0.0}
        value = f1_score(
            references,
            predictions,
            labels=labels,
            pos_label=pos_label,
            average=average,
            sample_weight=sample_weight,
            zero_division=0.0,
        )
        return {"f1": np.asarray(value) if average is None else float(value)}


class F1Macro(_Classes):
    """Unweighted mean of the classes' F1, in [0, 1]; over the classes that are predicted or true somewhere.

    Ours: what `f1` gives with `average="macro"`, under a name of its own.
    """

    def score(self, *, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        from sklearn.metrics import f1_score

        return {"f1_macro": float(f1_score(references, predictions, average="macro", zero_division=0.0))}


class F1Micro(_Classes):
    """F1 of the counts of all classes together, in [0, 1]; equal to the accuracy where each row has one class.

    Ours: what `f1` gives with `average="micro"`, under a name of its own.
    """

    def score(self, *, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        from sklearn.metrics import f1_score

        return {"f1_micro": float(f1_score(references, predictions, average="micro", zero_division=0.0))}


class MatthewsCorrelation(_Classes):
    """Correlation of the predicted with the true class, in [-1, 1]; of more than two classes Gorodkin's R_K.

    0 is chance. It is also 0, by convention, where all predictions or all references are one class.
    """

    def score(
        self,
        *,
        predictions: Sequence[int],
        references: Sequence[int],
        sample_weight: Sequence[float] | None = None,
    ) -> dict[str, float]:
        from sklearn.metrics import matthews_corrcoef

        return {"matthews_correlation": float(matthews_corrcoef(references, predictions, sample_weight=sample_weight))}


class _Numbers(Offline):
    """Of two numbers a row."""

    INPUTS = "predictions: numbers; references: numbers"
    CITATION = """@article{scipy,
  title = {{SciPy} 1.0: Fundamental Algorithms for Scientific Computing in Python},
  author = {Virtanen, Pauli and Gommers, Ralf and Oliphant, Travis E. and Haberland, Matt and others},
  journal = {Nature Methods},
  volume = {17},
  pages = {261--272},
  year = {2020}
}"""
    FEATURES = datasets.Features({"predictions": datasets.Value("float64"), "references": datasets.Value("float64")})


class Pearsonr(_Numbers):
    """Pearson's linear correlation, in [-1, 1], and with `return_pvalue` its "p-value".

    Raises:
        MismatchError: for fewer than two rows, a NaN, or a constant, whose correlation is not defined.
    """

    def score(
        self, *, predictions: Sequence[float], references: Sequence[float], return_pvalue: bool = False
    ) -> dict[str, float]:
        from scipy.stats import pearsonr

        _check_varies("pearsonr", predictions, references)
        found = pearsonr(references, predictions)
        value = {"pearsonr": float(found[0])}
        return value | {"p-value": float(found[1])} if return_pvalue else value


class Spearmanr(_Numbers):
    """Correlation of the ranks, in [-1, 1], and with `return_pvalue` its "spearmanr_pvalue"; ties share a mean rank.

    Raises:
        MismatchError: for fewer than two rows, a NaN, or a constant, whose correlation is not defined.
    """

    def score(
        self, *, predictions: Sequence[float], references: Sequence[float], return_pvalue: bool = False
    ) -> dict[str, float]:
        from scipy.stats import spearmanr

        _check_varies("spearmanr", predictions, references)
        found = spearmanr(references, predictions)
        value = {"spearmanr": float(found[0])}
        return value | {"spearmanr_pvalue": float(found[1])} if return_pvalue else value


def _check_varies(metric: str, predictions: Sequence[float], references: Sequence[float]) -> None:
    for name, column in (("predictions", predictions), ("references", references)):
        values = np.asarray(column, np.float64)
        if not np.isfinite(values).all():
            row = int((~np.isfinite(values)).argmax())
            raise MismatchError(f"{metric}: row {row} of the {name} is {values[row]}. Mend or drop the row.")
        if len(values) < 2 or (values == values[0]).all():
            raise MismatchError(
                f"{metric}: the {name} are constant ({values[0]:g} in {len(values)} rows), so that the correlation is "
                "not defined. Look whether the model has collapsed, or score more rows."
            )
