"""How much each unit of a dimension matters: by the weights that go with it, or by its activations on data.

Where there is data, activations are the better choice, by far so for language models: `python -m
hf_compress_evaluation.narrowing` measures both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_compress.errors import ConfigurationError
from hf_compress.taps import evaluating

from .axes import Axis, reads
from .mapping import Map
from .sizes import Dimension

By = Literal["norms", "activations"]
Scores = dict[tuple[Dimension, str], Tensor]
"""(unit,) at least 0, by dimension and group, additive: the share of what is kept is a ratio of sums."""


def norms(model: nn.Module, found: Map) -> Scores:
    """Sums of squares of all weights that are cut with a unit: rows that write it, columns that read it, biases."""
    scores: Scores = {}
    seen: set[tuple[int, int]] = set()
    state = model.state_dict()
    for axis in found.axes:
        weight = state[axis.weight]
        if (weight.data_ptr(), axis.axis) in seen or not weight.is_floating_point():  # tied weights count once
            continue
        seen.add((weight.data_ptr(), axis.axis))
        values = axis.squares(weight.detach()).cpu()
        key = (axis.dimension, axis.group)
        scores[key] = scores[key] + values if key in scores else values
    return scores


def activations(model: nn.Module, found: Map, batches: Iterable[Mapping[str, Any]]) -> Scores:
    """Mean absolute values of the units on data, where linear layers read them: heads before the output projection,
    neurons before the down projection, hidden dimensions before every layer that reads the residual stream.

    Args:
        model: is put into eval mode meanwhile; no gradient.
        found: its axes.
        batches: arguments of its forward by name; what `attention_mask` and `decoder_attention_mask` leave out does
            not count.

    Raises:
        ConfigurationError: if there is no batch, or no linear layer reads the units of a group.
    """
    watched = [(axis, module) for axis in found.axes if (module := reads(model, axis)) is not None]
    _check_read(found, watched)
    sums: Scores = {}
    masks: dict[str, Tensor | None] = {}

    def recording(axis: Axis) -> Any:
        def hook(_: nn.Module, given: tuple[Any, ...]) -> None:
            values = given[0].detach().abs().to(torch.float64)
            mask = masks["decoder" if "decoder" in axis.weight else "encoder"]
            if mask is not None and mask.shape == values.shape[:2]:
                values = values[mask.bool()]
            values = axis.by_unit(values.reshape(-1, values.shape[-1]).sum(0)).cpu()
            key = (axis.dimension, axis.group)
            sums[key] = sums[key] + values if key in sums else values

        return hook

    handles = [module.register_forward_pre_hook(recording(axis)) for axis, module in watched]
    device = next(model.parameters()).device
    rows = 0
    try:
        with evaluating(model), torch.no_grad():
            for batch in batches:
                moved = {
                    name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()
                }
                both = moved.get("attention_mask")
                masks["encoder"] = both
                masks["decoder"] = moved.get("decoder_attention_mask") if "decoder_input_ids" in moved else both
                model(**moved)
                rows += 1
    finally:
        for handle in handles:
            handle.remove()
    if not rows:
        raise ConfigurationError("shrink: data has no batch. Give batches, as a DataLoader does, or leave it out.")
    return {key: values / rows for key, values in sums.items()}


def _check_read(found: Map, watched: list[tuple[Axis, nn.Module]]) -> None:
    read = {(axis.dimension, axis.group) for axis, _ in watched}
    groups = {(axis.dimension, axis.group) for axis in found.axes if axis.dimension != "key_value_heads"}
    if missing := sorted(groups - read):
        dimension, group = missing[0]
        raise ConfigurationError(
            f"shrink cannot watch the {dimension} of {group or 'the model'}: no linear layer reads them. Leave data "
            "out: units are then chosen by the norms of their weights."
        )
