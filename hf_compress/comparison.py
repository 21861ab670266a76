"""A student and its teacher on the same rows: what a local report shows and no record holds.

The rows are the user's data. They enter neither `compression.json` nor anything that is pushed.
"""

from __future__ import annotations

from dataclasses import dataclass

from .facts import Data


@dataclass(frozen=True, kw_only=True)
class Share:
    """How often both decide alike, among some rows."""

    rows: int
    value: float
    """Fraction of them, in [0, 1]."""
    interval: tuple[float, float] | None
    """95 %."""


@dataclass(frozen=True, kw_only=True)
class ClassShare:
    """Agreement on the rows for which the teacher chooses one class."""

    name: str
    same: Share
    instead: tuple[str, int] | None
    """The class that the student chooses most often of the others, and for how many rows."""


@dataclass(frozen=True, kw_only=True)
class Right:
    """Whose class is the label's, among the rows where the two differ."""

    teacher: int
    student: int
    neither: int


@dataclass(frozen=True, kw_only=True)
class Disagreement:
    """One row for which the two choose different classes."""

    row: int
    """From 0, in the order of the data."""
    text: str
    teacher: str
    teacher_probability: float
    """Of the class that it chooses."""
    student: str
    student_probability: float
    label: str | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What both decide on the rows of a task."""

    teacher: str
    """Hub id, or the name of its folder."""
    variant: str
    """Of the student: torch, onnx, ..."""
    data: Data
    same: Share
    classes: tuple[ClassShare, ...]
    """Those that the teacher chooses, the most frequent first."""
    differ: int
    """Rows."""
    right: Right | None
    """None: the rows have no labels."""
    examples: tuple[Disagreement, ...]
    """Surest first: by the lower of the two probabilities."""
