"""A perceptron that classifies nodes by their own features; this file alone is enough to load it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class NodeMLPConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers is not typed for mypy
    """Sizes of the perceptron.

    Args:
        features: of a node.
        hidden_size: of each hidden layer.
        num_hidden_layers: how many.
        dropout: after each hidden layer.
    """

    model_type = "node_mlp"

    def __init__(
        self,
        features: int = 16,
        hidden_size: int = 512,
        num_hidden_layers: int = 2,
        dropout: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.features, self.hidden_size = features, hidden_size
        self.num_hidden_layers, self.dropout = num_hidden_layers, dropout


class NodeMLPForSequenceClassification(PreTrainedModel):  # type: ignore[misc]  # transformers is not typed for mypy
    """Hidden layers with ReLU and dropout, and a classifier."""

    config_class = NodeMLPConfig
    main_input_name = "features"
    base_model_prefix = "body"

    def __init__(self, config: NodeMLPConfig) -> None:
        super().__init__(config)
        layers: list[nn.Module] = []
        width = config.features
        for _ in range(config.num_hidden_layers):
            layers += [nn.Linear(width, config.hidden_size), nn.ReLU(), nn.Dropout(config.dropout)]
            width = config.hidden_size
        self.body = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)

    def example_inputs(self, batch: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Features of as many nodes, for the export to ONNX."""
        return {"features": torch.randn(batch, self.config.features, generator=generator)}

    def forward(
        self, features: torch.Tensor, labels: torch.Tensor | None = None, return_dict: bool | None = None
    ) -> SequenceClassifierOutput:
        """Logits (node, class) of features (node, feature); mean cross-entropy where labels are not -100."""
        logits = self.classifier(self.body(features))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


NodeMLPConfig.register_for_auto_class()
NodeMLPForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
