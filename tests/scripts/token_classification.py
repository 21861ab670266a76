"""As transformers' examples/pytorch/token-classification/run_ner.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from _small import SIZES, TEXTS, arguments, tokenizer
from datasets import Dataset
from transformers import BertConfig, BertForTokenClassification, DataCollatorForTokenClassification, Trainer

from hf_compress import DistillCallback, shrink


def main(output: str, *, distil: bool) -> Trainer:
    tok = tokenizer()
    teacher = BertForTokenClassification(BertConfig(vocab_size=len(tok), num_hidden_layers=3, num_labels=3, **SIZES))
    data = Dataset.from_dict({"tokens": [text.split() for text in TEXTS]})

    def align(rows: dict[str, Any]) -> dict[str, Any]:
        found = dict(tok(rows["tokens"], truncation=True, is_split_into_words=True))
        found["labels"] = [[len(word) % 3 for word in words] for words in rows["tokens"]]
        return found

    data = data.map(align, batched=True)

    def compute_metrics(predictions: Any) -> dict[str, float]:
        scored = predictions.label_ids != -100
        return {"accuracy": float((np.argmax(predictions.predictions, 2) == predictions.label_ids)[scored].mean())}

    trainer = Trainer(
        model=shrink(teacher, layers=1),
        args=arguments(output),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tok,
        data_collator=DataCollatorForTokenClassification(tok),
        compute_metrics=compute_metrics,
        callbacks=[DistillCallback(teacher)] if distil else [],
    )
    trainer.train()
    return trainer
