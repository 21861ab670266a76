"""A teacher that answers text with text: a callable, or a server with an OpenAI-compatible chat endpoint.

Answers are cached on disk by the question's content and the teacher's settings, so that a killed run asks nothing
twice; calls are counted against a budget.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import requests

from hf_compress import files
from hf_compress.errors import ConfigurationError, ForeignFileError, TeacherError, TruncatedError
from hf_compress.teachers.endpoint import Endpoint

FAILURES_IN_A_ROW = 8
"""After so many (and twice the calls at a time) nobody is taken to be there, and nothing more is asked."""


class Answer(Protocol):
    """One question to one answer."""

    def __call__(self, prompt: str) -> str: ...


@dataclass(frozen=True, kw_only=True)
class ChatServer(Endpoint):
    """A server with an OpenAI-compatible chat endpoint. Another answer than a whole completion raises; an empty one is
    an answer."""

    temperature: float = 0.0
    max_tokens: int = 512
    """Of an answer; one that is cut there is an error and not kept."""
    system: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.temperature < math.inf or self.max_tokens < 1:
            raise ConfigurationError(
                "ChatServer: temperature must be finite and not negative and max_tokens above 0, got "
                f"{self.temperature} and {self.max_tokens}."
            )

    def identity(self) -> str:
        """What decides an answer beside the question; not the address, which changes with each start of a server."""
        return json.dumps([self.model, float(self.temperature), self.system or None])

    def __call__(self, prompt: str) -> str:
        messages = [{"role": "system", "content": self.system}] if self.system else []
        body = {
            "model": self.model,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "messages": [*messages, {"role": "user", "content": prompt}],
        }
        reply = self.post("chat/completions", body)
        content, finished = _completion(reply)
        if finished in ("length", "content_filter"):
            raise TruncatedError(
                f"the text teacher's answer is not whole: finish_reason {finished!r}, max_tokens={self.max_tokens}. "
                "Raise max_tokens, or leave that question out."
            )
        if not isinstance(content, str):
            raise TeacherError(f"the text teacher's server sent no chat completion: {self.shown(reply.text)}.")
        return content


def _completion(reply: requests.Response) -> tuple[object, object]:
    """Content and finish_reason; None where there is none."""
    try:
        choice = reply.json()["choices"][0]
        return choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None, None


class TextTeacher:
    """Asks a text teacher, with a cache and a budget. Several processes may share a cache.

    Args:
        answer: a callable from prompt to answer, or a `ChatServer`.
        cache: folder of one JSON file an answer; None keeps them in memory.
        name: of a callable, for the cache's keys: two teachers must not share one. Of a server: where the model's name
            does not say which weights answer.
        budget: most calls that this object makes, cached answers not counted, failed calls counted, the further tries
            of one call not; None: no limit.
        workers: calls at a time, each in a thread; 1 for a callable that must not be called so.

    Raises:
        ConfigurationError: for a callable without a name, no workers, or a negative budget.
    """

    def __init__(
        self,
        answer: Answer | ChatServer,
        *,
        cache: Path | str | None = None,
        name: str | None = None,
        budget: int | None = None,
        workers: int = 4,
    ) -> None:
        if not isinstance(answer, ChatServer) and name is None:
            raise ConfigurationError(
                "TextTeacher: a callable needs name=…, which keys its cached answers: another model gets another name."
            )
        if workers < 1 or (budget is not None and budget < 0):
            raise ConfigurationError(
                f"TextTeacher: workers must be above 0 and the budget not negative, got {workers} and {budget}."
            )
        self.answer, self.budget, self.workers = answer, budget, workers
        self.identity = json.dumps([name, answer.identity() if isinstance(answer, ChatServer) else None])
        self.cache = None if cache is None else Path(cache)
        self.calls = 0
        self._memory: dict[str, str] = {}
        self._lock = threading.Lock()
        if self.cache is not None:
            self.cache.mkdir(parents=True, exist_ok=True)

    def __call__(self, prompts: Sequence[str], progress: Callable[[int], None] | None = None) -> list[str]:
        """The answers in order; each is in the cache as soon as it is there.

        A prompt that fails does not keep the others from being asked, unless nearly nothing is answered any more.

        Args:
            prompts: questions.
            progress: called with the number of answers that came in this call, cached ones left out.

        Raises:
            TeacherError: if calls failed for good (what the others gave is in the cache), or the budget does not
                cover what is not cached (nothing is asked).
            ForeignFileError: if a cached answer is damaged; nothing is asked.
            ConfigurationError: if `prompts` is one text.
        """
        if isinstance(prompts, str):
            raise ConfigurationError("TextTeacher: prompts must be a list of texts, got one text. Pass [prompt].")
        known = {prompt: self._read(prompt) for prompt in dict.fromkeys(prompts)}
        wanted = [prompt for prompt, answer in known.items() if answer is None]
        if self.budget is not None and self.calls + len(wanted) > self.budget:
            raise self._spent(len(wanted))
        known |= self._ask_all(wanted, progress)
        return [answer for prompt in prompts if (answer := known[prompt]) is not None]

    def _ask_all(self, wanted: Sequence[str], progress: Callable[[int], None] | None) -> dict[str, str]:
        found: dict[str, str] = {}
        errors: list[BaseException] = []
        in_a_row, limit = 0, max(FAILURES_IN_A_ROW, 2 * self.workers)
        queue = iter(wanted)
        with ThreadPoolExecutor(self.workers) as pool:  # when interrupted, what runs is finished and kept
            running = {pool.submit(self._ask, prompt): prompt for prompt in islice(queue, self.workers)}
            while running:
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    prompt = running.pop(done)
                    if (error := done.exception()) is not None:
                        errors.append(error)
                        in_a_row += 1
                    else:
                        found[prompt], in_a_row = done.result(), 0
                        if progress is not None:
                            progress(len(found))
                    if in_a_row < limit:
                        running |= {pool.submit(self._ask, further): further for further in islice(queue, 1)}
        if errors:
            raise TeacherError(
                f"{len(wanted) - len(found)} of {len(wanted)} prompts have no answer; the others' are kept. "
                f"The first error is {type(errors[0]).__name__}: {errors[0]}"
            ) from errors[0]
        return found

    def _ask(self, prompt: str) -> str:
        if (answer := self._read(prompt)) is not None:  # another process was faster
            return answer
        with self._lock:
            if self.budget is not None and self.calls >= self.budget:  # two threads may have asked for their share
                raise self._spent(1)
            self.calls += 1
        answer = self.answer(prompt)
        if not isinstance(answer, str):
            raise TeacherError(f"the text teacher's answer is a {type(answer).__name__}, not text.")
        self._write(prompt, answer)
        return answer

    def _spent(self, wanted: int) -> TeacherError:
        return TeacherError(
            f"{wanted} prompts have no cached answer, {self.calls} calls were made and the budget is {self.budget}. "
            "Raise the budget or ask for fewer."
        )

    def _key(self, prompt: str) -> str:
        return hashlib.sha256(json.dumps([self.identity, prompt]).encode()).hexdigest()

    def _read(self, prompt: str) -> str | None:
        key = self._key(prompt)
        if self.cache is None:
            return self._memory.get(key)
        path = self.cache / f"{key}.json"
        if not path.exists():
            return None
        remedy = "Remove it; the teacher is asked again."
        try:
            stored = files.read_json(path)
        except ForeignFileError as error:
            raise ForeignFileError(path, error.problem, remedy) from error
        if stored.get("prompt") != prompt or not isinstance(answer := stored.get("answer"), str):
            raise ForeignFileError(path, "holds no answer to this prompt.", remedy)
        return answer

    def _write(self, prompt: str, answer: str) -> None:
        key = self._key(prompt)
        if self.cache is None:
            self._memory[key] = answer
        else:
            files.write_text(self.cache / f"{key}.json", json.dumps({"prompt": prompt, "answer": answer}))
