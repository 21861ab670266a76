"""Students that are made here from start to end, as a user would, and kept with their cards.

| name | teacher | student | made by |
|---|---|---|---|
| sentiment | all-MiniLM-L6-v2, fine-tuned | 3 of 6 layers | `hf-compress demo` |
| entities | the same, fine-tuned on sentences of contracts | 3 of 6 layers | `make("entities", …)` |
| embeddings | the same as it is | 3 of 6 layers | `make("embeddings", …)` |

Each stage writes a folder whole or not at all, and one that is there is not run again.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from hf_compress_cards import card, figures
from transformers import (
    AutoModel,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_compress import DistillCallback, export_onnx, facts, files, licences, quantize_onnx, shrink
from hf_compress.fitting import train_into, unfinished
from hf_compress.objective import IGNORED
from hf_compress.onnx import Gate
from hf_compress_evaluation.candidates import torch_candidate
from hf_compress_evaluation.demo.recipe import packaged
from hf_compress_evaluation.folder import Timing, evaluate_folder
from hf_compress_evaluation.scoring import AUTO, scorer
from hf_compress_evaluation.task import Task

from . import _data

RESULTS = Path("evaluation/results/gallery")
"""Where cards and records are kept, seen from the checkout."""
COMMANDS = {
    "sentiment": "hf-compress demo",
    "entities": "python -m hf_compress_evaluation.gallery entities",
    "embeddings": "python -m hf_compress_evaluation.gallery embeddings",
}
LAYERS, LENGTH = 3, 128
LICENCE = "apache-2.0"
"""The encoder's; the data are MIT."""
RATES = (5e-5, 1e-4, 2e-4)
"""Of every model that is trained on labels; the best on the choice part stands for it."""
TIMING = Timing(batches=(1, 32), length=32, runs=50)
Tell = Callable[[str], None]


def make(name: str, output: Path, *, tell: Tell = print, progress: bool = False) -> Path:
    """Trains, exports and measures one student; returns its folder with its card.

    Args:
        name: entities or embeddings.
        output: folder of the run; what it holds already is not made again.
        tell: gets one line for each stage.
        progress: show bars.

    Raises:
        ConfigurationError: if a package with weights or data is missing.
    """
    made = {"entities": _entities, "embeddings": _embeddings}[name]
    return made(output.absolute(), tell, progress)


def keep(name: str, student: Path, results: Path = RESULTS) -> None:
    """Copies a student's record and card to where the README's gallery is read from."""
    results.mkdir(parents=True, exist_ok=True)
    files.write_text(results / f"{name}.json", (student / facts.FILE).read_text(encoding="utf-8"))
    text = (student / card.FILE).read_text(encoding="utf-8")
    files.write_text(results / f"{name}.md", re.sub(r"\n!\[[^\n]*\n", "\n", text))  # its picture is not kept beside it


# ---------------------------------------------------------------------------------------------- entities


