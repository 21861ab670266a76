"""The loss on logits in chunks of positions, each with its gradient in the same pass, so that no N x V tensor is kept.

Total of a chunk: Σ over objectives of c · per_position(rows) + c_task · cross-entropy, with coefficients that were
counted for the whole window. The gradient with regard to the head's input, the head's parameters and what the
objectives learn is taken at once; backward only multiplies it. Gradients of parameters add up in float32.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .distiller import Counts, check_rows, check_shape, denominator, named, position_divisor
from .errors import ConfigurationError
from .heads import Dense, Lazy, Logits, Proof, UnprovenError, prove
from .objective import Inputs, Objective, Positions, Rows, Signals, Step, row_count
from .outputs import decoder_inputs
from .resolving import dry_inputs
from .taps import evaluating, unwrap
from .teachers import Teacher

if TYPE_CHECKING:
    from .run import Run

logger = logging.getLogger(__name__)

LOSS_INPUTS = frozenset({"labels", "shift_labels", "num_items_in_batch"})
LIMITS = {"cpu": 8 << 20}
OTHERS = 64 << 20
"""Bytes of one model's logits, above which they are taken in chunks, by type of device. On a CPU chunks save time too;
elsewhere many small ones may cost some, and it is the memory that counts."""

Chunk = Callable[[Tensor, slice], Tensor]
"""From a chunk of the head's input and its place among the positions to () the chunk's part of the loss."""


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chunk: Chunk, size: int, scale: float, states: Tensor, *parameters: Tensor) -> Tensor:
        wide = [torch.promote_types(parameter.dtype, torch.float32) for parameter in parameters]
        total: Tensor = torch.zeros((), dtype=torch.promote_types(states.dtype, torch.float32), device=states.device)
        gradient = torch.zeros_like(states)
        found: list[Tensor | None] = [None] * len(parameters)
        for start in range(0, max(len(states), 1), size):  # without positions one empty chunk, which names the terms
            place = slice(start, start + size)
            part = states[place].detach().requires_grad_()
            with torch.enable_grad():
                value = chunk(part, place)
                wanted = [part, *parameters] if value.requires_grad else []
                own = torch.autograd.grad(value * scale, wanted, allow_unused=True) if wanted else (None,)
            total = total + value.detach()
            if own[0] is not None:
                gradient[place] = own[0]
            for index, (addend, dtype) in enumerate(zip(own[1:], wide, strict=False)):
                if addend is not None:
                    before = found[index]
                    found[index] = addend.to(dtype, copy=True) if before is None else before.add_(addend)
        ctx.places = [index for index, kept in enumerate(found) if kept is not None]
        ctx.dtypes, ctx.scale = [parameter.dtype for parameter in parameters], scale
        ctx.save_for_backward(gradient, *(kept for kept in found if kept is not None))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        gradient, *kept = ctx.saved_tensors
        upstream = upstream / ctx.scale
        found: list[Tensor | None] = [None] * len(ctx.dtypes)
        for index, value in zip(ctx.places, kept, strict=True):
            found[index] = (value * upstream).to(ctx.dtypes[index])
        return None, None, None, (gradient * upstream).to(gradient.dtype), *found


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one objective has in the loss on logits."""

    objective: Objective
    weight: float
    """Its weight divided by its denominator."""
    divisor: Tensor | None
    """(position,) of its values; None: 1."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The loss on logits of one micro-batch."""

    loss: Tensor
    """() with gradient, weights and denominators included."""
    sums: Mapping[str, Mapping[str, Tensor]]
    """For each objective, by key, () sums of its values by term, without gradient, weight or denominator."""
    task: Tensor | None
    """() sum of the cross-entropies, likewise; None without labels."""


@dataclass(frozen=True, kw_only=True)
class Apart:
    """The logits of all models for one micro-batch."""

    student: Lazy
    """Whose head is called with gradient."""
    teacher: Logits | None
    """None if no objective taps its logits."""
    frozen: Mapping[str, Logits]
    """Further models by role."""
    classes: int | None = None
    """How many of the classes, from the first, the methods compare; None: all."""


def rows_of(teacher: Teacher, inputs: Inputs) -> tuple[Mapping[str, Tensor], Logits | None]:
    """The taps of a teacher but its logits, and its logits by rows: computed late where the teacher can do so."""
    found: Callable[[Inputs], tuple[Mapping[str, Tensor], Logits | None]] | None = getattr(teacher, "apart", None)
    if found is not None:
        return found(inputs)
    taps = dict(teacher(inputs))
    logits = taps.pop("logits", None)
    return taps, None if logits is None else Dense(logits)


