"""Embeddings of texts: the order of their similarities, and how near they are to the teacher's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_compress import facts
from hf_compress.errors import MismatchError
from hf_compress_evaluation import intervals, quality
from hf_compress_evaluation.candidates import Candidate
from hf_compress_evaluation.examples import numbers, texts
from hf_compress_evaluation.task import Task, describe, read_data

from ._base import Figure, FigureScorer
from .numbers import correlations

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Two texts a row, and how alike people find them."""

    texts: tuple[str, ...]
    others: tuple[str, ...]
    labels: Floats | None
    data: facts.Data


@dataclass(frozen=True, kw_only=True, eq=False)
class Embedded:
    """(row, width) of the first and of the second texts, unit length."""

    texts: Floats
    others: Floats

    @property
    def cosines(self) -> Floats:
        """(row,) in [-1, 1]."""
        return np.asarray((self.texts * self.others).sum(-1))


class Sentences(FigureScorer):
    """Spearman's correlation of the pairs' cosines with people's scores.

    A text's embedding is the mean of the last hidden states of its tokens, or the first one's (`pooling: cls`).
    """

    metrics = compared = ("spearmanr", "pearsonr")
    default = ("spearmanr",)
    loyalty = ("rank_loyalty", "teacher_cosine")

    def check(self, candidates: Sequence[Candidate]) -> None:
        pass  # each has a space of its own

    def load(self, task: Task, config: Any) -> Pairs:
        rows, name = read_data(task)
        text, other, label = task.columns
        if other is None:
            raise MismatchError(f"{name}: sentence-similarity needs two texts a row. Name the second: text_pair.")
        first, second = texts(rows, text, name=name), texts(rows, other, name=name)
        labels = None if label is None else numbers(rows, label, name=name)
        parts = (first, second) if labels is None else (first, second, labels.tolist())
        content = zip(*parts, strict=True)
        data = describe(task, name, len(first), labelled=labels is not None, content=content)
        return Pairs(texts=first, others=second, labels=labels, data=data)

    def predict(self, one: Candidate, rows: Pairs, task: Task, *, progress: bool = False) -> Embedded:
        every = list(dict.fromkeys((*rows.texts, *rows.others)))
        encoded = quality.encoded(one.model, one.tokenizer, every, task.max_length)
        pool = _first if task.pooling == "cls" else _mean
        given = quality.outputs(one.model, one.tokenizer, encoded, pool, batch_size=task.batch_size, progress=progress)
        place = {text: row for row, text in enumerate(every)}
        found = np.stack(given).astype(np.float64)
        found /= np.maximum(np.linalg.norm(found, axis=-1, keepdims=True), 1e-12)
        return Embedded(
            texts=found[[place[text] for text in rows.texts]], others=found[[place[text] for text in rows.others]]
        )

    def figures(self, one: Candidate, said: Embedded, rows: Pairs) -> dict[str, Figure]:
        assert rows.labels is not None  # asked before
        return correlations(said.cosines, rows.labels)

    def likeness(self, own: Embedded, teacher: Embedded) -> dict[str, Figure]:
        found = {"rank_loyalty": correlations(own.cosines, teacher.cosines)["spearmanr"]}
        if own.texts.shape == teacher.texts.shape:  # else there is no common space
            both = [(getattr(own, key) * getattr(teacher, key)).sum(-1) for key in ("texts", "others")]
            found["teacher_cosine"] = Figure(of=intervals.average(np.mean(both, axis=0)), unit="cosine")
        return found

    def gate(self, rows: Pairs) -> tuple[Sequence[str], None]:
        return tuple(dict.fromkeys((*rows.texts, *rows.others))), None


def _states(output: Any) -> Tensor:
    states = getattr(output, "last_hidden_state", None)
    if states is None:
        raise MismatchError("the model gives no last_hidden_state. Evaluate the encoder without a head.")
    return torch.as_tensor(states)


def _mean(output: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """(batch, width): over the real tokens."""
    states = _states(output).float()
    mask = inputs.get("attention_mask")
    weights = states.new_ones(states.shape[:2]) if mask is None else mask.to(states)
    return (states * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp_min(1)


def _first(output: Any, _: Mapping[str, Tensor]) -> Tensor:
    """(batch, width): of the first token."""
    return _states(output)[:, 0]
