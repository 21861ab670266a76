"""Secrets that must not get anywhere, and the search for them: in files, in text, and in what a hub received."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest


@dataclass(frozen=True)
class Canary:
    """A secret by what carries it."""

    name: str
    value: str

    @property
    def forms(self) -> frozenset[bytes]:
        """As it is, URL-encoded, as UTF-16, in hex, and as part of any base64."""
        raw = self.value.encode()
        found = {raw, quote(self.value, safe="").encode(), self.value.encode("utf-16-le"), raw.hex().encode()}
        for before in range(3):  # where it begins within three bytes decides its letters; those that it shares are cut
            text = base64.b64encode(b"\0" * before + raw)
            inner = text[-(-before * 8 // 6) : len(text) - (4 if (before + len(raw)) % 3 else 0)]
            found |= {inner, inner.replace(b"+", b"-").replace(b"/", b"_")}
        return frozenset(found)

    def within(self, data: bytes | str) -> bool:
        data = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
        return any(form in data for form in self.forms)


@pytest.fixture
def canary_token() -> Canary:
    """A token that the test hub may be told to know."""
    return Canary("token", "hf_" + "CanaryThatMustNotLeave".ljust(34, "7"))


def where(canaries: Iterable[Canary], places: Mapping[str, bytes | str]) -> list[str]:
    """`canary in place` for each place that holds one."""
    known = list(canaries)
    return [f"{canary.name} in {place}" for place, data in places.items() for canary in known if canary.within(data)]


def files(*folders: Path) -> dict[str, bytes]:
    """Bytes by path, of every file below the folders; links are read too."""
    return {str(path): path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


def received(hub: Any) -> dict[str, bytes]:
    """Every byte that a hub was sent, but its own Authorization headers, by request."""
    found = {}
    for number, request in enumerate(hub.log):
        kept = [line for line in request.headers.splitlines() if not line.lower().startswith("authorization:")]
        found[f"{number}: {request.method} {request.path}"] = "\n".join([request.path, *kept]).encode() + request.body
    return found
