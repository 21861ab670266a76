"""Every method of the registry under the suite that third parties import."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from prepared import PREPARED

from hf_compress import registry, testing

CASES = [replace(case, **PREPARED.get(case.method, {})) for case in testing.cases()]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("check", testing.CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_conformance(check: Callable[[testing.Case, Path], None], case: testing.Case, tmp_path: Path) -> None:
    check(case, tmp_path)


@pytest.mark.parametrize("name", sorted(registry.catalogue().methods))
def test_the_parts_are_what_is_declared(name: str) -> None:
    testing.check_parts(name)
