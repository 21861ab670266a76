"""Dynamic int8 of a saved export, behind a gate on data."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from . import facts, files, foreign, onnx_graph
from .errors import ConfigurationError, GateError
from .onnx_folder import Exported, Progress, check_output, kept, load_processing, measured_folder, record, tell
from .onnx_parity import Inputs
from .onnx_runtime import OnnxModel, load_onnx, open_session

logger = logging.getLogger(__name__)

Row = str | tuple[str, str] | Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What 8 bits may cost, and the data on which it is measured."""

    features: Sequence[Row]
    """Texts, pairs of texts, or rows that hold the model's inputs by name."""
    labels: Sequence[int] | None = None
    """One class per row; None: agreement alone decides."""
    max_drop: float = 0.01
    """Of accuracy, as a fraction: 0.01 is one point."""
    min_agreement: float = 0.95
    """Fraction of decisions (rows, real tokens, span ends) that equal those of the float32 graph. MiniLM: 0.987."""
    batch_size: int = 32

    def __post_init__(self) -> None:
        if not len(self.features):
            raise ConfigurationError("Gate: no features, so nothing would be measured. Give rows of held-out data.")
        if self.labels is not None and len(self.labels) != len(self.features):
            raise ConfigurationError(f"Gate: {len(self.features)} features and {len(self.labels)} labels; one per row.")
        if not (0 <= self.max_drop <= 1 and 0 <= self.min_agreement <= 1 and self.batch_size > 0):
            raise ConfigurationError(
                f"Gate: max_drop={self.max_drop} and min_agreement={self.min_agreement} are fractions, "
                f"batch_size={self.batch_size} is at least 1."
            )


def quantize_onnx(
    folder: Path,
    *,
    gate: Gate | None,
    source: str = "onnx",
    output: str = "onnx-int8",
    progress: Progress | None = None,
) -> Exported:
    """Quantises a saved export to dynamic int8 per channel, without tracing again.

    A weight that is both embedding and head stays float32: in int8 it would be dequantised over the whole vocabulary
    on every call, 20 times slower.

    Args:
        folder: the student folder.
        gate: what it may cost; None, which has to be written out, measures nothing and says so in a warning.
        source: the float32 variant's folder in `folder`.
        output: the folder to write.
        progress: called with the name of each stage as it begins.

    Raises:
        GateError: if the gate is missed; an earlier int8 folder is kept.
        ConfigurationError: for a causal LM (plain int8 wrecks gated MLPs), or where a gate has no classes to compare.
        ForeignFileError: if the source is missing or has changed since it was recorded.
    """
    origin, target = Path(folder) / source, Path(folder) / output
    check_output(target)
    fp32 = load_onnx(origin, provider="cpu")
    _check_quantizable(fp32.config, gate)
    processing_class = load_processing(origin)
    if gate is None:
        logger.warning("%s: quantised without a gate; how far int8 is from float32 was not measured.", output)
    tell(progress, "quantise")
    program = _quantize(origin / onnx_graph.MODEL)
    with files.atomic_folder(target) as part:
        onnx_graph.save(program, part)
        for path in origin.iterdir():
            if path.is_file() and not path.name.startswith(onnx_graph.MODEL):
                shutil.copyfile(path, part / path.name)
        int8 = OnnxModel(open_session(part / onnx_graph.MODEL, provider="cpu"), fp32.config)
        measured = []
        if gate is not None:
            tell(progress, "gate")
            measured = _check_gate(gate, fp32, int8, processing_class, target)
    exported = measured_folder(target, measured)
    record(Path(folder), exported)
    return exported


def _check_quantizable(config: PretrainedConfig | None, gate: Gate | None) -> None:
    name = (getattr(config, "architectures", None) or [""])[0]
    if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ConfigurationError(
            f"{name}: dynamic int8 wrecks causal language models (outliers before the last projection of a gated MLP); "
            "they need weight-only blocks, which come with the deployment work. Keep the float32 export."
        )
    if gate is not None and getattr(config, "problem_type", None) in ("regression", "multi_label_classification"):
        raise ConfigurationError(
            f"Gate: it compares one class per row, and problem_type is {getattr(config, 'problem_type', None)}. "
            "Evaluate both variants on your metric, and pass gate=None."
        )


