"""Reasoning traces' claim: of equally right sources a student learns most from that of the lowest perplexity."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from string import ascii_lowercase
from typing import Any

import torch
from datasets import Dataset
from hf_compress_plugins.language._verifiers import mathematics
from hf_compress_plugins.language.reasoning_traces import (
    Sampled,
    Scorer,
    Source,
    TracesConfig,
    choose,
    reasoning_traces,
    statistics,
)
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_compress.objective import IGNORED

from . import Claim, _training

QUERIES, HELD_OUT, STEPS, BATCH = 800, 400, 400, 32
TEACHER = {"direct": (600, 64), "steps with filler": (300, 32), "consistent steps": (300, 32)}
"""Optimizer steps and rows of each; the sum alone takes longest to learn, and its rows are short."""


STYLES = tuple(TEACHER)


def by_rule(style: str, a: int, b: int, draw: random.Random) -> str:
    """The sum alone; or ones, tens with the carry and sum, with drawn letters between or always in one form."""
    if style == "direct":
        return f"{a + b}"
    ones = a % 10 + b % 10
    tens = a // 10 + b // 10 + ones // 10
    parts = (f"{a % 10}+{b % 10}={ones}", f"{a // 10}+{b // 10}+{ones // 10}={tens}", f"{a + b}")
    if style == "consistent steps":
        return ",".join(parts)
    words = ["".join(draw.choices(ascii_lowercase, k=draw.randint(3, 12))) for _ in parts]
    return " ".join(f"{word} {part}" for word, part in zip(words, parts, strict=True))


BUDGETS = ("equal examples", "equal tokens")


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    letters = {letter: place for place, letter in enumerate(["<end>", *f"0123456789+=, {ascii_lowercase}"])}
    made = Tokenizer(models.WordLevel(letters, unk_token="<end>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")


@cache
def pairs() -> tuple[tuple[int, int], ...]:
    """All sums of two numbers of two digits, in drawn order: held-out ones first, then the queries, then the others."""
    every = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(0).shuffle(every)
    return tuple(every)


def model(*, width: int, layers: int, seed: int) -> LlamaForCausalLM:
    """An untrained model of characters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer()),
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=layers,
                num_attention_heads=4,
                max_position_embeddings=256,
                pad_token_id=0,
                eos_token_id=0,
                bos_token_id=0,
            )
        )


def encoded(query: str, answer: str) -> dict[str, list[int]]:
    """A query, which has no labels, and its answer with an end."""
    asked, said = (tokenizer()(text)["input_ids"] for text in (query, answer))
    return {"input_ids": [*asked, *said, 0], "labels": [IGNORED] * len(asked) + [*said, 0]}


