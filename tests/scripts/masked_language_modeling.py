"""As transformers' examples/pytorch/language-modeling/run_mlm.py."""

from __future__ import annotations

from _small import SIZES, TEXTS, arguments, tokenizer
from datasets import Dataset
from transformers import BertConfig, BertForMaskedLM, DataCollatorForLanguageModeling, Trainer

from hf_compress import DistillCallback, shrink


def main(output: str, *, distil: bool) -> Trainer:
    tok = tokenizer()
    teacher = BertForMaskedLM(BertConfig(vocab_size=len(tok), num_hidden_layers=3, **SIZES))
    data = Dataset.from_dict({"text": TEXTS})
    data = data.map(lambda rows: tok(rows["text"]), batched=True, remove_columns="text")
    trainer = Trainer(
        model=shrink(teacher, layers=1),
        args=arguments(output),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tok,
        data_collator=DataCollatorForLanguageModeling(tok, mlm_probability=0.3),
        callbacks=[DistillCallback(teacher)] if distil else [],
    )
    trainer.train()
    return trainer
