"""Distillation of an encoder beside TextBrewer's distillers: accuracy at equal steps, time, and a sweep of T."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import get_linear_schedule_with_warmup

from . import Bench, Figures
from . import _sentiment as s
from ._machine import Machine

PEER = "textbrewer"
RECIPE = s.Recipe(temperature=4.0, soft=1.0, hard=0.0)
"""Its defaults: the soft targets alone."""


def theirs(given: s.Given, recipe: s.Recipe, seed: int, output: Path) -> None:
    """`GeneralDistiller`, which its documentation recommends for one teacher and one task."""
    from textbrewer import GeneralDistiller

    rows = s.in_order(given.train, seed, recipe.epochs)
    _train(GeneralDistiller, given, replace(recipe, epochs=1), rows, output)


def theirs_cached(given: s.Given, recipe: s.Recipe, seed: int, output: Path) -> None:
    """`BasicDistiller` with the option that runs the teacher once for each batch."""
    from textbrewer import BasicDistiller

    random.seed(seed)  # by which it shuffles its batches as `in_order` does
    _train(BasicDistiller, given, recipe, s.drawn(given.train, seed), output, is_caching_logits=True)


def _train(made: Any, given: s.Given, recipe: s.Recipe, rows: Any, output: Path, **settings: Any) -> None:
    from textbrewer import DistillationConfig, TrainingConfig

    def adaptor(batch: Any, outputs: Any) -> dict[str, Any]:
        del batch  # the labels have no weight
        return {"logits": outputs.logits}

    distiller = made(
        train_config=TrainingConfig(device="cpu", output_dir=str(output), ckpt_epoch_frequency=recipe.epochs),
        distill_config=DistillationConfig(
            temperature=recipe.temperature,
            hard_label_weight=recipe.hard,
            kd_loss_type="ce",
            kd_loss_weight=recipe.soft,
            **settings,
        ),
        model_T=given.teacher,
        model_S=given.student,
        adaptor_T=adaptor,
        adaptor_S=adaptor,
    )
    with distiller:
        distiller.train(
            torch.optim.AdamW(given.student.parameters(), lr=s.RATE, weight_decay=0.0, fused=True),
            s.loader(rows),
            num_epochs=recipe.epochs,
            scheduler_class=get_linear_schedule_with_warmup,
            scheduler_args={"num_warmup_steps": 0, "num_training_steps": s.steps(recipe, rows)},
            max_grad_norm=recipe.clip or -1.0,
        )


def soft(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Its loss of the soft targets, whose gradient is the divergence's, without T²."""
    from textbrewer.losses import kd_ce_loss

    del labels
    found: Tensor = kd_ce_loss(student_logits, teacher_logits, temperature)
    return found


def run(part: str, on: Machine, folder: Path, *, seed: int) -> Figures:
    """What is known at the start, or a training."""
    if part == s.START:
        return s.before(folder, {PEER: soft}, on)
    side, _, way = part.partition(", ")
    recipe = RECIPE
    if way.startswith("T = "):
        recipe = replace(recipe, temperature=float(way.removeprefix("T = ")), epochs=1)
    sides: dict[str, s.Side] = {"ours": s.ours, PEER: theirs}
    cached: dict[str, s.Side] = {"ours": s.ours_cached, PEER: theirs_cached}
    return s.figures((cached if way == s.CACHED else sides)[side], recipe, folder, on=on, seed=seed)


def ratios(figures: Mapping[str, Figures]) -> Figures:
    """Of ours to TextBrewer's, live and cached."""
    return s.beside(figures, PEER, ways=("", f", {s.CACHED}"))


BENCH = Bench(
    setting=f"{s.SETTING} The soft targets alone at T = {RECIPE.temperature:g} and no clipping, TextBrewer's defaults; "
    "live its GeneralDistiller, cached its BasicDistiller with is_caching_logits, of one seed. Its soft loss is the "
    "cross-entropy to the teacher's softened classes without T²: ours is divided by T² in training. Gradients are of "
    "each side's soft loss as it is.",
    parts=(s.START, "ours", PEER, *(f"{side}, {s.CACHED}" for side in ("ours", PEER)), *s.sweep(PEER)),
    once=(s.START, *(f"{side}, {s.CACHED}" for side in ("ours", PEER)), *s.sweep(PEER)),
    peer=PEER,
    run=run,
    ratios=ratios,
    bars={
        f"accuracy, {PEER} - ours": (0.01, 0.0),
        f"time, ours / {PEER}": (1.05, 1.0),
        f"time, {s.CACHED}, ours / {PEER}": (1.05, 1.0),
    },
    prepare=s.prepare,
    seeded=True,
)
