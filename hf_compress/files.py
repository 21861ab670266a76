"""Files and folders that are whole or not there, and limits on what strangers' files may ask of us."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from .errors import ForeignFileError

MAX_TEXT_BYTES = 16 * 2**20
"""Largest JSON file that is parsed; what is larger in a model folder are tokenizers, not ours to parse."""
MAX_YAML_BYTES = 256 * 2**10
"""Largest YAML file that is parsed: recipes and tasks, written by hand. The parser reads some 300 kB a second."""
MAX_DEPTH = 64


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text as `atomic_file` does.

    Raises:
        OSError: if the folder cannot be written; the old file is untouched.
    """
    with atomic_file(path) as part, part.open("xb") as file:
        file.write(text.encode())


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A sibling file to write; on success it takes the place of `path`, on failure `path` is as it was.

    A reader, also after a crash, sees the old file or the new one, never a part.
    """
    part = _beside(path, ".part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        error.add_note(_kept(path))
        raise


def _kept(path: Path) -> str:
    """What an error says of the place that was not written."""
    try:
        there = path.exists()
    except OSError:  # a name that no system takes
        there = False
    return f"{path} is as it was before." if there else f"Nothing was written to {path}."


def _beside(path: Path, suffix: str) -> Path:
    """A free name in the same folder, short enough for any file system."""
    return path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}{suffix}")


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A sibling folder to fill; on success it takes the place of `target`, on failure `target` is as it was.

    The exchange is two renames: the old folder is moved aside, the new one moved in, the old one removed. If the
    second rename fails the old folder is moved back. Where `target` is a link, the folder that it names is replaced.

    Raises:
        OSError: if the folder cannot be written or is a file, or another process put its own there meanwhile.
    """
    target = Path(target).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file, a folder was to take its place. Remove it or choose another.")
    part = _beside(target, ".part")
    try:
        part.mkdir()
        yield part
        sync(part)
        _exchange(part, target)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        error.add_note(_kept(target))
        raise


def _exchange(part: Path, target: Path) -> None:
    old = _beside(target, ".old")
    try:
        target.replace(old)
    except FileNotFoundError:
        part.replace(target)
        return
    try:
        part.replace(target)
    except BaseException:
        with suppress(OSError):  # another process has put a whole folder there: the old one is outdated
            old.replace(target)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def sync(folder: Path) -> None:
    """Brings every file of a folder to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def readable(folder: Path) -> None:
    """Gives a model folder's weights the mode that the umask says; safetensors leaves them to their owner alone."""
    mode = (folder / "config.json").stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


def inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`, refusing names (`..`, absolute, symbolic links) that lead out of it.

    The files of a snapshot in the Hugging Face cache are links to the `blobs` beside `snapshots`: those are followed,
    and the path within the snapshot is returned.
    """
    root, remedy = folder.resolve(), "Use a model folder from a source you trust."
    try:
        path = (root / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a zero byte in the name
        raise ForeignFileError(folder / name, f"cannot be resolved ({error}).", remedy) from error
    if path.is_relative_to(root):
        return path
    here = Path(os.path.normpath(root / name))
    if path.parent in _blobs(root) and here.is_relative_to(root):
        return here
    raise ForeignFileError(folder / name, "leads out of its folder.", remedy)


def _blobs(folder: Path) -> list[Path]:
    """The folder of contents that belongs to a snapshot of the Hugging Face cache, or none."""
    return [
        parent.parent / "blobs"
        for parent in folder.parents
        if parent.name == "snapshots" and parent.parent.name.startswith("models--")
    ]


def printable(text: str) -> str:
    """A stranger's text for a terminal, without the characters that steer it or turn its direction."""
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)


def read_text(path: Path) -> str:
    """A text from a file of unknown origin: UTF-8, bounded in size."""
    return _read_text(path, MAX_TEXT_BYTES)


def read_json(path: Path, *, finite: bool = True) -> dict[str, Any]:
    """A JSON object from a file of unknown origin: bounded in size and depth, no duplicate keys, finite numbers.

    Args:
        path: of the file.
        finite: False: also infinities, which configs of transformers hold.
    """
    return parse_json(path, _read_text(path, MAX_TEXT_BYTES), finite=finite)


def parse_json(path: Path, text: str | bytes, *, finite: bool = True) -> dict[str, Any]:
    """The JSON object that was read from a file, or from the head of one; as `read_json`."""
    constant = _no_constant if finite else None
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise ForeignFileError(path, f"is not valid JSON ({error}).", "Restore the file.") from error
    if not isinstance(value, dict):
        raise ForeignFileError(path, f"holds a {type(value).__name__}, not an object.", "Restore the file.")
    _check_tree(path, value, finite)
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file of unknown origin: as `read_json`, no tags, no aliases (they expand without bound)."""
    return parse_yaml(path, _read_text(path, MAX_YAML_BYTES))


def parse_yaml(path: Path, text: str) -> dict[str, Any]:
    """The YAML mapping that was read from a file, or from the head of one; as `read_yaml`."""
    if len(text) > MAX_YAML_BYTES:
        raise ForeignFileError(
            path, f"has {len(text)} characters of YAML, more than {MAX_YAML_BYTES}.", "Check where it comes from."
        )
    try:
        _check_events(path, text)
        value = yaml.load(text, Loader=_UniqueLoader)
    except ForeignFileError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date or a number out of range
        raise ForeignFileError(path, f"is not valid YAML ({error}).", "Mend the file.") from error
    if not isinstance(value, dict):
        raise ForeignFileError(path, f"holds a {type(value).__name__}, not a mapping.", "Mend the file.")
    _check_tree(path, value)
    return value


def shards(index: Path) -> dict[str, str]:
    """File by tensor, from the index of a sharded model."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise ForeignFileError(index, "has no weight_map of names.", "Save the model again.")
    return found


@contextmanager
def safetensors(path: Path, framework: str = "pt") -> Iterator[Any]:
    """A safetensors file of unknown origin, open; its header was checked by `check_safetensors`.

    Raises:
        ForeignFileError: if it is none, also where a tensor that it names cannot be read.
    """
    check_safetensors(path)
    try:
        with safe_open(path, framework=framework) as weights:
            yield weights
    except SafetensorError as error:
        raise ForeignFileError(path, f"is no safetensors file ({error}).", "Save the model again.") from error


def check_safetensors(path: Path) -> dict[str, Any]:
    """The header of a safetensors file by tensor; a key that appears twice, which the library accepts, is refused.

    Raises:
        ForeignFileError: for a header that is longer than the file or 16 MiB, is no JSON, or names a tensor twice.
    """
    with path.open("rb") as file:
        length, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
        if not 2 <= length <= min(size - 8, MAX_TEXT_BYTES):
            problem = f"is no safetensors file: a header of {length} bytes in a file of {size}."
            raise ForeignFileError(path, problem, "Save the model again.")
        header = parse_json(path, file.read(length))
    header.pop("__metadata__", None)
    return header


def _check_events(path: Path, text: str) -> None:
    """Reads as far as the first thing that is refused: nested brackets alone can keep the parser busy for minutes."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ForeignFileError(path, "uses a YAML alias.", "Write the value out where it is used.")
        if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag is not None:
            raise ForeignFileError(path, f"uses the YAML tag {event.tag!r}.", "Write a plain value.")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise _too_deep(path)


class _UniqueLoader(yaml.SafeLoader):
    """Refuses a key that appears twice, of which the base class keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        value = super().construct_mapping(node, deep)
        if len(value) != len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key appears twice", node.start_mark)
        return value


def is_file(path: Path) -> bool:
    """Whether there is a file; False for a name that no system takes, for which `Path.is_file` raises."""
    try:
        return path.is_file()
    except OSError:
        return False


def _read_text(path: Path, limit: int) -> str:
    if not is_file(path):
        raise ForeignFileError(path, "does not exist.", "Check the path.")
    size = path.stat().st_size
    if size > limit:
        raise ForeignFileError(path, f"has {size} bytes, more than {limit}.", "Check where it comes from.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ForeignFileError(path, f"is not UTF-8 ({error.reason}).", "Restore the file.") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError(f"a key appears twice among {sorted(value)[:10]}")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _check_tree(path: Path, value: Any, finite: bool = True) -> None:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        children = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
        if finite and any(isinstance(child, float) and not math.isfinite(child) for child in children):
            raise ForeignFileError(path, "holds a number that is not finite.", "Write a finite one.")
        level = [child for child in children if isinstance(child, dict | list)]
        if not level:
            return
    raise _too_deep(path)


def _too_deep(path: Path) -> ForeignFileError:
    return ForeignFileError(path, f"is nested deeper than {MAX_DEPTH} levels.", "Check where it comes from.")
