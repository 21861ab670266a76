"""What of a model folder may leave this machine, and the checks that it passes first.

An allow-list: weights as safetensors, configuration, tokenizer, ONNX folders, evidence, card and licence. What
training leaves beside them (`training_args.bin` holds the hub token in clear, optimizer states, checkpoints, `.env`)
is not on it and so never goes.
"""

from __future__ import annotations

import json
import mmap
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, get_token
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # in its __init__, not declared

from . import facts, files
from .errors import ForeignFileError
from .onnx import graph

CARD = "README.md"
_VOCABULARY = r"tokenizer\.json|vocab\.txt|vocab\.json|merges\.txt|added_tokens\.json|[\w.-]+\.model"
_TOKENIZER = rf"{_VOCABULARY}|tokenizer_config\.json|special_tokens_map\.json|chat_template\.jinja"
WEIGHTS = r"(?:model|adapter_model)[\w.-]*\.safetensors"
_CONFIGS = r"(?:config|generation_config|preprocessor_config|processor_config|adapter_config|compression)\.json"
_ONNX = r"[\w-]+\.onnx(?:_data|\.data)?|export\.json"
_FOLDERS = r"onnx(?:_[\w.-]+)?|evidence|additional_chat_templates|\.eval_results"
_KEPT_APART = r"evidence/(?:[\w-][\w.-]*/)*[\w-][\w.-]*\.(?:png|svg|parquet|json)|LICENSE[\w.-]*"
ALLOWED = re.compile(
    rf"{_CONFIGS}|{WEIGHTS}|model[\w.-]*\.safetensors\.index\.json|{_TOKENIZER}|README\.md"
    rf"|additional_chat_templates/[\w-]+\.jinja|\.eval_results/[\w-]+\.yaml"
    rf"|onnx(?:_[\w.-]+)?/(?:{_ONNX}|{_CONFIGS}|{_TOKENIZER})|{_KEPT_APART}"
)
"""Names that may leave, relative to the model folder, with `/`."""
MANAGED = re.compile(rf"(?!(?:{_KEPT_APART})\Z)(?:{ALLOWED.pattern})")
"""Names that a later push takes away from the hub when the folder has them no more: a loader would prefer or pair an
old `model.safetensors` with the new shards. Licence and evidence of earlier pushes stay."""
DISTILLER = re.compile(r"(?:^|\.)distiller\.")
"""Entries that make a training checkpoint resumable; they are no part of the student."""
PICKLES = (b"\x80", b"PK\x03\x04")


