"""Students as a user's script makes them, each with its card on the hub of `HF_ENDPOINT`; and folders that are there.

    python -m card_students WORK [FOLDER...]

Each student is trained by a Trainer with a DistillCallback, on a teacher of that hub, exported by an ExportCallback,
measured where there is a task for it, and pushed. With folders these alone are pushed, as copies below WORK. Prints the
repositories as one line of JSON.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from card_values import STUDENTS as REPOSITORIES
from datasets import Dataset
from hf_compress_cards import card
from hf_compress_evaluation.folder import Timing, evaluate_folder
from huggingface_hub import HfApi
from recipes import LABELS, write_rows
from tiny import VOCAB, tiny_bert_classifier, tiny_bert_config, tiny_plain_tokenizer, tiny_tokenizer
from transformers import (
    BertForTokenClassification,
    BertModel,
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_compress import DistillCallback, ExportCallback, licences, shrink
from hf_compress.hub import push
from hf_compress.onnx import Gate

OWNER = "me"
TEXTS = ["the film was very good", "a dull story", "i love the music but not the end", "the book was bad"] * 4
TAGS = {"film": "B-WORK", "book": "B-WORK", "actor": "B-PERSON"}
NAMES = ("O", "B-WORK", "B-PERSON")
TEACHER_CARD = "---\nlicense: apache-2.0\n---\n# A teacher\n"
QUICK = Timing(batches=(1,), length=8, runs=3, warmup=1)


@dataclass(frozen=True)
class Student:
    """One kind of student."""

    teacher: Callable[[], PreTrainedModel]
    rows: Callable[[], Dataset]
    collator: Callable[[Any], Any] | None = DataCollatorWithPadding
    processor: Callable[[], Any] = tiny_tokenizer
    task: Callable[[Path], str] | None = None
    """Writes the rows to measure on into a folder and gives the task file's text; None: it is not measured."""
    callback: dict[str, Any] = field(default_factory=dict)
    gate: Gate | None = None
    """Of a variant in int8; None: there is none."""


def main(work: Path, folders: Iterable[Path]) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("hf_compress").setLevel(logging.ERROR)  # what a small model's int8 loses is not the matter here
    assert (*STUDENTS,) == REPOSITORIES
    given = [shutil.copytree(folder, work / folder.resolve().name) for folder in folders]
    made = given or [make(name, work) for name in STUDENTS]
    print(json.dumps([publish(folder) for folder in made]))


def make(name: str, work: Path) -> Path:
    """A student's folder: trained, exported, and measured where it can be."""
    print(name, file=sys.stderr, flush=True)
    student, folder = STUDENTS[name], work / name
    processor = student.processor()
    source = teacher_on_hub(name, work, student.teacher(), processor)
    teacher = type(student.teacher()).from_pretrained(source)
    arguments = TrainingArguments(
        str(work / "runs" / name),
        max_steps=60,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=student.collator is not None,
    )
    export = ExportCallback(folder, precisions=("int8",) if student.gate else (), gate=student.gate)
    trainer = Trainer(
        model=shrink(teacher, layers=1) if hasattr(teacher.config, "vocab_size") else student.teacher(),
        args=arguments,
        train_dataset=student.rows(),
        processing_class=processor,
        data_collator=student.collator(processor) if student.collator else None,
        callbacks=[DistillCallback(source, **student.callback), export],
    )
    trainer.train()
    if student.task is not None:
        place = work / "data" / name
        place.mkdir(parents=True)
        (place / "task.yaml").write_text(student.task(place), encoding="utf-8")
        evaluate_folder(folder, task=place / "task.yaml", teacher=source, timing=QUICK)
    return folder


def teacher_on_hub(name: str, work: Path, teacher: PreTrainedModel, processor: Any) -> str:
    """The id of a teacher that the hub holds, with a card that names its licence."""
    folder, repository = work / "teachers" / name, f"{OWNER}/teacher-of-{name}"
    teacher.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "README.md").write_text(TEACHER_CARD, encoding="utf-8")
    HfApi().create_repo(repository)
    HfApi().upload_folder(repo_id=repository, folder_path=folder)
    return repository


def publish(folder: Path) -> str:
    """Writes the card with the repository's name, pushes, and gives the name."""
    repository = f"{OWNER}/{folder.name}"
    if licences.of(folder)[0] is None:
        licences.state(folder, "apache-2.0")
    card.write(folder, repo_id=repository)
    push(folder, repository, private=False)  # its readers have no token; a folder's teacher is not on this hub
    return repository


