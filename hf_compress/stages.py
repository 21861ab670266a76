"""Trainings that follow each other: each stage with its own teacher, data, methods, trainable part and schedule.

A method that is a sequence of trainings declares it as a mapping, its `recipe`:

    RECIPE = {"stages": ({"name": "general", "teacher": "pretrained", "data": "text", "methods": ("features",)}, ...)}

`run_stages` carries a student through it. A finished stage is a model folder and is never repeated; a killed one goes
on from its last checkpoint. Optimizer and schedule start anew with each stage.
"""

from __future__ import annotations

import copy
import inspect
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed

from . import facts, foreign, registry
from .callback import DistillCallback
from .data import Augmented
from .errors import ConfigurationError, UnknownNameError
from .fitting import train_into, unfinished
from .objective import Objective
from .recipe import validated
from .taps import body, unwrap

logger = logging.getLogger(__name__)

ORDER = "stages"
"""The key of a recipe that holds its stages."""
LEARNED = "learned.safetensors"
"""Beside a stage's model: what its methods learned with it (projections), for the stage after it; never pushed."""


class Stage(BaseModel):
    """One training of the student."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    name: str = Field(min_length=1, pattern=r"^[\w-]+$")
    teacher: str | None = Field(description="key of the models; None: no teacher")
    data: str = Field(description="key of the data sets")
    methods: tuple[str | Mapping[str, Any] | Objective, ...] = Field(
        description="names, or {name: …, weight: …} with settings; empty: the task's own loss alone"
    )
    preparation: str | Mapping[str, Any] | None = Field(
        default=None, description="name, or {name: …} with settings, of the method that makes the data set, or collator"
    )
    frozen: Mapping[str, str] = Field(default={}, description="role of a further frozen model to key of the models")
    labels: bool = Field(default=True, description="False: the stage does not see the labels")
    task_weight: float | None = Field(default=None, ge=0)
    trainable: str = Field(default="all", description='"all", "body", or a regular expression of parameter names')
    start: Literal["previous", "first"] = Field(default="previous", description="weights that the stage starts from")
    keep_as: str | None = Field(default=None, description="key under which later stages find the model that came out")
    arguments: Mapping[str, Any] = Field(default={}, description="of TrainingArguments, e.g. learning_rate, optim")


def stages_of(recipe: Mapping[str, Any]) -> tuple[Stage, ...]:
    """The stages of a recipe, validated.

    Raises:
        UnknownNameError: for an unknown key, with the nearest.
        ForeignFileError: for a malformed value.
        ConfigurationError: if there are none, or two of one name.
    """
    found = tuple(validated(Stage, stage, f"stage {place}") for place, stage in enumerate(recipe.get(ORDER, ())))
    names = [stage.name for stage in found]
    if not found or len(set(names)) < len(names):
        raise ConfigurationError(f"a recipe needs stages of different names under {ORDER!r}, got {names}.")
    return found


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What every stage is run with."""

    models: Mapping[str, PreTrainedModel | str]
    """Teachers and further frozen models, by the keys that the stages name."""
    data: Mapping[str, Any]
    """Training sets, by the keys that the stages name."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Of TrainingArguments; a stage's own come on top."""
    data_collator: Callable[..., Any] | None = None
    processing_class: Any = None
    preparing: Mapping[str, Any] = field(default_factory=dict)
    """What preparations are given besides, by the names of their parameters: tokenizers, models, held-out rows;
    `processing_class` is their `tokenizer`, `seed` their `seed`."""
    callbacks: Sequence[TrainerCallback] = ()
    progress: bool = True
    seed: int = 0


def run_stages(
    recipe: Mapping[str, Any], student: PreTrainedModel, folder: Path, surroundings: Surroundings
) -> PreTrainedModel:
    """Carries a student through all stages.

    Args:
        recipe: a method's `recipe`.
        student: its start; left as it is.
        folder: each stage leaves its model in `<place>-<name>/` there.
        surroundings: models, data and settings.

    Returns:
        the student after the last stage, its record with the earlier stages under `before`.

    Raises:
        UnknownNameError: before anything is trained, if a stage names a model or a data set that is not given.
    """
    stages = stages_of(recipe)
    _check_keys(stages, surroundings)
    models, records, current = dict(surroundings.models), list[Any](), student
    previous: Path | None = None
    for place, stage in enumerate(stages):
        target = folder / f"{place}-{stage.name}"
        start = copy.deepcopy(student if stage.start == "first" else current)
        current = _run(stage, start, target, replace(surroundings, models=models), previous)
        previous = target
        records.append(getattr(current.config, "compression", None))
        if stage.keep_as is not None:
            models[stage.keep_as] = copy.deepcopy(current)
    if isinstance(records[-1], dict):
        before = [record | {"before": []} for record in records[:-1] if isinstance(record, dict)]
        record = facts.Training.model_validate(records[-1] | {"before": before})
        current.config.compression = record.model_dump(mode="json", exclude_none=True)
    return current


def _check_keys(stages: Sequence[Stage], surroundings: Surroundings) -> None:
    known = set(surroundings.models)
    for stage in stages:
        for key in (stage.teacher, *stage.frozen.values()):
            if key is not None and key not in known:
                raise UnknownNameError(f"model of stage {stage.name}", key, sorted(known))
        if stage.data not in surroundings.data:
            raise UnknownNameError(f"data of stage {stage.name}", stage.data, sorted(surroundings.data))
        _preparation(stage)
        known |= {stage.keep_as} if stage.keep_as else set()


