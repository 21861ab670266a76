"""A vision transformer whose linear blocks spend more or less width on each token."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class ACMViTConfig(ViTConfig):  # type: ignore[misc]  # transformers is not typed for mypy
    """A ViT's config with what its blocks are made of.

    Args:
        learners: parts of each block.
        learner_size: hidden width of each in feed-forward blocks; None: the block's width divided by `learners`.
        projections: whether the attention's projections are made of learners too.
        projection_size: hidden width of each learner there; None: all cost together what the projection did.
        projection_activation: "identity" or "gelu", between the two layers of a learner there.
        gate_size: hidden width of the gates.
        gate_temperature: of the Gumbel softmax in training.
        taken: one number of learners for every token, of which alone a graph then computes the work; None: the gates
            choose, and a graph computes all of them.
    """

    model_type = "acm_vit"

    def __init__(
        self,
        learners: int = 4,
        learner_size: int | None = None,
        projections: bool = True,
        projection_size: int | None = None,
        projection_activation: str = "identity",
        gate_size: int = 16,
        gate_temperature: float = 0.8,
        taken: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.learners, self.learner_size = learners, learner_size
        self.projections, self.projection_size = projections, projection_size
        self.projection_activation = projection_activation
        self.gate_size, self.gate_temperature, self.taken = gate_size, gate_temperature, taken


class ACMBlock(nn.Module):
    """Sum of the first k of N small perceptrons, k chosen for each token.

    Args:
        config: of the model.
        projection: of the attention: k ≥ 1, as no residual connection surrounds it; otherwise k ≥ 0.
    """

    def __init__(self, config: ACMViTConfig, *, projection: bool = False) -> None:
        super().__init__()
        width, self.count, self.lowest = config.hidden_size, config.learners, int(projection)
        self.width: int = width
        full = (width**2 + width) / (2 * width + 1) if projection else config.intermediate_size
        chosen = config.projection_size if projection else config.learner_size
        self.size: int = chosen or max(round(full / config.learners), 1)
        self.linear = projection and config.projection_activation == "identity"
        self.temperature = config.gate_temperature
        self.learners = nn.ModuleDict()
        self.learners["up"] = nn.Linear(width, self.count * self.size)
        self.learners["down"] = nn.Linear(self.count * self.size, width, bias=False)
        self.gate = nn.Sequential(
            nn.Linear(width, config.gate_size), nn.Linear(config.gate_size, config.gate_size),
            nn.Linear(config.gate_size, self.count + 1 - self.lowest),
        )  # fmt: skip
        self.route = nn.Identity()
        self.fixed: int | None = None if config.taken is None else max(config.taken, self.lowest)
        """One number of learners for all tokens instead of the gate's."""

    @property
    def cost(self) -> int:
        """Multiplications of one learner for one token."""
        return 2 * self.size * self.width

    def hidden(self, states: torch.Tensor) -> torch.Tensor:
        """(…, learner, size) between the two layers of each learner."""
        found: torch.Tensor = self.learners["up"](states)
        if not self.linear:
            found = nn.functional.gelu(found)
        return found.reshape(*states.shape[:-1], self.count, self.size)

    def each(self, states: torch.Tensor) -> torch.Tensor:
        """(…, learner, width) what each learner gives alone."""
        weight: torch.Tensor = self.learners["down"].get_parameter("weight").T
        return torch.einsum("...nh,nhd->...nd", self.hidden(states), weight.reshape(self.count, self.size, -1))

    def first(self, states: torch.Tensor, count: int) -> torch.Tensor:
        """(…, width) sum of the first learners, of which alone the work is done."""
        kept, up, down = count * self.size, self.learners["up"], self.learners["down"]
        weight, bias = up.get_parameter("weight")[:kept], up.get_parameter("bias")[:kept]
        found = nn.functional.linear(states, weight, bias)
        if not self.linear:
            found = nn.functional.gelu(found)
        return nn.functional.linear(found, down.get_parameter("weight")[:, :kept])

    def forward(self, states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """(…, width): dense, the learners that a token does not take are multiplied by 0."""
        if self.fixed is not None:
            return self.first(states, self.fixed)
        logits = self.gate(states)
        if self.training:
            choice = nn.functional.gumbel_softmax(logits, tau=self.temperature, hard=True)
        else:
            choice = nn.functional.one_hot(logits.argmax(-1), self.count + 1 - self.lowest).to(logits.dtype)
        choice = self.route(choice)
        taken = choice.flip(-1).cumsum(-1).flip(-1)  # learner n is taken by every choice k ≥ n
        hidden = self.hidden(states) * taken[..., 1 - self.lowest :, None]
        found: torch.Tensor = self.learners["down"](hidden.flatten(-2))
        return found


class ACMViTForImageClassification(ViTForImageClassification):  # type: ignore[misc]  # transformers is not typed
    """A ViT classifier with `ACMBlock` for every feed-forward block and, where asked, projection."""

    config_class = ACMViTConfig

    def __init__(self, config: ACMViTConfig) -> None:
        super().__init__(config)
        for layer in self.vit.layers:
            layer.mlp = ACMBlock(config)
            for name in PROJECTIONS if config.projections else ():
                setattr(layer.attention, name, ACMBlock(config, projection=True))
        self.post_init()


ACMViTConfig.register_for_auto_class()
ACMViTForImageClassification.register_for_auto_class("AutoModelForImageClassification")
