"""From a teacher to the axes of its dimensions, proven."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.errors import ConfigurationError

from . import axes as a
from . import sizes as s
from .axes import Axis
from .proof import Probe
from .sizes import REMEDY, Dimension

_HEADS, _KEY_VALUE_HEADS, _HEAD, _VOCABULARY = 4, 2, 32, 64
"""Sizes of the small models."""


@dataclass(frozen=True, kw_only=True)
class Map:
    """The axes of a model's dimensions, and its sizes."""

    axes: tuple[Axis, ...]
    hidden: int
    heads: int | None
    """None where attention is not in heads that can be told apart."""
    key_value_heads: int | None
    head_dim: int | None
    coupled: bool
    """Whether the config can only express hidden = heads × head_dim."""

    @property
    def parts(self) -> int:
        """From how many equal parts of the hidden dimensions equally many are kept: groups of a convolution."""
        return max((axis.groups for axis in self.of("hidden")), default=1)

    def of(self, *dimensions: Dimension) -> list[Axis]:
        return [axis for axis in self.axes if axis.dimension in dimensions]

    def groups(self, dimension: Dimension) -> list[str]:
        """In the model's order."""
        return list(dict.fromkeys(axis.group for axis in self.of(dimension)))


def find(teacher: nn.Module, dimensions: Iterable[Dimension]) -> Map:
    """The axes that carry these dimensions.

    Args:
        teacher: any model of transformers with one config.
        dimensions: which ones; `key_value_heads` come with `heads`; where hidden and heads are one, both come.

    Raises:
        ConfigurationError: if a weight cannot be mapped or a permutation of what was found changes the outputs.
    """
    s.check_plain(teacher)
    wanted = set(dimensions)
    try:
        with torch.device("cpu"):  # whatever the caller's default is
            return _Finder(teacher).find(wanted)
    except ConfigurationError:
        raise
    except Exception as error:  # a class may fail in its own way at sizes that it does not have
        raise ConfigurationError(
            f"shrink cannot try {type(teacher).__name__} at other sizes: {type(error).__name__}: {error}. {REMEDY}"
        ) from error


