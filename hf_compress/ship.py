"""From a recipe to a model that is exported, measured, described and pushed: stages that a killed run resumes.

Each stage writes its product whole or not at all, and then notes in `stages.json` from what it was made. A stage whose
note still holds and whose product is there is passed over; a changed recipe runs again what depends on the change.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from hf_compress_cards import card
from hf_compress_evaluation import folder as evaluation
from hf_compress_evaluation.examples import Examples, classes, examples, read_rows
from hf_compress_evaluation.quality import longest
from hf_compress_evaluation.task import Task
from transformers import AutoModelForSequenceClassification, PreTrainedModel, TrainerCallback

from . import bars, facts, files, fitting, foreign, hub, licences
from .callback import DistillCallback
from .errors import ConfigurationError, GateError, MismatchError
from .facts import Measurement, Record
from .onnx import Gate, export_onnx, quantize_onnx
from .recipe import Fitting, Recipe, objectives
from .shrinking import Width, check_sizes, cut
from .teachers.cache import CacheTeacher

logger = logging.getLogger(__name__)

NOTES = "stages.json"
AFTER: dict[str, tuple[str, ...]] = {
    "teacher": (),
    "alone": ("teacher",),
    "student-labelled": ("teacher",),
    "student": ("teacher",),
    "export": ("student",),
    "evaluate": ("export", "alone", "student-labelled"),
    "card": ("evaluate",),
    "push": ("card",),
}
"""What each stage is made from, in the order in which they run."""
FOLDERS = ("teacher", "alone", "alone-candidates", "student-labelled", "student", "commit")
"""What stages write, and replace, in the output folder."""
Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Shipped:
    """What a recipe made."""

    folder: Path
    record: Record
    destination: str
    """Plainly, where the student went."""
    ran: tuple[str, ...]
    """Stages that ran; the others were done already."""


def run(recipe: Recipe, *, tell: Tell = logger.info, progress: bool = True) -> Shipped:
    """Runs every stage of a recipe that is not done.

    Args:
        recipe: with absolute paths.
        tell: called with one line as each stage begins.
        progress: show bars.

    Raises:
        HfCompressError: of the stage that failed; what earlier stages made is kept.
        OSError: if the output folder cannot be written.
    """
    work = Work(recipe, tell, progress)
    work.check()
    for name, stage, inputs in work.stages():
        work.once(name, stage, inputs)
    return Shipped(
        folder=work.student,
        record=facts.load(work.student),
        destination=(work.output / "destination.txt").read_text(encoding="utf-8").strip(),
        ran=tuple(work.ran),
    )


class Work:
    """One recipe under way: its folders, its data, the notes of what is done.

    `run` takes all its stages; a comparison takes the teacher, and trains students from the same start beside it.
    """

    def __init__(self, recipe: Recipe, tell: Tell, progress: bars.Bars) -> None:
        self.recipe, self.tell, self.bars = recipe, tell, progress
        self.progress = bars.visible(progress)
        self.output = Path(recipe.output)
        self.student = self.output / "student"
        self.notes_file = self.output / NOTES
        notes = files.read_json(self.notes_file) if self.notes_file.exists() else {}
        self.notes: dict[str, str] = {str(key): str(value) for key, value in notes.items()}
        self.ran: list[str] = []
        self.private = recipe.private
        self.chains: dict[str, str] = {}

    def stages(self) -> list[tuple[str, Callable[[], None], Any]]:
        """Name, action and the settings that decide its product, in order; `AFTER` says what else does."""
        recipe = self.recipe
        origin = [recipe.teacher, self.teacher_digest, recipe.teacher_training, recipe.seed, self.data_digest]
        made: list[tuple[str, Callable[[], None], Any]] = [("teacher", self._teacher, origin)]
        if recipe.alone is not None:
            shared = recipe.training.model_dump(exclude={"learning_rate", "epochs"})
            made.append(("alone", self._alone, [recipe.alone, recipe.student, shared]))
        how = [recipe.methods, recipe.alpha, recipe.task_weight, recipe.training, recipe.student]
        if recipe.labelled_only:
            made.append(("student-labelled", lambda: self._distil("student-labelled", unlabelled=False), how))
        made.append(("student", lambda: self._distil("student", unlabelled=True), how))
        made.append(("export", self._export, recipe.export))
        made.append(("evaluate", self._evaluate, recipe.measure))
        made.append(("card", self._card, [recipe.push, recipe.licence]))
        made.append(("push", self._push, [recipe.push, recipe.private]))
        return made

    def once(self, name: str, stage: Callable[[], None], inputs: Any) -> None:
        """Runs a stage unless its note says that it was done from the same inputs, and its product is there."""
        before = [self.chains[other] for other in AFTER[name] if other in self.chains]
        text = json.dumps([name, inputs, before], default=_plain, sort_keys=True)
        chain = self.chains[name] = hashlib.sha256(text.encode()).hexdigest()
        if self.notes.get(name) == chain and self._product(name).exists():
            self.tell(f"{name}: done already")
            return
        self.tell(f"{name}: {_SAID[name]}")
        if self.notes.get(f"{name}, begun") != chain:  # what a killed run left is of other settings
            shutil.rmtree(fitting.unfinished(self.output / name), ignore_errors=True)
            shutil.rmtree(self.output / f"{name}-candidates", ignore_errors=True)
        for stale in _depending(name):
            self.notes.pop(stale, None)
        self._note(f"{name}, begun", chain)
        stage()
        self.ran.append(name)
        del self.notes[f"{name}, begun"]
        self._note(name, chain)

    def _note(self, name: str, chain: str) -> None:
        self.notes[name] = chain
        files.write_text(self.notes_file, json.dumps(self.notes, indent=1) + "\n")

    def _product(self, name: str) -> Path:
        """The file that a stage leaves; of a teacher that is only checked, the notes."""
        if name == "teacher" and self.recipe.teacher_training is None:
            return self.notes_file
        made = {
            "export": self.student / "onnx" / "model.onnx",
            "evaluate": self.student / facts.FILE,
            "card": self.student / card.FILE,
            "push": self.output / ("commit" if self.recipe.push is None else "destination.txt"),
        }
        return made.get(name, self.output / name / "config.json")

    def check(self) -> None:
        """Everything that can be found out before anything is trained; nothing is left behind if it is refused."""
        objectives(self.recipe)
        self._check_output()
        if self.recipe.alone is not None and self.recipe.data.choice is None:
            raise ConfigurationError("recipe: `alone` chooses a learning rate on data.choice, which is not given.")
        if self.recipe.export.quantize and self._gate_rows is None:
            raise ConfigurationError(
                "recipe: int8 is measured on data.choice or data.test before it is kept, and neither is given. "
                "Give one, or set export: {quantize: null}."
            )
        for part in ("train", "unlabelled", "choice", "test"):
            if getattr(self.recipe.data, part) is not None:
                self.rows(part)
        self._check_teacher()
        if self.recipe.push is not None:
            self._check_push(self.recipe.push)
        self.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.output):
            pass  # it can be written

    def _check_push(self, target: str) -> None:
        repository, endpoint = hub.repository_of(target)
        teachers = [] if Path(self.recipe.teacher).is_dir() else [self.recipe.teacher]
        self.private = hub.private_for(teachers, self.recipe.private)
        if self.private and self.recipe.private is None:
            self.tell(f"{self.recipe.teacher} is private or gated, so the student will be private (private: true)")
        hub.authorize(repository, endpoint=endpoint, private=self.private)
        licence, why = self._licence
        if licence is None:
            raise ConfigurationError(f"recipe: {why}. Say under which one the student is pushed: licence: apache-2.0.")

    @cached_property
    def _licence(self) -> tuple[str | None, str]:
        """Of the student: as the recipe says, else as teacher and data allow; or why nobody knows it."""
        if self.recipe.licence is not None:
            return licences.valid(self.recipe.licence), "as the recipe says"
        data = self.recipe.data
        of = {
            "the teacher": licences.of_source(self.recipe.teacher),
            f"the data {data.name or ''}".strip(): data.licence,
        }
        return licences.combined(of)

    def _check_output(self) -> None:
        """Stages replace whole folders, so those of somebody else must not lie there."""
        held = [name for name in (*FOLDERS, "config.json") if (self.output / name).exists()]
        if held and not self.notes_file.exists():
            raise ConfigurationError(
                f"{self.output} holds {held[0]}, and no run of a recipe made it (there is no {NOTES}); it would be "
                "replaced. Choose another output."
            )
        trained = self.recipe.teacher_training is not None
        if trained and Path(self.recipe.teacher).resolve() == (self.output / "teacher").resolve():
            raise ConfigurationError(f"{self.recipe.teacher} would be replaced by its trained copy. Move one of them.")

    def _check_teacher(self) -> None:
        layers, depth = self.recipe.student.layers, self._teacher_config.get_text_config().num_hidden_layers
        if layers is not None and (layers if isinstance(layers, int) else max(layers) + 1) > depth:
            raise ConfigurationError(f"recipe: student.layers is {layers}, and the teacher has {depth} layers.")
        if asked := _width(self.recipe):
            with torch.device("meta"):
                shapes = AutoModelForSequenceClassification.from_config(self._teacher_config)
            check_sizes(shapes, asked)
        if len(self.labels) < 2:
            raise ConfigurationError(
                f"recipe: {len(self.labels)} class ({', '.join(self.labels)}) is too few to learn."
            )

    # ------------------------------------------------------------------ teacher as it is given

    @cached_property
    def _teacher_config(self) -> Any:
        return foreign.config(self.recipe.teacher, use=_AS_TEACHER[0])

    @cached_property
    def teacher_digest(self) -> dict[str, str]:
        """What lies in a teacher's folder; that of a hub id is its name."""
        folder = Path(self.recipe.teacher)
        found = [*folder.glob("*.safetensors"), *folder.glob("*.json")] if folder.is_dir() else []
        return {path.name: files.sha256(path) for path in found if path.name != facts.FILE}

    # ------------------------------------------------------------------ data

    @cached_property
    def labels(self) -> dict[str, int]:
        """Names of the classes to ids: of the recipe, else of the teacher, else of the training rows."""
        given = self.recipe.data.labels
        if given is not None:
            return {name: index for index, name in enumerate(given)}
        if self.recipe.teacher_training is None:
            return dict(self._teacher_config.label2id)
        data = self.recipe.data
        return classes(read_rows(Path(data.train)), data.label, name=self._name("train"))

    def _name(self, part: str) -> str:
        """Of one part of the data, for the record; from the name of its file where the recipe gives none."""
        data = self.recipe.data
        return f"{data.name}, {part}" if data.name else Path(getattr(data, part)).name.split(".")[0]

    def rows(self, part: str) -> Examples:
        """The texts and labels of one file of the recipe."""
        data = self.recipe.data
        return examples(
            read_rows(Path(getattr(data, part))),
            name=self._name(part),
            text=data.text,
            label=None if part == "unlabelled" else data.label,
            label2id=self.labels,
            licence=data.licence,
        )

    @cached_property
    def data_digest(self) -> list[Any]:
        """How the data are read, and the hash of each file by part."""
        parts = [name for name in ("train", "unlabelled", "choice", "test") if getattr(self.recipe.data, name)]
        settings = self.recipe.data.model_dump(exclude={"train", "unlabelled", "choice", "test"})
        return [settings, {name: files.sha256(Path(getattr(self.recipe.data, name))) for name in parts}]

    def encoded(self, part: str, model: PreTrainedModel, tokenizer: Any) -> datasets.Dataset:
        """Token ids of one file, cut to what the recipe wants and the model takes."""
        rows = self.rows(part)
        kept = min(self.recipe.data.max_length, longest(model, tokenizer))
        return fitting.encode(tokenizer, rows.texts, rows.labels, kept)

    @property
    def _gate_rows(self) -> str | None:
        return "choice" if self.recipe.data.choice else "test" if self.recipe.data.test else None

    # ------------------------------------------------------------------ stages

    @property
    def teacher(self) -> str:
        """Folder of a teacher that was fine-tuned here, else what the recipe names."""
        return str(self.output / "teacher") if self.recipe.teacher_training is not None else self.recipe.teacher

    def _teacher(self) -> None:
        recipe = self.recipe
        if recipe.teacher_training is None:
            self.load_teacher()
            return
        transformers.set_seed(recipe.seed)
        body = _loaded(
            recipe.teacher,
            num_labels=len(self.labels),
            id2label={index: name for name, index in self.labels.items()},
            label2id=self.labels,
        )
        tokenizer = foreign.tokenizer(recipe.teacher)
        rows = self.encoded("train", body, tokenizer)
        target = self.output / "teacher"
        fitting.fit(body, tokenizer, rows, recipe.teacher_training, target, seed=recipe.seed, progress=self.bars)

    def prepare_teacher(self) -> None:
        """The stage of the teacher alone, unless it is done."""
        self.once(*self.stages()[0])

    def load_teacher(self) -> tuple[PreTrainedModel, Any]:
        """Teacher and tokenizer, after its stage.

        Raises:
            MismatchError: if it lacks weights.
        """
        teacher, report = _loaded(self.teacher, report=True)
        if report["missing_keys"]:
            raise MismatchError(
                f"the teacher has no weights for {sorted(report['missing_keys'])[:3]}. Give a fine-tuned classifier, "
                "or add `teacher_training: {}` to the recipe."
            )
        return teacher, foreign.tokenizer(self.teacher)

    def _start(self) -> tuple[PreTrainedModel, PreTrainedModel, Any]:
        """Teacher, student at its start, tokenizer."""
        teacher, tokenizer = self.load_teacher()
        asked = self.recipe.student
        student = cut(teacher, layers=_layers(asked.layers), width=_width(self.recipe), keep=asked.keep).student
        return teacher, student, tokenizer

    def _alone(self) -> None:
        """Trains the baseline at each learning rate, keeps the best on data.choice, and notes how each did."""
        assert self.recipe.alone is not None  # the stage exists only then
        candidates = self.output / "alone-candidates"
        scores: dict[str, float] = {}
        for rate in self.recipe.alone.learning_rates:
            target = candidates / f"alone-{rate:g}"
            settings = {"learning_rate": rate, "epochs": self.recipe.alone.epochs}
            how = self.recipe.training.model_copy(update=settings)
            done = target / "score.json"
            if not done.exists():
                student, tokenizer = self.train(target, how, parts=("train",), taught=False)
                score = fitting.accuracy(student, tokenizer, self.encoded("choice", student, tokenizer))
                files.write_text(done, json.dumps({"accuracy": score}))
            scores[f"{rate:g}"] = files.read_json(done)["accuracy"]
        best = max(scores, key=lambda rate: scores[rate])
        with files.atomic_folder(self.output / "alone") as part:
            shutil.copytree(candidates / f"alone-{best}", part, dirs_exist_ok=True)
            (part / "score.json").unlink()
            files.write_text(part / "choice.json", json.dumps({"chosen": best, "accuracy": scores}, indent=1))
        shutil.rmtree(candidates, ignore_errors=True)

    def _distil(self, name: str, *, unlabelled: bool) -> None:
        parts = ("train", "unlabelled") if unlabelled and self.recipe.data.unlabelled is not None else ("train",)
        self.train(self.output / name, self.recipe.training, parts=parts)

    def train(
        self,
        target: Path,
        how: Fitting,
        *,
        parts: Sequence[str],
        taught: bool = True,
        steps: int | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        cache: Path | None = None,
    ) -> tuple[PreTrainedModel, Any]:
        """Trains the student's start on parts of the data and writes it to `target`, with the recipe's seed.

        Args:
            target: folder; checkpoints of a killed run beside it are continued.
            how: learning rate, batch size, epochs.
            parts: of the data, e.g. ("train", "unlabelled").
            taught: with the recipe's methods; False: on the labels, without the teacher.
            steps: of the optimizer; None: `how.epochs`.
            callbacks: further ones.
            cache: folder of what the teacher gave before; it is filled with what is missing.

        Returns:
            student and tokenizer.
        """
        teacher, student, tokenizer = self._start()
        rows = [self.encoded(part, student, tokenizer) for part in parts]
        if taught:
            distilling = DistillCallback(
                teacher if cache is None else CacheTeacher(cache, teacher, dtype="float32"),
                objectives(self.recipe),
                alpha=self.recipe.alpha,
                task_weight=self.recipe.task_weight,
                data=self.recipe.data.name or self._name("train"),
                data_licence=self.recipe.data.licence,
            )
            callbacks = [distilling, *callbacks]
        fitting.fit(
            student,
            tokenizer,
            datasets.concatenate_datasets(rows) if len(rows) > 1 else rows[0],
            how,
            target,
            seed=self.recipe.seed,
            steps=steps,
            callbacks=callbacks,
            progress=self.bars,
        )
        return student, tokenizer

    def _export(self) -> None:
        settings = self.recipe.export
        shutil.rmtree(self.student / "onnx_int8", ignore_errors=True)  # of another float32 graph
        facts.save(self.student, _without(facts.load(self.student), lambda m: m.variant != "torch"))
        export(self.student, tell=self.tell)
        if settings.teacher and Path(self.teacher).is_dir():
            export(Path(self.teacher), tell=self.tell)
        if settings.quantize and self._gate_rows is not None:
            rows = self.rows(self._gate_rows)
            gate = Gate(
                features=rows.texts,
                labels=None if rows.labels is None else rows.labels.tolist(),
                max_drop=settings.max_drop,
                min_agreement=settings.min_agreement,
            )
            try:
                quantize_onnx(self.student, gate=gate, progress=self._told("int8"))
            except GateError as error:  # the float32 graph is what such a model has
                self.tell(f"  int8: not kept. {error}")

    def _told(self, what: str) -> Tell:
        return lambda line: self.tell(f"  {what}: {line}")

    def _evaluate(self) -> None:
        if self.recipe.data.test is None:
            self.tell("  no data.test: quality and latency are not measured, and the card will say so")
            facts.save(self.student, _without(facts.load(self.student), lambda m: m.metric == "choice_accuracy"))
        else:
            facts.save(self.student, _without(facts.load(self.student), lambda m: m.metric not in _OF_EXPORT))
            self._measure(self.recipe.data.test)
        if self.recipe.alone is not None:
            chosen = _choices(self.output / "alone", self.rows("choice").data, self.recipe.seed)
            facts.append(self.student, *chosen)

    def _measure(self, test: str) -> None:
        data, measure = self.recipe.data, self.recipe.measure
        others = {"student-labelled": self.output / "student-labelled"} if self.recipe.labelled_only else {}
        alone = self.output / "alone" if self.recipe.alone is not None else None
        evaluation.evaluate_folder(
            self.student,
            task=Task(
                task=self.recipe.task,
                data=test,
                text=data.text,
                label=data.label,
                max_length=data.max_length,
                name=self._name("test"),
                licence=data.licence,
            ),
            teacher=self.teacher,
            alone=alone,
            others=others,
            threads=measure.threads,
            timing=evaluation.Timing(batches=measure.batches, length=measure.length, runs=measure.runs),
            cost=measure.cost,
            seed=self.recipe.seed,
            progress=self.progress,
        )

    def _card(self) -> None:
        self._state_licence()
        repository = None if self.recipe.push is None else hub.repository_of(self.recipe.push)[0]
        card.write(self.student, repo_id=repository)

    def _state_licence(self) -> None:
        """What the recipe says; else that of the teacher as it came, which a copy trained here has no card to tell."""
        record = facts.load(self.student)
        if self.recipe.licence is not None:
            licences.state(self.student, self.recipe.licence)
        elif (training := record.training) is not None and training.teacher is not None:
            known = training.teacher.licence or licences.of_source(self.recipe.teacher)
            teacher = training.teacher.model_copy(update={"licence": known})
            training = training.model_copy(update={"teacher": teacher})
            facts.save(self.student, record.model_copy(update={"training": training, "licence": None}))

    def _push(self) -> None:
        if self.recipe.push is None:
            folder = hub.write_commit(self.student, self.output / "commit")
            said = (
                f"No repository was named, so nothing was pushed. The commit was checked in full and written to "
                f"{folder.name}/ beside {self.student.name}/; `hf-compress push {self.output.name}/{self.student.name} "
                f"OWNER/NAME` sends the same files."
            )
        else:
            repository, endpoint = hub.repository_of(self.recipe.push)
            pushed = hub.push(self.student, repository, endpoint=endpoint, private=self.private)
            said = pushed.describe()
        files.write_text(self.output / "destination.txt", said + "\n")


