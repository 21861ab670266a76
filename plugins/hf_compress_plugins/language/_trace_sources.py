"""Who writes reasoning traces, and who reads them: teachers that are asked many questions, and a scorer of answers."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from hf_compress import chat, facts
from hf_compress.errors import ConfigurationError, ForeignFileError, TeacherError, TruncatedError
from hf_compress.on_policy import ends_of
from hf_compress.taps import evaluating
from hf_compress.teachers.text import Answer, ChatServer

logger = logging.getLogger(__name__)

FAILURES = 8
"""After more (and than twice the questions at a time) nobody is taken to be there, and nothing more is asked."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One answer."""

    text: str
    finished: bool = True
    """Whether it came to its end, and was not cut at a limit."""


class Sampled:
    """A language model that answers several questions at a time, by sampling.

    Args:
        model: a causal model of transformers.
        tokenizer: of the model; where it has a chat template questions are written with it.
        max_new_tokens: of an answer; one that is cut there has failed.
        temperature: above 0, as each further try is to be another one.
        top_p: of the samples.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, max_new_tokens: int, temperature: float = 0.6, top_p: float = 0.95
    ) -> None:
        if not 0 < temperature < float("inf") or not 0 < top_p <= 1 or max_new_tokens < 1:
            raise ConfigurationError(
                "reasoning_traces: Sampled needs a temperature above 0, top_p in (0, 1] and max_new_tokens of at least "
                f"1, got {temperature}, {top_p} and {max_new_tokens}."
            )
        self.model, self.tokenizer = model, tokenizer
        self.settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "top_k": 0}

    def __call__(self, prompts: Sequence[str], *, seed: int) -> list[Reply]:
        """An answer to each question; the same for the same questions and seed."""
        model, ends = self.model, ends_of(self.model)
        asked = [_question(self.tokenizer, prompt) for prompt in prompts]
        width = max(len(ids) for ids in asked)
        ids = torch.tensor([[0] * (width - len(row)) + row for row in asked], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in asked], device=model.device)
        device = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(device), torch.no_grad(), evaluating(model):
            torch.manual_seed(seed)
            pad = next(iter(ends), 0)
            found = model.generate(ids, attention_mask=mask, do_sample=True, pad_token_id=pad, **self.settings)
        return [self._reply(row, ends) for row in found[:, width:].tolist()]

    def _reply(self, ids: list[int], ends: Sequence[int]) -> Reply:
        end = next((place for place, index in enumerate(ids) if index in ends), None)
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=False)  # the marks of thinking may be special
        return Reply(text=text, finished=end is not None)


def _question(tokenizer: Any, prompt: str) -> list[int]:
    if getattr(tokenizer, "chat_template", None):
        written = chat.render(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
        found: list[int] = tokenizer(written, add_special_tokens=False)["input_ids"]
        return found
    plain: list[int] = tokenizer(prompt)["input_ids"]
    return plain


@dataclass(frozen=True, kw_only=True)
class Source:
    """A teacher whose traces are collected."""

    name: str
    """In the column `source`, and of its file: letters, digits, dots, dashes and underscores."""
    teacher: Sampled | ChatServer | Answer
    """A model with its tokenizer; a chat server, with a temperature above 0 and its reasoning parser off, as it would
    keep the thinking back; or any callable from question to answer, which `batch` threads call at a time."""
    licence: str | None = None
    """Of what it writes, for the model card."""
    batch: int = 16
    """Questions asked at a time."""

    def __post_init__(self) -> None:
        plain = self.name.replace("-", "").replace("_", "").replace(".", "")
        if not (plain.isalnum() and plain.isascii()) or self.name.startswith(".") or self.batch < 1:
            raise ConfigurationError(
                "reasoning_traces: a source's name is letters, digits, dots, dashes and underscores, and its batch at "
                f"least 1, got {self.name!r} and {self.batch}."
            )
        if isinstance(self.teacher, ChatServer) and not self.teacher.temperature:
            logger.warning(
                "reasoning_traces: %s has temperature 0, so that each further try is the first one again. Give "
                "ChatServer(temperature=…) a value above 0.",
                self.name,
            )

    def ask(
        self, prompts: Sequence[str], wanted: Sequence[int], *, seed: int, keep: Callable[[int, Reply], None]
    ) -> None:
        """Asks some of the questions of a round.

        Args:
            prompts: of the whole round: a model answers the same ones together, also where a killed round goes on.
            wanted: places of those that have no answer yet.
            seed: of the round.
            keep: is told of each answer as soon as it is there, by its place; from several threads.

        Raises:
            TeacherError: if questions have no answer; those of the others are kept.
        """
        if isinstance(self.teacher, Sampled):
            for start in range(0, len(prompts), self.batch):
                places = range(start, min(start + self.batch, len(prompts)))
                if missing := set(places) & set(wanted):
                    replies = self.teacher([prompts[place] for place in places], seed=seed_of(seed, start))
                    for place, reply in zip(places, replies, strict=True):
                        if place in missing:
                            keep(place, reply)
            return
        errors: list[BaseException] = []
        pool = ThreadPoolExecutor(self.batch)
        try:
            futures = [pool.submit(self._one, prompts[place], place, keep) for place in wanted]
            for done in as_completed(futures):
                if (error := done.exception()) is not None:
                    errors.append(error)
                    if len(errors) > max(FAILURES, 2 * self.batch):
                        break
        finally:  # what runs is finished and kept, also when interrupted
            pool.shutdown(cancel_futures=True)
        wrong = next((error for error in errors if isinstance(error, ConfigurationError)), None)
        if wrong is not None:  # of a verifier, not of the source
            raise wrong
        if errors:
            raise TeacherError(
                f"{len(errors)} questions or more have no answer of {self.name!r}; those that came are kept. "
                f"The first error is {type(errors[0]).__name__}: {errors[0]}"
            ) from errors[0]

    def _one(self, prompt: str, place: int, keep: Callable[[int, Reply], None]) -> None:
        assert not isinstance(self.teacher, Sampled)  # asked above
        try:
            text = self.teacher(prompt)
        except TruncatedError:
            keep(place, Reply(text="", finished=False))
            return
        if not isinstance(text, str):
            raise TeacherError(f"an answer of {self.name!r} is a {type(text).__name__}, not text.")
        keep(place, Reply(text=text))


class Scorer:
    """How likely a language model finds an answer.

    Args:
        model: a causal model of transformers.
        tokenizer: of the model; figures of two tokenizers, or chat templates, cannot be compared.
        name: for the record, and for what was scored before.
        max_length: tokens of a question and its answer; what is longer is cut at its end.
        batch: answers at a time.
    """

    def __init__(self, model: Any, tokenizer: Any, *, name: str, max_length: int = 4096, batch: int = 8) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.max_length, self.batch = max_length, batch

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[int, float]]:
        """Of each (question, answer): tokens of the answer, and the mean of -log q over them in nats."""
        asked = [_question(self.tokenizer, query) for query, _ in pairs]
        said = [self.tokenizer(answer, add_special_tokens=False)["input_ids"] for _, answer in pairs]
        rows = [torch.tensor((q + a)[: self.max_length]) for q, a in zip(asked, said, strict=True)]
        ids = pad_sequence(rows, batch_first=True).to(self.model.device)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(ids)
        start = torch.tensor([len(q) for q in asked], device=ids.device)[:, None]
        with torch.no_grad(), evaluating(self.model):
            logits = self.model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        scored = (mask[:, 1:] > 0) & (torch.arange(1, ids.shape[1], device=ids.device) >= start)
        losses = F.cross_entropy(logits[scored].float(), ids[:, 1:][scored], reduction="none")
        row = torch.arange(len(ids), device=ids.device)[:, None].expand_as(scored)[scored]
        sums = losses.new_zeros(len(ids)).index_add(0, row, losses)
        means = (sums / scored.sum(1).clamp(min=1)).tolist()
        return [(len(answer), mean) for answer, mean in zip(said, means, strict=True)]


def seed_of(*place: object) -> int:
    """A seed that is a function of its place alone, so that a collection that goes on draws as one without a stop."""
    return int(facts.fingerprint([list(place)]), 16) >> 1


class Lines:
    """JSON objects, a line each, added to the end of a file; a line that was torn by a kill is taken off.

    Args:
        path: of the file.
        keys: that every object has.
    """

    def __init__(self, path: Path, *keys: str) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            return
        whole = path.read_bytes()
        kept = whole[: whole.rfind(b"\n") + 1]
        if len(kept) < len(whole):
            os.truncate(path, len(kept))
        for number, line in enumerate(kept.splitlines(), 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise self._broken(number) from error
            if not isinstance(row, dict) or not row.keys() >= set(keys):
                raise self._broken(number)
            self.rows.append(row)

    def _broken(self, number: int) -> ForeignFileError:
        return ForeignFileError(self.path, f"line {number} is none of ours.", "Remove it; it is collected anew.")

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes the rows and brings them to the disk."""
        added = [dict(row) for row in rows]
        with self.path.open("ab") as file:
            file.write("".join(json.dumps(row) + "\n" for row in added).encode())
            file.flush()
            os.fsync(file.fileno())
        self.rows += added
