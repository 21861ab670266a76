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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A name that holds an address is another one in each process, and several processes then run nothing."""
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
