"""Fewer layers: which ones, their config, and that they compute in their new place what they did."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from hf_compress.errors import ConfigurationError
from hf_compress.taps import stacks

from .sizes import REMEDY, on_meta

Keep = Literal["even", "first", "last"]
_PLACE_OR_MODE = "^_|layer_|idx|drop|seed|training|checkpointing"
"""Names of attributes that do not tell what a block computes: its number, how it is trained; some models raise their
dropout with depth, and BigBird draws a block's random attention in training by its number."""
_EACH = re.compile("layer|^attention_window$")
"""Names of lists in a config that hold an entry for each layer: layer_types, no_rope_layers; Longformer's windows."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A list of blocks."""

    path: str
    """Its module's name."""
    size: str
    """The config's name of its depth."""
    depth: int
    said: str
    """layers; of an encoder-decoder encoder layers or decoder layers."""


def stack(model: nn.Module) -> str:
    """Name of the one list of blocks that the config counts."""
    config = getattr(model, "config", None)
    depth = getattr(config.get_text_config() if config is not None else None, "num_hidden_layers", None)
    return _one(model, depth, "", "num_hidden_layers")


def side(model: nn.Module, decoder: bool = False) -> Stack:
    """The blocks that `layers` counts, or `decoder_layers`.

    Raises:
        ConfigurationError: if there is no such list, or more than one.
    """
    config: Any = model.config
    if not getattr(config, "is_encoder_decoder", False) or not hasattr(model, "get_decoder"):
        if decoder:
            raise ConfigurationError(
                f"decoder_layers are for encoder-decoders, and {type(model).__name__} is none. Give layers."
            )
        path = stack(model)
        return Stack(
            path=path, size="num_hidden_layers", depth=config.get_text_config().num_hidden_layers, said="layers"
        )
    held = config.to_dict()
    wanted = ("decoder_layers", "num_decoder_layers") if decoder else ("encoder_layers", "num_layers")
    size = next((name for name in wanted if name in held), None)
    if size is None:
        raise ConfigurationError(f"shrink finds none of {', '.join(wanted)} in a {type(config).__name__}. {REMEDY}")
    half: nn.Module = model.get_decoder() if decoder else model.get_encoder()  # type: ignore[operator]
    path = next(name for name, module in model.named_modules() if module is half)
    said = "decoder layers" if decoder else "encoder layers"
    return Stack(path=_one(half, held[size], f"{path}.".lstrip("."), size), size=size, depth=held[size], said=said)


def _one(model: nn.Module, depth: int | None, prefix: str, size: str) -> str:
    outer = stacks(model, depth or 0)
    if len(outer) > 1:
        outer = _growing(model, outer, size)
    if len(outer) != 1:
        raise ConfigurationError(
            f"shrink looks for one list of {depth} layers in {type(model).__name__} and found "
            f"{[prefix + name for name in outer] or 'none'}. {REMEDY}"
        )
    return prefix + outer[0]


def _growing(model: nn.Module, lists: list[str], size: str) -> list[str]:
    """Of lists of modules those that the size in the config makes longer: others may be as long by chance."""
    config: Any = copy.deepcopy(model.config)
    if config.get_text_config() is not config:
        return lists
    setattr(config, size, getattr(config, size) + 1)
    try:
        longer = on_meta(type(model), config)
    except Exception:  # what the config says of each layer does not fit: then the lists stay what they are
        return lists
    return [name for name in lists if len(longer.get_submodule(name)) > len(model.get_submodule(name))]  # type: ignore[arg-type]  # lists


def choose(depth: int, layers: int | Sequence[int], keep: Keep, name: str = "layers") -> list[int]:
    """Indices of the layers that are kept, rising.

    Raises:
        ConfigurationError: for layers that are not there, or an unknown way to choose.
    """
    if not isinstance(layers, int):
        chosen = list(layers)
        whole = all(isinstance(layer, int) for layer in chosen)
        if not whole or not chosen or chosen != sorted(set(chosen)) or chosen[0] < 0 or chosen[-1] >= depth:
            raise ConfigurationError(f"{name} must rise within 0 … {depth - 1} without repetition, got {chosen}.")
        return chosen
    if not 1 <= layers <= depth:
        raise ConfigurationError(f"{name} must lie in 1 … {depth}, the teacher's number, got {layers}.")
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


def set_depth(config: Any, found: Stack, chosen: Sequence[int]) -> None:
    """Writes the chosen layers into a config: their number, and what it says of each."""
    inner = config.get_text_config()
    setattr(inner, found.size, len(chosen))
    if found.said != "layers":
        return
    for name, value in list(vars(inner).items()):
        if isinstance(value, list) and len(value) == found.depth and _EACH.search(name):
            setattr(inner, name, [value[layer] for layer in chosen])
    stages = getattr(inner, "stage_names", None)  # of vision models that can be a backbone: a stage is a layer
    if stages is not None and len(stages) == found.depth + 1 and inner.out_features == stages[-1:]:
        inner.stage_names = stages[: len(chosen) + 1]
        inner.set_output_features_output_indices(out_features=inner.stage_names[-1:], out_indices=None)


def renumbered(state: Mapping[str, torch.Tensor], path: str, chosen: Sequence[int]) -> dict[str, torch.Tensor]:
    """A state dict of the chosen blocks and of all that is outside their list."""
    place = {layer: index for index, layer in enumerate(chosen)}
    pattern = re.compile(rf"^{re.escape(path)}\.(\d+)\.")
    found: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        match = pattern.match(name)
        if match is None:
            found[name] = tensor
        elif int(match[1]) in place:
            found[f"{path}.{place[int(match[1])]}.{name[match.end() :]}"] = tensor
    return found


def of_the_first(state: Mapping[str, torch.Tensor], path: str, chosen: Sequence[int]) -> dict[str, torch.Tensor]:
    """Weights that the first block alone has, and that it has not for itself: T5 computes there the position bias of
    all. Empty where the first block is kept."""
    first, other = (
        {
            name.removeprefix(f"{path}.{layer}."): tensor
            for name, tensor in state.items()
            if name.startswith(f"{path}.{layer}.")
        }
        for layer in (0, chosen[0])
    )
    return {f"{path}.0.{name}": tensor for name, tensor in first.items() if name not in other}


def check_blocks(
    before: nn.Module, student: nn.Module, found: Stack, chosen: Sequence[int], bound: Sequence[str]
) -> None:
    """Refuses a block that computes something else in its place than before.

    Args:
        before: the model with all layers, of the student's other sizes.
        student: with the chosen ones.
        found: their list.
        chosen: their indices before.
        bound: weights that belong to the first place, not to the block there.

    Raises:
        ConfigurationError: naming what differs.
    """
    modules = [name.rpartition(".")[0].rpartition(".")[2] for name in bound]
    where = f"of {type(student).__name__} to a model with {len(chosen)} layers"
    blocks = student.get_submodule(found.path)
    for place, layer in enumerate(chosen):
        taken = _behaviour(before.get_submodule(f"{found.path}.{layer}"))
        put = _behaviour(blocks.get_submodule(str(place)))
        differing = [name for name in taken.keys() | put.keys() if taken.get(name) != put.get(name)]
        if left := sorted(name for name in differing if not any(module in name for module in modules)):
            raise ConfigurationError(
                f"shrink cannot map layer {layer} {where}: in place {place} it has another {left[0]} "
                f"({taken.get(left[0])} before, {put.get(left[0])} there). {REMEDY}"
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
