"""How time and memory of a step grow with batch, length, vocabulary and number of objectives."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import linear_regression

from hf_compress import DistillCallback
from hf_compress.heads import Memory

from . import Bench, Figures
from ._machine import Machine
from ._steps import texts, train
from .chunked import model

BASE: Mapping[str, int] = {"batch": 4, "length": 128, "vocabulary": 32_000, "objectives": 1}
AXES: Mapping[str, tuple[int, ...]] = {
    "batch": (2, 4, 8),
    "length": (64, 128, 256),
    "vocabulary": (8_000, 32_000, 128_000),
    "objectives": (1, 2, 3),
}
METHODS = ("kd", "gkd", "taid")
"""As many of them as there are objectives: each compares the distributions at all positions."""
WAYS: tuple[Memory, ...] = ("dense", "chunked")
STEPS, WARM = 5, 2


def grid() -> list[dict[str, int]]:
    """The base, and each axis with the others as in the base."""
    made = [dict(BASE)]
    for axis, values in AXES.items():
        made += [{**BASE, axis: value} for value in values if value != BASE[axis]]
    return made


def named(way: str, sizes: Mapping[str, int]) -> str:
    """A part of the grid."""
    return f"{way}, " + " x ".join(str(sizes[axis]) for axis in AXES)


def run(part: str, on: Machine) -> Figures:
    """Seconds and megabytes of a step."""
    way, told = part.split(", ")
    sizes = dict(zip(AXES, map(int, told.split(" x ")), strict=True))
    return steps(sizes, "chunked" if way == "chunked" else "dense", on)


def steps(sizes: Mapping[str, int], memory: Memory, on: Machine) -> dict[str, float]:
    """A run of steps of that batch (rows), length (scored positions of a row), vocabulary and number of objectives."""
    vocabulary, batch = sizes["vocabulary"], sizes["batch"]
    callback = DistillCallback(
        model(128, 2, vocabulary), list(METHODS[: sizes["objectives"]]), memory=memory, task_weight=0.0
    )
    rows = texts(2 * batch, sizes["length"] + 1, vocabulary)
    student = model(64, 1, vocabulary)
    return train(student, rows, steps=STEPS, batch=batch, on=on, warm=WARM, callbacks=[callback])


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """b of value ∝ size^b, by least squares of the logarithms."""
    slope, _ = linear_regression(list(map(math.log, sizes)), list(map(math.log, values)))
    return slope


def ratios(figures: Mapping[str, Figures]) -> Figures:
    """Exponents of growth along each axis, and chunked to whole logits."""
    found = dict[str, float]()
    for axis, sizes in AXES.items():
        for unit in ("seconds", "megabytes"):
            by = {way: [figures[named(way, {**BASE, axis: size})][unit] for size in sizes] for way in WAYS}
            what = {"seconds": "time", "megabytes": "memory"}[unit]
            found |= {f"exponent of {what} in {axis}, {way}": exponent(sizes, values) for way, values in by.items()}
    for size in AXES["vocabulary"]:
        dense, chunked = (figures[named(way, {**BASE, "vocabulary": size})] for way in WAYS)
        found[f"chunked / dense, time, vocabulary {size:,}"] = chunked["seconds"] / dense["seconds"]
        found[f"chunked / dense, memory, vocabulary {size:,}"] = chunked["megabytes"] / dense["megabytes"]
    return found


BENCH = Bench(
    setting="Llama of 1 layer of width 64 taught by one of 2 of width 128; unless said otherwise "
    f"{BASE['batch']} rows of {BASE['length']} scored positions, vocabulary {BASE['vocabulary']:,}, kd; objectives: "
    f"the first of {', '.join(METHODS)}. An exponent b says that the figure grows as size^b.",
    parts=tuple(named(way, sizes) for sizes in grid() for way in WAYS),
    run=run,
    gpu=True,
    threads=1,
    ratios=ratios,
    bars={},
)
