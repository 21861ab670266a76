"""What a run says of itself: the part of the record that is written while the Trainer is at hand."""

from __future__ import annotations

import dataclasses
import logging
import re
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from torch import nn

from . import facts, licences, registry
from .data import Mixture
from .objective import IGNORED, Kind, Objective
from .taps import unwrap
from .teachers.model import hub_name

if TYPE_CHECKING:
    from .run import Run

logger = logging.getLogger(__name__)

SAMPLE = 1000
"""Rows that a fingerprint reads, evenly spaced: enough to tell data sets apart, cheap for millions of rows."""

_RECORDED = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "optim",
    "bf16",
    "fp16",
)


def task_of(model: nn.Module, kind: Kind) -> str:
    """The hub's name of the task that a model's head is for; `text-regression` for one real-valued output."""
    name = type(model).__name__
    main = getattr(model, "main_input_name", "input_ids")
    source = {"pixel_values": "image", "input_values": "audio", "input_features": "audio"}.get(main, "text")
    if kind in ("rows", "labels"):
        return f"{source}-classification"
    if kind == "causal":
        return "text-generation"
    if kind == "spans":
        return "question-answering"
    if kind == "tokens" and name.endswith("ForMaskedLM"):
        return "fill-mask"
    if kind == "tokens" and re.search("ConditionalGeneration|Seq2Seq", name):
        return "automatic-speech-recognition" if source == "audio" else "text2text-generation"
    if kind == "tokens":
        return "token-classification"
    return "text-regression" if name.endswith("Classification") else "feature-extraction"


def student_start(model: nn.Module) -> str | None:
    """Where the weights came from, as `shrink` left it in the config."""
    start = getattr(getattr(model, "config", None), "compression_start", None)
    return start if isinstance(start, str) else None


def describe_model(model: nn.Module, layers: int) -> facts.Model:
    """A student by class, size and start: layers of the teacher, or the model that it was loaded from."""
    start = student_start(model)
    source = "" if start else str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    return facts.Model(
        name=hub_name(source),
        licence=licences.of_source(source),
        architecture=type(model).__name__,
        parameters=sum(p.numel() for name, p in model.named_parameters() if not name.startswith("distiller.")),
        layers=layers or None,
        start=start,
    )


def describe_data(data: Any, name: str | None, licence: str | None = None) -> facts.Data:
    """A training set by content; the count of labelled rows where the rows have a label column."""
    rows = _known(data)
    step = max(rows // SAMPLE, 1)
    sample = [data[index] for index in range(0, rows, step)] if hasattr(data, "__getitem__") else []
    info = getattr(data, "info", None)
    return facts.Data(
        name=name or getattr(info, "dataset_name", None) or "training set",
        licence=licence or getattr(info, "license", None) or None,
        rows=rows,
        labelled=_labelled(data),
        fingerprint=facts.fingerprint([rows, *sample]),
    )


def _known(data: Any) -> int:
    """How many rows can be read; of a mixture those whose weights have been decided."""
    if isinstance(data, Mixture):
        decided = int((~data.history.isnan().any(1)).sum())
        return min(len(data), data.lag + decided * data.interval)
    return len(data) if hasattr(data, "__len__") else 0


def _labelled(data: Any) -> int | None:
    columns = getattr(data, "column_names", None)
    if not isinstance(columns, list):
        return None
    for name in ("labels", "label"):
        if name in columns:
            plain = data.with_format(None) if hasattr(data, "with_format") else data  # else tensors may come
            values = plain[name][:]
            return sum(1 for value in values if value is not None and value != IGNORED)
    return 0


def describe_method(objective: Objective) -> facts.Method:
    """An objective with everything that decides its value, and how to cite it."""
    known = registry.catalogue().methods.get(objective.name)
    return facts.Method(
        name=objective.name,
        weight=objective.weight,
        settings=_plain(dataclasses.asdict(objective.config)),
        citation=known.declared["bibtex"] if known is not None else None,
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def earlier_stages(model: nn.Module) -> tuple[facts.Training, ...]:
    """Earlier trainings of a student, oldest first, from the config that it was loaded with."""
    found = getattr(getattr(model, "config", None), "compression", None)
    if not isinstance(found, dict):
        return ()
    try:
        last = facts.Training.model_validate(found)
    except ValidationError as error:  # a stranger's: the run is not to end with it
        logger.warning("hf_compress: the record of the student's earlier training is not kept: %s", error)
        return ()
    return (*last.before, last.model_copy(update={"before": ()}))


def describe_training(run: Run, *, seconds: float) -> facts.Training:
    """The record of a finished run."""
    trainer = run.trainer
    args, state = trainer.args, trainer.state
    settings = {name: getattr(args, name) for name in _RECORDED if hasattr(args, name)}
    settings["processes"] = trainer.accelerator.num_processes
    return facts.Training(
        task=run.task,
        teacher=None if run.teacher is None else run.teacher.describe(),
        frozen={role: other.describe() for role, other in run.frozen.items()},
        student=describe_model(unwrap(run.student), run.sizes.layers),
        methods=tuple(describe_method(objective) for objective in run.distiller.objectives),
        task_weight=run.task_weight,
        data=describe_data(trainer.train_dataset, run.config.data, run.config.data_licence),
        steps=state.global_step,
        epochs=float(state.epoch or 0.0),
        seconds=seconds,
        seed=args.seed,
        settings=_plain(settings),
        hardware=facts.hardware(),
        versions=facts.versions(),
        before=earlier_stages(unwrap(run.student)),
    )
