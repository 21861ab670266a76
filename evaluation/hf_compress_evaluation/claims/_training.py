"""The one Trainer of the claims: quiet, on the CPU, with linear decay."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from transformers import Trainer, TrainerCallback, TrainingArguments


def train(
    model: Any,
    *,
    data: Any,
    data_collator: Callable[..., Any],
    steps: int,
    seed: int,
    batch: int,
    learning_rate: float = 3e-3,
    callbacks: Sequence[TrainerCallback] = (),
    **settings: Any,
) -> Any:
    """Trains a model in place and returns it; further settings are those of TrainingArguments."""
    defaults: dict[str, Any] = {
        "lr_scheduler_type": "linear",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": steps,
        "use_cpu": True,
    }
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=learning_rate,
            seed=seed,
            **(defaults | settings),
        )
        trainer = Trainer(
            model=model, args=args, train_dataset=data, data_collator=data_collator, callbacks=list(callbacks)
        )
        trainer.train()
    return model
