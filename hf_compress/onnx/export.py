"""A student folder, or a model in memory, into a folder of ONNX graphs that were compared with it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from transformers import PretrainedConfig, PreTrainedModel

from hf_compress import facts, files, foreign
from hf_compress.errors import ConfigurationError, ForeignFileError, ParityError

from . import graph, runtime, tracing
from .folder import (
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
from .loading import open_folder
from .parity import TOLERANCE, Parity, check_parity, in_two_calls, parity_batches, shape_of, with_other_rounding

logger = logging.getLogger(__name__)

_AUTO_CLASSES = (
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForMaskedLM",
    "AutoModelForImageClassification",
    "AutoModelForAudioClassification",
    "AutoModelForCTC",
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
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
        ConfigurationError: if the model cannot be exported.
        ParityError: if the written graph does not give the model's numbers; an earlier export is kept.
    """
    folder = Path(folder)
    output = folder / "onnx" if output is None else Path(output)
    tell(progress, "load")
    model, processing_class = load_folder(folder)
    exported = export_model(model, processing_class, output, progress=progress)
    record(folder, exported)
    return exported


def check(model: PreTrainedModel) -> None:
    """What can be found out before a model is trained that `export_onnx` will get as a folder.

    Raises:
        ConfigurationError: if no graph is made of models of its class, or ONNX Runtime is missing.
    """
    runtime.check_installed()
    tracing.check_class(model)
    config = copy.copy(model.config)
    config.architectures = [type(model).__name__]
    _auto_class(config)


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
        ConfigurationError: if the model cannot be exported, or `output` holds other things.
        ParityError: if the written graph does not give the model's numbers; an earlier export is kept.
    """
    output = Path(output)
    check_output(output)
    clean = tracing.clean(model)
    tell(progress, "trace")
    traced = [tracing.trace(part) for part in tracing.parts(clean, processing_class)]
    with files.atomic_folder(output) as part:
        tell(progress, "write")
        graph.save_all({one.file: one.exported.program for one in traced}, part)
        write_companions(part, model, processing_class, traced)
        tell(progress, "parity")
        try:
            parity, how = prove(part, clean, processing_class)
        except ParityError as error:
            raise ParityError(f"{error} {kept(output)}") from error
    return measured_folder(output, [("parity_max_abs_diff", parity.max_abs_diff, "absolute", how)])


def prove(folder: Path, model: PreTrainedModel, processing_class: Any) -> tuple[Parity, dict[str, facts.Setting]]:
    """Compares every graph of a written folder with the clean model, and says over what.

    Raises:
        ParityError: if one does not give the model's numbers.
    """
    parts: list[tuple[str | None, PreTrainedModel]] = [*tracing.named_parts(model).items()] or [(None, model)]
    found, shapes = [], set[str]()
    for name, module in parts:
        batches = tuple(parity_batches(module, processing_class))
        loaded = open_folder(folder, graph=name, config=model.config, provider="cpu")
        call = partial(in_two_calls, cache_name=tracing.cache_name(model)) if loaded.can_generate() else _as_it_is
        rounded = partial(_rounded, call, module)
        found.append(check_parity(call(loaded), call(module), batches, rounded=rounded))
        shapes |= {"x".join(map(str, shape_of(batch))) for batch in batches}
    how: dict[str, facts.Setting] = {
        "shapes": list[facts.Setting](sorted(shapes)),
        "padding": ["left", "right"] if model.main_input_name == "input_ids" else [],
        "provider": loaded.provider,
        "tolerance": TOLERANCE,
    }
    if loaded.can_generate():
        how["calls"] = "half of the tokens, then the rest with the cache"
    if rounding := max(parity.rounding for parity in found):
        how["allowed_for_rounding"] = rounding
    return max(found, key=lambda parity: parity.max_abs_diff), how


def _as_it_is(model: Any) -> Any:
    return model


def _rounded(call: Callable[[Any], Any], model: PreTrainedModel) -> Any:
    return call(with_other_rounding(model))


def load_folder(folder: Path) -> tuple[PreTrainedModel, Any]:
    """The model of a folder, of the class that its config names, and its tokenizer or processor, or None.

    Raises:
        ForeignFileError: if something is malformed, or weights are missing.
        ConfigurationError: if no Auto class builds its architecture.
    """
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
