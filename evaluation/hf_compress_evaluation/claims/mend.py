"""MEND's claim: a few vectors made of demonstrations tell a frozen language model what the demonstrations tell it."""

from __future__ import annotations

import ast
import copy
import os
import random
import string
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from hf_compress_plugins.encoders.mend import answer_scores, episodes, mend
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hf_compress import DistillCallback, shrink

from . import Claim, _training

LETTERS = "\n" + string.ascii_lowercase + string.digits + "_"
"""Id 0 is padding."""
HELD_OUT, TASKS, TESTED, ROWS, WORD = 24, 2000, 24, 6, 4
"""Modules that nothing is trained on; tasks of training and of the test; rows of a task; letters
of its word."""
SHOWN, VECTORS = 4, 8
LLM_STEPS, STEPS, BATCH = 800, 150, 16
DEMONSTRATIONS = ("demonstration_ids", "demonstration_mask")
STAGES: Mapping[str, tuple[int, int]] = {
    "random vectors": (0, 0),
    "stage 1 alone": (STEPS, 0),
    "stage 2 alone": (0, STEPS),
    "stage 2 alone, twice as long": (0, 2 * STEPS),
    "both stages": (STEPS, STEPS),
}
"""Steps of each stage."""


class Characters:
    """A tokenizer of characters, as far as `episodes` asks for one."""

    pad_token_id, eos_token_id = 0, None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [LETTERS.index(letter) + 1 for letter in text]}


