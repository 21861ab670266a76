"""A teacher that answers text with text: a callable, or a server with an OpenAI-compatible chat endpoint.

Answers are cached on disk by the question's content and the teacher's settings, so that a killed run asks nothing
twice; calls are counted against a budget.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from hf_compress import files
from hf_compress.errors import ConfigurationError, ForeignFileError, TextTeacherError


class Answer(Protocol):
    """One question to one answer."""

    def __call__(self, prompt: str) -> str: ...


@dataclass(frozen=True, kw_only=True)
class ChatServer:
    """A server that speaks the OpenAI chat protocol, e.g. vLLM's.

    Another answer than a completion raises at once.
    """

    url: str
    """Base address, e.g. "http://127.0.0.1:8000/v1"."""
    model: str
    temperature: float = 0.0
    max_tokens: int = 512
    system: str | None = None
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 60.0
    """Seconds for one call."""
    retries: int = 3
    """Further tries after 429, 5xx and broken connections; waits that the server asks for are kept."""
    backoff: float = 1.0
    """Seconds before a further try, doubled each time."""

    def identity(self) -> str:
        """What decides an answer beside the question."""
        return json.dumps([self.model, self.temperature, self.max_tokens, self.system])

    def __call__(self, prompt: str) -> str:
        messages = [{"role": "system", "content": self.system}] if self.system else []
        body = {
            "model": self.model,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "messages": [*messages, {"role": "user", "content": prompt}],
        }
        headers = {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        with requests.Session() as session:
            retry = Retry(
                total=self.retries,
                backoff_factor=self.backoff,
                status_forcelist=(429, 500, 502, 503, 504),
                allowed_methods=None,  # a question may be asked again
                raise_on_status=False,
            )
            for scheme in ("http://", "https://"):
                session.mount(scheme, HTTPAdapter(max_retries=retry))
            try:
                reply = session.post(
                    f"{self.url.rstrip('/')}/chat/completions",
                    json=body,
                    headers=headers,
                    timeout=self.timeout,
                    allow_redirects=False,  # the key must not go to another host
                )
            except requests.RequestException as error:
                raise TextTeacherError(
                    f"the text teacher {self.model!r} did not answer after {1 + self.retries} tries "
                    f"({type(error).__name__}). Check that its server runs; answers so far are in the cache."
                ) from None  # its text may hold the request
        return _content(reply)


def _content(reply: Any) -> str:
    if reply.status_code != 200:
        raise TextTeacherError(f"the text teacher's server said {reply.status_code}: {reply.text[:200]!r}.")
    try:
        content = reply.json()["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise TextTeacherError(f"the text teacher's server sent no chat completion: {reply.text[:200]!r}.") from error
    if not isinstance(content, str):
        raise TextTeacherError(f"the text teacher's answer is {content!r}, not text.")
    return content


class TextTeacher:
    """Asks a text teacher, with a cache and a budget.

    Args:
        answer: a callable from prompt to answer, or a `ChatServer`.
        cache: folder of one JSON file an answer; None keeps them in memory.
        name: of a callable, for the cache's keys: two teachers must not share one.
        budget: most calls that are made, cached answers not counted; None: no limit.
        workers: calls at a time.
    """

    def __init__(
        self,
        answer: Answer | ChatServer,
        *,
        cache: Path | None = None,
        name: str | None = None,
        budget: int | None = None,
        workers: int = 4,
    ) -> None:
        identity = answer.identity() if isinstance(answer, ChatServer) else name
        if identity is None:
            raise ConfigurationError(
                "TextTeacher: a callable needs name=…, which keys its cached answers: another model gets another name."
            )
        self.answer, self.identity, self.budget, self.workers = answer, identity, budget, workers
        self.cache = cache
        self.calls = 0
        self._memory: dict[str, str] = {}
        self._lock = threading.Lock()
        if cache is not None:
            cache.mkdir(parents=True, exist_ok=True)

    def __call__(self, prompts: Sequence[str], progress: Callable[[int], None] | None = None) -> list[str]:
        """The answers in order; each is in the cache as soon as it is there.

        Args:
            prompts: questions.
            progress: called with the number of answers as they come.

        Raises:
            TextTeacherError: if a call fails for good, or the budget does not cover what is not cached.
        """
        known = {prompt: self._read(prompt) for prompt in dict.fromkeys(prompts)}
        wanted = [prompt for prompt, answer in known.items() if answer is None]
        if self.budget is not None and self.calls + len(wanted) > self.budget:
            raise TextTeacherError(
                f"{len(wanted)} prompts have no cached answer, {self.calls} calls were made and the budget is "
                f"{self.budget}. Raise the budget or ask for fewer."
            )
        first: BaseException | None = None
        with ThreadPoolExecutor(self.workers) as pool:
            running = {pool.submit(self._ask, prompt): prompt for prompt in wanted}
            for count, done in enumerate(as_completed(running), 1):
                if (error := done.exception()) is not None:  # the others' answers are kept before it is raised
                    first = first or error
                    continue
                known[running[done]] = done.result()
                if progress is not None:
                    progress(count)
        if first is not None:
            raise first
        return [answer for prompt in prompts if (answer := known[prompt]) is not None]

    def _ask(self, prompt: str) -> str:
        with self._lock:
            self.calls += 1
        answer = self.answer(prompt)
        self._write(prompt, answer)
        return answer

    def _key(self, prompt: str) -> str:
        return hashlib.sha256(json.dumps([self.identity, prompt]).encode()).hexdigest()

    def _read(self, prompt: str) -> str | None:
        key = self._key(prompt)
        if self.cache is None:
            return self._memory.get(key)
        path = self.cache / f"{key}.json"
        if not path.exists():
            return None
        answer = files.read_json(path).get("answer")
        if not isinstance(answer, str):
            raise ForeignFileError(path, "holds no answer.", "Remove it; the teacher is asked again.")
        return answer

    def _write(self, prompt: str, answer: str) -> None:
        key = self._key(prompt)
        if self.cache is None:
            self._memory[key] = answer
        else:
            files.write_text(self.cache / f"{key}.json", json.dumps({"prompt": prompt, "answer": answer}))
