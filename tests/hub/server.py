"""A small hub on loopback that speaks what huggingface_hub 2.4 sends, and refuses what the real hub refuses.

Repositories live in memory (`store.py`), answers are in `routes.py`, HTTP is here. Every request is kept in `Hub.log`,
headers and body included, so that a test can search all bytes that ever left the client. `Hub.plan` holds faults; the
first one that matches a request is used up by it, and noted in `Hub.fired`. `KINDS` names the requests of a push.

    with running_hub() as hub:
        HfApi(endpoint=hub.url, token=hub.token).create_repo("me/model")
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import sleep  # by name: a test may replace `time.sleep` of its client
from typing import Any
from urllib.parse import parse_qs, urlsplit

from .routes import ROUTES, Call
from .store import KINDS, Fault, Hub, RefusedError, Request

__all__ = ["KINDS", "Fault", "Hub", "other_host", "running_hub"]


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else head and body of each answer are 40 ms apart

        def log_message(self, format: str, *args: Any) -> None:
            """The log is `Hub.log`."""

        def answer(self) -> None:
            body = self.read()
            with hub.lock:
                line = f"{self.command} {self.path}"
                hub.log.append(Request(self.command, self.path, str(self.headers), body))
                fault = None if hub.dead else self.fault(line)
                hub.dead |= fault is not None and fault.dies
                asked = not hub.dead if fault is None else fault.applied or fault.drip > 0
                status, headers, data = self.serve(body) if asked else (0, {}, b"")
            if fault is None and asked:
                return self.send(status, headers, data)
            if fault is None or fault.dies or (fault.status is None and not fault.drip):
                sleep(0.0 if fault is None else fault.seconds)
                self.close_connection = True
                return self.connection.close()
            sleep(fault.seconds)
            if fault.drip:
                return self.send(status, headers, data, fault.drip)
            moved = {"Location": f"{fault.redirect}{self.path}"} if fault.redirect else {}
            return self.send(fault.status or 0, {"Content-Type": "text/html"} | fault.headers | moved, fault.body)

        def fault(self, line: str) -> Fault | None:
            """The fault that this request meets; it is used up by it."""
            found = next((f for f in hub.plan if f.meets(line)), None)
            if found is None or found.skip:
                if found is not None:
                    found.skip -= 1
                return None
            found.times -= 1
            if not found.times:
                hub.plan.remove(found)
            hub.fired.append(line)
            return found

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer  # noqa: N815

        def read(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def serve(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            url = urlsplit(self.path)
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            call = Call(hub, token, query, self.headers, body)
            method = "GET" if self.command == "HEAD" else self.command
            try:
                for verb, pattern, function in ROUTES:
                    if verb == method and (found := pattern.match(url.path)):
                        result = function(call, *found.groups())
                        return result if isinstance(result, tuple) else (200, {}, json.dumps(result).encode())
                raise RefusedError(404, f"this hub has no {method} {url.path}")
            except RefusedError as refusal:
                headers = refusal.headers | {"X-Error-Message": refusal.message.replace("\n", " ")}
                headers |= {"X-Error-Code": refusal.code} if refusal.code else {}
                return refusal.status, headers, json.dumps(refusal.body).encode()

        def send(self, status: int, headers: dict[str, str], data: bytes, drip: float = 0.0) -> None:
            self.send_response(status)
            for name, value in (
                {"Content-Type": "application/json", "Content-Length": str(len(data))} | headers
            ).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            size = -(-len(data) // 8) if drip else len(data)
            with suppress(ConnectionError):  # a client that has lost patience
                for start in range(0, len(data), max(size, 1)):
                    sleep(drip)
                    self.wfile.write(data[start : start + size])

    return Handler


class _Server(ThreadingHTTPServer):
    """Noise of clients that go away is not printed."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub on a free port of 127.0.0.1, gone when the block ends."""
    hub = Hub()
    server = _Server(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def other_host() -> Iterator[Hub]:
    """Another server than the hub, on a port of its own: it says `{}` to everything and keeps what it was sent."""
    with running_hub() as other:
        other.plan = [Fault("", status=200, headers={"Content-Type": "application/json"}, body=b"{}", times=10**9)]
        yield other
