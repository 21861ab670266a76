"""What the metrics share: their description to `evaluate`, a refusal of no rows, packages that may be missing."""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

import datasets
import evaluate

from hf_compress.errors import ConfigurationError, MismatchError

TEXTS = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
ONE_OR_MANY = [
    datasets.Features({"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}),
    TEXTS,
]
"""One reference a row, or several."""


class Offline(evaluate.Metric):  # type: ignore[misc]  # evaluate ships no types
    """A metric whose description is its docstring; `score` computes what `evaluate` calls `_compute`."""

    CITATION: ClassVar[str] = ""
    INPUTS: ClassVar[str] = ""
    """What a row holds, for `evaluate`'s help."""
    FEATURES: ClassVar[datasets.Features | list[datasets.Features]]

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=str(type(self).__doc__),
            citation=self.CITATION,
            inputs_description=self.INPUTS,
            features=self._features(),
        )

    def _features(self) -> datasets.Features | list[datasets.Features]:
        return self.FEATURES

    def _infer_feature_from_batch(self, batch: dict[str, Any]) -> datasets.Features:
        """Refuses a missing input, and no rows where the first row decides the kind, before evaluate stumbles."""
        for name, column in batch.items():
            if column is None:
                raise MismatchError(f"{self.name}: {name} is missing. Expected {self.INPUTS}.")
            if isinstance(self.features, list):
                self._check_rows(column)
        return super()._infer_feature_from_batch(batch)

    def _compute(self, **given: Any) -> Any:
        self._check_rows(given[self._feature_names()[0]])
        return self.score(**given)

    def _check_rows(self, column: Any) -> None:
        if not len(column):
            raise MismatchError(f"{self.name}: there is no row to score. Check the data set and its row limit.")

    def score(self, *args: Any, **given: Any) -> Any:
        """The result from all rows and the arguments of `compute`, all by name."""
        raise NotImplementedError


def needs(metric: str, module: str, package: str) -> Any:
    """The module, of a package that comes with the extra `metrics`.

    Raises:
        ConfigurationError: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigurationError(
            f'{metric}: the package {package} is missing ({error}). Run `pip install "hf-compress[metrics]"`, or '
            f"`pip install {package}` alone."
        ) from error
