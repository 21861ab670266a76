"""What a step costs, side by side: `python -m hf_compress_evaluation.bench NAME` measures and writes the figures.

A benchmark is a module of this package with `BENCH = Bench(...)`. Its parts run alternately, each round in processes of
their own, and each figure is the median over rounds, or the mean where a round is a seed. What misses its aim is
written as it was measured.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import pkgutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from statistics import mean, median
from typing import Any

from hf_compress import files
from hf_compress.errors import ConfigurationError, UnknownNameError
from hf_compress.facts import hardware, versions

from . import _peers
from ._machine import Machine

Figures = Mapping[str, float]
ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One comparison."""

    setting: str
    """What is measured on what."""
    parts: tuple[str, ...]
    """Run one after the other in each round."""
    run: Callable[..., Figures]
    """From part, machine, and the folder if one is prepared, to its figures; picklable: it runs in its own process."""
    ratios: Callable[[Mapping[str, Figures]], Figures]
    """From the figures of a round's parts to what is compared."""
    bars: Mapping[str, tuple[float, float]]
    """Ratio to the most that is allowed, and to the aim."""
    prepare: Callable[[Path], None] | None = None
    """Writes into a folder, once before the first round, what the parts read."""
    peer: str | None = None
    """The package that it compares with, in whose environment (`ci/peers`) all parts run; None: in this one."""
    here: bool = False
    """They run in this one although there is a peer."""
    seeded: bool = False
    """`run` also gets `seed`, the number of the round; figures are means over seeds, and each seed's are kept."""
    once: tuple[str, ...] = ()
    """Parts that run in the first round alone; their figures stand for the other rounds too."""
    threads: int | None = None
    """Whatever is asked for; None: as many as are asked for."""
    gpu: bool = False
    """It can run on a GPU."""


def names() -> list[str]:
    """The benchmarks that there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name[0] != "_")


def get(name: str) -> Bench:
    """The benchmark of that name.

    Raises:
        UnknownNameError: with the nearest.
    """
    if name not in names():
        raise UnknownNameError("benchmark", name, names())
    found: Bench = importlib.import_module(f"{__name__}.{name}").BENCH
    return found


def measure(
    name: str,
    output: Path,
    *,
    rounds: int = ROUNDS,
    on: Machine | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Runs a benchmark and puts its row into a results file.

    What is measured is kept beside that file until the row is there, so a killed run goes on with the part it was at.

    Args:
        name: of the benchmark.
        output: the results file; rows of other benchmarks are kept.
        rounds: how often.
        on: where; of the threads as far as the benchmark leaves them open. None: two threads of the CPU.
        progress: called with a line before each part.

    Returns:
        the row.

    Raises:
        ConfigurationError: for a GPU where the benchmark is one of a CPU.
    """
    bench, on = get(name), on or Machine(threads=2)
    on = replace(on, threads=bench.threads or on.threads)
    if on.name and not bench.gpu:
        raise ConfigurationError(f"the bench {name} is for a CPU and float32: leave --device and --precision out.")
    say, key = progress or _nothing, ", ".join(filter(None, (name, on.name)))
    where = None if bench.here else bench.peer
    used = versions()
    if bench.peer is not None:
        used |= _peers.versions_of(bench.peer, [bench.peer, *(() if bench.here else ("torch", "transformers"))])
    about = {"setting": bench.setting, "threads": on.threads, "machine": hardware(), "versions": used}
    partial = output.with_name(f"{output.stem}-{key.replace(', ', '-')}.partial.json")
    found = _kept(partial, about)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        given: tuple[Path, ...] = ()
        if bench.prepare is not None:
            say(f"{name}: prepare")
            _alone(where, bench.prepare, Path(folder))
            given = (Path(folder),)
        for number in range(rounds):
            if number == len(found):
                found.append({})
            figures = found[number]
            for part in bench.parts:
                if part in figures:
                    continue
                if number and part in bench.once:
                    figures[part] = found[0][part]
                    continue
                say(f"{name}: round {number + 1} of {rounds}, {part}")
                named = {"seed": number} if bench.seeded else {}
                figures[part] = _alone(where, bench.run, part, on, *given, **named)
                files.write_text(partial, json.dumps({"about": about, "rounds": found}) + "\n")
    found = found[:rounds]
    ratios = [bench.ratios(figures) for figures in found]
    middle: Callable[..., float] = mean if bench.seeded else median
    asked = (f" --rounds {rounds}" if rounds != ROUNDS else "") + ("" if bench.threads else f" --threads {on.threads}")
    row = {
        **about,
        "figures": {part: _middles([figures[part] for figures in found], middle) for part in bench.parts},
        "ratios": _middles(ratios, middle),
        "spread": {key: [min(r[key] for r in ratios), max(r[key] for r in ratios)] for key in ratios[0]},
        "bars": {key: {"at_most": most, "aim": aim} for key, (most, aim) in bench.bars.items()},
        "rounds": rounds,
        "beside": bench.peer,
        "device": on.device,
        "precision": on.precision,
        "command": f"python -m hf_compress_evaluation.bench {name}{asked}{on.options}",
        "date": date.today().isoformat(),
    }
    if bench.seeded:
        row["seeds"] = [_middles([figures], mean) for figures in ratios]
    rows = files.read_json(output) if output.exists() else {}
    rows[key] = row
    files.write_text(output, json.dumps(dict(sorted(rows.items())), indent=1) + "\n")
    partial.unlink(missing_ok=True)
    return row


