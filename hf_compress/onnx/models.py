"""Exported language models behind `generate` and the pipelines of transformers.

The graphs compute; sampling, beams, streaming and the speech logic are transformers' own. The cache between two steps
is a `DynamicCache`, so beams reorder it and assisted decoding crops it as it does a torch model's.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig, GenerationMixin, PreTrainedConfig
from transformers import PreTrainedModel as _PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast, ModelOutput, Seq2SeqLMOutput
from transformers.models.whisper.generation_whisper import WhisperGenerationMixin

from hf_compress.errors import ConfigurationError

from .graph import FLAG, PAST, PRESENT
from .runtime import OnnxGraph


class _Served(_PreTrainedModel):  # type: ignore[misc]  # transformers is not typed for mypy
    """What pipelines ask of a model, around a graph that holds the weights."""

    base_model_prefix = ""

    def __init__(self, graph: OnnxGraph, config: PreTrainedConfig) -> None:
        config = copy.deepcopy(config)
        config._attn_implementation = "eager"
        super().__init__(config)
        self.graph = graph
        self.eval()

    @property
    def session(self) -> Any:
        """The `onnxruntime.InferenceSession`; of a decoder where there are two."""
        return self.graph.session

    @property
    def provider(self) -> str:
        """What runs the graph."""
        return self.graph.provider

    @property
    def input_names(self) -> tuple[str, ...]:
        """What the graph takes, its past left out."""
        return tuple(name for name in self.graph.input_names if not name.startswith(PAST))

    @property
    def device(self) -> torch.device:
        """Where the session runs."""
        return self.graph.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the first output."""
        return self.graph.dtype

    def to(self, *args: object, **kwargs: object) -> Self:
        """Itself: a session stays where it was opened, and inputs are brought to it."""
        return self


class OnnxModel(_Served):
    """A graph without a cache, called like the torch model that it came from.

    Inputs are tensors by name on any device, of any integer or float type; they are cast to what the graph takes.
    Left out: `attention_mask` counts as all ones and `token_type_ids` as zeros, as in torch; anything else missing
    raises. An input that the graph lacks raises, unless it says nothing (None, or a flag set to False).
    """

    generation_config = None

    def __init__(self, graph: OnnxGraph, config: PreTrainedConfig) -> None:
        super().__init__(graph, config)
        if graph.input_names[0] in ("pixel_values", "input_values", "input_features"):
            self.main_input_name = graph.input_names[0]

    def can_generate(self) -> bool:
        """False: the graph keeps no cache."""
        return False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **inputs: Any,
    ) -> ModelOutput:
        """Runs the graph.

        Args:
            input_ids: (batch, time).
            attention_mask: (batch, time), 1 where a token is real.
            token_type_ids: (batch, time).
            pixel_values: (batch, channels, height, width).
            inputs: what else the graph takes, by name.

        Returns:
            The graph's outputs by name, e.g. `logits`, on the session's device.

        Raises:
            ConfigurationError: if an input is missing, or is not one of the graph's.
        """
        inputs |= {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "pixel_values": pixel_values,
        }
        return self.graph(**inputs)


