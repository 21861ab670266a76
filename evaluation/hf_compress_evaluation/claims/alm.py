"""ALM's claim: a student with another tokenizer comes near to its teacher in likelihood, piece of text by piece."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from datasets import Dataset
from hf_compress_plugins.tokenizers.alm import (
    ALM,
    chunk_likelihoods,
    membership,
    space_mask,
    two_tokenizations,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_compress import DistillCallback

from . import Claim
from . import _characters as characters

LETTERS, LENGTH, STEPS = 160, 96, 500
"""Characters of a text, tokens kept of it, steps of a student."""


@cache
def tokenizer(merges: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the help texts."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=257 + merges,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(characters.text()[: -characters.HELD_OUT].split("\n"), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")


@cache
def data(*, held_out: bool = False) -> Dataset:
    """Texts under both tokenizers, with their chunks."""
    text = characters.text()[-characters.HELD_OUT :] if held_out else characters.text()[: -characters.HELD_OUT]
    texts = [text[at : at + LETTERS] for at in range(0, len(text) - LETTERS, LETTERS)]
    found: Dataset = two_tokenizations(
        Dataset.from_dict({"text": texts}),
        tokenizer=tokenizer(400),
        teacher_tokenizer=tokenizer(2000),
        max_length=LENGTH,
        teacher_max_length=72,
    )
    return found


def model(merges: int, seed: int) -> LlamaForCausalLM:
    """Two layers of width 96."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer(merges)),
                hidden_size=96,
                intermediate_size=192,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=128,
            )
        )


def own(dataset: Dataset) -> list[dict[str, Any]]:
    """Rows for a model with the student's tokens."""
    names = ("input_ids", "attention_mask", "labels")
    return [{name: row[name] for name in names} for row in dataset]


@cache
def teacher() -> LlamaForCausalLM:
    """Trained on its own tokens of the same texts."""
    rows = [
        {
            "input_ids": row["teacher_input_ids"],
            "attention_mask": row["teacher_attention_mask"],
            "labels": [
                t if m else -100 for t, m in zip(row["teacher_input_ids"], row["teacher_attention_mask"], strict=True)
            ],
        }
        for row in data()
    ]
    found: LlamaForCausalLM = characters.train(model(2000, 0), steps=800, seed=0, data=rows, batch=24)
    return found


def run(variant: str, seed: int) -> Mapping[str, float]:
    """Bits per byte on held-out texts, and how far chunks' likelihoods are from the teacher's."""
    student, target = model(400, seed), teacher()
    spaces = (space_mask(tokenizer(400), len(tokenizer(400))), space_mask(tokenizer(2000), len(tokenizer(2000))))
    if variant == "text alone":
        characters.train(student, steps=STEPS, seed=seed, data=own(data()), batch=24)
    else:
        method = ALM(spaces=spaces, sft=variant == "text and ALM")
        rows = [dict(row) for row in data()]
        characters.train(
            student, steps=STEPS, seed=seed, data=rows, batch=24, callbacks=[DistillCallback(target, method)]
        )
    student.eval(), target.eval()
    nats, letters, gap, count = 0.0, 0, 0.0, 0
    for start in range(0, len(data(held_out=True)), 32):
        batch = {k: torch.tensor(v) for k, v in data(held_out=True)[start : start + 32].items()}
        with torch.no_grad():
            logits = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            theirs = target(batch["teacher_input_ids"], attention_mask=batch["teacher_attention_mask"]).logits
        kept = batch["labels"][:, 1:] != -100
        losses = -logits[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None]).squeeze(2)
        nats += float(losses[kept].sum())
        texts = tokenizer(400).batch_decode(batch["input_ids"][:, 1:].masked_fill(~kept, tokenizer(400).pad_token_id))
        letters += sum(len(text.replace("<end>", "").encode()) for text in texts)
        chunks = batch["chunks"]
        members = [membership(chunks[..., i], chunks[..., i + 1], n) for i, n in ((0, 72), (2, LENGTH))]
        likely = [
            chunk_likelihoods(one, ids, member)
            for one, ids, member in (
                (theirs, batch["teacher_input_ids"], members[0]),
                (logits, batch["input_ids"], members[1]),
            )
        ]
        valid = members[0][:, 1:].any(1) & members[1][:, 1:].any(1)
        gap += float((likely[0] - likely[1]).abs()[valid].sum())
        count += int(valid.sum())
    return {"bits per byte": nats / math.log(2) / letters, "|ΔL| a chunk, nats": gap / count}


CLAIM = Claim(
    published="Subword models become byte models better than earlier methods manage between subword tokenizers, at a "
    "comparable budget.",
    check="Python's help texts. Teacher: 2 layers of width 96, byte-level BPE with 2,000 merges, 800 steps. Student: "
    f"the same size, 400 merges, {STEPS} steps of 24 texts of {LETTERS} characters. Measured on held-out texts.",
    expected="Chunks nearer to the teacher's likelihoods with ALM than without, and bits per byte no worse with both.",
    variants=("text alone", "ALM alone", "text and ALM"),
    run=run,
)
