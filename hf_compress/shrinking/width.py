"""Which hidden dimensions, heads and neurons are kept, and what a config can express."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_compress.errors import ConfigurationError

from . import sizes as s
from .mapping import Map
from .scores import Scores
from .sizes import Dimension

Kept = dict[tuple[Dimension, str], Tensor]
"""(unit,) indices that are kept, rising, by dimension and group."""


@dataclass(frozen=True, kw_only=True)
class Width:
    """The sizes that are asked for; None: the teacher's."""

    hidden: int | None = None
    heads: int | None = None
    key_value_heads: int | None = None
    intermediate: int | None = None

    def __bool__(self) -> bool:
        return any(value is not None for value in vars(self).values())

    def dimensions(self) -> set[Dimension]:
        named: set[Dimension] = {name for name, value in vars(self).items() if value is not None}  # type: ignore[misc]
        if "key_value_heads" in named:
            named |= {"heads"}
        return named


def resolved(asked: Width, found: Map, config: Any, intermediate: int | None) -> dict[Dimension, int]:
    """Every size that the student's config gets.

    Args:
        asked: by the user.
        found: the teacher's sizes.
        config: the teacher's.
        intermediate: neurons of the teacher's smallest MLP; None where it has none that were looked for.

    Raises:
        ConfigurationError: for a size that the teacher has not, or the config cannot express, with those that it can.
    """
    result: dict[Dimension, int] = {}
    known = {
        "hidden": found.hidden,
        "heads": found.heads,
        "key_value_heads": found.key_value_heads,
        "intermediate": intermediate,
    }
    for dimension in asked.dimensions():
        value, most = getattr(asked, dimension), known[dimension]
        if most is None:
            raise ConfigurationError(f"{dimension}: a {type(config).__name__} has no such size. Leave it out.")
        if value is not None:
            if not isinstance(value, int) or not 1 <= value <= most:
                raise ConfigurationError(f"{dimension} must lie in 1 … {most}, the teacher's number, got {value}.")
            result[dimension] = value
    _check_coupled(result, found, config)
    if result.get("hidden", 0) % found.parts:
        raise ConfigurationError(
            f"hidden={result['hidden']}: a convolution reads the hidden dimensions in {found.parts} groups, of which "
            f"equally many are kept. Give a multiple of {found.parts}."
        )
    if ("heads" in result or "key_value_heads" in result) and found.key_value_heads is not None:
        heads, keys = _key_value_heads(asked, found)
        result["heads"], result["key_value_heads"] = heads, keys
    result |= _ratio(result, found, config)
    return result