def _kept(partial: Path, about: Mapping[str, Any]) -> list[dict[str, Figures]]:
    """The rounds of a run of the same bench, here, that was killed, the last of them perhaps not whole."""
    read = files.read_json(partial) if partial.exists() else {}
    found: list[dict[str, Figures]] = read["rounds"] if read.get("about") == about else []
    return found


def _nothing(line: str) -> None:
    """Where nobody listens."""


def _alone(peer: str | None, function: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """What a function gives in a process of its own."""
    if peer is not None:
        return _peers.run_in(peer, function, *given, **named)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *given, **named).result()


def _middles(rows: list[Figures], middle: Callable[..., float]) -> dict[str, float]:
    return {key: float(f"{middle([row[key] for row in rows]):.4g}") for key in rows[0]}


def table(rows: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Header and a line for each ratio of each benchmark."""
    lines = [["benchmark", "ratio", "measured", "lowest to highest", "bar", "aim"]]
    for name, row in rows.items():
        for key, value in row["ratios"].items():
            bar = row["bars"].get(key)
            low, high = row["spread"][key]
            limits = ("", "") if bar is None else (f"≤ {bar['at_most']:g}", f"{bar['aim']:g}")
            lines.append([name, key, f"{value:.3g}", f"{low:.3g} … {high:.3g}", *limits])
    return lines


def markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """All rows as a section of the results page."""
    header, *lines = table(rows)
    text = [f"| {' | '.join(header)} |", "|" + "---|" * len(header), *(f"| {' | '.join(line)} |" for line in lines), ""]
    for name, row in rows.items():
        text += [f"- {name}: {row['setting']} `{row['command']}`, {row['date']}, {row['machine']}."]
    return "\n".join([*text, ""])


def beside(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Of the benches that compare with another package what has a bar, as a table of Markdown."""
    lines = ["| beside | figure | measured | bar | aim | again by |", "|---|---|--:|--:|--:|---|"]
    about = set()
    for row in rows.values():
        if not row.get("beside"):
            continue
        about.add(f"{row['date']}, {row['machine']}")
        other = f"{row['beside']} {row['versions'][row['beside']]}"
        for key, bar in row["bars"].items():
            figure = f"{row['ratios'][key]:.3g}"
            lines.append(f"| {other} | {key} | {figure} | ≤ {bar['at_most']:g} | {bar['aim']:g} | `{row['command']}` |")
    return "\n".join([*lines, "", "; ".join(sorted(about)) + ".", ""]) if about else ""
