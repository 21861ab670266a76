"""ONNX Runtime: a session on exactly the provider that was asked for, called with torch tensors by name.

ONNX Runtime falls back to the CPU with a log line when a provider cannot be had. That is an error here.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from importlib import metadata, util
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx
import torch
from torch import Tensor
from transformers.exporters.metadata import ExportMetadata
from transformers.modeling_outputs import ModelOutput

from hf_compress import files
from hf_compress.errors import ConfigurationError, ForeignFileError, HfCompressError, ProviderError

from .graph import WEIGHTS

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
_PROVIDERS = {"cpu": CPU, "cuda": CUDA, "tensorrt": TENSORRT}
Shapes = Mapping[str, tuple[int, int, int]]
"""By the name of an axis, such as `batch_size`: its least, usual and largest size."""
_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(bool)": torch.bool,
}


class OnnxGraph:
    """An ONNX session called with torch tensors by name.

    Inputs are tensors by name on any device, of any integer or float type; they are cast to what the graph takes.
    Left out: `attention_mask` counts as all ones and `token_type_ids` as zeros, as in torch; anything else missing
    raises. An input that the graph lacks raises, unless it says nothing (None, or a flag set to False).
    """

    def __init__(self, session: Any) -> None:
        """Wraps an `onnxruntime.InferenceSession`."""
        from transformers.exporters.runners.runner_onnx import OnnxModelRunner

        self.session = session
        self.provider: str = session.get_providers()[0]
        specs = session.get_inputs()  # one that an output has the name of gets a prefix, which the runner takes off
        self._dtypes = {spec.name.removeprefix("input."): _DTYPES.get(spec.type, torch.float32) for spec in specs}
        outputs = session.get_outputs()
        self.dtype: torch.dtype = _DTYPES.get(outputs[0].type, torch.float32)
        by_name = torch.utils._pytree.tree_structure({spec.name: 0 for spec in outputs})
        spec = torch.utils._pytree.treespec_dumps(by_name)  # ours: the one in a stranger's export.json is not read
        self._runner = OnnxModelRunner(ExportMetadata(out_spec=spec), session)

    @property
    def device(self) -> torch.device:
        """Where the session runs."""
        return torch.device(self._runner.device)

    @property
    def input_names(self) -> tuple[str, ...]:
        """What the graph takes, in its order."""
        return tuple(self._dtypes)

    def __call__(self, **inputs: Any) -> ModelOutput:
        """Runs the graph on tensors by name; its outputs by name, on the session's device.

        Raises:
            ConfigurationError: if an input is missing, or is not one of the graph's.
        """
        output = ModelOutput()
        for given, value in self._runner(**self._reconcile(inputs)).items():
            output[given.removeprefix("output.")] = value
        return output

    def _reconcile(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        given = {name: value for name, value in inputs.items() if value is not None and value is not False}
        given.pop("return_dict", None)  # the output has both faces: names and places
        if unknown := [name for name in given if name not in self._dtypes]:
            raise ConfigurationError(
                f"{', '.join(unknown)}: the graph takes {', '.join(self._dtypes)} only, and leaving an input out would "
                "change the answer. Drop it yourself if it does not matter (a graph computes no loss from labels)."
            )
        ids = given.get("input_ids")
        if isinstance(ids, Tensor):
            defaults = {"attention_mask": torch.ones_like, "token_type_ids": torch.zeros_like}
            for name in defaults.keys() & self._dtypes.keys() - given.keys():
                given[name] = defaults[name](ids)
        if missing := self._dtypes.keys() - given.keys():
            raise ConfigurationError(
                f"{', '.join(sorted(missing))}: missing; the graph takes {', '.join(self._dtypes)}."
            )
        return {name: torch.as_tensor(given[name]).to(dtype) for name, dtype in self._dtypes.items()}


def open_session(
    path: Path,
    *,
    provider: str = "auto",
    threads: int | None = None,
    shapes: Shapes | None = None,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """An `onnxruntime.InferenceSession` on exactly the provider that was asked for; see `load_onnx`."""
    check_installed()
    installed = _one_distribution()
    import onnxruntime

    available = onnxruntime.get_available_providers()
    wanted = _PROVIDERS.get(provider.lower(), provider)
    if provider == "auto":
        wanted = CUDA if CUDA in available and torch.cuda.is_available() else CPU
    if wanted not in available:
        raise ProviderError(
            f"{wanted} was asked for, and {installed} has {', '.join(available)}. For CUDA: `pip uninstall {installed}`"
            ', then `pip install "hf-compress[gpu]"`. Or pass provider="auto" to take what there is.'
        )
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = threads or torch.get_num_threads()
    if wanted == CPU:  # the fusion is slower than what it replaces: 26.3 against 23.1 ms, MiniLM-L6, 1 x 128, 1 thread
        session_options.add_session_config_entry("optimization.disable_specified_optimizers", "SkipLayerNormFusion")
    try:
        providers = _with_fallbacks(wanted, path, shapes, options)
        session = onnxruntime.InferenceSession(str(path), session_options, providers=providers)
    except HfCompressError:
        raise
    except Exception as error:  # ONNX Runtime raises a type of its own per status code, without a common base
        raise ForeignFileError(
            path, f"does not load in ONNX Runtime ({error}).", "Export or fetch it again."
        ) from error
    if (active := session.get_providers()[0]) != wanted:
        raise ProviderError(
            f"{wanted} was asked for and {active} runs: {installed} could not load it, most often because the CUDA or "
            'cuDNN libraries are missing or of another major version. Mend them, or pass provider="cpu".'
        )
    return session


def _with_fallbacks(wanted: str, path: Path, shapes: Shapes | None, options: Mapping[str, Any]) -> list[Any]:
    """The provider, and those that take the nodes that it has no kernel for."""
    if wanted == CPU:
        return [CPU]
    if wanted != TENSORRT:
        return [(wanted, dict(options)) if options else wanted, CPU]
    return [(TENSORRT, {**_engines(path), **_profiles(path, shapes), **options}), CUDA, CPU]


def _engines(path: Path) -> dict[str, Any]:
    """Engines are built once for a graph and its weights: building takes minutes. They lie in the user's cache."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_compress" / "tensorrt"
    held = [path, *sorted(path.parent.glob(f"*.onnx{WEIGHTS}"))]  # an engine holds weights, also those beside a graph
    place = str(folder / hashlib.sha256("".join(map(files.sha256, held)).encode()).hexdigest()[:16])
    return {
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": place,
        "trt_timing_cache_enable": True,
        "trt_timing_cache_path": place,
    }


