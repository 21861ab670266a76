"""Which pieces of a tokenizer are kept, and the JSON of `tokenizers` without the others.

A text whose tokens are all kept is encoded as before. WordPiece takes the longest piece that fits and Unigram the path
of largest score: what was best among all is best among fewer. BPE needs the merges that led to a piece, and their
parts; the order of merges inside a piece does not depend on what stands beside it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Set
from itertools import pairwise
from typing import Any

from hf_compress.errors import ConfigurationError

KINDS = ("BPE", "WordPiece", "Unigram", "WordLevel")
Spec = dict[str, Any]
"""What `Tokenizer.to_str()` gives, parsed."""


class Pieces:
    """The pieces of a tokenizer, by what its JSON says.

    Args:
        spec: of the whole tokenizer.
        named: further pieces that must stay.

    Raises:
        ConfigurationError: for a kind of tokenizer that cannot be cut.
    """

    def __init__(self, spec: Spec, named: Set[str] = frozenset()) -> None:
        model = spec["model"]
        self.spec, self.kind = spec, model.get("type")
        if self.kind not in KINDS or (model.get("continuing_subword_prefix") and self.kind == "BPE"):
            raise ConfigurationError(
                f"shrink_vocabulary cuts tokenizers of the kinds {', '.join(KINDS)}, and BPE without a prefix; this "
                f"one is {self.kind}. Keep its vocabulary."
            )
        listed = [piece for piece, _ in model["vocab"]] if self.kind == "Unigram" else model["vocab"]
        self.own: dict[str, int] = dict(listed) if isinstance(listed, dict) else {p: at for at, p in enumerate(listed)}
        self.added: dict[str, int] = {token["content"]: token["id"] for token in spec.get("added_tokens") or ()}
        self.ids = self.own | self.added
        self.suffix: str = model.get("end_of_word_suffix") or ""
        merges = [
            tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model.get("merges", ())
        ]
        self.ranks: dict[tuple[str, ...], int] = {merge: rank for rank, merge in enumerate(merges)}
        self.named = named

    def necessary(self) -> set[str]:
        """Added tokens, what the tokenizer names, and the alphabet: what every text is encoded with if need be."""
        model = self.spec["model"]
        found = {*self.added, *(self.named & self.ids.keys()), *_named(self.spec.get("post_processor"))}
        found |= {model["unk_token"]} & self.own.keys() if model.get("unk_token") else set()
        if self.kind == "Unigram":
            scores = dict(model["vocab"])
            found.add(min(scores, key=scores.__getitem__))  # the score of an unknown character depends on the least
            if model.get("unk_id") is not None:
                found.add(model["vocab"][model["unk_id"]][0])
        if model.get("byte_fallback"):
            found |= {piece for piece in self.own if len(piece) == 6 and piece.startswith("<0x")}
        elif self.kind != "WordLevel":
            found |= {piece for piece in self.own if len(self._core(piece)) == 1}
        return found

    def _core(self, piece: str) -> str:
        """Without the mark of a piece inside or at the end of a word."""
        prefix = self.spec["model"].get("continuing_subword_prefix") or ""
        return piece.removeprefix(prefix if self.kind == "WordPiece" else "").removesuffix(self.suffix)

    def parts(self, piece: str) -> set[str]:
        """The piece and all from which BPE merges it, on its way."""
        if self.kind != "BPE" or piece not in self.own:
            return {piece}
        core = piece.removesuffix(self.suffix)
        symbols = [*core[:-1], piece[len(core) - 1 :]] if core else [piece]
        found = {piece, *(symbol for symbol in symbols if symbol in self.own)}
        while len(symbols) > 1:
            pairs = list(pairwise(symbols))
            at = min(range(len(pairs)), key=lambda place: self.ranks.get(pairs[place], len(self.ranks)))
            if pairs[at] not in self.ranks:
                break  # in the vocabulary, and no merge leads there: taken whole, or never
            symbols[at : at + 2] = ["".join(pairs[at])]
            found.add(symbols[at])
        return found

    def choose(self, counts: Mapping[str, int], *, size: int | None, min_count: int) -> set[str]:
        """The pieces that are kept: all necessary ones, then by count, each with its parts, while they fit.

        Raises:
            ConfigurationError: if the necessary ones alone are more than `size`.
        """
        kept = self.necessary()
        if size is not None and len(kept) > size:
            raise ConfigurationError(
                f"size={size}: {len(kept)} pieces must stay (special and added tokens, and the alphabet). Give at "
                "least that many."
            )
        for piece in sorted(counts, key=lambda piece: (-counts[piece], self.ids[piece])):
            if counts[piece] >= min_count:
                more = self.parts(piece) | kept
                if size is None or len(more) <= size:
                    kept = more
        return kept

    def cut(self, kept: Set[str]) -> tuple[Spec, list[int]]:
        """The JSON of the kept pieces, and the old id of each new one.

        Pieces of the model come first, then added tokens that it does not know, both in the order of their old ids.
        """
        own = sorted(kept & self.own.keys(), key=self.own.__getitem__)
        late = sorted(kept - self.own.keys(), key=self.added.__getitem__)
        new = {piece: at for at, piece in enumerate([*own, *late])}
        spec = copy.deepcopy(self.spec)
        model = spec["model"]
        if self.kind == "Unigram":
            scores = dict(model["vocab"])
            if model.get("unk_id") is not None:
                model["unk_id"] = new[model["vocab"][model["unk_id"]][0]]
            model["vocab"] = [[piece, scores[piece]] for piece in own]
        else:
            model["vocab"] = {piece: new[piece] for piece in own}
        if "merges" in model:
            inside = set(own)
            model["merges"] = [list(merge) for merge in self.ranks if {*merge, "".join(merge)} <= inside]
        for token in spec.get("added_tokens") or ():
            token["id"] = new[token["content"]]
        spec["added_tokens"] = sorted(spec.get("added_tokens") or (), key=lambda token: token["id"])
        spec["post_processor"] = _renamed(spec.get("post_processor"), new)
        if spec.get("padding"):
            spec["padding"]["pad_id"] = new[spec["padding"]["pad_token"]]
        return spec, [self.ids[piece] for piece in new]


def _named(value: Any) -> set[str]:
    """Tokens that a post-processor adds."""
    if isinstance(value, list):
        return {token for each in value for token in _named(each)}
    if not isinstance(value, dict):
        return set()
    found = {token for part in value.values() for token in _named(part)}
    found |= {value[name][0] for name in ("sep", "cls") if name in value}
    return found | (set(value["tokens"]) if "ids" in value else set())


def _renamed(value: Any, new: Mapping[str, int]) -> Any:
    """A post-processor with the new ids of its tokens."""
    if isinstance(value, list):
        return [_renamed(each, new) for each in value]
    if not isinstance(value, dict):
        return value
    found = {name: _renamed(part, new) for name, part in value.items()}
    for name in ("sep", "cls"):
        if name in value:
            found[name] = [value[name][0], new[value[name][0]]]
    if "ids" in value:
        found["ids"] = [new[token] for token in value["tokens"]]
    return found
