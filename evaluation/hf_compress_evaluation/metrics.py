"""Metrics by name that need no network.

`evaluate.load("accuracy")` fetches a script from the hub; these are the same `evaluate.Metric` objects, with
scikit-learn inside and nothing to fetch, so `compute`, `add_batch` and `evaluate.combine` work offline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from hf_compress.errors import UnknownNameError

CITATION = """@article{scikit-learn,
  title = {Scikit-learn: Machine Learning in {P}ython},
  author = {Pedregosa, F. and Varoquaux, G. and Gramfort, A. and Michel, V. and Thirion, B. and Grisel, O. and others},
  journal = {Journal of Machine Learning Research},
  volume = {12},
  pages = {2825--2830},
  year = {2011}
}"""


class _ClassMetric(evaluate.Metric):  # type: ignore[misc]  # evaluate ships no types
    """Of predicted and true class ids, one each a row."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=str(type(self).__doc__),
            citation=CITATION,
            inputs_description="predictions: class ids; references: class ids",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )


class Accuracy(_ClassMetric):
    """Fraction of rows whose predicted class is the true one, in [0, 1]."""

    def _compute(self, *, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        from sklearn.metrics import accuracy_score

        return {"accuracy": float(accuracy_score(references, predictions))}


class MacroF1(_ClassMetric):
    """Unweighted mean of the classes' F1, in [0, 1]; over the classes that are predicted or true somewhere."""

    def _compute(self, *, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        from sklearn.metrics import f1_score

        return {"f1_macro": float(f1_score(references, predictions, average="macro", zero_division=0.0))}


METRICS: dict[str, type[_ClassMetric]] = {"accuracy": Accuracy, "f1_macro": MacroF1}


def load(name: str, **settings: Any) -> evaluate.Metric:
    """The metric of that name.

    Args:
        name: a key of `METRICS`.
        settings: of `evaluate.Metric`, e.g. `experiment_id`. Rows stay in memory unless `keep_in_memory=False`.

    Raises:
        UnknownNameError: with the nearest names.

    >>> load("accuracy").compute(predictions=[0, 1, 1, 0], references=[0, 1, 0, 0])
    {'accuracy': 0.75}
    """
    if name not in METRICS:
        raise UnknownNameError("metric", name, METRICS)
    return METRICS[name](**{"keep_in_memory": True} | settings)
