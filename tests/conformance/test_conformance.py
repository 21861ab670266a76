"""Every method of the registry under the suite that third parties import."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from prepared import cases

from hf_compress import registry, testing

CASES = cases()


def in_turn() -> list[Any]:
    """Every check on every case; on all but one task of a method, another at each check, it is slow."""
    found = []
    for _, of_method in groupby(CASES, key=lambda case: case.method):
        tasks = list(of_method)
        for turn, check in enumerate(testing.CHECKS):
            name = check.__name__.removeprefix("check_")
            for place, case in enumerate(tasks):
                marks = [pytest.mark.slow] if place != turn % len(tasks) else []
                found.append(pytest.param(check, case, id=f"{name}-{case}", marks=marks))
    return found


@pytest.mark.parametrize(("check", "case"), in_turn())
def test_conformance(check: Callable[[testing.Case, Path], None], case: testing.Case, tmp_path: Path) -> None:
    check(case, tmp_path)


@pytest.mark.parametrize("name", sorted(registry.catalogue().methods))
def test_the_parts_are_what_is_declared(name: str) -> None:
    testing.check_parts(name)
