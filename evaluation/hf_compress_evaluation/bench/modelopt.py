"""Distillation of logits beside ModelOpt's KDTrainer: value, gradient over micro-batches, time and memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from hf_compress_plugins.general.kd import KD, kd
from transformers import Trainer

from hf_compress import DistillCallback

from . import Bench, Figures
from ._gradients import after_accumulation
from ._language import LENGTH, ROWS, STEPS, VOCABULARY, beside, models
from ._machine import Machine
from ._steps import texts, train

TEMPERATURES = (1.0, 2.0, 4.0)
DATA, PARTS = "on the data", "micro-batches"
"""Ways in which a part goes."""
PEER = "KDTrainer"


def ours(teacher: Any) -> dict[str, Any]:
    """What `train` gets of a Trainer with the callback; ModelOpt's has no loss of the task either."""
    return {"callbacks": [DistillCallback(teacher, KD(temperature=2.0), task_weight=0.0)]}


def theirs(teacher: Any) -> dict[str, Any]:
    """What `train` gets of ModelOpt's trainer: its path without Liger's kernels, which are for GPUs."""
    from modelopt.torch.distill.plugins.huggingface import KDTrainer

    def made(**given: Any) -> Trainer:
        found: Trainer = KDTrainer(distill_args={"teacher_model": teacher, "temperature": 2.0}, **given)
        return found

    return {"made": made}


def run(part: str, on: Machine) -> Figures:
    """Seconds and megabytes of steps, values of the divergence, or gradients."""
    if part == "values":
        return values()
    side, way = part.split(", ")
    student, teacher = models()
    settings = (ours if side == "ours" else theirs)(teacher)
    if way == DATA:
        return train(student, texts(ROWS, LENGTH, VOCABULARY), steps=STEPS, batch=ROWS, on=on, **settings)
    return {"relative difference": after_accumulation(student, settings, vocabulary=VOCABULARY, on=on)}


def values() -> Figures:
    """The largest relative difference of the mean divergence, over T, and over logits mild and sharp."""
    from modelopt.torch.distill.losses import LogitsDistillationLoss

    torch.manual_seed(0)
    found = []
    for scale in (1.0, 5.0):
        logits = scale * torch.randn(2, 128, VOCABULARY)
        for temperature in TEMPERATURES:
            peer = LogitsDistillationLoss(temperature=temperature, reduction="none")(*logits).mean()
            own = kd(*logits, temperature=temperature).mean()
            found.append(float((own - peer).abs() / peer))
    return {"relative difference": max(found)}


def ratios(figures: Mapping[str, Figures]) -> Figures:
    """Of ours to ModelOpt's, and what both compute."""
    return {
        "KL, relative difference": figures["values"]["relative difference"],
        **beside(figures, {PEER: (DATA,)}),
        **{
            f"gradient of 4 micro-batches against 1, {side}": figures[f"{side}, {PARTS}"]["relative difference"]
            for side in ("ours", PEER)
        },
    }


BENCH = Bench(
    setting=f"KL at T = 2 of the bench `chunked`'s models, vocabulary {VOCABULARY:,}: ours / ModelOpt's KDTrainer "
    f"(float32, without Liger's kernels, which are for GPUs), {ROWS * (LENGTH - 1):,} scored positions. The difference "
    f"of values is the largest over T of {', '.join(map(str, TEMPERATURES))}; gradients are of 4 rows of unequal "
    "lengths.",
    parts=("values", *(f"{side}, {way}" for way in (DATA, PARTS) for side in ("ours", PEER))),
    once=("values", *(f"{side}, {PARTS}" for side in ("ours", PEER))),
    peer="nvidia-modelopt",
    run=run,
    gpu=True,
    ratios=ratios,
    bars={
        "KL, relative difference": (1e-6, 1e-6),
        f"time, {DATA}, to {PEER}": (0.6, 0.35),
        f"memory, {DATA}, to {PEER}": (0.35, 0.20),
    },
)
