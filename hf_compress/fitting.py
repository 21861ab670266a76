"""Training stages of a recipe: a stock Trainer, resumed from its last checkpoint where one is left."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DataCollatorWithPadding, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from . import files
from .objective import IGNORED
from .recipe import Fitting

logger = logging.getLogger(__name__)


def encode(tokenizer: Any, texts: Sequence[str], labels: NDArray[np.int64] | None, max_length: int) -> datasets.Dataset:
    """Token ids without padding, and labels; unlabelled rows get -100, which the task's own loss skips."""
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
    callbacks: Sequence[TrainerCallback] = (),
    progress: bool = True,
) -> PreTrainedModel:
    """Trains a model and writes it with its tokenizer to `target`, whole or not at all.

    Checkpoints lie beside it in `.<name>.training` until it is done; one that is left by a killed run is continued.
    """
    work = target.parent / f".{target.name}.training"
    arguments = TrainingArguments(
        str(work),
        learning_rate=fitting.learning_rate,
        num_train_epochs=fitting.epochs,
        per_device_train_batch_size=fitting.batch_size,
        warmup_steps=fitting.warmup,
        weight_decay=fitting.weight_decay,
        train_sampling_strategy="group_by_length",
        save_strategy="epoch",
        save_total_limit=1,
        logging_steps=50,
        report_to=[],
        seed=seed,
        disable_tqdm=not progress,
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
    left = get_last_checkpoint(str(work)) if work.is_dir() else None
    if left is not None:
        logger.info("%s: continues from %s", target.name, Path(left).name)
    trainer.train(resume_from_checkpoint=left)
    with files.atomic_folder(target) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    shutil.rmtree(work, ignore_errors=True)
    return model


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
