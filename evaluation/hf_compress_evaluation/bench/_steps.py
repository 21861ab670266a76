"""Steps of a Trainer with the clock and the memory beside them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ._machine import Machine

WARM = 3
"""Steps at the beginning that are not counted."""

QUIET: Mapping[str, Any] = {
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "logging_strategy": "no",
    "train_sampling_strategy": "sequential",
}
"""Training arguments of every part."""


class Clock(TrainerCallback):  # type: ignore[misc]  # transformers is not typed for mypy
    """Seconds of each step, from before the batch's forward to after the optimizer."""

    def __init__(self, on: Machine) -> None:
        self.on = on
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on.wait()
        self._begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on.wait()
        self.seconds.append(time.perf_counter() - self._begun)


def train(
    model: nn.Module,
    rows: Any,
    *,
    steps: int,
    batch: int,
    on: Machine,
    callbacks: Sequence[TrainerCallback] = (),
    warm: int = WARM,
    made: Callable[..., Trainer] = Trainer,
    arguments: Callable[..., TrainingArguments] = TrainingArguments,
    collator: Callable[[Any], Any] | None = None,
    **settings: Any,
) -> dict[str, float]:
    """Median seconds of a step after `warm` of them, and the most megabytes that training took.

    Args:
        model: the student.
        rows: of the data set.
        steps: of the optimizer.
        batch: rows of a step.
        on: what it runs on.
        callbacks: beside the clock.
        warm: steps that are not counted.
        made: a Trainer, or another's.
        arguments: the class that goes with it.
        collator: None: `collate`.
        **settings: more training arguments.
    """
    on.begin()
    clock = Clock(on)
    with tempfile.TemporaryDirectory() as folder:
        trainer = made(
            model=model,
            args=arguments(
                folder, **{**QUIET, **on.arguments(), **settings}, max_steps=steps, per_device_train_batch_size=batch
            ),
            train_dataset=rows,
            data_collator=collator or collate,
            callbacks=[*callbacks, clock],
        )
        trainer.remove_callback(PrinterCallback)  # it prints to stdout, which is a command's result
        with on.highest() as memory:
            trainer.train()
    return {"seconds": median(clock.seconds[warm:]), "megabytes": memory[0] / 2**20}


def collate(batch: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Rows of one length."""
    return {name: torch.tensor([row[name] for row in batch]) for name in batch[0]}


def texts(count: int, length: int, vocabulary: int, *, classes: int | None = None) -> list[dict[str, Any]]:
    """Invented rows, whose labels are classes or the tokens themselves."""
    draw = torch.Generator().manual_seed(0)
    rows = []
    for place in range(count):
        ids = torch.randint(5, vocabulary, (length,), generator=draw).tolist()
        rows.append({"input_ids": ids, "labels": ids if classes is None else place % classes})
    return rows
