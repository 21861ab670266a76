"""A server that is asked over HTTP: what may be retried, how long, and who gets the key."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

from hf_compress.errors import ConfigurationError, TeacherError

PASSING_STATUS = (408, 425, 429, 500, 502, 503, 504)
PASSING_ERRORS = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
"""What a further try may mend."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A server that speaks an OpenAI protocol, e.g. vLLM's.

    The key goes to that server alone: no redirect is followed, over plain http no proxy of the environment is used, and
    `.netrc` is not read.
    """

    url: str
    """Base address, e.g. "http://127.0.0.1:8000/v1"."""
    model: str
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 60.0
    """Seconds without a byte from the server after which a try is given up."""
    retries: int = 3
    """Further tries after 408, 425, 429, 5xx, broken connections and timeouts."""
    backoff: float = 1.0
    """Seconds before the first further try, doubled each time; a longer wait that the server asks for is kept."""
    longest_wait: float = 120.0
    """Seconds; a server that asks for a longer wait is given up at once."""

    def __post_init__(self) -> None:
        name, parts = type(self).__name__, urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
            raise ConfigurationError(  # without the address: it may hold a password
                f"{name}: url must be a plain http or https address such as 'http://127.0.0.1:8000/v1', without a "
                "user, a password or a query. A key goes into api_key=…."
            )
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ConfigurationError(f"{name}: api_key must be printable ASCII, without a line break at its end.")
        numbers = (self.backoff, self.longest_wait, self.timeout)
        if not all(0 <= number < math.inf for number in numbers) or self.timeout == 0 or self.retries < 0:
            raise ConfigurationError(
                f"{name}: backoff, longest_wait and timeout must be finite and not negative, the last above 0, and "
                f"retries not negative, got {numbers} and {self.retries}."
            )

    def post(self, path: str, body: dict[str, Any]) -> requests.Response:
        """The reply, of status 200.

        Raises:
            TeacherError: if there is none after all tries, or the server says something else.
        """
        with requests.Session() as session:
            session.trust_env = urlsplit(self.url).scheme == "https"  # through a proxy, plain http shows it the key
            session.auth = self._authorize
            for number in range(1 + self.retries):
                said, asked = self._try(session, path, body)
                if not isinstance(said, str):
                    return said
                if number < self.retries:
                    time.sleep(max(asked, min(self.backoff * 2**number, self.longest_wait)))
        raise TeacherError(
            f"the teacher {self.model!r} did not answer after {1 + self.retries} tries ({said}). Check that its "
            "server runs; answers so far are kept."
        )

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self.api_key is not None:
            request.headers["authorization"] = f"Bearer {self.api_key}"
        return request

    def _try(self, session: requests.Session, path: str, body: dict[str, Any]) -> tuple[requests.Response | str, float]:
        """The reply and 0, or what went wrong and the seconds that the server asks to wait."""
        problem, again = "", False
        try:
            reply = session.post(
                f"{self.url.rstrip('/')}/{path}", json=body, timeout=self.timeout, allow_redirects=False
            )
        except requests.RequestException as error:
            problem, again = type(error).__name__, isinstance(error, PASSING_ERRORS)
        if again:
            return problem, 0.0
        if problem:  # outside the handler: the error that is left behind holds the request and so the key
            raise TeacherError(f"the teacher {self.model!r} cannot be asked ({problem}). Check its settings.")
        if reply.status_code == 200:
            return reply, 0.0
        if reply.status_code not in PASSING_STATUS:
            raise TeacherError(f"the teacher's server said {reply.status_code}: {self.shown(reply.text)}.")
        asked = _asked_wait(reply)
        if asked > self.longest_wait:
            raise TeacherError(
                f"the teacher's server said {reply.status_code} and asks to wait {asked:.0f} seconds, more than "
                f"longest_wait={self.longest_wait:.0f}. Run again later; answers so far are kept."
            )
        return f"status {reply.status_code}: {self.shown(reply.text)}", asked

    def shown(self, text: str) -> str:
        """The start of a server's text, which may repeat the key."""
        return repr((text.replace(self.api_key, "[api_key]") if self.api_key else text)[:200])


def _asked_wait(reply: requests.Response) -> float:
    """Seconds, from a Retry-After of seconds or of a date; 0 without one, or with one that cannot be read."""
    try:
        return float(Retry().parse_retry_after(reply.headers.get("retry-after", "0")))
    except (InvalidHeader, OverflowError, ValueError):
        return 0.0
