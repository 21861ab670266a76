"""Texts with one class each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_compress.errors import MismatchError
from hf_compress.facts import Measurement
from hf_compress_evaluation import intervals, quality
from hf_compress_evaluation.candidates import Candidate
from hf_compress_evaluation.examples import Examples, examples
from hf_compress_evaluation.task import Task, read_data

from ._base import Scorer, check_labels


class Classes(Scorer):
    """Accuracy and its like; agreement by label and by distribution."""

    metrics = quality.METRICS
    default = quality.QUALITY
    loyalty = ("label_loyalty", "probability_loyalty", "kl")

    def check(self, candidates: Sequence[Candidate]) -> None:
        config = candidates[-1].model.config
        if len(config.id2label) < 2 or config.problem_type == "multi_label_classification":
            raise MismatchError(
                f"the student has {len(config.id2label)} classes and problem_type {config.problem_type!r}: accuracy "
                "and loyalty need one class of at least two a row. Score multi-label models with metrics of your own."
            )
        check_labels(candidates)

    def load(self, task: Task, config: Any) -> Examples:
        rows, name = read_data(task)
        text, _, label = task.columns
        return examples(
            rows,
            name=name,
            text=text,
            label=label,
            label2id=config.label2id,
            licence=task.licence,
            split=task.split,
            hub_id=task.hub_id,
            config=task.config,
        )

    def predict(self, one: Candidate, rows: Examples, task: Task, *, progress: bool = False) -> quality.Logits:
        return quality.predict(
            one.model,
            one.tokenizer,
            rows.texts,
            batch_size=task.batch_size,
            max_length=task.max_length,
            progress=progress,
        )

    def measure(
        self,
        one: Candidate,
        own: quality.Logits,
        rows: Examples,
        task: Task,
        *,
        teacher: quality.Logits | None = None,
        alone: quality.Logits | None = None,
        student: Candidate | None = None,
        seed: int = 0,
    ) -> tuple[Measurement, ...]:
        who = (one.subject, one.variant)
        metrics = self.asked(task)
        found = quality.measure_classification(*who, own, rows.labels, rows.data, teacher, seed=seed, metrics=metrics)
        if rows.labels is None:
            return found
        if task.slices:
            classes = [name for _, name in sorted(one.model.config.id2label.items())]
            by = student or one  # a slice is the same rows of every subject
            tokens = quality.token_counts(by.model, by.tokenizer, rows.texts, max_length=task.max_length)
            found += quality.measure_slices(
                *who, own, rows.labels, rows.data, classes=classes, tokens=tokens, seed=seed
            )
        right, theirs, others = (
            None if each is None else quality.right(each, rows.labels) for each in (own, teacher, alone)
        )
        assert right is not None  # its own predictions
        return found + quality.measure_derived(
            *who,
            intervals.average(right),
            rows.data,
            metric="accuracy",
            teacher=None if theirs is None else intervals.average(theirs),
            alone=None if others is None else intervals.average(others),
            seed=seed,
            how={} if others is None else {"mcnemar_p": intervals.mcnemar(right, others)},
        )

    def gate(self, rows: Examples) -> tuple[Sequence[str], Sequence[int] | None]:
        return rows.texts, None if rows.labels is None else rows.labels.tolist()
