"""Fixtures around the loopback hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from .client import run_client
from .server import Fault, Hub, running_hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub for clients of this process that are told its `url`; no xet, no offline mode, no token of the user."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with running_hub() as hub:
        yield hub


@pytest.fixture
def fault() -> type[Fault]:
    """The constructor of faults for `hub.plan`."""
    return Fault


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> Callable[..., str]:
    """Runs a snippet in a child process that knows this hub only, as its owner unless `token=` says otherwise."""
    home = tmp_path / "client-home"
    home.mkdir()

    def run(code: str, token: str | None = Hub.token) -> str:
        return run_client(code, url=hub.url, home=home, token=token)

    return run
