"""StochasTok: some tokens of the training text are split at random into two smaller tokens of the same vocabulary.

Sims, Foster, Kaleb, Nguyen, Lee, Foerster, Teh, Lu: StochasTok: Improving Fine-Grained Subword Understanding in LLMs,
2025, arXiv:2506.01687, section 3.

    expansions(w) = { (w[:j], w[j:]) : 0 < j < |w|, both in the vocabulary }      for each token w of two bytes or more
    n = ⌊p · |x|⌋ trials on the current sequence: draw a position; if its token has expansions, put a drawn one in its
    place (the sequence grows by one), else the trial is lost

Parts may be split again; n is fixed by the original length. The text that the tokens spell does not change, nor do the
vocabulary and inference. The labels are the expanded tokens themselves. With a teacher of the same tokenizer both read
the expanded tokens. There is no gradient here.

The authors expand each document once, before training, from global generators; here a row's expansion is a function of
(seed, epoch, row), so that it is the same in any worker and after a resume, and another one in each epoch. Special
tokens and tokens without an expansion stay, where the authors' table holds no special tokens and their code demands an
expansion of every other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hf_compress.data import Augmented, Rows
from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.objective import IGNORED
from hf_compress.registry import Method

Pairs = Mapping[int, Sequence[tuple[int, int]]]
PROBED = 16
"""Expansions that are decoded to see whether the tokenizer's tokens can be cut."""


@dataclass(frozen=True, kw_only=True)
class StochasTokConfig:
    """Hyper-parameters of StochasTok."""

    p: float = 0.1
    """Trials by tokens of a row, at least 0; above 1 parts are split again and again. The authors' value."""
    max_num_to_expand: int | None = None
    """Most splits of a row; None: no limit, as the authors train."""

    def __post_init__(self) -> None:
        if not 0 <= self.p < float("inf"):
            raise ConfigurationError(f"stochastok: p must be at least 0 and finite, got {self.p}.")
        if self.max_num_to_expand is not None and self.max_num_to_expand < 0:
            raise ConfigurationError(f"stochastok: max_num_to_expand must be at least 0, got {self.max_num_to_expand}.")


def expansions(vocabulary: Mapping[bytes, int]) -> dict[int, list[tuple[int, int]]]:
    """Every way to spell a token with two others, by id, cuts from left to right.

    Args:
        vocabulary: token bytes to id, without special tokens.

    Returns:
        ids that have an expansion, each with (left id, right id) pairs; single bytes have none.
    """
    found = {
        index: [
            (vocabulary[token[:cut]], vocabulary[token[cut:]])
            for cut in range(1, len(token))
            if token[:cut] in vocabulary and token[cut:] in vocabulary
        ]
        for token, index in vocabulary.items()
    }
    return {index: pairs for index, pairs in found.items() if pairs}


def expand(
    ids: Sequence[int],
    pairs: Pairs,
    *,
    position: Callable[[int], int],
    choose: Callable[[Sequence[tuple[int, int]]], tuple[int, int]],
    config: StochasTokConfig,
) -> tuple[list[int], list[int]]:
    """One sequence with some tokens split.

    Args:
        ids: (token,) ids.
        pairs: of `expansions`.
        position: draws from 0 … length - 1, given the current length.
        choose: draws one of a token's expansions.
        config: p and the limit.

    Returns:
        (new token,) ids that spell the same bytes, at most ⌊p · token⌋ more, and (new token,) the place in `ids` that
        each comes from.
    """
    new, origin = list(ids), list(range(len(ids)))
    most = config.max_num_to_expand
    for _ in range(int(len(ids) * config.p)):
        if most is not None and len(new) - len(ids) >= most:
            break
        place = position(len(new))
        if options := pairs.get(new[place]):
            new[place : place + 1] = choose(options)
            origin.insert(place, origin[place])
    return new, origin


