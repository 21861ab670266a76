"""Smaller students from a teacher, with its weights carried over."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from .errors import ConfigurationError
from .taps import stacks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Keep = Literal["even", "first", "last"]
_PLACE_OR_MODE = "^_|layer_|idx|drop|training|checkpointing"
"""Names of attributes that do not tell what a block computes: its number, how it is trained; some models raise their
dropout with depth."""
REMEDY = "Build the student from a config of your own and pass it to the Trainer."


def shrink(teacher: PreTrainedModel, *, layers: int | Sequence[int], keep: Keep = "even") -> PreTrainedModel:
    """A student of the teacher's class with some of its layers.

    Weights are copied, none share storage with the teacher; tied weights are tied again; label maps, special tokens and
    the generation config are kept. The layers that were taken are written to `config.compression_start`.

    Args:
        teacher: an encoder or decoder with one stack of `num_hidden_layers` blocks (BERT, Llama and their kin).
        layers: how many to keep, 1 … the teacher's number; or the indices to keep, rising from 0.
        keep: which ones, where a number is given: evenly spread (the first and the last among them), first, or last.

    Raises:
        ConfigurationError: naming what cannot be mapped: two stacks, no stack, indices out of range, a block that
            works differently in another place.
    """
    stack = _stack(teacher)
    depth = teacher.config.get_text_config().num_hidden_layers
    chosen = _choose(depth, layers, keep)
    config = _config(teacher, chosen, depth)
    with torch.random.fork_rng():  # the random initial weights are all replaced
        student = type(teacher)(config)
    student.to(teacher.dtype)
    _carry_over(teacher, student, stack, chosen)
    student.tie_weights()
    if getattr(teacher, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(teacher.generation_config)
    device: Any = teacher.device
    return student.to(device).train(teacher.training)


def _config(teacher: PreTrainedModel, chosen: list[int], depth: int) -> Any:
    """The teacher's config for the chosen layers.

    Raises:
        ConfigurationError: if such a config could be saved but not loaded.
    """
    config = copy.deepcopy(teacher.config)
    inner = config.get_text_config()
    inner.num_hidden_layers = len(chosen)
    for name, value in list(vars(inner).items()):
        if isinstance(value, list) and len(value) == depth and "layer" in name:  # layer_types, no_rope_layers
            setattr(inner, name, [value[layer] for layer in chosen])
    stages = getattr(inner, "stage_names", None)  # of vision models that can be a backbone: a stage is a layer
    if stages is not None and len(stages) == depth + 1 and inner.out_features == stages[-1:]:
        inner.stage_names = stages[: len(chosen) + 1]
        inner.set_output_features_output_indices(out_features=inner.stage_names[-1:], out_indices=None)
    for name in ("compression", "_name_or_path"):
        vars(config).pop(name, None)
    config.compression_start = f"layers {', '.join(map(str, chosen))} of {depth} of the teacher"
    try:
        type(config).from_dict(config.to_dict())
    except Exception as error:  # each config class checks in its own way
        raise ConfigurationError(
            f"shrink cannot express {len(chosen)} layers in a {type(config).__name__}: {error}. {REMEDY}"
        ) from error
    return config


def _carry_over(teacher: nn.Module, student: nn.Module, stack: str, chosen: list[int]) -> None:
    """Copies the weights of the chosen blocks and of all that is outside the stack.

    Raises:
        ConfigurationError: if a weight has no counterpart, or a block computes something else in its place.
    """
    weights = _renumbered(teacher.state_dict(), stack, chosen)
    where = f"of {type(teacher).__name__} to a model with {len(chosen)} layers"
    try:
        report = student.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # sizes that differ from layer to layer
        raise ConfigurationError(f"shrink cannot map the weights {where}: {error}. {REMEDY}") from error
    tied = set(getattr(student, "all_tied_weights_keys", None) or ())
    left = [name for name in (*report.missing_keys, *report.unexpected_keys) if name not in tied]
    if left:
        raise ConfigurationError(f"shrink cannot map {left[:3]} {where}. {REMEDY}")
    blocks = student.get_submodule(stack)
    for place, layer in enumerate(chosen):
        taken, put = _behaviour(teacher.get_submodule(f"{stack}.{layer}")), _behaviour(blocks.get_submodule(str(place)))
        if differing := sorted(name for name in taken.keys() | put.keys() if taken.get(name) != put.get(name)):
            raise ConfigurationError(
                f"shrink cannot map layer {layer} {where}: in place {place} it has another {differing[0]} "
                f"({taken.get(differing[0])} before, {put.get(differing[0])} there). {REMEDY}"
            )


def _behaviour(block: nn.Module) -> dict[str, Any]:
    """What a block computes beside its weights: classes and plain attributes of its modules, by name."""
    found: dict[str, Any] = {}
    for path, module in block.named_modules():
        found[f"class of {path or 'the block'}"] = type(module).__name__
        for name, value in vars(module).items():
            if isinstance(value, bool | int | float | str | tuple) and not re.search(_PLACE_OR_MODE, name):
                found[f"{path}.{name}".lstrip(".")] = value
    return found


def _stack(model: nn.Module) -> str:
    """Name of the one list of blocks that the config counts."""
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigurationError(
            f"shrink handles one stack of layers, {type(model).__name__} has an encoder and a decoder. "
            "Build the student from a config with fewer encoder_layers and decoder_layers."
        )
    depth = getattr(config.get_text_config() if config is not None else None, "num_hidden_layers", None)
    outer = stacks(model, depth or 0)
    if len(outer) != 1:
        raise ConfigurationError(
            f"shrink looks for one list of {depth} layers in {type(model).__name__} and found {outer or 'none'}. "
            "Build the student from a config of your own."
        )
    return outer[0]


def _choose(depth: int, layers: int | Sequence[int], keep: Keep) -> list[int]:
    if not isinstance(layers, int):
        chosen = list(layers)
        whole = all(isinstance(layer, int) for layer in chosen)
        if not whole or not chosen or chosen != sorted(set(chosen)) or chosen[0] < 0 or chosen[-1] >= depth:
            raise ConfigurationError(f"layers must rise within 0 … {depth - 1} without repetition, got {chosen}.")
        return chosen
    if not 1 <= layers <= depth:
        raise ConfigurationError(f"layers must lie in 1 … {depth}, the teacher's number, got {layers}.")
    if keep == "first":
        return list(range(layers))
    if keep == "last":
        return list(range(depth - layers, depth))
    if keep != "even":
        raise ConfigurationError(f"keep must be 'even', 'first' or 'last', got {keep!r}.")
    return spread(depth, layers)


def spread(depth: int, number: int) -> list[int]:
    """`number` indices spread evenly over 0 … depth - 1, the first and the last among them; the last alone for one."""
    if number == 1:
        return [depth - 1]
    return [place * (depth - 1) // (number - 1) for place in range(number)]


def _renumbered(state: Mapping[str, torch.Tensor], stack: str, chosen: list[int]) -> dict[str, torch.Tensor]:
    place = {layer: index for index, layer in enumerate(chosen)}
    pattern = re.compile(rf"^{re.escape(stack)}\.(\d+)\.")
    found: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        match = pattern.match(name)
        if match is None:
            found[name] = tensor
        elif int(match[1]) in place:
            found[f"{stack}.{place[int(match[1])]}.{name[match.end() :]}"] = tensor
    return found