def _quantize(path: Path) -> onnx_ir.Model:
    from transformers.exporters import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer  # needs onnxruntime

    program = onnx_ir.load(str(path))
    kinds = ["MatMul", "Gemm"] if onnx_graph.has_tied_head(program) else None
    config = OnnxRuntimeDynamicConfig(per_channel=True, op_types_to_quantize=kinds)
    with _without_advice():
        quantized = OnnxRuntimeQuantizer(config).quantize(program, {}, "onnx")
    onnx_graph.strip_metadata(quantized)
    return quantized


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


def _check_gate(
    gate: Gate, fp32: OnnxModel, int8: OnnxModel, processing_class: Any, target: Path
) -> list[tuple[str, float, str, dict[str, facts.Setting]]]:
    pairs = [
        (_decisions(fp32(**inputs), inputs, -1), _decisions(int8(**inputs), inputs, -2))
        for inputs in _gate_batches(gate, fp32, processing_class)
    ]
    expected, found = (torch.cat(side) for side in zip(*pairs, strict=True))
    agreement = (expected == found).double().mean().item()
    how: dict[str, facts.Setting] = {"rows": len(gate.features), "fingerprint": facts.fingerprint(gate.features)}
    how |= {"decisions": len(expected), "provider": int8.provider}
    measured = [("agreement_with_fp32", agreement, "fraction", how)]
    drop = None
    if gate.labels is not None:
        drop = _accuracy(expected, gate.labels) - _accuracy(found, gate.labels)
        measured.append(("accuracy_drop", drop, "fraction", how))
    if agreement < gate.min_agreement or (drop is not None and drop > gate.max_drop):
        lost = "an unmeasured part" if drop is None else f"{drop:.4f}"
        raise GateError(
            f"int8 decides like float32 in {agreement:.4f} of {len(expected)} cases (at least {gate.min_agreement}) "
            f"and loses {lost} of accuracy (at most {gate.max_drop}) "
            f"on {len(gate.features)} rows. {kept(target)} Use the float32 export, or a gate that allows it."
        )
    return measured


def _accuracy(decisions: Tensor, labels: Sequence[int]) -> float:
    if decisions.shape != (len(labels),):
        raise ConfigurationError(
            f"Gate: {len(labels)} labels and {len(decisions)} decisions; labels are for models that decide once per "
            "row. Leave them out: agreement alone decides."
        )
    return (decisions == torch.as_tensor(list(labels))).double().mean().item()


def _decisions(outputs: Mapping[str, Tensor], inputs: Inputs, broken: int) -> Tensor:
    """(decision,) classes of the rows or real tokens, or positions of span ends; `broken` at NaN."""
    real = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
    found = []
    for name in ("logits", "start_logits", "end_logits"):
        if (logits := outputs.get(name)) is None:
            continue
        if logits.shape[-1] == 1 and name == "logits":
            raise ConfigurationError("Gate: one logit per row is a regression, not a choice. Pass gate=None.")
        if real is not None and name != "logits":
            logits = logits.masked_fill(~real, -math.inf)
        chosen = logits.argmax(-1).masked_fill(logits.isnan().any(-1), broken)
        found.append(chosen[real] if real is not None and chosen.shape == real.shape else chosen.flatten())
    if not found:
        raise ConfigurationError(
            f"Gate: it compares classes, and the graph gives {', '.join(outputs)}. Evaluate both variants on your "
            "metric, and pass gate=None."
        )
    return torch.cat(found)


def _gate_batches(gate: Gate, model: OnnxModel, processing_class: Any) -> Iterator[Inputs]:
    for start in range(0, len(gate.features), gate.batch_size):
        rows = list(gate.features[start : start + gate.batch_size])
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        if not isinstance(rows[0], Mapping):
            if not callable(tokenizer):
                raise ConfigurationError("Gate: texts need a tokenizer beside the export. Give rows of input tensors.")
            with foreign.encoding(tokenizer):
                inputs = tokenizer(rows, padding=True, truncation=True, return_tensors="pt")
        else:
            columns = [
                {name: row[name] for name in model.input_names if name in row}
                for row in rows
                if isinstance(row, Mapping)
            ]
            if "input_ids" in columns[0] and hasattr(tokenizer, "pad"):
                inputs = tokenizer.pad(columns, return_tensors="pt")
            else:
                inputs = {name: torch.stack([torch.as_tensor(row[name]) for row in columns]) for name in columns[0]}
        yield {name: inputs[name] for name in model.input_names if name in inputs}
