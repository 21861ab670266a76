"""Tables of other heads than classifiers: entities in contracts, and embeddings."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

import datasets
from hf_compress_plugins.encoders.efficient_attention import long_context_student
from transformers import (
    AutoModel,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    set_seed,
)

from hf_compress import DistillCallback, files, shrink
from hf_compress.entries import ALONE, read
from hf_compress.recipe import named
from hf_compress.teachers.cache import CacheTeacher
from hf_compress_evaluation import gallery
from hf_compress_evaluation.candidates import torch_candidate
from hf_compress_evaluation.demo.recipe import packaged
from hf_compress_evaluation.gallery import _data
from hf_compress_evaluation.intervals import Statistic
from hf_compress_evaluation.scoring import AUTO, scorer
from hf_compress_evaluation.task import Task

from ._grid import Columns, Kind, Scored, run, summarise

LAYERS = 3
EMBEDDING_EPOCHS = 1.0
TEACHER_RATE, TEACHER_EPOCHS = 2e-4, 8.0
PAGE, WINDOW = 512, 64
"""Tokens of a page at most, and tokens that a token of its student sees."""
TEXTS = 6000
"""Sentences and words without labels that embeddings are taught on."""
SIMILARITY: Final = "sentence-similarity"
START = "start, not trained"
Tell = Callable[[str], None]


def joined(rows: Sequence[Mapping[str, Any]], tokenizer: Any, length: int) -> list[dict[str, Any]]:
    """Pages of tagged sentences one after another, as many as fit into that many tokens; longer ones stand alone."""
    found: list[dict[str, Any]] = []
    room = 0
    for row in rows:
        size = len(tokenizer(row["tokens"], is_split_into_words=True, add_special_tokens=False)["input_ids"])
        if size > room:
            found.append({"tokens": [], "tags": []})
            room = length - tokenizer.num_special_tokens_to_add()
        for name in ("tokens", "tags"):
            found[-1][name] += row[name]
        room -= size
    return found


@dataclass(frozen=True, kw_only=True)
class Tagging:
    """What a table of entities reads and trains."""

    student: Callable[[Any], Any]
    """Of the teacher."""
    length: int
    """Tokens of a row at most."""
    batch: int
    epochs: float
    rows: Callable[[Sequence[Mapping[str, Any]], Any, int], Sequence[Mapping[str, Any]]]
    """Of sentences, with the tokenizer and the length."""


TAGGING = {
    "entities": Tagging(
        student=partial(shrink, layers=LAYERS), length=gallery.LENGTH, batch=16, epochs=4.0, rows=lambda rows, *_: rows
    ),
    "pages": Tagging(
        student=partial(
            long_context_student,
            config={"attention": "longformer", "window": WINDOW, "length": PAGE, "layers": LAYERS},
        ),
        length=PAGE,
        batch=2,  # there are few pages
        epochs=6.0,
        rows=joined,
    ),
}


def entities(
    name: str,
    output: Path,
    methods: Sequence[str],
    rates: Sequence[float],
    seeds: Sequence[int],
    tell: Tell,
    progress: bool,
) -> dict[str, Any]:
    """Entity F1 on contracts, by a table of `TAGGING`; the teacher is trained once, on the same rows."""
    how = TAGGING[name]
    tokenizer = AutoTokenizer.from_pretrained(packaged())
    parts = {part: how.rows(each, tokenizer, how.length) for part, each in _data.contracts().items()}
    rows = {part: _written(output / f"{part}.jsonl", each) for part, each in parts.items()}
    label2id = {tag: index for index, tag in enumerate(_data.TAGS)}
    train = gallery.tagged(rows["train"], tokenizer, label2id, how.length)
    collate = DataCollatorForTokenClassification(tokenizer)
    task = Task(task="token-classification", data=str(output / "test.jsonl"), max_length=how.length)
    choice = task.model_copy(update={"data": str(output / "choice.jsonl")})
    teacher = output / "teacher"
    if not teacher.exists():
        tell("teacher")
        set_seed(0)  # the head is new
        whole = AutoModelForTokenClassification.from_pretrained(
            packaged(), id2label=dict(enumerate(_data.TAGS)), label2id=label2id
        )
        gallery.fit(whole, tokenizer, train, collate, teacher, TEACHER_RATE, TEACHER_EPOCHS, how.batch, [], progress)

    def scored(folder: Path) -> Scored:
        return Scored(
            choice=_value(folder, choice, "seqeval_f1"),
            figures={"seqeval_f1": _columns(folder, task, "seqeval_f1", "share")},
        )

    def made(method: str, rate: float, seed: int, target: Path) -> Scored:
        big = AutoModelForTokenClassification.from_pretrained(teacher)
        callbacks = [] if method == ALONE else [_distilling(method, task.task, big, output)]
        small = how.student(AutoModelForTokenClassification.from_pretrained(teacher))
        gallery.fit(
            small, tokenizer, train, collate, target, rate, how.epochs, how.batch, callbacks, progress, seed=seed
        )  # fmt: skip
        return scored(target)

    found = run([ALONE, *methods], output, rates=rates, seeds=seeds, made=made, tell=tell)
    return summarise(found, {"teacher": scored(teacher)}, about=_about(name, rows, how.epochs))


def embeddings(
    output: Path, methods: Sequence[str], rates: Sequence[float], seeds: Sequence[int], tell: Tell, progress: bool
) -> dict[str, Any]:
    """Similarity to the teacher's embeddings, and the order of word pairs as people see it; without labels."""
    texts = _data.texts()
    shuffled = datasets.Dataset.from_list(texts["train"]).shuffle(seed=0).select(range(TEXTS))
    rows = {"train": shuffled, "choice": datasets.Dataset.from_list(texts["choice"])}
    pairs, near = pair_tasks(output), likeness_task(output / "choice.jsonl", [row["text"] for row in texts["choice"]])
    tokenizer = AutoTokenizer.from_pretrained(packaged())
    teacher, start = output / "teacher", output / "start"
    for folder, model in ((teacher, AutoModel.from_pretrained), (start, _half)):
        if not folder.exists():
            with files.atomic_folder(folder) as part:
                model(packaged()).save_pretrained(part)
                tokenizer.save_pretrained(part)
                files.readable(part)
    train = shuffled.map(
        lambda batch: dict(tokenizer(batch["text"], truncation=True, max_length=64, padding=False)),
        batched=True,
        remove_columns=["text"],
    )

    def scored(folder: Path) -> Scored:
        near_teacher = likeness(folder, teacher, near)
        figures = {"teacher_cosine": Columns.of("average", near_teacher)}
        figures |= {name: Columns.of("spearman", order(folder, task)) for name, task in pairs.items()}
        return Scored(choice=value(near_teacher), figures=figures)

    def made(method: str, rate: float, seed: int, target: Path) -> Scored:
        callbacks = [_distilling(method, "feature-extraction", AutoModel.from_pretrained(teacher), output)]
        collate = DataCollatorWithPadding(tokenizer)
        gallery.fit(
            _half(packaged()), tokenizer, train, collate, target, rate, EMBEDDING_EPOCHS, 32, callbacks, progress,
            seed=seed,
        )  # fmt: skip
        return scored(target)

    found = run(methods, output, rates=rates, seeds=seeds, made=made, tell=tell)
    others = {"teacher": scored(teacher), START: scored(start)}
    return summarise(found, others, about=_about("embeddings", rows, EMBEDDING_EPOCHS))


