"""What students of a teacher would be like, before hours are spent: size, latency, the cost of a step, what applies.

Each student is built by `shrink` and has its final shape, so sizes and latencies are those of the trained one. Quality
is not foretold.
"""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress import DistillCallback, onnx, registry, shrink
from hf_compress.errors import ConfigurationError, HfCompressError
from hf_compress.teachers.model import load_teacher

from . import latency, quality
from .bench import _steps
from .bench._machine import Machine

logger = logging.getLogger(__name__)

METHOD = "kd"
"""What a step is timed with: the least that distillation takes, teacher included."""
INT8 = 0.26
"""Bytes of an encoder's folder in int8 ONNX over those in float32: 18.3 MB of 70.3 MB, MiniLM of three layers."""
FLOAT = 4
BATCHES = (1, 32)
LENGTH, STEPS = 64, 3
_FIRST_TOKEN = 5
"""Ids below it are often special tokens."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One student, or the teacher."""

    layers: int
    parameters: int
    bytes: int
    """Of the tensors in its safetensors, tied ones once."""
    int8_bytes: int | None
    """Estimated; None: no graph is made of it, or it is no encoder, for which the ratio was measured."""
    latency: Mapping[int, float]
    """Seconds by rows of a batch, torch; empty where the model does not take tokens."""
    step_seconds: float | None = None
    """Of a training step with the teacher; None: not measured, as `note` says."""
    step_bytes: int | None = None
    """The most memory that training took over the two models; None also where the system does not tell."""
    no_export: str | None = None
    """Why no graph is made of it; None: one is."""
    over: tuple[str, ...] = ()
    """Limits that it is over: MB, ms."""
    note: str = ""

    @property
    def smallest(self) -> int:
        """Bytes of the smallest file that can be deployed."""
        return self.bytes if self.int8_bytes is None else self.int8_bytes


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Teacher and students, and what to choose."""

    teacher: Row
    students: tuple[Row, ...]
    task: str
    methods: tuple[str, ...]
    """Of the task, its default first."""
    default: tuple[str, ...]
    largest: int | None
    """Layers of the largest student within the limits; None: all are over one."""
    said: str
    conditions: Mapping[str, int]


def plan(
    teacher: str | Path,
    layers: Sequence[int],
    *,
    task: str = "text-classification",
    max_mb: float | None = None,
    max_ms: float | None = None,
    threads: int = 1,
    runs: int = 10,
    tell: Callable[[str], None] = logger.info,
) -> Plan:
    """Builds and measures the students, on the CPU.

    Args:
        teacher: hub id or folder.
        layers: of each student, kept evenly spread.
        task: whose methods are listed.
        max_mb: megabytes (10⁶ bytes) of the smallest file that can be deployed: int8 ONNX as estimated where a graph
            is made, else safetensors.
        max_ms: milliseconds of one call on one row, in torch.
        threads: inside an operator, while latency and the step are taken.
        runs: timed calls.
        tell: called with a line for each model that is begun.

    Raises:
        ConfigurationError: for numbers of layers that the teacher does not have, a teacher that `shrink` cannot take
            apart, or a limit that cannot be looked at.
        UnknownNameError: for an unknown task.
        ForeignFileError: if the teacher is malformed.
    """
    default = tuple(entry.name for entry in registry.default_for(task))
    applying = [entry.name for entry in registry.catalogue().methods.values() if task in entry.tasks]
    whole: Any = load_teacher(str(teacher))
    depth = whole.config.get_text_config().num_hidden_layers
    wanted = sorted(set(layers))
    if not wanted or wanted[0] < 1 or wanted[-1] > depth:
        raise ConfigurationError(f"--layers must lie in 1 … {depth}, the teacher's number, got {list(layers)}.")
    if max_ms is not None and not _takes_tokens(whole):
        raise ConfigurationError(
            f"--max-ms: {type(whole).__name__} takes {whole.main_input_name}, and calls are timed on tokens. Leave the "
            "limit out."
        )
    length = min(LENGTH, getattr(whole.config, "max_position_embeddings", None) or LENGTH)
    with latency.torch_threads(threads):
        tell(f"teacher: {depth} layers")
        first = _row(whole, depth, length, threads, runs)
        students = []
        for number in wanted:
            tell(f"student: {number} layers: size and latency")
            student = shrink(whole, layers=number)
            row = _row(student, number, length, threads, runs)
            tell(f"student: {number} layers: {STEPS} steps with the teacher")
            row = _with_step(row, student, whole, length, threads)
            students.append(replace(row, over=_over(row, max_mb, max_ms)))
            del student
            gc.collect()
    fitting = [row for row in students if not row.over]
    return Plan(
        teacher=first,
        students=tuple(students),
        task=task,
        methods=(*default, *sorted(set(applying) - set(default))),
        default=default,
        largest=fitting[-1].layers if fitting else None,
        said=_said(students, fitting, max_mb, max_ms),
        conditions={"length": length, "threads": threads, "runs": runs, "step_batch": BATCHES[-1]},
    )


def _takes_tokens(model: PreTrainedModel) -> bool:
    return bool(model.main_input_name == "input_ids")


def _row(model: PreTrainedModel, layers: int, length: int, threads: int, runs: int) -> Row:
    parameters, size = _weights(model)
    reason = None
    try:
        onnx.check(model)
    except HfCompressError as error:
        reason = str(error)
    encoder = reason is None and _takes_tokens(model) and not model.can_generate()
    times = {batch: _time(model, batch, length, threads, runs) for batch in BATCHES} if _takes_tokens(model) else {}
    return Row(
        layers=layers,
        parameters=parameters,
        bytes=size,
        int8_bytes=round(INT8 * FLOAT * parameters) if encoder else None,
        latency=times,
        no_export=reason,
    )


def _weights(model: PreTrainedModel) -> tuple[int, int]:
    """Numbers and bytes of what `save_pretrained` writes."""
    kept: dict[tuple[Any, ...], Tensor] = {}
    for tensor in model.state_dict().values():
        kept[tensor.data_ptr(), tensor.shape, tensor.stride()] = tensor
    return sum(tensor.numel() for tensor in kept.values()), sum(tensor.nbytes for tensor in kept.values())


def _ids(model: PreTrainedModel, rows: int, length: int) -> Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    draw = torch.Generator().manual_seed(0)
    return torch.randint(min(_FIRST_TOKEN, vocabulary - 1), vocabulary, (rows, length), generator=draw)


def _time(model: PreTrainedModel, batch: int, length: int, threads: int, runs: int) -> float:
    ids = _ids(model, batch, length)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with quality.evaluating(model):
        taken = latency.measure_all(
            {"it": lambda: model(**inputs)}, batch=batch, length=length, runs=runs, warmup=2, threads=threads
        )
    return taken["it"].median


def _with_step(row: Row, student: PreTrainedModel, teacher: PreTrainedModel, length: int, threads: int) -> Row:
    """The row with what a step costs: texts without labels, whose task loss would add next to nothing."""
    if not _takes_tokens(student):
        return replace(row, note=f"it takes {student.main_input_name}, and steps are taken on tokens")
    ids = _ids(student, STEPS * BATCHES[-1], length).tolist()
    rows = [{"input_ids": each, "attention_mask": [1] * length} for each in ids]
    callback = DistillCallback(teacher, METHOD)
    try:
        taken = _steps.train(
            student, rows, steps=STEPS, batch=BATCHES[-1], on=Machine(threads=threads), callbacks=[callback], warm=1
        )
    except HfCompressError as error:  # a head that the method does not fit
        return replace(row, note=str(error))
    finally:
        callback.detach()
    return replace(row, step_seconds=taken["seconds"], step_bytes=round(taken["megabytes"] * 2**20) or None)


def _over(row: Row, max_mb: float | None, max_ms: float | None) -> tuple[str, ...]:
    found = []
    if max_mb is not None and row.smallest > max_mb * 1e6:
        found.append("MB")
    if max_ms is not None and row.latency[1] > max_ms / 1e3:
        found.append("ms")
    return tuple(found)


def _said(students: Sequence[Row], fitting: Sequence[Row], max_mb: float | None, max_ms: float | None) -> str:
    limits = [f"{value:g} {unit}" for value, unit in ((max_mb, "MB"), (max_ms, "ms")) if value is not None]
    if not limits:
        return f"The largest student has {_described(students[-1])}; no limit was given (--max-mb, --max-ms)."
    if not fitting:
        return f"No student is within {' and '.join(limits)}: the smallest has {_described(students[0])}."
    return f"The largest student within {' and '.join(limits)} has {_described(fitting[-1])}."


def _described(row: Row) -> str:
    kind = "safetensors" if row.int8_bytes is None else "int8 ONNX, estimated"
    timed = f", {1e3 * row.latency[1]:.1f} ms for one row in torch" if row.latency else ""
    return f"{row.layers} layer{'s' * (row.layers > 1)} ({row.smallest / 1e6:.3g} MB of {kind}{timed})"


def as_json(found: Plan) -> str:
    """All of it; bytes and seconds."""
    return json.dumps(asdict(found), indent=1, allow_nan=False)


COLUMNS = ("model", "layers", "params", "MB", "MB int8", "ms b1", "ms b32", "step s", "step MB", "ONNX", "limits")


def rows(found: Plan) -> list[tuple[str, ...]]:
    """For a table: the teacher, then the students; what is over a limit is named in the last column."""
    limited = [("teacher", found.teacher, ""), *(("student", row, _marked(row)) for row in found.students)]
    return [
        (
            name,
            str(row.layers),
            f"{row.parameters / 1e6:,.2f} M",
            f"{row.bytes / 1e6:,.1f}",
            _cell(row.int8_bytes, 1e-6),
            *(_cell(row.latency.get(batch), 1e3) for batch in BATCHES),
            _cell(row.step_seconds, 1, 2),
            _cell(row.step_bytes, 1e-6, 0),
            "yes" if row.no_export is None else "no",
            mark,
        )
        for name, row, mark in limited
    ]


def _marked(row: Row) -> str:
    return f"over {', '.join(row.over)}" if row.over else ""


def _cell(value: float | None, factor: float, digits: int = 1) -> str:
    return "—" if value is None else f"{value * factor:,.{digits}f}"


def below(found: Plan) -> list[str]:
    """Lines under the table: what its words mean, what could not be found out, methods; last, what to choose."""
    at, notes = found.conditions, [(row.layers, row.note, row.no_export) for row in found.students]
    lines = [
        f"MB: 10⁶ bytes of safetensors; int8: estimated, {INT8} of float32. ms: torch, {at['length']} tokens, threads "
        f"{at['threads']}. step: {METHOD} with the teacher, {BATCHES[-1]} rows; its MB beside the two models. On a CPU."
    ]
    for why in dict.fromkeys(note for _, note, _ in notes if note):
        lines.append(f"step not measured: {why}")
    for why in dict.fromkeys(reason for _, _, reason in notes if reason):
        lines.append(f"no ONNX: {why}")
    others = [name for name in found.methods if name not in found.default]
    lines.append(f"methods for {found.task}: {', '.join(found.default) or 'no default'}; also {', '.join(others)}")
    return [*lines, found.said]