def loss_on_logits(
    apart: Apart,
    where: Positions,
    shares: Mapping[str, Share],
    step: Step,
    *,
    task_weight: float,
    size: int,
    scale: float = 1.0,
) -> Parts:
    """Every term on logits, and the task's cross-entropy where the positions have labels, `size` positions at a time.

    Args:
        apart: logits of all models.
        where: the scored positions.
        shares: of the objectives with `per_position`, by key.
        step: handed to them.
        task_weight: of the cross-entropy's sum; 0 leaves it out of the loss, not of `Parts.task`.
        size: positions of a chunk.
        scale: factor on the loss while gradients are taken, as a GradScaler's: small ones in float16 would be 0.
    """
    sums: dict[str, dict[str, Tensor]] = {key: {} for key in shares}
    tasks: list[Tensor] = []
    student, teacher, frozen = apart.student, apart.teacher, apart.frozen
    for logits in (student, *([] if teacher is None else [teacher]), *frozen.values()):
        check_rows(logits.count, where)

    def chunk(states: Tensor, place: slice) -> Tensor:
        index = where.index[place]
        logits = student.of(states)
        labels = None if where.labels is None else where.labels[place]
        real = logits[..., : apart.classes]
        rows = Rows(
            student_logits=real,
            teacher_logits=None if teacher is None else teacher.rows(index, real)[..., : apart.classes],
            frozen={role: other.rows(index, real)[..., : apart.classes] for role, other in frozen.items()},
            labels=labels,
            example=where.example[place],
        )
        total = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
        for key, share in shares.items():
            found = sums[key]
            for name, value in named(share.objective.per_position(rows, step), share.objective.name):
                check_shape(share.objective.name, name, value, (len(index),))
                divisor = None if share.divisor is None else share.divisor[place].to(value.dtype)
                summed = value.sum() if divisor is None else (value / divisor).sum()
                found[name] = found[name] + summed.detach() if name in found else summed.detach()
                if name not in share.objective.logged:
                    total = total + share.weight * summed
        if labels is not None:
            with torch.set_grad_enabled(task_weight != 0 and torch.is_grad_enabled()):  # else it is for the logs alone
                entropy = F.cross_entropy(logits.to(total.dtype), labels, reduction="sum")
            tasks.append(entropy.detach())
            total = total + task_weight * entropy
        return total

    learned = {id(p): p for share in shares.values() for p in share.objective.parameters() if p.requires_grad}
    learned |= {id(p): p for p in student.head.module.parameters() if p.requires_grad}
    loss = _Fused.apply(chunk, size, scale, student.states[where.index], *learned.values())  # type: ignore[no-untyped-call]
    return Parts(loss=loss, sums=sums, task=torch.stack(tasks).sum() if tasks else None)


