"""The folder of one exported variant: what lies in it, what it says of this machine (nothing), how it is recorded."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.exporters.base import EXPORT_MANIFEST_FILE, EXPORT_SCHEMA_VERSION

from hf_compress import facts, files, foreign
from hf_compress.errors import ConfigurationError

from .tracing import Traced

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A finished variant folder and what was measured of it."""

    folder: Path
    measurements: tuple[facts.Measurement, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of the variant, sorted."""
        return tuple(sorted(path for path in self.folder.rglob("*") if path.is_file()))

    @property
    def bytes(self) -> int:
        """Size on disk of all files of the variant."""
        return sum(path.stat().st_size for path in self.files)

    def value(self, metric: str) -> float:
        """The measured value of a metric, e.g. "parity_max_abs_diff"; KeyError if it was not measured."""
        return {measurement.metric: measurement.value for measurement in self.measurements}[metric]


def load_processing(folder: Path) -> Any:
    """The tokenizer or processor of a folder, or None."""
    text = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    image = any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json"))
    if not (text or image):
        return None
    auto = transformers.AutoTokenizer if not image else transformers.AutoProcessor
    if image and not text:
        auto = transformers.AutoImageProcessor
    with foreign.refusing(folder, "as a tokenizer or processor", "Save it again with `save_pretrained`."):
        if text:
            foreign.check_tokenizer(folder, local_files_only=True)
        return auto.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def check_output(output: Path) -> None:
    """An existing folder is replaced as a whole, so it has to be an export."""
    if output.exists() and not (output / EXPORT_MANIFEST_FILE).is_file() and (
        not output.is_dir() or any(output.iterdir())
    ):  # fmt: skip
        raise ConfigurationError(
            f"{output} exists and is no earlier export (it has no {EXPORT_MANIFEST_FILE}); writing there would delete "
            "it. Choose another folder."
        )


def kept(output: Path) -> str:
    return f"The earlier export in {output} was kept." if output.exists() else f"{output} was not written."


def write_companions(folder: Path, model: PreTrainedModel, processing_class: Any, traced: Sequence[Traced]) -> None:
    """Configs, tokenizer or processor, and the manifest that `ExportedModel` reads, without a word on this machine."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = torch.float32
    config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    if processing_class is not None:
        processing_class.save_pretrained(folder)
    manifest = {
        "schema_version": EXPORT_SCHEMA_VERSION,
        "export_format": str(traced[0].exported.export_format),
        "components": {
            one.name: {"file": one.file, "metadata": dataclasses.asdict(one.exported.components["model"].metadata)}
            for one in traced
        },
    }
    files.write_text(folder / EXPORT_MANIFEST_FILE, json.dumps(manifest, indent=2) + "\n")
    for path in folder.glob("*config.json"):
        settings = files.read_json(path)
        _portable(settings)
        _refuse_paths(settings, path.name)
        files.write_text(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def _portable(settings: dict[str, Any]) -> None:
    """Drops where things were loaded from, and says what transformers 4.57 (Optimum) reads under its own names."""
    for key in ("_name_or_path", "name_or_path", "is_local", "local_files_only"):
        settings.pop(key, None)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    rope = settings.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        settings["rope_theta"] = rope["rope_theta"]  # else 10000 is assumed there, in silence


def _refuse_paths(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, child in value.items():
            _refuse_paths(child, f"{where}: {key}")
    elif isinstance(value, list):
        for child in value:
            _refuse_paths(child, where)
    elif isinstance(value, str) and "\n" not in value and Path(value).is_absolute() and len(Path(value).parts) > 2:
        raise ConfigurationError(f"{where} is an absolute path ({value!r}). Set it to something that holds anywhere.")


def measured_folder(output: Path, values: Iterable[tuple[str, float, str, dict[str, facts.Setting]]]) -> Exported:
    measurements = [
        facts.Measurement(subject="student", variant=output.name, metric=metric, value=value, unit=unit, how=how)
        for metric, value, unit, how in values
    ]
    folder = Exported(folder=output, measurements=())
    size = facts.Measurement(
        subject="student",
        variant=output.name,
        metric="bytes",
        value=folder.bytes,
        unit="bytes",
        how={"files": len(folder.files)},
    )
    return Exported(folder=output, measurements=(*measurements, size))


def record(student: Path, exported: Exported) -> None:
    if exported.folder.resolve().is_relative_to(student.resolve()):
        facts.append(student, *exported.measurements)
        facts.register(student, exported.files)


def tell(progress: Progress | None, stage: str) -> None:
    if progress is not None:
        progress(stage)
