"""Which graphs a model has, and each of them traced.

| model | graphs |
|---|---|
| encoder, classifier, vision model | `model` |
| decoder-only language model | `model`, with the cache as inputs and outputs: one graph for prompt and continuation |
| encoder-decoder, text or speech | `encoder_model`, and `decoder_model_merged` with both caches |
| a class with `export_parts()` | what it names: exits, a backbone |

Tracing happens in float32, eval mode and eager attention on a clean copy: eager leaves out the extra masking that sdpa
adds to each layer.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.exporters import ExportedModel, OnnxConfig, OnnxExporter
from transformers.modeling_outputs import BaseModelOutput

from hf_compress.errors import ConfigurationError

from . import graph
from .parity import example, longest

MODEL, ENCODER, DECODER = "model", "encoder_model", "decoder_model_merged"
BATCH, TIME, PAST, TOTAL, SOURCE = (
    "batch_size",
    "sequence_length",
    "past_sequence_length",
    "total_sequence_length",
    "encoder_sequence_length",
)
_ROWS, _TIME, _PAST = 2, 5, 3
"""Of the samples: an axis of size 1 would be frozen in silence, and no two may be equal that vary apart."""
_PLAIN_AXES = {"input_ids": (BATCH, TIME), "pixel_values": (BATCH,), "input_features": (BATCH,)}


@dataclass(frozen=True, kw_only=True)
class Part:
    """One graph to be: what is traced, on what, and which axes vary."""

    name: str
    module: nn.Module
    sample: Mapping[str, Any]
    """By argument; a nested mapping gives names with dots: past_key_values.0.key."""
    axes: Mapping[str, Any]
    """Of the same structure: the names of the leading axes, None where one is fixed, `320*frames` for multiples."""
    cross: bool = False
    """Whether `present.N.encoder.*` is computed in the first call and handed back in the following."""


@dataclass(frozen=True, kw_only=True)
class Traced:
    """A named graph, its axes named and without metadata."""

    name: str
    exported: ExportedModel

    @property
    def file(self) -> str:
        """In the variant's folder."""
        return f"{self.name}.onnx"


def is_encoder_decoder(config: Any) -> bool:
    """Whether the model has an encoder and a decoder with a cache each."""
    return bool(getattr(config, "is_encoder_decoder", False))


def has_cache(model: PreTrainedModel) -> bool:
    """Whether it is a language model whose keys and values are kept from step to step."""
    known = inspect.signature(model.forward).parameters
    return bool(model.can_generate() and "use_cache" in known and ("cache" in known or "past_key_values" in known))


def clean(model: PreTrainedModel) -> PreTrainedModel:
    """A float32 copy on the CPU, in eval mode, with eager attention, and without what belongs to training.

    Raises:
        ConfigurationError: if the model cannot be exported as it is.
    """
    check_exportable(model)
    memo: dict[int, Any] = {}
    if (distiller := model._modules.get("distiller")) is not None:
        memo[id(distiller)] = nn.Identity()  # it may hold a teacher, which is not copied
    copied: PreTrainedModel = copy.deepcopy(model, memo)
    copied._modules.pop("distiller", None)
    for module in copied.modules():
        vars(module).pop("forward", None)  # what `check_exportable` lets pass: wrappers that would be traced
    for parameter in copied.parameters():
        parameter.grad = None
    copied = copied.float().cpu().eval()
    copied.set_attn_implementation("eager")
    for flag in ("use_cache", "output_hidden_states", "output_attentions"):
        if getattr(copied.config, flag, False):
            setattr(copied.config, flag, False)
    return copied


def check_exportable(model: PreTrainedModel) -> None:
    """Refuses what would be traced wrong, or cannot be called with invented inputs.

    Raises:
        ConfigurationError: with the remedy.
    """
    if not isinstance(model, PreTrainedModel):
        raise ConfigurationError(
            f"{type(model).__name__} is no PreTrainedModel. Unwrap it: `.module` of a parallel wrapper, "
            "`merge_and_unload()` of a PEFT model."
        )
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise ConfigurationError(
                f"{name or type(model).__name__} carries forward hooks, which would be traced into the graph. Remove "
                "them (`callback.detach()`, or `remove()` of the handle), or save the model and export its folder."
            )
        if _replaced_forward(module):
            raise ConfigurationError(
                f"{name or type(model).__name__} has a forward of its own, set on the instance; a saved student would "
                "not have it. Move it into the class, or `del` it."
            )
    check_class(model)


def check_class(model: PreTrainedModel) -> None:
    """Refuses models whose kind of inputs no graph is made for.

    Raises:
        ConfigurationError: with the remedy.
    """
    if type(model).__name__.endswith("ForMultipleChoice"):
        raise ConfigurationError(f"{type(model).__name__}: multiple choice does not fit a graph of (batch, time).")
    if is_encoder_decoder(model.config) and not has_cache(model):
        raise ConfigurationError(
            f"{type(model).__name__} is an encoder-decoder that does not generate; exported are those that do. Export "
            "its encoder, `model.get_encoder()`, or the model with a language head."
        )
    if not (model.main_input_name in _PLAIN_AXES or hasattr(model, "example_inputs") or named_parts(model)):
        raise ConfigurationError(
            f"{type(model).__name__} takes {model.main_input_name}; exported are models of {', '.join(_PLAIN_AXES)}, "
            "and classes that have `example_inputs` and `export_axes`."
        )