class Chunking:
    """Decides for each micro-batch of a run whether its logits are taken in chunks, and proves first that they can be.

    Proven once, when a batch is the first to be large enough: `Head` says how.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._proof: Proof | None = None
        self._reason: str | None = None
        self._begun = False
        self.on = False
        """Whether the forward that runs leaves its logits out."""

    @property
    def proof(self) -> Proof:
        assert self._proof is not None  # `on` is set only after the proof
        return self._proof

    def wanted(self, inputs: Inputs) -> bool:
        """Whether the logits of this batch are to be taken in chunks, and can be.

        Raises:
            ConfigurationError: if `memory="chunked"` is asked for and this run's logits cannot be had in chunks.
        """
        run, settings = self.run, self.run.config
        ours = any(objective.overrides("per_position") for objective in run.distiller.objectives)
        if settings.memory == "dense" or not (ours or ("labels" in inputs and run.task_weight)):
            return False
        size = row_count(run.kind, inputs) * run.sizes.vocab * 4
        if settings.memory == "auto" and size <= LIMITS.get(run.trainer.args.device.type, OTHERS):
            return False
        if not self._begun:
            self._begun = True
            self._reason = self._prove()
            if self._reason is not None and settings.memory == "auto":
                logger.warning("hf_compress: logits of %d MiB a batch are kept whole: %s", size >> 20, self._reason)
        if self._reason is not None and settings.memory == "chunked":
            raise ConfigurationError(f'memory="chunked" cannot be had: {self._reason}. Use memory="auto" or "dense".')
        return self._reason is None

    def _prove(self) -> str | None:
        """Why logits cannot be had in chunks; None: they can."""
        run = self.run
        trainer = run.trainer
        if run.kind not in ("causal", "tokens"):
            return f"the model's distributions are {run.kind}"
        for objective, need in zip(run.distiller.objectives, run.needs, strict=True):
            taps = need.student | (need.teacher or frozenset())
            if objective.overrides("forward") and {"logits", "output.logits"} & taps:
                return f"{objective.name} relates logits of different positions"
        if trainer.compute_loss_func is not None:
            return "compute_loss_func reads them"
        if not trainer.compute_loss.__module__.startswith("transformers."):
            return f"{type(trainer).__name__}.compute_loss may read them"
        device = trainer.args.device
        inputs = dry_inputs(run.student, trainer, device)
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []), evaluating(run.student):
                self._proof = prove(run.student, run.kind, inputs, task=True, context=trainer.accelerator.autocast)
        except UnprovenError as error:
            return f"{type(unwrap(run.student)).__name__}: {error}"
        module = self.proof.head.module
        name = next(name for name, found in unwrap(run.student).named_modules() if found is module)
        for objective, need in zip(run.distiller.objectives, run.needs, strict=True):
            if f"output:{name}" in need.student | (need.teacher or frozenset()):
                self.remove()
                return f"{objective.name} taps the output embedding itself"
        return None

    def begin(self, seen: dict[str, Any]) -> dict[str, Any]:
        """Before the student's forward, which makes no logits: its inputs without those of a loss of its own."""
        self.proof.head.skip()
        model = unwrap(self.run.student)
        given = {name: value for name, value in seen.items() if name not in LOSS_INPUTS}
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and "decoder_input_ids" not in given:
            given["decoder_input_ids"] = decoder_inputs(model, seen["labels"])
        return given

    def stop(self) -> None:
        """After the student's forward, or its failure."""
        if self._proof is not None:
            self._proof.head.stop()

    def logits(self) -> Lazy:
        """The student's, of the forward that has just run."""
        states = self.proof.head.take()
        if not states.requires_grad and not any(p.requires_grad for p in self.proof.head.module.parameters()):
            raise ConfigurationError("nothing that is trained reaches the logits: check what is frozen.")
        return Lazy(states, self.proof.head, self.run.trainer.accelerator.autocast)

    def loss(self, apart: Apart, signals: Signals, window: Counts) -> Parts:
        """The loss on the logits of the micro-batch, and its parts for the logs."""
        run = self.run
        assert run.step is not None  # made by the pre-hook
        shares = {}
        for place, ((key, objective), need) in enumerate(zip(run.distiller.items(), run.needs, strict=True)):
            assert isinstance(objective, Objective)  # Distiller holds nothing else
            if objective.overrides("per_position"):
                bottom = max(denominator(place, need, window), 1.0)
                divisor = position_divisor(signals.positions, signals.examples, need)
                shares[key] = Share(objective=objective, weight=objective.weight / bottom, divisor=divisor)
        task = run.task_weight / window.labels if self._has_task(signals.inputs) and window.labels else 0.0
        scaler = getattr(run.trainer.accelerator, "scaler", None)
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        return loss_on_logits(
            apart, signals.positions, shares, run.step, task_weight=task, size=run.config.chunk, scale=scale
        )

    def auxiliary(self, output: Any) -> Tensor | None:
        """What the model adds to the cross-entropy in its own loss."""
        found = output.get("aux_loss") if self.proof.auxiliary and isinstance(output, Mapping) else None
        return None if found is None else self.proof.auxiliary * found

    def _has_task(self, inputs: Inputs) -> bool:
        """Whether the model itself would compute a loss: from `labels`, not from `shift_labels` alone."""
        return self.proof.task and "labels" in inputs

    def task_loss(self, parts: Parts, auxiliary: Tensor | None, inputs: Inputs, local: Counts) -> Tensor | None:
        """() the mean that the model's own loss would be; of it the auxiliary part alone carries a gradient."""
        if parts.task is None or not self._has_task(inputs):
            return None
        mean = parts.task / max(local.labels, 1.0)
        return mean if auxiliary is None else mean + auxiliary

    def remove(self) -> None:
        """Gives the student's output embedding back."""
        if self._proof is not None:
            self._proof.head.remove()
        self._proof, self.on = None, False

    def reset(self) -> None:
        """For another attachment: proven anew when it is wanted."""
        self.remove()
        self._begun = False
