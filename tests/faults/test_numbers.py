"""Numbers are right or the run says why not: every method of the registry."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import features
import pytest
import torch
from features import CASES, in_turn, run
from torch import Tensor

from hf_compress import testing
from hf_compress.errors import HfCompressError, MismatchError
from hf_compress.objective import Signals
from hf_compress.testing import Case

TEXT = [case for case in CASES if not case.pictures]
LOGITS = [case for case in CASES if "logits" in features.needs(case).student & (features.needs(case).teacher or set())]
"""Methods that compare distributions."""


@pytest.mark.parametrize("case", in_turn(CASES, 1))
def test_a_batch_of_one_and_a_short_last_one(case: Case, fault: Callable[..., None], tmp_path: Path) -> None:
    fault("numbers", "short batches")
    run(case, tmp_path, per_device_train_batch_size=1, max_steps=2)
    run(case, tmp_path, per_device_train_batch_size=3, max_steps=2)


@pytest.mark.parametrize("case", in_turn([case for case in TEXT if case.prepare is None], 2))
def test_rows_of_one_token(case: Case, fault: Callable[..., None], tmp_path: Path) -> None:
    """A causal model has nothing to predict in them."""
    fault("numbers", "short rows")
    data = testing.rows(case.task)
    for row in data[:2]:
        for name in {"input_ids", "labels"} & row.keys():
            row[name] = row[name][:1] if isinstance(row[name], list) else row[name]
    run(case, tmp_path, data=data)


@pytest.mark.parametrize("case", in_turn([case for case in TEXT if case.prepare is None], 3))
def test_a_token_beyond_the_vocabulary_is_named(case: Case, fault: Callable[..., None], tmp_path: Path) -> None:
    fault("numbers", "ids out of range")
    data = testing.rows(case.task)
    data[1]["input_ids"][0] = testing.VOCAB + 5
    if isinstance(data[1].get("labels"), list):
        data[1]["labels"] = [0] * len(data[1]["input_ids"])
    with pytest.raises(MismatchError, match=str(testing.VOCAB + 5)):
        run(case, tmp_path, data=data)


def changed(given: Signals, side: str, change: Callable[[Tensor], Tensor]) -> Signals:
    def of(taps: Any) -> dict[str, Tensor]:
        return {name: change(tap.detach().clone()) if name == "logits" else tap.detach() for name, tap in taps.items()}

    student = of(given.student) if side in ("student", "both") else {k: v.detach() for k, v in given.student.items()}
    teacher = of(given.teacher) if side in ("teacher", "both") else given.teacher
    return replace(given, student={name: tap.requires_grad_() for name, tap in student.items()}, teacher=teacher)


@pytest.mark.parametrize("side", ["teacher", "student", "both"])
@pytest.mark.parametrize("case", in_turn(LOGITS, 4))
def test_an_excluded_class_gives_a_finite_value_or_an_error(case: Case, side: str, fault: Callable[..., None]) -> None:
    """Never a finite value with a gradient that is none."""
    fault("numbers", "infinite logits")

    def without_the_last(logits: Tensor) -> Tensor:
        logits[..., -1] = -math.inf
        return logits

    given = changed(testing.signals(case), side, without_the_last)
    said = None
    try:
        value, gradients = testing.value(case, given)
    except HfCompressError as error:
        said = str(error)
    if said is not None:
        assert case.method in said
    else:
        assert value.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients.values())


SAME = [case for case in LOGITS if features.needs(case).same_tokens]
"""Whose teacher reads the same ids, so that its logits have the student's shape."""


@pytest.mark.parametrize(
    ("case", "axis"),
    [
        pytest.param(case, axis, id=f"{case}-{axis}")
        for case in SAME
        for axis in ("classes", "positions")
        if axis == "positions" or case.task != "text-ranking"  # its heads have one value
    ],
)
def test_unequal_shapes_raise(case: Case, axis: str, fault: Callable[..., None]) -> None:
    """Of a tensor of one class, or of one position, broadcasting would make a number that means nothing."""
    fault("numbers", "unequal shapes")
    short = changed(
        testing.signals(case), "teacher", lambda x: x[..., :1] if axis == "classes" else x.flatten(0, -2)[:1]
    )
    with pytest.raises(MismatchError):
        testing.value(case, short)


@pytest.mark.parametrize("case", in_turn(CASES, 5))
def test_a_number_that_is_none_in_the_middle_of_a_run_stops_it(
    case: Case, fault: Callable[..., None], tmp_path: Path
) -> None:
    """After two good steps the teacher breaks; with a method that has none, the student."""
    fault("numbers", "NaN")
    held: dict[str, Any] = {}

    class Breaks(features.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                broken = held["teacher"] if features.needs(case).teacher is not None else held["student"]
                for parameter in broken.parameters():
                    parameter.data.fill_(math.nan)
                held["before"] = testing.weights_hash(held["student"])

    trainer, teacher, _ = features.make(case, tmp_path, Breaks(), max_steps=4)
    held |= {"teacher": teacher, "student": trainer.model}
    with pytest.raises(HfCompressError, match=r"step 2"):
        trainer.train()
    assert testing.weights_hash(trainer.model) == held["before"]
    assert torch.is_grad_enabled()