def _replaced_forward(module: nn.Module) -> bool:
    """Whether an instance computes something else than its class; wrappers of accelerate do not."""
    members = vars(module)
    own = members.get("forward")
    if own is None or "_original_forward" in members or "_old_forward" in members:
        return False
    return getattr(own, "__func__", None) is not type(module).forward  # the exporter leaves the class's own there


def named_parts(model: PreTrainedModel) -> Mapping[str, PreTrainedModel]:
    """The named graphs of a class of its own: `export_parts()` gives modules by name, each with `example_inputs`."""
    found: Mapping[str, PreTrainedModel] = model.export_parts() if hasattr(model, "export_parts") else {}
    return found


def cache_name(model: PreTrainedModel) -> str:
    """Of the argument of `forward` that takes the cache; transformers renamed it in 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def parts(model: PreTrainedModel, processing_class: Any) -> tuple[Part, ...]:
    """The graphs of a clean model.

    Args:
        model: from `clean`.
        processing_class: its tokenizer or processor; says which inputs are made and how large an image is.
    """
    if own := named_parts(model):
        return tuple(_plain(name, module, processing_class) for name, module in own.items())
    if is_encoder_decoder(model.config):
        return _encoder_decoder(model)
    if has_cache(model) and model.main_input_name == "input_ids":
        return (_causal(model),)
    return (_plain(MODEL, model, processing_class),)


def _plain(name: str, model: PreTrainedModel, processing_class: Any) -> Part:
    sample = example(model, processing_class, _ROWS, _TIME, side="right")
    axes = getattr(model, "export_axes", None) or dict.fromkeys(
        sample, _PLAIN_AXES.get(model.main_input_name, (BATCH,))
    )
    return Part(name=name, module=model, sample=sample, axes={key: axes[key] for key in sample})


class _Step(nn.Module):
    """A language model from (tokens, cache) to (logits, cache), with tensors alone on both sides."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self._cache = cache_name(model)

    def run(self, cache: Any, **inputs: Any) -> Tensor:
        """Logits; the cache is changed in place."""
        logits: Tensor = self.model(**inputs, **{self._cache: cache}, use_cache=True).logits
        return logits


class _CausalStep(_Step):
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_values: Mapping[str, Any]
    ) -> dict[str, Any]:
        cache = _filled(past_key_values)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        known = inspect.signature(self.model.forward).parameters
        logits = self.run(cache, **{name: value for name, value in inputs.items() if name in known})
        return {"logits": logits, "present": _named(cache)}


class _DecoderStep(_Step):
    """The first call of a decoder: keys and values of the encoder's states are computed. See `graph.reuse_cross`."""

    def forward(
        self,
        input_ids: Tensor,
        encoder_hidden_states: Tensor,
        past_key_values: Mapping[str, Any],
        encoder_attention_mask: Tensor | None = None,
    ) -> dict[str, Any]:
        own = _filled({layer: states["decoder"] for layer, states in past_key_values.items()})
        cache = EncoderDecoderCache(own, DynamicCache())
        inputs: dict[str, Any] = {} if encoder_attention_mask is None else {"attention_mask": encoder_attention_mask}
        outputs = BaseModelOutput(last_hidden_state=encoder_hidden_states)
        logits = self.run(cache, decoder_input_ids=input_ids, encoder_outputs=outputs, **inputs)
        decoder, encoder = _named(cache.self_attention_cache), _named(cache.cross_attention_cache)
        present = {layer: {"decoder": decoder[layer], "encoder": encoder[layer]} for layer in decoder}
        return {"logits": logits, "present": present}


def _filled(past: Mapping[str, Mapping[str, Tensor]]) -> DynamicCache:
    """A cache of {layer: {"key", "value"}}, each (batch, heads, time, width)."""
    cache = DynamicCache()
    for layer, states in past.items():
        cache.update(states["key"], states["value"], int(layer))
    return cache


def _named(cache: DynamicCache) -> dict[str, dict[str, Tensor]]:
    return {str(at): {"key": layer.keys, "value": layer.values} for at, layer in enumerate(cache.layers)}


def _states(model: PreTrainedModel, run: Any) -> list[tuple[int, int, int]]:
    """(heads, key width, value width) of each layer's cache, from a run of two tokens."""
    cache = DynamicCache()
    with torch.no_grad():
        run(cache)
    found = [(layer.keys.shape[1], layer.keys.shape[-1], layer.values.shape[-1]) for layer in cache.layers]
    if not found:
        raise ConfigurationError(
            f"{type(model).__name__} fills no cache of keys and values; what it keeps from step to step does not fit "
            "the graph's inputs. Export it without a language head, or keep the torch model."
        )
    return found


