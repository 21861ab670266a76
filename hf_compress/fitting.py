"""Training stages of a recipe: a stock Trainer, resumed from its last checkpoint where one is left."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress, TaskID
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from . import files, foreign, trainer_log
from .bars import Bars, bars
from .objective import IGNORED
from .recipe import Fitting

logger = logging.getLogger(__name__)

CHECKPOINT = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
"""Files without which a run would go on with other numbers, or not at all."""

LOGGED = 0.04
"""Of the steps, after which losses are logged: 25 times a run, which shows its course."""


def encode(tokenizer: Any, texts: Sequence[str], labels: NDArray[np.int64] | None, max_length: int) -> datasets.Dataset:
    """Token ids without padding, and labels; unlabelled rows get -100, which the task's own loss skips."""
    with foreign.encoding(tokenizer):
        encoded = tokenizer(list(texts), truncation=True, max_length=max_length, padding=False)
    columns: dict[str, Any] = dict(encoded)
    columns["labels"] = [IGNORED] * len(texts) if labels is None else labels.tolist()
    return datasets.Dataset.from_dict(columns)


def fit(
    model: PreTrainedModel,
    tokenizer: Any,
    rows: datasets.Dataset,
    fitting: Fitting,
    target: Path,
    *,
    seed: int,
    steps: int | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    progress: Bars = True,
) -> PreTrainedModel:
    """Trains a model and writes it with its tokenizer to `target`, whole or not at all.

    Checkpoints lie beside it in `.<name>.training` until it is done; one that is left by a killed run is continued.
    `steps` of the optimizer, where they are given, take the place of `fitting.epochs`.
    """
    work = unfinished(target)
    arguments = TrainingArguments(
        str(work),
        learning_rate=fitting.learning_rate,
        num_train_epochs=fitting.epochs,
        max_steps=-1 if steps is None else steps,
        per_device_train_batch_size=fitting.batch_size,
        warmup_steps=fitting.warmup,
        weight_decay=fitting.weight_decay,
        train_sampling_strategy="group_by_length",
        save_strategy="epoch",
        save_total_limit=1,
        logging_steps=LOGGED,
        report_to=[],
        seed=seed,
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    set_seed(seed)
    trainer = Trainer(
        model=model,
        processing_class=tokenizer,
        args=arguments,
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=list(callbacks),
    )
    train_into(trainer, target, progress=progress)
    return model


def train_into(trainer: Trainer, target: Path, *, progress: Bars = True) -> None:
    """Trains, from the last checkpoint where one is left, and writes model, tokenizer and log to `target`.

    The Trainer's output_dir is `unfinished(target)`; it is removed in the end.
    """
    work = Path(trainer.args.output_dir)
    trainer.remove_callback(PrinterCallback)  # it prints to stdout, which is the command's result
    left = _last_checkpoint(work)
    if left is not None:
        logger.info("  %s: continues from %s", target.name, left.name)
    with _Shown(target.name, progress) as shown:
        trainer.add_callback(shown)
        trainer.train(resume_from_checkpoint=None if left is None else str(left))
    with files.atomic_folder(target) as part:
        trainer.model.save_pretrained(part)
        trainer.state.save_to_json(str(part / trainer_log.FILE))
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(part)
        files.readable(part)
    shutil.rmtree(work, ignore_errors=True)


def unfinished(target: Path) -> Path:
    """Where the checkpoints of a model lie until it is done."""
    return target.parent / f".{target.name}.training"


def _last_checkpoint(work: Path) -> Path | None:
    """The newest checkpoint that was written whole; torn ones are said and removed."""
    found = sorted(work.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in found:
        if not (lacking := [name for name in CHECKPOINT if not (path / name).is_file()]):
            return path
        logger.info("  %s was not written to its end (no %s): skipped", path.name, lacking[0])
        shutil.rmtree(path)
    return None


class _Shown(TrainerCallback):  # type: ignore[misc]  # transformers is not typed for mypy
    """How far a training is: a bar, or where none is wanted a log line now and then. On stderr."""

    def __init__(self, name: str, progress: Bars) -> None:
        self.name = name
        self.shared = isinstance(progress, Progress)
        self.bar = progress if isinstance(progress, Progress) else bars(progress)
        self.task: TaskID | None = None

    def __enter__(self) -> _Shown:
        if not self.shared:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if not self.shared:
            self.bar.stop()
        elif self.task is not None:
            self.bar.remove_task(self.task)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.task = self.bar.add_task(self.name, total=state.max_steps, completed=state.global_step, loss="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.task is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        if self.task is not None:
            self.bar.update(self.task, loss=f"loss {logs['loss']:.4g}")
        if self.bar.disable:
            logger.info("  %s: step %d of %d, loss %.4g", self.name, state.global_step, state.max_steps, logs["loss"])


def accuracy(model: PreTrainedModel, tokenizer: Any, rows: datasets.Dataset) -> float:
    """Fraction of rows whose label the model gives, for choosing between models."""
    mode, right = model.training, 0
    model.eval()
    collate = DataCollatorWithPadding(tokenizer)
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]))
    with torch.no_grad():
        for start in range(0, len(order), 64):
            batch = collate([rows[row] for row in order[start : start + 64]])
            labels = batch.pop("labels")
            logits = model(**batch.to(model.device)).logits
            right += int((logits.argmax(-1).cpu() == labels).sum())
    model.train(mode)
    return right / len(rows)
