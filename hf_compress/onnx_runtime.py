"""An exported folder, checked and running: `load_onnx` opens the session, `OnnxModel` is called like the model.

ONNX Runtime falls back to the CPU with a log line when a provider cannot be had, and loads flipped bytes without a
word. Both are errors here.
"""

from __future__ import annotations

from importlib import metadata, util
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.exporters.metadata import ExportMetadata
from transformers.modeling_outputs import ModelOutput

from . import facts, foreign, onnx_graph
from .errors import ConfigurationError, ForeignFileError, ProviderError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_PROVIDERS = {"cpu": CPU, "cuda": CUDA, "tensorrt": "TensorrtExecutionProvider"}
_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(bool)": torch.bool,
}
_RECORD_LEVELS = 3
"""How many folders above a variant are searched for the record that holds its hashes."""


class OnnxModel:
    """An ONNX session called like the torch model that it came from; pipelines of transformers take it as a model.

    Inputs are tensors by name on any device, of any integer or float type; they are cast to what the graph takes.
    Left out: `attention_mask` counts as all ones and `token_type_ids` as zeros, as in torch; anything else missing
    raises. An input that the graph lacks raises, unless it says nothing (None, or a flag set to False).
    """

    generation_config = None

    def __init__(self, session: Any, config: PretrainedConfig | None = None) -> None:
        """Wraps an `onnxruntime.InferenceSession`; `config` is what pipelines read labels from."""
        from transformers.exporters.runners.runner_onnx import OnnxModelRunner

        self.session, self.config = session, config
        self.provider: str = session.get_providers()[0]
        self.name_or_path = ""
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

    def to(self, *args: object, **kwargs: object) -> Self:
        """Itself: a session stays where it was opened, and inputs are brought to it."""
        return self

    def eval(self) -> Self:
        """Itself: a graph has no training mode."""
        return self

    def can_generate(self) -> bool:
        """False: the graph keeps no cache."""
        return False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **inputs: Any,
    ) -> ModelOutput:
        """Runs the graph.

        Args:
            input_ids: (batch, time).
            attention_mask: (batch, time), 1 where a token is real.
            token_type_ids: (batch, time).
            pixel_values: (batch, channels, height, width).
            inputs: what else the graph takes, by name.

        Returns:
            The graph's outputs by name, e.g. `logits`, on the session's device.

        Raises:
            ConfigurationError: if an input is missing, or is not one of the graph's.
        """
        inputs |= {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "pixel_values": pixel_values,
        }
        output = ModelOutput()
        for given, value in self._runner(**self._reconcile(inputs)).items():
            name = given.removeprefix("output.")
            output[name] = value
        return output

    __call__ = forward

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


def load_onnx(folder: Path, *, provider: str = "auto", threads: int | None = None) -> OnnxModel:
    """Opens an exported folder on ONNX Runtime.

    Args:
        folder: a variant (`student/onnx-int8`) or a student folder, then its `onnx/`.
        provider: "auto" (CUDA where ONNX Runtime and torch both have it, else the CPU), "cpu", "cuda", or a provider's
            full name. What was asked for runs, or this raises.
        threads: within one operation on the CPU; None takes `torch.get_num_threads()`, because ONNX Runtime's own
            default is every core of the machine.

    Raises:
        ForeignFileError: if a file is missing, is not ONNX, points out of its folder, or has other bytes than when it
            was recorded in the student's compression.json.
        ProviderError: if another provider than the one asked for would run, or two builds of onnxruntime are installed.
        ConfigurationError: if onnxruntime is not installed.
    """
    folder = _variant(Path(folder))
    check_hashes(folder)
    onnx_graph.check_external(folder / onnx_graph.MODEL)
    config = foreign.config(folder, local_files_only=True) if (folder / "config.json").is_file() else None
    model = OnnxModel(open_session(folder / onnx_graph.MODEL, provider=provider, threads=threads), config)
    model.name_or_path = folder.name
    return model


def _variant(folder: Path) -> Path:
    for candidate in (folder, folder / "onnx"):
        if (candidate / onnx_graph.MODEL).is_file():
            return candidate
    raise ForeignFileError(
        folder, f"holds no {onnx_graph.MODEL} and no onnx/{onnx_graph.MODEL}.", "Export the student first."
    )


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


def open_session(path: Path, *, provider: str = "auto", threads: int | None = None) -> Any:
    """An `onnxruntime.InferenceSession` on exactly the provider that was asked for; see `load_onnx`."""
    if util.find_spec("onnxruntime") is None:
        raise ConfigurationError(
            'onnxruntime is not installed. Run `pip install "hf-compress[cpu]"`, or "hf-compress[gpu]" for CUDA.'
        )
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
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    if wanted == CPU:  # the fusion is slower than what it replaces: 26.3 against 23.1 ms, MiniLM-L6, 1 x 128, 1 thread
        options.add_session_config_entry("optimization.disable_specified_optimizers", "SkipLayerNormFusion")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[wanted] + [CPU] * (wanted != CPU))
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
