"""What every scorer offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from hf_compress.errors import MismatchError, UnknownNameError
from hf_compress.facts import Data, Measurement, Setting
from hf_compress_evaluation import intervals, quality
from hf_compress_evaluation.candidates import Candidate
from hf_compress_evaluation.task import Task


class Rows(Protocol):
    """The rows of a task, as its scorer reads them."""

    @property
    def data(self) -> Data:
        """Name, size and fingerprint."""

    @property
    def labels(self) -> Any:
        """None: unlabelled."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A score or a likeness that can be resampled, for the record."""

    of: intervals.Statistic
    unit: str = "fraction"
    how: Mapping[str, Setting] = field(default_factory=dict)


class Scorer(ABC):
    """One task. What `load` and `predict` return is only handed back to the same scorer."""

    metrics: ClassVar[tuple[str, ...]]
    """What a task may ask for."""
    default: ClassVar[tuple[str, ...]]
    """What is measured unless a task asks for others."""
    loyalty: ClassVar[tuple[str, ...]]
    """What is measured where there is a teacher."""

    @property
    def scores(self) -> tuple[str, ...]:
        """Every figure that is measured of one model alone or beside its teacher."""
        return (*dict.fromkeys((*self.metrics, *self.loyalty)), "retention")

    @abstractmethod
    def check(self, candidates: Sequence[Candidate]) -> None:
        """Raises MismatchError for models that cannot be scored, or not beside the last one, the student."""

    @abstractmethod
    def load(self, task: Task, config: Any) -> Any:
        """The task's rows for a model of that config; errors as `examples.read_rows`."""

    @abstractmethod
    def predict(self, one: Candidate, rows: Any, task: Task, *, progress: bool = False) -> Any:
        """What a model says of the rows."""

    @abstractmethod
    def measure(
        self,
        one: Candidate,
        own: Any,
        rows: Any,
        task: Task,
        *,
        teacher: Any = None,
        alone: Any = None,
        student: Candidate | None = None,
        seed: int = 0,
    ) -> tuple[Measurement, ...]:
        """The facts of one model's predictions.

        Args:
            one: whose they are.
            own: what `predict` gave.
            rows: what `load` gave.
            task: for its metrics.
            teacher, alone: what `predict` gave of those that it is compared with.
            student: whose tokens tell long rows from short ones; None: `one`.
            seed: of the resampling.
        """

    @abstractmethod
    def gate(self, rows: Any) -> tuple[Sequence[Any], Sequence[int] | None]:
        """Features and labels on which fewer bits are compared with float32."""

    def asked(self, task: Task) -> tuple[str, ...]:
        """The metrics that are measured for that task; UnknownNameError for one that is of other models."""
        for name in task.metrics:
            if name not in self.metrics:
                raise UnknownNameError("metric", name, self.metrics)
        return task.metrics or self.default


class FigureScorer(Scorer):
    """A task all of whose scores are figures that can be resampled."""

    compared: ClassVar[tuple[str, ...]]
    """Of which retention, gap closed and gain are taken: the first of these that is measured. More is better."""

    @abstractmethod
    def figures(self, one: Candidate, said: Any, rows: Any) -> Mapping[str, Figure]:
        """Each of `metrics`, of what a model said of rows with labels; `one` for the names of its classes."""

    @abstractmethod
    def likeness(self, own: Any, teacher: Any) -> Mapping[str, Figure]:
        """How closely what a model said follows what its teacher said: those of `loyalty` that both allow."""

    def measure(
        self,
        one: Candidate,
        own: Any,
        rows: Any,
        task: Task,
        *,
        teacher: Any = None,
        alone: Any = None,
        student: Candidate | None = None,
        seed: int = 0,
    ) -> tuple[Measurement, ...]:
        who, found = (one.subject, one.variant), list[Measurement]()
        if rows.labels is not None:
            asked, figures = self.asked(task), self.figures(one, own, rows)
            for name in asked:
                found += _measured(who, name, figures[name], rows, seed)
            main = next((name for name in asked if name in self.compared), self.compared[0])
            beside = [None if each is None else self.figures(one, each, rows)[main].of for each in (teacher, alone)]
            found += quality.measure_derived(
                *who,
                figures[main].of,
                rows.data,
                metric=main,
                unit=figures[main].unit,
                teacher=beside[0],
                alone=beside[1],
                seed=seed,
            )
        for name, figure in {} if teacher is None else self.likeness(own, teacher).items():
            found += _measured(who, name, figure, rows, seed)
        return tuple(found)


def check_labels(candidates: Sequence[Candidate]) -> None:
    """Refuses models whose classes are not those of the last one, in the same order."""
    student = candidates[-1].model.config.id2label
    for candidate in candidates[:-1]:
        if (other := candidate.model.config.id2label) != student:
            raise MismatchError(
                f"{candidate.name} has the classes {other}, the student {student}. Agreement needs the same classes in "
                "the same order: set id2label and label2id of both configs alike."
            )


def _measured(who: tuple[str, str], name: str, figure: Figure, rows: Rows, seed: int) -> tuple[Measurement, ...]:
    return quality.measure_figure(*who, name, figure.of, rows.data, unit=figure.unit, seed=seed, how=figure.how)
