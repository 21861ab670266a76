"""A sentence encoder at half its layers beside sentence-transformers: layer reduction and losses on embeddings.

Reimers, Gurevych: Making Monolingual Sentence Embeddings Multilingual using Knowledge Distillation, EMNLP 2020,
arXiv:2004.09813 (MSELoss). Kim et al.: EmbedDistill, 2023, arXiv:2301.12005 (EmbedDistillLoss).
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding, Trainer

from hf_compress import DistillCallback, files, shrink
from hf_compress_evaluation.demo.data import load_sentiment
from hf_compress_evaluation.demo.recipe import packaged
from hf_compress_evaluation.encoders import _models
from hf_compress_evaluation.gallery import _data
from hf_compress_evaluation.task import Task

from . import Bench, Figures
from ._machine import Machine
from ._steps import train

TEXTS, CHOICE, TEST = 2560, 500, 1000
"""Texts that are taught on, on which rates are chosen, and of the reported similarity."""
BATCH, LENGTH, THREADS = 32, 32, 1
"""Texts of a step, the most tokens of one in training, and threads of torch."""
RATES = (1e-4, 2e-4, 4e-4)
"""The first is that of their example."""
LAYERS: Mapping[str, Sequence[int]] = {"our layers": (0, 2, 5), "their layers": (1, 3, 5)}
"""Of six. Ours are what `shrink` keeps where it is asked for three; theirs the last of each pair, as their example
keeps the last of each four where it has three of twelve."""
START, OURS, MSE, EMBED = "start, not trained", "features", "MSELoss", "EmbedDistillLoss"
PEERS = (MSE, EMBED)
PARTS = {
    f"{way}, {layers}": (way, layers)
    for way, layers in (
        *((START, layers) for layers in LAYERS),
        (OURS, "our layers"),
        *((way, "their layers") for way in PEERS),
        (EMBED, "our layers"),  # tells what the start does from what training does
    )
}
MAIN = {OURS: f"{OURS}, our layers", **{way: f"{way}, their layers" for way in PEERS}}
"""Each side as its documentation has it."""
SAME = f"{EMBED}, our layers"
COSINE = "cosine to the teacher"
SCORES = (COSINE, *_data.PAIRS)


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a side trains with."""

    texts: list[str]
    rate: float
    seed: int
    on: Machine


Student = tuple[Any, Any, Figures]
"""Model and tokenizer, and what training took."""


def start(kept: Sequence[int]) -> Student:
    """Without training, which is the same on both sides."""
    tokenizer = AutoTokenizer.from_pretrained(packaged())
    return shrink(AutoModel.from_pretrained(packaged()), layers=kept), tokenizer, {}


def ours(given: Given, kept: Sequence[int]) -> Student:
    """With the callback, which runs the teacher in each step."""
    teacher = AutoModel.from_pretrained(packaged())
    student, tokenizer = shrink(teacher, layers=kept), AutoTokenizer.from_pretrained(packaged())
    callback, collator = DistillCallback(teacher, OURS), DataCollatorWithPadding(tokenizer)

    def read(batch: Mapping[str, list[str]]) -> dict[str, Any]:
        return dict(tokenizer(batch["text"], truncation=True, max_length=LENGTH))

    with measured(given.on) as taken:
        rows = Dataset.from_dict({"text": given.texts}).map(read, batched=True, remove_columns=["text"])
        fit(student, rows, given, collator=collator, callbacks=[callback])
    return student, tokenizer, taken


def theirs(loss: str, given: Given, kept: Sequence[int]) -> Student:
    """With their trainer, on the teacher's embeddings, which are made before it; both are counted."""
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        losses,
    )

    teacher, student = (SentenceTransformer(str(packaged()), device="cpu") for _ in range(2))
    teacher.max_seq_length = student.max_seq_length = LENGTH
    inner = reduced(student.transformers_model, kept)

    def made(*, model: nn.Module, **named: Any) -> Trainer:
        del named["data_collator"]  # its own tokenizes
        found: Trainer = SentenceTransformerTrainer(model=model, loss=getattr(losses, loss)(model), **named)
        return found

    with measured(given.on) as taken:
        labels = teacher.encode(given.texts, show_progress_bar=False).tolist()
        rows = Dataset.from_dict({"text": given.texts, "label": labels})
        fit(student, rows, given, made=made, arguments=SentenceTransformerTrainingArguments)
    return inner, student.tokenizer, taken


def reduced(model: Any, kept: Sequence[int]) -> Any:
    """A BERT that keeps these layers itself, as their example has it."""
    model.encoder.layer = nn.ModuleList(model.encoder.layer[place] for place in kept)
    model.config.num_hidden_layers = len(kept)
    return model


@contextmanager
def measured(on: Machine) -> Iterator[dict[str, float]]:
    """Seconds, and the most megabytes over the loaded models, of what is inside."""
    taken: dict[str, float] = {}
    begun = time.perf_counter()
    with on.highest() as memory:
        yield taken
        taken["seconds"] = time.perf_counter() - begun
    taken["megabytes"] = memory[0] / 2**20


