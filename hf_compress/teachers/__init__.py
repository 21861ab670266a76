"""Where targets come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_compress import facts
from hf_compress.objective import Inputs, Sizes


class Teacher(Protocol):
    """A source of targets for the batches of a run."""

    sizes: Sizes

    def prepare(self, taps: frozenset[str], device: torch.device) -> None:
        """Called when training is set up: place the model, put the taps."""

    def __call__(self, inputs: Inputs) -> Mapping[str, Tensor]:
        """The taps for one batch, without gradient."""

    def run(self, *, grad: bool = False, **inputs: Any) -> Any:
        """One forward for a method that calls the teacher itself; `grad` differentiates through the inputs."""

    def describe(self) -> facts.Model:
        """What the record says of it."""

    def close(self) -> None:
        """Gives back what was taken: hooks, modes, requires_grad."""


def teacher_for(source: nn.Module | str | Teacher, student: nn.Module) -> Teacher:
    """A teacher from what the user gave: a model, a hub id or a folder, or a ready `Teacher`."""
    from .model import ModelTeacher, load_teacher

    if isinstance(source, nn.Module):
        return ModelTeacher(source)
    if isinstance(source, str):
        return ModelTeacher(load_teacher(source, student))
    return source
