"""A student folder into ONNX that is proven to give the same numbers, and into 8 bits behind a gate.

    export_onnx(student)                            # student/onnx/
    quantize_onnx(student, gate=Gate(features=texts, labels=labels))     # student/onnx-int8/
    model = load_onnx(student / "onnx-int8")        # called like the torch model, or given to a pipeline

One folder per variant, readable by transformers' `ExportedModel` and by Optimum's `ORTModelFor*`. The graph is traced
in float32, eval mode and eager attention from a clean copy: eager leaves out the extra masking that sdpa adds to each
layer. A folder is written whole or not at all, and only after the written file gave the model's numbers.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.exporters import ExportedModel, OnnxConfig, OnnxExporter

from . import facts, files, foreign, onnx_graph
from .errors import ConfigurationError, ForeignFileError, ParityError
from .onnx_folder import (
    Exported,
    Progress,
    check_output,
    kept,
    load_processing,
    measured_folder,
    record,
    tell,
    write_companions,
)
from .onnx_int8 import Gate, quantize_onnx
from .onnx_parity import TOLERANCE, Inputs, Parity, check_parity, example, longest, parity_batches, shape_of
from .onnx_runtime import OnnxModel, load_onnx, open_session

__all__ = [
    "Exported",
    "Gate",
    "OnnxModel",
    "Parity",
    "check_parity",
    "export_model",
    "export_onnx",
    "load_onnx",
    "parity_batches",
    "quantize_onnx",
]

logger = logging.getLogger(__name__)

_TRACED = (2, 5)  # an axis of size 1 would be frozen in silence
_AXES = ("batch_size", "sequence_length")
_AUTO_CLASSES = (
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForMaskedLM",
    "AutoModelForImageClassification",
    "AutoModelForCausalLM",
    "AutoModel",
)


def export_onnx(folder: Path, *, output: Path | None = None, progress: Progress | None = None) -> Exported:
    """Exports a student folder to float32 ONNX, proves parity and records both in its compression.json.

    Args:
        folder: as `save_pretrained` left it, with safetensors; no code from it is run.
        output: the variant's folder, by default `folder/onnx`. Outside of `folder` nothing is recorded.
        progress: called with the name of each stage as it begins.

    Raises:
        ForeignFileError: if weights are missing, or are no safetensors.
        ConfigurationError: if the model cannot be exported as one plain graph.
        ParityError: if the written graph does not give the model's numbers; an earlier export is kept.
    """
    folder = Path(folder)
    output = folder / "onnx" if output is None else Path(output)
    tell(progress, "load")
    model, processing_class = _load(folder)
    exported = export_model(model, processing_class, output, progress=progress)
    record(folder, exported)
    return exported


def export_model(
    model: PreTrainedModel, processing_class: Any, output: Path, *, progress: Progress | None = None
) -> Exported:
    """Exports a model in memory; the model itself is left as it is, mode, dtype and device included.

    Args:
        model: without hooks; what hangs under `model.distiller` is left out.
        processing_class: the tokenizer or processor, saved beside the graph; None if there is none.
        output: the variant's folder; replaced if it holds an earlier export.
        progress: called with the name of each stage as it begins.

    Raises:
        ConfigurationError: if the model cannot be exported as one plain graph, or `output` holds other things.
        ParityError: if the written graph does not give the model's numbers; an earlier export is kept.
    """
    output = Path(output)
    check_output(output)
    clean = _clean(model)
    batches = tuple(parity_batches(clean, processing_class))
    tell(progress, "trace")
    traced = _trace(clean, example(clean, processing_class, *_TRACED, side="right"))
    with files.atomic_folder(output) as part:
        tell(progress, "write")
        onnx_graph.save(traced.program, part)
        write_companions(part, model, processing_class, traced)
        tell(progress, "parity")
        session = open_session(part / onnx_graph.MODEL, provider="cpu")
        try:
            parity = check_parity(OnnxModel(session), clean, batches)
        except ParityError as error:
            raise ParityError(f"{error} {kept(output)}") from error
    shapes = sorted({"x".join(map(str, shape_of(batch))) for batch in batches})
    how: dict[str, facts.Setting] = {
        "shapes": list[facts.Setting](shapes),
        "padding": ["left", "right"] if clean.main_input_name == "input_ids" else [],
        "provider": session.get_providers()[0],
        "tolerance": TOLERANCE,
    }
    return measured_folder(output, [("parity_max_abs_diff", parity.max_abs_diff, "absolute", how)])


def _load(folder: Path) -> tuple[PreTrainedModel, Any]:
    auto = _auto_class(foreign.config(folder, local_files_only=True))
    with foreign.loading(folder, "with safetensors weights", "Save the student with `save_pretrained`."):
        model, info = auto.from_pretrained(folder, local_files_only=True, output_loading_info=True, **foreign.SAFE)
    if lacking := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        raise ForeignFileError(
            folder,
            f"lacks {len(lacking)} weights of {type(model).__name__} or has them in another shape, e.g. "
            f"{', '.join(lacking[:3])}; they would be random numbers.",
            "Save the student with `save_pretrained`, or mend `architectures` in its config.json.",
        )
    if spare := sorted(key for key in info["unexpected_keys"] if not key.startswith("distiller.")):
        logger.warning("%s: %d weights are not exported, %s has no place for them: %s.",
                       folder.name, len(spare), type(model).__name__, ", ".join(spare[:3]))  # fmt: skip
    return model, load_processing(folder)


def _auto_class(config: PretrainedConfig) -> Any:
    """The Auto class that builds `config.architectures[0]`; registered classes of third parties are found too."""
    names = config.architectures or []
    for auto in (getattr(transformers, name) for name in _AUTO_CLASSES):
        found = auto._model_mapping.get(type(config), ())
        if any(kind.__name__ in names[:1] for kind in (found if isinstance(found, tuple) else (found,))):
            return auto
    raise ConfigurationError(
        f"config.json names the architectures {names}, which none of {', '.join(_AUTO_CLASSES)} builds for "
        f"{config.model_type!r}. Register the class with its Auto class, or pass the model to `export_model`."
    )


def _clean(model: PreTrainedModel) -> PreTrainedModel:
    """A float32 copy on the CPU, in eval mode, with eager attention, and without what belongs to training."""
    _check_exportable(model)
    memo: dict[int, Any] = {}
    if (distiller := model._modules.get("distiller")) is not None:
        memo[id(distiller)] = nn.Identity()  # it may hold a teacher, which is not copied
    clean: PreTrainedModel = copy.deepcopy(model, memo)
    clean._modules.pop("distiller", None)
    for module in clean.modules():
        vars(module).pop("forward", None)  # what `_check_exportable` lets pass: wrappers that would be traced
    for parameter in clean.parameters():
        parameter.grad = None
    clean = clean.float().cpu().eval()
    clean.set_attn_implementation("eager")
    for flag in ("use_cache", "output_hidden_states", "output_attentions"):
        if getattr(clean.config, flag, False):
            setattr(clean.config, flag, False)
    return clean


def _check_exportable(model: PreTrainedModel) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ConfigurationError(
            f"{type(model).__name__} is no PreTrainedModel. Unwrap it: `.module` of a parallel wrapper, "
            "`merge_and_unload()` of a PEFT model."
        )
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise ConfigurationError(
                f"{name or type(model).__name__} carries forward hooks, which would be traced into the graph. Remove "
                "them (`callback.detach()`, or `remove()` of the handle), or save the model and export its folder."
            )
        if _replaced_forward(module):
            raise ConfigurationError(
                f"{name or type(model).__name__} has a forward of its own, set on the instance; a saved student would "
                "not have it. Move it into the class, or `del` it."
            )
    if getattr(model.config, "is_encoder_decoder", False) or type(model).__name__.endswith("ForMultipleChoice"):
        raise ConfigurationError(
            f"{type(model).__name__}: encoder-decoders and multiple choice do not fit one plain graph of (batch, time)."
        )
    if model.main_input_name not in ("input_ids", "pixel_values") and not hasattr(model, "example_inputs"):
        raise ConfigurationError(
            f"{type(model).__name__} takes {model.main_input_name}; exported are models of input_ids or pixel_values, "
            "and classes that have `example_inputs` and `export_axes`."
        )


def _replaced_forward(module: nn.Module) -> bool:
    """Whether an instance computes something else than its class; wrappers of accelerate do not."""
    members = vars(module)
    own = members.get("forward")
    if own is None or "_original_forward" in members or "_old_forward" in members:
        return False
    return getattr(own, "__func__", None) is not type(module).forward  # the exporter leaves the class's own there


def _trace(model: PreTrainedModel, inputs: Inputs) -> ExportedModel:
    """The graph with named axes and without metadata; `inputs` is copied, the exporter takes entries out of it."""
    plain = _AXES if model.main_input_name == "input_ids" else _AXES[:1]
    axes: Mapping[str, tuple[str, ...]] = getattr(model, "export_axes", None) or dict.fromkeys(inputs, plain)
    most = {axis: longest(model, None) for axis in _AXES[1:]}
    names = dict.fromkeys(axis for own in axes.values() for axis in own)
    dims = {axis: _dimension(axis, most.get(axis)) for axis in names}
    config = OnnxConfig(
        dynamic_shapes={name: {place: dims[axis] for place, axis in enumerate(axes[name])} for name in inputs}
    )
    with _quiet(), torch.no_grad():
        exported = OnnxExporter().export(model, dict(inputs), config)
    onnx_graph.strip_metadata(exported.program)
    named = {name: {place: axis for place, axis in enumerate(axes[name]) if "*" not in axis} for name in inputs}
    onnx_graph.name_axes(exported.program, named)
    return exported


def _dimension(axis: str, most: int | None) -> Any:
    """An axis that may vary; `320*frames` one that is a multiple."""
    factor, _, name = axis.rpartition("*")
    found = torch.export.Dim(name, min=1, max=most)
    return int(factor) * found if factor else found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what each export says about torch and not about the model: stages, absent torchvision, a deprecation."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            yield
    finally:
        registration.setLevel(level)
