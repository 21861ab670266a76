"""A teacher whose outputs lie on disk: run once for each example, read from memory-mapped files afterwards.

A folder holds `cache.json`, what all of it was made with, and shards: `N.safetensors` with the rows of many examples,
and `N.json`, written after it, with its checksum and the place of each example. Any number of processes and machines
may fill one folder; what one has finished the others read. An example is known by what the teacher reads of it, padding
left out, or by a column of the data.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast
from uuid import uuid4

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hf_compress import facts, files, foreign
from hf_compress.errors import ConfigurationError, ForeignFileError, MismatchError
from hf_compress.heads import Logits
from hf_compress.objective import IGNORED, Inputs, Sizes, batch_size, tokens
from hf_compress.taps import ATTENTION
from hf_compress.teachers.model import ModelTeacher
from hf_compress.teachers.sparse import Sparse, Stored

HEADER = "cache.json"
READ = (
    *("input_ids", "inputs_embeds", "token_type_ids", "position_ids", "decoder_input_ids", "bbox"),
    *("pixel_values", "pixel_values_videos", "input_features", "input_values", "flattened_patches"),
)
"""Columns that tell one example from another, of a model that does not name its own."""
UNREAD = frozenset({"attention_mask", "decoder_attention_mask", "labels", "use_cache", "return_dict"})
KINDS = ("rows", "labels", "tokens", "causal", "none")
SHARD, EXAMPLES = 64 << 20, 50_000
"""Bytes, and examples, after which a shard is written."""
AHEAD = 2
"""Batches that are read before they are wanted."""
DTYPES: Mapping[str, torch.dtype] = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
STORED = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
"""Their names in a shard."""
MAX_WIDTH = 2**24
"""Tokens or classes that a folder may claim: a dry forward makes zeros of that width."""
Stage = dict[str, list[Tensor]]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Header(_Part):
    """What all of a folder was made with."""

    version: Literal[1]
    teacher: str
    taps: tuple[str, ...]
    kind: Literal["rows", "labels", "tokens", "causal", "none"]
    seq2seq: bool
    vocab: int = Field(ge=0, le=MAX_WIDTH)
    embedded: int | None = Field(ge=0, le=MAX_WIDTH, description="token ids that the teacher reads")
    layers: int = Field(ge=0, le=MAX_WIDTH)
    heads: int = Field(default=0, ge=0, le=MAX_WIDTH)
    causal: bool = False
    names: dict[int, str] | None = Field(description="of the classes")
    reads: tuple[str, ...] | None = Field(description="columns of its forward")
    about: facts.Model
    top_k: int | None = Field(ge=1, le=MAX_WIDTH)
    key: str | None
    dtype: Literal["float16", "bfloat16", "float32"]

    def sizes(self) -> Sizes:
        """Of the teacher, as far as they are known without it."""
        names = {} if self.names is None else {"id2label": self.names}
        config = PreTrainedConfig(is_encoder_decoder=self.seq2seq, **names)
        config.vocab_size = self.embedded
        known = {"layers": self.layers, "width": 0, "heads": self.heads, "vocab": self.vocab}
        return Sizes(kind=self.kind, config=config, causal=self.causal, **known)


class _Manifest(_Part):
    """Where the examples of a shard are: number, and first and last row of what is one for a position."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)
    single: tuple[str, ...]
    examples: dict[str, tuple[int, int, int]]

    @model_validator(mode="after")
    def _in_order(self) -> _Manifest:
        if any(number < 0 or not 0 <= start <= stop for number, start, stop in self.examples.values()):
            raise ValueError("places must be at least 0 and in order")
        return self


PartT = TypeVar("PartT", bound=_Part)


