"""Texts with one number each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_compress import facts
from hf_compress.errors import MismatchError
from hf_compress_evaluation import agreement, intervals, quality
from hf_compress_evaluation.candidates import Candidate
from hf_compress_evaluation.examples import numbers, texts
from hf_compress_evaluation.task import Task, describe, read_data

from ._base import Figure, FigureScorer

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Numbered:
    """Texts and their numbers."""

    texts: tuple[str, ...]
    labels: Floats | None
    data: facts.Data


class Numbers(FigureScorer):
    """Correlation with the labels, and with the teacher's scores."""

    metrics = ("pearsonr", "spearmanr", "mean_squared_error")
    default = compared = ("pearsonr", "spearmanr")
    loyalty = ("regression_loyalty", "rank_loyalty", "score_difference")

    def check(self, candidates: Sequence[Candidate]) -> None:
        for one in candidates:
            if one.model.config.num_labels != 1:
                raise MismatchError(
                    f"{one.name} gives {one.model.config.num_labels} numbers a row, where the student gives one. "
                    "Compare models of one number a row."
                )

    def load(self, task: Task, config: Any) -> Numbered:
        rows, name = read_data(task)
        text, _, label = task.columns
        own = texts(rows, text, name=name)
        labels = None if label is None else numbers(rows, label, name=name)
        content = own if labels is None else zip(own, labels.tolist(), strict=True)
        data = describe(task, name, len(own), labelled=labels is not None, content=content)
        return Numbered(texts=own, labels=labels, data=data)

    def predict(self, one: Candidate, rows: Numbered, task: Task, *, progress: bool = False) -> Floats:
        given = quality.predict(
            one.model,
            one.tokenizer,
            rows.texts,
            batch_size=task.batch_size,
            max_length=task.max_length,
            progress=progress,
        )
        return given[:, 0].astype(np.float64)

    def figures(self, one: Candidate, said: Floats, rows: Numbered) -> dict[str, Figure]:
        assert rows.labels is not None  # asked before
        return correlations(said, rows.labels) | {
            "mean_squared_error": Figure(of=intervals.average((said - rows.labels) ** 2), unit="of the score, squared")
        }

    def likeness(self, own: Floats, teacher: Floats) -> dict[str, Figure]:
        found = correlations(own, teacher)
        near = intervals.average(agreement.score_difference_rows(own, teacher))
        return {
            "regression_loyalty": found["pearsonr"],
            "rank_loyalty": found["spearmanr"],
            "score_difference": Figure(of=near, unit="of the score"),
        }

    def gate(self, rows: Numbered) -> tuple[Sequence[str], None]:
        return rows.texts, None


def correlations(one: Floats, other: Floats) -> dict[str, Figure]:
    """Pearson's and Spearman's of (row,) values."""
    return {
        "pearsonr": Figure(of=intervals.pearson(one, other), unit="correlation"),
        "spearmanr": Figure(of=intervals.spearman(one, other), unit="correlation"),
    }
