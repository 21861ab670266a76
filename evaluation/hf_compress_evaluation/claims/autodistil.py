"""AutoDistil's claim: losses inside one SuperLM tell which student is the best alone."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from hf_compress_plugins.encoders._super_network import Architecture, extract, parameters
from hf_compress_plugins.encoders.autodistil import AutoDistil, AutoDistilConfig, autodistil, search, space_of
from scipy.stats import spearmanr
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertModel

from hf_compress import DistillCallback
from hf_compress.parts import Budget

from . import Claim
from . import _digits as digits
from .ernie_tiny import MASK, masked, rows

STEPS, TEACHER_STEPS, LIMIT, HELD_OUT = 300, 1000, 80_000, 1400
SUPER = {"hidden_size": 48, "intermediate_size": 192}
SPACE: dict[str, Any] = {"layers": (2, 3, 4), "heads": (2, 3, 4), "hidden": (48,), "ratios": (2.0, 4.0)}
"""Of heads of 16: 18 students."""
PARTS: Mapping[str, tuple[Sequence[Mapping[str, Any]], int]] = {
    "one space": ([SPACE], STEPS),
    "three sub-spaces": ([SPACE | {"layers": (count,)} for count in SPACE["layers"]], STEPS // 3),
    "one space, 4 x the steps": ([SPACE], 4 * STEPS),
}
"""Spaces, and steps of the SuperLM of each."""


def plain(batch: Any) -> dict[str, Tensor]:
    """Sequences without labels."""
    return {"input_ids": torch.stack([row["input_ids"] for row in batch])}


@cache
def teacher() -> Any:
    """A body of four layers of width 64 that has learned to fill in squares of images."""
    config = BertConfig(
        vocab_size=MASK + 1, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256,
        max_position_embeddings=16,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, body = BertForMaskedLM(config), BertModel(config, add_pooling_layer=False)
    _train(model, masked, TEACHER_STEPS, 0)
    body.load_state_dict(model.bert.state_dict())
    return body.eval()


def _train(model: Any, collator: Any, steps: int, seed: int, **settings: Any) -> Any:
    data = rows(slice(0, digits.TRAIN))
    return digits.train(
        model, data=data, data_collator=collator, steps=steps, seed=seed, batch=32, learning_rate=1e-3, **settings
    )


def distilled(student: Any, space: Mapping[str, Any], seed: int, steps: int) -> Any:
    """A SuperLM, or a student alone where the space is of one."""
    return _train(student, plain, steps, seed, callbacks=[DistillCallback(teacher(), AutoDistil(**space, seed=seed))])


def losses(student: Any, space: Mapping[str, Any]) -> dict[Architecture, float]:
    """Held-out loss of each student of the space within the limit."""
    data = [plain(rows(slice(digits.TRAIN, HELD_OUT)))]
    budget, settings = Budget(parameters=LIMIT), AutoDistilConfig(**space)
    found = search(teacher(), data=data, budget=budget, student=student, config=settings)
    return {Architecture(**sizes): -score for sizes, score in zip(found.configs, found.scores, strict=True)}


def start() -> Any:
    """What every training begins with."""
    return autodistil(teacher(), config=SUPER)


@cache
def truth(seed: int) -> dict[Architecture, float]:
    """Held-out loss of every student within the limit after a training alone, which begins with the start's part."""
    found = dict[Architecture, float]()
    for sizes in space_of(AutoDistilConfig(**SPACE), start().config):
        if parameters(start(), sizes) > LIMIT:
            continue
        depth, heads, width, between = sizes
        own = {"layers": (depth,), "heads": (heads,), "hidden": (width,), "ratios": (between / width,)}
        found |= losses(distilled(extract(start(), sizes, of="teacher"), own, seed, STEPS), own)
    return found


def scores(variant: str, seed: int) -> dict[Architecture, float]:
    """Of every student within the limit, lower is better."""
    students = sorted(truth(seed))
    if variant == "random":
        return dict(zip(students, random.Random(seed).sample(range(len(students)), len(students)), strict=True))
    if variant == "most parameters":
        return {sizes: -parameters(start(), sizes) for sizes in students}
    if variant == "untrained SuperLM":
        return losses(start(), SPACE)
    (parts, steps), found = PARTS[variant], dict[Architecture, float]()
    for space in parts:
        found |= losses(distilled(start(), space, seed, steps), space)
    return found


def run(variant: str, seed: int) -> Mapping[str, float]:
    """Rank correlation of the scores with the truth, and what the student of the best score is worth."""
    alone, found = truth(seed), scores(variant, seed)
    students = sorted(alone)
    first = min(students, key=found.__getitem__)
    figures = {
        "Spearman's ρ": float(spearmanr([found[s] for s in students], [alone[s] for s in students]).statistic),
        "loss of the first alone, 1e-4": 1e4 * alone[first],
        "of the best": 1e4 * min(alone.values()),
        "of the mean": 1e4 * sum(alone.values()) / len(alone),
    }
    return figures | ({"of the first as found": 1e4 * found[first]} if variant in PARTS else {})


CLAIM = Claim(
    published="Of 2.13 GFLOPs a GLUE average of 79.6 by a search that trains no candidate, of 4.40 GFLOPs 81.7 against "
    "81.0 of MiniLM; three sub-spaces are better than one of all students (MRPC and RTE 91.2 and 71.8 against "
    "85.1 and 62.8).",
    check="Digits as 16 tokens of brightness. Teacher: 4 layers of width 64, fills in squares. SuperLM: its top "
    "left of width 48; 2 to 4 layers, 2 to 4 heads of 16, feed-forward of 2 or 4 widths: 18 students, of "
    f"which those of at most {LIMIT:,} parameters are compared. Truth: the loss on 200 other images of each, "
    f"trained alone for {STEPS} steps from the same start. SuperLMs: {STEPS} steps; of the three sub-spaces, "
    "one for each depth, a third of them each.",
    expected="A ρ above that of a random order, and a first student better than the mean; three sub-spaces above one.",
    variants=("random", "most parameters", "untrained SuperLM", *PARTS),
    run=run,
)
