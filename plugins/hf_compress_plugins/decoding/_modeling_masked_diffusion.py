"""A masked diffusion language model: a transformer that sees all tokens and fills in masked ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput


class MaskedDiffusionConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers is not typed for mypy
    """Sizes of the model.

    Args:
        vocab_size: tokens, the mask among them.
        hidden_size: width.
        num_hidden_layers: blocks.
        num_attention_heads: heads of each.
        intermediate_size: width of the feed-forward layers.
        max_position_embeddings: longest sequence.
        mask_token_id: of the token that stands for an unknown one.
    """

    model_type = "masked_diffusion"

    def __init__(
        self,
        vocab_size: int = 128,
        hidden_size: int = 128,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        intermediate_size: int = 256,
        max_position_embeddings: int = 256,
        mask_token_id: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.intermediate_size = num_attention_heads, intermediate_size
        self.max_position_embeddings, self.mask_token_id = max_position_embeddings, mask_token_id


class _Block(nn.Module):
    def __init__(self, config: MaskedDiffusionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, config.intermediate_size), nn.Linear(config.intermediate_size, width)

    def forward(self, states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        split = self.qkv(self.norm_1(states)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(split[0], split[1], split[2], attn_mask=mask)
        states = states + self.out(attended.transpose(1, 2).flatten(2))
        found: torch.Tensor = states + self.down(nn.functional.gelu(self.up(self.norm_2(states))))
        return found


class MaskedDiffusionForMaskedLM(PreTrainedModel):  # type: ignore[misc]  # transformers is not typed for mypy
    """Token and position embeddings, blocks, a norm and a head."""

    config_class = MaskedDiffusionConfig
    main_input_name = "input_ids"

    def __init__(self, config: MaskedDiffusionConfig) -> None:
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.num_hidden_layers))
        self.norm, self.head = nn.LayerNorm(config.hidden_size), nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings."""
        return self.tokens

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> MaskedLMOutput:
        """Logits (batch, time, vocab), unshifted; mean cross-entropy where labels are not -100."""
        place = torch.arange(input_ids.shape[1], device=input_ids.device)
        states = self.tokens(input_ids) + self.positions(place)
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        for block in self.blocks:
            states = block(states, mask)
        logits = self.head(self.norm(states))
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits)


MaskedDiffusionConfig.register_for_auto_class()
MaskedDiffusionForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
