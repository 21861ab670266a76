"""Objectives and runs of no method, for the tests of seams."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, Trainer

from hf_compress import DistillConfig, testing
from hf_compress.objective import Objective, Rows, Step


@dataclass(frozen=True, kw_only=True)
class NoSettings:
    """Nothing to set."""


class Toy(Objective):
    """The squared distance of logits, at each scored position."""

    Config = NoSettings
    task_weight = 0.0

    @property
    def name(self) -> str:
        return "toy"

    def per_position(self, rows: Rows, step: Step) -> Tensor:
        assert rows.teacher_logits is not None
        return (rows.student_logits - rows.teacher_logits).square().mean(-1)


def run(
    folder: Path, objective: Any, task: str = "text-generation", frozen: Any = None, **settings: Any
) -> tuple[Trainer, PreTrainedModel]:
    """A Trainer with a toy objective on the conformance suite's models and rows."""
    config = DistillConfig(frozen=frozen or {})
    return testing.trainer(testing.Case("toy", task), folder, objective=objective, config=config, **settings)


def logged(trainer: Trainer, name: str) -> list[float]:
    """A value of every log that has it."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]
