"""The record that travels with a model folder as `compression.json`: how it was made and what was measured.

Cards, reports and hub metadata are rendered from it and from nothing else. It is typed, versioned, validated when
read, written atomically and only ever appended to. No path, host, user or token enters it.

While a model trains, the part about training lives in `student.config.compression`, so that every later
`save_pretrained` or `push_to_hub` carries it; the first command of ours on the folder lifts it into the file.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import json
import os
import platform
import re
import socket
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from typing_extensions import TypeAliasType

from . import files
from .errors import ForeignFileError

FILE = "compression.json"
VERSION = 1
PACKAGES = ("hf-compress", "torch", "transformers", "accelerate", "datasets", "onnx", "onnxruntime", "onnxruntime-gpu")

_PATH = re.compile(
    r"(?<![\w.:/<])//?(?:[\w.+@-]+/)+"
    r"|\bfile:/"
    r"|(?<!\w)[A-Za-z]:[\\/](?!/)"
    r"|(?<![\w/])~(?:[a-z_][\w.-]*)?/"
)
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")


def _private(text: str) -> str:
    """Refuses text that names a folder of this machine, holds a token or cannot be written."""
    text.encode()  # a lone surrogate: UnicodeEncodeError is a ValueError
    for pattern, what in ((_PATH, "an absolute path"), (_TOKEN, "a token")):
        if found := pattern.search(text):
            shown, where = (_TOKEN.sub("hf_…", part) for part in (found.group(), text))
            raise ValueError(f"facts must not hold {what}: {shown[:40]!r} in {where[:120]!r}")
    return text


Text = Annotated[str, AfterValidator(_private), Field(max_length=20_000)]
Setting = TypeAliasType("Setting", "bool | int | FiniteFloat | Text | list[Setting] | dict[Text, Setting] | None")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)


class Model(_Part):
    """A model by what can be told of it anywhere."""

    name: Text | None = Field(default=None, description="hub id; None for a local folder or an object in memory")
    revision: Text | None = None
    licence: Text | None = Field(default=None, description="as its card names it")
    architecture: Text
    parameters: int | None = Field(default=None, ge=0, description="None: not known, as behind a server")
    layers: int | None = None
    start: Text | None = Field(
        default=None, description="where the weights came from, e.g. 'layers 0, 2, 4 of teacher'"
    )


def _counted(model: Model) -> Model:
    if model.parameters is None:
        raise ValueError("a student's parameters must be counted")
    return model


class Data(_Part):
    """A data set by name and content."""

    name: Text
    rows: int = Field(ge=0)
    labelled: int | None = Field(default=None, ge=0, description="rows with a label; None: not known")
    fingerprint: Text = Field(description="sha256 of the rows, first 16 hex digits")
    licence: Text | None = None
    hub_id: Text | None = None
    config: Text | None = None
    split: Text | None = None


class Method(_Part):
    """One objective of a run with everything that decides its value."""

    name: Text
    weight: FiniteFloat
    settings: dict[Text, Setting] = {}
    citation: Text | None = Field(default=None, description="BibTeX")


class Training(_Part):
    """How the student was trained."""

    task: Text
    teacher: Model | None = None
    frozen: dict[Text, Model] = Field(default={}, description="further frozen models by role")
    student: Annotated[Model, AfterValidator(_counted)]
    methods: tuple[Method, ...]
    task_weight: FiniteFloat
    data: Data
    steps: int = Field(ge=0)
    epochs: FiniteFloat
    seconds: FiniteFloat = Field(ge=0)
    seed: int
    settings: dict[Text, Setting] = Field(default={}, description="learning rate, batch size and the like")
    hardware: Text
    versions: dict[Text, Text]
    before: tuple[Training, ...] = Field(default=(), description="earlier stages of the same student, oldest first")


class Measurement(_Part):
    """One number, with what is needed to take it again."""

    subject: Text = Field(description="whose: student, teacher, alone (same start without a teacher), ...")
    variant: Text = Field(default="torch", description="torch, onnx, onnx_int8, ...")
    metric: Text
    value: FiniteFloat
    unit: Text = Field(description="fraction, bytes, seconds, count, nats, ...")
    interval: tuple[FiniteFloat, FiniteFloat] | None = Field(default=None, description="95 % interval")
    data: Data | None = None
    seed: int | None = None
    how: dict[Text, Setting] = Field(default={}, description="threads, batch, padded length, runs, provider, ...")


class Evidence(_Part):
    """A file of this folder with its content's hash: exported graphs, curves, plots."""

    file: Text
    bytes: int = Field(ge=0)
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Record(_Part):
    """All that is known of a model folder."""

    version: Literal[1] = 1
    training: Training | None = None
    measurements: tuple[Measurement, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    licence: Text | None = Field(default=None, description="of the model, as its maker said")

    def find(self, metric: str, subject: str = "student", variant: str = "torch", **how: Setting) -> Measurement | None:
        """The newest measurement of that metric whose conditions include `how`, or None."""
        for found in reversed(self.measurements):
            if (found.metric, found.subject, found.variant) == (metric, subject, variant) and all(
                found.how.get(key) == value for key, value in how.items()
            ):
                return found
        return None


def load(folder: Path) -> Record:
    """The record of a model folder; lifted from its `config.json` if it has no file of its own yet.

    Raises:
        ForeignFileError: if `compression.json` is malformed or of a version that this release does not know.
    """
    path = folder / FILE
    if path.exists():
        value = files.read_json(path)
        if value.get("version") != VERSION:
            problem = f"is a record of version {value.get('version')!r}, this release reads {VERSION}."
            raise ForeignFileError(path, problem, "Update hf-compress.")
        return _parse(Record, value, path)
    config = folder / "config.json"
    training = files.read_json(config).get("compression") if config.exists() else None
    return Record(training=None if training is None else _parse(Training, training, config))


PartT = TypeVar("PartT", bound=_Part)


def _parse(kind: type[PartT], value: Any, path: Path) -> PartT:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        found = error.errors()  # of a setting one for each type that it is not; what we refuse ourselves says more
        first = next((one for one in found if one["type"] == "value_error"), found[0])
        where = ".".join(str(part) for part in first["loc"] if "[" not in str(part)) or "the record"
        raise ForeignFileError(
            path, f"{where}: {first['msg']}.", "Restore the file, or delete it and measure again."
        ) from error


def save(folder: Path, record: Record) -> None:
    """Writes `compression.json` whole or not at all."""
    _no_identity(text := record.model_dump_json(indent=1, exclude_none=True) + "\n")
    files.write_text(folder / FILE, text)


def append(folder: Path, *measurements: Measurement) -> Record:
    """Adds measurements to a folder's record and returns the whole."""
    record = load(folder)
    record = record.model_copy(update={"measurements": record.measurements + measurements})
    save(folder, record)
    return record


def register(folder: Path, paths: Iterable[Path]) -> Record:
    """Records size and hash of files of this folder; a later hash of the same file replaces the earlier one."""
    added = {
        name: Evidence(file=name, bytes=path.stat().st_size, sha256=files.sha256(path))
        for path in paths
        for name in [path.resolve().relative_to(folder.resolve()).as_posix()]
    }
    record = load(folder)
    kept = tuple(entry for entry in record.evidence if entry.file not in added and files.is_file(folder / entry.file))
    record = record.model_copy(update={"evidence": kept + tuple(added.values())})
    save(folder, record)
    return record


def check(folder: Path, prefix: str = "") -> None:
    """Compares the recorded files below `prefix` with their hashes.

    Raises:
        ForeignFileError: for the first file that is missing or whose bytes have changed since it was measured.
    """
    for entry in load(folder).evidence:
        if not entry.file.startswith(prefix):
            continue
        path = files.inside(folder, entry.file)
        if not files.is_file(path):
            raise ForeignFileError(path, "is recorded in compression.json but missing.", "Export or fetch it again.")
        if files.sha256(path) != entry.sha256:
            raise ForeignFileError(
                path, "has changed since it was recorded in compression.json.", "Export or fetch it again."
            )


def _no_identity(text: str) -> None:
    """Refuses to write the names of this machine and its user, or the value of a token variable."""
    names = {"host": socket.gethostname(), "home": os.path.expanduser("~"), "HF_TOKEN": os.environ.get("HF_TOKEN", "")}
    with contextlib.suppress(OSError, KeyError):  # no user database, as in a bare container: no name to leak
        names["user"] = getpass.getuser()
    for what, name in names.items():
        if len(name) > 5 and re.search(rf"(?<![\w]){re.escape(name)}(?![\w])", text):
            raise ValueError(f"facts must not hold the {what} of this machine ({name[:3]}…)")


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide a number."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version()} | found


def hardware() -> str:
    """The class of this machine, without its name: processor or GPU model and core count."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (model := re.search(r"model name\s*: (.+)", info.read_text())):
        cpu = model[1]
    return f"{cpu}, {os.cpu_count()} cores"


def fingerprint(rows: Iterable[Any]) -> str:
    """First 16 hex digits of the sha256 over the rows' JSON, in order; arrays, tensors and images by their content.

    Raises:
        ValueError: for an object that shows where it lies in memory, which would differ in every run.
    """
    digest = hashlib.sha256()
    for row in rows:
        digest.update(
            json.dumps(row, sort_keys=True, ensure_ascii=False, default=_content).encode("utf-8", "backslashreplace")
        )
        digest.update(b"\n")
    return digest.hexdigest()[:16]


def _content(value: Any) -> str:
    """A row's value that JSON does not know: bytes, arrays, tensors and images by their bytes, others by `repr`."""
    if hasattr(value, "detach"):
        import torch

        value = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), value.shape, value.dtype
        return f"{hashlib.sha256(value[0].tobytes()).hexdigest()} {tuple(value[1])} {value[2]}"
    if isinstance(value, bytes) or hasattr(value, "tobytes"):
        kind = [str(getattr(value, name, "")) for name in ("shape", "dtype", "size", "mode")]
        return f"{hashlib.sha256(value if isinstance(value, bytes) else value.tobytes()).hexdigest()} {kind}"
    shown = repr(value)
    if re.search(r" at 0x[0-9a-f]+", shown):
        raise ValueError(f"a row holds {shown[:80]}, which has no content that can be compared between runs.")
    return shown