@dataclass(frozen=True, kw_only=True)
class Outgoing:
    """The files of a folder that a push sends, and what of it stays here."""

    folder: Path
    files: tuple[Path, ...]
    """Relative to the folder, in order of name."""
    stays: tuple[str, ...]
    """Files and folders at the top of the folder that are not sent."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(path.as_posix() for path in self.files)

    @property
    def bytes(self) -> int:
        return sum((self.folder / path).stat().st_size for path in self.files)

    def describe(self) -> str:
        """A line per file with its size, the total, and what stays here."""
        lines = [f"{(self.folder / path).stat().st_size:>14,}  {path.as_posix()}" for path in self.files]
        lines.append(f"{self.bytes:>14,}  bytes in {len(self.files)} files")
        return "\n".join([*lines, *([f"stays here: {', '.join(self.stays)}"] if self.stays else [])])


def collect(folder: Path) -> tuple[Path, ...]:
    """The files of a model folder that may leave it, relative to it, in order of name.

    Raises:
        ForeignFileError: if one of them is a link out of the folder, or to a file that must not leave.
    """
    return tuple(sorted(path for path in _candidates(folder) if ALLOWED.fullmatch(path.as_posix())))


def _candidates(folder: Path) -> Iterator[Path]:
    root = folder.resolve()
    for top in folder.iterdir():
        if top.is_dir() and not re.fullmatch(_FOLDERS, top.name):
            continue
        for path in top.rglob("*") if top.is_dir() else [top]:
            name = path.relative_to(folder)
            if path.is_dir() or not ALLOWED.fullmatch(name.as_posix()):
                continue
            target = files.inside(folder, str(name)).relative_to(root)
            if not ALLOWED.fullmatch(target.as_posix()):
                raise ForeignFileError(path, f"is a link to {target}, which must not leave.", "Remove the link.")
            yield name


def check(folder: Path, *, token: str | None = None) -> Outgoing:
    """Everything that can be found out before a byte is sent.

    The weights are there and hold the student alone, files have the hashes of `compression.json`, the card's metadata
    is what the hub accepts, and no file holds a token (any `hf_…`, this one, the one of `HF_TOKEN` or of the login) or
    the path of this folder, of the home folder or of the working folder.

    Raises:
        ForeignFileError: for the first file that is not fit to leave, with what to do.
    """
    if not folder.is_dir():
        raise ForeignFileError(folder, "is not a folder.", "Give the folder that save_pretrained wrote.")
    paths = collect(folder)
    sent = Outgoing(folder=folder, files=paths, stays=_stays(folder, paths))
    _check_complete(folder, sent.names)
    for name in sent.names:
        _check_weights(folder / name)
    facts.check(folder)
    for entry in facts.load(folder).evidence:
        if entry.file not in sent.names:
            problem = "is recorded in compression.json but is no kind of file that is pushed."
            raise ForeignFileError(folder / entry.file, problem, "Record png, svg, parquet or json below evidence/.")
    _check_card(folder / CARD)
    for name in sent.names:
        _check_secrets(folder, name, token)
    return sent


def _stays(folder: Path, paths: Iterable[Path]) -> tuple[str, ...]:
    sent = {path.parts[0] for path in paths}
    return tuple(sorted(f"{top.name}{'/' * top.is_dir()}" for top in folder.iterdir() if top.name not in sent))


def _check_complete(folder: Path, names: tuple[str, ...]) -> None:
    """A configuration, weights, and every shard that an index names."""
    if not {"config.json", "adapter_config.json"} & set(names):
        raise ForeignFileError(folder, "holds no config.json.", "Give the folder that save_pretrained wrote.")
    if not any(re.fullmatch(rf"{WEIGHTS}|onnx.*\.onnx", name) for name in names):
        problem = "holds no weights as safetensors or ONNX; pickled weights are not pushed."
        raise ForeignFileError(folder, problem, "Save the model again with save_pretrained.")
    for name in names:
        if name.endswith(".index.json") and (missing := set(files.shards(folder / name).values()) - set(names)):
            raise ForeignFileError(folder / name, f"names {min(missing)}, which is missing.", "Save the model again.")


def _check_weights(path: Path) -> None:
    if path.suffix == ".model" and path.open("rb").read(4).startswith(PICKLES):
        raise ForeignFileError(path, "is a pickle, which runs code when loaded.", "Remove it from the folder.")
    if path.suffix == ".safetensors" and (extra := [key for key in _keys(path) if DISTILLER.search(key)]):
        problem = f"holds {len(extra)} entries of the distiller, such as {extra[0]}: a checkpoint of training."
        raise ForeignFileError(path, problem, "Take them out with hf_compress.hub.strip(folder).")


def _keys(path: Path) -> list[str]:
    with files.safetensors(path, "numpy") as weights:
        return list(weights.keys())


def _check_card(path: Path) -> None:
    """The metadata of a model card as the hub's own check asks for them: no null, texts where texts belong."""
    remedy = "Write the card again, with `hf-compress card` or by hand."
    if not path.is_file() or path.stat().st_size > files.MAX_TEXT_BYTES:
        raise ForeignFileError(path, f"is missing or larger than {files.MAX_TEXT_BYTES} bytes.", remedy)
    try:
        text = path.read_text(encoding="utf-8-sig")
        block = REGEX_YAML_BLOCK.match(text)
        if block is None:
            raise ValueError("there is no block of metadata between --- at its top")
        # aliases can expand without bound, so they are found before anything is built from them
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(block[2], Loader=yaml.SafeLoader)):
            raise ValueError("it uses a YAML alias")
        _check_metadata(yaml.safe_load(block[2]))
        for result in ModelCard(text).data.get("eval_results", []):
            if not isinstance(result.dataset_config or "", str):
                raise ValueError(f"dataset.config must be a text, not {result.dataset_config!r}")
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ForeignFileError(path, f"has metadata that the hub refuses: {error}.", remedy) from error


def _check_metadata(data: Any) -> None:
    if not isinstance(data, dict) or not data:
        raise ValueError(f"it is {type(data).__name__} instead of a mapping with entries")
    if where := next(_nulls(data, ""), None):
        raise ValueError(f"{where} is null; leave it out")
    for key in ("license", "pipeline_tag", "library_name"):
        if not isinstance(data.get(key, ""), str):
            raise ValueError(f"{key} must be a text, not {data[key]!r}")
    for key in ("tags", "datasets", "base_model", "language", "metrics"):
        for value in data[key] if isinstance(data.get(key), list) else [data.get(key, "")]:
            if not isinstance(value, str):
                raise ValueError(f"{key} must hold texts, not {value!r}")
            if key in ("datasets", "base_model") and value:
                validate_repo_id(value)