def _entities(output: Path, tell: Tell, progress: bool) -> Path:
    rows = {part: _written(output / "data" / f"{part}.jsonl", each) for part, each in _data.contracts().items()}
    tokenizer = AutoTokenizer.from_pretrained(packaged())
    ids = dict(enumerate(_data.TAGS))
    label2id = {tag: index for index, tag in ids.items()}
    train = tagged(rows["train"], tokenizer, label2id)
    collate = DataCollatorForTokenClassification(tokenizer)
    task = Task(
        task="token-classification",
        data=str(output / "data" / "test.jsonl"),
        max_length=LENGTH,
        name="entities in contracts",
        licence="MIT",
    )

    choice = task.model_copy(update={"data": str(output / "data" / "choice.jsonl")})

    def best(name: str, model: Callable[[], Any], callbacks: Callable[[], list[Any]] = list) -> Path:
        """The model of that name at the learning rate that is best on the choice part; all rates for each name."""
        if (chosen := output / name).exists():
            return chosen
        scores = {}
        for rate in RATES:
            if not (target := output / f"{name}-rates" / f"{rate:g}").exists():
                tell(f"{name}: learning rate {rate:g}")
                fit(model(), tokenizer, train, collate, target, rate, 8.0, 16, callbacks(), progress)
            scores[rate] = _score(target, choice)
        rate = max(scores, key=lambda each: scores[each])
        tell(f"{name}: {rate:g} is the best of {scores}")
        with files.atomic_folder(chosen) as part:
            shutil.copytree(output / f"{name}-rates" / f"{rate:g}", part, dirs_exist_ok=True)
        return chosen

    def whole() -> Any:
        set_seed(0)  # the head is new
        return AutoModelForTokenClassification.from_pretrained(packaged(), id2label=ids, label2id=label2id)

    teacher = best("teacher", whole)

    def tuned() -> Any:
        return AutoModelForTokenClassification.from_pretrained(teacher)

    def start() -> Any:
        return shrink(tuned(), layers=LAYERS)

    alone = best("alone", start)
    student = best(
        "student",
        start,
        lambda: [DistillCallback(tuned(), data="entities in contracts", data_licence="MIT")],
    )
    gate = Gate(features=[" ".join(row["tokens"]) for row in rows["choice"]])
    return _finish(student, task, gate, tell, progress, teacher=teacher, alone=alone)


def tagged(
    rows: datasets.Dataset, tokenizer: Any, label2id: Mapping[str, int], length: int = LENGTH
) -> datasets.Dataset:
    """Columns tokens and tags as ids, and the tag at the first token of each word; the others are passed over."""

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        encoded = tokenizer(batch["tokens"], is_split_into_words=True, truncation=True, max_length=length)
        encoded["labels"] = []
        for row, tags in enumerate(batch["tags"]):
            words = encoded.word_ids(row)
            first = [word is not None and word != before for word, before in zip(words, [None, *words], strict=False)]
            labels = [label2id[tags[word]] if new else IGNORED for word, new in zip(words, first, strict=True)]
            encoded["labels"].append(labels)
        return dict(encoded)

    return rows.map(encode, batched=True, remove_columns=rows.column_names)


def _score(folder: Path, task: Task) -> float:
    """Entity F1 of a model on the rows of a task."""
    one = torch_candidate("student", folder, "cpu", AUTO[task.task])
    how = scorer(task.task, one.model.config)
    rows = how.load(task, one.model.config)
    found = how.measure(one, how.predict(one, rows, task), rows, task)
    return next(m.value for m in found if m.metric == how.default[0])


# ---------------------------------------------------------------------------------------------- embeddings


def _embeddings(output: Path, tell: Tell, progress: bool) -> Path:
    rows = {part: _written(output / "data" / f"{part}.jsonl", each) for part, each in _data.texts().items()}
    for name, each in _data.pairs().items():
        _written(output / "data" / f"{name}.jsonl", each)
    teacher = output / "teacher"
    tokenizer = AutoTokenizer.from_pretrained(packaged())
    if not teacher.exists():
        with files.atomic_folder(teacher) as part:
            AutoModel.from_pretrained(packaged()).save_pretrained(part)
            tokenizer.save_pretrained(part)
            files.readable(part)

    def start() -> tuple[Any, Any]:
        big = AutoModel.from_pretrained(teacher)
        return big, shrink(big, layers=LAYERS)

    if not (untrained := output / "start").exists():
        with files.atomic_folder(untrained) as part:
            start()[1].save_pretrained(part)
            tokenizer.save_pretrained(part)
            files.readable(part)
    if not (student := output / "student").exists():
        tell("student: distilled on texts without labels")
        big, small = start()
        train = rows["train"].map(
            lambda batch: dict(tokenizer(batch["text"], truncation=True, max_length=64, padding=False)),
            batched=True,
            remove_columns=["text"],
        )
        callbacks = [DistillCallback(big, data="sentences and words", data_licence="MIT")]
        collate = DataCollatorWithPadding(tokenizer)
        fit(small, tokenizer, train, collate, student, 2e-4, 2.0, 32, callbacks, progress)
    tasks = [
        Task(
            task="sentence-similarity",
            data=str(output / "data" / f"{name}.jsonl"),
            metrics=("spearmanr", "pearsonr"),
            name=name,
            licence="LGPL-2.1",
        )
        for name in _data.PAIRS
    ]
    gate = Gate(features=rows["choice"]["text"][:500])
    others = {"start, not trained": untrained}
    return _finish(student, tasks[0], gate, tell, progress, further=tasks[1:], teacher=teacher, others=others)


