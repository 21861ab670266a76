"""Objectives and runs of no method, for the tests of seams."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from transformers import PreTrainedModel, Trainer

from hf_compress import DistillConfig, testing
from hf_compress.objective import Inputs, Objective, Rows, Step

LR = 0.1


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


class WithCritic(Toy):
    """A network of one weight w with loss (w - rows of the batch)², that scales the term."""

    made = 0
    seen: list[float]
    optimizer: type[Optimizer] = SGD

    def networks(self, teacher: nn.Module | None) -> Mapping[str, tuple[nn.Module, Optimizer]]:
        assert teacher is not None
        type(self).made += 1
        type(self).seen = []
        critic = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(critic.weight)
        return {"critic": (critic, self.optimizer(critic.parameters(), lr=LR))}  # type: ignore[call-arg]

    def network_losses(self, inputs: Inputs, step: Step) -> Mapping[str, Tensor]:
        weight = step.networks["critic"].weight
        return {"critic": (weight.sum() - len(inputs["input_ids"])).square()}

    def per_position(self, rows: Rows, step: Step) -> Tensor:
        weight = step.networks["critic"].weight.detach().sum()
        self.seen.append(weight.item())
        return super().per_position(rows, step) * weight


class WithAdam(WithCritic):
    optimizer = Adam


def run(
    folder: Path, objective: Any, task: str = "text-generation", frozen: Any = None, **settings: Any
) -> tuple[Trainer, PreTrainedModel]:
    """A Trainer with a toy objective on the conformance suite's models and rows."""
    config = DistillConfig(frozen=frozen or {})
    return testing.trainer(testing.Case("toy", task), folder, objective=objective, config=config, **settings)


def logged(trainer: Trainer, name: str) -> list[float]:
    """A value of every log that has it."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]
