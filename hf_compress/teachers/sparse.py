"""Distributions of a teacher of which the likeliest tokens are known and the rest only as a sum."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_compress.errors import ConfigurationError


def completed(ids: Tensor, known: Tensor, beside: Tensor) -> Tensor:
    """Log-probabilities over the whole vocabulary: the known ones, and the rest in the shape of another distribution.

    What is left of the probability is spread as `beside` spreads it over the same tokens. A KL divergence between the
    two is then exactly that over the known tokens and one bucket of all others: at least 0, and 0 only if the known
    tokens agree.

    Args:
        ids: (position, k) different tokens; -1 where fewer are known. Those that `beside` lacks are passed over.
        known: (position, k) their log-probabilities, normalised over the whole vocabulary.
        beside: (position, vocab) logits, detached here.

    Returns:
        (position, vocab) in float32 or wider.
    """
    dtype = torch.promote_types(beside.dtype, torch.float32)
    shape = beside.detach().to(dtype).log_softmax(-1)
    there = (ids >= 0) & (ids < beside.shape[-1])
    places, values = ids.clamp(0, beside.shape[-1] - 1).long(), known.to(dtype).masked_fill(~there, -torch.inf)
    taken = torch.zeros_like(shape).scatter_reduce(1, places, there.to(dtype), "amax") > 0
    rest = (1 - values.exp().sum(-1, keepdim=True)).clamp(min=torch.finfo(dtype).tiny).log()
    others = shape.masked_fill(taken, -torch.inf)
    spread = others - others.logsumexp(-1, keepdim=True).clamp(min=torch.finfo(dtype).min) + rest
    return spread.masked_fill(taken, -torch.inf).scatter_reduce(1, places, values, "amax")


class _Known:
    """Rows of which those of some places are known."""

    def __init__(self, where: Tensor) -> None:
        self.there: Tensor | None = where.flatten()
        self._place = (where.flatten().cumsum(0) - 1).clamp(min=0)
        self.count = len(self._place)


class Sparse(_Known):
    """The likeliest tokens of each known row.

    Args:
        ids: (known, k).
        values: (known, k) log-probabilities.
        where: (batch, time) bool, the places of the rows.
    """

    def __init__(self, ids: Tensor, values: Tensor, where: Tensor) -> None:
        super().__init__(where)
        self._ids, self._values = ids, values

    def rows(self, index: Tensor, beside: Tensor | None) -> Tensor:
        if beside is None:
            raise ConfigurationError(
                "this teacher tells its likeliest tokens alone, and the student has other tokens, by which the rest "
                "cannot be told. Give a model, or a cache of it without top_k."
            )
        stored = self._place[index]
        return completed(self._ids[stored], self._values[stored], beside)


class Stored(_Known):
    """Whole logits (known, vocab) of each known row; `where` as of `Sparse`."""

    def __init__(self, logits: Tensor, where: Tensor) -> None:
        super().__init__(where)
        self._logits = logits

    def rows(self, index: Tensor, beside: Tensor | None) -> Tensor:
        return self._logits[self._place[index]]
