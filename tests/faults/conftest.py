"""Fixtures that inject faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from counting import fault, tally

__all__ = ["fault"]

_REPORTS: list[Any] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults-table", default=None, help="write the tally of faults, as JSON, to this file")


def pytest_runtest_logreport(report: Any) -> None:
    _REPORTS.append(report)


def pytest_sessionfinish(session: pytest.Session) -> None:
    target = session.config.getoption("--faults-table")
    if target and not hasattr(session.config, "workerinput"):
        Path(target).write_text(json.dumps(tally(_REPORTS), indent=1) + "\n", encoding="utf-8")
