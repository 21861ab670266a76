"""Which axes of which weights carry a dimension of a model: hidden, heads, neurons, vocabulary.

Found by comparing the shapes of small models made from the teacher's config with one size changed. Where hidden and
heads can only change together (BERT), the last linear of an attention that is called reads heads and writes hidden, the
others read hidden and write heads. Nothing of this is trusted: `proof` permutes what was found and compares outputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_compress.errors import ConfigurationError

from .sizes import REMEDY, Dimension

_BLOCK = re.compile(r"^(?P<block>.*?\.\d+)\.(?P<part>[^.]+(\.\d+)?)")
Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis of one weight: `copies` × units × `width` numbers, or units × `copies` × `width` where interleaved."""

    weight: str
    axis: int
    dimension: Dimension
    copies: int = 1
    """2 of a gate and its values in one matrix, 3 of queries, keys and values."""
    width: int = 1
    """Numbers of a unit: the size of a head, else 1."""
    interleaved: bool = False
    groups: int = 1
    """Of a convolution in groups: its input axis holds the units of a group, other ones for each group of outputs."""
    group: str = ""
    """Axes of one group are cut alike: an attention, the neurons of a block; empty for the whole model."""

    def positions(self, units: Tensor, size: int) -> Tensor:
        """Where along the axis the given units lie.

        Args:
            units: (unit,) indices in the order in which they shall lie.
            size: of the whole axis.
        """
        numbers = torch.arange(size)
        if self.interleaved:
            return numbers.view(-1, self.copies, self.width)[units].flatten()
        return numbers.view(self.copies, -1, self.width)[:, units].flatten()

    def units(self, size: int) -> int:
        """How many units an axis of that size has."""
        return size * self.groups // (self.copies * self.width)

    def squares(self, weight: Tensor) -> Tensor:
        """(unit,) sums of squares, in float64, of a weight's numbers that go with each unit."""
        if self.groups > 1:
            parts = weight.view(self.groups, -1, *weight.shape[1:]).movedim(2, 1)
            return parts.double().square().flatten(2).sum(2).flatten()
        others = [other for other in range(weight.dim()) if other != self.axis]
        if not others:
            return self.by_unit(weight.double().square())
        return self.by_unit(torch.linalg.vector_norm(weight, dim=others, dtype=torch.float64).square())

    def by_unit(self, values: Tensor) -> Tensor:
        """(unit,) sums of values along the axis."""
        shape = (-1, self.copies, self.width) if self.interleaved else (self.copies, -1, self.width)
        return values.reshape(shape).sum((1, 2) if self.interleaved else (0, 2))


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of all that a checkpoint of the model holds."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def changed(before: Shapes, after: Shapes, by: int) -> dict[tuple[str, int], float]:
    """Numbers per unit of every axis that grew, by weight and axis.

    Args:
        before: of a model.
        after: of the same with a dimension larger by `by` units.

    Raises:
        ConfigurationError: if the two have other weights, or an axis has a part that does not grow.
    """
    if before.keys() != after.keys():
        differing = sorted(before.keys() ^ after.keys())
        raise ConfigurationError(f"shrink cannot map {differing[:3]}, which other sizes have not. {REMEDY}")
    found = {}
    for name, shape in before.items():
        for axis, (old, new) in enumerate(zip(shape, after[name], strict=True)):
            if old != new:
                found[name, axis] = (new - old) / by
    return found


def place(weight: str) -> tuple[str, str]:
    """The block of a weight and its part there (`encoder.layer.3`, `attention`); both empty outside blocks."""
    match = _BLOCK.match(weight)
    return (match["block"], match["part"]) if match else ("", "")


def grouped(found: Iterable[Axis]) -> list[Axis]:
    """With groups: hidden and vocabulary are the model's, heads those of an attention, neurons those of a block."""
    named = []
    for axis in found:
        block, part = place(axis.weight)
        if axis.dimension in ("heads", "key_value_heads"):
            named.append(replace(axis, group=f"{block}.{part}"))
        elif axis.dimension == "intermediate":
            named.append(replace(axis, group=block or axis.weight))
        else:
            named.append(axis)
    return named


def reads(model: nn.Module, axis: Axis) -> nn.Module | None:
    """The linear module whose input has that axis; None if the axis is no input."""
    path, _, kind = axis.weight.rpartition(".")
    module = model.get_submodule(path)
    if kind != "weight":
        return None
    if isinstance(module, nn.Linear):
        return module if axis.axis == 1 else None
    return module if isinstance(module, Conv1D) and axis.axis == 0 else None


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def gathered(
    state: Mapping[str, Tensor], found: Iterable[Axis], kept: Mapping[tuple[Dimension, str], Tensor]
) -> dict[str, Tensor]:
    """A state dict of the kept units, in their order; tensors without such an axis are the same objects.

    Args:
        state: of a model.
        found: its axes.
        kept: (unit,) indices by dimension and group.
    """
    result = dict(state)
    for axis in sorted(found, key=lambda axis: axis.groups):  # a convolution's outputs before its inputs
        units = kept.get((axis.dimension, axis.group))
        if units is not None and axis.weight in result:
            tensor = result[axis.weight]
            if axis.groups > 1:
                result[axis.weight] = _inputs_of_groups(tensor, units.to(tensor.device), axis.groups)
            else:
                at = axis.positions(units, tensor.shape[axis.axis]).to(tensor.device)
                result[axis.weight] = tensor.index_select(axis.axis, at)
    return _of_the_same_norm(state, result)


def _inputs_of_groups(tensor: Tensor, units: Tensor, groups: int) -> Tensor:
    """A convolution's weight (output, input of a group, …) whose outputs are cut already, with the inputs cut too."""
    inside = units.view(groups, -1) % tensor.shape[1]
    parts = tensor.view(groups, -1, *tensor.shape[1:])
    return torch.stack([part.index_select(1, at) for part, at in zip(parts, inside, strict=True)]).flatten(0, 1)


def _of_the_same_norm(state: Mapping[str, Tensor], result: dict[str, Tensor]) -> dict[str, Tensor]:
    """Where a weight is stored as length and direction, the lengths of what is left of it."""
    for name, length in state.items():
        direction = name.removesuffix("0") + "1"
        if not name.endswith(".original0") or result[direction] is state[direction]:
            continue
        alone = [axis for axis, size in enumerate(length.shape) if size == 1]
        if result[name] is not length:
            raise ConfigurationError(f"shrink cannot map {name}, whose lengths are cut themselves. {REMEDY}")
        norms = (weights[direction].norm(dim=alone, keepdim=True) for weights in (result, state))
        result[name] = length * next(norms) / next(norms)
    return result
