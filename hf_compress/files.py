"""Files and folders that are whole or not there, and limits on what strangers' files may ask of us."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from .errors import ForeignFileError

MAX_TEXT_BYTES = 16 * 2**20
"""Largest JSON or YAML file that is parsed; what is larger in a model folder are tokenizers, not ours to parse."""
MAX_DEPTH = 64


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text so that a reader, also after a crash, sees the old file or the new one, never a part.

    Raises:
        OSError: if the folder cannot be written; the old file is untouched.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        part.chmod(0o666 & ~_umask())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A sibling folder to fill; on success it takes the place of `target`, on failure `target` is as it was.

    The exchange is two renames: the old folder is moved aside, the new one moved in, the old one removed. If the
    second rename fails the old folder is moved back.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part"))
    try:
        part.chmod(0o777 & ~_umask())
        yield part
        _sync(part)
        if not target.exists():
            part.replace(target)
            return
        old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".old"))
        target.replace(old)
        try:
            part.replace(target)
        except BaseException:
            old.replace(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`, refusing names (`..`, absolute, symbolic links) that lead out of it."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ForeignFileError(folder / name, "leads out of its folder.", "Use a model folder from a source you trust.")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of unknown origin: bounded in size and depth, no duplicate keys, no NaN."""
    try:
        value = json.loads(_read_text(path), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ForeignFileError(path, f"is not valid JSON ({error}).", "Restore the file.") from error
    if not isinstance(value, dict):
        raise ForeignFileError(path, f"holds a {type(value).__name__}, not an object.", "Restore the file.")
    _check_depth(path, value)
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file of unknown origin: plain tags only, no aliases (they can expand without bound)."""
    text = _read_text(path)
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ForeignFileError(path, "uses a YAML alias.", "Write the value out where it is used.")
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ForeignFileError(path, f"is not valid YAML ({error}).", "Mend the file.") from error
    if not isinstance(value, dict):
        raise ForeignFileError(path, f"holds a {type(value).__name__}, not a mapping.", "Mend the file.")
    _check_depth(path, value)
    return value


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise ForeignFileError(path, "does not exist.", "Check the path.")
    size = path.stat().st_size
    if size > MAX_TEXT_BYTES:
        raise ForeignFileError(path, f"has {size} bytes, more than {MAX_TEXT_BYTES}.", "Check where it comes from.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ForeignFileError(path, f"is not UTF-8 ({error.reason}).", "Restore the file.") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError(f"a key appears twice among {[key for key, _ in pairs]}")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _check_depth(path: Path, value: Any) -> None:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise ForeignFileError(path, f"is nested deeper than {MAX_DEPTH} levels.", "Check where it comes from.")
