"""Generalised knowledge distillation beside TRL's trainers: value, gradient over micro-batches, time and memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from hf_compress_plugins.general.gkd import GKD, gkd
from transformers import Trainer

from hf_compress import DistillCallback

from . import Bench, Figures
from ._gradients import after_accumulation
from ._language import ANSWER, LENGTH, PROMPT, ROWS, STEPS, VOCABULARY, beside, models, prompts, read, tokenizer
from ._machine import Machine
from ._steps import texts, train

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
DATA, OWN, PARTS = "on the data", "on the student's answers", "micro-batches"
"""Ways in which a part goes."""
GKDS, STABLE = "GKDTrainer", "DistillationTrainer"
PEERS = {GKDS: (DATA, OWN), STABLE: (OWN,)}
"""The second one has no other way."""
SAME: Mapping[str, Any] = {"beta": 0.5, "temperature": 1.0, "bf16": False, "gradient_checkpointing": False}
"""Of both, float32 and without recomputation, which is their fastest on a CPU."""


def ours(teacher: Any, way: str) -> dict[str, Any]:
    """What `train` gets of a Trainer with the callback."""
    method = GKD(beta=0.5, lmbda=float(way == OWN), max_new_tokens=ANSWER, sampling_temperature=1.0)
    return {"callbacks": [DistillCallback(teacher, method)], "remove_unused_columns": False}


def gkd_trainer(teacher: Any, way: str) -> dict[str, Any]:
    """What `train` gets of TRL's trainer of the paper."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    def made(*, train_dataset: list[Any], **given: Any) -> Trainer:
        rows = Dataset.from_list(train_dataset)
        found: Trainer = GKDTrainer(teacher_model=teacher, processing_class=tokenizer(), train_dataset=rows, **given)
        return found

    return {"made": made, "arguments": GKDConfig, **SAME, "lmbda": float(way == OWN), "max_new_tokens": ANSWER}


def distillation_trainer(teacher: Any, way: str) -> dict[str, Any]:
    """What `train` gets of TRL's trainer with a loss in chunks."""
    from trl import DistillationConfig, DistillationTrainer

    def made(*, train_dataset: list[Any], **given: Any) -> Trainer:
        del given["data_collator"]  # it tokenizes by itself
        texts = [" ".join(map(str, row["input_ids"][:PROMPT])) for row in train_dataset]
        rows = Dataset.from_dict({"prompt": texts})
        found: Trainer = DistillationTrainer(
            teacher_model=teacher, processing_class=tokenizer(), train_dataset=rows, **given
        )
        return found

    assert way == OWN
    return {"made": made, "arguments": DistillationConfig, **SAME, "max_completion_length": ANSWER}


SIDES = {"ours": ours, GKDS: gkd_trainer, STABLE: distillation_trainer}


def run(part: str, on: Machine) -> Figures:
    """Seconds and megabytes of steps, values of the divergence, or gradients."""
    if part == "values":
        return values()
    side, way = part.split(", ")
    student, teacher = models()
    settings = SIDES[side](teacher, way)
    if way != PARTS:
        rows = prompts() if way == OWN else texts(ROWS, LENGTH, VOCABULARY)
        return train(student, rows, steps=STEPS, batch=ROWS, on=on, collator=read, **settings)
    return {"relative difference": after_accumulation(student, settings, vocabulary=VOCABULARY, on=on)}


def values() -> Figures:
    """The largest relative difference of the mean divergence, over β, and over logits mild and sharp."""
    from trl.experimental.gkd import GKDTrainer

    torch.manual_seed(0)
    found = []
    for scale in (1.0, 5.0):
        logits = scale * torch.randn(2, 2, 64, VOCABULARY)
        for beta in BETAS:
            peer = GKDTrainer.generalized_jsd_loss(*logits, labels=torch.zeros(2, 64, dtype=torch.long), beta=beta)
            own = gkd(*(side.flatten(0, 1) for side in logits), beta=beta).mean()
            found.append(float((own - peer).abs() / peer))
    return {"relative difference": max(found)}


def ratios(figures: Mapping[str, Figures]) -> Figures:
    """Of ours to TRL's, and what both compute."""
    return {
        "JSD, relative difference": figures["values"]["relative difference"],
        **beside(figures, PEERS),
        **{
            f"gradient of 4 micro-batches against 1, {side}": figures[f"{side}, {PARTS}"]["relative difference"]
            for side in ("ours", GKDS)
        },
    }


BENCH = Bench(
    setting=f"Generalised JSD, β = 0.5, of the bench `chunked`'s models, vocabulary {VOCABULARY:,}: ours / TRL's "
    f"trainers (float32, no recomputation). On the data {ROWS * (LENGTH - 1):,} scored positions; on the student's "
    f"answers {ROWS} prompts of {PROMPT} tokens with {ANSWER} sampled at temperature 1. The difference of values is "
    f"the largest over β of {', '.join(map(str, BETAS))}; gradients are of 4 rows of unequal lengths.",
    parts=(
        "values",
        *(f"{side}, {DATA}" for side in ("ours", GKDS)),
        *(f"{side}, {OWN}" for side in SIDES),
        *(f"{side}, {PARTS}" for side in ("ours", GKDS)),
    ),
    once=("values", *(f"{side}, {PARTS}" for side in ("ours", GKDS))),
    peer="trl",
    run=run,
    gpu=True,
    ratios=ratios,
    bars={
        "JSD, relative difference": (1e-6, 1e-6),
        f"time, {DATA}, to {GKDS}": (0.6, 0.35),
        f"memory, {DATA}, to {GKDS}": (0.35, 0.20),
    },
)
