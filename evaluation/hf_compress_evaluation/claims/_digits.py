"""Handwritten digits of 8 x 8 pixels for claims about images: rows, small networks, training, accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from . import _training

TRAIN = 1200
"""Of 1,797 images; the others are for the test."""


@cache
def images() -> tuple[Tensor, Tensor]:
    """(image, 1, 8, 8) in -1 … 1, and labels, in one shuffled order."""
    found = load_digits()
    order = torch.randperm(len(found.images), generator=torch.Generator().manual_seed(0))
    pixels = torch.tensor(found.images, dtype=torch.float32)[order][:, None] / 8 - 1
    return pixels, torch.tensor(found.target)[order]


def rows(*, test: bool = False) -> list[dict[str, Any]]:
    """Rows for a Trainer."""
    part = slice(TRAIN, None) if test else slice(TRAIN)
    pixels, labels = (tensor[part] for tensor in images())
    return [{"pixel_values": image, "labels": int(label)} for image, label in zip(pixels, labels, strict=True)]


def resnet(depths: Sequence[int], widths: Sequence[int], seed: int) -> ResNetForImageClassification:
    """An untrained residual network for the digits."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = ResNetConfig(
            num_channels=1,
            embedding_size=widths[0],
            hidden_sizes=list(widths),
            depths=list(depths),
            layer_type="basic",
            num_labels=10,
        )
        return ResNetForImageClassification(config)


def collate(batch: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Images and labels as tensors."""
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in batch]),
        "labels": torch.tensor([row["labels"] for row in batch]),
    }


def train(
    model: Any,
    *,
    steps: int,
    seed: int,
    data: Any = None,
    data_collator: Any = collate,
    batch: int = 64,
    **settings: Any,
) -> Any:
    """A plain Trainer on the training images, or on other rows."""
    rows_ = rows() if data is None else data
    return _training.train(
        model, data=rows_, data_collator=data_collator, steps=steps, seed=seed, batch=batch, **settings
    )


def accuracy(model: nn.Module) -> float:
    """Of the test images."""
    pixels, labels = (tensor[TRAIN:] for tensor in images())
    with torch.no_grad():
        return float((model.eval()(pixels).logits.argmax(-1) == labels).float().mean())
