"""Conversations in a tokenizer's chat template, which is a program that came with the tokenizer.

transformers runs it in a sandbox that keeps it from files and from Python, but not from loops in loops. So another
process runs it, one for each tokenizer, with a limit on time and memory.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from .errors import ForeignFileError

SECONDS = 10.0
"""Longest that one conversation takes."""
MEMORY = 2**30
"""Bytes that the process may take beyond what it begins with."""

_open: WeakKeyDictionary[Any, tuple[Any, Connection]] = WeakKeyDictionary()


def render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **settings: Any) -> str:
    """A conversation as the template writes it.

    Args:
        tokenizer: with a chat template.
        messages: with role and content.
        settings: of `apply_chat_template`, e.g. add_generation_prompt.

    Raises:
        ForeignFileError: if the template refuses the conversation, or takes more than `SECONDS` or `MEMORY` for it.
    """
    if tokenizer not in _open:
        _open[tokenizer] = _start(tokenizer)
    process, connection = _open[tokenizer]
    settings = {"chat_template": tokenizer.get_chat_template()} | settings  # the user may have set another since
    try:
        connection.send((list(messages), settings))
        told: tuple[str, str] | None = connection.recv() if connection.poll(SECONDS) else None
    except (EOFError, BrokenPipeError):  # killed by its limit
        told = None
    if told is None:
        process.kill()
        del _open[tokenizer]
    said, text = told or (f"takes more than {SECONDS:.0f} s or {MEMORY >> 20} MiB to write a conversation", "")
    if said:
        name = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
        raise ForeignFileError(name, f"its chat template {said}.", "Give the tokenizer a chat_template that you trust.")
    return text


def _start(tokenizer: Any) -> tuple[Any, Connection]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=_serve, args=(tokenizer, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _serve(tokenizer: Any, connection: Connection) -> None:
    _limit()
    while True:
        try:
            messages, settings = connection.recv()
        except EOFError:
            return
        try:
            told = "", str(tokenizer.apply_chat_template(messages, tokenize=False, **settings))
        except Exception as error:  # a template may raise anything
            told = f"does not write this conversation ({type(error).__name__}: {str(error)[:500]})", ""
        connection.send(told)


def _limit() -> None:
    held = Path("/proc/self/statm")
    if held.exists():  # elsewhere than on Linux time alone is limited
        import resource

        most = int(held.read_text().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
