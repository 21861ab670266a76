"""Reading and rewriting what a model returns: a ModelOutput, a dict, a tuple or a tensor."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, make_dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .errors import MismatchError
from .objective import IGNORED, Inputs


def tensors(output: Any, device: torch.device | None) -> Any:
    """An output with tensors for arrays, which heads outside torch give, and a tuple for a list."""
    if isinstance(output, np.ndarray):
        return torch.from_numpy(output).to(device)
    if isinstance(output, list) or (isinstance(output, tuple) and any(isinstance(one, np.ndarray) for one in output)):
        return tuple(tensors(one, device) for one in output)
    if isinstance(output, Mapping) and any(isinstance(value, np.ndarray) for value in output.values()):
        return {name: tensors(value, device) for name, value in output.items()}
    return output


def first(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        for name in ("last_hidden_state", "logits"):
            if name in output:
                return field(output, name)
        value: Tensor = next(value for key, value in output.items() if key != "loss")
        return value
    first: Tensor = output[0]
    return first


def field(output: Any, name: str) -> Tensor:
    value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    if not isinstance(value, Tensor):
        raise MismatchError(f"the model's output has no tensor {name!r}; it has {_fields(output)}.")
    return value


def _fields(output: Any) -> list[str]:
    return list(output) if isinstance(output, Mapping) else [type(output).__name__]


def logits_of(output: Any) -> Tensor:
    """(batch, ..., class) logits; of a span model (batch, 2, time), start and end stacked."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple):
        skip = 1 if isinstance(output[0], Tensor) and output[0].dim() == 0 else 0
        logits: Tensor = output[skip]
        return logits
    if "start_logits" in output and "end_logits" in output:
        return torch.stack([output["start_logits"], output["end_logits"]], 1)
    if not isinstance(output.get("logits"), Tensor):
        raise MismatchError(
            f"the model's output has no logits, it has {_fields(output)}. With use_liger_kernel or another fused loss "
            "training outputs carry none: turn it off; for a model without a head choose a method on hidden states."
        )
    found: Tensor = output["logits"]
    return found


def two_outcomes(logits: Tensor) -> Tensor:
    """(…, label, 2) logits 0 and z of each label's two outcomes: their softmax is 1 - σ(z) and σ(z)."""
    return torch.stack([torch.zeros_like(logits), logits], -1)


def hidden_state(output: Any, name: str, index: int) -> Tensor:
    states = output.get("hidden_states") if isinstance(output, Mapping) else None
    if states is None and isinstance(output, Mapping):  # an encoder-decoder: the side whose tokens the mask tells
        states = output.get("encoder_hidden_states")
    if states is None:
        raise MismatchError(f"tap {name!r}: the model returned no hidden_states; it has {_fields(output)}.")
    if not -len(states) <= index < len(states):
        raise MismatchError(f"tap {name!r}: the model has {len(states)} hidden states, embeddings included.")
    state: Tensor = states[index]
    return state


def decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    """What an encoder-decoder's decoder reads: the labels shifted right, as the model itself does it."""
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None) or getattr(model, "_shift_right", None)
    if shift is None:  # a function of its modeling module, not of the model
        shifted = nn.functional.pad(labels[:, :-1], (1, 0), value=model.config.decoder_start_token_id)
        return shifted.masked_fill(shifted == IGNORED, model.config.pad_token_id)
    found: Tensor = shift(labels)
    return found


def with_frames(model: Any, inputs: Inputs) -> Inputs:
    """A batch of waveforms with its mask over samples brought to the frames of the model's states."""
    mask, brought = inputs.get("attention_mask"), getattr(model, "_get_feature_vector_attention_mask", None)
    if mask is None or brought is None or "input_values" not in inputs:
        return inputs
    frames = int(model._get_feat_extract_output_lengths(mask.shape[1]))
    return {**inputs, "attention_mask": brought(frames, mask)}


def loss_of(output: Any, inputs: Inputs) -> Tensor | None:
    """The model's own loss in an output of any form; None where it computed none."""
    if isinstance(output, Mapping):
        loss = output.get("loss")
        return loss if isinstance(loss, Tensor) else None
    labelled = any(name in inputs for name in ("labels", "start_positions"))
    return output[0] if labelled and isinstance(output[0], Tensor) and output[0].dim() == 0 else None


def without_states(output: Any) -> Any:
    return type(output)(**{name: value for name, value in output.items() if name != "hidden_states"})


@cache
def _with_field(kind: type[ModelOutput]) -> type[ModelOutput]:
    """The class with a field for a loss: several processes take an output apart and make it anew from its fields."""
    made: type[ModelOutput] = make_dataclass(kind.__name__, [("loss", Any, None)], bases=(kind,))
    return made


def with_loss(output: Any, loss: Tensor) -> Any:
    """The output with another loss, in the form and order that it had."""
    if isinstance(output, Mapping):
        kind: Any = type(output)
        typed = isinstance(output, ModelOutput) and is_dataclass(kind)
        if typed and "loss" not in {field.name for field in fields(kind)}:
            output = _with_field(kind)(**output)  # a body without a head
        changed: Any = copy.copy(output)
        changed["loss"] = loss
        if isinstance(changed, OrderedDict):
            changed.move_to_end("loss", last=False)
        return changed
    if isinstance(output, Tensor):
        return (loss, output)
    scalar = isinstance(output[0], Tensor) and output[0].dim() == 0
    return (loss, *output[1:]) if scalar else (loss, *output)
