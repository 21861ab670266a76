"""Distributions of a teacher of which the likeliest tokens are known and the rest only as a sum."""

from __future__ import annotations

import torch
from torch import Tensor


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


class Sparse:
    """The likeliest tokens of each stored position.

    Args:
        ids: (stored, k).
        known: (stored, k) log-probabilities.
        place: (batch · time,) the stored position of each place; any where none is scored.
    """

    def __init__(self, ids: Tensor, known: Tensor, place: Tensor) -> None:
        self._ids, self._known, self._place = ids, known, place
        self.count = len(place)

    def rows(self, index: Tensor, beside: Tensor) -> Tensor:
        stored = self._place[index]
        return completed(self._ids[stored], self._known[stored], beside)


class Stored:
    """Whole logits of each stored position; arguments as `Sparse`."""

    def __init__(self, logits: Tensor, place: Tensor) -> None:
        self._logits, self._place = logits, place
        self.count = len(place)

    def rows(self, index: Tensor, beside: Tensor) -> Tensor:
        return self._logits[self._place[index]]
