"""MEND's claim: a few vectors made of demonstrations tell a frozen language model what the demonstrations tell it."""

from __future__ import annotations

import ast
import copy
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from hf_compress_plugins.encoders.mend import answer_scores, candidates, episodes, mend
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, default_data_collator

from hf_compress import DistillCallback, shrink

from . import Claim, _training
from . import _characters as characters

WORDS, HELD_OUT, TASKS, TESTED, QUERIES = 1000, 24, 6000, 48, 2
"""Words of tasks; modules that MEND is not trained on; tasks of its training and of the test; queries of one of the
test."""
SHOWN, VECTORS, ANSWERS = 4, 4, 4
"""Demonstrations, what stands for them, and how many words the answer is chosen from."""
LLM_STEPS, LLM_TASKS, STEPS, BATCH, RATE = 2000, 13_000, 500, 32, 1e-3
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


class Words:
    """A tokenizer of names, words and line breaks, as far as `episodes` asks for one."""

    pad_token_id, eos_token_id = 0, None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [vocabulary()[token] for token in re.findall(r"\n|[^\n]+", text)]}

    def text(self, ids: list[int]) -> str:
        names = list(vocabulary())
        return "".join(names[token] for token in ids)


@cache
def vocabulary() -> dict[str, int]:
    """Ids by token; 0 is padding."""
    tokens = ["", "\n", *words(), *(name for names in modules() for name in names)]
    return {token: place for place, token in enumerate(dict.fromkeys(tokens))}


@cache
def modules() -> list[list[str]]:
    """Public functions and classes of each module of the standard library, modules in one shuffled order."""
    found = []
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        public = sorted(name for name in named if name[0] != "_")
        if path.stem[0] != "_" and len(public) > SHOWN + QUERIES:
            found.append(public)
    random.Random(0).shuffle(found)
    return found


@cache
def words() -> list[str]:
    """The most frequent words of Python's help, in one shuffled order."""
    counts = Counter(re.findall(r"[a-z]{3,}", characters.text()))
    found = sorted(counts, key=lambda word: (-counts[word], word))[:WORDS]
    random.Random(0).shuffle(found)
    return found


def tasks(count: int, seed: int, *, all_of_them: bool = False) -> Dataset:
    """Rows of task, input and output: functions of a module, all with one word.

    Which word it is nothing tells but other rows of the task. Modules and words of the test are left out, unless
    `all_of_them`.
    """
    draw, rows = random.Random(seed), []
    own, outputs = (modules(), words()) if all_of_them else (modules()[HELD_OUT:], words()[TESTED:])
    for task in range(count):
        names = draw.sample(draw.choice(own), SHOWN + 1)
        word = draw.choice(outputs)
        rows += [{"task": task, "input": name, "output": word} for name in names]
    return Dataset.from_list(rows)


@cache
def tested() -> list[Query]:
    """Of modules and of words that MEND is not trained on."""
    draw, drawn = random.Random(2), []
    for task in range(TESTED):
        names = draw.sample(draw.choice(modules()[:HELD_OUT]), SHOWN + QUERIES)
        answers = [words()[(task + further) % TESTED] for further in range(ANSWERS)]
        drawn.append(([(name, answers[0]) for name in names[:SHOWN]], names[SHOWN:], answers))
    return [
        Query(shown=shown, other=drawn[(place + 1) % TESTED][0], given=name, answers=answers)
        for place, (shown, names, answers) in enumerate(drawn)
        for name in names
    ]


@cache
def prepared(kind: str) -> Dataset:
    """Episodes of the tasks; "text": the same as plain text without labels, which is cut at 80 %; "llm": of all."""
    settings: dict[str, Any] = {"tokenizer": Words(), "max_length": 64, "demonstration_length": 48}
    if kind == "llm":
        return episodes(tasks(LLM_TASKS, 3, all_of_them=True), demonstrations=SHOWN, **settings)
    whole = episodes(tasks(TASKS, 1), demonstrations=SHOWN, **settings)
    if kind == "tasks":
        return whole
    pairs = zip(whole["teacher_input_ids"], whole["teacher_attention_mask"], strict=True)
    texts = [Words().text(ids[: sum(mask)]) for ids, mask in pairs]
    return episodes(Dataset.from_dict({"text": texts}), **settings)


@cache
def language_model() -> LlamaForCausalLM:
    """Four layers of width 128, trained on episodes of all modules and words as plain text."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(vocabulary()), hidden_size=128, intermediate_size=256, num_hidden_layers=4,
                num_attention_heads=4, max_position_embeddings=128, pad_token_id=0, eos_token_id=None,
                bos_token_id=None,
            )
        )  # fmt: skip

    def plain(batch: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        columns = default_data_collator(batch)
        ids, mask = columns["teacher_input_ids"], columns["teacher_attention_mask"]
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    found: LlamaForCausalLM = _training.train(
        model, data=prepared("llm"), data_collator=plain, steps=LLM_STEPS, seed=0, batch=BATCH, learning_rate=RATE,
        remove_unused_columns=False,
    )  # fmt: skip
    return found.eval()


def figures(reader: Reader, *, other: bool = False) -> dict[str, float]:
    """The likelihood of the right answer, and how often it is the likeliest of four.

    With the demonstrations of the next task where `other`.
    """
    nats, right = 0.0, 0
    for query in tested():
        shown = query.other if other else query.shown
        one = candidates(shown, query.given, query.answers, tokenizer=Words())
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
    llm = language_model()
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
    check=f"A language model of four layers of width 128, {LLM_STEPS} steps of {BATCH} on lists of the standard "
    f"library's functions. In a task all functions are of one module and have one of {WORDS} words of Python's help, "
    f"so that nothing but demonstrations tells it; {SHOWN} are shown, and {VECTORS} vectors stand for them, made by "
    f"its first and last layers; {STEPS} steps of {BATCH} a stage. Tested on {TESTED} tasks of {HELD_OUT} modules and "
    f"of words that MEND is not trained on, each word against {ANSWERS - 1} others. Stage 1 reads such lists, "
    "unlabelled, as text.",
    expected="No demonstrations below MEND, MEND below or like all demonstrations and above random vectors, and both "
    "stages above stage 2 alone; another task's demonstrations make its own word no likelier than chance.",
    variants=("no demonstrations", "all demonstrations", *STAGES),
    run=run,
)
