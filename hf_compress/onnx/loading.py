"""An exported folder, checked and opened as what it is: a plain model, or one that generates.

ONNX Runtime loads flipped bytes without a word; here a file that differs from its record is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig

from hf_compress import facts, files, foreign
from hf_compress.errors import ConfigurationError, ForeignFileError, UnknownNameError

from . import graph as graphs
from .models import OnnxCausalLM, OnnxModel, OnnxSeq2SeqLM, OnnxWhisper
from .runtime import OnnxGraph, Shapes, open_session
from .tracing import DECODER, ENCODER

_RECORD_LEVELS = 3
"""How many folders above a variant are searched for the record that holds its hashes."""


def load_onnx(
    folder: Path,
    *,
    graph: str | None = None,
    provider: str = "auto",
    threads: int | None = None,
    shapes: Shapes | None = None,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> OnnxModel | OnnxCausalLM | OnnxSeq2SeqLM:
    """Opens an exported folder on ONNX Runtime.

    Args:
        folder: a variant (`student/onnx_int8`) or a student folder, then its `onnx/`.
        graph: which of several, by name, e.g. "encoder_model"; None: the folder's one model, or encoder and decoder.
        provider: "auto" (CUDA where ONNX Runtime and torch both have it, else the CPU), "cpu", "cuda", "tensorrt", or
            a provider's full name. What was asked for runs, or this raises.
        threads: within one operation on the CPU; None takes `torch.get_num_threads()`, because ONNX Runtime's own
            default is every core of the machine.
        shapes: for TensorRT, {"batch_size": (1, 8, 32), "sequence_length": (1, 64, 512)}: least, usual and largest
            sizes, for which one engine is built and kept; None: an engine for each new size.
        options: of the provider, as ONNX Runtime names them, e.g. {"enable_cuda_graph": "1"}, which replays a graph
            of one fixed shape, or {"trt_fp16_enable": True}.

    Returns:
        A model that pipelines take, and `generate` where the graph keeps a cache.

    Raises:
        ForeignFileError: if a file is missing, is not ONNX, points out of its folder, or has other bytes than when it
            was recorded in the student's compression.json.
        UnknownNameError: if the folder holds no such graph; ConfigurationError: if it holds several and none is named.
        ProviderError: if another provider than the one asked for would run, or two builds of onnxruntime are installed.
        ConfigurationError: if onnxruntime is not installed.
    """
    folder = variant_of(Path(folder))
    check_hashes(folder)
    model = open_folder(folder, graph=graph, provider=provider, threads=threads, shapes=shapes, options=options)
    model.name_or_path = folder.name
    return model


def open_folder(
    folder: Path,
    *,
    graph: str | None = None,
    config: PreTrainedConfig | None = None,
    **running: Any,
) -> OnnxModel | OnnxCausalLM | OnnxSeq2SeqLM:
    """As `load_onnx`, of exactly this folder, without a look at its record, and with `config` if it is given.

    `running` is of `open_session`: provider, threads, shapes, options.
    """
    names = [path.stem for path in graphs.files_of(folder)]

    def opened(name: str) -> OnnxGraph:
        path = folder / f"{name}.onnx"
        graphs.check_external(path)
        return OnnxGraph(open_session(path, **running))

    config = _config(folder) if config is None else config
    if graph is None and {ENCODER, DECODER} <= set(names):
        kind = OnnxWhisper if config.model_type == "whisper" else OnnxSeq2SeqLM
        return kind(opened(DECODER), opened(ENCODER), config, _generation_config(folder))
    if graph is None and len(names) > 1:
        raise ConfigurationError(
            f"{folder.name} holds the graphs {', '.join(names)}: name one, `load_onnx(folder, graph={names[0]!r})`."
        )
    if graph is not None and graph not in names:
        raise UnknownNameError("graph", graph, names)
    session = opened(graph or names[0])
    if any(name.startswith(graphs.PAST) for name in session.input_names) and graph is None:
        return OnnxCausalLM(session, config, _generation_config(folder))
    return OnnxModel(session, config)


def _config(folder: Path) -> PreTrainedConfig:
    """Of the model; a class of its own, whose code is not here, needs none: its labels and sizes are read as they are.

    Raises:
        ForeignFileError: if it is malformed.
    """
    path = folder / "config.json"
    if not path.is_file():  # a graph of others; it runs, and pipelines will ask for labels
        return PreTrainedConfig()
    foreign.check_config(path)
    values = files.read_json(path)
    if values.get("model_type") in CONFIG_MAPPING:
        found: PreTrainedConfig = foreign.config(folder, local_files_only=True)
        return found
    with foreign.refusing(folder, "as a model", "Export the student again."):
        return PreTrainedConfig.from_dict(values)


def _generation_config(folder: Path) -> GenerationConfig | None:
    if not (folder / "generation_config.json").is_file():
        return None
    with foreign.refusing(folder, "as a generation config", "Export the student again."):
        found: GenerationConfig = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return found


def variant_of(folder: Path) -> Path:
    """The folder itself if it holds a graph, else its `onnx/`.

    Raises:
        ForeignFileError: if neither does.
    """
    for candidate in (folder, folder / "onnx"):
        if graphs.files_of(candidate):
            return candidate
    raise ForeignFileError(folder, "holds no model.onnx and no onnx/model.onnx.", "Export the student first.")


def check_hashes(folder: Path) -> None:
    """Compares a variant's files with the record of the student folder around it, where there is one.

    Raises:
        ForeignFileError: for the first file that is missing or changed.
    """
    folder = folder.resolve()
    for student in folder.parents[:_RECORD_LEVELS]:
        if (student / facts.FILE).is_file():
            facts.check(student, f"{folder.relative_to(student).as_posix()}/")
            return
