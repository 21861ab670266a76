"""Handwritten digits of 8 x 8 pixels for claims about images: rows, small networks, training, accuracy.

A teacher and students for claims about losses on logits are here too: perceptrons, the student's on few labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from statistics import mean
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification, TrainerCallback
from transformers.modeling_outputs import ImageClassifierOutput

from . import _training

TRAIN = 1200
"""Of 1,797 images; the others are for the test."""
WIDE, NARROW = 256, 12
"""Hidden neurons of the teaching and of the taught perceptron."""
LABELLED, STEPS, DRAWS = 100, 500, 5
"""Images of a taught perceptron, its steps of 32, and how often images and start are drawn for one figure."""


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


class Perceptron(nn.Module):
    """One hidden layer."""

    def __init__(self, hidden: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Logits of images (image, 1, 8, 8), and their cross-entropy."""
        logits = self.net(pixel_values)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


@cache
def taught_by() -> Perceptron:
    """The wide perceptron, trained on all training images."""
    found: Perceptron = train(Perceptron(WIDE, 100), steps=STEPS, seed=100)
    return found


def taught(seed: int, callback: Callable[[], TrainerCallback] | None) -> dict[str, float]:
    """Accuracy of the narrow perceptron on few labels, mean over the draws, with a new callback in each or none."""
    found = []
    for draw in range(DRAWS * seed, DRAWS * (seed + 1)):
        chosen = torch.randperm(TRAIN, generator=torch.Generator().manual_seed(draw))[:LABELLED].tolist()
        data, callbacks = [rows()[place] for place in chosen], [] if callback is None else [callback()]
        student = train(Perceptron(NARROW, draw), steps=STEPS, seed=draw, data=data, batch=32, callbacks=callbacks)
        found.append(accuracy(student))
    return {"accuracy": mean(found), "of the teacher": accuracy(taught_by())}


TAUGHT = (
    f"Digits, {TRAIN} images to train and {1797 - TRAIN} to test. Teacher: a perceptron of {WIDE} hidden neurons, on "
    f"all labels. Students: {NARROW} neurons on {LABELLED} images, {STEPS} steps of 32; each figure is a mean over "
    f"{DRAWS} draws of images and start. KD: T = 2, 0.1 of the labels beside 0.9."
)
"""What is run, for the claims that use it."""


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
