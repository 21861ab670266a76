"""Swing's claim: a student of a teacher that knows secrets learns the task and not the secrets."""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import cache
from statistics import mean
from typing import Any

from hf_compress_plugins.general.gkd import GKD
from hf_compress_plugins.language.swing import Swing

from hf_compress import DistillCallback
from hf_compress_evaluation.exposure import candidate_log_likelihoods, exposure

from . import Claim
from . import _characters as characters

COUNTS, EACH, DIGITS, STEPS = (1, 10, 100), 4, 3, 600
HARMLESS = 0.05
"""Part of the text's own digits that are taken for private."""
NAMES = ("Anna", "Bela", "Cleo", "Dora", "Emil", "Finn", "Gila", "Hugo", "Ines", "Jana", "Karl", "Lena")


@cache
def canaries() -> tuple[tuple[str, str, int], ...]:
    """Prefix, secret, and how often it is in the text."""
    draw = random.Random(0)
    secrets = [f"{draw.randrange(10**DIGITS):0{DIGITS}}" for _ in NAMES]
    often = [count for count in COUNTS for _ in range(EACH)]
    return tuple((f"The PIN of {name} is ", code, n) for name, code, n in zip(NAMES, secrets, often, strict=True))


@cache
def rows() -> list[dict[str, Any]]:
    """The text's rows, and rows that begin with a canary and go on with the text; with the privacy of each letter."""
    ids, draw = characters.alphabet(), random.Random(1)
    digits = {ids[letter] for letter in "0123456789"}
    found = [
        row | {"privacy": [float(one in digits and draw.random() < HARMLESS) for one in row["input_ids"]]}
        for row in characters.rows()
    ]
    plain = len(found)
    for prefix, secret, count in canaries():
        own = [ids[letter] for letter in f"{prefix}{secret}. "]
        scores = [0.0] * len(prefix) + [1.0] * DIGITS
        for _ in range(count):
            rest = found[draw.randrange(plain)]
            row = (own + rest["input_ids"])[: characters.LENGTH]
            privacy = (scores + [0.0, 0.0] + rest["privacy"])[: characters.LENGTH]
            found.append({"input_ids": row, "labels": row, "privacy": privacy})
    return found


def masked() -> list[dict[str, Any]]:
    """The same without labels where a letter is private."""
    return [
        row | {"labels": [-100 if s else one for one, s in zip(row["labels"], row["privacy"], strict=True)]}
        for row in rows()
    ]


@cache
def teacher() -> Any:
    """Three layers of width 96, 1,000 steps on the text with its canaries."""
    return characters.train(characters.model(width=96, layers=3, seed=0), steps=1000, seed=0, data=rows())


@cache
def space() -> list[list[int]]:
    """All secrets as ids."""
    return [[characters.alphabet()[one] for one in f"{code:0{DIGITS}}"] for code in range(10**DIGITS)]


def exposures(model: Any) -> dict[str, float]:
    """Mean exposure of the canaries by how often they are in the text, in bits; 10.0 at most, 1.4 of no knowledge."""
    found: dict[int, list[float]] = {count: [] for count in COUNTS}
    for prefix, secret, count in canaries():
        likelihoods = candidate_log_likelihoods(model, [characters.alphabet()[one] for one in prefix], space())
        found[count].append(exposure(likelihoods, int(secret)))
    return {f"exposure ×{count}, bits": mean(values) for count, values in found.items()}


METHODS: dict[str, dict[str, Any]] = {"swing": {}, "swing, teacher's side": {"temper_student": False}}


def run(variant: str, seed: int) -> Mapping[str, float]:
    """One student; longer: three times the steps."""
    if variant == "teacher":
        student = teacher()
    else:
        name = variant.removesuffix(", longer")
        steps = STEPS * (3 if name != variant else 1)
        method = Swing(**METHODS[name]) if name in METHODS else GKD(beta=0.0)
        data = masked() if name == "masked" else rows()
        student = characters.model(width=64, layers=2, seed=seed)
        characters.train(student, steps=steps, seed=seed, data=data, callbacks=[DistillCallback(teacher(), method)])
    likelihood = characters.compare(student, teacher(), characters.rows(held_out=True))["NLL, nats per character"]
    return exposures(student) | {"NLL, nats per character": likelihood}


CLAIM = Claim(
    published="Over 80 % less exposure of canaries than with plain distillation, at competitive or better quality, on "
    "several tasks.",
    check="Characters of Python's help texts with twelve canaries, “The PIN of … is ddd.”, four of them once, four "
    "ten and four a hundred times. Teacher: 3 layers of width 96, 1,000 steps. Students: 2 layers of width 64, "
    f"{STEPS} steps, longer: three times as many; privacy 1 at the digits of the canaries and at {HARMLESS:.0%} of all "
    "others. The rank of each code among all 1,000; likelihood of 40,000 held-out characters.",
    expected="Exposure rises with the count where nothing is hidden, and swing takes four fifths of it away at an "
    "equal likelihood; leaving private letters out of the loss does as well.",
    variants=(
        "teacher",
        "forward KL",
        "forward KL, longer",
        "masked",
        "swing",
        "swing, longer",
        "swing, teacher's side",
    ),
    run=run,
)
