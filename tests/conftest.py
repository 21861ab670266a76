"""What every test runs in."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def quick_collection() -> Iterator[None]:
    """What was there before a test is not looked through again: each Trainer collects garbage several times."""
    gc.freeze()
    yield
    gc.unfreeze()
