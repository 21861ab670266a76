"""Whichever write fails, the earlier artefact is there whole, and the error says what was kept."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from writes import FailingWrites
from written import QUICK, SLOW, Written

MOST = 400


@pytest.fixture(scope="module")
def failing_writes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FailingWrites]:
    if shutil.which("cc") is None or sys.platform != "linux":
        pytest.skip("a library is compiled and preloaded: needs cc, and Linux")
    made = FailingWrites(tmp_path_factory.mktemp("library") / "failing_writes.so")
    yield made
    made.close()


def assert_kept(
    failing_writes: FailingWrites, fault: Callable[..., None], kind: str, folder: Path, places: Iterator[int]
) -> None:
    """Lets one write after another fail until none does."""
    artefact: Written = {**QUICK, **SLOW}[kind]
    artefact.before(folder / "before")
    before = artefact.read(folder / "before")
    fired = 0
    for n in places:
        here = Path(shutil.copytree(folder / "before", folder / f"write {n}"))
        ended = failing_writes.run(artefact.operation, here, n)
        found = artefact.read(here)
        if not ended.fired:
            assert not ended.said
            after = found
            break
        fired += 1
        fault("failing writes", kind)
        if found != before:  # the write that failed came after the last that counts
            whole = Path(shutil.copytree(folder / "before", folder / f"whole {n}"))
            assert not failing_writes.run(artefact.operation, whole, 0).said
            assert found == artefact.read(whole), f"write {n} left something else"
        elif ended.said:
            assert any(word in ended.said for word in ("as it was", "Nothing was written", "is whole")), ended.said
        shutil.rmtree(here)
    else:
        raise AssertionError(f"after {MOST} writes there are still more")
    assert fired, "no fault fired"
    again = Path(shutil.copytree(folder / "before", folder / "again"))
    assert not failing_writes.run(artefact.operation, again, 0).said
    assert artefact.read(again) == after


def one_by_one() -> Iterator[int]:
    yield from range(1, MOST)


def doubling() -> Iterator[int]:
    yield from (2**power for power in range(12))


@pytest.mark.parametrize("kind", QUICK)
def test_a_failed_write(kind: str, failing_writes: FailingWrites, fault: Callable[..., None], tmp_path: Path) -> None:
    assert_kept(failing_writes, fault, kind, tmp_path, doubling())


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*QUICK, *SLOW])
def test_whichever_write_fails(
    kind: str, failing_writes: FailingWrites, fault: Callable[..., None], tmp_path: Path
) -> None:
    assert_kept(failing_writes, fault, kind, tmp_path, one_by_one())
