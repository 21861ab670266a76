"""A vision transformer whose feed-forward blocks spend more or less width on each token."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification


class ACMViTConfig(ViTConfig):  # type: ignore[misc]  # transformers is not typed for mypy
    """A ViT's config with what its blocks are made of.

    Args:
        learners: parts of each feed-forward block.
        learner_size: hidden width of each; None: the block's width divided by `learners`.
        gate_size: hidden width of the gates.
        gate_temperature: of the Gumbel softmax in training.
    """

    model_type = "acm_vit"

    def __init__(
        self,
        learners: int = 4,
        learner_size: int | None = None,
        gate_size: int = 16,
        gate_temperature: float = 0.8,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.learners, self.learner_size = learners, learner_size
        self.gate_size, self.gate_temperature = gate_size, gate_temperature


class ACMBlock(nn.Module):
    """Sum of the first k of N small perceptrons, k chosen for each token; 0 … N."""

    def __init__(self, config: ACMViTConfig) -> None:
        super().__init__()
        width, self.count = config.hidden_size, config.learners
        self.size = config.learner_size or round(config.intermediate_size / config.learners)
        self.temperature = config.gate_temperature
        self.learners = nn.ModuleDict()
        self.learners["up"] = nn.Linear(width, self.count * self.size)
        self.learners["down"] = nn.Linear(self.count * self.size, width, bias=False)
        self.gate = nn.Sequential(
            nn.Linear(width, config.gate_size), nn.Linear(config.gate_size, config.gate_size),
            nn.Linear(config.gate_size, self.count + 1),
        )  # fmt: skip
        self.route = nn.Identity()
        self.fixed: int | None = None
        """One number of learners for all tokens instead of the gate's."""

    def each(self, states: torch.Tensor) -> torch.Tensor:
        """(…, learner, width) what each learner gives alone."""
        hidden = nn.functional.gelu(self.learners["up"](states))
        hidden = hidden.reshape(*states.shape[:-1], self.count, self.size)
        weight: torch.Tensor = self.learners["down"].get_parameter("weight").T
        return torch.einsum("...nh,nhd->...nd", hidden, weight.reshape(self.count, self.size, -1))

    def forward(self, states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """(…, width): dense, the learners that a token does not take are multiplied by 0."""
        if self.fixed is not None:
            return self.each(states)[..., : self.fixed, :].sum(-2)
        logits = self.gate(states)
        if self.training:
            choice = nn.functional.gumbel_softmax(logits, tau=self.temperature, hard=True)
        else:
            choice = nn.functional.one_hot(logits.argmax(-1), self.count + 1).to(logits.dtype)
        choice = self.route(choice)
        taken = choice.flip(-1).cumsum(-1).flip(-1)[..., 1:]  # learner n is taken by every choice k ≥ n
        found: torch.Tensor = (self.each(states) * taken[..., None]).sum(-2)
        return found


class ACMViTForImageClassification(ViTForImageClassification):  # type: ignore[misc]  # transformers is not typed
    """A ViT classifier with `ACMBlock` for every feed-forward block."""

    config_class = ACMViTConfig

    def __init__(self, config: ACMViTConfig) -> None:
        super().__init__(config)
        for layer in self.vit.layers:
            layer.mlp = ACMBlock(config)
        self.post_init()


ACMViTConfig.register_for_auto_class()
ACMViTForImageClassification.register_for_auto_class("AutoModelForImageClassification")
