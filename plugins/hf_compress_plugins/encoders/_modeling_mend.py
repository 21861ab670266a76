"""A frozen causal language model behind a network that turns demonstrations into a few input vectors for it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast


def _inner_config(given: Any) -> Any:
    settings = given.to_dict() if isinstance(given, PreTrainedConfig) else dict(given or {})
    return AutoConfig.for_model(**({"model_type": "gpt2"} | settings))


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """(batch, time) places counted over real tokens alone, so that padding anywhere moves nothing; 0 for what is none.

    Args:
        mask: (batch, time), 1 for what is real.
    """
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


class DemonstrationConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers is not typed for mypy
    """Of the network that reads demonstrations.

    Args:
        body_config: of the small language model that reads them.
        num_virtual_tokens: vectors that come out.
        target_size: their width, that of the large model's embeddings.
    """

    model_type = "mend_demonstrations"
    sub_configs: ClassVar[dict[str, Any]] = {"body_config": AutoConfig}

    def __init__(
        self, body_config: Any = None, num_virtual_tokens: int = 100, target_size: int = 768, **kwargs: Any
    ) -> None:
        self.body_config = _inner_config(body_config)
        self.num_virtual_tokens, self.target_size = num_virtual_tokens, target_size
        super().__init__(**kwargs)


class MENDModelConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers is not typed for mypy
    """Of both.

    Args:
        text_config: the frozen language model's.
        demonstration_config: a `DemonstrationConfig`.
    """

    model_type = "mend"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig, "demonstration_config": DemonstrationConfig}

    def __init__(self, text_config: Any = None, demonstration_config: Any = None, **kwargs: Any) -> None:
        self.text_config = _inner_config(text_config)
        given = demonstration_config
        settings = given.to_dict() if isinstance(given, PreTrainedConfig) else dict(given or {})
        known = {name: value for name, value in settings.items() if name != "model_type"}
        self.demonstration_config = DemonstrationConfig(**known)
        super().__init__(**kwargs)


class DemonstrationModel(PreTrainedModel):  # type: ignore[misc]  # transformers is not typed for mypy
    """S = D([E(demonstrations) ; P]) at the places of P; through tanh(W · + b) where D is not as wide as the target."""

    config_class = DemonstrationConfig
    main_input_name = "input_ids"
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: DemonstrationConfig) -> None:
        super().__init__(config)
        self.body = AutoModel.from_config(config.body_config)
        width = config.body_config.hidden_size
        self.virtual_tokens = nn.Parameter(torch.empty(config.num_virtual_tokens, width))
        self.adapter = nn.Linear(width, config.target_size) if width != config.target_size else None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        spread = getattr(self.config.body_config, "initializer_range", 0.02)
        if isinstance(module, DemonstrationModel):
            init.normal_(module.virtual_tokens, std=spread)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=spread)
            init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        """Of the body."""
        found: nn.Module = self.body.get_input_embeddings()
        return found

    @property
    def export_axes(self) -> dict[str, tuple[str, ...]]:
        """Axes that may vary in the export to ONNX."""
        axes = ("batch_size", "sequence_length")
        return {"input_ids": axes, "attention_mask": axes}

    def example_inputs(self, batch: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Demonstrations, all but the first row padded on the right, for the export to ONNX."""
        ids = torch.randint(self.config.body_config.vocab_size, (batch, length), generator=generator)
        lengths = length - torch.arange(batch) * length // (2 * batch)
        return {"input_ids": ids, "attention_mask": (torch.arange(length) < lengths[:, None]).long()}

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutput:
        """The vectors that stand for the demonstrations.

        Args:
            input_ids: (batch, time) demonstrations, one after another.
            attention_mask: (batch, time), 1 for what is real, padding on either side.
            **kwargs: not read.

        Returns:
            `last_hidden_state` (batch, num_virtual_tokens, target_size).
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        embeddings = self.get_input_embeddings()(input_ids)
        virtual = self.virtual_tokens.to(embeddings.dtype).expand(input_ids.shape[0], -1, -1)
        mask = torch.cat([mask, mask.new_ones(virtual.shape[:2])], 1)
        states = self.body(
            inputs_embeds=torch.cat([embeddings, virtual], 1), attention_mask=mask, position_ids=positions_of(mask)
        ).last_hidden_state[:, input_ids.shape[1] :]
        return BaseModelOutput(last_hidden_state=states if self.adapter is None else self.adapter(states).tanh())


class MENDForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]  # transformers is not typed for mypy
    """The language model over [S ; E(query, answer)]; without demonstrations it is the language model alone.

    Its language model is frozen and in eval mode whatever is asked of the whole, as its gradient flows through to S and
    its dropout would be a floor under what is compared. So gradient checkpointing is of the small model alone.
    """

    config_class = MENDModelConfig
    main_input_name = "input_ids"
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: MENDModelConfig) -> None:
        super().__init__(config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.demonstration_model = DemonstrationModel(config.demonstration_config)
        self.post_init()
        self.freeze()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As of any model; what is frozen is frozen again, as loading makes all weights trainable."""
        found = super().from_pretrained(*args, **kwargs)
        (found[0] if isinstance(found, tuple) else found).freeze()
        return found

    def freeze(self) -> None:
        """The language model is not trained."""
        self.language_model.requires_grad_(False)

    def requires_grad_(self, requires_grad: bool = True) -> MENDForCausalLM:
        """Of all but the language model."""
        self.demonstration_model.requires_grad_(requires_grad)
        self.freeze()
        return self

    def train(self, mode: bool = True) -> MENDForCausalLM:
        """Of all but the language model."""
        super().train(mode)
        self.language_model.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        """The language model's."""
        found: nn.Module = self.language_model.get_input_embeddings()
        return found

    def get_output_embeddings(self) -> nn.Module | None:
        """The language model's."""
        found: nn.Module | None = self.language_model.get_output_embeddings()
        return found

    def export_parts(self) -> dict[str, PreTrainedModel]:
        """Exported to ONNX is what is trained; the language model is exported from its own folder."""
        return {"demonstrations": self.demonstration_model}

    def distill(self, demonstration_ids: torch.Tensor, demonstration_mask: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, num_virtual_tokens, width) S, made once for all queries after these demonstrations.

        Args:
            demonstration_ids: (batch, time).
            demonstration_mask: (batch, time), 1 for what is real; None: all.
        """
        found: torch.Tensor = self.demonstration_model(demonstration_ids, demonstration_mask).last_hidden_state
        return found

    def prepend(
        self, virtual_tokens: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[S ; E(tokens)] and its mask, all ones for S.

        Args:
            virtual_tokens: (batch, num_virtual_tokens, width), or of one row for all.
            input_ids: (batch, time) query, and answer.
            attention_mask: (batch, time), 1 for what is real; None: all.
        """
        embeddings = self.get_input_embeddings()(input_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        virtual = virtual_tokens.to(embeddings.dtype).expand(input_ids.shape[0], -1, -1)
        return torch.cat([virtual, embeddings], 1), torch.cat([mask.new_ones(virtual.shape[:2]), mask], 1)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        demonstration_ids: torch.Tensor | None = None,
        demonstration_mask: torch.Tensor | None = None,
        virtual_tokens: torch.Tensor | None = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Logits of the query and answer alone.

        Args:
            input_ids: (batch, time) query and answer.
            attention_mask: (batch, time), 1 for what is real.
            labels: (batch, time) of the answer, -100 elsewhere.
            demonstration_ids: (batch, demonstration time).
            demonstration_mask: (batch, demonstration time), 1 for what is real.
            virtual_tokens: S where it is there already; then the demonstrations are not read.
            num_items_in_batch: what the loss is divided by instead of its labels.
            **kwargs: of the language model.
        """
        kwargs = {name: value for name, value in kwargs.items() if name != "return_dict"}
        if virtual_tokens is None and demonstration_ids is not None:
            virtual_tokens = self.distill(demonstration_ids, demonstration_mask)
        if virtual_tokens is None or input_ids is None:
            output = self.language_model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)
            logits = output.logits
        else:
            embeddings, mask = self.prepend(virtual_tokens, input_ids, attention_mask)
            output = self.language_model(
                inputs_embeds=embeddings,
                attention_mask=mask,
                position_ids=positions_of(mask),
                return_dict=True,
                **{name: value for name, value in kwargs.items() if name != "position_ids"},
            )
            logits = output.logits[:, -input_ids.shape[1] :].contiguous()
        loss = None
        if labels is not None:
            size = self.config.text_config.vocab_size
            loss = self.loss_function(logits, labels, vocab_size=size, num_items_in_batch=num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.attentions
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        demonstration_ids: torch.Tensor | None = None,
        demonstration_mask: torch.Tensor | None = None,
        virtual_tokens: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The language model's `generate` behind S, which is made once; the cache holds it from the first step on.

        Args:
            inputs: (batch, time) queries, padded on the left; `input_ids` is another name of theirs.
            input_ids: see `inputs`.
            attention_mask: (batch, time), 1 for what is real.
            demonstration_ids: (batch, demonstration time); a batch of one serves all queries.
            demonstration_mask: (batch, demonstration time), 1 for what is real.
            virtual_tokens: S of `distill`, then the demonstrations are not read.
            **kwargs: of `generate`; give `max_new_tokens`.

        Returns:
            (batch, time and what is new) ids, or what `return_dict_in_generate` gives with these as `sequences`.
        """
        ids = inputs if input_ids is None else input_ids
        kwargs.setdefault("generation_config", self.generation_config)
        if virtual_tokens is None and demonstration_ids is not None:
            virtual_tokens = self.distill(demonstration_ids, demonstration_mask)
        if virtual_tokens is None or ids is None:
            return self.language_model.generate(ids, attention_mask=attention_mask, **kwargs)
        embeddings, mask = self.prepend(virtual_tokens, ids, attention_mask)
        found = self.language_model.generate(inputs_embeds=embeddings, attention_mask=mask, **kwargs)
        added = found if isinstance(found, torch.Tensor) else found.sequences
        sequences = torch.cat([ids.repeat_interleave(len(added) // len(ids), 0), added], 1)
        if isinstance(found, torch.Tensor):
            return sequences
        found.sequences = sequences
        return found


DemonstrationConfig.register_for_auto_class()
DemonstrationModel.register_for_auto_class("AutoModel")
MENDModelConfig.register_for_auto_class()
MENDForCausalLM.register_for_auto_class("AutoModelForCausalLM")
