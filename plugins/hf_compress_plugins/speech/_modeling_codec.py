"""A speech codec: convolutions, residual vector quantisation, convolutions; this file alone is enough to load it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput


class SpeechCodecConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers is not typed for mypy
    """Sizes of the codec.

    Args:
        strides: of the encoder's convolutions; their product is the samples a frame stands for.
        channels: of the first convolution, doubled by each.
        hidden_size: of a frame before quantisation.
        codebooks: layers of the quantiser.
        codebook_size: codes of each.
        feature_size: of the teachers' features; the projection to it is of use in training alone.
        decay: of the codebooks' moving averages.
        dead_below: codes whose moving count falls below are replaced by vectors of the batch.
    """

    model_type = "speech_codec"

    def __init__(
        self,
        strides: tuple[int, ...] = (8, 5, 4, 2),
        channels: int = 64,
        hidden_size: int = 1024,
        codebooks: int = 8,
        codebook_size: int = 1024,
        feature_size: int = 768,
        decay: float = 0.99,
        dead_below: float = 2.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.strides, self.channels, self.hidden_size = tuple(strides), channels, hidden_size
        self.codebooks, self.codebook_size, self.feature_size = codebooks, codebook_size, feature_size
        self.decay, self.dead_below = decay, dead_below


class Codebook(nn.Module):
    """Vectors that follow the inputs nearest to them by moving averages; gradients never reach them."""

    def __init__(self, size: int, width: int, decay: float, dead_below: float) -> None:
        super().__init__()
        self.decay, self.dead_below, self.epsilon = decay, dead_below, 1e-5
        vectors = torch.randn(size, width) / math.sqrt(width)
        self.register_buffer("vectors", vectors)
        self.register_buffer("average", vectors.clone())
        self.register_buffer("counts", torch.zeros(size))
        self.register_buffer("begun", torch.zeros(1))
        self.vectors: torch.Tensor
        self.average: torch.Tensor
        self.counts: torch.Tensor
        self.begun: torch.Tensor

    def nearest(self, inputs: torch.Tensor) -> torch.Tensor:
        """(row,) code of each (row, width) input."""
        distances = inputs.square().sum(1, keepdim=True) - 2 * inputs @ self.vectors.T + self.vectors.square().sum(1)
        return distances.argmin(1)

    @torch.no_grad()
    def begin(self, inputs: torch.Tensor) -> None:
        """Starts from vectors of the first batch."""
        if not self.begun:
            chosen = torch.randint(len(inputs), (len(self.vectors),), device=inputs.device)
            self.vectors.copy_(inputs[chosen])
            self.average.copy_(self.vectors)
            self.counts.fill_(self.dead_below)
            self.begun.fill_(1.0)

    @torch.no_grad()
    def follow(self, inputs: torch.Tensor, codes: torch.Tensor) -> None:
        """One step of the moving averages; codes that are hardly used are taken from the batch first."""
        dead = self.counts < self.dead_below
        if bool(dead.any()):
            chosen = torch.randint(len(inputs), (len(self.vectors),), device=inputs.device)
            self.vectors[dead] = inputs[chosen][dead]
        taken = nn.functional.one_hot(codes, len(self.vectors)).to(inputs.dtype)
        self.counts.lerp_(taken.sum(0), 1 - self.decay)
        self.average.lerp_(taken.T @ inputs, 1 - self.decay)
        total = self.counts.sum()
        smooth = (self.counts + self.epsilon) / (total + len(self.counts) * self.epsilon) * total
        self.vectors.copy_(self.average / smooth[:, None])


@dataclass
class Quantised(ModelOutput):  # type: ignore[misc]  # transformers is not typed for mypy
    """What the quantiser gives."""

    total: torch.Tensor | None = None
    layers: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    commitment: torch.Tensor | None = None


class ResidualQuantiser(nn.Module):
    """Each layer codes what the layers before it left over; gradients pass straight through."""

    def __init__(self, count: int, size: int, width: int, decay: float, dead_below: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Codebook(size, width, decay, dead_below) for _ in range(count))

    def forward(self, states: torch.Tensor) -> Quantised:
        """Of (batch, width, time): sum and layers in that shape, (layer, batch, time) codes, (layer,) errors."""
        residual, layers, codes, commitment = states, [], [], []
        for layer in self.layers:
            flat = residual.transpose(1, 2).flatten(0, 1)
            assert isinstance(layer, Codebook)
            if self.training:
                layer.begin(flat)
            chosen = layer.nearest(flat)
            vectors = layer.vectors[chosen].view(*residual.transpose(1, 2).shape).transpose(1, 2)
            if self.training:
                layer.follow(flat.detach(), chosen)
                commitment.append(nn.functional.mse_loss(vectors.detach(), residual))
            else:
                commitment.append(residual.new_zeros(()))
            straight = residual + (vectors - residual).detach()
            layers.append(straight)
            codes.append(chosen.view(states.shape[0], states.shape[2]))
            residual = residual - straight
        total = torch.stack(layers).sum(0)
        return Quantised(
            total=total, layers=torch.stack(layers), codes=torch.stack(codes), commitment=torch.stack(commitment)
        )


@dataclass
class CodecOutput(ModelOutput):  # type: ignore[misc]  # transformers is not typed for mypy
    """What the codec gives."""

    waveform: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    features: torch.Tensor | None = None
    commitment: torch.Tensor | None = None


class SpeechCodec(PreTrainedModel):  # type: ignore[misc]  # transformers is not typed for mypy
    """Encoder, quantiser and decoder of waveforms."""

    config_class = SpeechCodecConfig
    main_input_name = "input_values"

    def __init__(self, config: SpeechCodecConfig) -> None:
        super().__init__(config)
        width, down, up = config.channels, list[nn.Module](), list[nn.Module]()
        down.append(nn.Conv1d(1, width, 7, padding=3))
        for stride in config.strides:
            down += [nn.ELU(), nn.Conv1d(width, 2 * width, 2 * stride, stride, padding=(stride + 1) // 2)]
            up = [nn.ELU(), _Up(2 * width, width, stride), *up]
            width *= 2
        self.encoder = nn.Sequential(*down, nn.ELU(), nn.Conv1d(width, config.hidden_size, 3, padding=1))
        self.quantiser = ResidualQuantiser(
            config.codebooks, config.codebook_size, config.hidden_size, config.decay, config.dead_below
        )
        self.transform = nn.Linear(config.hidden_size, config.feature_size)
        self.decoder = nn.Sequential(
            nn.Conv1d(config.hidden_size, width, 3, padding=1),
            *up,
            nn.ELU(),
            nn.Conv1d(config.channels, 1, 7, padding=3),
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """torch's own initial weights are kept."""

    def encode(self, input_values: torch.Tensor) -> torch.Tensor:
        """(layer, batch, frame) codes of (batch, sample) waveforms."""
        codes: torch.Tensor = self.quantiser(self.encoder(input_values[:, None])).codes
        return codes

    def decode(self, codes: torch.Tensor, length: int) -> torch.Tensor:
        """(batch, sample) waveforms of `length` samples from (layer, batch, frame) codes."""
        books = [book.get_buffer("vectors") for book in self.quantiser.layers]
        states = torch.stack([book[layer] for book, layer in zip(books, codes, strict=True)]).sum(0).transpose(1, 2)
        return self._fit(self.decoder(states), length)

    @staticmethod
    def _fit(waveform: torch.Tensor, length: int) -> torch.Tensor:
        return nn.functional.pad(waveform[:, 0, :length], (0, max(length - waveform.shape[-1], 0)))

    @property
    def export_axes(self) -> dict[str, tuple[str, ...]]:
        """Axes that may vary in the export to ONNX: whole frames of samples."""
        return {"input_values": ("batch_size", f"{math.prod(self.config.strides)}*frames")}

    def example_inputs(self, batch: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Sounds of as many frames as `length`, for the export to ONNX."""
        return {"input_values": torch.randn(batch, length * math.prod(self.config.strides), generator=generator)}

    def forward(self, input_values: torch.Tensor) -> CodecOutput:
        """Codes and the decoded waveform of (batch, sample); features (batch, frame, feature) of the first layer."""
        quantised = self.quantiser(self.encoder(input_values[:, None]))
        return CodecOutput(
            waveform=self._fit(self.decoder(quantised.total), input_values.shape[1]),
            codes=quantised.codes,
            features=self.transform(quantised.layers[0].transpose(1, 2)),
            commitment=quantised.commitment.mean(),
        )


class _Up(nn.Module):
    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.ConvTranspose1d(width, out, 2 * stride, stride)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        length = states.shape[-1] * self.stride
        found: torch.Tensor = self.conv(states)[..., self.stride // 2 :][..., :length]
        return found


SpeechCodecConfig.register_for_auto_class()
SpeechCodec.register_for_auto_class("AutoModel")