def _nulls(value: Any, where: str) -> Iterator[str]:
    if value is None:
        yield where
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in pairs:
        yield from _nulls(child, f"{where}.{key}".lstrip("."))


def _check_secrets(folder: Path, name: str, token: str | None) -> None:
    """The token's value is looked for in every byte, what only looks like a secret in text alone.

    Weights of eight bits lie where letters do: among ten million of them one finds `hf_` and thirty letters.
    """
    path = folder / name
    if not path.stat().st_size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _refuse(path, data, _values(token))
    looks = [("a token", re.compile(rb"hf_[A-Za-z0-9]{20,}"))]
    if not re.search(rf"(?:^|/)(?:{_VOCABULARY})$", name):  # /root/ may well be a word of a vocabulary of code
        looks += _places(folder)
    for text in _texts(path):
        _refuse(path, text, looks)


def _refuse(path: Path, data: bytes | mmap.mmap, patterns: Iterable[tuple[str, re.Pattern[bytes]]]) -> None:
    for what, pattern in patterns:
        if pattern.search(data):
            raise ForeignFileError(path, f"holds {what}.", "Take it out of the file.")


def _texts(path: Path) -> Iterator[bytes]:
    """What of a file can be text: all of it, but of weights their header and of graphs their strings."""
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            yield file.read(int.from_bytes(file.read(8), "little"))
    elif path.suffix == ".onnx":
        yield from graph.texts(path)
    elif path.suffix not in (".onnx_data", ".data"):
        yield path.read_bytes()


def _values(token: str | None) -> Iterator[tuple[str, re.Pattern[bytes]]]:
    for value in {token, get_token(), os.environ.get("HF_TOKEN")}:
        if value and len(value) >= 8:
            yield "your token", re.compile(re.escape(value.encode()))


def _places(folder: Path) -> Iterator[tuple[str, re.Pattern[bytes]]]:
    for what, place in (("model", folder.resolve()), ("home", Path.home()), ("working", Path.cwd())):
        # a single name such as /root is a word that a text may use, so it counts as the start of a path only
        end = rb"(?![\w-])" if len(place.parts) > 2 else rb"[/\\]"
        if len(place.parts) > 1:
            yield f"the path of your {what} folder", re.compile(rb"(?<![\w.-])" + re.escape(os.fsencode(place)) + end)


def strip(folder: Path) -> tuple[str, ...]:
    """Takes the distiller's entries out of the weights of a training checkpoint, each file whole or not at all.

    Metadata, the other tensors, the index and the hashes in `compression.json` are kept or follow.

    Returns:
        The names of the entries that were taken out.

    Raises:
        ForeignFileError: if a file is no safetensors, leads out of the folder, or is not the one that was recorded.
    """
    removed: list[str] = []
    recorded = {entry.file for entry in facts.load(folder).evidence}
    for path in [folder / name for name in collect(folder) if name.suffix == ".safetensors"]:
        if not (extra := [key for key in _keys(path) if DISTILLER.search(key)]):
            continue
        facts.check(folder, path.name)
        _rewrite(path, frozenset(extra))
        removed += extra
        if path.name in recorded:
            facts.register(folder, [path])
    for path in folder.glob("model*.safetensors.index.json"):
        _strip_index(path)
    return tuple(removed)


def _rewrite(path: Path, without: frozenset[str]) -> None:
    from safetensors.torch import save_file  # torch takes a second to import, and a push needs none of it

    with files.safetensors(path) as weights:
        kept = {key: weights.get_tensor(key) for key in weights.keys() if key not in without}  # noqa: SIM118 (no mapping)
        metadata = weights.metadata()
    with files.atomic_file(path) as part:
        save_file(kept, part, metadata=metadata)
        part.chmod(path.stat().st_mode)


def _strip_index(path: Path) -> None:
    shards = files.shards(path)
    kept = {key: name for key, name in shards.items() if not DISTILLER.search(key)}
    if kept == shards:
        return
    total = 0
    for name in set(kept.values()):
        with files.safetensors(files.inside(path.parent, name)) as weights:
            total += sum(weights.get_tensor(key).nbytes for key in weights.keys())  # noqa: SIM118 (no mapping)
    index = files.read_json(path)
    index |= {"weight_map": kept, "metadata": index.get("metadata", {}) | {"total_size": total}}
    files.write_text(path, json.dumps(index, indent=2, sort_keys=True) + "\n")