def _check_coupled(result: Mapping[Dimension, int], found: Map, config: Any) -> None:
    """hidden = heads × head_dim, where the config can express nothing else."""
    if not found.coupled or not {"hidden", "heads"} & result.keys():
        return
    size, kind = found.head_dim, type(config).__name__
    assert size is not None  # what is coupled has heads
    hidden, heads = result.get("hidden", found.hidden), result.get("heads", found.heads)
    assert heads is not None
    if hidden == heads * size:
        return
    rule = f"in a {kind} hidden is heads x {size}, the size of the teacher's heads"
    if "heads" not in result and hidden % size == 0:
        raise ConfigurationError(f"hidden={hidden}: {rule}. Give heads={hidden // size} too.")
    if "hidden" not in result:
        raise ConfigurationError(f"heads={heads}: {rule}. Give hidden={heads * size} too.")
    near = sorted({max(hidden // size, 1), min(hidden // size + 1, found.hidden // size)})
    can = " or ".join(f"hidden={count * size} with heads={count}" for count in near)
    raise ConfigurationError(f"hidden={hidden} with heads={heads}: {rule}. Give {can}.")


def _key_value_heads(asked: Width, found: Map) -> tuple[int, int]:
    """Query heads and the key and value heads that they share.

    Whole groups are dropped if that gives the number of heads, else each group gets smaller.
    """
    before, keys = found.heads, found.key_value_heads
    assert before is not None
    assert keys is not None
    heads = asked.heads if asked.heads is not None else before
    wanted = asked.key_value_heads
    if wanted is None:
        wanted = heads * keys // before if heads * keys % before == 0 else keys
    each = before // keys
    if heads % wanted or not 1 <= heads // wanted <= each:
        can = sorted({count * size for count in range(1, keys + 1) for size in range(1, each + 1)})
        pairs = [
            f"heads={heads}, key_value_heads={count}"
            for count in range(1, keys + 1)
            if heads % count == 0 and heads // count <= each
        ]
        remedy = f"Give {' or '.join(pairs)}." if pairs else f"heads can be {', '.join(map(str, can))}."
        raise ConfigurationError(
            f"heads={heads} with key_value_heads={wanted}: {each} heads of the teacher share one of {keys} key and "
            f"value heads, so that the student needs as many for each, at most {each}. {remedy}"
        )
    return heads, wanted


def _ratio(result: Mapping[Dimension, int], found: Map, config: Any) -> dict[Dimension, int]:
    """The neurons, where the config has their whole ratio to hidden alone and one of the two changes."""
    if s.names(config, "intermediate") != [s.RATIO] or not {"hidden", "intermediate"} & result.keys():
        return {}
    hidden = result.get("hidden", found.hidden)
    intermediate = result.get("intermediate", found.hidden * getattr(config, s.RATIO))
    if intermediate % hidden:
        near = max(intermediate // hidden, 1) * hidden
        raise ConfigurationError(
            f"intermediate={intermediate} with hidden={hidden}: a {type(config).__name__} has a whole {s.RATIO} "
            f"instead of a size. Give intermediate={near} or another multiple of {hidden}."
        )
    return {"intermediate": intermediate}


def config_of(sizes: Mapping[Dimension, int], found: Map, before: Any) -> Any:
    """The teacher's config at these sizes; with the size of a head where it would follow from them otherwise."""
    changed = {"hidden", "heads"} & sizes.keys() and not found.coupled
    return s.resized(before, sizes, found.head_dim if changed else None)


def check_expressible(sizes: Mapping[Dimension, int], found: Map, before: Any) -> None:
    """Refuses sizes that the config's class does not take: Llama's wants hidden to be a multiple of heads.

    Raises:
        ConfigurationError: with the nearest hidden sizes that it takes.
    """

    def taken(**changes: int) -> bool:
        try:
            s.check_loadable(config_of({**sizes, **changes}, found, before), "")  # type: ignore[dict-item]  # hidden
        except ConfigurationError:
            return False
        return True

    said = ", ".join(f"{name}={value}" for name, value in sizes.items())
    try:
        s.check_loadable(config_of(sizes, found, before), said)
    except ConfigurationError as error:
        wanted = sizes.get("hidden", found.hidden)
        ways = (range(wanted - 1, 0, -1), range(wanted + 1, found.hidden + 1))
        near = [next((size for size in way if taken(hidden=size)), None) for way in ways]
        if not any(near):
            raise
        cause = str(error.__cause__).splitlines()[-1].strip().removesuffix(".")
        can = " or ".join(f"hidden={size}" for size in near if size)
        raise ConfigurationError(
            f"{said}: a {type(before).__name__} cannot express it. {cause}. Give {can}."
        ) from error


def select(scores: Scores, found: Map, wanted: Mapping[Dimension, int]) -> Kept:
    """The units of largest score in each group; where several heads share keys and values, groups of heads first."""
    kept: Kept = {}
    for (dimension, group), values in scores.items():
        if dimension == "key_value_heads" or wanted.get(dimension, len(values)) == len(values):
            continue  # kept as they are, or chosen with their heads
        if dimension == "heads" and found.key_value_heads is not None:
            shared = scores.get(("key_value_heads", group))
            keys = torch.zeros(found.key_value_heads, dtype=values.dtype) if shared is None else shared
            queries, chosen = _heads(values, keys, wanted["heads"], wanted["key_value_heads"])
            kept["heads", group], kept["key_value_heads", group] = queries, chosen
        else:
            parts = found.parts if dimension == "hidden" else 1
            kept[dimension, group] = _of_parts(values.view(parts, -1), wanted[dimension] // parts)
    return kept


def largest(values: Tensor, count: int) -> Tensor:
    """(count,) rising indices of the largest values; of equal ones the first."""
    return values.argsort(descending=True, stable=True)[:count].sort().values


def _of_parts(values: Tensor, count: int) -> Tensor:
    """Rising indices of the largest values of each of several parts (part, unit)."""
    return torch.cat([largest(part, count) + place * len(part) for place, part in enumerate(values)])


def _heads(queries: Tensor, keys: Tensor, heads: int, key_value_heads: int) -> tuple[Tensor, Tensor]:
    """Query heads and key-value heads: of each group the best queries, of the groups the best sums."""
    each, share = len(queries) // len(keys), heads // key_value_heads
    values, at = queries.view(len(keys), each).sort(descending=True, stable=True)
    chosen = largest(keys + values[:, :share].sum(1), key_value_heads)
    best = at[:, :share].sort(1).values + torch.arange(len(keys))[:, None] * each
    return best[chosen].flatten(), chosen
