"""From what the user named to what a run is made of: objectives, their needs together, inputs to tell shapes by."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import Trainer

from . import registry
from .errors import ConfigurationError, MismatchError
from .objective import Inputs, Needs, Objective, Sizes
from .outputs import decoder_inputs
from .taps import unwrap

logger = logging.getLogger(__name__)


def agreed(needs: list[Needs]) -> list[Needs]:
    """The needs of a run: where one method rescores, all are averaged over examples."""
    if not any(need.rescored for need in needs):
        return needs
    return [replace(need, mean_over="examples") if need.mean_over != "batch" else need for need in needs]


def until(needs: Sequence[Needs]) -> str | None:
    """The tap after which the teacher may stop: only where every method that taps it names the same one."""
    named = {need.teacher_until for need in needs if need.teacher}
    return named.pop() if len(named) == 1 else None


def resolve_methods(method: str | Objective | Sequence[str | Objective] | None, task: str) -> list[Objective]:
    """Copies of the objectives that the user asked for, or the default of the task.

    Copies, because a run changes state and weights, and `model_init` starts several runs from one list.

    Raises:
        UnknownNameError: for an unknown name, with the nearest.
        ConfigurationError: for a method without an objective, or a task without a default.
    """
    if method is None:
        entries = registry.default_for(task)
        if not entries:
            raise ConfigurationError(
                f"there is no default method for {task}; name one: DistillCallback(teacher, 'kd')."
            )
        method = [entry.name for entry in entries]
    chosen = [method] if isinstance(method, str | Objective) else list(method)
    if not chosen:
        raise ConfigurationError("method=[] names no method; leave it out for the default of the task.")
    return [copy.deepcopy(one) if isinstance(one, Objective) else registry.objective(one)() for one in chosen]


def fitting(objectives: list[Objective], student: Sizes, teacher: Sizes | None) -> list[Objective]:
    """Of a task's default the methods that these two models can serve, where there is one; the others are told.

    Raises:
        MismatchError: of the first, if there is none.
    """
    refused: dict[str, MismatchError] = {}
    for objective in objectives:
        try:
            objective.needs(student, teacher)
        except MismatchError as error:
            refused[objective.name] = error
    if len(refused) == len(objectives):
        raise next(iter(refused.values()))
    for name, said in refused.items():
        logger.warning("hf_compress: %s is left out of the default methods: %s", name, said)
    return [objective for objective in objectives if objective.name not in refused]


def dry_inputs(student: nn.Module, trainer: Trainer, device: torch.device) -> Inputs:
    """Two rows for a forward that only tells shapes."""
    model = unwrap(student)
    main = getattr(model, "main_input_name", None)
    if main == "input_ids":
        ids = torch.ones(2, 8, dtype=torch.long, device=device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if getattr(model.config, "is_encoder_decoder", False):
            if isinstance(end := getattr(model.config, "eos_token_id", None), int):
                ids[:, -1] = end  # where heads on rows read the decoder
            inputs["decoder_input_ids"] = ids
        return inputs
    config = getattr(model, "config", None)
    size = getattr(config, "image_size", None)
    if main == "pixel_values" and size is not None:
        side = size if isinstance(size, int) else size[0]
        shape = (2, getattr(config, "num_channels", 3), side, side)
        return {"pixel_values": torch.zeros(shape, device=device, dtype=model.dtype)}
    data = trainer.train_dataset
    batch = trainer.data_collator([data[0], data[min(1, len(data) - 1)]])
    known = inspect.signature(model.forward).parameters
    found = {name: value.to(device) for name, value in batch.items() if name in known and isinstance(value, Tensor)}
    labels = found.get("labels")
    if labels is not None and labels.dim() == 2 and "decoder_input_ids" in known.keys() - found.keys():
        found["decoder_input_ids"] = decoder_inputs(model, found.pop("labels"))  # no loss is wanted here
    return found
