"""GKD's claim: a student that is taught on its own samples serves better than one taught on fixed text."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from hf_compress_plugins.general.gkd import GKD

from hf_compress import DistillCallback

from . import Claim
from . import _characters as characters

PROMPT, STEPS, ANSWER = 24, 150, 40


@cache
def drafted(seed: int) -> Any:
    """The student that both variants start from: distilled on the text."""
    start = characters.model(width=24, layers=1, seed=seed)
    return characters.train(
        start, steps=400, seed=seed, callbacks=[DistillCallback(characters.teacher(), GKD(beta=0.5))]
    )


def prompted(*, held_out: bool = False) -> list[dict[str, list[int]]]:
    """Rows whose first characters are the prompt."""
    found = characters.rows(held_out=held_out)
    return [row | {"labels": [-100] * PROMPT + row["labels"][PROMPT:]} for row in found]


@cache
def continued() -> list[dict[str, list[int]]]:
    """Held-out prompts with continuations that the target samples: the contexts that a draft meets."""
    target = characters.teacher()
    prompts = torch.tensor([row["input_ids"][:PROMPT] for row in prompted(held_out=True)])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ids = target.eval().generate(prompts, do_sample=True, top_k=0, max_new_tokens=ANSWER, min_new_tokens=ANSWER)
    return [{"input_ids": row, "labels": [-100] * PROMPT + row[PROMPT:]} for row in ids.tolist()]


def run(variant: str, seed: int) -> Mapping[str, float]:
    """The same number of updates on the text's answers or on the student's own."""
    student, target = copy.deepcopy(drafted(seed)), characters.teacher()
    if variant != "start":
        lmbda = float(variant.rpartition("=")[2])
        method = GKD(beta=0.5, lmbda=lmbda, max_new_tokens=ANSWER, sampling_temperature=1.0)
        callback = DistillCallback(target, method)
        characters.train(student, steps=STEPS, seed=seed, callbacks=[callback], learning_rate=1e-3, data=prompted())
    return characters.compare(student, target, continued())


CLAIM = Claim(
    published="On-policy distillation is better than distillation on fixed data for students of summarisation, "
    "translation and arithmetic.",
    check="Characters of Python's help texts. Target: 3 layers of width 96, 900 steps. Student: 1 layer of width 24, "
    f"400 steps of JSD(0.5) on the text, then {STEPS} more with a part λ of the batches answered by itself (prompts of "
    f"{PROMPT}, answers of {ANSWER} characters). Measured on continuations of held-out prompts that the target wrote.",
    expected="Acceptance with λ = 1 at least that with λ = 0.",
    variants=("start", "λ=0", "λ=1"),
    run=run,
)
