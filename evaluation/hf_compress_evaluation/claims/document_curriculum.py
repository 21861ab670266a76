"""Document curriculum's claim: a small model learns a text teacher's answers about pages, from easy to hard."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from hf_compress_plugins.encoders.document_curriculum import (
    Curriculum,
    CurriculumConfig,
    Layout,
    add_layout_marks,
    anls,
    decode_layout,
    document_curriculum,
    student_text,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import DataCollatorForSeq2Seq, T5Config, T5ForConditionalGeneration, T5Tokenizer

from hf_compress.errors import ConfigurationError

from . import Claim, _training

STATUS = Path("/var/lib/dpkg/status")
FIELDS = (
    "Package", "Source", "Version", "Section", "Priority", "Installed-Size", "Depends", "Recommends", "Suggests",
    "Breaks", "Replaces", "Provides",
)  # fmt: skip
CHARACTER, LINE = 8.0, 16.0
"""Width and height of a page's characters."""
TEACHER_STANZAS, TEST_STANZAS = 300, 150
PAGES = {"teacher": 12, "student": 6, "test": 2}
"""Of each stanza."""
TEACHER_STEPS, STEPS, BATCH, RATE = 800, 500, 32, 3e-3


@cache
def stanzas() -> tuple[dict[str, str], ...]:
    """Fields of the installed Debian packages, values of at most 16 characters; of lists the first name."""
    if not STATUS.exists():
        raise ConfigurationError(f"document_curriculum: the claim reads {STATUS} of a Debian system, which is missing.")
    found = []
    for block in STATUS.read_text(encoding="utf-8").split("\n\n"):
        pairs = (line.partition(": ") for line in block.splitlines() if line[:1].strip())
        values = {name: value.split(",")[0].split("(")[0].split("|")[0].strip() for name, _, value in pairs}
        kept = {name: values[name] for name in FIELDS if 0 < len(values.get(name, "")) <= 16}
        if len(kept) >= 6:
            found.append(kept)
    random.Random(0).shuffle(found)
    return tuple(found)


def page(fields: Mapping[str, str], draw: random.Random) -> dict[str, Any]:
    """A page of four to eight fields, names in the left column and values in the right one, and a question for a value.

    Its words come in drawn order, as of a reader that does not know columns.
    """
    names = draw.sample(sorted(fields), draw.randint(4, min(len(fields), 8)))
    left = draw.randint(0, 2) * CHARACTER
    right = left + (max(map(len, names)) + draw.randint(2, 6)) * CHARACTER
    words = []
    for number, name in enumerate(names):
        for text, start in ((name, left), (fields[name], right)):
            top = number * 1.5 * LINE + draw.uniform(-2, 2)
            words.append((text, [start, top, start + len(text) * CHARACTER, top + LINE]))
    draw.shuffle(words)
    asked = draw.choice(names)
    return {
        "words": [text for text, _ in words],
        "boxes": [box for _, box in words],
        "question": asked,
        "answers": [fields[asked]],
    }


@cache
def pages(part: str) -> Dataset:
    """Pages of stanzas that no other part has."""
    ends = {"teacher": (0, TEACHER_STANZAS), "test": (TEACHER_STANZAS, TEACHER_STANZAS + TEST_STANZAS)}
    start, end = ends.get(part, (TEACHER_STANZAS + TEST_STANZAS, len(stanzas())))
    draw = random.Random(part)
    return Dataset.from_list([page(one, draw) for one in stanzas()[start:end] for _ in range(PAGES[part])])


