"""Every method on two processes against one. Run as a script it is one of the two."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from unittest import mock

import features
import pytest
import torch
from hf_compress_evaluation.bench import _together
from stub import GradientKeeper

from hf_compress import stepping, testing
from hf_compress.objective import Step
from hf_compress.run import Run

DRAWING = {"dmae", "dparallel", "fspad", "swing"}
"""Methods that draw on each process for itself: their gradient on two is another draw's."""


class Draws:
    """Whether a step drew from the generator that is each process's own."""

    def __init__(self) -> None:
        self.original, self.steps = stepping.make_step, []

    def __call__(self, run: Run) -> Step:
        step = self.original(run)
        self.steps.append((step.generator, step.generator.get_state()))
        return step

    def __bool__(self) -> bool:
        return any(not torch.equal(generator.get_state(), before) for generator, before in self.steps)


def gradients(case: testing.Case, folder: Path, rows: int) -> dict[str, torch.Tensor]:
    keeper = GradientKeeper()
    made, _ = testing.trainer(
        case, folder, dtype=torch.float64, callbacks=(keeper,), per_device_train_batch_size=rows, learning_rate=1e-3
    )
    made.train()
    return keeper.gradients[0]


QUICK = features.one_of_each(features.CASES, 0)
PARTS = {"one task of each method": QUICK, "the other tasks": [case for case in features.CASES if case not in QUICK]}


def main(target: Path, part: str) -> None:
    found = {str(case): gradients(case, target.parent / "two", 2) for case in PARTS[part]}
    if int(os.environ["RANK"]) == 0:
        torch.save(found, target)


@pytest.mark.parametrize(
    "part", [next(iter(PARTS)), *(pytest.param(p, marks=pytest.mark.slow) for p in list(PARTS)[1:])]
)
def test_two_processes_give_the_gradient_of_one(part: str, tmp_path: Path) -> None:
    target = tmp_path / "found.pt"
    _together.run((__file__, target, part))
    found = torch.load(target, weights_only=True)

    assert found.keys() == {str(case) for case in PARTS[part]}
    for case in PARTS[part]:
        two = found[str(case)]
        assert all(gradient.isfinite().all() for gradient in two.values()), case
        if case.method in features.RANDOM or features.related(case):
            continue
        with mock.patch("hf_compress.run.make_step", Draws()) as drew:
            one = gradients(case, tmp_path, 4)
        assert bool(drew) == (case.method in DRAWING), case
        for name, gradient in one.items() if not drew else ():
            torch.testing.assert_close(two[name], gradient, rtol=1e-6, atol=1e-9, msg=f"{case}: {name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
