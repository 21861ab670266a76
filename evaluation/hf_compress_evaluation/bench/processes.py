"""What a second process brings: a step's rows in one process of one thread, and shared by two."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping

from . import Bench, Figures, _together
from ._machine import Machine
from .scale import BASE, steps

PARTS = {"one process": 1, "two processes": 2}


def run(part: str, on: Machine) -> Figures:
    """Seconds and megabytes of a step of the first of the processes."""
    del on  # each has one thread
    processes = PARTS[part]
    share = json.dumps({**BASE, "batch": BASE["batch"] // processes})
    first, *_ = _together.run(("-m", __name__, share), processes)
    found: Figures = json.loads(first.splitlines()[-1])
    return found


def ratios(figures: Mapping[str, Figures]) -> Figures:
    """Of two to one."""
    one, two = (figures[part] for part in PARTS)
    return {
        "two processes / one, time": two["seconds"] / one["seconds"],
        "two processes / one, memory of each": two["megabytes"] / one["megabytes"],
    }


BENCH = Bench(
    setting=f"The bench `scale`'s models, {BASE['batch']} rows of {BASE['length']} scored positions a step, vocabulary "
    f"{BASE['vocabulary']:,}, kd in chunks: in one process of one thread, and shared by two that sum their gradients "
    "with gloo.",
    parts=tuple(PARTS),
    run=run,
    threads=1,
    ratios=ratios,
    bars={},
)

if __name__ == "__main__":
    print(json.dumps(steps(json.loads(sys.argv[1]), "chunked", Machine())))