@cache
def modules() -> list[tuple[str, list[str]]]:
    """Modules of the standard library with their public functions and classes, in one shuffled order."""
    found = []
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = {node.name.lower() for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        public = sorted(name for name in named if name[0] != "_" and len(name) <= 16)
        if path.stem[0] != "_" and len(path.stem) <= 10 and len(public) >= ROWS:
            found.append((path.stem, public))
    random.Random(0).shuffle(found)
    return found


@cache
def tasks(held_out: bool = False) -> Dataset:
    """Rows of task, input and output: functions of a module, all with one word of random letters.

    Which word it is nothing tells but other rows of the task.
    """
    draw = random.Random(1)
    pool = modules()[:HELD_OUT] if held_out else modules()[HELD_OUT:]
    rows = []
    for task in range(TESTED if held_out else TASKS):
        _, names = draw.choice(pool)
        word = "".join(draw.choices(string.ascii_lowercase, k=WORD))
        rows += [{"task": task, "input": name, "output": word} for name in draw.sample(names, ROWS)]
    return Dataset.from_list(rows)


@cache
def prepared(kind: str) -> Dataset:
    """Episodes of training and of the test; "text": all but the labels, as a stream of pairs that is cut at 80 %."""
    settings: dict[str, Any] = {"tokenizer": Characters(), "max_length": 192, "demonstration_length": 150}
    if kind == "text":
        whole = episodes(tasks(), demonstrations=SHOWN, seed=1, **settings)
        pairs = zip(whole["teacher_input_ids"], whole["teacher_attention_mask"], strict=True)
        texts = ["".join(LETTERS[token - 1] for token, kept in zip(*both, strict=True) if kept) for both in pairs]
        return episodes(Dataset.from_dict({"text": texts}), **settings)
    return episodes(tasks(kind == "test"), demonstrations=SHOWN, **settings)


def collate(batch: list[Mapping[str, Any]]) -> dict[str, Tensor]:
    return {name: torch.tensor([row[name] for row in batch]) for name in batch[0]}


@cache
def language_model() -> LlamaForCausalLM:
    """Four layers of width 128, trained on episodes as plain text."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(LETTERS) + 1, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
                num_attention_heads=4, max_position_embeddings=256, pad_token_id=0, eos_token_id=None,
                bos_token_id=None,
            )
        )  # fmt: skip

    def plain(batch: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        columns = collate(batch)
        ids, mask = columns["teacher_input_ids"], columns["teacher_attention_mask"]
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    data = prepared("tasks")
    found: LlamaForCausalLM = _training.train(
        model, data=data, data_collator=plain, steps=LLM_STEPS, seed=0, batch=BATCH, remove_unused_columns=False
    )
    return found.eval()


def figures(logits: Any, *, other: bool = False) -> dict[str, float]:
    """Of a function from columns to the logits of query and answer.

    The likelihood of the right answer, and how often it is likelier than those of the three next tasks; with the
    demonstrations of the next task where `other`.
    """
    data, nats, right = tasks(held_out=True), 0.0, 0
    with torch.no_grad():
        rows = collate(list(prepared("test")))
        for place in range(len(data)):
            answers = [data[(place + ROWS * further) % len(data)]["output"] for further in range(4)]
            one = {name: value[place : place + 1].repeat(len(answers), 1) for name, value in rows.items()}
            if other:
                shown = (place + ROWS) % len(data)
                one |= {name: rows[name][shown : shown + 1].repeat(len(answers), 1) for name in DEMONSTRATIONS}
            scores = answer_scores(*with_answers(one, answers, logits))
            nats -= float(scores[0])
            right += int(scores.argmax()) == 0
    of = ", another task's demonstrations" if other else ""
    return {
        f"nats per character of the answer{of}": nats / len(data),
        f"right of four, %{of}": 100 * right / len(data),
    }


def with_answers(one: Mapping[str, Tensor], answers: list[str], logits: Any) -> tuple[Tensor, Tensor]:
    """Logits and labels of one query with each of the answers."""
    query = [int(t) for t, m, label in zip(*(one[n][0] for n in ("input_ids", "attention_mask", "labels")), strict=True)
             if m and label == -100]  # fmt: skip
    found = [Characters()(answer)["input_ids"] for answer in answers]
    width = len(query) + max(map(len, found))
    ids = torch.tensor([(query + answer + [0] * width)[:width] for answer in found])
    labels = torch.tensor([([-100] * len(query) + answer + [-100] * width)[:width] for answer in found])
    return logits(one, ids, (ids != 0).long()), labels


def run(variant: str, seed: int) -> Mapping[str, float]:
    """One distiller from one start, or the language model alone."""
    llm = language_model()
    if variant == "no demonstrations":
        return figures(lambda _, ids, mask: llm(input_ids=ids, attention_mask=mask).logits)
    if variant == "all demonstrations":

        def whole(one: Mapping[str, Tensor], ids: Tensor, mask: Tensor) -> Tensor:
            count = int(one["demonstration_mask"][0].sum())
            shown = one["demonstration_ids"][:, :count]
            joined = torch.cat([torch.ones_like(shown), mask], 1)
            found: Tensor = llm(input_ids=torch.cat([shown, ids], 1), attention_mask=joined).logits[:, count:]
            return found

        return figures(whole)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student = mend(llm, config={"distiller": shrink(llm, layers=2), "num_virtual_tokens": VECTORS})
        if variant == "random vectors":
            vectors = llm.model.embed_tokens.weight.std() * torch.randn(1, VECTORS, 128)
            return figures(lambda _, ids, mask: student(ids, attention_mask=mask, virtual_tokens=vectors).logits)
    for kind, steps in zip(("text", "tasks"), STAGES[variant], strict=True):
        if steps:
            _training.train(
                student, data=prepared(kind), data_collator=collate, steps=steps, seed=seed, batch=BATCH,
                learning_rate=1e-3, callbacks=[DistillCallback(copy.deepcopy(llm), "mend")],
                remove_unused_columns=False,
            )  # fmt: skip
    student.eval()

    def distilled(one: Mapping[str, Tensor], ids: Tensor, mask: Tensor) -> Tensor:
        found: Tensor = student(ids, attention_mask=mask, **{name: one[name] for name in DEMONSTRATIONS}).logits
        return found

    return figures(distilled) | figures(distilled, other=True)


CLAIM = Claim(
    published="Matches and often exceeds in-context learning with all demonstrations at much lower cost of inference.",
    check=f"A language model of characters, four layers of width 128, {LLM_STEPS} steps on lists of the standard "
    f"library's functions. In a task all functions are of one module and have one word of {WORD} random letters, "
    f"so that nothing but demonstrations tells it; {SHOWN} are shown, {VECTORS} vectors stand for them, made by its "
    f"first and last layers; {STEPS} steps a stage. Tested on {TESTED} tasks of {HELD_OUT} modules that nothing was "
    "trained on, each word against those of three other tasks. Stage 1 reads such lists, unlabelled, as text.",
    expected="No demonstrations below MEND, MEND below or like all demonstrations and above random vectors, and both "
    "stages above stage 2 alone; another task's demonstrations make its word the likelier one.",
    variants=("no demonstrations", "all demonstrations", *STAGES),
    run=run,
)
