"""A discriminator made of a network's own middle layer: its logit is the mean over channels; nothing is added to learn.

discriminator: ½ v · ( BCE(d(real), 1) + BCE(d(generated), 0) )          generator: BCE(d(generated) in -10 … 10, 1) / w
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from hf_compress.errors import ConfigurationError


def features_to_logits(features: Tensor) -> Tensor:
    """(image, 1, height, width) d: the mean over channels, which are the second axis of four, else the last one."""
    if features.dim() == 4:
        return features.mean(1, keepdim=True)
    return features.mean(-1).reshape(len(features), 1, 1, -1)


def verdict(logits: Tensor, wanted: float, over: tuple[int, ...]) -> Tensor:
    """(image or 1, 1, 1, 1) binary cross-entropy of logits (image, 1, height, width), averaged over those axes."""
    values = binary_cross_entropy_with_logits(logits, torch.full_like(logits, wanted), reduction="none")
    return values.mean(over, keepdim=True)


def discriminator_loss(real: Tensor, fake: Tensor, *, weight: Tensor, over: tuple[int, ...]) -> Tensor:
    """(image, 1, 1, 1) from the logits of real and of generated images; weight v(t)."""
    return 0.5 * weight * (verdict(real, 1.0, over) + verdict(fake, 0.0, over))


def adversarial_loss(logits: Tensor, *, weight: Tensor, over: tuple[int, ...]) -> Tensor:
    """(image, 1, 1, 1) the generator's, from the logits of generated images; weight 1 / w."""
    return verdict(logits.clamp(-10, 10), 1.0, over) * weight


def bottleneck(network: nn.Module, name: str | None) -> nn.Module:
    """The module of that name; None: the middle one of the network's `layers`.

    Raises:
        ConfigurationError: if there is none.
    """
    layers = getattr(network, "layers", None)
    if name is None and isinstance(layers, nn.ModuleList) and len(layers):
        name = f"layers.{len(layers) // 2}"
    found: nn.Module | None = dict(network.named_modules()).get(name or "layers")
    if found is None:
        raise ConfigurationError(
            f"{type(network).__name__} has no module {name or 'layers'!r} for the discriminator to read; name its "
            "middle one: bottleneck=…."
        )
    return found


@contextmanager
def watched(module: nn.Module) -> Iterator[list[Tensor]]:
    """What the module gives in the calls inside, one after the other."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = module.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()
