"""A smaller vocabulary: the pieces that texts use, the tokenizer cut to match, and the model's rows for them."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_compress import foreign
from hf_compress.errors import ConfigurationError
from hf_compress.taps import evaluating

from . import axes as a
from . import mapping
from . import sizes as s
from .pieces import Pieces
from .proof import sample
from .student import Change, built, cleared

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TEXTS = 1000
"""Encoded at a time."""
_LISTS = ("suppress_tokens", "begin_suppress_tokens")
_TABLES = ("lang_to_id", "task_to_id")
"""Of a generation config, beside what ends in token_id."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A model with a smaller vocabulary, which computes what the teacher computes on texts of its pieces."""

    student: PreTrainedModel
    tokenizer: Any
    ids: tuple[int, ...]
    """The teacher's id of each token."""
    change: Change


def shrink_vocabulary(
    model: PreTrainedModel, tokenizer: Any, texts: Iterable[str], *, size: int | None = None, min_count: int = 1
) -> tuple[PreTrainedModel, Any]:
    """A copy of the model with fewer tokens, and its tokenizer.

    A text whose tokens are all kept is encoded to the same pieces, and the outputs are the teacher's (logits: at the
    kept tokens). Any other text still encodes, to smaller pieces. To distil a student that is smaller otherwise too,
    cut the vocabulary of its teacher first, and take that as the teacher: both must read the same ids.

    Special and added tokens, the tokens that configs name and the alphabet (bytes, single characters) are always kept.

    Args:
        model: with token embeddings; nothing of it is changed.
        tokenizer: of the model, one of the library `tokenizers`: BPE, WordPiece, Unigram or WordLevel.
        texts: what the tokens are counted on.
        size: most tokens that are kept, the most frequent first; None: all that occur.
        min_count: least number of occurrences of a token.

    Raises:
        ConfigurationError: for a tokenizer that cannot be cut, a size below what must stay, a model whose outputs would
            change.
        MismatchError: if the tokenizer has ids that the model does not embed.
    """
    found = cut_vocabulary(model, tokenizer, texts, size=size, min_count=min_count)
    return found.student, found.tokenizer


def cut_vocabulary(
    model: PreTrainedModel, tokenizer: Any, texts: Iterable[str], *, size: int | None = None, min_count: int = 1
) -> Cut:
    """As `shrink_vocabulary`, with the kept ids and what was given up."""
    if isinstance(texts, str) or (size is not None and size < 1) or min_count < 1:
        raise ConfigurationError(
            f"shrink_vocabulary: texts must be several, size and min_count at least 1; got size={size}, "
            f"min_count={min_count}{', and one text: pass [text]' if isinstance(texts, str) else ''}."
        )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigurationError(
            f"shrink_vocabulary cuts tokenizers of the library `tokenizers`; {type(tokenizer).__name__} is none. Load "
            "it with AutoTokenizer, or keep its vocabulary."
        )
    names = {*tokenizer.all_special_tokens, *tokenizer.convert_ids_to_tokens(_named(model, len(tokenizer)))}
    pieces = Pieces(json.loads(backend.to_str()), names)
    counts = _counted(tokenizer, texts)
    foreign.check_ids([[*pieces.ids.values()]], model, tokenizer)
    kept = pieces.choose(counts, size=size, min_count=min_count)
    spec, ids = pieces.cut(kept)
    smaller = _rebuilt(tokenizer, spec)
    student = _rows(model, ids)
    covered = sum(count for piece, count in counts.items() if piece in kept)
    change = Change(
        size="vocabulary",
        before=model.config.vocab_size,
        after=len(ids),
        parameters_before=_count(model),
        parameters_after=_count(student),
        kept=covered / max(sum(counts.values()), 1),
        of="tokens of the texts",
    )
    return Cut(student=student, tokenizer=smaller, ids=tuple(ids), change=change)