def _run(
    stage: Stage, student: PreTrainedModel, target: Path, around: Surroundings, before: Path | None
) -> PreTrainedModel:
    """The student after one stage; a finished one is loaded. What was learned beside it before goes on."""
    if target.is_dir():
        logger.info("  %s: is there", target.name)
        found: PreTrainedModel = type(student).from_pretrained(target, **foreign.SAFE)
        return found
    freeze(student, stage.trainable)
    set_seed(around.seed)
    settings: dict[str, Any] = {"save_strategy": "epoch", "save_total_limit": 1, "report_to": [], "disable_tqdm": True}
    settings |= {"seed": around.seed} | dict(around.arguments) | dict(stage.arguments)
    callback = _distilling(stage, around)
    rows, collator = _prepared(stage, around)
    own = [rows.callback()] if isinstance(rows, Augmented) else []
    trainer = Trainer(
        model=student,
        args=TrainingArguments(str(unfinished(target)), **settings),
        train_dataset=rows,
        data_collator=collator,
        processing_class=around.processing_class,
        callbacks=[*([callback] if callback else []), *own, *around.callbacks],
    )
    if not stage.labels:
        trainer.data_collator = _without_labels(trainer.data_collator)
    if callback is not None and before is not None and (before / LEARNED).exists():
        _carry(load_file(before / LEARNED), callback.run.distiller)
    train_into(trainer, target, progress=around.progress)
    if callback is not None and (learned := dict(callback.run.distiller.named_parameters())):
        save_file({name: parameter.detach().contiguous() for name, parameter in learned.items()}, target / LEARNED)
    student.requires_grad_(True)
    return student


def _preparation(stage: Stage) -> tuple[Callable[..., Any], dict[str, Any]] | None:
    """What makes the stage's data, and the settings that the recipe gives it.

    Raises:
        UnknownNameError: for a method or a setting that does not exist.
        ConfigurationError: for a method that prepares nothing.
    """
    if stage.preparation is None:
        return None
    given = {"name": stage.preparation} if isinstance(stage.preparation, str) else dict(stage.preparation)
    name = given.pop("name")
    prepare = registry.get(name).load().preparation
    if prepare is None:
        raise ConfigurationError(f"stage {stage.name}: method {name!r} prepares no data.")
    known = inspect.signature(prepare).parameters
    for key in given.keys() - known.keys():
        raise UnknownNameError(f"setting of {name}'s preparation", key, known)
    return prepare, given


def _prepared(stage: Stage, around: Surroundings) -> tuple[Any, Callable[..., Any] | None]:
    """The stage's rows and collator, one of them made by a method's preparation where the stage names one."""
    rows = around.data[stage.data]
    if (found := _preparation(stage)) is None:
        return rows, around.data_collator
    prepare, given = found
    usual = {"tokenizer": around.processing_class, "seed": around.seed} | dict(around.preparing)
    known = inspect.signature(prepare).parameters
    made = prepare(rows, **{key: value for key, value in usual.items() if key in known} | given)
    return (made, around.data_collator) if hasattr(made, "__getitem__") else (rows, made)


def _carry(learned: Mapping[str, Tensor], distiller: nn.Module) -> None:
    """Parts of the same name and shape go on from where they were."""
    with torch.no_grad():
        for name, parameter in distiller.named_parameters():
            if name in learned and learned[name].shape == parameter.shape:
                parameter.copy_(learned[name])


def _distilling(stage: Stage, around: Surroundings) -> DistillCallback | None:
    if not stage.methods:
        return None
    return DistillCallback(
        None if stage.teacher is None else around.models[stage.teacher],
        [_objective(method) for method in stage.methods],
        task_weight=stage.task_weight,
        frozen={role: around.models[key] for role, key in stage.frozen.items()},
        data=stage.data,
    )


def _without_labels(collate: Callable[..., Any]) -> Callable[..., Any]:
    def unlabelled(rows: Any) -> dict[str, Any]:
        return {name: value for name, value in collate(rows).items() if name not in ("labels", "label")}

    return unlabelled


def _objective(method: str | Mapping[str, Any] | Objective) -> Objective:
    if isinstance(method, Objective):
        return method
    given = {"name": method} if isinstance(method, str) else dict(method)
    return registry.objective(given.pop("name"))(**given)


def freeze(model: nn.Module, trainable: str) -> None:
    """Leaves gradients to a part of the model's parameters.

    Args:
        model: whose.
        trainable: "all"; "body", what the head receives its input from; or a regular expression that is searched in the
            parameters' names.

    Raises:
        ConfigurationError: if nothing is left to train.
    """
    inner = body(model) if trainable == "body" else None
    inside = {id(parameter) for parameter in (inner or unwrap(model)).parameters()}
    for name, parameter in model.named_parameters():
        chosen = id(parameter) in inside if trainable in ("all", "body") else re.search(trainable, name) is not None
        parameter.requires_grad_(chosen)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigurationError(f"trainable={trainable!r} leaves no parameter of {type(model).__name__} to train.")
