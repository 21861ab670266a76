"""Methods side by side at an equal budget: the same rows, start of the student, steps and batch size for each.

Every run is one row: a method at a learning rate with a seed. A finished row is a file that is never written again; a
killed sweep goes on in the middle of a run. The teacher is trained once a seed and shared by all methods.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from hf_compress_evaluation import quality
from hf_compress_evaluation.sweep import plot, tables
from hf_compress_evaluation.sweep.summary import TEACHER, Row, choose, summarise
from pydantic import ValidationError
from transformers import TrainerCallback

from . import bars, facts, files, fitting, registry, ship
from .entries import ALONE, DEFAULT, Entry
from .errors import ConfigurationError, ForeignFileError
from .recipe import Export, Recipe, objectives

logger = logging.getLogger(__name__)

RESULT, BUDGET, ROWS, CACHES = "sweep.json", "budget.json", "rows", "teacher-outputs"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Swept:
    """What a sweep found."""

    folder: Path
    """Holds sweep.json, the tables and the plot."""
    found: dict[str, Any]
    """The content of sweep.json."""

    @property
    def failed(self) -> tuple[str, ...]:
        """Methods of which a run failed."""
        return tuple(one["method"] for one in self.found["methods"] if one["error"])


def run(
    recipe: Recipe,
    methods: Sequence[Entry],
    *,
    seeds: int = 1,
    learning_rates: Sequence[float] = (),
    choose_once: bool = False,
    cache: bool = False,
    alone: bool = True,
    output: Path | None = None,
    command: str = "hf-compress sweep",
    tell: ship.Tell = logger.info,
    progress: bool = True,
) -> Swept:
    """Runs what is missing of a sweep, and writes sweep.json, its tables and its plot.

    Args:
        recipe: with absolute paths; its methods, baseline, export and push are left out, and its seed is the first.
        methods: in the order of the table; each is also compared with the first.
        seeds: how many; the first is the recipe's, and each has a teacher of its own if the recipe trains it.
        learning_rates: each method has the same; chosen on data.choice. Empty: that of the recipe.
        choose_once: try the rates with the first seed alone, and the other seeds at the one that each method chose.
        cache: run the teacher once for each row and method, and keep what it gave until the sweep is done. Of methods
            that read hidden states this is large: some kilobytes for each token.
        alone: also train the student without the teacher, on the labelled rows for as many steps.
        output: folder; None: that of the recipe with "-sweep".
        command: for the record.
        tell: called with a line as each row begins.
        progress: show a bar of the rows, and one of the steps of each.

    Returns:
        also where runs failed, which `failed` names. A failed run is tried again the next time.

    Raises:
        HfCompressError: before anything is trained, for methods or settings that cannot be served, a recipe without
            test rows (or choice rows for several rates), or a folder with rows of another budget.
        OSError: if the output folder cannot be written.
    """
    wanted = [entry for entry in methods if entry.taught]
    if len(wanted) < len(methods) and not alone:
        raise ConfigurationError(f"--methods names {ALONE}, and --no-alone leaves it out. Drop one of them.")
    sweep = _Sweep(
        recipe=recipe.model_copy(update=_LEFT_OUT),
        entries=([Entry(name=ALONE)] if alone else []) + wanted,
        seeds=range(recipe.seed, recipe.seed + seeds),
        rates=tuple(learning_rates) or (recipe.training.learning_rate,),
        choose_once=choose_once,
        cache=cache,
        output=output or Path(f"{recipe.output}-sweep"),
        tell=tell,
    )
    sweep.check()
    with bars.bars(progress) as display:
        rows = list(sweep.rows(display))
    shutil.rmtree(sweep.output / CACHES, ignore_errors=True)
    found = sweep.found(rows, command)
    files.write_text(sweep.output / RESULT, json.dumps(found, indent=1, allow_nan=False) + "\n")
    for name, render in tables.FORMATS.values():
        files.write_text(sweep.output / name, render(found))
    plot.draw(found, sweep.output / "sweep.svg")
    return Swept(folder=sweep.output, found=found)


_LEFT_OUT: dict[str, Any] = {
    "methods": (),
    "alone": None,
    "labelled_only": False,
    "export": Export(quantize=None),
    "push": None,
}
"""What a recipe says of other stages."""


@dataclass(kw_only=True)
class _Sweep:
    """One sweep under way."""

    recipe: Recipe
    entries: list[Entry]
    seeds: Sequence[int]
    rates: tuple[float, ...]
    choose_once: bool
    cache: bool
    output: Path
    tell: ship.Tell

    def check(self) -> None:
        """Everything that can be found out before anything is trained."""
        if not any(entry.taught for entry in self.entries):
            raise ConfigurationError("--methods names no method to compare. `hf-compress methods` lists them.")
        if self.recipe.data.test is None:
            raise ConfigurationError("recipe: methods are compared on data.test, which is not given.")
        if len(self.rates) > 1 and self.recipe.data.choice is None:
            raise ConfigurationError("recipe: a learning rate is chosen on data.choice, which is not given.")
        if len(set(self.rates)) < len(self.rates) or not all(0 < rate < math.inf for rate in self.rates):
            raise ConfigurationError(f"--learning-rates {self.rates}: expected different numbers above 0.")
        for entry in self.entries:
            objectives(self._recipe_of(entry, self.seeds[0]))
            if entry.name == DEFAULT and not registry.default_for(self.recipe.task):
                raise ConfigurationError(f"--methods: {self.recipe.task} has no default method. Name one.")
        if self.output.exists() and any(self.output.iterdir()) and not (self.output / BUDGET).exists():
            raise ConfigurationError(f"{self.output} is not empty, and no sweep made it. Choose another --output.")
        self._work.check()
        self._check_budget()

    def _check_budget(self) -> None:
        path = self.output / BUDGET
        if not path.exists():
            files.write_text(path, json.dumps(self.shared, indent=1) + "\n")
            return
        before = files.read_json(path)
        shared = json.loads(json.dumps(self.shared))
        if changed := sorted(key for key in before.keys() | shared.keys() if before.get(key) != shared.get(key)):
            raise ConfigurationError(
                f"{self.output} holds rows of another budget: {', '.join(changed)} changed, so they cannot be compared "
                "with these. Choose another --output, or remove that folder."
            )

    def _recipe_of(self, entry: Entry | None, seed: int) -> Recipe:
        own = {"seed": seed, "output": str(self.output / f"seed-{seed}"), "methods": entry.uses if entry else ()}
        return self.recipe.model_copy(update=own)

    @cached_property
    def _work(self) -> ship.Work:
        return ship.Work(self._recipe_of(None, self.seeds[0]), self.tell, False)

    @cached_property
    def parts(self) -> tuple[str, ...]:
        return ("train",) if self.recipe.data.unlabelled is None else ("train", "unlabelled")

    @cached_property
    def counts(self) -> dict[str, int]:
        """Rows by part of the data."""
        given = [part for part in (*self.parts, "choice", "test") if getattr(self.recipe.data, part) is not None]
        return {part: self._work.rows(part).data.rows for part in given}

    @cached_property
    def steps(self) -> int:
        """Of every run: what the recipe's epochs make of all rows."""
        how, rows = self.recipe.training, sum(self.counts[part] for part in self.parts)
        return max(1, math.ceil(how.epochs * math.ceil(rows / how.batch_size)))

    @cached_property
    def shared(self) -> dict[str, Any]:
        """What all rows have in common, without a path."""
        recipe = self.recipe
        reading, content = self._work.data_digest
        return {
            "version": VERSION,
            "task": recipe.task,
            "teacher": self._work.teacher_digest or recipe.teacher,
            "teacher_training": None if recipe.teacher_training is None else recipe.teacher_training.model_dump(),
            "student": recipe.student.model_dump(mode="json"),
            "training": recipe.training.model_dump(exclude={"learning_rate"}),
            "steps": self.steps,
            "alpha": recipe.alpha,
            "task_weight": recipe.task_weight,
            "data": {name: value for name, value in reading.items() if name not in ("name", "licence")},
            "rows": content,
        }

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.shared, sort_keys=True).encode()).hexdigest()[:16]

    # ------------------------------------------------------------------ rows

    def rows(self, display: Any) -> Iterator[Row]:
        """Every row: read where it is finished, else run."""
        counted = [len(self.rates) if self._tries_rates(seed) else 1 for seed in self.seeds]
        total, number = sum(counted) * len(self.entries), 0
        bar = display.add_task("sweep", total=total, loss="")
        first: list[Row] = []
        for seed in self.seeds:
            own = self._planned(seed, first)
            before = {(entry.name, rate): self._read(entry.name, rate, seed) for entry, rate in own}
            if (
                seed == self.seeds[0] or self.recipe.teacher_training is not None
            ):  # else it is the one of the first seed
                teacher = self._teacher_of(seed, None in before.values(), display)
                yield teacher
            for entry, rate in own:
                number += 1
                row = before[entry.name, rate]
                if row is None:
                    said = f"{entry.name}, learning rate {rate:g}, seed {seed}"
                    self.tell(f"row {number} of {total}: {said}")
                    row = self._write(self._run(entry, rate, seed, teacher, display))
                    if row.error:
                        self.tell(f"  failed: {files.printable(row.error)}")
                display.advance(bar)
                first += [row] if seed == self.seeds[0] else []
                yield row

    def _tries_rates(self, seed: int) -> bool:
        return seed == self.seeds[0] or not self.choose_once

    def _planned(self, seed: int, first: Sequence[Row]) -> list[tuple[Entry, float]]:
        """What is run with a seed, by the rows of the first one."""
        if self._tries_rates(seed):
            return [(entry, rate) for entry in self.entries for rate in self.rates]
        best = {entry.name: choose([row for row in first if row.method == entry.name])[0] for entry in self.entries}
        return [(entry, self.rates[0] if (rate := best[entry.name]) is None else rate) for entry in self.entries]

    def _path(self, method: str, rate: float | None, seed: int) -> Path:
        return self.output / ROWS / f"{_file_name(method, rate)}-seed-{seed}.json"

    def _read(self, method: str, rate: float | None, seed: int) -> Row | None:
        """A finished row; None if there is none, or it failed."""
        path = self._path(method, rate, seed)
        if not path.exists():
            return None
        try:
            row = Row.model_validate(files.read_json(path))
        except ValidationError as error:
            raise ForeignFileError(path, "is no row of a sweep.", "Remove it, and it is run again.") from error
        if (row.method, row.learning_rate, row.seed, row.fingerprint) != (method, rate, seed, self.fingerprint):
            raise ForeignFileError(path, "is a row of another sweep.", "Remove it, and it is run again.")
        return row if row.finished else None

    def _write(self, row: Row) -> Row:
        path = self._path(row.method, row.learning_rate, row.seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, row.model_dump_json() + "\n")
        return row

    def _row(self, method: str, rate: float | None, seed: int, **figures: Any) -> Row:
        about = {"date": date.today().isoformat(), "machine": facts.hardware(), "versions": facts.versions()}
        return Row(method=method, learning_rate=rate, seed=seed, fingerprint=self.fingerprint, **{**about, **figures})

    def _teacher_of(self, seed: int, needed: bool, display: Any) -> Row:
        """The teacher's row; the teacher itself is made if it is needed, or was never scored."""
        found = self._read(TEACHER, None, seed)
        if found is not None and not needed:
            return found
        work = ship.Work(self._recipe_of(None, seed), self.tell, display)
        work.output.mkdir(exist_ok=True)
        work.prepare_teacher()
        if found is not None:
            return found
        teacher, tokenizer = work.load_teacher()
        return self._write(self._row(TEACHER, None, seed, **self._scored(work, teacher, tokenizer)))

    def _run(self, entry: Entry, rate: float, seed: int, teacher: Row, display: Any) -> Row:
        work = ship.Work(self._recipe_of(entry, seed), self.tell, display)
        target = work.output / _file_name(entry.name, rate)
        try:
            return self._row(entry.name, rate, seed, **self._trained(work, entry, rate, target, teacher))
        except OSError:  # the disk's fault, not the method's
            raise
        except Exception as error:  # whatever a method raises is its result; the others go on
            logger.debug("%s failed", entry.name, exc_info=True)
            shutil.rmtree(fitting.unfinished(target), ignore_errors=True)
            return self._row(entry.name, rate, seed, error=_said(error))
        finally:
            shutil.rmtree(target, ignore_errors=True)

    def _trained(self, work: ship.Work, entry: Entry, rate: float, target: Path, teacher: Row) -> dict[str, Any]:
        """Figures of a run, as the fields of `Row`."""
        timed = _Timed()
        student, tokenizer = work.train(
            target,
            self.recipe.training.model_copy(update={"learning_rate": rate}),
            parts=self.parts if entry.taught else ("train",),
            taught=entry.taught,
            steps=self.steps,
            callbacks=[timed],
            cache=self._cache_of(entry, work) if self.cache else None,
        )
        made = self._scored(work, student, tokenizer)
        made["label_loyalty"] = float(np.mean(np.equal(made["predictions"], teacher.predictions)))
        if self.recipe.data.choice is not None:
            made["choice_accuracy"] = fitting.accuracy(student, tokenizer, work.encoded("choice", student, tokenizer))
        training = facts.load(target).training if entry.taught else None
        used = () if training is None else training.methods
        made["objectives"] = tuple(one.model_dump(mode="json", exclude={"citation"}) for one in used)
        return made | {"steps": timed.steps, "seconds": timed.seconds}

    def _cache_of(self, entry: Entry, work: ship.Work) -> Path:
        """One for each method, whose taps it holds, and for each teacher."""
        teacher = "teacher" if self.recipe.teacher_training is None else work.output.name
        return self.output / CACHES / teacher / _file_name(entry.name, None)

    def _scored(self, work: ship.Work, model: Any, tokenizer: Any) -> dict[str, Any]:
        rows = work.rows("test")
        assert rows.labels is not None  # the recipe names their column
        logits = quality.predict(model, tokenizer, rows.texts, max_length=self.recipe.data.max_length)
        return {
            "predictions": tuple(logits.argmax(-1).tolist()),
            "accuracy": float(quality.right(logits, rows.labels).mean()),
            "parameters": model.num_parameters(),
        }

    # ------------------------------------------------------------------ result

    def found(self, rows: Sequence[Row], command: str) -> dict[str, Any]:
        """What sweep.json holds."""
        labels = self._work.rows("test").labels
        assert labels is not None  # as they were scored
        timed = [row.seconds for row in rows if row.seconds is not None]
        budget = {
            "steps": self.steps,
            "epochs": self.recipe.training.epochs,
            "batch_size": self.recipe.training.batch_size,
            "rows": sum(self.counts[part] for part in self.parts),
            "labelled_rows": self.counts["train"],
            "choice_rows": self.counts.get("choice", 0),
            "test_rows": self.counts["test"],
            "learning_rates": list(self.rates),
            "seeds": list(self.seeds),
            "chosen_with_first_seed": self.choose_once,
            "runs_per_method": sum(len(self.rates) if self._tries_rates(seed) else 1 for seed in self.seeds),
            "seconds_per_run": sum(timed) / len(timed) if timed else None,
        }
        made = {
            "version": VERSION,
            "date": max(row.date for row in rows),
            "command": command,
            "machines": sorted({row.machine for row in rows}),
            "versions": [json.loads(each) for each in sorted({json.dumps(row.versions) for row in rows})],
            "fingerprint": self.fingerprint,
            "recipe": self.shared,
            "budget": budget,
            "methods": [asdict(one) for one in summarise(rows, labels.tolist())],
            "runs": [
                row.model_dump(mode="json", exclude={"predictions", "fingerprint", "machine", "versions"})
                for row in rows
            ],
        }
        plain: dict[str, Any] = json.loads(json.dumps(made))  # what a reader of the file gets
        return plain


class _Timed(TrainerCallback):  # type: ignore[misc]  # transformers is not typed for mypy
    """Counts the steps of a training and takes its time."""

    steps, seconds = 0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun, self.first = time.monotonic(), state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps = state.global_step
        taken, steps = time.monotonic() - self.begun, state.global_step - self.first
        self.seconds = taken * self.steps / steps if steps else taken  # a resumed run's last part stands for all


def _file_name(method: str, rate: float | None) -> str:
    """One for each method and learning rate, whatever signs the method's settings hold."""
    return quote(method, safe="+=,[]") + ("" if rate is None else f"-{rate!r}")


def _said(error: BaseException) -> str:
    """Kind and message in one line, folders of this machine cut to the file's name."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return re.sub(r"(?<![\w.:/])(?:/[^/\s'\"]+)+/(?=[^/\s])", "…/", text)[:500]
