"""Data sets of ours: a mixture of domains whose weights move during a run, and resume exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .errors import ConfigurationError


class Rows(Protocol):
    """A map-style data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class Mixture(Dataset[Any]):
    """Draws rows from domains by weights that change at fixed places of the run.

    Row i belongs to interval ⌊max(i - lag, 0) / interval⌋, whose weights say from which domains its rows come; inside a
    domain rows follow its own order, from the beginning again when it runs out. What row i is depends on i, the seed and
    the weights of the intervals up to its own, and on nothing else: with the history of weights restored a resumed run
    reads the same rows, in any worker.

    A decision that is taken when the optimizer has consumed k · interval rows takes force `lag` rows later, because the
    loaders have fetched that much ahead by then. The Trainer must read rows in order:
    `train_sampling_strategy="sequential"`.

    Args:
        domains: by name, each with at least one row.
        size: rows of the mixture, i.e. of one epoch.
        interval: rows between two changes of the weights.
        lag: rows that may have been fetched ahead: global batch · (1 + workers · prefetch factor) at least.
        weights: of the first interval, ≥ 0; None: equal.
        seed: of the draws.

    Raises:
        ConfigurationError: for an empty domain, sizes below 1, or weights that are no distribution.
    """

    def __init__(
        self,
        domains: Mapping[str, Rows],
        *,
        size: int,
        interval: int,
        lag: int,
        weights: Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        if not domains or size < 1 or interval < 1 or lag < 0:
            raise ConfigurationError(
                f"Mixture: needs domains, size ≥ 1, interval ≥ 1 and lag ≥ 0, got {len(domains)}, {size}, {interval}, {lag}."
            )
        if empty := [name for name, rows in domains.items() if not len(rows)]:
            raise ConfigurationError(f"Mixture: the domains {empty} have no rows.")
        self.names = tuple(domains)
        self.domains = [domains[name] for name in self.names]
        self.size, self.interval, self.lag, self.seed = size, interval, lag, seed
        intervals = self.interval_of(size - 1) + 1
        self.history = torch.full((intervals, len(self.names)), math.nan, dtype=torch.float64).share_memory_()
        """(interval, domain) weights, NaN where not decided yet; shared, so that workers see a decision."""
        self.decide(0, [1 / len(self.names)] * len(self.names) if weights is None else weights)
        self._plans: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return self.size

    def interval_of(self, index: int) -> int:
        """The interval that row `index` belongs to."""
        return max(index - self.lag, 0) // self.interval

    def decide(self, interval: int, weights: Sequence[float] | Tensor) -> None:
        """Sets the weights of an interval; ignored beyond the last one.

        Raises:
            ConfigurationError: if they are no distribution, or the interval has other weights already.
        """
        given = torch.as_tensor(weights, dtype=torch.float64)
        if (
            given.shape != (len(self.names),)
            or not (given >= 0).all()
            or not torch.isclose(given.sum(), given.new_ones(()))
        ):
            raise ConfigurationError(
                f"Mixture: weights of {self.names} must be ≥ 0 and sum to 1, got {given.tolist()}."
            )
        if interval >= len(self.history):
            return
        present = self.history[interval]
        if not present.isnan().all() and not torch.equal(present, given):
            raise ConfigurationError(f"Mixture: interval {interval} has weights already, {present.tolist()}.")
        self.history[interval] = given

    def restore(self, history: Tensor) -> None:
        """Takes the weights of a resumed run; what was planned from others is forgotten."""
        if history.shape != self.history.shape:
            raise ConfigurationError(
                f"Mixture: a history of {tuple(history.shape)} does not fit one of {tuple(self.history.shape)} "
                "(intervals, domains): resume with the same domains, size, interval and lag."
            )
        self.history.copy_(history)
        self._plans.clear()

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.size:
            raise IndexError(index)
        interval = self.interval_of(index)
        first = 0 if interval == 0 else self.lag + interval * self.interval
        chosen, before = self._plan(interval)
        place = index - first
        domain = int(chosen[place])
        earlier = int(before[domain]) + int((chosen[:place] == domain).sum())
        rows = self.domains[domain]
        return rows[earlier % len(rows)]

    def _plan(self, interval: int) -> tuple[Tensor, Tensor]:
        """(rows of the interval,) domain of each, and (domain,) rows drawn from each before it."""
        if interval in self._plans:
            return self._plans[interval]
        weights = self.history[interval]
        if weights.isnan().any():
            raise ConfigurationError(
                f"Mixture: row of interval {interval} is read before its weights are decided. Use "
                'train_sampling_strategy="sequential" and a lag of at least the rows that are fetched ahead.'
            )
        before = torch.zeros(len(self.names), dtype=torch.long)
        if interval:
            drawn, start = self._plan(interval - 1)
            before = start + torch.bincount(drawn, minlength=len(self.names))
        length = self.interval + (self.lag if interval == 0 else 0)
        draw = torch.Generator().manual_seed(hash((self.seed, interval)) & (2**63 - 1))
        chosen = torch.multinomial(weights, length, replacement=True, generator=draw)
        self._plans[interval] = (chosen, before)
        return self._plans[interval]


def check_mixture(data: Any, sampling: str) -> None:
    """Refuses to read a `Mixture` out of order: its weights belong to places of the run.

    Raises:
        ConfigurationError: naming the setting.
    """
    if isinstance(data, Mixture) and str(getattr(sampling, "value", sampling)) != "sequential":
        raise ConfigurationError(
            f"a Mixture is read in order, and train_sampling_strategy is {sampling!r}. "
            'Pass TrainingArguments(train_sampling_strategy="sequential").'
        )