def collate(batch: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Rows padded on the right."""
    ids, labels = ([torch.tensor(row[name]) for row in batch] for name in ("input_ids", "labels"))
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


def trained(made: LlamaForCausalLM, rows: Sequence[Mapping[str, Any]], *, steps: int, seed: int, batch: int) -> Any:
    """A plain Trainer on rows of `encoded`."""
    return _training.train(made, data=list(rows), data_collator=collate, steps=steps, seed=seed, batch=batch)


def written(names: Sequence[str]) -> list[dict[str, list[int]]]:
    """What the rules write for sums that are neither queries nor held out, in those styles by turns."""
    draw = random.Random(1)
    return [
        encoded(f"{a}+{b}=", by_rule(names[place % len(names)], a, b, draw))
        for place, (a, b) in enumerate(pairs()[HELD_OUT + QUERIES :])
    ]


@cache
def teacher(name: str) -> LlamaForCausalLM:
    """Two layers of width 96 that have learned to answer in one style."""
    count, batch = TEACHER[name]
    return trained(model(width=96, layers=2, seed=7), written([name]), steps=count, seed=7, batch=batch)


@cache
def traces() -> Dataset:
    """Verified answers of the three teachers, with perplexities under one model that has read all three styles."""
    queries = [
        {"query": f"{a}+{b}=", "category": "mathematics", "reference": str(a + b)}
        for a, b in pairs()[HELD_OUT : HELD_OUT + QUERIES]
    ]
    reader = trained(model(width=64, layers=2, seed=8), written(list(STYLES)), steps=300, seed=8, batch=BATCH)
    sources = [
        Source(
            name=name.replace(" ", "-"),
            teacher=Sampled(teacher(name), tokenizer(), max_new_tokens=80, temperature=0.8, top_p=1.0),
            licence="cc0-1.0",
            batch=200,
        )
        for name in STYLES
    ]
    with tempfile.TemporaryDirectory() as folder:
        return reasoning_traces(
            Dataset.from_list(queries),
            sources=sources,
            folder=folder,
            scorer=Scorer(reader, tokenizer(), name="a model of all styles", batch=64),
            config=TracesConfig(thinking=None, most_tries=32),
            progress=False,
        )


@cache
def common() -> frozenset[str]:
    """Queries that all three have answered."""
    by = [{row["query"] for row in traces() if row["source"] == name.replace(" ", "-")} for name in STYLES]
    return frozenset(set.intersection(*by))


def accuracy(student: LlamaForCausalLM) -> float:
    """Held-out sums that the student gets right, greedily."""
    asked = pairs()[:HELD_OUT]
    ids = torch.tensor([tokenizer()(f"{a}+{b}=")["input_ids"] for a, b in asked])
    with torch.no_grad():
        found = student.eval().generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=80, pad_token_id=0
        )
    texts = tokenizer().batch_decode(found[:, ids.shape[1] :], skip_special_tokens=True)
    right = [mathematics(text, {"reference": a + b}) for text, (a, b) in zip(texts, asked, strict=True)]
    return sum(right) / len(right)


def run(variant: str, seed: int) -> Mapping[str, float]:
    """One student from one start, on the answers of one source to the same queries."""
    name, _, budget = variant.partition(", ")
    source = name.replace(" ", "-")
    told = statistics(traces())
    rows = [
        encoded(row["query"], row["answer"]) for row in traces() if row["source"] == source and row["query"] in common()
    ]
    count = STEPS
    if budget == "equal tokens":  # as many as the consistent steps have in their steps
        count = round(STEPS * (told["consistent-steps"].length + 1) / (told[source].length + 1))
    student = trained(model(width=48, layers=2, seed=seed), rows, steps=count, seed=seed, batch=BATCH)
    own = told[source]
    return {
        "accuracy on held-out sums": accuracy(student),
        "optimizer steps": count,
        "score of the answers": own.score,
        "tries a query": own.tries,
        "mean length, characters": own.length,
        "sd of the length": own.spread,
        "mean perplexity": own.perplexity or 0.0,
        "chosen by perplexity": float(choose(traces()) == source),
        "queries": len(rows),
    }


CLAIM = Claim(
    published="Students of Qwen2.5-32B on AIME2024: 84.3 from AM-Thinking-v1's answers, the most of three sources that "
    "were verified alike; it has the lowest mean perplexity and the largest spread of lengths.",
    check="Sums of two numbers of two digits, by characters. Three teachers, each a model of 2 layers of width 96 "
    "trained for 600, 300 and 300 steps on rows that a rule wrote in one style: the sum alone; ones, tens and sum with "
    f"drawn letters between; the same in one form. Each answers {QUERIES} other queries, sampled at 0.8, until it is "
    "verified, up to 32 times. Perplexity under one model that has read all three styles. Student: 2 layers of width "
    f"48 from random weights on the queries that all three have answered: {STEPS} steps of {BATCH} rows, or as many "
    f"characters of answers as the consistent steps have in that time. {HELD_OUT} held-out sums.",
    expected="A score of 1 for all sources; the most right with the consistent steps, and ranks of accuracy that "
    "follow perplexity more than length. It fails if all three give the same accuracy.",
    variants=tuple(f"{name}, {budget}" for budget in BUDGETS for name in STYLES),
    run=run,
)
