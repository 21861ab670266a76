"""A step with a teacher read from disk against plain fine-tuning; what the likeliest tokens cost in bytes and error."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM

from hf_compress import DistillCallback
from hf_compress.divergences import kl
from hf_compress.teachers.cache import CacheTeacher

from . import Bench, Figures, step
from ._machine import Machine
from ._steps import collate, texts, train

VOCABULARY, ROWS, LENGTH, BATCH, STEPS, TOP = 8_000, 256, 64, 16, 30, 64


def model(width: int, layers: int, scale: float = 0.02) -> BertForMaskedLM:
    """An untrained masked language model; with a large scale its distributions are sharp."""
    torch.manual_seed(layers)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32,
        intermediate_size=4 * width, initializer_range=scale,
    )  # fmt: skip
    return BertForMaskedLM(config)


def run(part: str, on: Machine) -> Figures:
    """Seconds of a step; of a cached language model also its bytes a token, and the error of the divergence."""
    if part.startswith("classifier"):
        return _classifier(part, on)
    rows = texts(ROWS, LENGTH, VOCABULARY)
    for row in rows:  # as in masked language modelling: one label in seven
        row["labels"] = [token if place % 7 == 0 else -100 for place, token in enumerate(row["labels"])]
    student = model(256, 3)
    if part == "fine-tuning":
        return train(student, rows, steps=STEPS, batch=BATCH, on=on)
    on.begin()
    teacher = model(384, 6, scale=0.2).eval()
    with tempfile.TemporaryDirectory() as folder:
        CacheTeacher(folder, teacher, top_k=TOP).fill(collate(rows[at : at + 32]) for at in range(0, ROWS, 32))
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        cache = CacheTeacher(folder)
        found = train(student, rows, steps=STEPS, batch=BATCH, on=on, callbacks=[DistillCallback(cache, "kd")])
        error = _error(cache, teacher, model(256, 3), collate(rows[:8]))
    return found | {"bytes a token": size / (ROWS * LENGTH), **error}


def _classifier(part: str, on: Machine) -> Figures:
    """Seconds of a step of the models of the bench `step`."""
    rows, student = texts(ROWS, LENGTH, 2000, classes=2), step.model(256, 3)
    if part == "classifier":
        return train(student, rows, steps=STEPS, batch=BATCH, on=on)
    on.begin()
    with tempfile.TemporaryDirectory() as folder:
        CacheTeacher(folder, step.model(384, 6)).fill(collate(rows[at : at + 32]) for at in range(0, ROWS, 32))
        callbacks = [DistillCallback(CacheTeacher(folder), "kd")]
        return train(student, rows, steps=STEPS, batch=BATCH, on=on, callbacks=callbacks)


def _error(
    cache: CacheTeacher, teacher: BertForMaskedLM, student: BertForMaskedLM, batch: dict[str, torch.Tensor]
) -> Figures:
    """Mean KL to a student from all of the teacher's logits, and what is missing of it with the likeliest tokens."""
    del batch["labels"]
    cache.prepare(frozenset({"logits"}), torch.device("cpu"))
    with torch.no_grad():
        whole, own = (made(**batch).logits.flatten(0, 1) for made in (teacher, student.eval()))
    _, logits = cache.apart(batch)
    assert logits is not None
    sparse = logits.rows(torch.arange(len(own)), own)
    cache.close()
    values = [kl(theirs.log_softmax(-1), own.log_softmax(-1)).mean().item() for theirs in (whole, sparse)]
    return {"KL of all logits, nats": values[0], "KL of the likeliest, nats": values[1]}


def ratios(figures: Mapping[str, Figures]) -> Figures:
    """What a cached teacher costs."""
    cached = figures["cached"]
    return {
        "step with cached teacher / fine-tuning": cached["seconds"] / figures["fine-tuning"]["seconds"],
        "the same, classifier": figures["classifier cached"]["seconds"] / figures["classifier"]["seconds"],
        "share of the KL that top-k loses": 1 - cached["KL of the likeliest, nats"] / cached["KL of all logits, nats"],
    }


BENCH = Bench(
    setting=f"Masked BERT of 3 layers of width 256, vocabulary {VOCABULARY:,}, {BATCH} x {LENGTH} tokens, one label in "
    f"seven; top {TOP} of an untrained teacher's sharp logits. Fine-tuning takes the head's logits at all places, the "
    "callback at the scored ones. The classifier is that of the bench `step`.",
    parts=("fine-tuning", "cached", "classifier", "classifier cached"),
    run=run,
    gpu=True,
    ratios=ratios,
    bars={
        "step with cached teacher / fine-tuning": (1.10, 1.05),
        "the same, classifier": (1.10, 1.05),
    },
)
