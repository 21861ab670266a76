"""Rows from easy to hard: a data set of a whole run, of which a share is admitted that grows with the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainerCallback

from hf_compress.data import CPU, Rows, check_in_order
from hf_compress.distiller import generator
from hf_compress.errors import ConfigurationError, ResumeError
from hf_compress.stepping import row_cross_entropy
from hf_compress.taps import evaluating

STUDENT_LOSS = "student_loss"
STATE = "document_curriculum"
"""Key of the orders in the Trainer's state."""


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """Hyper-parameters of the order."""

    T_c: int
    """Optimizer steps until all rows are admitted. It depends on data and model: there is no default."""
    c0: float = 0.1
    """Part of the rows at the beginning, in (0, 1]; 1 is no curriculum. Of Platanios et al. 0.01; the larger one is
    ours."""
    refresh: int = 100
    """Optimizer steps between two orders by the student's loss. Ours."""

    def __post_init__(self) -> None:
        if self.T_c < 1 or not 0 < self.c0 <= 1 or self.refresh < 1:
            raise ConfigurationError(
                "document_curriculum: T_c and refresh must be at least 1 and c0 in (0, 1], got "
                f"{self.T_c}, {self.refresh} and {self.c0}."
            )


def competence(step: int, config: CurriculumConfig) -> float:
    """c(t), the part of the rows that is admitted at an optimizer step, from c0 to 1.

    >>> round(competence(25, CurriculumConfig(T_c=100)), 4)
    0.5074
    """
    return min(1.0, math.sqrt(step / config.T_c * (1 - config.c0**2) + config.c0**2))


def admitted(step: int, rows: int, config: CurriculumConfig) -> int:
    """How many of the easiest rows are admitted: c(t) of them rounded up, so at least one."""
    return min(rows, math.ceil(round(competence(step, config) * rows, 9)))  # 0.07 · 100 is above 7 in binary


def easiest_first(difficulty: Tensor, *, seed: int) -> Tensor:
    """(row,) places of the rows by their difficulty (row,); the order of equal ones is drawn."""
    drawn = torch.randperm(len(difficulty), generator=generator(CPU, seed))
    return drawn[difficulty[drawn].sort(stable=True).indices]


class Curriculum(Dataset[Any]):
    """The rows of a whole run, from easy to hard.

    Step t reads `batch` rows that are drawn evenly from the easiest c(t) part, without repetition where that part has
    as many. By the student's loss an order that is taken after k · refresh steps takes force `fetched` steps later,
    as the loaders have read that much ahead. The Trainer reads rows in order and needs `callback()`.

    Args:
        rows: of `document_curriculum`, or others for an encoder-decoder.
        batch: rows of an optimizer step over all processes: device batch · accumulation · processes.
        steps: of the run.
        config: pacing.
        difficulty: a column of `rows`, "student_loss", or a number for each row; higher is harder.
        fetched: steps that may have been read ahead: 1 without workers, else those of 1 + workers · prefetch factor
            device batches, rounded up.
        seed: of the draws.

    Raises:
        ConfigurationError: if there are no rows, a size is below 1, or a row has no finite difficulty.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        batch: int,
        steps: int,
        config: CurriculumConfig,
        difficulty: str | Sequence[float] | Tensor = "input_tokens",
        fetched: int = 1,
        seed: int = 0,
    ) -> None:
        if not len(rows) or min(batch, steps, fetched) < 1:
            raise ConfigurationError(
                "document_curriculum: a Curriculum needs rows, and batch, steps and fetched of at least 1, got "
                f"{len(rows)}, {batch}, {steps} and {fetched}."
            )
        self.rows, self.batch, self.steps, self.config = rows, batch, steps, config
        self.fetched, self.seed = fetched, seed
        self.by_student = isinstance(difficulty, str) and difficulty == STUDENT_LOSS
        if self.by_student and fetched > config.refresh:
            raise ConfigurationError(
                f"document_curriculum: {fetched} steps are read ahead, and an order holds for refresh={config.refresh} "
                "of them: rows would depend on how fast they are read. Raise refresh, or read with fewer workers."
            )
        values = torch.zeros(len(rows)) if self.by_student else _values(rows, difficulty)
        order = easiest_first(values, seed=seed)
        self.orders: Tensor = torch.stack([order, order]).share_memory_()  # type: ignore[no-untyped-call]  # torch
        """(2, row) that of the newest interval k, at k mod 2, and the one before; workers see it."""
        self.newest: Tensor = torch.zeros((), dtype=torch.long).share_memory_()  # type: ignore[no-untyped-call]
        self.begun: Tensor = torch.zeros((), dtype=torch.bool).share_memory_()  # type: ignore[no-untyped-call]
        self._read: tuple[tuple[int, int], Tensor] | None = None

    def __len__(self) -> int:
        return self.batch * self.steps

    def interval_of(self, step: int) -> int:
        """Whose order a step reads by; 0 with a difficulty that stays."""
        return max(step - self.fetched, 0) // self.config.refresh if self.by_student else 0

    def places(self, step: int) -> Tensor:
        """(batch,) places of a step's rows; a step long past is read by the oldest order that is kept.

        Raises:
            ConfigurationError: if the order that it reads by is not known yet.
        """
        newest = int(self.newest)
        interval = max(self.interval_of(step), newest - 1)
        if interval > newest:
            raise ConfigurationError(
                f"document_curriculum: step {step} reads by order {interval} of the student's losses, and the newest "
                f"is {newest}. Read rows in order, and pass fetched= of at least the steps that are read ahead."
            )
        count = admitted(step, len(self.rows), self.config)
        draw = generator(CPU, self.seed, step)
        if count < self.batch:
            ranks = torch.randint(count, (self.batch,), generator=draw)
        else:
            ranks = torch.randperm(count, generator=draw)[: self.batch]
        return self.orders[interval % 2][ranks]

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if not self.begun and index >= max(self.batch, 2):  # a dry forward may read two rows before a run begins
            raise ConfigurationError(
                "document_curriculum: a Curriculum is read without its callback, or out of order. Pass "
                'Trainer(callbacks=[data.callback()]) and TrainingArguments(train_sampling_strategy="sequential").'
            )
        step, place = divmod(index, self.batch)
        key = (step, int(self.newest))
        if self._read is None or self._read[0] != key:
            self._read = (key, self.places(step))
        return self.rows[int(self._read[1][place])]

    def decide(self, interval: int, difficulty: Tensor) -> None:
        """Takes the student's losses (row,) as the order of an interval, the newest or the one after it."""
        self.orders[interval % 2].copy_(easiest_first(difficulty, seed=self.seed))
        self.newest.fill_(interval)

    def callback(self) -> TrainerCallback:
        """What checks the Trainer's settings, and asks for the student's losses."""
        return _Pace(self)


