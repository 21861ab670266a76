"""One student under distillation: hooks, window counts, logs."""

from __future__ import annotations

import inspect
import logging
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType, MethodType
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import Trainer

from . import distiller as d
from . import objective as o
from .checks import (
    check_apart,
    check_head,
    check_ids,
    check_labels,
    check_pair,
    check_tokenizers,
    makes_log_probabilities,
)
from .chunked import Apart, Chunking
from .data import Mixture, check_in_order, set_epoch
from .distiller import Counts, Distiller
from .errors import (
    ConfigurationError,
    MismatchError,
    NumericalError,
    UnknownNameError,
    UnusedLossError,
)
from .heads import Memory
from .networks import Networks
from .objective import Inputs, Kind, Objective, Signals, Step
from .outputs import loss_of, with_frames, with_loss, without_states
from .provenance import describe_training, task_of
from .reports import Reports, Sums, over_ranks
from .resolving import agreed, dry_inputs, fitting, resolve_methods, until
from .resume import reload_renamed
from .saving import Saving
from .sources import Sources, Targets
from .stepping import make_step
from .taps import Taps, body, evaluating, returns_tuple, unwrap, watching
from .teachers import Recorded, Teacher, models_of, teacher_for

logger = logging.getLogger(__name__)

_HISTORY = "mixture"
"""The distiller's buffer with the weights of a `Mixture`."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Everything about a run but teacher and method."""

    alpha: float | None = None
    """Short for task_weight = 1 - alpha and every term times alpha."""
    task_weight: float | None = None
    """Weight of the task's own loss; None: the method's published one, else 1. Without labels it has no effect."""
    kind: Kind | None = None
    """Where the student's distributions stand; None: told by the class of the model."""
    memory: Memory = "auto"
    """Logits of language models: "chunked", a few positions at a time, never as a whole; "dense"; "auto": in chunks
    from 8 MiB a batch on a CPU and 64 MiB elsewhere, where it is proven to give the same."""
    chunk: int = 64
    """Positions of a chunk."""
    data: str | None = None
    """Name of the training data for the record, e.g. its hub id."""
    data_licence: str | None = None
    """Of the training data, e.g. "mit"; None: as the data set says."""
    teacher_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """How a teacher named by hub id or folder is loaded, as `from_pretrained` takes it: {"dtype": torch.bfloat16,
    "revision": "v1", "device_map": "auto", "quantization_config": BitsAndBytesConfig(load_in_8bit=True)}."""
    frozen: Mapping[str, nn.Module | str | Path | Teacher] = field(default_factory=dict)
    """Further frozen models that a method asks for by role, e.g. {"reference": model}; given as the teacher is."""

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in get_args(Kind):
            raise ConfigurationError(f"kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}.")
        if self.memory not in get_args(Memory) or self.chunk < 1:
            raise ConfigurationError(
                f"memory must be one of {', '.join(get_args(Memory))} and chunk at least 1, got {self.memory!r} and "
                f"{self.chunk}."
            )


