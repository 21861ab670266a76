"""Whether a model folder is what its record says: every recorded hash, and whether weights and graphs load.

All that is wrong is found, not the first alone, and nothing is written. What was measured is taken again by
`hf_compress_evaluation.remeasuring`, with findings of the same kind.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from . import facts, files
from .errors import ConfigurationError, ForeignFileError, HfCompressError, ProviderError

ADAPTER = "adapter_config.json"
State = Literal["holds", "fails", "not checked"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was checked, or that was not and why."""

    kind: Literal["record", "hash", "load", "measurement"]
    what: str
    """A file by its place in the folder, or subject, variant and metric of a measurement."""
    state: State
    recorded: float | str | None = None
    found: float | str | None = None
    """In the unit of the record; of a file the sha256, None where it is missing."""
    unit: str = ""
    note: str = ""


def verify(folder: Path) -> tuple[Finding, ...]:
    """Compares a folder with its record and loads what is in it.

    Raises:
        ForeignFileError: if the record is malformed.
    """
    record = facts.load(folder)
    empty = not record.evidence and not record.measurements
    nothing = Finding(kind="record", what=facts.FILE, state="fails", note="records no file and no measurement")
    return (*([nothing] if empty else []), *hashes(folder), *unrecorded(folder), *_loaded(folder))


def hashes(folder: Path) -> tuple[Finding, ...]:
    """One finding for each file that the record names; it fails where the file is missing, changed or leads out."""
    return tuple(_hash(folder, entry) for entry in facts.load(folder).evidence)


def _hash(folder: Path, entry: facts.Evidence) -> Finding:
    found, note = None, "missing"
    try:
        path = files.inside(folder, entry.file)
        if files.is_file(path):
            found, size = files.sha256(path), path.stat().st_size
            note = f"changed: {size:,} bytes, {entry.bytes:,} were recorded"
    except ForeignFileError as error:
        note = error.problem
    same = found == entry.sha256
    return Finding(
        kind="hash",
        what=entry.file,
        state="holds" if same else "fails",
        recorded=entry.sha256,
        found=found,
        unit="sha256",
        note="" if same else note,
    )


def unrecorded(folder: Path) -> tuple[Finding, ...]:
    """The files of a folder that its record does not name, whose bytes it therefore says nothing of."""
    known = {entry.file for entry in facts.load(folder).evidence} | {facts.FILE}
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if files.is_file(path))
    note = "the record does not name it"
    return tuple(Finding(kind="hash", what=n, state="not checked", note=note) for n in names if n not in known)


def _loaded(folder: Path) -> Iterator[Finding]:
    graphs = sorted(folder.glob("*/*.onnx"))
    weights = sorted(folder.glob("*.safetensors"))
    if not graphs and not weights:
        yield Finding(kind="load", what="weights", state="fails", note="there are none, as safetensors or ONNX")
    if (folder / ADAPTER).is_file():
        yield Finding(kind="load", what="adapter", state="not checked", note="its base model lies elsewhere")
    elif weights:
        yield _torch(folder)
    for path in graphs:
        yield _graph(path, path.relative_to(folder).as_posix())


def _torch(folder: Path) -> Finding:
    from .onnx.export import load_folder

    what = "torch weights"
    try:
        model, _ = load_folder(folder)
    except ConfigurationError as error:  # a class that only its author's script knows
        return Finding(kind="load", what=what, state="not checked", note=str(error))
    except HfCompressError as error:
        return Finding(kind="load", what=what, state="fails", note=str(error))
    tensors = model.state_dict().items()
    if broken := [name for name, tensor in tensors if tensor.is_floating_point() and not tensor.isfinite().all()]:
        note = f"NaN or infinity in {len(broken)} of them, e.g. {broken[0]}"
        return Finding(kind="load", what=what, state="fails", note=note)
    return Finding(kind="load", what=what, state="holds", note=type(model).__name__)


def _graph(path: Path, what: str) -> Finding:
    from .onnx import graph, runtime

    try:
        graph.check_external(path)
        runtime.open_session(path, provider="cpu")
    except (ConfigurationError, ProviderError) as error:  # ONNX Runtime is missing, or installed twice
        return Finding(kind="load", what=what, state="not checked", note=str(error))
    except HfCompressError as error:
        return Finding(kind="load", what=what, state="fails", note=str(error))
    return Finding(kind="load", what=what, state="holds")


def failing(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Those that do not hold."""
    return tuple(each for each in findings if each.state == "fails")


def as_json(findings: Iterable[Finding]) -> str:
    """All findings, and whether what was checked holds."""
    every = tuple(findings)
    values = {"holds": not failing(every), "findings": [asdict(each) for each in every]}
    return json.dumps(values, indent=1, allow_nan=False)


def rows(findings: Iterable[Finding]) -> list[tuple[str, ...]]:
    """What was checked as (what, kind, recorded, found, state, note), what fails first."""
    checked = [each for each in findings if each.state != "not checked"]
    return [
        (each.what, each.kind, _shown(each.recorded, each.unit), _shown(each.found, each.unit), each.state, each.note)
        for each in sorted(checked, key=lambda each: each.state != "fails")
    ]


def not_checked(findings: Iterable[Finding]) -> list[str]:
    """A line for each reason why something was not checked, with all that it holds for."""
    reasons: dict[str, list[str]] = {}
    for each in findings:
        if each.state == "not checked":
            reasons.setdefault(each.note, []).append(each.what)
    return [f"not checked, {why}: {', '.join(what)}" for why, what in reasons.items()]


def summary(findings: Iterable[Finding]) -> str:
    """One sentence."""
    every = tuple(findings)
    checked = [each for each in every if each.state != "not checked"]
    if not (faults := failing(every)):
        return f"All {len(checked)} checks hold, {len(every) - len(checked)} could not be made."
    return f"{len(faults)} of {len(checked)} checks fail: {', '.join(f'{each.what} ({each.kind})' for each in faults)}."


def _shown(value: float | str | None, unit: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value[:12] if unit == "sha256" else value
    if unit in ("bytes", "count"):
        return f"{value:,.0f}"
    return f"{1000 * value:.2f} ms" if unit == "seconds" else f"{value:.4f}"
