"""Smaller students from a teacher, with its weights carried over."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from .errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Keep = Literal["even", "first", "last"]


def shrink(teacher: PreTrainedModel, *, layers: int | Sequence[int], keep: Keep = "even") -> PreTrainedModel:
    """A student of the teacher's class with some of its layers.

    Weights are copied, none share storage with the teacher; tied weights are tied again; label maps, special tokens and
    the generation config are kept. The layers that were taken are written to `config.compression_start`.

    Args:
        teacher: an encoder or decoder with one stack of `num_hidden_layers` blocks (BERT, Llama and their kin).
        layers: how many to keep, 1 … the teacher's number; or the indices to keep, rising from 0.
        keep: which ones, where a number is given: evenly spread (the first and the last among them), first, or last.

    Raises:
        ConfigurationError: naming what cannot be mapped: two stacks, no stack, indices out of range.
    """
    stack = _stack(teacher)
    depth = teacher.config.get_text_config().num_hidden_layers
    chosen = _choose(depth, layers, keep)
    config = copy.deepcopy(teacher.config)
    inner = config.get_text_config()
    inner.num_hidden_layers = len(chosen)
    for name, value in vars(inner).items():
        if isinstance(value, list) and len(value) == depth and name.endswith("layer_types"):
            setattr(inner, name, [value[layer] for layer in chosen])
    for name in ("compression", "_name_or_path"):
        vars(config).pop(name, None)
    config.compression_start = f"layers {', '.join(map(str, chosen))} of {depth} of the teacher"
    with torch.random.fork_rng():  # the random initial weights are all replaced
        student = type(teacher)(config)
    student.to(teacher.dtype)
    weights = _renumbered(teacher.state_dict(), stack, chosen)
    report = student.load_state_dict({name: tensor.detach().clone() for name, tensor in weights.items()}, strict=False)
    tied = set(getattr(student, "all_tied_weights_keys", None) or ())
    left = [name for name in (*report.missing_keys, *report.unexpected_keys) if name not in tied]
    if left:
        raise ConfigurationError(
            f"shrink cannot map {left[:3]} of {type(teacher).__name__} to a model with {len(chosen)} layers. "
            "Build the student from a config of your own and pass it to the Trainer."
        )
    student.tie_weights()
    if getattr(teacher, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(teacher.generation_config)
    device: Any = teacher.device
    return student.to(device).train(teacher.training)


def _stack(model: nn.Module) -> str:
    """Name of the one list of blocks that the config counts."""
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigurationError(
            f"shrink handles one stack of layers, {type(model).__name__} has an encoder and a decoder. "
            "Build the student from a config with fewer encoder_layers and decoder_layers."
        )
    depth = getattr(config.get_text_config() if config is not None else None, "num_hidden_layers", None)
    stacks = [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    outer = [name for name in stacks if not any(name.startswith(f"{other}.") for other in stacks)]
    if len(outer) != 1:
        raise ConfigurationError(
            f"shrink looks for one list of {depth} layers in {type(model).__name__} and found {outer or 'none'}. "
            "Build the student from a config of your own."
        )
    return str(outer[0])


def _choose(depth: int, layers: int | Sequence[int], keep: Keep) -> list[int]:
    if not isinstance(layers, int):
        chosen = list(layers)
        if not chosen or chosen != sorted(set(chosen)) or chosen[0] < 0 or chosen[-1] >= depth:
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