def _values(rows: Rows, difficulty: str | Sequence[float] | Tensor) -> Tensor:
    """(row,) float64."""
    given: Any = [rows[place][difficulty] for place in range(len(rows))] if isinstance(difficulty, str) else difficulty
    if isinstance(difficulty, str) and (missing := sum(value is None for value in given)):
        raise ConfigurationError(
            f"document_curriculum: {missing} of {len(rows)} rows have no {difficulty!r}, as they have no gold answer. "
            "Filter them out, or take another difficulty."
        )
    values = torch.as_tensor(given, dtype=torch.float64, device=CPU)
    if values.shape != (len(rows),) or not values.isfinite().all():
        raise ConfigurationError(
            f"document_curriculum: difficulty must be one finite number for each of {len(rows)} rows, got "
            f"{tuple(values.shape)}, {int((~values.isfinite()).sum())} of them not finite."
        )
    return values


def losses(model: Any, rows: Rows, collate: Callable[[list[Any]], Mapping[str, Tensor]], *, batch: int) -> Tensor:
    """(row,) mean cross-entropy of each row's target tokens, nats, of an encoder-decoder in eval mode, on the CPU."""
    found = []
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad():
        for start in range(0, len(rows), batch):
            part = collate([rows[place] for place in range(start, min(start + batch, len(rows)))])
            inputs = {name: value.to(device) for name, value in part.items()}
            found.append(row_cross_entropy("tokens", model(**inputs).logits, inputs).double().to(CPU))
    return torch.cat(found)


class _Pace(TrainerCallback):  # type: ignore[misc]  # transformers is not typed for mypy
    """Of one `Curriculum`."""

    def __init__(self, data: Curriculum) -> None:
        self.data = data

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        data = self.data
        _check_trainer(data, args, state, kwargs)
        if data.by_student and state.global_step:
            self._restore(state)
        elif data.by_student:
            self._decide(0, args, state, kwargs)
        data.begun.fill_(True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        interval, rest = divmod(state.global_step, self.data.config.refresh)
        if self.data.by_student and not rest and state.global_step < state.max_steps:
            self._decide(interval, args, state, kwargs)

    def _decide(self, interval: int, args: Any, state: Any, given: Mapping[str, Any]) -> None:
        data, collate = self.data, given["train_dataloader"].collate_fn
        found = [losses(given["model"], data.rows, collate, batch=args.eval_batch_size)]
        data.decide(interval, broadcast_object_list(found)[0])  # whose last bits differ from process to process
        state.stateful_callbacks[STATE] = {"newest": interval, "orders": data.orders.tolist()}

    def _restore(self, state: Any) -> None:
        data, kept = self.data, state.stateful_callbacks.get(STATE)
        if kept is None or torch.tensor(kept["orders"]).shape != data.orders.shape:
            raise ResumeError(
                f"document_curriculum: the checkpoint at step {state.global_step} has no orders of {len(data.rows)} "
                "rows by the student's loss. Resume with the run's own data and difficulty, or train anew."
            )
        data.orders.copy_(torch.tensor(kept["orders"]))
        data.newest.fill_(kept["newest"])


def _check_trainer(data: Curriculum, args: Any, state: Any, given: Mapping[str, Any]) -> None:
    """Refuses what would train on other rows than those of the curriculum."""
    check_in_order("document_curriculum: a Curriculum", args, resumed=state.global_step > 0)
    if getattr(given["train_dataloader"], "dataset", data) is not data:
        raise ConfigurationError("document_curriculum: the callback is of another Curriculum than train_dataset.")
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if rows != data.batch or state.max_steps > data.steps:
        raise ConfigurationError(
            f"document_curriculum: the Trainer takes {rows} rows a step for {state.max_steps} steps, and the "
            f"Curriculum was made for batch={data.batch} and steps={data.steps}. Make them equal."
        )
    if data.by_student and not given["model"].config.is_encoder_decoder:
        raise ConfigurationError(
            f"document_curriculum: {STUDENT_LOSS} is taken of an encoder-decoder, got {type(given['model']).__name__}."
        )