# ---------------------------------------------------------------------- rows, and what is measured


def classified() -> Dataset:
    return Dataset.from_dict({**tiny_tokenizer()(TEXTS), "labels": [0, 1, 0, 1] * 4})


def classifying(place: Path) -> str:
    write_rows(place / "reviews.csv", 24)
    metrics = "[accuracy, f1_macro, f1_micro, matthews_correlation, calibration_error, kl]"
    return f"task: text-classification\ndata: reviews.csv\nlicence: mit\nslices: true\nmetrics: {metrics}\n"


def tagged() -> Dataset:
    words = [text.split() for text in TEXTS]
    inputs = tiny_tokenizer()(words, is_split_into_words=True)
    labels = [
        [-100 if word is None else NAMES.index(TAGS.get(words[row][word], "O")) for word in inputs.word_ids(row)]
        for row in range(len(words))
    ]
    return Dataset.from_dict({**inputs, "labels": labels})


def tagging(place: Path) -> str:
    rows = [{"tokens": text.split(), "tags": [TAGS.get(word, "O") for word in text.split()]} for text in TEXTS]
    (place / "words.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    metrics = "[seqeval_f1, seqeval_precision, seqeval_recall, accuracy]"
    return f"task: token-classification\ndata: words.jsonl\nmetrics: {metrics}\nname: words, tagged\n"


def plain(tokenizer: Callable[[], Any] = tiny_tokenizer) -> Dataset:
    return Dataset.from_dict(dict(tokenizer()(TEXTS)))


def comparing(place: Path) -> str:
    chosen = random.Random(0)
    rows = [f"{chosen.choice(TEXTS)},{chosen.choice(TEXTS)},{chosen.random():.3f}" for _ in range(24)]
    (place / "pairs.csv").write_text("\n".join(["sentence1,sentence2,score", *rows]), encoding="utf-8")
    return "task: sentence-similarity\ndata: pairs.csv\nsplit: train[:20]\nmetrics: [spearmanr, pearsonr]\n"


def pictures() -> Dataset:
    pixels = np.random.default_rng(0).normal(size=(16, 3, 32, 32)).astype(np.float32)
    return Dataset.from_dict({"pixel_values": pixels, "labels": [0, 1, 2, 0] * 4}).with_format("torch")


# ---------------------------------------------------------------------- teachers


def named(labels: Iterable[str]) -> dict[str, Any]:
    names = dict(enumerate(labels))
    return {"num_labels": len(names), "id2label": names, "label2id": {name: at for at, name in names.items()}}


def tagger() -> PreTrainedModel:
    return BertForTokenClassification(tiny_bert_config(**named(NAMES)))


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCAB), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, initializer_range=0.3, bos_token_id=VOCAB.index("[CLS]"),
        eos_token_id=VOCAB.index("[SEP]"), pad_token_id=VOCAB.index("[PAD]"),
    )  # fmt: skip
    return LlamaForCausalLM(config)


def vit() -> PreTrainedModel:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=32, patch_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        initializer_range=0.3, **named(("film", "book", "music")),
    )  # fmt: skip
    return ViTForImageClassification(config)


STUDENTS = {
    "small-sentiment": Student(
        lambda: tiny_bert_classifier(**named(LABELS)),
        classified,
        task=classifying,
        callback={"alpha": 0.1, "data": "reviews", "data_licence": "apache-2.0"},
        gate=Gate(features=TEXTS, max_drop=1.0, min_agreement=0.0),
    ),
    "small-tagger": Student(tagger, tagged, DataCollatorForTokenClassification, task=tagging, callback={"alpha": 0.1}),
    "small-embedder": Student(lambda: BertModel(tiny_bert_config()), plain, task=comparing),
    "small-writer": Student(
        llama,
        lambda: plain(tiny_plain_tokenizer),
        lambda tokenizer: DataCollatorForLanguageModeling(tokenizer, mlm=False),
        tiny_plain_tokenizer,
    ),
    "small-watcher": Student(
        vit, pictures, None, lambda: ViTImageProcessor(size={"height": 32, "width": 32}), callback={"method": "kd"}
    ),
}
"""By the name of the repository."""


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