# ---------------------------------------------------------------------------------------------- all of them


def _written(path: Path, rows: _data.Rows) -> datasets.Dataset:
    """The rows, which lie in a file as a user's would."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return datasets.Dataset.from_list(rows)


def fit(
    model: Any,
    tokenizer: Any,
    train: datasets.Dataset,
    collate: Any,
    target: Path,
    rate: float,
    epochs: float,
    batch_size: int,
    callbacks: Sequence[Any],
    progress: bool,
    *,
    seed: int = 0,
) -> None:
    """Trains a model into `target`; a killed run goes on from its last checkpoint."""
    arguments = TrainingArguments(
        str(unfinished(target)),
        learning_rate=rate,
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        warmup_steps=0.1,
        weight_decay=0.01,
        train_sampling_strategy="group_by_length",
        save_strategy="epoch",
        save_total_limit=1,
        logging_steps=50,
        report_to=[],
        seed=seed,
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    set_seed(seed)
    trainer = Trainer(
        model=model,
        processing_class=tokenizer,
        args=arguments,
        train_dataset=train,
        data_collator=collate,
        callbacks=list(callbacks),
    )
    train_into(trainer, target, progress=progress)


def _finish(
    student: Path, task: Task, gate: Gate, tell: Tell, progress: bool, further: Sequence[Task] = (), **beside: Any
) -> Path:
    """Exports and measures what is not exported and measured yet, and writes the card."""
    if not (student / "onnx" / "model.onnx").exists():
        tell("export: float32, then int8")
        export_onnx(student)
        quantize_onnx(student, gate=gate, precision="int8")
    if facts.load(student).find("latency_median") is None:
        tell("measure: quality, agreement, size, latency")
        for each in further:
            evaluate_folder(student, task=each, timing=Timing(batches=()), progress=progress, **beside)
        evaluate_folder(student, task=task, timing=TIMING, progress=progress, **beside)
    licences.state(student, LICENCE)
    card.write(student)
    return student


# ---------------------------------------------------------------------------------------------- README


def markdown(results: Path = RESULTS) -> str:
    """The kept students side by side; every number is one of their records."""
    lines = [
        "| student | score | teacher | without the teacher | student | int8 on ONNX Runtime | parameters | bytes | "
        "a row, batch 1 | made and measured by |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, command in COMMANDS.items():
        if (path := results / f"{name}.json").exists():
            lines.append(_line(name, command, facts.Record.model_validate(files.read_json(path))))
    return "\n".join(lines)


def _line(name: str, command: str, record: facts.Record) -> str:
    metric = figures.main_score(record)
    untaught = next((who for who, _ in figures.pairs(record) if who == "alone" or who.startswith("start")), "alone")
    scores = [
        figures.show(record.find(metric, *who))
        for who in (("teacher", "torch"), (untaught, "torch"), ("student", "torch"), ("student", "onnx_int8"))
    ]
    changes = [
        f"{figures.show(record.find(key, 'teacher', 'torch', **how))} → "
        f"{figures.show(record.find(key, 'student', variant, **how))}"
        for key, variant, how in (
            ("parameters", "torch", {}),
            ("bytes", "onnx_int8", {}),
            ("latency_median", "onnx_int8", {"batch": 1}),
        )
    ]
    data = next(m.data.name for m in reversed(record.measurements) if m.metric == metric and m.data is not None)
    said = f"{figures.QUALITY[metric]}, {data}"
    cells = [f"[{name}]({RESULTS}/{name}.md)", said, *scores, *changes, f"`{command}`"]
    return f"| {' | '.join(cells)} |"
