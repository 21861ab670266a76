"""Generalised knowledge distillation beside TRL's trainers: value, gradient over micro-batches, time and memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from datasets import Dataset
from hf_compress_plugins.general.gkd import GKD, gkd
from torch import Tensor
from transformers import Trainer

from hf_compress import DistillCallback

from . import Bench, Figures
from . import _language as language
from ._language import ANSWER, DATA, OURS, PARTS, PROMPT, VALUES
from ._machine import Machine
from ._steps import texts
from .chunked import LENGTH, ROWS, VOCABULARY

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
OWN = "on the student's answers"
"""A way beside those of `_language`."""
GKDS, STABLE = "GKDTrainer", "DistillationTrainer"
PEERS = {GKDS: (DATA, OWN), STABLE: (OWN,)}
"""The second one has no other way."""
SAME: Mapping[str, Any] = {"beta": 0.5, "temperature": 1.0, "gradient_checkpointing": False}
"""Of both; without recomputation they are fastest."""


def ours(teacher: Any, way: str) -> dict[str, Any]:
    """What `train` gets of a Trainer with the callback."""
    method = GKD(beta=0.5, lmbda=float(way == OWN), max_new_tokens=ANSWER, sampling_temperature=1.0)
    return {"callbacks": [DistillCallback(teacher, method)], "remove_unused_columns": False}


def gkd_trainer(teacher: Any, way: str) -> dict[str, Any]:
    """What `train` gets of TRL's trainer of the paper."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    def made(*, train_dataset: list[Any], **given: Any) -> Trainer:
        rows = Dataset.from_list(train_dataset)
        found: Trainer = GKDTrainer(
            teacher_model=teacher, processing_class=language.tokenizer(), train_dataset=rows, **given
        )
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
            teacher_model=teacher, processing_class=language.tokenizer(), train_dataset=rows, **given
        )
        return found

    assert way == OWN
    return {"made": made, "arguments": DistillationConfig, **SAME, "max_completion_length": ANSWER}


SIDES: Mapping[str, language.Side] = {OURS: ours, GKDS: gkd_trainer, STABLE: distillation_trainer}


def run(part: str, on: Machine) -> Figures:
    """See `_language.run`."""
    return language.run(part, on, sides=SIDES, values=values, rows=rows, collator=language.read)


def rows(way: str) -> list[dict[str, Any]]:
    """Of a way."""
    return language.prompts() if way == OWN else texts(ROWS, LENGTH, VOCABULARY)


def values() -> Iterator[tuple[Tensor, Tensor]]:
    """Mean divergences over β, and over logits mild and sharp."""
    from trl.experimental.gkd import GKDTrainer

    for scale in (1.0, 5.0):
        logits = scale * torch.randn(2, 2, 64, VOCABULARY)
        for beta in BETAS:
            theirs = GKDTrainer.generalized_jsd_loss(*logits, labels=torch.zeros(2, 64, dtype=torch.long), beta=beta)
            yield gkd(*(side.flatten(0, 1) for side in logits), beta=beta).mean(), theirs


def ratios(figures: Mapping[str, Figures]) -> Figures:
    """Of ours to TRL's, and what both compute."""
    return language.ratios(figures, "JSD", PEERS)


BENCH = Bench(
    setting=f"Generalised JSD, β = 0.5, of the bench `chunked`'s models, vocabulary {VOCABULARY:,}: ours / TRL's "
    f"trainers (no recomputation). On the data {ROWS * (LENGTH - 1):,} scored positions; on the student's "
    f"answers {ROWS} prompts of {PROMPT} tokens with {ANSWER} sampled at temperature 1. The difference of values is "
    f"the largest over β of {', '.join(map(str, BETAS))}; gradients are of 4 rows of unequal lengths.",
    parts=(
        VALUES,
        *(f"{side}, {DATA}" for side in (OURS, GKDS)),
        *(f"{side}, {OWN}" for side in SIDES),
        *(f"{side}, {PARTS}" for side in (OURS, GKDS)),
    ),
    once=(VALUES, *(f"{side}, {PARTS}" for side in (OURS, GKDS))),
    peer="trl",
    run=run,
    gpu=True,
    ratios=ratios,
    bars=language.bars("JSD", GKDS),
)