class Run:
    """One student under distillation: hooks, window counts, logs. Made by `DistillCallback`.

    The distiller stays the same object over a second `train()`, because the optimizer keeps its parameters.
    """

    def __init__(
        self,
        trainer: Trainer,
        student: nn.Module,
        source: nn.Module | str | Path | Teacher | None,
        method: str | Objective | Sequence[str | Objective] | None,
        config: DistillConfig,
    ) -> None:
        if isinstance(student, nn.Sequential):
            raise ConfigurationError(
                "the student is an nn.Sequential (sentence-transformers?), where a distiller would become a stage of "
                "the forward. Train its transformer on tokenized sentences: Trainer(model=student[0].auto_model, "
                "callbacks=[DistillCallback(teacher[0].auto_model)])."
            )
        self._trainer = weakref.ref(trainer)
        self.student, self.config = student, config
        self.kind = config.kind or o.kind_of(unwrap(student))
        self.sizes = o.sizes(unwrap(student), self.kind)
        ctc = type(unwrap(student)).__name__.endswith("ForCTC")
        self._ctc = getattr(self.sizes.config, "ctc_loss_reduction", None) if ctc else None
        self.task = task_of(unwrap(student), self.kind)
        for model in models_of(source):
            check_apart(student, model)
        self.teacher = None if source is None else self._source(source, config.teacher_kwargs)
        theirs = None if self.teacher is None else self.teacher.sizes
        objectives = resolve_methods(method, self.task)
        if method is None:
            objectives = fitting(objectives, self.sizes, theirs)
        self.task_weight, factor = d.resolve_weights(objectives, config.alpha, config.task_weight)
        for objective in objectives:
            objective.weight *= factor
        self.needs = agreed([objective.needs(self.sizes, theirs) for objective in objectives])
        self._check_rescored(objectives)
        self.frozen = self._frozen(config.frozen)
        if self.teacher is None and any(need.teacher is not None for need in self.needs):
            names = [obj.name for obj, need in zip(objectives, self.needs, strict=True) if need.teacher is not None]
            raise ConfigurationError(f"{names} need a teacher: DistillCallback(teacher, method=…).")
        apart = frozenset[str]().union(*(need.other_tokens for need in self.needs))
        alike = [other for role, other in self.frozen.items() if role not in apart]
        others = [*([] if self.teacher is None else [self.teacher]), *alike]
        real = [check_pair(self.needs, self.sizes, other.sizes, trainer.processing_class) for other in others]
        self.real = next((size for size in real if size is not None), None)
        self.distributions = any(objective.overrides("per_position") for objective in objectives)
        if self.distributions or self.kind == "labels":
            check_head(self.sizes, objectives, self.needs)
        for method_name in ("batch", "teacher_batch", "frozen_batch"):
            if sum(objective.overrides(method_name) for objective in objectives) > 1:
                raise ConfigurationError(f"two methods of one run rewrite the {method_name}; use one of them.")
        self._shared_ids = (
            self.teacher is not None
            and getattr(unwrap(student), "main_input_name", None) == "input_ids"
            and not any(objective.overrides("teacher_batch") for objective in objectives)
        )
        for other in others if self._shared_ids else ():
            check_tokenizers(trainer.processing_class, self.sizes, other.sizes)
        self.distiller = Distiller(objectives)
        self.networks = Networks({})
        self.recorded = self.teacher if isinstance(self.teacher, Recorded) else None
        columns: frozenset[str] = self.recorded.columns if self.recorded is not None else frozenset()
        self.required = columns.union(*(need.columns for need in self.needs))
        self.columns = self.required | self._read_by_teachers(removed=trainer.args.remove_unused_columns)
        fixed = self.recorded is not None and self.recorded.fixed
        if fixed and any(objective.overrides("batch") for objective in objectives):
            raise ConfigurationError(
                "a method of this run changes the batch, and a cache knows the rows of the data alone. Give the model."
            )
        self.taps: Taps | None = None
        self._handles: list[Any] = []
        self._restore: list[Callable[[], None]] = []
        self._built = False
        self.reports = Reports(self)
        self.chunking = Chunking(self)
        self.sources = Sources(self)
        self.saving = Saving(self)
        self._reset()
        self.distiller.register_load_state_dict_post_hook(self.saving.note_loaded)  # type: ignore[no-untyped-call]  # torch
        logger.info("hf_compress: %s with %s", self.task, ", ".join(objective.name for objective in objectives))

    def _frozen(self, given: Mapping[str, nn.Module | str | Path | Teacher]) -> dict[str, Teacher]:
        """The further frozen models by role: those that the methods ask for, no others."""
        wanted = {role for need in self.needs for role in need.frozen}
        for role in sorted(wanted - given.keys()):
            raise ConfigurationError(
                f"a method needs a frozen {role!r} model: DistillCallback(…, frozen={{{role!r}: …}})."
            )
        for role in given.keys() - wanted:
            raise UnknownNameError("role of a frozen model", role, sorted(wanted))
        for role, source in given.items():
            for model in models_of(source):
                check_apart(self.student, model)
            if isinstance(source, Recorded):
                raise ConfigurationError(
                    f"a cache or a server can be the teacher, not the frozen {role!r}: give a model."
                )
        return {role: self._source(source) for role, source in given.items()}

    def _source(
        self, source: nn.Module | str | Path | Teacher, settings: Mapping[str, Any] = MappingProxyType({})
    ) -> Teacher:
        """A teacher; one that is no transformers model is taken to have the student's kind of output."""
        unknown = isinstance(source, nn.Module) and getattr(unwrap(source), "config", None) is None
        return teacher_for(source, self.student, self.config.kind or (self.kind if unknown else None), settings)

    def _read_by_teachers(self, *, removed: bool) -> set[str]:
        """Columns that a frozen model reads and the student does not: the Trainer would take them out of the data, or
        break the student's forward with them."""
        own = inspect.signature(unwrap(self.student).forward).parameters
        if not removed and any(one.kind is inspect.Parameter.VAR_KEYWORD for one in own.values()):
            return set()  # the student may read them under names that it does not tell
        models = [other for other in (self.teacher, *self.frozen.values()) if other is not None]
        return {name for other in models for name in getattr(other, "reads", None) or ()} - own.keys()

    def withheld(self, name: str, value: Any) -> bool:
        """Whether the student never sees an input: a method's own column, or one that the teacher alone reads."""
        return name in self.required or (name in self.columns and isinstance(value, Tensor))

    def _check_rescored(self, objectives: Sequence[Objective]) -> None:
        """Labels that a method writes itself are no targets for the task's own loss."""
        names = [obj.name for obj, need in zip(objectives, self.needs, strict=True) if need.rescored]
        if names and self.task_weight:
            raise ConfigurationError(
                f"{names} may replace the labels by the student's own tokens, which the task's own loss must not "
                "learn: leave task_weight and alpha out, or set alpha=1."
            )

    def _reset(self) -> None:
        self.window: Counts | None = None
        self.micro, self.micros = 0, 1
        self.waiting = 0
        self.pending: tuple[Inputs, Any] | None = None
        self.reports.reset()
        self.sources.reset()
        self.saving.reset()
        self._means = Sums({})
        self._reached = self._label_column = False
        self.step: Step | None = None
        self._inputs: Inputs | None = None
        self._targets: Targets | None = None
        self._own_states = self._tuple = False

    @property
    def trainer(self) -> Trainer:
        trainer = self._trainer()
        if trainer is None:
            raise ConfigurationError("the Trainer of this callback no longer exists.")
        return trainer

    # ------------------------------------------------------------------ attaching

    def attach(self) -> None:
        """Puts distiller, hooks and wrappers in place; does nothing where they are."""
        present = getattr(self.student, "distiller", None)
        if present is not None and present is not self.distiller:
            raise ConfigurationError(
                "the student already has a `distiller` that is not this callback's. Call detach() on the other "
                "callback, or use one callback with a list of methods."
            )
        if present is self.distiller:
            return
        trainer = self.trainer
        device = trainer.args.device
        wanted: frozenset[str] = frozenset().union(*(need.teacher or frozenset() for need in self.needs))
        if self.teacher is not None:
            self.teacher.prepare(wanted, device, until=until(self.needs))
        for other in self.frozen.values():
            other.prepare(wanted or frozenset({"logits"}), device)
        names: frozenset[str] = frozenset().union(*(need.student for need in self.needs))
        try:
            self.taps = Taps(self.student, names, self.sizes.layers)
            if not self._built:
                self._build()
                self._place_mixture()
                self._initial = {name: buffer.clone() for name, buffer in self.distiller.named_buffers()}
            self.distiller.to(device)
            if getattr(unwrap(self.student), "dtype", None) == torch.float64:
                self.distiller.double()  # learned parts are float32, or as wide as the student
            self.student.distiller = self.distiller
            self._handles = [
                self.student.register_forward_pre_hook(self._before, with_kwargs=True),
                self.student.register_forward_hook(self._after, with_kwargs=True, always_call=True),
            ]
            self._wrap(trainer)
        except BaseException:
            self.detach()
            raise

    def _build(self) -> None:
        """Lets objectives make parts that depend on shapes, from one dry forward that leaves no trace."""
        self._built = True
        if not any(objective.overrides("build") for objective in self.distiller.objectives):
            return
        device = self.trainer.args.device
        inputs = dry_inputs(self.student, self.trainer, device)
        with torch.random.fork_rng(), torch.no_grad(), evaluating(self.student):
            torch.manual_seed(self.trainer.args.seed)
            self.student.to(device)
            assert self.taps is not None  # attach has just made it
            given: dict[str, Any] = dict(inputs)
            if self.taps.hidden_states:
                given["output_hidden_states"] = True
            if returns_tuple(self.student, given):
                given["return_dict"] = True
            with watching(self.taps):
                output = self.student(**given)
            student = {name: tensor.shape for name, tensor in self.taps.read(output).items()}
            wanted = self.teacher is not None and any(need.teacher for need in self.needs)
            teacher = {k: v.shape for k, v in self.teacher(inputs).items()} if wanted and self.teacher else {}
            for role, other in self.frozen.items():
                teacher |= {f"{role}/{name}": tensor.shape for name, tensor in other(inputs).items()}
            for objective in self.distiller.objectives:
                objective.build(student, teacher)

    def _wrap(self, trainer: Trainer) -> None:
        """Wraps what the Trainer calls; each wrapper is an attribute of the instance and is undone by `detach`."""
        self._replace(trainer, "train", self.saving.train(trainer.train))
        if hasattr(trainer, "_save_rng_state"):
            self._replace(trainer, "_save_rng_state", self.saving.save_rng_state(trainer._save_rng_state))
        self._replace(trainer, "get_batch_samples", self._get_batch_samples(trainer.get_batch_samples))
        self._replace(trainer, "log", self.reports.log(trainer.log))
        self._replace(trainer, "evaluate", self.reports.evaluate(trainer.evaluate))
        self._replace(trainer, "loss_is_scaled_for_ga", True)
        if makes_log_probabilities(trainer):
            self._replace(trainer, "compute_loss", MethodType(Trainer.compute_loss, trainer))
            logger.info("hf_compress: while it trains, %s uses the model's own loss", type(trainer).__name__)
        if self.columns and trainer.args.remove_unused_columns:
            if not hasattr(trainer, "_set_signature_columns_if_needed"):
                raise ConfigurationError(
                    f"set remove_unused_columns=False: the columns {sorted(self.columns)} are needed."
                )
            trainer._set_signature_columns_if_needed()
            self._replace(trainer, "_signature_columns", [*trainer._signature_columns, *sorted(self.columns)])

    def _replace(self, trainer: Trainer, name: str, value: Any) -> None:
        own = name in vars(trainer)
        before = vars(trainer).get(name)

        def restore() -> None:
            if own:
                setattr(trainer, name, before)
            else:
                vars(trainer).pop(name, None)

        self._restore.append(restore)
        setattr(trainer, name, value)

    def detach(self) -> None:
        """Undoes `attach`; the distiller object is kept. Idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        while self._restore:
            self._restore.pop()()
        if getattr(self.student, "distiller", None) is self.distiller:
            del self.student.distiller
        if self.taps is not None:
            self.taps.remove()
            self.taps = None
        self.chunking.reset()
        for other in (self.teacher, *self.frozen.values()):
            if other is not None:
                other.close()
        self.saving.forget()

    # ------------------------------------------------------------------ life cycle

    def begin(self, state: Any, optimizer: Any) -> None:
        """Start of `train()`: all in place, the optimizer knows the learned parts, a resumed run has its state."""
        self._reset()
        self.attach()
        self._started = time.monotonic()
        self._first_step = state.global_step
        known = (
            {id(parameter) for group in optimizer.param_groups for parameter in group["params"]} if optimizer else None
        )
        learned = [name for name, p in self.distiller.named_parameters() if known is not None and id(p) not in known]
        if learned:
            raise ConfigurationError(
                f"the optimizer does not hold the learned parts {learned[:3]}. Build it once the callback is attached: "
                "let the Trainer make it, or pass optimizer_cls_and_kwargs."
            )
        self._make_networks()
        if state.global_step > 0:
            self.saving.resume(state.global_step)
        else:  # a second train(), or a retry with a smaller batch, starts its schedules anew
            for name, buffer in self.distiller.named_buffers():
                buffer.copy_(self._initial[name])
        if isinstance(self.trainer.train_dataset, Mixture):
            check_in_order("a Mixture", self.trainer.args, resumed=state.global_step > 0)
            self.trainer.train_dataset.restore(self.distiller.get_buffer(_HISTORY))
        self.saving.forget()

    def _place_mixture(self) -> None:
        """The weights that a `Mixture` has had are state of the run: kept in a buffer, so in every checkpoint."""
        data = self.trainer.train_dataset
        if isinstance(data, Mixture):
            check_in_order("a Mixture", self.trainer.args, resumed=False)
            self.distiller.register_buffer(_HISTORY, data.history.clone())

    def _make_networks(self) -> None:
        """The methods' own networks, anew for each `train()`; a resumed run then loads their state."""
        model = getattr(self.teacher, "model", None)
        device = self.trainer.args.device
        made: dict[str, tuple[nn.Module, Any]] = {}
        for objective in self.distiller.objectives:
            if not objective.overrides("networks"):
                continue
            with torch.random.fork_rng():
                torch.manual_seed(self.trainer.args.seed)
                own = objective.networks(model)
            if taken := made.keys() & own.keys():
                raise ConfigurationError(f"two methods of one run have a network {min(taken)!r}; use one of them.")
            made |= own
        for network, _ in made.values():
            network.to(device)
        self.networks = Networks(made)

    def end(self) -> None:
        """End of `train()`: last words of the methods, the record, and a clean student."""
        try:
            best = self.trainer.state.best_model_checkpoint
            if self.trainer.args.load_best_model_at_end and best and reload_renamed(self.student, Path(best)):
                logger.info("hf_compress: %s names weights as older releases did; loaded anew", Path(best).name)
            finishing = [objective for objective in self.distiller.objectives if objective.overrides("finish")]
            step = self.step or (make_step(self) if finishing else None)  # resumed at its end, a run has no step
            for objective in finishing:
                assert step is not None  # just made
                objective.finish(step)
            config = getattr(unwrap(self.student), "config", None)
            if config is not None:
                record = describe_training(self, seconds=time.monotonic() - self._started)
                config.compression = record.model_dump(mode="json", exclude_none=True)
        finally:
            self.detach()

    # ------------------------------------------------------------------ the window

    def _get_batch_samples(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def get_batch_samples(iterator: Any, number: int, device: Any = None) -> tuple[list[Any], None]:
            batches, _ = original(iterator, number, device)
            self.begin_window([batch for batch in batches if isinstance(batch, Mapping)])
            return batches, None

        return get_batch_samples

    def begin_epoch(self, epoch: float) -> None:
        """Tells rows that are drawn anew in each epoch, and a teacher that is run in the first alone."""
        set_epoch(self.trainer.train_dataset, epoch)
        if self.recorded is not None:
            dropped = self.trainer.args.dataloader_drop_last  # the rows that an epoch leaves out come in a later one
            self.recorded.epoch_began(0 if dropped else int(epoch))

    def flush(self) -> None:
        """Before a checkpoint, which passes over the batches so far: what was learned of them is to be there."""
        if self.recorded is not None:
            self.recorded.flush()

    def begin_window(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Counts the accumulation window over all processes, before its first forward."""
        self._label_column = any("labels" in batch for batch in batches)
        tensors = [{k: v for k, v in batch.items() if isinstance(v, Tensor)} for batch in batches]
        for inputs in tensors:
            check_labels(self.kind, self.sizes.vocab, inputs, distributions=self.distributions)
            if self.teacher is not None and self._shared_ids:
                check_ids(self.teacher.sizes, inputs)
        if self.recorded is not None:
            self.recorded.prefetch(tensors)
        framed = [with_frames(unwrap(self.student), inputs) for inputs in tensors]
        counts = d.count(self.kind, framed, self.distiller.objectives)
        accelerator = self.trainer.accelerator
        if accelerator.num_processes > 1:
            values = accelerator.reduce(counts.to_tensor().to(self.trainer.args.device), reduction="sum")
            counts = Counts.from_tensor(values)
        self.window, self.micro, self.micros = counts, 0, max(len(batches), 1)

    # ------------------------------------------------------------------ the hooks

    def is_training(self) -> bool:
        """Whether a forward now is one of training."""
        return self.student.training and torch.is_grad_enabled()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self._inputs = self._targets = None  # a forward that was interrupted (Ctrl-C) has ended without its hooks
        self.chunking.stop()
        names = list(inspect.signature(unwrap(module).forward).parameters)
        inputs: dict[str, Any] = dict(zip(names, args, strict=False)) | kwargs
        training = self.is_training()
        cached = any(inputs.get(name) is not None for name in ("cache", "past_key_values"))
        fused = bool(inputs.get("fused_lm_head"))
        if training and fused:
            raise UnusedLossError(
                "this trainer asks the model for log-probabilities instead of logits, as TRL's do, and makes a loss of "
                "its own of them, so distillation would be lost. SFTTrainer itself is served; a subclass that "
                "overrides its compute_loss can take the model's loss: compute_loss = Trainer.compute_loss."
            )
        measuring = self.reports.evaluating is not None and not (training or cached or fused)
        measuring = measuring and self.teacher is not None
        seen = {name: value for name, value in inputs.items() if not self.withheld(name, value)}
        self.reports.measure_pending()
        if measuring and self.recorded is not None:  # of other rows nothing is known
            measuring = self.recorded.holds(
                {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
            )
        if not training and not measuring:
            return (), seen
        if missing := self.required - inputs.keys():
            raise MismatchError(
                f"the batch lacks {sorted(missing)}, which {[x.name for x in self.distiller.objectives]} need; it has "
                f"{sorted(inputs)}. Add them to the data set and to what the collator passes on."
            )
        if training or self.step is None:
            self.step = make_step(self)
        if training:
            self._train_networks({k: v for k, v in inputs.items() if isinstance(v, Tensor)}, self.step)
            for objective in self.distiller.objectives:
                if objective.overrides("batch"):
                    inputs = objective.batch(inputs, self.step)
            hidden = self.columns | (inputs.keys() - seen.keys() - set(names))  # what a method added for itself
            seen = {name: value for name, value in inputs.items() if name not in hidden}
        watched = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        assert self.taps is not None  # the hooks exist only while the taps do
        asked = seen.get("output_hidden_states") or getattr(self.sizes.config, "output_hidden_states", False)
        self._own_states = self.taps.hidden_states and not asked
        if self._own_states:
            seen["output_hidden_states"] = True
        self._tuple = returns_tuple(self.student, seen)
        if self._tuple:
            seen["return_dict"] = True
        self.chunking.on = training and self.chunking.wanted(watched)
        targets = self.sources.targets(watched)  # first: what it needs on the way is free again by then
        self._inputs, self._targets = watched, targets  # only now: a teacher may have called the student
        if self.chunking.on:
            seen = self.chunking.begin(seen)
        self.taps.start()
        return (), seen

    def _train_networks(self, inputs: Inputs, step: Step) -> None:
        """One micro-batch for the methods' networks; they step with the window's last."""
        for objective in self.distiller.objectives if self.networks else ():
            with torch.enable_grad():
                losses = objective.network_losses(inputs, step)
            if losses:
                self.networks.backward(losses, micros=self.micros, step=step.global_step)
            for name, loss in losses.items():
                self.reports.sums.add(f"network/{name}", loss.detach() / self.micros)
        if self.networks and self.micro == self.micros - 1:
            self.networks.step(self.trainer.accelerator)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch
    def _after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        inputs, self._inputs = self._inputs, None
        targets, self._targets = self._targets, None
        if self.taps is not None:
            self.taps.stop()
        self.chunking.stop()
        if inputs is None or targets is None or output is None or self.taps is None:  # not watched, or it raised
            return output
        inputs = with_frames(unwrap(self.student), inputs)
        signals, apart = self.sources.signals(inputs, output, targets)
        clean = without_states(output) if self._own_states else output
        if self.trainer.compute_loss_func is not None and "labels" not in inputs:
            self.pending = (inputs, signals)
        elif self.is_training():
            own = None if isinstance(output, Tensor) else loss_of(output, inputs)
            own = self.chunking.auxiliary(output) if apart is not None else own
            clean = with_loss(clean, self._total(inputs, signals, own, apart=apart))
        else:
            self.reports.measure(signals, inputs)
        return clean.to_tuple() if self._tuple else clean

    def finish_pending(
        self, outputs: Any, labels: Any, compute_loss_func: Callable[..., Tensor], num_items_in_batch: Any
    ) -> Tensor:
        """The loss of a batch whose labels the Trainer had taken out for a loss function of the user's."""
        assert self.pending is not None  # `DistillCallback.loss` asks first
        (inputs, signals), self.pending = self.pending, None
        if labels is not None:
            inputs = inputs | {"labels": labels}
            where = o.positions(self.kind, inputs)
            where = where.of_labels(self.sizes.vocab) if self.kind == "labels" else where
            signals = replace(signals, inputs=inputs, positions=where)
        if not self.is_training():
            self.reports.measure(signals, inputs)
            return compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
        window = self.window or d.count(self.kind, [inputs], self.distiller.objectives)
        own = compute_loss_func(outputs, labels, num_items_in_batch=torch.tensor(max(window.labels, 1.0)))
        return self._total(inputs, signals, own, normalised=True)

    def _total(
        self,
        inputs: Inputs,
        signals: Signals,
        own: Tensor | None,
        *,
        normalised: bool = False,
        apart: Apart | None = None,
    ) -> Tensor:
        """This micro-batch's part of the loss, and its place in the logs."""
        assert self.step is not None  # made by the pre-hook
        local = d.count(self.kind, [inputs], self.distiller.objectives)
        window = self.window or local
        total: Tensor = torch.zeros((), device=signals.positions.index.device)
        sums = None
        if apart is not None:
            parts = self.chunking.loss(apart, signals, window)
            total = total + (parts.loss - parts.loss.detach())  # its gradient; its value comes with the terms
            sums, own = parts.sums, self.chunking.task_loss(parts, own, inputs, local)
        found = d.terms(self.distiller, self.needs, signals, self.step, local, window, sums)
        task = own if normalised else d.task_term(own, local, window, self._ctc)
        if task is not None and self.task_weight:
            if not torch.isfinite(task):
                raise NumericalError(
                    f"step {self.step.global_step}: the task's own loss is {task.item()} in micro-batch {self.micro}; "
                    "no weight was changed. Look at this batch's labels, or lower the learning rate."
                )
            total = total + self.task_weight * task
        for term in found:
            total = total + term.weight * term.value
            self._means.add(f"{term.key}\n{term.name}", term.value.detach())
            self.reports.sums.add(f"distill/{term.name}", term.value.detach())
            self.reports.sums.add("distill_loss", term.weight * term.value.detach())
        if own is not None and window.labels:  # of all processes: one whose batch has no labels logs the same names
            self.reports.sums.add("task_loss", torch.zeros_like(total) if task is None else task.detach())
        if not total.requires_grad:
            raise UnusedLossError(
                "nothing that is trained reaches the loss: the batch has no labels and no term has a gradient. "
                "Check what is frozen, and that the methods have a weight above 0."
            )
        total = total * float(self.trainer.accelerator.num_processes)
        total.register_hook(self._tick)  # type: ignore[no-untyped-call]  # torch
        self.waiting += 1
        self.micro += 1
        return total

    # ------------------------------------------------------------------ never silent

    def _tick(self, gradient: Tensor) -> None:
        self.waiting -= 1

    def check_used(self) -> None:
        """Raises unless every loss that was returned has been differentiated; no weight has changed yet."""
        if self.waiting or self.pending is not None:
            raise UnusedLossError(
                "the Trainer did not use the loss with the distillation terms: a subclass's compute_loss, or a fused "
                "loss, computes its own. Let it use outputs.loss, or pass Trainer(compute_loss_func=callback.loss(f))."
            )

    def check_reached(self) -> None:
        """After the first window: a trained parameter outside the body without gradient is not being taught."""
        unlabelled = self.window is not None and self.window.labels == 0 and self._label_column
        if self._reached or unlabelled:  # labels that are all -100 here may come with a later batch
            return
        self._reached = True
        inner = body(self.student)
        inside = {id(parameter) for parameter in inner.parameters()} if inner is not None else set()
        inside |= {id(parameter) for parameter in self.distiller.parameters()}
        lost = [
            name
            for name, parameter in self.student.named_parameters()
            if parameter.requires_grad and parameter.grad is None and id(parameter) not in inside
        ]
        if inner is not None and lost:
            names = [objective.name for objective in self.distiller.objectives]
            why = "the batch has no labels" if self.task_weight else "the task's own loss has weight 0"
            raise ConfigurationError(
                f"nothing reaches {lost[:3]}: {why} and {names} do not teach the head. Add labels (with a task_weight "
                "above 0) or a method on logits, e.g. method=['kd', ...], or freeze the head."
            )

    def end_step(self) -> None:
        """After an optimizer step: schedules move on, logs count it."""
        self.reports.sums.count += 1
        objectives = self.distiller.objectives
        if self.step is not None and any(objective.overrides("after_step") for objective in objectives):
            means = over_ranks(self.trainer.accelerator, self._means.values)
            for key, objective in self.distiller.items():
                own = {k.partition("\n")[2]: v for k, v in means.items() if k.partition("\n")[0] == key}
                if isinstance(objective, Objective) and own:
                    objective.after_step(self.step, own)
        self._means = Sums({})
        self.window = None
        if isinstance(self.trainer.train_dataset, Mixture):
            self.distiller.get_buffer(_HISTORY).copy_(self.trainer.train_dataset.history)
