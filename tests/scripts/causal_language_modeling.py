"""As transformers' examples/pytorch/language-modeling/run_clm.py: texts joined and cut into blocks."""

from __future__ import annotations

from itertools import chain
from typing import Any

from _small import SIZES, TEXTS, arguments, tokenizer
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, default_data_collator

from hf_compress import DistillCallback, shrink

BLOCK = 8


def main(output: str, *, distil: bool) -> Trainer:
    tok = tokenizer()
    special = {"pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 3}
    teacher = LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), num_hidden_layers=3, **special, **SIZES))
    data = Dataset.from_dict({"text": TEXTS}).map(lambda rows: tok(rows["text"]), batched=True, remove_columns="text")

    def group(rows: dict[str, Any]) -> dict[str, Any]:
        joined = {name: list(chain(*rows[name])) for name in rows}
        whole = len(joined["input_ids"]) // BLOCK * BLOCK
        found = {name: [ids[at : at + BLOCK] for at in range(0, whole, BLOCK)] for name, ids in joined.items()}
        return found | {"labels": found["input_ids"]}

    data = data.map(group, batched=True)
    trainer = Trainer(
        model=shrink(teacher, layers=1),
        args=arguments(output, gradient_accumulation_steps=2),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tok,
        data_collator=default_data_collator,
        callbacks=[DistillCallback(teacher)] if distil else [],
    )
    trainer.train()
    return trainer
