"""The callback's own cost: a step with it against the student's step and the teacher's forward by hand."""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import median

import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_compress import DistillCallback

from . import Bench, Figures
from ._machine import Machine
from ._steps import WARM, collate, texts, train

ROWS, LENGTH, BATCH, STEPS = 256, 64, 16, 30


def model(width: int, layers: int) -> BertForSequenceClassification:
    """An untrained classifier."""
    torch.manual_seed(layers)
    config = BertConfig(
        vocab_size=2000, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32,
        intermediate_size=4 * width, num_labels=2,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def run(part: str, on: Machine) -> Figures:
    """Seconds of a step, or of the teacher's forward alone."""
    rows = texts(ROWS, LENGTH, 2000, classes=2)
    student, teacher = model(256, 3), model(384, 6)
    if part == "teacher by hand":
        on.begin()
        teacher.eval()
        seconds = []
        for number in range(STEPS):
            batch = collate(rows[BATCH * number % ROWS :][:BATCH])
            del batch["labels"]
            begun = time.perf_counter()
            with torch.no_grad():
                teacher(**batch)
            seconds.append(time.perf_counter() - begun)
        return {"seconds": median(seconds[WARM:])}
    callbacks = [DistillCallback(teacher, "kd")] if part == "callback" else []
    return train(student, rows, steps=STEPS, batch=BATCH, on=on, callbacks=callbacks)


def ratios(figures: Mapping[str, Figures]) -> Figures:
    """What the callback costs."""
    by_hand = figures["student alone"]["seconds"] + figures["teacher by hand"]["seconds"]
    return {"step with callback / by hand": figures["callback"]["seconds"] / by_hand}


BENCH = Bench(
    setting=f"BERT of 3 layers of width 256 taught by one of 6 of width 384, {BATCH} x {LENGTH} tokens, kd.",
    parts=("student alone", "teacher by hand", "callback"),
    run=run,
    gpu=True,
    ratios=ratios,
    bars={"step with callback / by hand": (1.05, 1.02)},
)
