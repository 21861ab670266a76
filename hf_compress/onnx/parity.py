"""Whether a graph gives the numbers of the model that it came from, over shapes and padding."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, PretrainedConfig, PreTrainedModel

from hf_compress.errors import ParityError

Inputs = dict[str, Tensor]

TOLERANCE = 1e-4
"""Allowed |difference| of an output, times 1 + |output|; measured on real encoders: 1e-7 to 2e-5."""
ROUNDING = 10
"""Times what a change of the last bit of all weights makes, where float32 leaves an output undetermined."""
SHAPES = ((1, 1), (3, 11), (5, 64))
"""(batch, time) of the parity check; time is capped by what the model takes."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The largest difference between a graph's outputs and the model's, over all batches."""

    max_abs_diff: float
    output: str
    shape: tuple[int, ...]
    """Of the batch where it occurred: (batch, time) or (batch, channels, height, width)."""
    rounding: float = 0.0
    """The most that was allowed beside the tolerance, because float32 leaves that much open; 0 where nothing was."""


def check_parity(
    candidate: Callable[..., Mapping[str, Tensor]],
    model: Callable[..., Mapping[str, Tensor]],
    batches: Iterable[Inputs],
    *,
    tolerance: float = TOLERANCE,
    rounded: Callable[[], Callable[..., Mapping[str, Tensor]]] | None = None,
) -> Parity:
    """Compares every output of a graph with the model's: |difference| at most tolerance · (1 + |output|).

    Some numbers float32 does not determine: SmolLM2 after two random tokens moves by 0.002 between float32 and
    float64. Where the limit is missed and `rounded` is given, `ROUNDING` times what it differs is allowed beside.

    Args:
        candidate: e.g. an `OnnxModel`; called with the tensors of a batch by name.
        model: the torch model, in eval mode.
        batches: e.g. `parity_batches(model, tokenizer)`.
        tolerance: absolute and relative at once.
        rounded: makes the model with weights that differ in their last bit; called when it is needed.

    Raises:
        ParityError: for the first output that is missing, of another shape, or too far off: how far, where.
    """
    worst = Parity(max_abs_diff=0.0, output="", shape=())
    most = 0.0
    other: Callable[..., Mapping[str, Tensor]] | None = None
    for batch in batches:
        with torch.no_grad():
            expected = {name: value for name, value in model(**batch).items() if isinstance(value, Tensor)}
        found = candidate(**batch)
        for name, value in expected.items():
            try:
                difference = _difference(name, found.get(name), value, batch, tolerance)
            except ParityError:
                if rounded is None or found.get(name) is None or found[name].shape != value.shape:
                    raise
                other = rounded() if other is None else other
                with torch.no_grad():
                    slack = ROUNDING * (other(**batch)[name] - value).abs().amax(-1, keepdim=True)
                difference = _difference(name, found.get(name), value, batch, tolerance, slack)
                most = max(most, slack.max().item())
            if difference >= worst.max_abs_diff:
                worst = Parity(max_abs_diff=difference, output=name, shape=shape_of(batch))
    return replace(worst, rounding=most)


def _difference(
    name: str, found: Tensor | None, expected: Tensor, batch: Inputs, tolerance: float, slack: Tensor | float = 0.0
) -> float:
    where = f"{name}, batch of shape {shape_of(batch)}"
    if found is None or found.shape != expected.shape:
        shape = None if found is None else tuple(found.shape)
        raise ParityError(f"{where}: the graph gives shape {shape}, the model {tuple(expected.shape)}.")
    found, expected = found.cpu().double(), expected.cpu().double()
    gap = torch.where(found == expected, 0.0, (found - expected).abs()).nan_to_num(nan=math.inf)  # -inf equals -inf
    excess = ~(gap <= tolerance * (1 + expected.abs()) + slack)
    largest = gap.max().item() if gap.numel() else 0.0
    if excess.any():
        beside = f" and {float(slack.max()):.3g} for rounding" if isinstance(slack, Tensor) else ""
        raise ParityError(
            f"{where}: the graph differs from the model by up to {largest:.3g} (at {int(excess.sum())} of "
            f"{gap.numel()} values), allowed is {tolerance:g} x (1 + |output|){beside}."
        )
    return largest


def with_other_rounding(model: nn.Module) -> nn.Module:
    """A copy whose weights differ in their last bit, at random."""
    copied = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(0)
    step = torch.finfo(torch.float32).eps
    with torch.no_grad():
        for weight in copied.parameters():
            weight.mul_(1 + step * (torch.randint(3, weight.shape, generator=draw) - 1))
    return copied


def parity_batches(model: PreTrainedModel, processing_class: Any) -> Iterator[Inputs]:
    """Invented inputs over `SHAPES`, padded right and left (images and sound: over batch sizes)."""
    limit = longest(model, processing_class)
    text = model.main_input_name == "input_ids"
    sides: tuple[Literal["left", "right"], ...] = ("left", "right") if text else ("right",)
    for batch, time in SHAPES:
        for side in sides:
            inputs = example(model, processing_class, batch, min(time, limit or time), side=side)
            if getattr(model.config, "is_encoder_decoder", False):
                inputs["decoder_input_ids"] = _targets(model.config, batch, time)
            yield inputs