_SAID = {
    "teacher": "fine-tunes or checks the teacher",
    "alone": "trains the student's start without the teacher, at each learning rate",
    "student-labelled": "distils on the labelled rows alone",
    "student": "distils on all rows",
    "export": "writes ONNX and compares it with torch",
    "evaluate": "measures quality, agreement, size and latency",
    "card": "writes the card from what was measured",
    "push": "makes the commit",
}


def export(folder: Path, *, tell: Tell = logger.info) -> None:
    """Exports a model folder to `onnx/`, with parity enforced."""
    export_onnx(folder, progress=lambda line: tell(f"  {folder.name}: {line}"))


def _width(recipe: Recipe) -> Width:
    return Width(hidden=recipe.student.hidden, heads=recipe.student.heads, intermediate=recipe.student.intermediate)


def _layers(layers: int | tuple[int, ...] | None) -> int | list[int] | None:
    return list(layers) if isinstance(layers, tuple) else layers


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else str(value)


_AS_TEACHER = ("as the teacher", "Give a model folder or a hub id.")


def _loaded(source: str, *, report: bool = False, **settings: Any) -> Any:
    """A classifier with `settings` in its config, from safetensors without remote code; and what was found missing."""
    with foreign.loading(source, *_AS_TEACHER):
        return AutoModelForSequenceClassification.from_pretrained(
            source,
            config=foreign.config(source, use=_AS_TEACHER[0], **settings),
            output_loading_info=report,
            **foreign.SAFE,
        )


def _depending(name: str) -> set[str]:
    """A stage and all that is made from its product."""
    found = {name}
    for stage, before in AFTER.items():
        if found.intersection(before):
            found.add(stage)
    return found


def _without(record: Record, stale: Callable[[Measurement], bool]) -> Record:
    """A record without measurements that a repeated stage takes again."""
    return record.model_copy(update={"measurements": tuple(m for m in record.measurements if not stale(m))})


_OF_EXPORT = ("parity_max_abs_diff", "agreement_with_fp32", "accuracy_drop")
"""Metrics that the export measures and the evaluation does not."""


def _choices(alone: Path, data: facts.Data, seed: int) -> list[Measurement]:
    """How the baseline's learning rates did on the rows that chose between them."""
    chosen: Mapping[str, Any] = files.read_json(alone / "choice.json")
    return [
        Measurement(
            subject="alone",
            metric="choice_accuracy",
            value=score,
            unit="fraction",
            data=data,
            seed=seed,
            how={"learning_rate": float(rate), "chosen": rate == chosen["chosen"]},
        )
        for rate, score in chosen["accuracy"].items()
    ]
