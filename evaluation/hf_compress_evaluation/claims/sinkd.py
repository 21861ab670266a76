"""SinKD's claim: what a batch's transport adds to soft labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_compress_plugins.general.kd import KD
from hf_compress_plugins.language.sinkd import SinKD

from hf_compress import DistillCallback

from . import Claim
from . import _digits as digits

BATCH = 32
METHODS: Mapping[str, tuple[Any, float | None]] = {
    "labels alone": (None, None),
    "KD": (lambda: KD(temperature=2.0), 0.9),
    "soft labels without T², without transport": (lambda: SinKD(beta=0.0), None),
    "SinKD": (SinKD, None),
    "SinKD, 0.001 of the sum": (lambda: SinKD(summed=True), None),
    "SinKD, the whole sum": (lambda: SinKD(beta=0.8 * BATCH), None),
    "labels and transport alone": (lambda: SinKD(alpha=0.0), None),
}
"""Method, and the part of it that the run gives; None: as published."""


def run(variant: str, seed: int) -> Mapping[str, float]:
    """Students on the same draws."""
    method, alpha = METHODS[variant]
    if method is None:
        return digits.taught(seed, None)
    return digits.taught(seed, lambda: DistillCallback(digits.taught_by(), method(), alpha=alpha, kind="rows"))


CLAIM = Claim(
    published="GLUE and SuperGLUE scores above earlier distillation for encoders, encoder-decoders and decoders.",
    check=digits.TAUGHT + f" Whole sum: β times {BATCH} rows, what the published β gives without the code's 0.001.",
    expected="SinKD within a standard deviation of the soft labels without transport, in both of its scales; the whole "
    "sum far below them.",
    variants=tuple(METHODS),
    run=run,
)
