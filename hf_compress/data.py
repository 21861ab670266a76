"""Data sets of ours: a mixture of domains whose weights move during a run, and rows that are drawn anew in each epoch.

What a row is depends on its index, seeds and state that is saved, never on global generators: it is the same in any
worker and after a resume.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainerCallback

from .distiller import generator
from .errors import ConfigurationError

CPU = torch.device("cpu")


class Rows(Protocol):
    """A map-style data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def _shared(tensor: Tensor) -> Tensor:
    """In memory that the workers of a loader see, persistent ones too."""
    return cast(Tensor, tensor.share_memory_())  # type: ignore[no-untyped-call]


class Mixture(Dataset[Any]):
    """Draws rows from domains by weights that change at fixed places of the run.

    Row i belongs to interval ⌊max(i - lag, 0) / interval⌋, whose weights say from which domains its rows come; inside a
    domain rows follow its own order, from the beginning again when it runs out. What row i is depends on i, the seed
    and the weights of the intervals up to its own, and on nothing else: with the history of weights restored a resumed
    run reads the same rows, in any worker.

    A decision that is taken when the optimizer has consumed k · interval rows takes force `lag` rows later, because the
    loaders have fetched that much ahead by then. The Trainer must read rows in order:
    `train_sampling_strategy="sequential"`.

    Args:
        domains: by name, each with at least one row.
        size: rows of the mixture; of the whole run, as a second epoch reads the same rows again.
        interval: rows between two changes of the weights, a multiple of the optimizer step's rows.
        lag: rows that may have been fetched ahead: those of 1 + workers · prefetch factor device batches over all
            processes, at least. With less, a row may be asked for before its weights are decided, which raises.
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
        weights: Sequence[float] | Tensor | None = None,
        seed: int = 0,
    ) -> None:
        if not domains or size < 1 or interval < 1 or lag < 0:
            raise ConfigurationError(
                "Mixture: needs domains, size ≥ 1, interval ≥ 1 and lag ≥ 0, got "
                f"{len(domains)}, {size}, {interval}, {lag}."
            )
        if empty := [name for name, rows in domains.items() if not len(rows)]:
            raise ConfigurationError(f"Mixture: the domains {empty} have no rows.")
        self.names = tuple(domains)
        self.domains = [domains[name] for name in self.names]
        self.size, self.interval, self.lag, self.seed = size, interval, lag, seed
        intervals = self.interval_of(size - 1) + 1
        self.history = _shared(torch.full((intervals, len(self.names)), math.nan, dtype=torch.float64))
        """(interval, domain) weights, NaN where not decided yet; shared, so that workers see a decision."""
        self._restored = _shared(torch.zeros((), dtype=torch.long))
        self._known = 0
        self._before = [torch.zeros(len(self.names), dtype=torch.long)]
        self._plan: _Plan | None = None
        self.decide(0, [1 / len(self.names)] * len(self.names) if weights is None else weights)

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
        given = torch.as_tensor(weights, dtype=torch.float64, device=CPU)
        fits = given.shape == (len(self.names),) and bool((given >= 0).all())
        if not fits or abs(float(given.sum()) - 1) > 1e-5:
            raise ConfigurationError(
                f"Mixture: weights of {self.names} must be ≥ 0 and sum to 1, got {given.tolist()}."
            )
        if interval < 0:
            raise ConfigurationError(f"Mixture: intervals count from 0, got {interval}.")
        if interval >= len(self.history):
            return
        present = self.history[interval]
        if not present.isnan().all() and not torch.equal(present, given):
            raise ConfigurationError(f"Mixture: interval {interval} has weights already, {present.tolist()}.")
        present.copy_(given)

    def restore(self, history: Tensor) -> None:
        """Takes the weights of a resumed run; workers, too, forget what they had planned from others.

        Args:
            history: (interval, domain) as `history`, on any device.

        Raises:
            ConfigurationError: if its shape is another.
        """
        if history.shape != self.history.shape:
            raise ConfigurationError(
                f"Mixture: a history of {tuple(history.shape)} does not fit one of {tuple(self.history.shape)} "
                "(intervals, domains): resume with the same domains, size, interval and lag."
            )
        self.history.copy_(history)
        self._restored += 1

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.size:
            raise IndexError(index)
        plan = self._plan_of(self.interval_of(index))
        rows = self.domains[int(plan.domains[index - plan.first])]
        return rows[int(plan.places[index - plan.first]) % len(rows)]

    def _plan_of(self, interval: int) -> _Plan:
        if self._known != (restored := int(self._restored)):
            self._known, self._before, self._plan = restored, self._before[:1], None
        if self._plan is None or self._plan.interval != interval:
            while len(self._before) <= interval:  # a resumed run starts far from the beginning
                drawn = self._draw(len(self._before) - 1)
                self._before.append(self._before[-1] + torch.bincount(drawn, minlength=len(self.names)))
            self._plan = self._make_plan(interval)
        return self._plan

    def _make_plan(self, interval: int) -> _Plan:
        domains = self._draw(interval)
        places = torch.empty_like(domains)
        for domain, before in enumerate(self._before[interval].tolist()):
            own = domains == domain
            places[own] = before + torch.arange(int(own.sum()))
        first = self.lag + interval * self.interval if interval else 0
        return _Plan(interval=interval, first=first, domains=domains, places=places)

    def _draw(self, interval: int) -> Tensor:
        """(row of the interval,) domain of each."""
        weights = self.history[interval]
        if weights.isnan().any():
            raise ConfigurationError(
                f"Mixture: a row of interval {interval} is read before its weights are decided. Use "
                'train_sampling_strategy="sequential" and a lag of at least the rows that are fetched ahead.'
            )
        length = self.interval if interval else self.lag + self.interval
        points = torch.rand(length, dtype=torch.float64, generator=generator(CPU, self.seed, interval))
        bounds = weights.cumsum(0)
        return torch.searchsorted(bounds / bounds[-1], points, right=True)  # a domain of weight 0 is never drawn


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """The rows of one interval."""

    interval: int
    first: int
    """Index of its first row."""
    domains: Tensor
    """(row,)"""
    places: Tensor
    """(row,) how many rows of the same domain come before it in the run."""


def check_in_order(what: str, args: Any, *, resumed: bool) -> None:
    """Refuses to read a data set of the whole run out of order: its rows belong to places of the run.

    Args:
        what: the data set, for the message.
        args: the Trainer's.
        resumed: whether the run goes on from a checkpoint.

    Raises:
        ConfigurationError: naming the setting.
    """
    strategy = args.train_sampling_strategy
    if str(getattr(strategy, "value", strategy)) != "sequential":
        raise ConfigurationError(
            f"{what} is read in order, and train_sampling_strategy is {strategy!r}. "
            'Pass TrainingArguments(train_sampling_strategy="sequential").'
        )
    if resumed and args.ignore_data_skip:
        raise ConfigurationError(
            f"{what} is read in order, and ignore_data_skip would read its first rows again. Leave it out."
        )


class Augmented(Dataset[Any]):
    """Rows changed at random, otherwise in each epoch: a row is a function of (seed, epoch, index) and nothing else.

    ```python
    data = Augmented(rows, function)
    Trainer(model, args, train_dataset=data, callbacks=[data.callback()])
    ```

    The epoch comes from that callback, or from a `DistillCallback` of the Trainer, alone. There is no `set_epoch`,
    which accelerate would call: it leaves it out with a random sampler when a run is resumed in mid-epoch or has
    several processes, and calls it with epoch 0 when the same object is evaluated in mid-epoch. The epoch lies in
    shared memory, so it reaches persistent workers.

    Args:
        dataset: the rows; no `Mixture`, whose domains are augmented instead.
        function: (row, generator) -> row; draws from the generator alone and leaves its argument as it is. Picklable
            where workers are spawned.
        seed: of the draws.

    Raises:
        ConfigurationError: for a Mixture.
    """

    def __init__(self, dataset: Rows, function: Callable[[Any, torch.Generator], Any], seed: int = 0) -> None:
        if isinstance(dataset, Mixture):  # whoever trains on a Mixture must see it, to save its weights
            raise ConfigurationError("Augmented: augment the domains of a Mixture, not the Mixture.")
        self.dataset, self.function, self.seed = dataset, function, seed
        self._epoch = _shared(torch.full((), -1, dtype=torch.long))

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def epoch(self) -> int:
        """The epoch that is read, from 0; set by the callback, or by a loop of one's own before each pass.

        Raises:
            ConfigurationError: if nobody has set it: without it every epoch would be the first again.
        """
        found = int(self._epoch)
        if found < 0:
            raise ConfigurationError(
                "Augmented: the epoch is not known. Pass Trainer(callbacks=[data.callback()]) where no DistillCallback "
                "is, or set data.epoch before each pass of a loop of your own."
            )
        return found

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        if epoch < 0:
            raise ConfigurationError(f"Augmented: epochs count from 0, got {epoch}.")
        self._epoch.fill_(epoch)

    def row(self, index: int, *, epoch: int) -> Any:
        """The row of an epoch, whichever epoch is read."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.function(self.dataset[index], generator(CPU, self.seed, epoch, index))

    def __getitem__(self, index: int) -> Any:
        return self.row(index, epoch=self.epoch)

    def callback(self) -> TrainerCallback:
        """What tells the data which epoch a Trainer reads; one that is resumed in mid-epoch too."""
        set_epoch(self, 0)
        return _Epochs(self)


class _Epochs(TrainerCallback):  # type: ignore[misc]  # transformers is not typed for mypy
    def __init__(self, data: Augmented) -> None:
        self.data = data

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        set_epoch(self.data, state.epoch)


def set_epoch(data: Any, epoch: float) -> None:
    """Tells an `Augmented` that an epoch begins; other data sets are left alone.

    Args:
        data: any data set.
        epoch: whole when an epoch begins, a fraction above it after a resume.
    """
    if isinstance(data, Augmented):
        data.epoch = int(epoch)
