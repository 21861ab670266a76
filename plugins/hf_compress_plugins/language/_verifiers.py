"""Whether an answer is right, 0 … 1: numbers, texts, programs. What needs a judge is the user's own callable."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeAlias

from hf_compress.errors import ConfigurationError

Verifier: TypeAlias = Callable[[str, Mapping[str, Any]], float]
"""From the final part of an answer and the query's row to a score, 0 … 1."""

CASES = 10
"""Test cases of a program that are run at most; the paper's."""
SECONDS, MEMORY, OUTPUT = 5.0, 512 * 2**20, 2**20
"""Of one test case: time on the clock and of the processor, bytes of memory, bytes of each file that it writes."""

_NUMBER = re.compile(r"(?:(?<![\w)])[-−+])?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s*/\s*\d+(?![\d.]))?|\.\d+)")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([-−]?\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_FENCE = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)


def normalised(text: str) -> str:
    """Without differences of case and white space."""
    return " ".join(text.casefold().split())


def final_number(text: str) -> Fraction | None:
    """The number that an answer ends with: in its last \\boxed{…}, else its last; None where there is none."""
    boxed = text.rfind("\\boxed{")
    inside = text[boxed + 7 :] if boxed >= 0 else text
    plain = _FRACTION.sub(r"\1/\2", inside if boxed < 0 else _balanced(inside))
    found = _NUMBER.findall(plain)
    if not found:
        return None
    value = "".join(found[-1].split()).replace(",", "").replace("−", "-")
    over, _, under = value.partition("/")
    return Fraction(over) / Fraction(under) if under and int(under) else Fraction(over)


def _balanced(text: str) -> str:
    """Up to the brace that closes."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if not depth:
            return text[:place]
    return text


def mathematics(answer: str, row: Mapping[str, Any]) -> float:
    """1 where the answer's final number equals that of `row["reference"]` exactly, as fractions; else 0.

    Answers that are no numbers (sets, intervals, formulas) need a verifier of the user's.
    """
    wanted = final_number(str(row["reference"]))
    if wanted is None:
        raise ConfigurationError(
            f"reasoning_traces: the reference {row['reference']!r} holds no number. Give "
            "verifiers={'mathematics': …} that reads it, or another category."
        )
    return float(final_number(answer) == wanted)


def exact(answer: str, row: Mapping[str, Any]) -> float:
    """1 where the answer is `row["reference"]` but for case and white space; else 0."""
    return float(normalised(answer) == normalised(str(row["reference"])))


def code(answer: str, row: Mapping[str, Any]) -> float:
    """The part of `row["tests"]`, at most ten, that the answer's last Python program passes.

    A test is {"input": …, "output": …} for standard input and output, which are compared but for white space at line
    ends, or {"assert": …}, Python that runs after the program. Each runs in a process of its own with limits on time,
    memory and files. That keeps a wrong program from harm, not a hostile one: it may read files and use the network
    as you may. Collect from sources that you do not trust inside a container.
    """
    tests = list(row["tests"])[:CASES]
    if not tests:
        raise ConfigurationError("reasoning_traces: a query of code has no tests, so that any answer would be right.")
    if os.name != "posix":
        raise ConfigurationError("reasoning_traces: programs are run with POSIX limits, which this system lacks.")
    found = _FENCE.findall(answer)
    program = found[-1] if found else answer
    return sum(_passes(program, test) for test in tests) / len(tests)


_LIMITED = """
import resource, runpy, sys
seconds, memory, output = (int(value) for value in sys.argv[2:5])
for limit, value in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, output),
                     (resource.RLIMIT_CORE, 0)):
    resource.setrlimit(limit, (value, value))
sys.argv = sys.argv[1:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def _passes(program: str, test: Mapping[str, Any]) -> bool:
    asserted = test.get("assert")
    with tempfile.TemporaryDirectory() as folder:
        script, written = Path(folder, "program.py"), Path(folder, "output.txt")
        script.write_text(program if asserted is None else f"{program}\n{asserted}\n", encoding="utf-8")
        limits = [str(int(value)) for value in (SECONDS, MEMORY, OUTPUT)]
        with written.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", _LIMITED, str(script), *limits],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={},
                start_new_session=True,
            )
            try:
                process.communicate(str(test.get("input") or "").encode(), timeout=SECONDS)
            except subprocess.TimeoutExpired:
                return False
            finally:
                with suppress(ProcessLookupError):  # what it has started ends with it
                    os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        if process.returncode:
            return False
        return asserted is not None or _lines(written.read_bytes().decode(errors="replace")) == _lines(test["output"])


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


VERIFIERS: Mapping[str, Verifier] = {"mathematics": mathematics, "exact": exact, "code": code}
"""By category; further ones, as of science or of chat, are given by the user."""
