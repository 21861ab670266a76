"""As transformers' examples/pytorch/text-classification/run_glue.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from _small import SIZES, TEXTS, arguments, tokenizer
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, DataCollatorWithPadding, Trainer

from hf_compress import DistillCallback, shrink


def main(output: str, *, distil: bool) -> Trainer:
    tok = tokenizer()
    teacher = BertForSequenceClassification(BertConfig(vocab_size=len(tok), num_hidden_layers=3, num_labels=2, **SIZES))
    data = Dataset.from_dict({"sentence": TEXTS, "label": [1, 0, 1, 0] * 4})
    data = data.map(lambda rows: tok(rows["sentence"], truncation=True), batched=True)

    def compute_metrics(predictions: Any) -> dict[str, float]:
        return {"accuracy": float((np.argmax(predictions.predictions, 1) == predictions.label_ids).mean())}

    trainer = Trainer(
        model=shrink(teacher, layers=1),
        args=arguments(output),
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=compute_metrics,
        processing_class=tok,
        data_collator=DataCollatorWithPadding(tok),
        callbacks=[DistillCallback(teacher)] if distil else [],
    )
    trainer.train()
    return trainer