def _profiles(path: Path, shapes: Shapes | None) -> dict[str, str]:
    """TensorRT's least, usual and largest size of each input; without them it builds an engine for every new size.

    Raises:
        ConfigurationError: for a size that an input's axis is named for and `shapes` does not give.
    """
    if shapes is None:
        return {}
    said: dict[str, list[str]] = {
        "trt_profile_min_shapes": [],
        "trt_profile_opt_shapes": [],
        "trt_profile_max_shapes": [],
    }
    for value in onnx.load(str(path), load_external_data=False).graph.input:
        axes = [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        if missing := [axis for axis in axes if isinstance(axis, str) and axis not in shapes]:
            raise ConfigurationError(
                f"shapes: {value.name} has the axes {', '.join(map(str, axes))}, and {', '.join(missing)} has no "
                f"(least, usual, largest) size."
            )
        for place, lines in enumerate(said.values()):
            sizes = [shapes[axis][place] if isinstance(axis, str) else axis for axis in axes]
            lines.append(f"{value.name}:{'x'.join(map(str, sizes))}")
    return {name: ",".join(lines) for name, lines in said.items()}


def check_installed() -> None:
    """Refuses to go on without ONNX Runtime, with the line that installs it."""
    if util.find_spec("onnxruntime") is None:
        raise ConfigurationError(
            'onnxruntime is not installed. Run `pip install "hf-compress[cpu]"`, or "hf-compress[gpu]" for CUDA.'
        )


def _one_distribution() -> str:
    """The distribution that ships `onnxruntime`, refusing two: they overwrite each other's files."""
    found = sorted(set(metadata.packages_distributions().get("onnxruntime", ["onnxruntime"])))
    if len(found) > 1:
        raise ProviderError(
            f"{' and '.join(found)} are installed together; they share one folder, so CUDA disappears without a word. "
            f"Run `pip uninstall -y {' '.join(found)}`, then install one: "
            'pip install "hf-compress[cpu]" or "hf-compress[gpu]".'
        )
    return found[0]
