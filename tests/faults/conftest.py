"""Fixtures that inject faults around the loopback hub."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
from canary import canary_token
from hub.server import Fault, Hub, other_host, running_hub
from huggingface_hub import constants
from huggingface_hub.utils import _http, disable_progress_bars, enable_progress_bars

__all__ = ["canary_token"]


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Hub]]:
    """`fake_hub(fault, …)`: the hub, up again, with these faults before it; its clients do not sleep."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    disable_progress_bars()
    with running_hub() as hub:

        def plan(*faults: Fault) -> Hub:
            hub.plan, hub.fired, hub.dead = list(faults), [], False
            return hub

        yield plan
    enable_progress_bars()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that our client and huggingface_hub would have slept between tries; nobody sleeps."""
    found: list[float] = []
    for name in (_http, "hf_compress.hub"):
        target = f"{name.__name__}.time" if not isinstance(name, str) else f"{name}.time"
        monkeypatch.setattr(target, SimpleNamespace(sleep=found.append, monotonic=time.monotonic, time=time.time))
    return found


@pytest.fixture
def elsewhere() -> Iterator[Hub]:
    """Another host, which keeps all that it is sent."""
    with other_host() as other:
        yield other
