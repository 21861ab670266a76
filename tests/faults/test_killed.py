"""A run that is killed, however often and wherever, and continued, is the run that was not killed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import features
import killing
import pytest
import toys
from killing import NETWORK, STATES, Killing

from hf_compress.data import Mixture


@pytest.fixture
def killed_at(fault: Callable[..., None]) -> Killing:
    return Killing(fault)


def assert_survives(killed_at: Killing, folder: Path, name: str, kills: int) -> None:
    """Kills at random moments, every second one within a save."""
    draw = random.Random(name)
    whole = killed_at.result(folder / "whole", name)
    for number in range(kills):
        killed_at.kill(folder / "parts", name, draw, in_a_save=number % 2 == 0)
    (folder / "parts" / "result.json").unlink(missing_ok=True)

    found = killed_at.result(folder / "parts", name)

    assert found["resumed"], "the run started afresh"
    assert len(whole["losses"]) == killing.STEPS
    assert found["losses"] == whole["losses"]
    assert found["weights"] == whole["weights"]


@pytest.mark.parametrize("state", STATES)
def test_a_killed_run_ends_as_the_one_that_was_not(state: str, killed_at: Killing, tmp_path: Path) -> None:
    assert_survives(killed_at, tmp_path, STATES[state], kills=3)


METHODS = sorted({case.method: str(case) for case in features.CASES}.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", [*METHODS, NETWORK])
def test_of_every_method(name: str, killed_at: Killing, tmp_path: Path) -> None:
    assert_survives(killed_at, tmp_path, name, kills=4)


def test_the_states_are_there(tmp_path: Path) -> None:
    made = {state: killing.trained(tmp_path / state, name) for state, name in STATES.items()}
    assert [name for name, _ in made["buffer"].model.distiller.named_buffers()]
    assert [name for name, _ in made["learned part"].model.distiller.named_parameters()]
    assert isinstance(made["mixture"].train_dataset, Mixture)
    assert toys.WithAdam().overrides("networks")
