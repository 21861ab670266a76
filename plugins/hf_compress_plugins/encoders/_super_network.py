"""A BERT whose parts are smaller BERTs: of some of its layers, the top left block of each matrix."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import BertConfig, PreTrainedModel

from hf_compress.errors import MismatchError
from hf_compress.objective import Inputs
from hf_compress.provenance import describe_model
from hf_compress.taps import Taps, joined_heads, watching

from . import _modeling_autodistil as modeling

LETTERS = ("q", "k", "v")
READ = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
"""Inputs of a body of any width."""
_LAYER = re.compile(r"(?<=encoder\.layer\.)\d+")
_OTHERS = {"architectures", "auto_map", "compression", "compression_start", "head_size", "model_type", "_name_or_path"}
"""Entries of a SuperLM's config that are not its students'."""


class Architecture(NamedTuple):
    """Sizes of a student, by the names of a BERT's config."""

    num_hidden_layers: int
    num_attention_heads: int
    hidden_size: int
    intermediate_size: int


def own_sizes(config: Any) -> Architecture:
    """Of a model.

    Raises:
        MismatchError: if its config does not tell them.
    """
    found = [size for name in Architecture._fields if isinstance(size := getattr(config, name, None), int)]
    if len(found) < len(Architecture._fields):
        raise MismatchError(f"autodistil: needs a BERT; the config of this model has no {Architecture._fields}.")
    return Architecture(*found)


def kept_layers(count: int, depth: int) -> list[int]:
    """Which layers of `depth` a student of so many has."""
    return [place * depth // count for place in range(count)]


def top_left(weight: Tensor, shape: Sequence[int]) -> Tensor:
    """The block of that shape, a view.

    Raises:
        MismatchError: if the weight is smaller.
    """
    if weight.dim() != len(shape) or any(own < asked for own, asked in zip(weight.shape, shape, strict=True)):
        raise MismatchError(
            f"autodistil: a weight of shape {tuple(weight.shape)} has no block of {tuple(shape)}. No size of a student "
            "may be above that of the SuperLM."
        )
    return weight[tuple(slice(size) for size in shape)]


def _sized(model: PreTrainedModel, sizes: Architecture) -> Callable[[], PreTrainedModel]:
    """Makes a student: of BERT's own class where the heads are as wide together as the model, else of ours."""
    name = type(model).__name__.removeprefix("AutoDistil")
    if f"AutoDistil{name}" not in modeling.AUTO.values() or type(model) not in _classes(name):
        raise MismatchError(
            f"autodistil: needs one of {sorted(modeling.AUTO.values())[1:]} or BERT's own of these names, got "
            f"{type(model).__name__}."
        )
    head = _head_size(model.config)
    settings = {key: value for key, value in model.config.to_dict().items() if key not in _OTHERS} | sizes._asdict()
    plain = sizes.num_attention_heads * head == sizes.hidden_size
    config = BertConfig(**settings) if plain else modeling.AutoDistilBertConfig(head_size=head, **settings)
    config._attn_implementation = model.config._attn_implementation
    kind = _classes(name)[0 if plain else 1]
    unpooled = {"add_pooling_layer": False} if getattr(model, "pooler", model) is None else {}
    return partial(kind, config, **unpooled)


def _classes(name: str) -> tuple[Any, Any]:
    return getattr(transformers, name, None), getattr(modeling, f"AutoDistil{name}", None)


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_size", config.hidden_size // config.num_attention_heads))


def student_weights(model: PreTrainedModel, student: PreTrainedModel) -> dict[str, Tensor]:
    """The student's weights by its own names: views of the model's, through which gradients flow.

    Args:
        model: the SuperLM.
        student: of its class, with fewer layers and smaller shapes; its own weights are not read.

    Raises:
        MismatchError: if the model lacks a weight of the student's, as one with adapters does.
    """
    every = dict(model.named_parameters(remove_duplicate=False))
    kept = kept_layers(student.config.num_hidden_layers, model.config.num_hidden_layers)
    found = {}
    for name, own in student.named_parameters():
        source = _LAYER.sub(lambda match: str(kept[int(match[0])]), name)
        if source not in every:
            raise MismatchError(f"autodistil: {type(model).__name__} has no weight {source}; merge adapters first.")
        found[name] = top_left(every[source], own.shape)
    return found


def parameters(model: PreTrainedModel, sizes: Architecture) -> int:
    """Of a student."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in _sized(model, sizes)().parameters())


class Student:
    """One student of a SuperLM, without weights of its own: a model of its shapes, whose forward is given slices."""

    def __init__(self, body: PreTrainedModel, sizes: Architecture) -> None:
        with torch.device("meta"):
            self.model = _sized(body, sizes)()
        self.taps = Taps(self.model, {f"{letter}:-1" for letter in LETTERS}, sizes.num_hidden_layers)

    def vectors(self, body: PreTrainedModel, inputs: Inputs) -> dict[str, Tensor]:
        """(batch, time, width) last queries, keys and values, in the body's mode and with its gradients."""
        self.model.train(body.training)
        weights = student_weights(body, self.model)
        buffers = {name: body.get_buffer(name) for name, _ in self.model.named_buffers()}
        given = {name: value for name, value in inputs.items() if name in READ}
        with watching(self.taps):
            output = torch.func.functional_call(self.model, {**weights, **buffers}, kwargs=given)
        return {name[0]: joined_heads(value) for name, value in self.taps.read(output).items()}


def extract(model: PreTrainedModel, sizes: Architecture, *, of: str = "SuperLM") -> PreTrainedModel:
    """A student with its own weights: a stock BERT where its heads are as wide together as it is, else a class of ours
    that loads with AutoModel.

    Args:
        model: the SuperLM, or the teacher.
        sizes: of the student, none above the model's.
        of: how the model is called in the student's record.
    """
    with torch.random.fork_rng():  # the random initial weights are all replaced
        student = _sized(model, sizes)()
    student.to(device=model.device, dtype=model.dtype)
    weights = student_weights(model, student)
    with torch.no_grad():
        for name, own in student.named_parameters():
            own.copy_(weights[name])
    before = own_sizes(model.config)
    layers = ", ".join(map(str, kept_layers(sizes.num_hidden_layers, before.num_hidden_layers)))
    said = [
        f"{name} {size} of {whole}"
        for name, size, whole in zip(Architecture._fields[1:], sizes[1:], before[1:], strict=True)
    ]
    student.config.compression_start = f"layers {layers} of {before.num_hidden_layers}, {', '.join(said)} of the {of}"
    trained = getattr(model.config, "compression", None)
    if isinstance(trained, dict) and of == "SuperLM":
        own_record = describe_model(student, sizes.num_hidden_layers).model_dump(mode="json", exclude_none=True)
        student.config.compression = copy.deepcopy(trained) | {"student": own_record}
    return student.train(model.training)
