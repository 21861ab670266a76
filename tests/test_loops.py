"""A loop of a method's own: resumed equals uninterrupted, other settings are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_compress.errors import ForeignFileError, ResumeError
from hf_compress.loops import ABOUT, STATE, State, run


def begin() -> State:
    return {"x": torch.ones(2), "optimizer": {"momentum": [torch.zeros(2)]}, "sum": 0.0}


def step(number: int, state: State) -> dict[str, float]:
    noise = torch.randn(2, generator=torch.Generator().manual_seed(number))
    state["optimizer"]["momentum"][0].mul_(0.9).add_(noise)
    state["x"] -= state["optimizer"]["momentum"][0]
    state["sum"] += float(state["x"].sum())
    return {"sum": state["sum"]}


def killed(at: int):  # type: ignore[no-untyped-def]
    def once(number: int, state: State) -> dict[str, float]:
        if number == at:
            raise KeyboardInterrupt
        return step(number, state)

    return once


@pytest.mark.parametrize("at", [1, 4, 9])
def test_a_killed_loop_goes_on_as_if_it_had_not_been(at: int, tmp_path: Path) -> None:
    whole = run(step, begin(), steps=10, settings={"lr": 1})
    folder = tmp_path / "loop"
    with pytest.raises(KeyboardInterrupt):
        run(killed(at), begin(), steps=10, settings={"lr": 1}, resume_from=folder, save_every=3)
    asked: list[int] = []

    def noted(number: int, state: State) -> dict[str, float]:
        asked.append(number)
        return step(number, state)

    again = run(noted, begin(), steps=10, settings={"lr": 1}, resume_from=folder, save_every=3)
    assert asked == list(range(at // 3 * 3, 10))
    assert torch.equal(again["x"], whole["x"])
    assert again["sum"] == whole["sum"]
    assert torch.equal(again["optimizer"]["momentum"][0], whole["optimizer"]["momentum"][0])


def test_a_finished_loop_is_not_repeated(tmp_path: Path) -> None:
    first = run(step, begin(), steps=4, settings={}, resume_from=tmp_path / "loop")
    again = run(killed(0), begin(), steps=4, settings={}, resume_from=tmp_path / "loop")
    assert torch.equal(first["x"], again["x"])


def test_progress_is_told_of_every_step() -> None:
    told: list[tuple[int, int, float]] = []
    run(step, begin(), steps=3, settings={}, progress=lambda done, of, values: told.append((done, of, values["sum"])))
    assert [(done, of) for done, of, _ in told] == [(1, 3), (2, 3), (3, 3)]
    assert len({value for *_, value in told}) == 3


def test_other_settings_or_a_damaged_state_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "loop"
    run(step, begin(), steps=2, settings={"lr": 1}, resume_from=folder)
    with pytest.raises(ResumeError, match="other settings"):
        run(step, begin(), steps=2, settings={"lr": 2}, resume_from=folder)
    (folder / STATE).write_bytes((folder / STATE).read_bytes()[:-7])
    with pytest.raises(ResumeError, match="damaged"):
        run(step, begin(), steps=3, settings={"lr": 1}, resume_from=folder)
    (folder / ABOUT).write_text("{")
    with pytest.raises(ForeignFileError):
        run(step, begin(), steps=3, settings={"lr": 1}, resume_from=folder)
