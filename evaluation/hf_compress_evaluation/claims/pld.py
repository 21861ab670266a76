"""PLD's claim: one loss on the teacher's ranking in place of labels and soft labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_compress_plugins.general.kd import KD
from hf_compress_plugins.language.pld import PLD

from hf_compress import DistillCallback

from . import Claim
from . import _digits as digits

METHODS: Mapping[str, tuple[Any, float | None]] = {
    "labels alone": (None, None),
    "KD": (lambda: KD(temperature=2.0), 0.9),
    "PLD τ=1": (PLD, None),
    "PLD τ=4": (lambda: PLD(temperature=4.0), None),
    "PLD, equal weights": (lambda: PLD(temperature=1e6), None),
}
"""Method, and the part of it that the run gives; None: as published."""


def run(variant: str, seed: int) -> Mapping[str, float]:
    """Students on the same draws."""
    method, alpha = METHODS[variant]
    if method is None:
        return digits.taught(seed, None)
    return digits.taught(seed, lambda: DistillCallback(digits.taught_by(), method(), alpha=alpha, kind="rows"))


CLAIM = Claim(
    published="ImageNet top-1 of a ResNet-50 from a ResNet-152: labels 71.35, KD 76.80, PLD 77.30; CIFAR-100, "
    "ResNet-56 to 20: 67.57, 69.45, 70.28. Equal weights: 74.11 on ImageNet.",
    check=digits.TAUGHT,
    expected="PLD at τ = 4 some points above the labels alone, and at least at KD. At τ = 1 near the labels alone: "
    "this teacher is nearly always sure.",
    variants=tuple(METHODS),
    run=run,
)
