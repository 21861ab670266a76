"""What every test runs in."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from counting import fault, tally
from hostile import limited_child

__all__ = ["fault", "limited_child"]

_REPORTS: list[Any] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults-table", default=None, help="write the tally of injected faults, as JSON, to this file")


HALVED = {
    *("test_conformance.py", "test_families.py", "test_hostile.py", "test_onnx.py", "test_onnx_generation.py"),
    *("test_cases.py", "test_callback.py"),
}
"""Files of whose tests with many cases every other case is slow."""
MANY = 6


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A name that holds an address is another one in each process, and several processes then run nothing."""
    cases: dict[tuple[str, str], list[pytest.Item]] = {}
    for item in items:
        if item.path.name in HALVED and "slow" not in item.keywords:
            cases.setdefault((item.path.name, item.name.partition("[")[0]), []).append(item)
    for own in cases.values():
        for item in own[1::2] if len(own) >= MANY else ():
            item.add_marker("slow")
    if named := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(f"tests must have one name in every process: {named[0]}")


def pytest_runtest_logreport(report: Any) -> None:
    _REPORTS.append(report)


def pytest_sessionfinish(session: pytest.Session) -> None:
    target = session.config.getoption("--faults-table")
    if target and not hasattr(session.config, "workerinput"):
        Path(target).write_text(json.dumps(tally(_REPORTS), indent=1) + "\n", encoding="utf-8")


@pytest.fixture(autouse=True)
def quick_collection() -> Iterator[None]:
    """What was there before a test is not looked through again: each Trainer collects garbage several times."""
    gc.freeze()
    yield
    gc.unfreeze()