def pair_tasks(output: Path) -> dict[str, Task]:
    """Word pairs with people's scores, by collection, written below a folder."""
    for name, rows in _data.pairs().items():
        _written(output / f"{name}.jsonl", rows)
    return {name: Task(task=SIMILARITY, data=str(output / f"{name}.jsonl")) for name in _data.PAIRS}


def likeness_task(path: Path, texts: Sequence[str]) -> Task:
    """Texts on which embeddings are compared with the teacher's, written as pairs, of which an odd one out is left."""
    middle = len(texts) // 2
    halves = zip(texts[:middle], texts[middle : 2 * middle], strict=True)
    _written(path, [{"sentence1": a, "sentence2": b} for a, b in halves])
    return Task(task=SIMILARITY, data=str(path), label=None)


def likeness(folder: Path, teacher: Path, task: Task) -> Statistic:
    """Mean cosine of the embeddings with the teacher's."""
    own, theirs = (_said(each, task) for each in (folder, teacher))
    found: Statistic = _scorer(SIMILARITY, folder).likeness(own, theirs)["teacher_cosine"].of
    return found


def order(folder: Path, task: Task) -> Statistic:
    """Spearman's ρ of the pairs' cosines with people's scores."""
    found: Statistic = _figure(folder, task, "spearmanr")
    return found


def value(figure: Statistic) -> float:
    """Of all its rows."""
    return float(figure.of(*figure.columns))


def _half(folder: Path) -> Any:
    return shrink(AutoModel.from_pretrained(folder), layers=LAYERS)


def _distilling(method: str, task: str, teacher: Any, output: Path) -> DistillCallback:
    """With the teacher's outputs on disk, once for each method."""
    (entry,) = read(method)
    cached = CacheTeacher(output / "teacher-outputs" / method, teacher, dtype="float32")
    return DistillCallback(cached, named(entry.uses, task), data_licence="MIT")


def _written(path: Path, rows: Sequence[Any]) -> datasets.Dataset:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return datasets.Dataset.from_list(list(rows))


def _about(name: str, rows: dict[str, Any], epochs: float) -> dict[str, Any]:
    budget = {"epochs": epochs, "rows": {part: len(each) for part, each in rows.items()}, "layers": LAYERS}
    return {"command": f"python -m hf_compress_evaluation.encoders {name}", "budget": budget}


# ---------------------------------------------------------------------------------------------- scoring


@cache
def _loaded(folder: Path, task: str) -> Any:
    return torch_candidate("student", folder, "cpu", AUTO[task])


def _scorer(task: str, folder: Path) -> Any:
    return scorer(task, _loaded(folder, task).model.config)


def _said(folder: Path, task: Task) -> Any:
    one, how = _loaded(folder, task.task), _scorer(task.task, folder)
    return how.predict(one, how.load(task, one.model.config), task)


def _figure(folder: Path, task: Task, name: str) -> Any:
    one, how = _loaded(folder, task.task), _scorer(task.task, folder)
    rows = how.load(task, one.model.config)
    return how.figures(one, how.predict(one, rows, task), rows)[name].of


def _value(folder: Path, task: Task, name: str) -> float:
    return value(_figure(folder, task, name))


def _columns(folder: Path, task: Task, name: str, kind: Kind) -> Columns:
    return Columns.of(kind, _figure(folder, task, name))