def augment(
    row: Mapping[str, Any],
    draw: torch.Generator,
    *,
    pairs: Pairs,
    config: StochasTokConfig,
    max_length: int | None,
) -> dict[str, Any]:
    """A row with its `input_ids` expanded, `labels` and `attention_mask` along with them, cut to `max_length`.

    Raises:
        MismatchError: if a label is neither -100 nor the token at its place: then parts would have no label.
    """

    def below(number: int) -> int:
        return int(torch.randint(number, (), generator=draw))

    ids = torch.as_tensor(row["input_ids"]).tolist()
    new, origin = expand(ids, pairs, position=below, choose=lambda options: options[below(len(options))], config=config)
    new, origin = new[:max_length], origin[:max_length]
    changed = dict(row) | {"input_ids": new}
    if "labels" in row:
        labels = torch.as_tensor(row["labels"]).tolist()
        if len(labels) != len(ids) or any(
            label not in (IGNORED, token) for label, token in zip(labels, ids, strict=True)
        ):
            raise MismatchError(
                "stochastok: labels must be the input_ids, or -100 where they do not count. For other labels there is "
                "no telling what a part of a token is labelled with."
            )
        changed["labels"] = [
            IGNORED if labels[place] == IGNORED else token for token, place in zip(new, origin, strict=True)
        ]
    if "attention_mask" in row:
        mask = torch.as_tensor(row["attention_mask"]).tolist()
        changed["attention_mask"] = [mask[place] for place in origin]
    return changed


def byte_vocabulary(tokenizer: Any) -> dict[bytes, int]:
    """Token bytes to id of a byte-level tokenizer, special and added tokens left out.

    Raises:
        ConfigurationError: for a tokenizer whose tokens are not written in the byte-level alphabet.
    """
    alphabet = {letter: byte for byte, letter in bytes_to_unicode().items()}
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    found: dict[bytes, int] = {}
    for token, index in tokenizer.get_vocab().items():
        if index in special:
            continue
        if not set(token) <= alphabet.keys():
            raise _not_byte_level(f"its token {token!r} is not in the byte-level alphabet")
        found[bytes(alphabet[letter] for letter in token)] = index
    return found


def _check_text(tokenizer: Any, vocabulary: Mapping[bytes, int], pairs: Pairs) -> None:
    """Some expansions must read as their token: a WordPiece's parts do not, though all its letters are bytes'.

    Raises:
        ConfigurationError: with the first that does not.
    """
    plain = [index for token, index in vocabulary.items() if token.isascii() and index in pairs]
    for index in islice(plain, PROBED):
        whole, parts = (
            tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in ([index], list(pairs[index][0]))
        )
        if whole != parts:
            raise _not_byte_level(f"its token {whole!r} in two parts reads {parts!r}")


def _not_byte_level(problem: str) -> ConfigurationError:
    return ConfigurationError(
        f"stochastok: the tokenizer's tokens cannot be cut at any byte: {problem}. Use a byte-level BPE "
        "tokenizer (GPT-2, Llama 3, Qwen)."
    )


def stochastok(
    dataset: Rows,
    *,
    tokenizer: Any,
    config: StochasTokConfig | None = None,
    seed: int = 0,
    max_length: int | None = None,
) -> Augmented:
    """The data set with its tokens split anew in each epoch; train with `callbacks=[data.callback()]`.

    Args:
        dataset: rows of `input_ids`, neither packed nor padded: lengths grow. `labels` that are the ids or -100 and an
            `attention_mask` grow with them; other columns stay as they are.
        tokenizer: byte-level.
        config: p and the limit; None: the authors'.
        seed: of the draws, with epoch and row.
        max_length: tokens kept of a row; None: all.

    Raises:
        ConfigurationError: for another kind of tokenizer, or one none of whose tokens can be split.
    """
    vocabulary = byte_vocabulary(tokenizer)
    pairs = expansions(vocabulary)
    if not pairs:
        raise _not_byte_level("none consists of two others")
    _check_text(tokenizer, vocabulary, pairs)
    change = partial(augment, pairs=pairs, config=config or StochasTokConfig(), max_length=max_length)
    return Augmented(dataset, change, seed)


METHOD = Method(
    title="StochasTok: Improving Fine-Grained Subword Understanding in LLMs",
    paper="arXiv:2506.01687",
    authors="Anya Sims, Thom Foster, Klara Kaleb, Tuan-Duy H. Nguyen, Joseph Lee, Jakob N. Foerster, Yee Whye Teh, "
    "Cong Lu",
    year=2025,
    summary="Splits some tokens of the training text at random, so that the model learns what letters they hold.",
    bibtex="""@misc{sims2025stochastok,
  title = {{StochasTok}: Improving Fine-Grained Subword Understanding in {LLMs}},
  author = {Sims, Anya and Foster, Thom and Kaleb, Klara and Nguyen, Tuan-Duy H. and Lee, Joseph and
            Foerster, Jakob N. and Teh, Yee Whye and Lu, Cong},
  year = {2025}, eprint = {2506.01687}, archivePrefix = {arXiv}
}""",
    tasks=("text-generation",),
    preparation=stochastok,
)