class _Generating(GenerationMixin, _Served):  # type: ignore[misc]
    """What `generate` asks of a model."""

    _is_stateful = False

    def __init__(self, graph: OnnxGraph, config: PreTrainedConfig, generation_config: GenerationConfig | None) -> None:
        super().__init__(graph, config)
        self.generation_config = generation_config or GenerationConfig.from_model_config(self.config)
        self._past = _past(graph)

    def can_generate(self) -> bool:
        """True."""
        return True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the first step makes the cache; it holds whole sequences, windows are the graph's own matter

    def _step(self, cache: DynamicCache, states: str, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Runs the decoder and leaves its new keys and values in the cache."""
        rows = inputs["input_ids"].shape[0]
        past = {
            f"{PAST}{layer}.{states}{kind}": _state(cache, layer, kind, rows, shape, self.dtype, self.device)
            for layer, shapes in enumerate(self._past[states])
            for kind, shape in shapes.items()
        }
        output: Mapping[str, Tensor] = self.graph(**inputs, **past)
        for layer in range(len(self._past[states])):
            _keep(cache, layer, *(output[f"{PRESENT}{layer}.{states}{kind}"] for kind in ("key", "value")))
        return output


def _past(graph: OnnxGraph) -> dict[str, list[dict[str, tuple[int, int]]]]:
    """{"" or "decoder." or "encoder.": for each layer {"key": (heads, width), "value": …}} from the graph's inputs."""
    found: dict[str, list[dict[str, tuple[int, int]]]] = {}
    for spec in graph.session.get_inputs():
        if spec.name.startswith(PAST):
            layer, rest = spec.name.removeprefix(PAST).split(".", 1)
            states, kind = rest[: rest.rfind(".") + 1], rest[rest.rfind(".") + 1 :]
            layers = found.setdefault(states, [])
            while len(layers) <= int(layer):
                layers.append({})
            layers[int(layer)][kind] = (spec.shape[1], spec.shape[3])
    return found


def _state(
    cache: DynamicCache,
    layer: int,
    kind: str,
    rows: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    if layer < len(cache.layers) and cache.layers[layer].is_initialized:
        kept: Tensor = cache.layers[layer].keys if kind == "key" else cache.layers[layer].values
        return kept
    return torch.zeros(rows, shape[0], 0, shape[1], dtype=dtype, device=device)


def _keep(cache: DynamicCache, layer: int, keys: Tensor, values: Tensor) -> None:
    while len(cache.layers) <= layer:
        cache.layers.append(DynamicLayer())
    own = cache.layers[layer]
    if not own.is_initialized:
        own.lazy_initialization(keys, values)
    own.keys, own.values = keys, values


class OnnxCausalLM(_Generating):
    """A decoder-only language model on ONNX Runtime."""

    main_input_name = "input_ids"

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: DynamicCache | None = None,
        use_cache: bool | None = None,
        **inputs: Any,
    ) -> CausalLMOutputWithPast:
        """Runs the graph on tokens that follow the cache.

        Args:
            input_ids: (batch, time).
            attention_mask: (batch, past + time), 1 where a token is real; None: all are.
            position_ids: (batch, time); None: counted over the real tokens.
            cache: what earlier calls left, changed in place; None: nothing precedes.
            use_cache: whether the output carries the cache; None: yes.
            inputs: what says nothing (None, False) is left out; anything else is refused.

        Returns:
            `logits` (batch, time, vocabulary) and `cache`.
        """
        _refuse(inputs, self.input_names)
        cache = DynamicCache() if cache is None else cache
        seen = cache.get_seq_length()
        if attention_mask is None:
            attention_mask = torch.ones(input_ids.shape[0], seen + input_ids.shape[1], dtype=torch.long)
        if attention_mask.ndim != 2 or attention_mask.shape[1] != seen + input_ids.shape[1]:
            raise ConfigurationError(
                f"attention_mask of shape {tuple(attention_mask.shape)}: the graph takes (batch, past + time), here "
                f"({input_ids.shape[0]}, {seen + input_ids.shape[1]})."
            )
        if position_ids is None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, seen:]
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        output = self._step(cache, "", {name: given[name] for name in given if name in self.input_names})
        return CausalLMOutputWithPast(logits=output["logits"], cache=cache if use_cache is not False else None)


class _Encoder(nn.Module):
    """The encoder's graph as the module that `generate` looks for."""

    main_input_name = "input_ids"

    def __init__(self, graph: OnnxGraph, config: PreTrainedConfig) -> None:
        super().__init__()
        self.graph, self.config = graph, config
        self.input_names = graph.input_names
        self.main_input_name = "input_features" if "input_features" in graph.input_names else "input_ids"

    @property
    def device(self) -> torch.device:
        return self.graph.device

    @property
    def dtype(self) -> torch.dtype:
        return self.graph.dtype

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_features: Tensor | None = None,
        **inputs: Any,
    ) -> BaseModelOutput:
        """States (batch, time, width) of token ids, or of a spectrogram, whose padding the model hears as silence."""
        _refuse(inputs, self.input_names)
        if input_features is None:
            states = self.graph(input_ids=input_ids, attention_mask=attention_mask)
        else:
            states = self.graph(input_features=input_features)
        return BaseModelOutput(last_hidden_state=states["last_hidden_state"])


