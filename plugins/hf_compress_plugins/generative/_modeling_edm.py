"""A small class-conditional denoiser with EDM's preconditioning; this file alone is enough to load it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput


class EDMDenoiserConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers is not typed for mypy
    """Sizes of the denoiser.

    Args:
        image_size: side of the square images.
        num_channels: of the images.
        hidden_size: of the hidden layers.
        num_hidden_layers: how many.
        num_classes: conditions; 0: none.
        sigma_data: standard deviation of the data.
    """

    model_type = "edm_denoiser"

    def __init__(
        self,
        image_size: int = 8,
        num_channels: int = 1,
        hidden_size: int = 256,
        num_hidden_layers: int = 3,
        num_classes: int = 10,
        sigma_data: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.image_size, self.num_channels = image_size, num_channels
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.num_classes, self.sigma_data = num_classes, sigma_data


@dataclass
class DenoiserOutput(ModelOutput):  # type: ignore[misc]  # transformers is not typed for mypy
    """The clean image that is predicted; the loss is a Trainer's callback's, and DDP rebuilds the output with it."""

    loss: torch.Tensor | None = None
    sample: torch.Tensor | None = None


class EDMDenoiser(PreTrainedModel):  # type: ignore[misc]  # transformers is not typed for mypy
    """D(x, σ) = c_skip x + c_out F(c_in x, ¼ ln σ, class), F a perceptron."""

    config_class = EDMDenoiserConfig
    main_input_name = "sample"
    export_axes: ClassVar[dict[str, tuple[str, ...]]] = dict.fromkeys(("sample", "sigma", "class_labels"), ("images",))

    def __init__(self, config: EDMDenoiserConfig) -> None:
        super().__init__(config)
        pixels = config.num_channels * config.image_size**2
        self.classes = nn.Embedding(max(config.num_classes, 1), config.hidden_size)
        self.noise = nn.Sequential(
            nn.Linear(1, config.hidden_size), nn.SiLU(), nn.Linear(config.hidden_size, config.hidden_size)
        )
        self.first = nn.Linear(pixels, config.hidden_size)
        self.layers = nn.ModuleList(
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(config.num_hidden_layers)
        )
        self.last = nn.Linear(config.hidden_size, pixels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.1)

    def example_inputs(self, batch: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Inputs of as many images, for the export to ONNX."""
        config = self.config
        shape = (batch, config.num_channels, config.image_size, config.image_size)
        found = {
            "sample": torch.randn(shape, generator=generator),
            "sigma": torch.rand(batch, generator=generator) + 0.1,
        }
        if config.num_classes:
            found["class_labels"] = torch.randint(config.num_classes, (batch,), generator=generator)
        return found

    def forward(
        self, sample: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> DenoiserOutput:
        """The clean image of a noisy one.

        Args:
            sample: (image, channel, height, width), clean image plus σ times noise.
            sigma: (image,) above 0.
            class_labels: (image,).
        """
        data, level = self.config.sigma_data, sigma.view(-1, 1)
        total = (level**2 + data**2).sqrt()
        flat = sample.flatten(1)
        hidden = self.first(flat / total) + self.noise(level.log() / 4)
        if class_labels is not None and self.config.num_classes:
            hidden = hidden + self.classes(class_labels)
        for layer in self.layers:
            hidden = hidden + layer(nn.functional.silu(hidden))
        raw = self.last(nn.functional.silu(hidden))
        clean = flat * (data / total) ** 2 + raw * level * data / total
        return DenoiserOutput(sample=clean.view_as(sample))


EDMDenoiserConfig.register_for_auto_class()
EDMDenoiser.register_for_auto_class("AutoModel")
