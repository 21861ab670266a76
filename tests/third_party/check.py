"""The conformance suite as a third party runs it, with the suite's own test of the method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hf_compress_example.squared import squared

from hf_compress import registry, testing


@pytest.mark.parametrize("case", testing.cases("squared"), ids=str)
@pytest.mark.parametrize("check", testing.CHECKS, ids=lambda check: check.__name__)
def test_conformance(check: Callable[[testing.Case, Path], None], case: testing.Case, tmp_path: Path) -> None:
    check(case, tmp_path)


def test_it_is_found_through_its_own_entry_point() -> None:
    entry = registry.get("squared")
    assert (entry.family, entry.distribution) == ("example", "hf-compress-example")
    testing.check_parts("squared")


def test_by_hand() -> None:
    value = squared(torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 1.0]]), scale=2.0)
    assert value.tolist() == [0.5]
