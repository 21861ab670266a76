"""Distillation of logits beside ModelOpt's KDTrainer: value, gradient over micro-batches, time and memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from hf_compress_plugins.general.kd import KD, kd
from torch import Tensor
from transformers import Trainer

from hf_compress import DistillCallback

from . import Bench, Figures
from . import _language as language
from ._language import DATA, OURS, PARTS, VALUES
from ._machine import Machine
from .chunked import LENGTH, ROWS, VOCABULARY

TEMPERATURES = (1.0, 2.0, 4.0)
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
    """See `_language.run`."""
    sides = {OURS: lambda teacher, _: ours(teacher), PEER: lambda teacher, _: theirs(teacher)}
    return language.run(part, on, sides=sides, values=values)


def values() -> Iterator[tuple[Tensor, Tensor]]:
    """Mean divergences over T, and over logits mild and sharp."""
    from modelopt.torch.distill.losses import LogitsDistillationLoss

    for scale in (1.0, 5.0):
        logits = scale * torch.randn(2, 128, VOCABULARY)
        for temperature in TEMPERATURES:
            theirs = LogitsDistillationLoss(temperature=temperature, reduction="none")(*logits).mean()
            yield kd(*logits, temperature=temperature).mean(), theirs


def ratios(figures: Mapping[str, Figures]) -> Figures:
    """Of ours to ModelOpt's, and what both compute."""
    return language.ratios(figures, "KL", {PEER: (DATA,)})


BENCH = Bench(
    setting=f"KL at T = 2 of the bench `chunked`'s models, vocabulary {VOCABULARY:,}: ours / ModelOpt's KDTrainer "
    f"(without Liger's kernels, which are for GPUs), {ROWS * (LENGTH - 1):,} scored positions. The difference "
    f"of values is the largest over T of {', '.join(map(str, TEMPERATURES))}; gradients are of 4 rows of unequal "
    "lengths.",
    parts=(VALUES, *(f"{side}, {way}" for way in (DATA, PARTS) for side in (OURS, PEER))),
    once=(VALUES, *(f"{side}, {PARTS}" for side in (OURS, PEER))),
    peer="nvidia-modelopt",
    run=run,
    gpu=True,
    ratios=ratios,
    bars=language.bars("KL", PEER),
)
