"""Models and tokenizers of unknown origin: loaded within limits, and one kind of error for whatever is wrong in them.

transformers is asked to run no code of theirs and to read no pickle. It builds what a config asks for before it looks
at the weights, takes a tensor that a header names twice, and lets panics of the tokenizer library through: that is
refused here. What a config may ask for is measured by the weights beside it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import transformers
from torch import Tensor
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers.utils import cached_file

from . import files
from .errors import ConfigurationError, ForeignFileError, HfCompressError, MismatchError

SAFE: dict[str, Any] = {"trust_remote_code": False, "use_safetensors": True}
"""What every model is loaded with: neither code of the repository nor pickles."""
MAX_COUNT = 2**20
"""Layers, labels, heads, experts: transformers makes lists of that many while it reads a config."""
MAX_TOKENIZER_BYTES = 128 * 2**20
"""Of `tokenizer.json`."""
_COUNTS = re.compile(r"layer|depth|block|stage|label|class|expert|head|group")
_TOKENIZER_REMEDY = "Save the tokenizer again, or take it from a source you trust."
_TOKENIZER_TEXTS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_ELEMENTS_PER_BYTE = 8
"""Numbers in a byte of weights: 1 bit each, the smallest that are packed."""
_FREE_ELEMENTS = 2**27
"""Numbers that need no weights: causal masks of a thousand positions in each of a hundred layers."""
_FREE_MODULES, _MODULES_PER_TENSOR = 2_000, 32


@contextmanager
def refusing(source: str | Path, use: str, remedy: str) -> Iterator[None]:
    """Whatever a library raises over a foreign file, as a ForeignFileError; ConfigurationError for a missing package.

    Args:
        source: hub id, folder or file.
        use: what for, e.g. "as a teacher".
        remedy: what to do.
    """
    try:
        yield
    except HfCompressError:
        raise
    except ImportError as error:
        raise ConfigurationError(f"{source} cannot be loaded {use}: {_said(error)}.") from error
    except Exception as error:  # a malformed file may raise anything in the code that trusts it
        raise ForeignFileError(source, f"cannot be loaded {use} ({_said(error)}).", remedy) from error
    except BaseException as error:
        _refuse_panic(source, error)
        raise


@contextmanager
def encoding(tokenizer: Any) -> Iterator[None]:
    """In it a tokenizer reads texts: what its library raises without a type of its own is a ForeignFileError."""
    source = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
    try:
        yield
    except BaseException as error:
        _refuse_panic(source, error)
        if type(error) is not Exception:
            raise
        raise ForeignFileError(source, f"cannot encode a text ({_said(error)}).", _TOKENIZER_REMEDY) from error


def check_ids(rows: Iterable[Sequence[int]], model: Any, tokenizer: Any) -> None:
    """Refuses token ids that a model has no embedding for, which end in an index error or a dead GPU.

    Raises:
        MismatchError: naming the row.
    """
    config = getattr(model, "config", None)
    known: int = getattr(config.get_text_config(), "vocab_size", None) or 0 if config is not None else 0
    for row, ids in enumerate(rows if known else ()):
        if ids and not 0 <= max(ids) < known:
            name = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
            raise MismatchError(
                f"{name} gives row {row} the token {max(ids)}, and the model embeds {known}. Use the model's tokenizer."
            )


def _refuse_panic(source: str | Path, error: BaseException) -> None:
    """A panic of a library in Rust becomes a ForeignFileError; Ctrl-C and the like stay what they are."""
    if type(error).__name__ == "PanicException":  # of pyo3, which exports no name for it
        problem = f"makes the library panic that reads it ({_said(error)})."
        raise ForeignFileError(source, problem, _TOKENIZER_REMEDY) from error


def _said(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")[:1000] or type(error).__name__


def config(
    source: str | Path,
    *,
    use: str = "as a model",
    local_files_only: bool = False,
    where: Mapping[str, Any] = MappingProxyType({}),
    **changes: Any,
) -> transformers.PreTrainedConfig:
    """The config of a folder or hub id, with `changes`.

    Args:
        source: hub id or folder.
        use: what for, said in an error.
        local_files_only: no connection is made.
        where: revision, subfolder, token, cache_dir and the like.
        **changes: to its values.

    Raises:
        ForeignFileError: if it is missing, malformed, asks for absurd numbers, or names a model that needs code of its
            own.
    """
    with refusing(source, use, "Give a folder or hub id with a config of a model that transformers has."):
        if path := fetched(source, "config.json", local_files_only, where):
            check_config(path)
        safe = {"trust_remote_code": False, "local_files_only": local_files_only}
        return transformers.AutoConfig.from_pretrained(source, **safe, **where, **changes)


def check_config(path: Path) -> None:
    """Refuses a `config.json` that is malformed, asks for absurd numbers, or for a kernel that a repository brings."""
    remedy = "Check where it comes from."
    for key, value in _leaves(files.read_json(path, finite=False), ""):
        if key.endswith("_implementation") and isinstance(value, str) and "/" in value:
            raise ForeignFileError(path, f"asks for code of {value[:80]!r} in {key!r}.", remedy)
        if isinstance(value, bool | str | None):
            continue
        if _COUNTS.search(key) and (value > MAX_COUNT or (key.startswith(("num_", "n_")) and value < 0)):
            raise ForeignFileError(path, f"asks for {str(value)[:20]} in {key!r}.", remedy)


def _leaves(value: Any, key: str) -> Iterator[tuple[str, bool | int | float | str | None]]:
    """The values of a tree, each with the nearest key above it."""
    if isinstance(value, dict):
        for name, child in value.items():
            yield from _leaves(child, name)
    elif isinstance(value, list):
        for child in value:
            yield from _leaves(child, key)
    else:
        yield key, value


def tokenizer(source: str | Path) -> Any:
    """The tokenizer of a folder or hub id.

    Raises:
        ForeignFileError: if it is missing, malformed, too large, needs code of its own, or makes the library panic.
    """
    with refusing(source, "as a tokenizer", _TOKENIZER_REMEDY):
        check_tokenizer(source)
        return transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def check_tokenizer(source: str | Path, *, local_files_only: bool = False) -> None:
    """Refuses files of a tokenizer that are malformed or too large."""
    for name in _TOKENIZER_TEXTS:
        if path := fetched(source, name, local_files_only):
            length = files.read_json(path, finite=False).get("model_max_length")
            if not isinstance(length, int | float | None):
                problem = f"has the model_max_length {str(length)[:80]!r}, which is no number."
                raise ForeignFileError(path, problem, "Save the tokenizer again.")
    path = fetched(source, "tokenizer.json", local_files_only)
    if path and (size := path.stat().st_size) > MAX_TOKENIZER_BYTES:
        problem = f"has {size} bytes, more than {MAX_TOKENIZER_BYTES}."
        raise ForeignFileError(path, problem, "Check where it comes from.")


def fetched(
    source: str | Path, name: str, local_files_only: bool = False, where: Mapping[str, Any] = MappingProxyType({})
) -> Path | None:
    """A file of a folder or hub id, here; None: there is none, or none to reach."""
    quiet = {f"_raise_exceptions_for_{why}": False for why in ("gated_repo", "missing_entries", "connection_errors")}
    found = cached_file(str(source), name, local_files_only=local_files_only, **where, **quiet)
    return Path(found) if found else None


@contextmanager
def loading(
    source: str | Path, use: str, remedy: str, where: Mapping[str, Any] = MappingProxyType({})
) -> Iterator[None]:
    """In it transformers builds a model of a folder or hub id, from weights that were checked, and none out of scale.

    Args:
        source, use, remedy: as for `refusing`.
        where: revision, subfolder and the like, as transformers is given it.

    Raises:
        ForeignFileError: for whatever is wrong with its files.
    """
    limits = _Limits(source, where)
    handles = [
        register_module_module_registration_hook(limits.module),
        register_module_parameter_registration_hook(limits.tensor),
        register_module_buffer_registration_hook(limits.tensor),
    ]
    try:
        with refusing(source, use, remedy):
            if Path(source).is_dir():
                limits.prepare()
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Limits:
    """What a model may be made of, given its weights. Those of a hub id are here by the time its first part is made."""

    def __init__(self, source: str | Path, where: Mapping[str, Any]) -> None:
        self.source, self.where = source, where
        self.modules = self.elements = 0

    @cached_property
    def most(self) -> tuple[int, int]:
        """Modules and numbers."""
        config = Path(self.source) / self.where.get("subfolder", "") / "config.json"
        if not Path(self.source).is_dir():
            config = fetched(self.source, "config.json", True, self.where) or config
        tensors, size = check_weights(config.parent)
        if not tensors and not Path(self.source).is_dir():  # they lie elsewhere, as those that the hub converts
            return sys.maxsize, sys.maxsize
        return _FREE_MODULES + _MODULES_PER_TENSOR * tensors, _FREE_ELEMENTS + _ELEMENTS_PER_BYTE * size

    def prepare(self) -> None:
        """Checks the weights."""
        _ = self.most

    def module(self, parent: Any, name: str, child: Any) -> None:
        self.modules += 1
        if self.modules > self.most[0]:
            raise self._too_much(f"more than {self.most[0]} modules")

    def tensor(self, parent: Any, name: str, value: Tensor | None) -> None:
        if value is None or value.device.type != "meta":  # what is built has no memory before its weights are read
            return
        self.elements += value.numel()
        if self.elements > self.most[1]:
            raise self._too_much(f"{self.elements:.3g} numbers or more")

    def _too_much(self, what: str) -> ForeignFileError:
        problem = f"its config asks for {what}, far beyond what its weights hold."
        return ForeignFileError(self.source, problem, "Check where it comes from.")


def check_weights(folder: Path) -> tuple[int, int]:
    """How many tensors and bytes the safetensors of a folder hold.

    Raises:
        ForeignFileError: for a file that is none, an index that leads out of the folder, or an adapter, whose base
            lies elsewhere.
    """
    if (adapter := folder / "adapter_config.json").is_file():
        remedy = "Merge it (`merge_and_unload`) and save the whole model, or pass the model itself."
        raise ForeignFileError(adapter, "belongs to an adapter, whose base lies elsewhere.", remedy)
    found = {path for path in folder.glob("*.safetensors") if path.is_file()}
    for index in folder.glob("*.safetensors.index.json"):
        found |= {path for name in set(files.shards(index).values()) if (path := files.inside(folder, name)).is_file()}
    return sum(len(files.check_safetensors(path)) for path in found), sum(path.stat().st_size for path in found)
