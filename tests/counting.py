"""Counts the faults that the tests inject, by promise: what `ci/faults` writes into the table of `faults/README.md`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import pytest

Promise = Literal["killed runs", "failing writes", "hub faults", "hostile files", "numbers", "secrets", "long runs"]


@pytest.fixture
def fault(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """`fault("killed runs")` for each fault that a test injects and that fired; `note=` tells its kind apart."""

    def count(promise: Promise, note: str = "") -> None:
        record_property("fault", (promise, note))

    return count


def tally(reports: list[Any]) -> dict[str, dict[str, int]]:
    """Tried, survived and lost by promise, from a session's reports: what a failed test had tried counts as lost."""
    found: dict[str, Counter[str]] = {}
    for report in reports:
        if report.when != "call":
            continue
        for name, value in report.user_properties:
            if name == "fault":
                promise, note = value
                counts = found.setdefault(promise, Counter())
                counts["tried"] += 1
                counts["survived" if report.passed else "lost"] += 1
                if note:
                    counts[note] += 1
    return {promise: dict(counts) for promise, counts in sorted(found.items())}
