"""A saved float32 export in half precision or in 8 or 4 bits, without tracing again, each behind a gate.

| precision | graphs without a cache | graphs with one |
|---|---|---|
| fp16 | weights and products; for a GPU and for the disk | the same, the cache too |
| int8 | products dynamic per channel, tables; then weight-only | weight-only blocks, tables; then tables float32 |
| int4 | weight-only blocks, tables 8 bit; then narrowing products 8 bit | the same |

The ways of a row are tried in turn. One that misses the gate is undone and said, and the next begins from float32.
Static int8, which needs rows to calibrate on, is not offered.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx_ir

from hf_compress import facts, files
from hf_compress.errors import ConfigurationError, GateError, UnknownNameError

from . import blocks, graph
from .folder import Exported, Progress, check_output, kept, load_processing, measured_folder, record, tell
from .gate import Gate, Measured, compare
from .loading import check_hashes, open_folder, variant_of
from .tracing import DECODER

logger = logging.getLogger(__name__)

PRECISIONS = ("fp16", "int8", "int4")


@dataclass(frozen=True, kw_only=True)
class Way:
    """One recipe for fewer bits."""

    said: str
    make: Callable[[onnx_ir.Model], onnx_ir.Model]
    """From a graph to another; may change its argument."""


def quantize_onnx(
    folder: Path,
    *,
    gate: Gate | None,
    precision: str = "int8",
    source: str = "onnx",
    output: str | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Writes a saved float32 export in fewer bits, if its quality holds.

    Args:
        folder: the student folder.
        gate: what it may cost; None, which has to be written out, measures nothing and says so in a warning.
        precision: one of `PRECISIONS`.
        source: the float32 variant's folder in `folder`.
        output: the folder to write; None: `onnx_` and the precision.
        progress: called with the name of each stage as it begins, and with each way that was undone.

    Raises:
        GateError: if every way misses the gate; an earlier folder is kept.
        ConfigurationError: if the graphs hold nothing to quantise, or rows and labels do not fit the model.
        ForeignFileError: if the source is missing or has changed since it was recorded.
    """
    if precision not in PRECISIONS:
        raise UnknownNameError("precision", precision, PRECISIONS)
    origin, target = variant_of(Path(folder) / source), Path(folder) / (output or f"onnx_{precision}")
    check_output(target)
    check_hashes(origin)
    full = open_folder(origin, provider="cpu") if gate is not None else None
    processing_class = load_processing(origin)
    if gate is None:
        logger.warning("%s: written without a gate; how far it is from float32 was not measured.", target.name)
    ways = _ways(precision, cached=any(map(graph.keeps_cache, graph.files_of(origin))))
    undone = []
    for number, way in enumerate(ways):
        tell(progress, f"quantise: {way.said}")
        try:
            with files.atomic_folder(target) as part:
                _write(origin, part, way)
                measured: Measured = []
                if gate is not None and full is not None:
                    tell(progress, "gate")
                    measured = compare(gate, full, open_folder(part, provider="cpu"), processing_class)
        except GateError as error:
            undone.append(f"{way.said}: {error}")
            tell(progress, f"undone, {'the next way follows' if number + 1 < len(ways) else 'no way is left'}: {error}")
            continue
        return _recorded(Path(folder), target, measured, way, undone)
    raise GateError(
        f"{precision} misses the gate. {' '.join(undone)} {kept(target)} Use the float32 export, or a gate that allows "
        "it."
    )


def _recorded(folder: Path, target: Path, measured: Measured, way: Way, undone: Sequence[str]) -> Exported:
    """With the way in the conditions of each figure."""
    how: dict[str, facts.Setting] = {"way": way.said, "undone": len(undone)}
    exported = measured_folder(target, [(name, value, unit, {**own, **how}) for name, value, unit, own in measured])
    record(folder, exported)
    return exported


def _write(origin: Path, target: Path, way: Way) -> None:
    made: dict[str, onnx_ir.Model] = {}
    for path in _in_order(origin):
        program = graph.load(path)
        before = _operators(program)
        with _without_advice():
            program = way.make(program)
        if _operators(program) == before:
            raise ConfigurationError(f"{path.name} holds no products or tables of constants: nothing to quantise.")
        graph.strip_metadata(program)
        made[path.name] = program
    graph.save_all(made, target)
    for path in origin.iterdir():
        if path.is_file() and ".onnx" not in path.name:
            shutil.copyfile(path, target / path.name)


def _in_order(folder: Path) -> list[Path]:
    """The decoder last, as it was written."""
    return sorted(graph.files_of(folder), key=lambda path: path.stem == DECODER)


def _operators(program: onnx_ir.Model) -> list[tuple[str, str]]:
    kinds = [(node.domain, node.op_type) for node in program.graph]
    weights = [("", str(value.dtype)) for value in program.graph.initializers.values()]
    return sorted(kinds + weights)


def _ways(precision: str, *, cached: bool) -> tuple[Way, ...]:
    if precision == "fp16":
        return (Way(said="float16", make=_half),)
    if precision == "int4":
        return (
            Way(said="4 bit blocks, tables 8 bit", make=lambda program: _weights(program, 4)),
            Way(
                said="4 bit blocks, narrowing products and tables 8 bit",
                make=lambda program: _weights(program, 4, gently=True),
            ),
        )
    in_blocks = Way(said="8 bit blocks, tables 8 bit", make=lambda program: _weights(program, 8))
    if cached:
        return in_blocks, Way(
            said="8 bit blocks, tables float32", make=lambda program: _weights(program, 8, tables=False)
        )
    return Way(said="dynamic per channel, tables 8 bit", make=_dynamic), in_blocks


def _weights(program: onnx_ir.Model, bits: int, *, gently: bool = False, tables: bool = True) -> onnx_ir.Model:
    if tables:
        blocks.quantize_tables(program)
    return blocks.quantize_products(program, bits, gently=gently)


def _dynamic(program: onnx_ir.Model) -> onnx_ir.Model:
    """A table that is a head too would be dequantised on every call, 20 times slower: it goes into blocks."""
    from transformers.exporters import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer  # needs onnxruntime

    blocks.quantize_tables(program, tied_only=True)
    config = OnnxRuntimeDynamicConfig(per_channel=True, op_types_to_quantize=["MatMul", "Gemm", "Gather"])
    found: onnx_ir.Model = OnnxRuntimeQuantizer(config).quantize(program, {}, "onnx")
    return found


def _half(program: onnx_ir.Model) -> onnx_ir.Model:
    """Inputs and outputs stay float32, but for the cache, which is handed back as it came."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    outer = [value.name for value in (*program.graph.inputs, *program.graph.outputs)]
    kept = [name for name in outer if name and not name.startswith((graph.PAST, graph.PRESENT))]
    proto = convert_float_to_float16(onnx_ir.to_proto(program), keep_io_types=kept, disable_shape_infer=True)
    return onnx_ir.from_proto(proto)


@contextmanager
def _without_advice() -> Iterator[None]:
    """Keeps onnxruntime's advice to optimise the graph first, which it gives for every graph, off the root logger."""

    def useful(line: logging.LogRecord) -> bool:
        return not line.getMessage().startswith("Please consider to run pre-processing")

    root = logging.getLogger()
    root.addFilter(useful)
    try:
        yield
    finally:
        root.removeFilter(useful)
