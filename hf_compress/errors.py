"""What can go wrong, one type per kind of trouble.

Each message says what came, what was expected and the remedy. All derive from `HfCompressError`, so a script may
catch ours and nothing else.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class HfCompressError(Exception):
    """Base of every error that hf_compress raises on purpose."""


class ConfigurationError(HfCompressError, ValueError):
    """Settings that contradict each other or cannot be served."""


class MismatchError(HfCompressError, ValueError):
    """Teacher, student or data do not fit together: vocabulary, labels, shapes, tokenizers."""


class UnusedLossError(HfCompressError, RuntimeError):
    """The Trainer does not use the loss that the callback put into the model's output."""


class NumericalError(HfCompressError, ArithmeticError):
    """A NaN or an infinity in a loss, found before any weight was changed."""


class ResumeError(HfCompressError, RuntimeError):
    """A checkpoint lacks state without which the run would silently continue with other numbers."""


class PluginError(HfCompressError, RuntimeError):
    """A method or a family of methods that cannot be read, with the distribution that ships it."""


class ParityError(HfCompressError, RuntimeError):
    """An exported model does not give the numbers of the model that it came from."""


class GateError(HfCompressError, RuntimeError):
    """A reduced precision costs more quality than the user allowed."""


class ProviderError(HfCompressError, RuntimeError):
    """The ONNX Runtime provider that was asked for is not the one that runs."""


class HubError(HfCompressError, RuntimeError):
    """A push that did not happen; the message says what the remote holds."""


class ForeignFileError(HfCompressError, ValueError):
    """A file from outside that is missing, malformed, too large or reaches out of its folder."""

    def __init__(self, path: Path | str, problem: str, remedy: str) -> None:
        super().__init__(path, problem, remedy)  # as given: an exception is copied to another process by its arguments
        self.path, self.problem, self.remedy = path, problem, remedy

    def __str__(self) -> str:
        return f"{self.path}: {self.problem} {self.remedy}"


class UnknownNameError(HfCompressError, KeyError):
    """A name that is not in the list; the message shows the nearest ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else f"Known: {', '.join(known)}."
        super().__init__(f"There is no {kind} {name!r}. {hint}")
        self.near = near
        self._given = (kind, name, known)

    def __str__(self) -> str:  # KeyError shows the repr of its argument, which escapes the message
        return str(self.args[0])

    def __reduce__(self) -> tuple[type[UnknownNameError], tuple[str, str, list[str]]]:
        return type(self), self._given  # copied to another process by what it was made from, not by its message


class TeacherError(HfCompressError, RuntimeError):
    """A teacher on a server that cannot be asked or gives no targets, or one whose budget is spent."""


class TruncatedError(TeacherError):
    """An answer of a teacher on a server that was cut at its limit of tokens, or withheld: another try may be whole."""
