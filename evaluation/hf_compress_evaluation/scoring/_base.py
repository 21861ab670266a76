"""What every scorer offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from hf_compress.errors import MismatchError, UnknownNameError
from hf_compress.facts import Data, Measurement
from hf_compress_evaluation.candidates import Candidate
from hf_compress_evaluation.task import Task


class Rows(Protocol):
    """The rows of a task, as its scorer reads them."""

    @property
    def data(self) -> Data:
        """Name, size and fingerprint."""


class Scorer(ABC):
    """One task. What `load` and `predict` return is only handed back to the same scorer."""

    metrics: ClassVar[tuple[str, ...]]
    """What a task may ask for."""
    default: ClassVar[tuple[str, ...]]
    """What is measured unless a task asks for others; the first is what retention, gap closed and gain are of."""
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


def check_labels(candidates: Sequence[Candidate]) -> None:
    """Refuses models whose classes are not those of the last one, in the same order."""
    student = candidates[-1].model.config.id2label
    for candidate in candidates[:-1]:
        if (other := candidate.model.config.id2label) != student:
            raise MismatchError(
                f"{candidate.name} has the classes {other}, the student {student}. Agreement needs the same classes in "
                "the same order: set id2label and label2id of both configs alike."
            )
