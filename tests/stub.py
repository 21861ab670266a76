"""A model whose parameters are its logits, and a Trainer around it: an oracle's numbers through the real callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import TokenClassifierOutput


class StubConfig(PreTrainedConfig):
    model_type = "stub"


class StubForTokenClassification(PreTrainedModel):
    """Returns row `index` of its logits (row, time, class); the task's loss is the mean cross-entropy."""

    config_class = StubConfig
    main_input_name = "index"

    def __init__(self, logits: Tensor) -> None:
        super().__init__(StubConfig(num_labels=logits.shape[-1]))
        self.rows = nn.Parameter(logits.clone())

    def forward(self, index: Tensor, labels: Tensor | None = None) -> TokenClassifierOutput:
        logits = self.rows[index]
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return TokenClassifierOutput(loss=loss, logits=logits)


class GradientKeeper(TrainerCallback):
    """Keeps the gradients and the loss of every optimizer step."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.gradients.append(
            {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
        )


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    """Quiet, on the CPU, no checkpoints, every step logged, plain SGD without clipping."""
    defaults: dict[str, Any] = {
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
    }
    return TrainingArguments(str(folder), **(defaults | settings))


def stub_trainer(
    folder: Path, student: Tensor, labels: Tensor | None, callbacks: list[TrainerCallback], **settings: Any
) -> Trainer:
    """A Trainer whose one batch is all rows of the logits."""
    rows = [{"index": i} | ({} if labels is None else {"labels": labels[i].tolist()}) for i in range(len(student))]
    settings = {"per_device_train_batch_size": len(student)} | settings
    return Trainer(
        model=StubForTokenClassification(student),
        args=arguments(folder, **settings),
        train_dataset=Dataset.from_list(rows),
        data_collator=lambda batch: {name: torch.tensor([row[name] for row in batch]) for name in batch[0]},
        callbacks=callbacks,
    )