def fit(student: nn.Module, rows: Dataset, given: Given, **settings: Any) -> None:
    """One epoch, the warm-up and the schedule of their example."""
    train(
        student, rows, steps=-(-len(rows) // BATCH), batch=BATCH, on=given.on,
        learning_rate=given.rate, warmup_steps=0.1, seed=given.seed, **settings,
    )  # fmt: skip


def taught(part: str, given: Given, target: Path) -> Figures:
    """Writes the student of a part into a folder; returns what training took."""
    way, layers = PARTS[part]
    kept = LAYERS[layers]
    if way == START:
        model, tokenizer, taken = start(kept)
    else:
        model, tokenizer, taken = ours(given, kept) if way == OURS else theirs(way, given, kept)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return taken


def prepare(folder: Path) -> None:
    """Writes the texts, and the rate of each way: the best on the choice texts with the first seed."""
    on = Machine(threads=THREADS)
    on.begin()
    parts, texts = load_sentiment(), _data.texts()
    rows = Dataset.from_list(texts["train"]).shuffle(seed=0).select(range(TEXTS))
    tasks = {
        "choice": _models.likeness_task(folder / "choice.jsonl", list(parts.choice.rows["text"])[:CHOICE]),
        "test": _models.likeness_task(folder / "test.jsonl", list(parts.test.rows["text"])[:TEST]),
        **_models.pair_tasks(folder),
    }
    written = {name: task.model_dump(mode="json") for name, task in tasks.items()}
    files.write_text(folder / "given.json", json.dumps({"texts": list(rows["text"]), "tasks": written}))
    found = {way: {rate: chosen(part, rate, folder) for rate in RATES} for way, part in MAIN.items()}
    rates = {way: max(scores, key=lambda rate: scores[rate]) for way, scores in found.items()}
    files.write_text(folder / "rates.json", json.dumps(rates))


def chosen(part: str, rate: float, folder: Path) -> float:
    """The choice texts' cosine to the teacher after training with that rate."""
    given = files.read_json(folder / "given.json")
    with tempfile.TemporaryDirectory() as target:
        taught(part, Given(texts=given["texts"], rate=rate, seed=0, on=Machine(threads=THREADS)), Path(target))
        task = Task.model_validate(given["tasks"]["choice"])
        return _models.value(_models.likeness(Path(target), packaged(), task))


def run(part: str, on: Machine, folder: Path, *, seed: int) -> Figures:
    """Cosine to the teacher, Spearman's ρ of both collections, seconds of training and megabytes."""
    given = files.read_json(folder / "given.json")
    tasks = {name: Task.model_validate(task) for name, task in given["tasks"].items()}
    texts = list(Dataset.from_dict({"text": given["texts"]}).shuffle(seed=seed)["text"])
    rate = files.read_json(folder / "rates.json").get(PARTS[part][0], 0.0)
    on.begin()
    with tempfile.TemporaryDirectory() as target:
        taken = taught(part, Given(texts=texts, rate=rate, seed=seed, on=on), Path(target))
        return {
            COSINE: _models.value(_models.likeness(Path(target), packaged(), tasks["test"])),
            **{name: _models.value(_models.order(Path(target), tasks[name])) for name in _data.PAIRS},
            **taken,
            "learning rate": rate,
        }


def ratios(figures: Mapping[str, Figures]) -> Figures:
    """Every side's accuracy, what ours lacks of a peer's, and its time and memory to theirs."""
    found = {f"{score}, {part}": figures[part][score] for score in SCORES for part in PARTS}
    mine, same = figures[MAIN[OURS]], figures[SAME]
    for way in PEERS:
        other = figures[MAIN[way]]
        found |= {f"{score}, {way} above ours": other[score] - mine[score] for score in SCORES}
        found[f"time, to {way}"] = mine["seconds"] / other["seconds"]
        found[f"memory, to {way}"] = mine["megabytes"] / other["megabytes"]
    return found | {f"{score}, {SAME} above ours": same[score] - mine[score] for score in SCORES}


BENCH = Bench(
    setting="Three of the six layers of all-MiniLM-L6-v2 (mean pooling, unit length): ours / sentence-transformers. "
    f"Ours are `shrink`'s layers {LAYERS['our layers']} taught by features, the default for embeddings, the teacher "
    f"in each step. Theirs are layers {LAYERS['their layers']} taught by MSELoss, or by EmbedDistillLoss with its "
    "default distance, the cosine, from embeddings of the teacher that are made before, and count. Of their example's "
    "two rules, the first or the last layer of each pair, the last ones come nearer to the teacher. On both sides "
    f"{TEXTS:,} sentences and words of at most {LENGTH} tokens, one epoch, batch {BATCH}, float32, the rate of "
    f"{', '.join(f'{rate:g}' for rate in RATES)} that is best on {CHOICE} choice texts with the first seed. The cosine "
    f"is the mean over {TEST:,} other sentences, WordSim-353 and SimLex-999 are Spearman's ρ; a round is a seed.",
    parts=tuple(PARTS),
    peer="sentence-transformers",
    run=run,
    ratios=ratios,
    bars={f"{score}, {way} above ours": (0.0, -0.01) for score in SCORES for way in PEERS},
    prepare=prepare,
    seeded=True,
    threads=THREADS,
)
