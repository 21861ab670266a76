"""Texts with one number each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_compress import facts
from hf_compress.errors import MismatchError
from hf_compress.facts import Measurement
from hf_compress_evaluation import agreement, intervals, quality
from hf_compress_evaluation.candidates import Candidate
from hf_compress_evaluation.examples import numbers, texts
from hf_compress_evaluation.task import Task, describe, read_data

from ._base import Scorer

Floats = NDArray[np.float64]
FIGURES = {"pearsonr": intervals.pearson, "spearmanr": intervals.spearman}


@dataclass(frozen=True, kw_only=True)
class Numbered:
    """Texts and their numbers."""

    texts: tuple[str, ...]
    labels: Floats | None
    data: facts.Data


class Numbers(Scorer):
    """Correlation with the labels, and with the teacher's scores."""

    metrics = ("pearsonr", "spearmanr", "mean_squared_error")
    default = ("pearsonr", "spearmanr")
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

    def measure(
        self,
        one: Candidate,
        own: Floats,
        rows: Numbered,
        task: Task,
        *,
        teacher: Floats | None = None,
        alone: Floats | None = None,
        student: Candidate | None = None,
        seed: int = 0,
    ) -> tuple[Measurement, ...]:
        who = (one.subject, one.variant)
        found: tuple[Measurement, ...] = ()
        if rows.labels is not None:
            found = against_numbers(who, own, rows.labels, rows.data, self.asked(task), teacher, alone, seed=seed)
        if teacher is not None:
            near = intervals.average(agreement.score_difference_rows(own, teacher))
            for name, figure in (("regression_loyalty", intervals.pearson), ("rank_loyalty", intervals.spearman)):
                found += quality.measure_figure(
                    *who, name, figure(own, teacher), rows.data, unit="correlation", seed=seed
                )
            found += quality.measure_figure(*who, "score_difference", near, rows.data, unit="of the score", seed=seed)
        return found

    def gate(self, rows: Numbered) -> tuple[Sequence[str], None]:
        return rows.texts, None


def against_numbers(
    who: tuple[str, str],
    own: Floats,
    labels: Floats,
    data: facts.Data,
    metrics: Sequence[str],
    teacher: Floats | None,
    alone: Floats | None,
    *,
    seed: int,
) -> tuple[Measurement, ...]:
    """Correlations with the labels; retention, gap closed and gain of the first of them."""
    found: tuple[Measurement, ...] = ()
    for name in metrics:
        if name in FIGURES:
            figure, unit = FIGURES[name](own, labels), "correlation"
        else:
            figure, unit = intervals.average((own - labels) ** 2), "of the score, squared"
        found += quality.measure_figure(*who, name, figure, data, unit=unit, seed=seed)
    main = next((name for name in metrics if name in FIGURES), "spearmanr")
    return found + quality.measure_derived(
        *who,
        FIGURES[main](own, labels),
        data,
        metric=main,
        unit="correlation",
        teacher=None if teacher is None else FIGURES[main](teacher, labels),
        alone=None if alone is None else FIGURES[main](alone, labels),
        seed=seed,
    )
