"""A small hub on loopback that speaks what huggingface_hub 2.4 sends, and refuses what the real hub refuses.

Repositories live in memory (`store.py`), answers are in `routes.py`, HTTP is here. Every request is kept in `Hub.log`,
headers and body included, so that a test can search all bytes that ever left the client. `Hub.plan` holds faults; the
first one that matches a request is used up by it.

    with running_hub() as hub:
        HfApi(endpoint=hub.url, token=hub.token).create_repo("me/model")
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from .routes import ROUTES, Call
from .store import Fault, Hub, RefusedError, Request

__all__ = ["Fault", "Hub", "running_hub"]


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            """The log is `Hub.log`."""

        def answer(self) -> None:
            body = self.read()
            with hub.lock:
                line = f"{self.command} {self.path}"
                hub.log.append(Request(self.command, self.path, str(self.headers), body))
                fault = next((f for f in hub.plan if re.search(f.match, line)), None)
                if fault is not None and fault.skip:
                    fault.skip, fault = fault.skip - 1, None
                if fault is not None:
                    hub.plan.remove(fault)
                status, headers, data = self.serve(body) if fault is None or fault.applied else (0, {}, b"")
            if fault is None:
                return self.send(status, headers, data)
            time.sleep(fault.seconds)
            if fault.status is None:
                self.close_connection = True
                return self.connection.close()
            return self.send(fault.status, {"Content-Type": "text/html"} | fault.headers, fault.body)

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

        def send(self, status: int, headers: dict[str, str], data: bytes) -> None:
            self.send_response(status)
            for name, value in (
                {"Content-Type": "application/json", "Content-Length": str(len(data))} | headers
            ).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

    return Handler


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub on a free port of 127.0.0.1, gone when the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