class _Finder:
    """Small models of the teacher's class, and what their shapes tell."""

    def __init__(self, teacher: nn.Module) -> None:
        config: Any = teacher.config
        self.teacher, self.config, self.cls = teacher, config, type(teacher)
        self.known = a.shapes(teacher)
        heads = s.names(config, "heads")
        self.heads: int | None = getattr(config, heads[0]) if heads else None
        named = s.names(config, "key_value_heads")
        self.key_value_heads: int | None = getattr(config, named[0]) if named else None
        given = getattr(config, "head_dim", None)
        self.head_dim = None if self.heads is None else given or config.hidden_size // self.heads
        self.base: dict[Dimension, int] = {"hidden": _HEADS * _HEAD, "vocabulary": self._vocabulary()}
        if self.heads is not None:
            self.base["heads"] = _HEADS
        if self.key_value_heads is not None:
            self.base["key_value_heads"] = _HEADS if self.key_value_heads == self.heads else _KEY_VALUE_HEADS
        self.base["intermediate"] = 2 * self.base["hidden"]
        self.coupled = not self._has_heads_of_their_own()

    def _vocabulary(self) -> int:
        padding = getattr(self.config, "pad_token_id", None)
        least = max(_VOCABULARY, (padding if isinstance(padding, int) else 0) + 1)
        return min(getattr(self.config, "vocab_size", least), least)

    def _shapes(self, changes: Mapping[Dimension, int] = MappingProxyType({})) -> dict[str, tuple[int, ...]]:
        return a.shapes(s.on_meta(self.cls, self._config(changes)))

    def _config(self, changes: Mapping[Dimension, int] = MappingProxyType({})) -> Any:
        config = s.resized(self.config, {**self.base, **changes}, None if self.coupled else self.head_dim)
        if hasattr(config, "max_source_positions"):
            config.max_source_positions = 16
        return config

    def _has_heads_of_their_own(self) -> bool:
        """Whether twice the heads give larger weights: the size of a head is then a number in the config."""
        self.coupled = False
        if self.heads is None:
            return True
        try:
            found = a.changed(self._shapes(), self._shapes({"heads": 2 * _HEADS}), _HEADS)
        except Exception:  # whatever the class says of 8 heads in a width for 4: they are coupled
            return False
        return any(count % self.head_dim == 0 for count in found.values())  # type: ignore[operator]  # has heads

    def find(self, wanted: set[Dimension]) -> Map:
        if self.coupled and wanted & {"hidden", "heads"}:
            wanted |= {"hidden", "heads"}
        if "heads" in wanted and self.key_value_heads is not None:
            wanted.add("key_value_heads")
        self.probe = Probe(self.cls, self._config())
        before = self._shapes()
        found: list[Axis] = []
        if "intermediate" in wanted or "hidden" in wanted:
            found += self._intermediate(before)
        taken = {(axis.weight, axis.axis) for axis in found}
        if self.coupled and wanted & {"hidden", "heads"}:
            found += self._width(before, taken)
        else:
            for dimension in ("hidden", "heads", "key_value_heads"):
                if dimension in wanted:
                    found += self._plain(before, dimension, taken)
        if "vocabulary" in wanted:
            found += self._plain(before, "vocabulary", set())
        found = [axis for axis in a.grouped(found) if axis.dimension in wanted]
        _check_alone(found)
        self._check_saved(found)
        for together in (("hidden",), ("heads", "key_value_heads"), ("intermediate",)):
            found = self._proven(found, together)
        return Map(
            axes=tuple(self._of_teacher(axis) for axis in found),
            hidden=self.config.hidden_size,
            heads=self.heads,
            key_value_heads=self.key_value_heads,
            head_dim=self.head_dim,
            coupled=self.coupled,
        )

    def _intermediate(self, before: a.Shapes) -> list[Axis]:
        if not s.names(self.config, "intermediate"):
            return []
        return self._plain(before, "intermediate", set())

    def _plain(self, before: a.Shapes, dimension: Dimension, taken: set[tuple[str, int]]) -> list[Axis]:
        """Axes of a size that can be changed alone."""
        if not s.names(self.config, dimension):
            return []
        size = self.base[dimension]
        other = size // 2 if dimension == "key_value_heads" else 2 * size
        extra: dict[Dimension, int] = {}
        if dimension == "hidden" and s.names(self.config, "intermediate") == [s.RATIO]:
            extra = {"intermediate": 2 * self.base["intermediate"]}
        counts = a.changed(before, self._shapes({dimension: other, **extra}), other - size)
        width = self.head_dim if dimension in ("heads", "key_value_heads") else 1
        assert width is not None  # a config with heads
        return [
            _axis(weight, axis, dimension, count, width, self._groups(weight, axis))
            for (weight, axis), count in counts.items()
            if (weight, axis) not in taken
        ]

    def _width(self, before: a.Shapes, taken: set[tuple[str, int]]) -> list[Axis]:
        """Axes of hidden and heads, where both can only grow together."""
        sizes: dict[Dimension, int] = {"hidden": 2 * self.base["hidden"], "heads": 2 * _HEADS}
        if s.names(self.config, "intermediate") == [s.RATIO]:
            sizes["intermediate"] = 2 * self.base["intermediate"]
        counts = a.changed(before, self._shapes(sizes), _HEADS)
        counts = {key: count for key, count in counts.items() if key not in taken}
        roles = _attention(self.probe, counts)
        found = []
        for (weight, axis), count in counts.items():
            alone = count == 1 and self._groups(weight, axis) == 1
            if alone or roles.get((weight, axis)):
                found.append(_axis(weight, axis, "heads", count, _HEAD, 1))
            else:
                found.append(_axis(weight, axis, "hidden", count / _HEAD, 1, self._groups(weight, axis)))
        return found

    def _check_saved(self, found: Sequence[Axis]) -> None:
        """Refuses weights that a checkpoint lacks, as they are computed anew from the sizes: Marian's positions."""
        left_out = getattr(self.teacher, "_keys_to_ignore_on_save", None) or ()
        if lost := sorted({axis.weight for axis in found} & set(left_out)):
            raise ConfigurationError(
                f"shrink cannot map {lost[0]}: {type(self.teacher).__name__} does not save it, and would make another "
                f"of that size when it is loaded. {REMEDY}"
            )

    def _groups(self, weight: str, axis: int) -> int:
        """Of the convolution whose inputs lie along that axis, else 1."""
        path = (
            weight.partition(".parametrizations.")[0] if ".parametrizations." in weight else weight.rpartition(".")[0]
        )
        module = self.probe.model.get_submodule(path)
        return module.groups if axis == 1 and isinstance(module, nn.Conv1d | nn.Conv2d) else 1

    def _proven(self, found: list[Axis], together: Sequence[Dimension]) -> list[Axis]:
        """With the layout and grouping under which permuting these dimensions changes no output."""
        own = [axis for axis in found if axis.dimension in together]
        if not own:
            return found
        others = [axis for axis in found if axis.dimension not in together]
        for candidate in _candidates(own):
            if self.probe.holds(candidate, self._orders(candidate)):
                return [*others, *candidate]
        raise ConfigurationError(
            f"shrink cannot map the {together[0]} of {type(self.teacher).__name__}: when it permutes what it found in "
            f"{_listed(own)}, the outputs change. {REMEDY}"
        )

    def _orders(self, found: Sequence[Axis]) -> dict[tuple[Dimension, str], Tensor]:
        """Random orders, every unit in another place; queries stay with the keys and values that they read."""
        draw = torch.Generator().manual_seed(2)
        orders: dict[tuple[Dimension, str], Tensor] = {}
        shapes = {name: tensor.shape for name, tensor in self.probe.state.items()}
        for axis in found:
            key = (axis.dimension, axis.group)
            if key in orders or (axis.dimension == "heads" and self.key_value_heads is not None):
                continue
            count, parts = axis.units(shapes[axis.weight][axis.axis]), max(each.groups for each in found)
            orders[key] = _together(_moved(parts, draw), count // parts, draw)
        if self.key_value_heads is not None:
            for group in dict.fromkeys(axis.group for axis in found if axis.dimension == "heads"):
                keys = orders.setdefault(("key_value_heads", group), _moved(self.base["key_value_heads"], draw))
                orders["heads", group] = _together(keys, _HEADS // len(keys), draw)
        return orders

    def _of_teacher(self, axis: Axis) -> Axis:
        """The same axis at the teacher's size of a head.

        Raises:
            ConfigurationError: if its size there is another than the small models let expect.
        """
        assert self.head_dim is not None or axis.width == 1
        if axis.width > 1 and self.head_dim is not None:
            axis = replace(axis, width=self.head_dim)
        size = self.known[axis.weight][axis.axis]
        expected = {
            "hidden": self.config.hidden_size,
            "heads": self.heads,
            "key_value_heads": self.key_value_heads,
            "vocabulary": getattr(self.config, "vocab_size", None),
        }.get(axis.dimension, axis.units(size))
        if expected * axis.copies * axis.width != size * axis.groups:
            raise ConfigurationError(
                f"shrink cannot map axis {axis.axis} of {axis.weight}: it has {size * axis.groups} numbers, and "
                f"{expected} {axis.dimension} would have {expected * axis.copies * axis.width}. {REMEDY}"
            )
        return axis


def _moved(count: int, draw: torch.Generator) -> Tensor:
    """A random order in which nothing stays where it was: one cycle through all."""
    cycle = torch.randperm(count, generator=draw)
    order = torch.empty_like(cycle)
    order[cycle] = cycle.roll(1)
    return order


def _together(parts: Tensor, each: int, draw: torch.Generator) -> Tensor:
    """An order of units that lie in parts of `each`: the parts in that order, moved inside."""
    within = torch.stack([_moved(each, draw) for _ in parts])
    return (parts[:, None] * each + within).flatten()


def _axis(weight: str, axis: int, dimension: Dimension, count: float, width: int, groups: int) -> Axis:
    """An axis with `count` numbers a unit, of which `width` lie together, or one.

    Raises:
        ConfigurationError: if they are no whole number of units.
    """
    if groups > 1 and count * groups == 1:
        return Axis(weight=weight, axis=axis, dimension=dimension, groups=groups)
    if count == 1:
        return Axis(weight=weight, axis=axis, dimension=dimension)
    if count < 1 or count % width:
        raise ConfigurationError(
            f"shrink cannot map {weight}: it has {count:g} numbers for each of the {dimension}, expected a multiple of "
            f"{width}. {REMEDY}"
        )
    return Axis(weight=weight, axis=axis, dimension=dimension, copies=int(count) // width, width=width)


def _attention(probe: Probe, counts: Mapping[tuple[str, int], float]) -> dict[tuple[str, int], bool]:
    """Whether an axis is one of heads: outputs of the linears of an attention, but the input of its last."""
    order = {name: number for number, name in enumerate(probe.called)}
    parts: dict[tuple[str, str], list[str]] = {}
    for weight, axis in counts:
        path = weight.rpartition(".")[0]
        both = {(weight, 0), (weight, 1)} <= counts.keys()
        where = a.place(weight)
        if axis == 0 and both and where[0] and a.is_linear(probe.model.get_submodule(path)) and path in order:
            parts.setdefault(where, []).append(path)
    found = {}
    for paths in parts.values():
        if len(paths) < 2:
            continue
        last = max(paths, key=order.__getitem__)
        for path in paths:
            module = probe.model.get_submodule(path)
            into = 1 if isinstance(module, nn.Linear) else 0  # Conv1D is laid out the other way round
            found[f"{path}.weight", into if path == last else 1 - into] = True
            found[f"{path}.bias", 0] = path != last
    return found


def _candidates(own: Sequence[Axis]) -> Iterator[list[Axis]]:
    """The layouts and groupings that an architecture may have, the usual first."""
    fused = any(axis.copies > 1 for axis in own)
    groupings: list[Callable[[Axis], str]] = [lambda axis: axis.group]
    if any(axis.group for axis in own):
        groupings += [_stack, lambda _: "all"]
    for group, interleaved in product(groupings, [False, True] if fused else [False]):
        yield [replace(axis, interleaved=interleaved and axis.copies > 1, group=group(axis)) for axis in own]


def _check_alone(found: Sequence[Axis]) -> None:
    """Refuses an axis of two dimensions: queries beside fewer keys and values in one matrix."""
    seen: dict[tuple[str, int], Dimension] = {}
    for axis in found:
        other = seen.setdefault((axis.weight, axis.axis), axis.dimension)
        if other != axis.dimension:
            raise ConfigurationError(
                f"shrink cannot map {axis.weight}, which holds {other} and {axis.dimension} along one axis. {REMEDY}"
            )


def _stack(axis: Axis) -> str:
    """A group for the layers of a stack: T5 computes the position bias of all in the first. MPNet has it outside."""
    block, part = a.place(axis.weight)
    return f"{block.rpartition('.')[0]}.*.{part}"


def _listed(own: Sequence[Axis]) -> str:
    return ", ".join(dict.fromkeys(axis.weight for axis in own[:3])) + (" …" if len(own) > 3 else "")
