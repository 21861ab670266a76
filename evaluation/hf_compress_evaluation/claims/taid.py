"""TAID's claim: a target that slides from the student to the teacher serves where the teacher is far away."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hf_compress_plugins.general.gkd import GKD
from hf_compress_plugins.language.taid import TAID

from hf_compress import DistillCallback
from hf_compress.objective import Objective

from . import Claim
from . import _characters as characters

STEPS = 600
METHODS: Mapping[str, Callable[[], Objective]] = {
    "forward KL": lambda: GKD(beta=0.0),
    "reverse KL": lambda: GKD(beta=1.0),
    "taid 0.4 → 1": lambda: TAID(t_start=0.4),
    "taid 0 → 1": lambda: TAID(t_start=0.0),
    "taid 0.4 → 1, adaptive part ×100": lambda: TAID(t_start=0.4, alpha=0.05),
}


def run(variant: str, seed: int) -> Mapping[str, float]:
    """One student from one start."""
    target = characters.teacher()
    student = characters.model(width=24, layers=1, seed=seed)
    callbacks = [DistillCallback(target, METHODS[variant]())] if variant in METHODS else []
    characters.train(student, steps=STEPS, seed=seed, callbacks=callbacks)
    return characters.compare(student, target, characters.rows(held_out=True))


CLAIM = Claim(
    published="Instruction tuning judged by MT-Bench: better than fine-tuning, forward and reverse KL, total "
    "variation, GKD and DistiLLM on three pairs of models.",
    check="Characters of Python's help texts. Teacher: 3 layers of width 96, 900 steps. Student: 1 layer of width 24, "
    f"{STEPS} steps of 24 rows of 64 characters. With the published α the adaptive part acts in runs of thousands of "
    "steps; a variant has a hundredfold α. 40,000 held-out characters.",
    expected="Near the forward KL in divergence, and a better likelihood than the reverse KL's. More than the forward "
    "KL need not show with so small a gap.",
    variants=("cross-entropy", *METHODS),
    run=run,
)
