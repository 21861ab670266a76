"""A causal language model that also reads, at each token, the longest token of an older vocabulary that ends there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel

BASE = 6364136223846793005
"""Odd multiplier of the hash (Knuth's MMIX generator); sums wrap at 2^64, as int64 tensors do."""


class ExpandedInputConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers is not typed for mypy
    """The inner model's config and the size of the older vocabulary.

    Args:
        text_config: the inner model's.
        expanded_size: rows of the older vocabulary's embeddings, the first of them for "no token".
        longest: tokens of the model's own that an older token may consist of.
    """

    model_type = "expanded_input"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}

    def __init__(self, text_config: Any = None, expanded_size: int = 1, longest: int = 16, **kwargs: Any) -> None:
        settings = text_config.to_dict() if isinstance(text_config, PreTrainedConfig) else dict(text_config or {})
        self.text_config = AutoConfig.for_model(**({"model_type": "llama"} | settings))
        self.expanded_size, self.longest = expanded_size, longest
        super().__init__(**kwargs)


def suffix_hash(ids: Sequence[int]) -> int:
    """Hash of a token sequence as a signed 64-bit integer: sum of (id + 1) · BASE^k, k counted from the last id."""
    value = 0
    for index in ids:
        value = (value * BASE + index + 1) % 2**64
    return value - 2**64 if value >= 2**63 else value


def longest_suffix(ids: torch.Tensor, hashes: torch.Tensor, longest: int) -> torch.Tensor:
    """Which known sequence ends at each token, the longest if there are several.

    Args:
        ids: (batch, time).
        hashes: (known,) `suffix_hash` of each known sequence, in ascending order.
        longest: length of the longest one that is looked for.

    Returns:
        (batch, time) 1 + its place in `hashes`; 0 where none ends.
    """
    found, value, power = torch.zeros_like(ids), torch.zeros_like(ids), 1
    padded = nn.functional.pad(ids + 1, (longest, 0))
    for back in range(longest):
        letter = padded[:, longest - back : longest - back + ids.shape[1]]
        value = value + letter * (power - 2**64 if power >= 2**63 else power)
        place = torch.searchsorted(hashes, value).clamp(max=len(hashes) - 1)
        found, power = torch.where(hashes[place] == value, place + 1, found), power * BASE % 2**64
    return found


class ExpandedInputForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]  # transformers is not typed
    """Any causal language model; its input at each token is its own embedding plus that of the older token."""

    config_class = ExpandedInputConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: ExpandedInputConfig) -> None:
        super().__init__(config)
        self.inner = AutoModelForCausalLM.from_config(config.text_config)
        self.expanded = nn.Embedding(config.expanded_size, config.text_config.hidden_size, padding_idx=0)
        self.register_buffer("hashes", torch.zeros(max(config.expanded_size - 1, 1), dtype=torch.long))
        self.post_init()

    def fill(self, embeddings: torch.Tensor, known: Mapping[int, int]) -> None:
        """Writes the older vocabulary.

        Args:
            embeddings: (older vocabulary, dim).
            known: `suffix_hash` to older id, as many as the config says without its first row.
        """
        order = sorted(known)
        with torch.no_grad():
            self.hashes.copy_(torch.tensor(order))
            self.expanded.weight[0] = 0
            self.expanded.weight[1:] = embeddings[[known[value] for value in order]]

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(batch, time, dim) of whole sequences: what ends at a token is found in those before it."""
        older = longest_suffix(input_ids, self.hashes, self.config.longest)
        found: torch.Tensor = self.inner.get_input_embeddings()(input_ids) + self.expanded(older)
        return found

    def get_input_embeddings(self) -> nn.Module:
        """The inner model's own."""
        found: nn.Module = self.inner.get_input_embeddings()
        return found

    def get_output_embeddings(self) -> nn.Module | None:
        """The inner model's head."""
        found: nn.Module | None = self.inner.get_output_embeddings()
        return found

    @property
    def base_model(self) -> nn.Module:
        """The inner model's body, which the head receives its input from."""
        found: nn.Module = self.inner.base_model
        return found

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the inner model's; with a cache give `inputs_embeds`, of `embed` of the whole sequence."""
        if inputs_embeds is None and input_ids is not None:
            inputs_embeds = self.embed(input_ids)
        return self.inner(inputs_embeds=inputs_embeds, attention_mask=attention_mask, labels=labels, **kwargs)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The tokens that are not in the cache, as embeddings that were looked up in the whole sequence."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if (rest := inputs.pop("input_ids", None)) is not None:
            inputs["inputs_embeds"] = self.embed(input_ids)[:, -rest.shape[1] :]
        return inputs


ExpandedInputConfig.register_for_auto_class()
ExpandedInputForCausalLM.register_for_auto_class("AutoModelForCausalLM")
