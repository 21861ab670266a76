"""A drafter that predicts a language model's next feature from its last one and the next token; loads from this file.

Names of weights are the authors', so that a drafter of theirs loads with embedding and head of its target added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)


class FSPADDrafterConfig(LlamaConfig):  # type: ignore[misc]  # transformers is not typed for mypy
    """Sizes as of a Llama of one layer; vocabulary and width are the target's.

    Args:
        feature_sampling: the token gates among directions of the feature; False: both through one linear layer.
        partial_alignment: one output for the tokens, one for the feature; False: one for both, as in EAGLE.
    """

    model_type = "fspad_drafter"

    def __init__(self, feature_sampling: bool = True, partial_alignment: bool = True, **kwargs: Any) -> None:
        super().__init__(**{"num_hidden_layers": 1, **kwargs})
        self.feature_sampling, self.partial_alignment = feature_sampling, partial_alignment


@dataclass
class FSPADDrafterOutput(ModelOutput):  # type: ignore[misc]  # transformers is not typed for mypy
    """What is drafted behind each token."""

    loss: torch.Tensor | None = None
    """() 0 where labels are given: a drafter has no loss of its own."""
    predict: torch.Tensor | None = None
    """(batch, time, width) what the head makes the next token's logits of."""
    regress: torch.Tensor | None = None
    """(batch, time, width) the feature of the token that was read, for the next step."""


class FeatureSampling(nn.Module):
    """h0 = W [e ; f] + b;  h = h0 + W_down( SiLU(W_gate e) ∘ (W_up RMSNorm(h0)) ), or h0 alone."""

    def __init__(self, config: FSPADDrafterConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size)
        self.sampled = config.feature_sampling
        if self.sampled:
            self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.mlp = LlamaMLP(config)

    def forward(self, embeddings: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """(batch, time, width) from embeddings and features of that shape."""
        joined: torch.Tensor = self.fc(torch.cat([embeddings, features], -1))
        if not self.sampled:
            return joined
        gate = self.mlp.act_fn(self.mlp.gate_proj(embeddings))
        sampled: torch.Tensor = self.mlp.down_proj(gate * self.mlp.up_proj(self.post_attention_layernorm(joined)))
        return joined + sampled


class DrafterLayer(GradientCheckpointingLayer):  # type: ignore[misc]  # transformers is not typed for mypy
    """a = h + attention(h);  [a ; a] + W_down( SiLU(W_gate m) ∘ (W_up m) ), m = RMSNorm(a), W_down twice as wide."""

    def __init__(self, config: FSPADDrafterConfig) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, layer_idx=0)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = LlamaMLP(config)
        self.copies = 2 if config.partial_alignment else 1
        if config.partial_alignment:
            self.mlp.down_proj = nn.Linear(config.intermediate_size, 2 * config.hidden_size, bias=config.mlp_bias)

    def forward(self, states: torch.Tensor, **settings: Any) -> torch.Tensor:
        """(batch, time, width), or twice as wide."""
        states = states + self.self_attn(states, **settings)[0]
        found: torch.Tensor = torch.cat([states] * self.copies, -1) + self.mlp(self.post_attention_layernorm(states))
        return found


class FSPADDrafter(LlamaPreTrainedModel):  # type: ignore[misc]  # transformers is not typed for mypy
    """Embedding and head of the target, frozen; feature sampling; one decoder layer without a norm before it."""

    config_class = FSPADDrafterConfig
    main_input_name = "input_ids"
    base_model_prefix = ""
    _no_split_modules = ("DrafterLayer",)
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}  # noqa: RUF012  # as transformers declares it
    _can_record_outputs = None

    def __init__(self, config: FSPADDrafterConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.fc = FeatureSampling(config)
        self.layers = nn.ModuleList([DrafterLayer(config)])
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self.freeze()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As of any model; what is frozen is frozen again, as loading makes all weights trainable."""
        found = super().from_pretrained(*args, **kwargs)
        (found[0] if isinstance(found, tuple) else found).freeze()
        return found

    def freeze(self) -> None:
        """The target's embedding and head are not trained."""
        self.embed_tokens.requires_grad_(False)
        self.lm_head.requires_grad_(False)

    def get_output_embeddings(self) -> nn.Module:
        """The target's head."""
        return self.lm_head

    @property
    def export_axes(self) -> dict[str, tuple[str, ...]]:
        """Axes that may vary in the export to ONNX."""
        axes = ("batch_size", "sequence_length")
        return {"input_ids": axes, "hidden_states": axes, "attention_mask": axes}

    def example_inputs(self, batch: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Tokens and features, for the export to ONNX."""
        ids = torch.randint(self.config.vocab_size, (batch, length), generator=generator)
        features = torch.randn(batch, length, self.config.hidden_size, generator=generator)
        return {"input_ids": ids, "hidden_states": features, "attention_mask": torch.ones_like(ids)}

    def forward(
        self,
        input_ids: torch.Tensor,
        hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> FSPADDrafterOutput:
        """What comes behind each token, given the feature of the token before it.

        Args:
            input_ids: (batch, time) token i + 1 at index i.
            hidden_states: (batch, time, width) the feature of token i at index i: the target's, as its head receives
                it, or `regress` of the step before. None: nothing is drafted, and the outputs have no time steps. A
                Trainer calls a drafter so; its objective then gives it the target's features.
            attention_mask: (batch, time), 1 for what is real; or (batch, 1, time, keys) to be added to the scores.
            position_ids: (batch, time); None: counted on from the cache's length.
            cache: keys and values of earlier steps, changed in place.
            labels: not read; named so that a Trainer keeps them for the objective.
            **kwargs: not read.
        """
        with torch.no_grad():
            embeddings = self.embed_tokens(input_ids).to(self.fc.fc.weight.dtype)
        if hidden_states is None:
            nothing = self.fc(embeddings[:, :0], embeddings[:, :0])
            return self._output(nothing, nothing, labels)
        states = self.fc(embeddings, hidden_states.to(embeddings.dtype))
        if position_ids is None:
            start = 0 if cache is None else cache.get_seq_length()
            position_ids = start + torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        mask = create_causal_mask(
            config=self.config, inputs_embeds=states, attention_mask=attention_mask, cache=cache,
            position_ids=position_ids,
        )  # fmt: skip
        drafted = self.layers[0](
            states,
            attention_mask=mask,
            position_embeddings=self.rotary_emb(states, position_ids=position_ids),
            cache=cache,
        )
        predict, regress = drafted.chunk(2, -1) if self.config.partial_alignment else (drafted, drafted)
        return self._output(predict, regress, labels)

    @staticmethod
    def _output(predict: torch.Tensor, regress: torch.Tensor, labels: torch.Tensor | None) -> FSPADDrafterOutput:
        loss = None if labels is None else predict.new_zeros(())
        return FSPADDrafterOutput(loss=loss, predict=predict, regress=regress)


FSPADDrafterConfig.register_for_auto_class()
FSPADDrafter.register_for_auto_class("AutoModel")