class OnnxSeq2SeqLM(_Generating):
    """An encoder-decoder on ONNX Runtime, text to text."""

    main_input_name = "input_ids"
    encoder: _Encoder

    def __init__(
        self,
        graph: OnnxGraph,
        encoder: OnnxGraph,
        config: PreTrainedConfig,
        generation_config: GenerationConfig | None,
    ) -> None:
        super().__init__(graph, config, generation_config)
        self.encoder = _Encoder(encoder, config)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """The encoder's graph, called like a module."""
        return self.encoder

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[Tensor, ...] | None = None,
        cache: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
        input_features: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        **inputs: Any,
    ) -> Seq2SeqLMOutput:
        """Runs the decoder on tokens that follow the cache, and before it the encoder where its states are not given.

        Args:
            input_ids: (batch, source time), or None with `encoder_outputs` or `input_features`.
            attention_mask: (batch, source time), 1 where a token is real; None: all are.
            decoder_input_ids: (batch, time).
            decoder_attention_mask: all ones or None: the graph has no padded targets.
            encoder_outputs: the encoder's states (batch, source time, width).
            cache: what earlier calls left, changed in place; None: nothing precedes.
            use_cache: whether the output carries the cache; None: yes.
            input_features: (batch, mel bins, frames).
            decoder_position_ids: those that follow the cache, or None; the graph counts them itself.
            inputs: what says nothing (None, False) is left out; anything else is refused.

        Returns:
            `logits` (batch, time, vocabulary), `cache` and `encoder_last_hidden_state`.
        """
        _refuse(inputs, (*self.input_names, "decoder_input_ids"))
        if decoder_attention_mask is not None and not decoder_attention_mask.bool().all():
            raise ConfigurationError(
                "decoder_attention_mask holds zeros, and the graph takes no padded targets. Generate such rows one by "
                "one, or with the torch model."
            )
        if decoder_input_ids is None:
            raise ConfigurationError("decoder_input_ids: missing. Call `generate`, or give the target's tokens.")
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if cache is None else cache
        own, cross = cache.self_attention_cache, cache.cross_attention_cache
        if decoder_position_ids is not None:
            following = torch.arange(decoder_input_ids.shape[1]) + own.get_seq_length()
            if not (decoder_position_ids.cpu() == following).all():
                raise ConfigurationError("decoder_position_ids other than those that follow the cache are not taken.")
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids, attention_mask=attention_mask, input_features=input_features
            )
        hidden: Tensor = encoder_outputs[0]
        reused = bool(cross.layers) and cross.layers[0].is_initialized
        given = {
            "input_ids": decoder_input_ids,
            "encoder_hidden_states": hidden,
            FLAG: torch.tensor([reused]),
        }
        if "encoder_attention_mask" in self.input_names:
            ones = torch.ones(hidden.shape[:2], dtype=torch.long)
            given["encoder_attention_mask"] = ones if attention_mask is None else attention_mask
        rows = decoder_input_ids.shape[0]
        given |= {
            f"{PAST}{layer}.encoder.{kind}": _state(cross, layer, kind, rows, shape, self.dtype, self.device)
            for layer, shapes in enumerate(self._past["encoder."])
            for kind, shape in shapes.items()
        }
        output = self._step(own, "decoder.", given)
        if not reused:
            for layer in range(len(self._past["encoder."])):
                _keep(cross, layer, *(output[f"{PRESENT}{layer}.encoder.{kind}"] for kind in ("key", "value")))
                cache.is_updated[layer] = True
        return Seq2SeqLMOutput(
            logits=output["logits"],
            cache=cache if use_cache is not False else None,
            encoder_last_hidden_state=hidden,
        )


class OnnxWhisper(WhisperGenerationMixin, OnnxSeq2SeqLM):  # type: ignore[misc]
    """Whisper on ONNX Runtime: languages, timestamps and long recordings are `WhisperGenerationMixin`'s."""

    main_input_name = "input_features"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        halves = [SimpleNamespace(stride=(stride,)) for stride in (1, 2)]  # of Whisper's two convolutions
        self.model = SimpleNamespace(
            encoder=SimpleNamespace(conv1=halves[0], conv2=halves[1]), config=self.config, device=self.device
        )

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """The encoder's graph, called like a module."""
        return self.encoder


def _refuse(inputs: Mapping[str, Any], known: tuple[str, ...]) -> None:
    given = [name for name, value in inputs.items() if value is not None and value is not False]
    given = [name for name in given if name != "return_dict"]  # the output has both faces: names and places
    if given:
        raise ConfigurationError(
            f"{', '.join(given)}: the graph takes {', '.join(known)} only, and leaving an input out would change the "
            "answer. Drop it yourself if it does not matter (a graph computes no loss from labels)."
        )