def _count(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _counted(tokenizer: Any, texts: Iterable[str]) -> Counter[str]:
    """Occurrences of each token, special ones left out.

    Raises:
        ConfigurationError: if there is no text.
    """
    counts: Counter[int] = Counter()
    for some in _batches(texts):
        with foreign.encoding(tokenizer):
            for row in tokenizer(some, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]:
                counts.update(row)
    if not counts:
        raise ConfigurationError("shrink_vocabulary: texts hold no token. Give the texts that the student will read.")
    pieces = tokenizer.convert_ids_to_tokens(list(counts))
    return Counter(dict(zip(pieces, counts.values(), strict=True)))


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(texts)
    while some := list(islice(rest, _TEXTS)):
        yield some


def _rebuilt(tokenizer: Any, spec: dict[str, Any]) -> Any:
    """The tokenizer with other pieces, made as it will be loaded: from its folder.

    Raises:
        ConfigurationError: if its class makes something else of that folder.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        (Path(folder) / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
        found = type(tokenizer).from_pretrained(folder)
    found.name_or_path = tokenizer.name_or_path
    expected = Pieces(spec).ids
    if found.get_vocab() != expected:
        differing = sorted(found.get_vocab().items() ^ expected.items())[:3]
        raise ConfigurationError(
            f"shrink_vocabulary cannot cut a {type(tokenizer).__name__}: loaded again it has other ids ({differing}). "
            "Load it as PreTrainedTokenizerFast, or keep its vocabulary."
        )
    return found


def _rows(model: PreTrainedModel, ids: Sequence[int]) -> PreTrainedModel:
    """The model with the rows of these ids, in that order.

    Raises:
        ConfigurationError: if its outputs are others than before.
    """
    found = mapping.find(model, {"vocabulary"})
    if not found.axes:
        raise ConfigurationError(
            f"shrink_vocabulary: {type(model).__name__} has no token embeddings. Leave it as it is."
        )
    kept = torch.tensor(ids)
    config = cleared(s.resized(model.config, {"vocabulary": len(ids)}))
    new = {old: at for at, old in enumerate(ids)}
    for name, value in _ids(config):
        if isinstance(value, int) and value not in new and 0 <= value < model.config.vocab_size:
            raise ConfigurationError(
                f"shrink_vocabulary: {name}={value} of the config is no token of the tokenizer. Set it to one "
                "that is, or to None."
            )
    _renumber(config, new)
    config.compression_start = f"vocabulary {len(ids)} of {model.config.vocab_size} of the teacher"
    s.check_loadable(config, f"{len(ids)} tokens")
    student = built(model, config, a.gathered(model.state_dict(), found.axes, {("vocabulary", ""): kept}))
    if (generation := getattr(student, "generation_config", None)) is not None:
        _renumber(generation, new)
    _check_outputs(model, student, kept)
    return student


def _named(model: PreTrainedModel, count: int) -> list[int]:
    """Ids below `count` that config and generation config name as one token or a few."""
    found: set[int] = set()
    for config in (model.config, getattr(model, "generation_config", None)):
        for name, value in _ids(config):
            if name not in _LISTS:
                found.update(
                    value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
                )
    return sorted(token for token in found if 0 <= token < count)


def _ids(config: Any) -> Iterator[tuple[str, Any]]:
    """Attributes of a config that are token ids: a number, numbers, or numbers by name."""
    for name, value in vars(config).items() if config is not None else ():
        numbers = value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else [value]
        known = name.endswith(("token_id", "token_ids")) or name in _LISTS or name in _TABLES
        if known and numbers and all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
            yield name, value


def _renumber(config: Any, new: dict[int, int]) -> None:
    """Writes the new ids; of tokens that must not be generated those that are left."""
    for name, value in list(_ids(config)):
        if isinstance(value, list):
            changed: Any = [new[token] for token in value if token in new]
        elif isinstance(value, dict):
            changed = {key: new[token] for key, token in value.items() if token in new}
        else:
            changed = new.get(value, value)
        setattr(config, name, changed)


def _check_outputs(model: PreTrainedModel, student: PreTrainedModel, kept: Tensor) -> None:
    """Compares the two on a sample of kept tokens: RoBERTa's positions depend on the id of its padding, say."""
    inputs = {name: value.to(model.device) for name, value in sample(student).items()}
    before = {
        name: kept.to(value.device)[value] if value.dtype == torch.long else value for name, value in inputs.items()
    }
    with evaluating(model), evaluating(student), torch.no_grad():
        given, found = model(**before, return_dict=True), student(**inputs, return_dict=True)
    for name, value in found.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        expected = given[name]
        if expected.shape != value.shape:
            expected = expected[..., kept.to(expected.device)]
        slack = 1e-4 if value.dtype in (torch.float32, torch.float64) else 2e-2
        if not torch.allclose(value, expected, rtol=0, atol=slack * (1 + float(expected.abs().max()))):
            raise ConfigurationError(
                f"shrink_vocabulary: with other ids {type(model).__name__} gives another {name}, so its numbers depend "
                "on ids: those of padding or end, say. Keep its vocabulary."
            )