def _past(states: list[tuple[int, int, int]], length: int) -> dict[str, dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return {
        str(at): {
            "key": torch.randn(_ROWS, heads, length, key, generator=draw),
            "value": torch.randn(_ROWS, heads, length, value, generator=draw),
        }
        for at, (heads, key, value) in enumerate(states)
    }


_STATES_AXES = {"key": (BATCH, None, PAST), "value": (BATCH, None, PAST)}


def _causal(model: PreTrainedModel) -> Part:
    step = _CausalStep(model)
    states = _states(model, lambda cache: step.run(cache, input_ids=torch.ones(1, 2, dtype=torch.long)))
    mask = torch.ones(_ROWS, _PAST + _TIME, dtype=torch.long)
    mask[-1, :2] = 0
    ids = torch.arange(_ROWS * _TIME).reshape(_ROWS, _TIME) % model.config.get_text_config().vocab_size
    return Part(
        name=MODEL,
        module=step,
        sample={
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, _PAST:],
            "past_key_values": _past(states, _PAST),
        },
        axes={
            "input_ids": (BATCH, TIME),
            "attention_mask": (BATCH, TOTAL),
            "position_ids": (BATCH, TIME),
            "past_key_values": {str(at): _STATES_AXES for at in range(len(states))},
        },
    )


class _Encoder(nn.Module):
    """The encoder, with its states as the one output."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.encoder, self.config = model.get_encoder(), model.config

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        return {"last_hidden_state": self.encoder(**inputs).last_hidden_state}


def _encoder_decoder(model: PreTrainedModel) -> tuple[Part, Part]:
    own = example(model, None, _ROWS, _TIME, side="right")
    masked = "attention_mask" in own
    encoder, step = _Encoder(model), _DecoderStep(model)
    with torch.no_grad():
        hidden = encoder(**own)["last_hidden_state"]
    ids = torch.arange(_ROWS * 2).reshape(_ROWS, 2) % model.config.vocab_size
    one = {"encoder_outputs": BaseModelOutput(last_hidden_state=hidden), "decoder_input_ids": ids}
    states = _states(model, lambda cache: step.run(EncoderDecoderCache(cache, DynamicCache()), **one))
    past = {layer: {"decoder": values} for layer, values in _past(states, _PAST).items()}
    sample = {"input_ids": ids, "encoder_hidden_states": hidden, "past_key_values": past}
    source = (BATCH, SOURCE) if masked else (BATCH,)
    axes = {
        "input_ids": (BATCH, TIME),
        "encoder_hidden_states": source,
        "past_key_values": {layer: {"decoder": _STATES_AXES} for layer in past},
    }
    if masked:
        sample["encoder_attention_mask"], axes["encoder_attention_mask"] = own["attention_mask"], source
    return (
        Part(name=ENCODER, module=encoder, sample=own, axes=dict.fromkeys(own, source)),
        Part(name=DECODER, module=step, sample=sample, axes=axes, cross=True),
    )


def trace(part: Part) -> Traced:
    """One graph, with named axes and without metadata.

    Args:
        part: of `parts(model)`.

    Raises:
        ConfigurationError: if an axis that should vary came out as a number.
    """
    sample = pytree.tree_map(lambda value: value, dict(part.sample))  # the exporter takes entries out of it
    most = {TIME: longest(part.module, None)} if isinstance(part.module, PreTrainedModel) else {}
    plain = not any(isinstance(value, Mapping) for value in part.sample.values())
    names = {axis for axes in _leaves(part.axes).values() for axis in axes if axis is not None}
    dims = {axis: _dimension(axis, most.get(axis)) if plain else Dim.AUTO for axis in names}
    shapes = _tree(
        part.axes,
        lambda axes: {at: dims[axis] for at, axis in enumerate(axes) if axis is not None},
    )
    with _quiet(), torch.no_grad():
        exported = OnnxExporter().export(part.module, sample, OnnxConfig(dynamic_shapes=shapes))
    graph.strip_metadata(exported.program)
    named = {
        name: {at: axis for at, axis in enumerate(axes) if axis is not None and "*" not in axis}
        for name, axes in _leaves(part.axes).items()
    }
    graph.name_axes(exported.program, named)
    if part.cross:
        graph.reuse_cross(exported.program, source=SOURCE, batch=BATCH)
    return Traced(name=part.name, exported=exported)


def _tree(axes: Mapping[str, Any], make: Any) -> dict[str, Any]:
    """`make` of each leaf, a tuple of names, in the same structure."""
    return {name: _tree(own, make) if isinstance(own, Mapping) else make(own) for name, own in axes.items()}


def _leaves(axes: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[str | None, ...]]:
    """The leaves by their path: past_key_values.0.key."""
    found: dict[str, tuple[str | None, ...]] = {}
    for name, own in axes.items():
        if isinstance(own, Mapping):
            found |= _leaves(own, f"{prefix}{name}.")
        else:
            found[prefix + name] = own
    return found


def _dimension(axis: str, most: int | None) -> Any:
    """An axis that may vary; `320*frames` one that is a multiple."""
    factor, _, name = axis.rpartition("*")
    found = Dim(name, min=1, max=most)
    return int(factor) * found if factor else found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what each export says about torch and not about the model: stages, absent torchvision, a deprecation."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            yield
    finally:
        registration.setLevel(level)