def _targets(config: PretrainedConfig, batch: int, time: int) -> Tensor:
    most = getattr(config, "max_target_positions", None) or getattr(config, "max_position_embeddings", None) or time
    generator = torch.Generator().manual_seed(time)
    return torch.randint(config.vocab_size, (batch, min(time, most)), generator=generator)


def in_two_calls(model: PreTrainedModel, cache_name: str = "cache") -> Callable[..., Mapping[str, Tensor]]:
    """A language model that is asked twice: half of the tokens, then the rest with what the first call left.

    Args:
        model: a torch model, or an exported one.
        cache_name: of the argument that takes the cache.

    Returns:
        A function of the batch to `logits` of all positions (batch, time, vocabulary).
    """
    known = inspect.signature(model.forward).parameters
    ids_name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"

    def run(**batch: Tensor) -> Mapping[str, Tensor]:
        ids = batch.pop(ids_name)
        first = ids.shape[1] // 2
        mask = batch.get("attention_mask")
        own, cache = EncoderDecoderCache(DynamicCache(), DynamicCache()), DynamicCache()
        logits = []
        for start, end in ((0, first), (first, ids.shape[1])):
            if start == end:
                continue
            if ids_name == "input_ids" and mask is not None:
                batch["attention_mask"] = mask[:, :end]
                if "position_ids" in known:
                    batch["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:end]
            past = own if ids_name == "decoder_input_ids" else cache
            output = model(**batch, **{ids_name: ids[:, start:end], cache_name: past}, use_cache=True)
            logits.append(output.logits)
        return {"logits": torch.cat(logits, 1)}

    return run


def shape_of(batch: Inputs) -> tuple[int, ...]:
    return tuple(next(iter(batch.values())).shape)


def example(
    model: PreTrainedModel, processing_class: Any, batch: int, time: int, *, side: Literal["left", "right"]
) -> Inputs:
    """(batch, time) random ids, or images; row r has r · time / (2 · batch) padded positions, the first row none.

    A class with other inputs says itself what they look like: `example_inputs(batch, time, generator)` by name, and
    `export_axes`, the names of the leading axes of each that may vary, such as `images`, or `320*frames` for one of
    multiples.
    """
    generator = torch.Generator().manual_seed(batch * 1000 + time)
    if hasattr(model, "example_inputs"):
        own: Inputs = model.example_inputs(batch, time, generator)
        return own
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(batch, *_image_shape(model.config, processing_class), generator=generator)}
    if model.main_input_name == "input_features":  # a log-mel spectrogram of fixed length, as Whisper takes it
        shape = (batch, model.config.num_mel_bins, 2 * model.config.max_source_positions)
        return {"input_features": torch.randn(shape, generator=generator)}
    config = model.config.get_text_config()
    ids = torch.randint(config.vocab_size, (batch, time), generator=generator)
    named = getattr(config, "pad_token_id", None)
    pad = named if isinstance(named, int) and named >= 0 else 0
    ids[ids == pad] = (pad + 1) % config.vocab_size
    padded = torch.arange(batch) * time // (2 * batch)
    mask = (torch.arange(time)[None] < time - padded[:, None]).long()
    mask = mask.flip(1) if side == "left" else mask
    inputs = {"input_ids": ids.where(mask.bool(), pad), "attention_mask": mask}
    kinds = getattr(config, "type_vocab_size", 0) or 0
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if "token_type_ids" in getattr(tokenizer, "model_input_names", ["token_type_ids"]) and kinds > 1:
        inputs["token_type_ids"] = torch.randint(kinds, ids.shape, generator=generator)
    known = inspect.signature(model.forward).parameters
    return {name: value for name, value in inputs.items() if name in known}


def _image_shape(config: PretrainedConfig, processing_class: Any) -> tuple[int, int, int]:
    size = getattr(processing_class, "crop_size", None) or getattr(processing_class, "size", None)
    side = getattr(config, "image_size", None) or 224
    height, width = side if isinstance(side, list | tuple) else (side, side)
    if size is not None and getattr(size, "get", None) and size.get("height"):
        height, width = size["height"], size["width"]
    return getattr(config, "num_channels", 3), height, width


def longest(model: PreTrainedModel, processing_class: Any) -> int | None:
    """The most tokens that model and tokenizer take; None without a limit, as with relative positions."""
    limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None)]
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings"):
            limits.append(module.num_embeddings - (-1 if module.padding_idx is None else module.padding_idx) - 1)
    limits.append(getattr(getattr(processing_class, "tokenizer", processing_class), "model_max_length", None))
    known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 10**9]  # "no limit" is 10**30
    return min(known, default=None)
