"""As transformers' examples/pytorch/summarization/run_summarization.py: generation in evaluation."""

from __future__ import annotations

from typing import Any

from _small import TEXTS, arguments, tokenizer
from datasets import Dataset
from transformers import (
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_compress import DistillCallback


def model(words: int, layers: int) -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=words, d_model=16, d_kv=8, d_ff=16, num_heads=2, num_layers=layers, pad_token_id=0, eos_token_id=3,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def main(output: str, *, distil: bool) -> Seq2SeqTrainer:
    tok = tokenizer()
    teacher, student = model(len(tok), 2), model(len(tok), 1)
    data = Dataset.from_dict({"document": TEXTS, "summary": [" ".join(text.split()[-2:]) for text in TEXTS]})

    def preprocess(rows: dict[str, Any]) -> dict[str, Any]:
        found = dict(tok(rows["document"], truncation=True))
        found["labels"] = tok(text_target=rows["summary"], truncation=True)["input_ids"]
        return found

    data = data.map(preprocess, batched=True, remove_columns=data.column_names)

    def compute_metrics(predictions: Any) -> dict[str, float]:
        return {"gen_len": float((predictions.predictions != 0).sum(1).mean())}

    trainer = Seq2SeqTrainer(
        model=student,
        args=arguments(output, Seq2SeqTrainingArguments, predict_with_generate=True, generation_max_length=4),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tok,
        data_collator=DataCollatorForSeq2Seq(tok, model=student),
        compute_metrics=compute_metrics,
        callbacks=[DistillCallback(teacher)] if distil else [],
    )
    trainer.train()
    return trainer