def _read_part(kind: type[PartT], path: Path) -> PartT:
    """One of our JSON files.

    Raises:
        ForeignFileError: if it is not what it should be.
    """
    text = json.dumps(files.read_json(path))  # through the reader with limits
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise ForeignFileError(
            path, f"{where}: {first['msg']}.", "Fill another folder, or remove this file."
        ) from error


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where an example's rows are."""

    shard: str
    number: int
    """Of the example in its shard: its row of what is one for an example."""
    start: int
    stop: int
    """Its rows of what is one for a position."""


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What a folder is filled with, besides its teacher."""

    top_k: int | None
    key: str | None
    dtype: Literal["float16", "bfloat16", "float32"]

    @classmethod
    def of(cls, header: _Header) -> _Settings:
        return cls(top_k=header.top_k, key=header.key, dtype=header.dtype)


def _time_first(name: str, tap: Tensor) -> Tensor:
    """Queries, keys and values (batch, heads, time, …) with heads and time changed over; others as they are."""
    return tap.transpose(1, 2) if name.partition(":")[0] in ATTENTION else tap


class CacheTeacher:
    """A teacher that is read from a folder, and run for what is not there yet in the first epoch.

    ```python
    DistillCallback(CacheTeacher("cache", big_model, top_k=64))
    ```

    Args:
        folder: of the cache; made if need be.
        teacher: the model; None: the folder must hold every example.
        top_k: likeliest tokens kept of each position's logits, as log-probabilities normalised over the whole
            vocabulary; the rest is one sum (see `sparse.completed`). None: all logits.
        key: integer column of the batch that names the example; None: by content.
        dtype: of what is stored; float16 keeps eleven significant bits, bfloat16 eight.

    Raises:
        ConfigurationError: for settings other than those that the folder was made with.
        MismatchError: for an example that is not there after the first epoch, or without a model.
    """

    fixed = True

    def __init__(
        self,
        folder: str | Path,
        teacher: nn.Module | None = None,
        *,
        top_k: int | None = None,
        key: str | None = None,
        dtype: Literal["float16", "bfloat16", "float32"] = "float16",
    ) -> None:
        if (top_k is not None and top_k < 1) or dtype not in DTYPES:
            raise ConfigurationError(f"CacheTeacher: top_k must be at least 1, dtype one of {', '.join(DTYPES)}.")
        self.folder = Path(folder)
        self.model = teacher
        self._live = None if teacher is None else ModelTeacher(teacher)
        self._header = _read_part(_Header, self.folder / HEADER) if (self.folder / HEADER).is_file() else None
        if self._live is not None:
            self.sizes, self._settings = self._live.sizes, _Settings(top_k=top_k, key=key, dtype=dtype)
        elif self._header is not None:
            self.sizes, self._settings = self._header.sizes(), _Settings.of(self._header)
            if (top_k, key, dtype) != (None, None, "float16"):
                self._same(_Settings(top_k=top_k, key=key, dtype=dtype))
        else:
            raise ForeignFileError(
                self.folder, f"holds no {HEADER}.", "Fill it: hf-compress cache, or CacheTeacher(folder, model)."
            )
        if self.sizes.kind not in KINDS:
            raise ConfigurationError(f"CacheTeacher: outputs of kind {self.sizes.kind!r} cannot be cached.")
        self.columns = frozenset() if self._settings.key is None else frozenset({self._settings.key})
        self._places: dict[str, _Place] = {}
        self._sums: dict[str, str] = {}
        self._open: dict[str, Any] = {}
        self._stage: Stage = {}
        self._single: set[str] = set()
        self._staged: dict[str, tuple[int, int, int]] = {}
        self._size = 0
        self._epoch = 0
        self._reader: ThreadPoolExecutor | None = None
        self._queue: deque[tuple[str, ...]] = deque()
        self._ahead: dict[tuple[str, ...], Future[list[dict[str, Tensor]]]] = {}

    # ------------------------------------------------------------------ the teacher's side

    @property
    def reads(self) -> tuple[str, ...] | None:
        """Columns that its model reads."""
        return self._live.reads if self._live is not None else self._known.reads

    def prepare(self, taps: frozenset[str], device: torch.device, until: str | None = None) -> None:
        stored = taps if self._header is None else frozenset(self._header.taps)
        if missing := sorted(taps - stored):
            raise ConfigurationError(
                f"{self.folder} holds {sorted(stored)}, the methods ask for {missing}: fill another folder."
            )
        self._device = device
        if self._reader is not None:
            return
        if self._live is not None:
            self._live.prepare(stored, device, until if until in stored and "logits" not in stored else None)
            self._write_header(stored)
        self._reader = ThreadPoolExecutor(1, "hf_compress-cache")
        self._refresh()

    def _write_header(self, taps: frozenset[str]) -> None:
        """What all of the folder is made with; another teacher or other settings are refused."""
        assert self._live is not None  # asked for with a model alone
        sizes, path = self._live.sizes, self.folder / HEADER
        inner = sizes.config.get_text_config() if sizes.config is not None else None
        about = _Header(
            version=1,
            teacher=_digest(self._live.model),
            taps=tuple(sorted(taps)),
            kind=cast(Any, sizes.kind),
            seq2seq=bool(getattr(sizes.config, "is_encoder_decoder", False)),
            vocab=sizes.vocab,
            embedded=getattr(inner, "vocab_size", None),
            layers=sizes.layers,
            heads=sizes.heads,
            causal=sizes.causal,
            names=dict(sizes.config.id2label) if sizes.kind in ("rows", "labels") and sizes.config else None,
            reads=self._live.reads,
            about=self._live.describe(),
            **vars(self._settings),
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        part, text = self.folder / f".{uuid4().hex}.part", about.model_dump_json(indent=1) + "\n"
        files.write_text(part, text)
        try:
            os.link(part, path)  # whole, or not at all if another process was faster: then its header counts
        except FileExistsError:
            self._header = _read_part(_Header, path)
            self._same(about)
        except OSError:  # a file system without links
            files.write_text(path, text)
        finally:
            part.unlink()
        self._header = about

    def _same(self, wanted: Any) -> None:
        """Refuses a folder that was made with something else."""
        for name in vars(wanted):
            was, value = getattr(self._header, name), getattr(wanted, name)
            if name not in ("about", "reads") and was != value:
                raise ConfigurationError(
                    f"{self.folder} was filled with {name}={was!r}, asked for is {value!r}: other targets. "
                    "Choose another folder, or the settings that it was filled with."
                )

    def epoch_began(self, epoch: int) -> None:
        """What all processes have made so far is there for each; from the second epoch on nothing is run any more."""
        self._epoch = epoch
        self.flush()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        self._refresh()

    def prefetch(self, batches: Sequence[Inputs]) -> None:
        """Begins to read the examples of batches to come, in another thread, a few at a time."""
        self._ahead.clear()
        self._queue = deque(tuple(self._keys(inputs)) for inputs in batches)
        self._read_ahead()

    def _read_ahead(self) -> None:
        while self._reader is not None and self._queue and len(self._ahead) < AHEAD:
            keys = self._queue.popleft()
            if all(key in self._places for key in keys):
                self._ahead[keys] = self._reader.submit(self._read_all, keys)

    def __call__(self, inputs: Inputs) -> Mapping[str, Tensor]:
        """Of the model, or zeros in the shapes that it would give: for a dry forward; `apart` gives what is stored."""
        if self._live is not None:
            return self._live(inputs)
        if not self._places:
            raise MismatchError(f"{self.folder} holds no example. Fill it: hf-compress cache, or CacheTeacher.fill.")
        rows, time = batch_size(inputs), tokens(inputs).shape[1]
        found = {}
        for name, values in self._read(next(iter(self._places))).items():
            width = (self.sizes.vocab,) if name == "logits" and self.sizes.vocab else values.shape[1:]  # 0: no classes
            found[name] = torch.zeros(rows, *(() if name in self._single else (time,)), *width, device=self._device)
        return {name: found[name] for name in self._known.taps}

    @property
    def _known(self) -> _Header:
        assert self._header is not None  # `prepare` has read or written it
        return self._header

    def apart(self, inputs: Inputs) -> tuple[Mapping[str, Tensor], Logits | None]:
        """The stored taps for one batch, padded like it, and the logits by rows."""
        keys = self._keys(inputs)
        if missing := self._missing(keys):
            self._fill(inputs, keys, missing)
        ahead = self._ahead.pop(tuple(keys), None)
        found = self._read_all(keys) if ahead is None else ahead.result()
        self._read_ahead()
        taps, logits = dict[str, Tensor](), None
        for name in self._known.taps:
            if name != "logits":
                taps[name] = self._padded(name, inputs, [one[name] for one in found])
            else:
                logits = self._logits(inputs, found)
        return taps, logits

    def run(self, *, grad: bool = False, **inputs: Any) -> Any:
        if self._live is None:
            raise ConfigurationError("a cache without its model cannot be run: CacheTeacher(folder, model).")
        return self._live.run(grad=grad, **inputs)

    def describe(self) -> facts.Model:
        return self._known.about

    def close(self) -> None:
        try:
            self.flush()
        finally:
            if self._reader is not None:
                self._reader.shutdown()
                self._reader = None
            self._open.clear()
            self._ahead.clear()
            self._queue.clear()
            if self._live is not None:
                self._live.close()

    # ------------------------------------------------------------------ examples

    def _keys(self, inputs: Inputs) -> list[str]:
        """A name of each example: its value in the key column, or a hash of what the teacher reads of it."""
        if (column := self._settings.key) is not None:
            if column not in inputs:
                raise MismatchError(f"{self.folder}: the batch has no column {column!r}; it has {sorted(inputs)}.")
            return [str(int(value)) for value in inputs[column]]
        reads = self.reads
        named = sorted({*(READ if reads is None else reads)} - UNREAD | ({"labels"} if self._is_seq2seq() else set()))
        if not (there := [name for name in named if name in inputs]):
            raise MismatchError(
                f"{self.folder}: nothing of {sorted(inputs)} tells examples apart. Give key=, the column of an id."
            )
        mask, decoded = tokens(inputs).cpu(), self._decoded(inputs).cpu()
        digests = [hashlib.sha256() for _ in range(batch_size(inputs))]
        for name in there:
            values, real = inputs[name].detach().cpu(), decoded if name in ("labels", "decoder_input_ids") else mask
            for row, digest in enumerate(digests):
                own = values[row][real[row]] if values.shape[:2] == real.shape else values[row]
                if name == "token_type_ids" and not own.any():  # what a model takes where there are none
                    continue
                digest.update(f"{name} {tuple(own.shape)} {own.dtype}".encode())
                digest.update(own.reshape(-1).view(torch.uint8).numpy().tobytes())
        return [digest.hexdigest() for digest in digests]

    def _missing(self, keys: Sequence[str]) -> list[int]:
        """The rows whose examples are not known."""
        return [row for row, key in enumerate(keys) if key not in self._places and key not in self._staged]

    def _is_seq2seq(self) -> bool:
        return bool(getattr(self.sizes.config, "is_encoder_decoder", False))

    def _decoded(self, inputs: Inputs) -> Tensor:
        """(batch, time) bool: the places whose logits are stored."""
        if self._is_seq2seq() and "labels" in inputs:
            return inputs["labels"] != IGNORED
        return tokens(inputs)

    def _places_of(self, name: str, inputs: Inputs) -> Tensor | None:
        """(batch, time) bool: of which places a tap is stored; None for taps without a time axis."""
        if not self._is_timed() and name == "logits":
            return None
        return self._decoded(inputs) if name == "logits" else tokens(inputs)

    # ------------------------------------------------------------------ filling

    def _fill(self, inputs: Inputs, keys: Sequence[str], missing: Sequence[int]) -> None:
        if self._live is None or self._epoch > 0:
            why = "there is no model to run" if self._live is None else "only the first epoch fills it"
            raise MismatchError(
                f"{self.folder} lacks {len(missing)} of the {len(keys)} examples of this batch, and {why}. Fill it "
                "with all rows as the Trainer reads them (same tokenizer, cut and augmentation): hf-compress cache, or "
                "CacheTeacher(folder, model).fill(batches)."
            )
        rows = torch.tensor(missing, device=next(iter(inputs.values())).device)
        part = {name: values[rows] for name, values in inputs.items() if values.dim() and len(values) == len(keys)}
        found = self._live(part)
        for place, row in enumerate(missing):
            if keys[row] not in self._staged:  # twice in one batch
                kept = [self._kept(name, tap, part, place) for name, tap in found.items()]
                self._add(keys[row], {name: values for tap in kept for name, values in tap.items()})
            if self._size >= SHARD or len(self._staged) >= EXAMPLES:
                self.flush()

    def _kept(self, name: str, tap: Tensor, inputs: Inputs, row: int) -> dict[str, Tensor]:
        """What is stored of one example's tap, by name of the tensor: (position, …), or (1, …) without a time axis."""
        where, tap = self._places_of(name, inputs), _time_first(name, tap)
        if where is None or tap.dim() < 3:
            self._single.add(name)
            return {name: self._narrow(name, tap[row][None])}
        if tap.shape[:2] != where.shape:
            raise ConfigurationError(
                f"{self.folder}: tap {name!r} of shape {tuple(tap.shape)} cannot be cached, as it does not follow the "
                f"tokens {tuple(where.shape)}."
            )
        own, k = tap[row][where[row]], self._settings.top_k
        if name != "logits" or k is None:
            return {name: self._narrow(name, own)}
        wide = own.to(torch.promote_types(own.dtype, torch.float32)).log_softmax(-1)
        known, ids = wide.topk(min(k, wide.shape[-1]), -1)
        return {"logits.ids": ids.int().cpu(), "logits": self._narrow(name, known)}

    def _narrow(self, name: str, values: Tensor) -> Tensor:
        """In the type that is stored.

        Raises:
            ConfigurationError: if it cannot hold them.
        """
        found = values.to(DTYPES[self._settings.dtype]).cpu()
        if not found.isfinite().all() and values.isfinite().all():
            raise ConfigurationError(
                f"{self.folder}: {name!r} reaches {values.abs().max():.3g}, more than {self._settings.dtype} holds. "
                'Give CacheTeacher(..., dtype="bfloat16") or "float32".'
            )
        return found

    def _add(self, key: str, kept: Mapping[str, Tensor]) -> None:
        timed = {len(values) for name, values in kept.items() if name not in self._single}
        assert len(timed) <= 1  # all follow the tokens
        start = next(reversed(self._staged.values()))[2] if self._staged else 0
        for name, values in kept.items():
            self._stage.setdefault(name, []).append(values)
            self._size += values.numel() * values.element_size()
        self._staged[key] = (len(self._staged), start, start + (timed.pop() if timed else 0))

    def flush(self) -> None:
        """Writes what is in memory as a shard of its own."""
        if not self._staged:
            return
        name = uuid4().hex
        path = self.folder / f"{name}.safetensors"
        with files.atomic_file(path) as part:
            save_file({tap: torch.cat(values).contiguous() for tap, values in self._stage.items()}, part)
            manifest = _Manifest(
                sha256=files.sha256(part),
                bytes=part.stat().st_size,
                single=tuple(sorted(self._single & self._stage.keys())),
                examples=dict(self._staged),
            )
        files.write_text(self.folder / f"{name}.json", manifest.model_dump_json() + "\n")
        self._take(name, manifest)
        self._stage, self._staged, self._size = {}, {}, 0

    def fill(self, batches: Iterable[Inputs], *, flush: bool = True) -> int:
        """Runs the teacher over batches; what is there already is passed over.

        Args:
            batches: as the Trainer will make them; only logits are stored unless `prepare` asked for more.
            flush: write what is in memory in the end; otherwise a shard is written when it is large enough.

        Returns:
            how many examples are known.
        """
        if self._live is None:
            raise ConfigurationError("there is no model to fill the cache with: CacheTeacher(folder, model).")
        if self._reader is None:
            self.prepare(frozenset({"logits"}), next(self._live.model.parameters()).device)
        for inputs in batches:
            given = {name: values for name, values in inputs.items() if isinstance(values, Tensor)}
            keys = self._keys(given)
            if missing := self._missing(keys):
                self._fill(given, keys, missing)
        if flush:
            self.flush()
        return len(self._places) + len(self._staged)

    # ------------------------------------------------------------------ reading

    def _refresh(self) -> None:
        """Takes up the shards that are new in the folder."""
        for path in sorted(self.folder.glob("*.json")):
            if path.name != HEADER and path.stem not in self._sums:
                self._take(path.stem, _read_part(_Manifest, path))

    def _take(self, name: str, manifest: _Manifest) -> None:
        path = self.folder / f"{name}.safetensors"
        if not path.is_file() or path.stat().st_size != manifest.bytes:
            raise self._torn(path)
        self._sums[name] = manifest.sha256
        self._single |= set(manifest.single)
        self._places |= {
            key: _Place(shard=name, number=number, start=start, stop=stop)
            for key, (number, start, stop) in manifest.examples.items()
        }

    @staticmethod
    def _torn(path: Path) -> ForeignFileError:
        return ForeignFileError(path, "is not what its manifest says.", "Remove both; the examples are made anew.")

    def holds(self, inputs: Inputs) -> bool:
        """Whether every example of a batch is there; unknown of another data set where a column names them."""
        return self._settings.key is None and not self._missing(self._keys(inputs))

    def _read_all(self, keys: Sequence[str]) -> list[dict[str, Tensor]]:
        return [self._read(key) for key in keys]

    def _read(self, key: str) -> dict[str, Tensor]:
        """(position, …) or (1, …) tensors of one example."""
        if (staged := self._staged.get(key)) is not None:
            return {name: values[staged[0]] for name, values in self._stage.items()}
        place = self._places[key]
        shard = self._open.get(place.shard) or self._opened(place.shard)
        span, single = slice(place.start, place.stop), slice(place.number, place.number + 1)
        found = {name: shard.get_slice(name)[single if name in self._single else span] for name in list(shard.keys())}
        rows = place.stop - place.start
        if any(len(values) != (1 if name in self._single else rows) for name, values in found.items()):
            raise self._torn(self.folder / f"{place.shard}.safetensors")  # a slice beyond the end is short, no error
        return found

    def _opened(self, name: str) -> Any:
        """A shard, compared with its checksum."""
        path = self.folder / f"{name}.safetensors"
        if files.sha256(path) != self._sums[name]:
            raise self._torn(path)
        if not self._fits(files.check_safetensors(path)):
            raise self._torn(path)
        with foreign.refusing(path, "as a shard", "Remove it and its manifest; the examples are made anew."):
            self._open[name] = safe_open(path, framework="pt")
        return self._open[name]

    def _fits(self, shard: Mapping[str, Any]) -> bool:
        """Whether a shard's tensors, from its header, have the names, types and width that the folder was made with."""
        about = self._known
        if {name.removesuffix(".ids") for name in shard} != set(about.taps):
            return False
        ids = {"logits.ids"} if about.top_k is not None and "logits" in about.taps and self._is_timed() else set()
        if {name for name in shard if name.endswith(".ids")} != ids:
            return False
        width = min(about.top_k, about.vocab) if ids and about.top_k is not None else about.vocab
        return all(
            each["dtype"] == ("I32" if name in ids else STORED[about.dtype])
            and (not name.startswith("logits") or not width or each["shape"][-1:] == [width])  # 0: no classes
            for name, each in shard.items()
        )

    def _is_timed(self) -> bool:
        """Whether logits are one for a position."""
        return self.sizes.kind in ("causal", "tokens")

    def _padded(self, name: str, inputs: Inputs, found: Sequence[Tensor]) -> Tensor:
        """A stored tap in the shape of the batch, 0 in padding."""
        values = torch.cat(list(found)).to(self._device, torch.float32)
        where = None if name in self._single else self._places_of(name, inputs)
        if where is None:
            return values
        self._check(len(values), where)
        padded = torch.zeros(*where.shape, *values.shape[1:], device=values.device)
        padded[where] = values
        return _time_first(name, padded)

    def _logits(self, inputs: Inputs, found: Sequence[Mapping[str, Tensor]]) -> Logits:
        where = self._places_of("logits", inputs)
        values = torch.cat([one["logits"] for one in found]).to(self._device)
        if where is None:
            if len(values) != len(found):
                raise MismatchError(f"{self.folder} holds {len(values)} rows for {len(found)} examples: fill it anew.")
            return Stored(values.float(), torch.ones_like(values[:, 0], dtype=torch.bool))
        self._check(len(values), where)
        if "logits.ids" not in found[0]:
            return Stored(values.float(), where)
        ids = torch.cat([one["logits.ids"] for one in found])
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.sizes.vocab:
            raise MismatchError(f"{self.folder} holds token {int(ids.max())} of {self.sizes.vocab}: fill it anew.")
        ids = ids.to(self._device)
        return Sparse(ids, values.float(), where)

    def _check(self, stored: int, where: Tensor) -> None:
        if stored != int(where.sum()):
            raise MismatchError(
                f"{self.folder} holds {stored} positions for a batch of {int(where.sum())}: the examples were cut "
                "otherwise when it was filled. Fill it anew, as the Trainer reads them."
            )


def _digest(model: nn.Module) -> str:
    """sha256 over a model's weights, in order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        if not isinstance(tensor, Tensor):  # what a quantised module packs
            digest.update(repr(tensor).encode())
            continue
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
