"""Where targets come from."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from hf_compress import facts
from hf_compress.errors import ConfigurationError
from hf_compress.objective import Inputs, Kind, Sizes

if TYPE_CHECKING:
    from hf_compress.heads import Logits

    from .cache import CacheTeacher
    from .ensemble import EnsembleTeacher
    from .own import SelfTeacher
    from .server import ServerTeacher

_HOME = {"CacheTeacher": "cache", "EnsembleTeacher": "ensemble", "SelfTeacher": "own", "ServerTeacher": "server"}

__all__ = [
    "CacheTeacher",
    "EnsembleTeacher",
    "Recorded",
    "SelfTeacher",
    "ServerTeacher",
    "Teacher",
    "models_of",
    "teacher_for",
]


def __getattr__(name: str) -> Any:
    """The kinds of teachers, imported when they are first used: they build on this module."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


class Teacher(Protocol):
    """A source of targets for the batches of a run."""

    sizes: Sizes

    def prepare(self, taps: frozenset[str], device: torch.device, until: str | None = None) -> None:
        """Called when training is set up: place the model, put the taps; nothing after tap `until` is wanted."""

    def __call__(self, inputs: Inputs) -> Mapping[str, Tensor]:
        """The taps for one batch, without gradient."""

    def run(self, *, grad: bool = False, **inputs: Any) -> Any:
        """One forward for a method that calls the teacher itself; `grad` differentiates through the inputs."""

    def describe(self) -> facts.Model:
        """What the record says of it."""

    def close(self) -> None:
        """Gives back what was taken: hooks, modes, requires_grad."""


@runtime_checkable
class Recorded(Protocol):
    """A teacher that is known in part, or elsewhere: its logits are completed beside the student's."""

    fixed: bool
    """Whether it knows the rows of the data and no others."""
    columns: frozenset[str]
    """Of the batch, that it reads and the student never sees."""

    def apart(self, inputs: Inputs) -> tuple[Mapping[str, Tensor], Logits | None]:
        """The taps for one batch, and its logits by rows, beside the student's."""

    def holds(self, inputs: Inputs) -> bool:
        """Whether every example of a batch is known."""

    def prefetch(self, batches: Sequence[Inputs]) -> None:
        """Told of the batches of a window before its first forward."""

    def epoch_began(self, epoch: int) -> None:
        """Told of each epoch, from 0, on all ranks."""

    def flush(self) -> None:
        """Told before a checkpoint: what is in memory alone is to be kept."""


def models_of(source: Any) -> list[nn.Module]:
    """The models in memory that a teacher runs."""
    if isinstance(source, nn.Module):
        return [source]
    found = [getattr(source, "model", None), *(getattr(source, "models", None) or ())]
    return [model for model in found if isinstance(model, nn.Module)]


def teacher_for(
    source: nn.Module | str | Path | Teacher,
    student: nn.Module,
    kind: Kind | None = None,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> Teacher:
    """A teacher from what the user gave: a model, a hub id or a folder, or a ready `Teacher`.

    Args:
        source: what the user gave.
        student: decides the head where the source's config names no architecture.
        kind: where its distributions stand; None: told by the class of the model.
        settings: of `from_pretrained`, for a hub id or a folder.

    Raises:
        ConfigurationError: for anything else, and for settings beside a teacher that is loaded already.
    """
    from .model import ModelTeacher, load_teacher
    from .own import SelfTeacher

    if isinstance(source, str | Path):
        return ModelTeacher(load_teacher(str(source), student, settings), kind)
    if settings:
        raise ConfigurationError(f"teacher_kwargs {sorted(settings)} are for a hub id or a folder; this one is loaded.")
    if isinstance(source, nn.Sequential) and hasattr(next(iter(source), None), "auto_model"):
        raise ConfigurationError(
            "the teacher is a model of sentence-transformers, whose forward does not take a transformer's inputs. Give "
            "its transformer: DistillCallback(teacher[0].auto_model)."
        )
    if isinstance(source, nn.Module):
        return ModelTeacher(source, kind)
    if isinstance(source, SelfTeacher):
        return source.of(student)
    if not hasattr(source, "sizes") or not callable(source):
        raise ConfigurationError(f"a teacher is a model, a hub id, a folder or a Teacher, got {type(source).__name__}.")
    return source
