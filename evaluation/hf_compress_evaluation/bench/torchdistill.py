"""Distillation of an encoder beside torchdistill's `DistillationBox`: accuracy at equal steps, time, a sweep of T."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import get_linear_schedule_with_warmup

from . import Bench, Figures
from . import _sentiment as s
from ._machine import Machine

PEER = "torchdistill"
ALPHA = 0.9
"""Weight of the labels in its loss, α · CE + (1 - α) · T² · KL."""


def recipe(temperature: float, epochs: int = s.EPOCHS) -> s.Recipe:
    """As its published configuration for sentiment (GLUE's SST-2) has it but for T, which there is 3."""
    return s.Recipe(temperature=temperature, soft=(1 - ALPHA) * temperature**2, hard=ALPHA, clip=1.0, epochs=epochs)


RECIPE = recipe(3.0)
UNLABELLED = f"{PEER} without labels"


def theirs(given: s.Given, recipe: s.Recipe, seed: int, output: Path) -> None:
    """`DistillationBox` in the loop of its examples, with the labels as targets."""
    from torchdistill.core.distillation import get_distillation_box
    from torchdistill.datasets.registry import register_collate_func
    from torchdistill.optim.registry import register_scheduler

    register_collate_func(s.pad, key="pad")
    register_scheduler(get_linear_schedule_with_warmup, key="linear")
    rows = s.in_order(given.train, seed, recipe.epochs)
    box = get_distillation_box(
        given.teacher,
        given.student,
        {"train": rows},
        configuration(recipe, s.steps(replace(recipe, epochs=1), rows)),
        device=torch.device("cpu"),
        device_ids=None,
        distributed=False,
        lr_factor=1,
    )
    for epoch in range(box.num_epochs):
        box.pre_epoch_process(epoch=epoch)
        for batch in box.train_data_loader:
            loss = box.forward_process(batch, targets=batch["labels"], supp_dict=None)
            box.post_forward_process(loss=loss)
        box.post_epoch_process()
    student: Any = given.student
    student.save_pretrained(output)


def configuration(recipe: s.Recipe, steps: int) -> dict[str, Any]:
    """Of a stage, as its YAML files have it; the rows of all epochs lie in one."""
    model = {
        "forward_proc": "forward_batch_only_as_kwargs",
        "forward_hook": {"input": [], "output": ["classifier"]},
        "frozen_modules": [],
        "sequential": [],
    }
    return {
        "num_epochs": 1,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": SequentialSampler},
            "collate_fn": "pad",
            "requires_supp": False,
            "kwargs": {"batch_size": s.BATCH},
        },
        "teacher": {**model, "requires_grad": False},
        "student": {**model, "requires_grad": True},
        "optimizer": {
            "key": "AdamW",
            "kwargs": {"lr": s.RATE, "weight_decay": 0.0, "fused": True},
            "max_grad_norm": recipe.clip,
            "grad_accum_step": 1,
        },
        "scheduler": {
            "key": "linear",
            "kwargs": {"num_warmup_steps": 0, "num_training_steps": steps},
            "scheduling_step": 1,
        },
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": {"criterion": {"key": "KDLoss", "kwargs": of_loss(recipe)}, "weight": 1.0}}},
        },
    }


def of_loss(recipe: s.Recipe) -> dict[str, Any]:
    """Settings of its `KDLoss`."""
    where = {f"{model}_module_{what}" for model in ("student", "teacher") for what in ("path", "io")}
    return {
        **{name: "classifier" if name.endswith("path") else "output" for name in where},
        "temperature": recipe.temperature,
        "alpha": recipe.hard,
        "beta": recipe.soft / recipe.temperature**2,
        "reduction": "batchmean",
    }


def unlabelled(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
    """Its loss where it gets no labels: the divergence alone, without T²."""
    del labels
    return _loss(student_logits, teacher_logits, None, temperature)


def soft(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The soft targets' part of its loss beside labels: both have weight 1, and the labels' part is taken off."""
    whole = _loss(student_logits, teacher_logits, labels, temperature)
    return whole - torch.nn.functional.cross_entropy(student_logits, labels)


def _loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
    from torchdistill.losses.mid_level import KDLoss

    made = KDLoss(**of_loss(s.Recipe(temperature=temperature, soft=temperature**2, hard=1.0)))
    student, teacher = ({"classifier": {"output": logits}} for logits in (student_logits, teacher_logits))
    found: Tensor = made(student, teacher, targets=labels)
    return found


def run(part: str, on: Machine, folder: Path, *, seed: int) -> Figures:
    """What is known at the start, or a training."""
    if part == s.START:
        return s.before(folder, {PEER: soft, UNLABELLED: unlabelled}, on)
    side, _, way = part.partition(", T = ")
    sides: dict[str, s.Side] = {"ours": s.ours, PEER: theirs}
    return s.figures(sides[side], recipe(float(way), 1) if way else RECIPE, folder, on=on, seed=seed)


def ratios(figures: Mapping[str, Figures]) -> Figures:
    """Of ours to torchdistill's."""
    return s.beside(figures, PEER, losses=(PEER, UNLABELLED))


BENCH = Bench(
    setting=f"{s.SETTING} {ALPHA:g} of the labels and {1 - ALPHA:.1g} of T² KL at T = {RECIPE.temperature:g}, "
    "gradients clipped to 1, as torchdistill's published configuration for SST-2 has it, with its DistillationBox in "
    "the loop of its examples. Where its loss gets no labels, or none of their weight, it is the KL alone without T²; "
    "in training it gets them.",
    parts=(s.START, "ours", PEER, *s.sweep(PEER)),
    once=(s.START, *s.sweep(PEER)),
    peer=PEER,
    run=run,
    ratios=ratios,
    bars={f"accuracy, {PEER} - ours": (0.01, 0.0), f"time, ours / {PEER}": (1.05, 1.0)},
    prepare=s.prepare,
    seeded=True,
)
