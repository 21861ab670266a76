"""`ExportCallback` and `PublishCallback`: an unmodified Trainer's run that ends with a folder to use, or on the hub.

    Trainer(..., callbacks=[DistillCallback(teacher), ExportCallback("student"), PublishCallback("me/student")])

What would stop them is found before the first step. They act last, wherever they stand in the list: by then
`load_best_model_at_end` has put the best weights back, and a DistillCallback has left the student clean, with the
record of its training in the config. Folders are written by the main process; checkpoints are never pushed.
"""

from __future__ import annotations

import logging
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from accelerate.utils import broadcast_object_list
from hf_compress_cards import card
from hf_compress_evaluation import scoring
from hf_compress_evaluation.folder import evaluate_folder
from hf_compress_evaluation.task import Task, read_task
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME

from . import facts, files, foreign, hub, licences, onnx
from .callback import DistillCallback, calling_trainer
from .errors import ConfigurationError, GateError, HfCompressError, MismatchError, UnknownNameError
from .objective import kind_of
from .outgoing import ALLOWED
from .provenance import task_of
from .teachers.model import hub_name

logger = logging.getLogger(__name__)

_FITTING = {
    "text-classification": ("text-classification", "text-regression"),
    "token-classification": ("token-classification",),
    "sentence-similarity": ("feature-extraction",),
}
"""The tasks of models that a task file can score."""


class ExportCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not typed for mypy
    """Ends training with a model folder that holds safetensors, ONNX that was compared with them, and fewer bits.

    At the end of each `train()` model and processing class are saved to `folder`, as `Trainer.save_model` does but
    without the training arguments, and exported to `onnx/` and `onnx_<precision>/` in it. A precision that misses the
    gate is left out, with a warning. A failed export raises, and the saved model stays.

    Nothing is written when training raises, nor in the trials of a hyper-parameter search. Other processes wait for the
    main one, at most `ddp_timeout`. It needs no DistillCallback.

    Args:
        folder: replaced as a whole; it may hold an earlier model and nothing else.
        precisions: of "fp16", "int8" and "int4".
        gate: what they may cost, and the rows on which that is measured.

    Raises:
        ConfigurationError: for precisions without a gate, or a gate without precisions; and when training begins, if
            the model cannot be exported or the folder must not be replaced.
        UnknownNameError: for an unknown precision.
    """

    def __init__(self, folder: str | Path, *, precisions: Sequence[str] = (), gate: onnx.Gate | None = None) -> None:
        self.folder = Path(folder)
        self.precisions = (precisions,) if isinstance(precisions, str) else tuple(precisions)
        self.gate = gate
        for precision in self.precisions:
            if precision not in onnx.PRECISIONS:
                raise UnknownNameError("precision", precision, onnx.PRECISIONS)
        if self.precisions and gate is None:
            raise ConfigurationError(
                f"ExportCallback: {', '.join(self.precisions)} is kept only if its quality holds. Give "
                "gate=Gate(features=…, labels=…) with rows to measure it on."
            )
        if gate is not None and not self.precisions:
            raise ConfigurationError(
                'ExportCallback: the gate is what fewer bits are measured by. Give precisions=("int8",) too, or leave '
                "it out."
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = _trainer_above(self)
        _act_last(trainer)
        if state.is_hyper_param_search:
            return
        with _together(trainer) as main:
            if main:
                onnx.check(_saved_model(trainer))
                _check_folder(trainer, self.folder)
                self._check_gate(trainer)

    def _check_gate(self, trainer: Trainer) -> None:
        tokenizer = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
        if self.gate is not None and not isinstance(self.gate.features[0], Mapping) and tokenizer is None:
            raise ConfigurationError(
                "ExportCallback: the gate's texts need a tokenizer. Give Trainer(processing_class=tokenizer), or rows "
                "of input tensors."
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_hyper_param_search:
            logger.info("hf_compress: a trial of a hyper-parameter search is not exported")
            return
        trainer = _trainer_above(self)
        with _together(trainer) as main:
            _save(trainer, self.folder, main)
            if main:
                with _noting(self.folder, ["hf-compress", "export", str(self.folder)]):
                    self._export()

    def _export(self) -> None:
        onnx.export_onnx(self.folder)
        for precision in self.precisions:
            try:
                onnx.quantize_onnx(self.folder, gate=self.gate, precision=precision)
            except GateError as error:  # the float32 graph is what such a model has
                logger.warning("hf_compress: %s", error)


class PublishCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not typed for mypy
    """Ends training with a push: the folder is measured on a task, gets its card, and goes to the hub in one commit.

    What is pushed is the folder of the Trainer's ExportCallback. Without one the model is saved to `folder` here, as
    safetensors alone, and pushed. Whether the push can work (token, its rights, name, an existing repository, the
    visibility that the teacher asks for) is asked before the first step. A push that fails in the end raises; the
    folder stays, and the error names the command that sends it.

    The Trainer's own `push_to_hub` and `hub_strategy` are left to it. Nothing is pushed when training raises, nor in
    the trials of a hyper-parameter search.

    Args:
        repository: OWNER/NAME, or its URL.
        folder: where the model is saved; None: as the ExportCallback says.
        task: task file to measure on; None: the card says that nothing was measured.
        teacher: folder or hub id that is measured beside the student.
        private: visibility of a new repository; None: private if a teacher is private or gated, else the account's
            default.
        licence: of the student, e.g. "apache-2.0"; None: as its card says or as teacher and data allow.

    Raises:
        ConfigurationError: for a URL that names no repository, or a teacher without a task; and when training begins,
            if nothing says which folder is pushed, or it must not be replaced, or nobody knows the licence.
        HubError, MismatchError, ForeignFileError: when training begins, if the push cannot work, or the task does not
            fit student or teacher.
    """

    def __init__(
        self,
        repository: str,
        *,
        folder: str | Path | None = None,
        task: str | Path | None = None,
        teacher: str | Path | None = None,
        private: bool | None = None,
        licence: str | None = None,
    ) -> None:
        if teacher is not None and task is None:
            raise ConfigurationError(
                f"PublishCallback: {teacher} is measured on the rows of a task. Give task='task.yaml', or leave "
                "teacher out; what the student learned from is recorded in any case."
            )
        self._name, self._endpoint = hub.repository_of(repository)
        self.repository, self.private = repository, private
        self.folder = None if folder is None else Path(folder)
        self.task, self.teacher = None if task is None else Path(task), teacher
        self.licence = None if licence is None else licences.valid(licence)
        self._task: Task | None = None
        self._private = private
        self.pushed: hub.Pushed | None = None
        """What the hub holds after the last push; on the main process."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = _trainer_above(self)
        _act_last(trainer)
        if state.is_hyper_param_search:
            return
        with _together(trainer) as main:
            if main:
                self._check(trainer)

    def _check(self, trainer: Trainer) -> None:
        folder, model = self._folder(trainer), _saved_model(trainer)
        if not _exports(trainer):
            _check_folder(trainer, folder)
        if self.task is not None:
            self._task = read_task(self.task)
            _check_task(self._task, model, self.teacher)
        self._private = hub.private_for(self._teachers(trainer), self.private)
        self._name = hub.authorize(self._name, endpoint=self._endpoint, private=self._private)
        self._check_licence(trainer, folder)

    def _check_licence(self, trainer: Trainer, folder: Path) -> None:
        if self.licence or licences.of_maker(folder / card.FILE):
            return
        callbacks = trainer.callback_handler.callbacks
        run = next((callback.run for callback in callbacks if isinstance(callback, DistillCallback)), None)
        data = None if run is None else run.config.data_licence
        data = data or getattr(getattr(trainer.train_dataset, "info", None), "license", None)
        sources = {"the training data": data}
        if run is not None and run.teacher is not None:
            sources = {"the teacher": run.teacher.describe().licence} | sources
        known, why = licences.combined(sources)
        if known is None:
            raise ConfigurationError(
                f"PublishCallback: {why}, and a model is pushed under one. Give licence='apache-2.0' or the like, or "
                "DistillCallback(data_licence=…) where the teacher's card names its own."
            )

    def _folder(self, trainer: Trainer) -> Path:
        """What is pushed."""
        said = [export.folder for export in _exports(trainer)]
        if self.folder is not None and (not said or self.folder.resolve() in [each.resolve() for each in said]):
            return self.folder
        if self.folder is None and len(said) == 1:
            return said[0]
        exported = " and ".join(map(str, said)) or "nothing"
        raise ConfigurationError(
            f"PublishCallback: pushed is to be {self.folder or 'what was exported'}, and {exported} is exported. Add "
            "one ExportCallback(folder) to the Trainer's callbacks, or give folder=… that is exported, or without an "
            "ExportCallback any."
        )

    def _teachers(self, trainer: Trainer) -> list[str]:
        """The hub ids of all models that the student learns from or is measured beside."""
        names = [] if self.teacher is None else [hub_name(str(self.teacher))]
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, DistillCallback):
                models = (callback.run.teacher, *callback.run.frozen.values())
                names += [model.describe().name for model in models if model is not None]
        return list(dict.fromkeys(name for name in names if name))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_hyper_param_search:
            return
        trainer = _trainer_above(self)
        folder = self._folder(trainer)
        with _together(trainer) as main:
            if not _exports(trainer):
                _save(trainer, folder, main)
            if main:
                self._publish(folder)

    def _publish(self, folder: Path) -> None:
        visibility = {None: [], True: ["--private"], False: ["--no-private"]}[self.private]
        licence = [] if self.licence is None else ["--license", self.licence]
        push = ["hf-compress", "push", *visibility, *licence, str(folder), self.repository]
        beside = [] if self.teacher is None else ["--teacher", str(self.teacher)]
        measure = ["hf-compress", "evaluate", str(folder), "--task", str(self.task), *beside]
        if self._task is not None:
            with _noting(folder, measure, push):
                evaluate_folder(folder, task=self._task, teacher=self.teacher)
        with _noting(folder, push):
            if self.licence is not None:
                licences.state(folder, self.licence)
            card.write(folder, repo_id=self._name)
            self.pushed = hub.push(folder, self._name, endpoint=self._endpoint, private=self._private)
        logger.info("hf_compress: %s", self.pushed.describe())


# ---------------------------------------------------------------------- the Trainer


def _trainer_above(callback: TrainerCallback) -> Trainer:
    trainer = calling_trainer(callback)
    if trainer is None:
        raise ConfigurationError(
            f"no Trainer was found above this {type(callback).__name__}: pass it in Trainer(callbacks=[…])."
        )
    return trainer


def _act_last(trainer: Trainer) -> None:
    """Moves both callbacks behind all others, the export first.

    The list is a new one: the Trainer is going through the other, and calls each callback in it once.
    """
    handler = trainer.callback_handler
    order = (ExportCallback, PublishCallback)
    handler.callbacks = sorted(
        handler.callbacks, key=lambda each: next((1 + i for i, kind in enumerate(order) if isinstance(each, kind)), 0)
    )


def _exports(trainer: Trainer) -> list[ExportCallback]:
    return [each for each in trainer.callback_handler.callbacks if isinstance(each, ExportCallback)]


@contextmanager
def _together(trainer: Trainer) -> Iterator[bool]:
    """Whether this is the main process; the others wait for it at the end, and fail where it has failed."""
    main = bool(trainer.is_world_process_zero())
    failed: list[str | None] = [None]
    try:
        yield main
    except Exception as error:  # whatever it is, the others must not go on alone
        failed = [f"{type(error).__name__}: {error}"]
        raise
    finally:
        broadcast_object_list(failed)
        if failed[0] is not None and not main:
            raise HfCompressError(f"the main process failed. {failed[0]}")


@contextmanager
def _noting(folder: Path, *commands: Sequence[str]) -> Iterator[None]:
    """Says in an error what is left, and which commands go on from it."""
    try:
        yield
    except Exception as error:
        told = " and ".join(f"`{shlex.join(command)}`" for command in commands)
        error.add_note(f"The trained model is whole in {folder}. When the cause is gone, {told} goes on from there.")
        raise


def _saved_model(trainer: Trainer) -> PreTrainedModel:
    """The model that would be saved.

    Raises:
        ConfigurationError: for adapters, and for a model that no folder of transformers can hold.
    """
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    if hasattr(model, "peft_config"):
        raise ConfigurationError(
            "the student trains adapters, and what is exported and published is a whole model. Leave the callback out, "
            "and after train(): `model.merge_and_unload().save_pretrained(folder)`, the same of the tokenizer, then "
            "`hf-compress export folder` and `hf-compress push folder OWNER/NAME`."
        )
    if not isinstance(model, PreTrainedModel):
        raise ConfigurationError(
            f"{type(model).__name__} is no PreTrainedModel, so no folder would hold it with its config. Derive it from "
            "PreTrainedModel, or leave the callback out."
        )
    return model


# ---------------------------------------------------------------------- before the first step


def _check_folder(trainer: Trainer, folder: Path) -> None:
    """It is replaced as a whole, so nothing but an earlier model may lie in it."""
    here = folder.resolve()
    for what, other in (("output_dir", Path(trainer.args.output_dir)), ("the working folder", Path.cwd())):
        if other.resolve().is_relative_to(here):
            raise ConfigurationError(
                f"{folder} holds {what}, and is replaced as a whole when training ends. Choose another folder for the "
                "model, e.g. 'student'."
            )
    if here in _teachers_folders(trainer):
        raise ConfigurationError(f"{folder} is the teacher's folder, and would be replaced. Choose another.")
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"{folder} is a file, and a folder is to take its place. Choose another.")
    held = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    if extra := next((name for name in held if name != TRAINING_ARGS_NAME and not ALLOWED.fullmatch(name)), None):
        raise ConfigurationError(
            f"{folder} holds {extra}, which is no part of a model; it would be gone when the folder is replaced. "
            "Choose another folder, or move it away."
        )


def _teachers_folders(trainer: Trainer) -> list[Path]:
    """Where the teachers lie that callbacks name; a hub id is a folder that is not there."""
    callbacks = trainer.callback_handler.callbacks
    named = [each.source for each in callbacks if isinstance(each, DistillCallback)]
    named += [each.teacher for each in callbacks if isinstance(each, PublishCallback)]
    return [Path(name).resolve() for name in named if isinstance(name, str | Path)]


def _check_task(task: Task, model: PreTrainedModel, teacher: str | Path | None) -> None:
    """The student can be scored on the task, and the teacher beside it; `evaluate_folder` would say so in the end."""
    kind, config = kind_of(model), model.config
    if kind == "labels" or task_of(model, kind) not in _FITTING[task.task]:
        raise MismatchError(
            f"PublishCallback: the task file asks for {task.task}, and {type(model).__name__} is made for another. "
            "Leave task out, and add measurements of your own to the record."
        )
    scoring.scorer(task.task, config).load(task, config)
    if teacher is None or task.task == "sentence-similarity":
        return
    if (theirs := foreign.config(teacher, use="as the teacher").id2label) != config.id2label:
        raise MismatchError(
            f"PublishCallback: the teacher has the classes {theirs}, the student {config.id2label}. Agreement needs "
            "the same classes in the same order: set id2label and label2id of both configs alike."
        )


# ---------------------------------------------------------------------- the end


def _save(trainer: Trainer, folder: Path, main: bool) -> None:
    """Writes model and processing class as the Trainer does, whole or not at all. To be called on every process."""
    with files.atomic_folder(folder) if main else TemporaryDirectory() as part:
        trainer.save_model(str(part), _internal_call=True)  # else `push_to_hub` of the arguments would push it
        if not main:
            return
        part = Path(part)
        if not (part / "config.json").is_file():
            raise ConfigurationError(
                f"{type(trainer).__name__}.save_model wrote no config.json. FSDP saves whole weights with "
                "FULL_STATE_DICT, DeepSpeed with stage3_gather_16bit_weights_on_model_save."
            )
        (part / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # it holds `hub_token` in clear
        for kept in folder.glob("*") if folder.is_dir() else ():  # what a maker has written beside the model
            if kept.name == card.FILE or kept.name.startswith("LICENSE"):
                shutil.copy(kept, part)
        files.readable(part)
        facts.save(part, facts.load(part))
