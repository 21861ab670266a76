"""Whether a step of several micro-batches is the step of one batch."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hf_compress.objective import IGNORED

from ._machine import Machine
from ._steps import QUIET, texts

LENGTHS = (9, 33, 65, 17)


class _Kept(TrainerCallback):  # type: ignore[misc]  # transformers is not typed for mypy
    """The gradient before the first step of the optimizer."""

    gradient: Tensor

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        given = [p.grad.flatten() for p in kwargs["model"].parameters() if p.grad is not None]
        self.gradient = torch.cat(given).clone()


def padded(batch: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Padded on the right to the longest."""
    width = max(len(row["input_ids"]) for row in batch)
    found = {}
    for name, fill in (("input_ids", 0), ("labels", IGNORED)):
        found[name] = torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in batch])
    found["attention_mask"] = (found["labels"] != IGNORED).long()
    return found


def after_accumulation(student: nn.Module, settings: Mapping[str, Any], *, vocabulary: int, on: Machine) -> float:
    """‖g₄ - g₁‖ / ‖g₁‖ of the gradients of four micro-batches of a row and of one batch of the four.

    Args:
        student: stays as it was.
        settings: as `_steps.train` takes them: made, arguments, callbacks, training arguments.
        vocabulary: of the rows, whose lengths are unequal.
        on: what it runs on.
    """
    on.begin()
    rows = [row for length in LENGTHS for row in texts(1, length, vocabulary)]
    first, second = (_gradient(copy.deepcopy(student), dict(settings), rows, size, on) for size in (len(rows), 1))
    return float((second - first).norm() / first.norm())


def _gradient(
    student: nn.Module, settings: dict[str, Any], rows: list[dict[str, Any]], batch: int, on: Machine
) -> Tensor:
    kept, callbacks = _Kept(), settings.pop("callbacks", [])
    made, arguments = settings.pop("made", Trainer), settings.pop("arguments", TrainingArguments)
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(
            folder,
            **{**QUIET, **on.arguments(), **settings},
            max_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=len(rows) // batch,
            max_grad_norm=0.0,
        )
        trainer = made(model=student, args=args, train_dataset=rows, data_collator=padded, callbacks=[*callbacks, kept])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return kept.gradient