@cache
def tokenizer() -> T5Tokenizer:
    """T5's, with pieces of the words that are trained on, and the layout's marks."""
    words = [word for part in ("teacher", "student") for row in pages(part) for word in row["words"]]
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    special = ["<pad>", "</s>", "<unk>"]
    made.train_from_iterator(
        words, trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    found = T5Tokenizer(vocab=[tuple(one) for one in json.loads(made.to_str())["model"]["vocab"]], extra_ids=0)
    add_layout_marks(found)
    return found


def model(*, width: int, layers: int, seed: int) -> T5ForConditionalGeneration:
    """An untrained T5."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=len(tokenizer()),
                d_model=width,
                d_kv=width // 4,
                d_ff=2 * width,
                num_layers=layers,
                num_heads=4,
                dropout_rate=0.0,
                decoder_start_token_id=0,
            )
        )


def trained(made: T5ForConditionalGeneration, rows: Dataset, *, steps: int, seed: int, difficulty: str | None) -> Any:
    """In a plain Trainer, from easy to hard, or drawn evenly from all rows (None)."""
    config = CurriculumConfig(T_c=steps // 2, refresh=steps // 10, c0=0.1 if difficulty else 1.0)
    data = Curriculum(rows, batch=BATCH, steps=steps, config=config, difficulty=difficulty or "input_tokens", seed=seed)
    return _training.train(
        made,
        data=data,
        data_collator=DataCollatorForSeq2Seq(tokenizer(), made),
        steps=steps,
        seed=seed,
        batch=BATCH,
        learning_rate=RATE,
        callbacks=[data.callback()],
        train_sampling_strategy="sequential",
    )


def answers(made: T5ForConditionalGeneration, texts: Sequence[str]) -> list[str]:
    """Greedy ones to texts as the tokenizer is given them."""
    found: list[str] = []
    with torch.no_grad():
        for start in range(0, len(texts), 100):
            inputs = tokenizer()(list(texts[start : start + 100]), padding=True, return_tensors="pt")
            ids = made.eval().generate(**inputs, do_sample=False, max_new_tokens=20)
            found += tokenizer().batch_decode(ids, skip_special_tokens=True)
    return [decode_layout(one) for one in found]


@cache
def teacher() -> T5ForConditionalGeneration:
    """Three and three layers of width 96 that have learned the true values on pages of their own."""
    true = [row["answers"][0] for row in pages("teacher")]
    rows = document_curriculum(pages("teacher"), teacher=lambda _: true, tokenizer=tokenizer(), parse=str.strip)
    return trained(model(width=96, layers=3, seed=7), rows, steps=TEACHER_STEPS, seed=7, difficulty=None)


@cache
def labels() -> tuple[str, ...]:
    """What the teacher answers to the student's pages, which it reads in their layout."""
    return tuple(answers(teacher(), texts("student", "spatial")))


def texts(part: str, layout: Layout) -> list[str]:
    """What a tokenizer is given of the pages of a part."""
    return [
        student_text(row["words"], row["boxes"], row["question"], tokenizer=tokenizer(), layout=layout)
        for row in pages(part)
    ]


def labelled(layout: Layout) -> Dataset:
    """The student's pages with the teacher's answers."""
    return document_curriculum(
        pages("student"), teacher=lambda _: list(labels()), tokenizer=tokenizer(), layout=layout, parse=str.strip
    )


def mean_anls(said: Sequence[str], gold: Sequence[Sequence[str]]) -> float:
    """ANLS, 0 … 1."""
    return sum(map(anls, said, gold)) / len(said)


def run(variant: str, seed: int) -> Mapping[str, float]:
    """One student, and its answers against the true values and against the teacher's."""
    theirs, test = answers(teacher(), texts("test", "spatial")), pages("test")
    said = theirs
    if variant != "teacher":
        layout, difficulty = VARIANTS[variant]
        student = trained(
            model(width=64, layers=2, seed=seed), labelled(layout), steps=STEPS, seed=seed, difficulty=difficulty
        )
        said = answers(student, texts("test", layout))
    return {
        "ANLS": mean_anls(said, test["answers"][:]),
        "exact": sum(one in gold for one, gold in zip(said, test["answers"][:], strict=True)) / len(said),
        "ANLS to the teacher's answers": mean_anls(said, [[one] for one in theirs]),
        "ANLS of the teacher's labels": mean_anls(labels(), pages("student")["answers"][:]),
    }


VARIANTS: dict[str, tuple[Layout, str | None]] = {
    "spatial text, random order": ("spatial", None),
    "spatial text, fewest input tokens first": ("spatial", "input_tokens"),
    "spatial text, least disagreement first": ("spatial", "disagreement"),
    "spatial text, lowest student loss first": ("spatial", "student_loss"),
    "one line, random order": ("reading", None),
}
CLAIM = Claim(
    published="[second-hand] FLAN-T5 Large reaches 75 to 80 % of ChatGPT 3.5's score on questions about documents, "
    "learning its answers in a curriculum; the model of 77 M parameters stays competitive.",
    check="Pages of four to eight fields of Debian packages (dpkg's status list), names in a left column and values in "
    "a right one, their words in drawn order as of a reader that knows no columns; the question names a field. Text "
    f"teacher: a T5 of 3 + 3 layers of width 96, {TEACHER_STEPS} steps on pages of {TEACHER_STANZAS} packages of its "
    "own with true values; it answers from spatial text. Student: 2 + 2 layers of width 64 from random weights, "
    f"{STEPS} steps of {BATCH}, on the teacher's answers alone; the tokenizer is T5's, with the layout's marks. The "
    f"one line has a page's words in drawn order. T_c is half of the steps, c0 0.1. Pages of {TEST_STANZAS} other "
    "packages are tested; which packages there are depends on the machine.",
    expected="ANLS is higher with spatial text than with one line, which has lost which value is whose. A curriculum "
    "may be no better than the random order.",
    variants=(*VARIANTS, "teacher"),
    run=run,
)
