"""A small real server of the OpenAI chat protocol on loopback, with a plan of faults."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = str | tuple[int, dict[str, str]]
"""A status with headers, or one of
"drop": the connection is closed without a reply; "half": after half of the reply;
"garbage": a reply that is not JSON; "list": JSON that is no completion; "deep": JSON nested without end;
"null": a completion without content; "length": one that was cut."""


class ChatServerState:
    def __init__(self, answer: Callable[[str], str]) -> None:
        self.answer, self.plan = answer, list[Fault]()
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.url = ""


@contextmanager
def serving(answer: Callable[[str], str]) -> Iterator[ChatServerState]:
    """The server while the block runs; `state.plan` holds faults of the next requests."""
    state = ChatServerState(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            state.requests.append(body)
            state.keys.append(self.headers.get("authorization"))
            fault = state.plan.pop(0) if state.plan else None
            if fault == "drop":
                self.connection.close()
                return
            status, headers = fault if isinstance(fault, tuple) else (200, {})
            text = state.answer(body["messages"][-1]["content"])
            choice = {
                "message": {"role": "assistant", "content": None if fault == "null" else text},
                "finish_reason": "length" if fault == "length" else "stop",
            }
            whole = json.dumps({"choices": [choice]}).encode()
            data = {"garbage": b"<html>", "list": b"[]", "deep": b"[" * 100_000}.get(str(fault), whole)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if fault == "half" else data)
            self.close_connection = True

        def log_message(self, *_: Any) -> None:
            """Silence."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            """Silence: a client that went away."""

    server = Server(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
