"""Forward processes of diffusion models, what a network's prediction says of the image, guidance, and few steps.

    x_t = a_t x + b_t ε          x the image (or latent), ε standard normal noise

A process knows a and b at a level, the argument by which networks are told the level, and what they predict:
"sample" x itself, "epsilon" ε, "v_prediction" a ε - b x (where a² + b² = 1), "flow_prediction" ε - x (where a + b = 1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from hf_compress.errors import ConfigurationError

Prediction = Literal["sample", "epsilon", "v_prediction", "flow_prediction"]
Renoise = Literal["fresh", "fixed", "ddim"]
Denoise = Callable[[Tensor, Tensor], Tensor]
"""From (noisy image, level) to the clean image."""
Conditions = Mapping[str, Tensor]
"""Classes or texts, by the network's argument, a row an image."""


class Process(Protocol):
    """How images and noise are mixed."""

    @property
    def prediction(self) -> Prediction: ...

    def parts(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """a and b, (image, 1, 1, 1) each, at levels (image,)."""

    def told(self, level: Tensor) -> dict[str, Tensor]:
        """The network's argument for the level."""

    def level(self, value: float, like: Tensor) -> Tensor:
        """(image,) that value for each image of `like`."""


@dataclass(frozen=True, kw_only=True)
class EDM:
    """a = 1, b = σ; the level is σ, told as `sigma`; networks predict the image."""

    prediction: Prediction = "sample"

    def parts(self, level: Tensor) -> tuple[Tensor, Tensor]:
        sigma = level.view(-1, 1, 1, 1)
        return torch.ones_like(sigma), sigma

    def told(self, level: Tensor) -> dict[str, Tensor]:
        return {"sigma": level}

    def level(self, value: float, like: Tensor) -> Tensor:
        return torch.full((len(like),), value, dtype=like.dtype, device=like.device)


@dataclass(frozen=True, kw_only=True)
class Latent:
    """a² = ᾱ, b² = 1 - ᾱ; the level is a step of the schedule, told as `timestep`."""

    alphas_cumprod: Tensor = field(repr=False)
    """(step,) ᾱ."""
    prediction: Prediction = "epsilon"

    def parts(self, level: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.alphas_cumprod.to(level.device)[level].view(-1, 1, 1, 1)
        return kept.sqrt(), (1 - kept).sqrt()

    def told(self, level: Tensor) -> dict[str, Tensor]:
        return {"timestep": level}

    def level(self, value: float, like: Tensor) -> Tensor:
        return torch.full((len(like),), int(value), device=like.device)


@dataclass(frozen=True, kw_only=True)
class Flow:
    """a = 1 - t, b = t; the level is t in 0 … 1, told as `timestep` = 1000 t."""

    prediction: Prediction = "flow_prediction"

    def parts(self, level: Tensor) -> tuple[Tensor, Tensor]:
        time = level.view(-1, 1, 1, 1)
        return 1 - time, time

    def told(self, level: Tensor) -> dict[str, Tensor]:
        return {"timestep": 1000 * level}

    def level(self, value: float, like: Tensor) -> Tensor:
        return torch.full((len(like),), value, dtype=like.dtype, device=like.device)


def scaled_linear(*, start: float = 0.00085, end: float = 0.012, steps: int = 1000) -> Tensor:
    """(step,) ᾱ of Stable Diffusion: the roots of β grow evenly."""
    betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2
    return (1 - betas).cumprod(0)


def mix(process: Process, image: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """x_t, of the image's shape (image, channel, height, width)."""
    a, b = process.parts(level)
    return a * image + b * noise


def clean(process: Process, predicted: Tensor, noisy: Tensor, level: Tensor) -> Tensor:
    """The image that a prediction means, given x_t."""
    a, b = process.parts(level)
    if process.prediction == "sample":
        return predicted
    if process.prediction == "epsilon":
        return (noisy - b * predicted) / a
    if process.prediction == "v_prediction":
        return a * noisy - b * predicted
    return noisy - b * predicted


def target(process: Process, image: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """What a network should have predicted."""
    a, b = process.parts(level)
    if process.prediction == "sample":
        return image
    if process.prediction == "epsilon":
        return noise
    return a * noise - b * image if process.prediction == "v_prediction" else noise - image


def guided(predict: Callable[[Conditions], Tensor], given: Conditions, empty: Conditions, scale: float) -> Tensor:
    """p_∅ + κ (p_y - p_∅).

    Args:
        predict: the network's prediction under conditions; called with the empty ones first.
        given: y.
        empty: ∅; not looked at if κ = 1.
        scale: κ; 1 asks only under y, 0 only under ∅, below 0 turns away from y.
    """
    if scale == 1:
        return predict(given)
    without = predict(empty)
    return without if scale == 0 else without + scale * (predict(given) - without)


def dropped(given: Conditions, empty: Conditions, where: Tensor) -> dict[str, Tensor]:
    """Conditions, replaced by the empty ones where (image,) `where` is True."""
    return {
        name: torch.where(where.view(-1, *[1] * (value.dim() - 1)), empty[name], value) for name, value in given.items()
    }


def few_steps(
    process: Process,
    denoise: Denoise,
    noise: Callable[[], Tensor],
    *,
    start: float,
    steps: int,
    of: int,
    renoise: Renoise = "fresh",
) -> tuple[Tensor, Tensor]:
    """What the last of some steps reads: its noisy image and (image,) level.

    Step i of 0 … K - 1 stands at level start · (1 - i / K) and reads a D + b ε, D the image of the step before, 0 at
    first.

    Args:
        process: mixes.
        denoise: the generator, called for the steps before the last.
        noise: draws a standard normal image batch.
        start: level of the first step.
        steps: k, 1 … of.
        of: K.
        renoise: ε after the first step: "fresh", "fixed" the first one, or "ddim" the one that D implies, detached.

    Raises:
        ConfigurationError: for steps out of 1 … of.
    """
    if not 1 <= steps <= of:
        raise ConfigurationError(f"steps must be in 1 … {of}, those of the training, got {steps}.")
    drawn = noise()
    image = torch.zeros_like(drawn)
    for place in range(steps):
        level = process.level(start * (of - place) / of, drawn)
        noisy = mix(process, image, drawn, level)
        if place + 1 < steps:
            image = denoise(noisy, level)
            if renoise == "fresh":
                drawn = noise()
            elif renoise == "ddim":
                a, b = process.parts(level)
                drawn = ((noisy - a * image) / b).detach()
    return noisy, level


def image_shape(config: Any) -> tuple[int, int, int]:
    """(channel, height, width) of a denoiser's images, from its config in the names of transformers or diffusers.

    Raises:
        ConfigurationError: if the config tells neither.
    """
    channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None)
    size = getattr(config, "image_size", None) or getattr(config, "sample_size", None)
    if channels is None or size is None:
        raise ConfigurationError(
            "the student's config has no num_channels and image_size, nor in_channels and sample_size; set them."
        )
    height, width = (size, size) if isinstance(size, int) else size
    return channels, height, width
