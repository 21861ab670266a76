"""ALM's claim: a student with another tokenizer comes near to its teacher in likelihood, piece of text by piece.

The teacher has read four times the text of its students: with all of it they are as good as the teacher, and there is
nothing to learn from it. The losses are weighed by their gradients, as the authors recommend: at a temperature of 100
the gradient of ALM is a hundredth of that of the text, so that in a plain mean it does not show.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from datasets import Dataset
from hf_compress_plugins.tokenizers._alignment import byte_forms, special_ids
from hf_compress_plugins.tokenizers.alm import (
    ALM,
    byte_tokenizer,
    chunk_likelihoods,
    fvt,
    membership,
    space_mask,
    two_tokenizations,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_compress import DistillCallback

from . import Claim
from . import _characters as characters

LETTERS, STEPS, BATCH, SHARE = 160, 250, 16, 4
"""Characters of a text, steps of a student, texts of a step; a student reads every fourth text."""
LENGTHS = {"subwords": 96, "bytes": 168}
"""Tokens kept of a text for a student; 72 for the teacher."""


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


def own_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A student's."""
    return tokenizer(400) if kind == "subwords" else byte_tokenizer(tokenizer(2000))


@cache
def data(kind: str, *, held_out: bool = False) -> Dataset:
    """Texts under both tokenizers, with their chunks."""
    text = characters.text()[-characters.HELD_OUT :] if held_out else characters.text()[: -characters.HELD_OUT]
    texts = [text[at : at + LETTERS] for at in range(0, len(text) - LETTERS, LETTERS)]
    found: Dataset = two_tokenizations(
        Dataset.from_dict({"text": texts}),
        tokenizer=own_tokenizer(kind),
        teacher_tokenizer=tokenizer(2000),
        max_length=LENGTHS[kind],
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
                max_position_embeddings=192,
            )
        )


def own(dataset: Dataset) -> list[dict[str, Any]]:
    """Rows for a model with the student's tokens."""
    names = ("input_ids", "attention_mask", "labels")
    return [{name: row[name] for name in names} for row in dataset]


@cache
def teacher() -> LlamaForCausalLM:
    """Trained on its own tokens of all texts."""
    rows = [
        {
            "input_ids": row["teacher_input_ids"],
            "attention_mask": row["teacher_attention_mask"],
            "labels": [
                t if m else -100 for t, m in zip(row["teacher_input_ids"], row["teacher_attention_mask"], strict=True)
            ],
        }
        for row in data("subwords")
    ]
    found: LlamaForCausalLM = characters.train(model(2000, 0), steps=600, seed=0, data=rows, batch=24, weight_decay=0.1)
    return found.eval()


def run(variant: str, seed: int) -> Mapping[str, float]:
    """Bits per byte on held-out texts, and how far chunks' likelihoods are from the teacher's."""
    kind, losses = variant.split(": ")
    target, theirs, own_ = teacher(), tokenizer(2000), own_tokenizer(kind)
    student = model(400, seed) if kind == "subwords" else fvt(target, theirs, own_)
    rows = data(kind).select(range(0, len(data(kind)), SHARE))
    callbacks = []
    if losses != "text alone":
        spaces = (space_mask(own_, len(own_)), space_mask(theirs, len(theirs)))
        method = ALM(spaces=spaces, sft=losses == "text and ALM", weighting="gradients")
        callbacks = [DistillCallback(target, method)]
    characters.train(
        student,
        steps=STEPS,
        seed=seed,
        data=[dict(row) for row in rows] if callbacks else own(rows),
        batch=BATCH,
        learning_rate=3e-3 if kind == "subwords" else 1e-3,
        callbacks=callbacks,
    )
    return measured(student.eval(), target, data(kind, held_out=True), own_)


def measured(
    student: Any, target: LlamaForCausalLM, rows: Dataset, tokens: PreTrainedTokenizerFast
) -> dict[str, float]:
    """Both figures of a student."""
    special = special_ids(tokens)
    bytes_of = torch.tensor([0 if i in special else len(form) for i, form in sorted(byte_forms(tokens).items())])
    nats, letters, gap, count = 0.0, 0, 0.0, 0
    for start in range(0, len(rows), 32):
        batch = {k: torch.tensor(v) for k, v in rows[start : start + 32].items()}
        ids, theirs = batch["input_ids"], batch["teacher_input_ids"]
        with torch.no_grad():
            logits = student(input_ids=ids, attention_mask=batch["attention_mask"]).logits
            other = target(theirs, attention_mask=batch["teacher_attention_mask"]).logits
        kept = batch["labels"][:, 1:] != -100
        losses = -logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
        nats += float(losses[kept].sum())
        letters += int(bytes_of[ids[:, 1:][kept]].sum())
        chunks = batch["chunks"]
        members = [membership(chunks[..., i], chunks[..., i + 1], one.shape[1]) for i, one in ((0, theirs), (2, ids))]
        likely = [
            chunk_likelihoods(one, given, member)
            for one, given, member in zip((other, logits), (theirs, ids), members, strict=True)
        ]
        valid = members[0][:, 1:].any(1) & members[1][:, 1:].any(1)
        gap += float((likely[0] - likely[1]).abs()[valid].sum())
        count += int(valid.sum())
    return {"bits per byte": nats / math.log(2) / letters, "|ΔL| a chunk, nats": gap / count}


CLAIM = Claim(
    published="Subword models become byte models better than earlier methods manage between subword tokenizers, at a "
    "comparable budget.",
    check="Python's help texts. Teacher: 2 layers of width 96, byte-level BPE with 2,000 merges, 600 steps of 24 texts "
    f"of {LETTERS} characters. Students of the same size, {STEPS} steps of {BATCH} of every fourth of those texts: "
    "untrained with 400 merges, or the teacher with the tokenizer of bytes, its embeddings by FVT. Losses weighed by "
    "their gradients. Measured on held-out texts.",
    expected="Chunks nearer to the teacher's likelihoods with ALM than without, and bits per byte no worse with both.",
    variants=(
        "subwords: text alone",
        "subwords: ALM alone",
        "subwords: text and ALM",
        "bytes: text alone",
        "bytes: text and ALM",
    ),
    run=run,
)
