"""DDK's claim: more data for the domains where the student is behind lets it keep up in all of them."""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from datasets import Dataset
from hf_compress_plugins.general.gkd import GKD
from hf_compress_plugins.language.ddk import DDK, DDKConfig, domains
from transformers import LlamaForCausalLM

from hf_compress import DistillCallback

from . import Claim
from . import _characters as characters

STEPS, BATCH, K, HELD_OUT = 600, 24, 50, 60
LETTERS = 300_000
"""Characters of a domain at most."""


@cache
def texts() -> dict[str, str]:
    """Four kinds of text that a Python on Debian has at hand."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found = {
        "help": characters.text(),
        "python": "".join(path.read_text(errors="ignore") for path in sorted(library.glob("[a-e]*.py"))),
        "licences": _folder("/usr/share/common-licenses", "*"),
        "zones": _folder("/usr/share/zoneinfo", "*.tab"),
    }
    return {name: text[:LETTERS] for name, text in found.items() if len(text) > 10_000}


def _folder(folder: str, pattern: str) -> str:
    paths = [path for path in sorted(Path(folder).glob(pattern)) if path.is_file() and not path.is_symlink()]
    return "".join(path.read_text(errors="ignore") for path in paths)


@cache
def parts() -> tuple[Dataset, Dataset]:
    """Rows with their domain, and others held out; letters that the help does not have are dropped."""
    known, rows = characters.alphabet(), {True: list[dict[str, object]](), False: list[dict[str, object]]()}
    for name, text in texts().items():
        ids = [known[letter] for letter in text if letter in known]
        cut = [ids[at : at + characters.LENGTH] for at in range(0, len(ids) - characters.LENGTH + 1, characters.LENGTH)]
        for place, row in enumerate(cut):
            rows[place < HELD_OUT].append({"input_ids": row, "labels": row, "domain": name})
    return Dataset.from_list(rows[False]), Dataset.from_list(rows[True])


@cache
def teacher() -> LlamaForCausalLM:
    """Trained on all domains alike."""
    data = parts()[0].remove_columns("domain")
    return characters.train(characters.model(width=96, layers=3, seed=0), steps=1200, seed=0, data=data)


def run(variant: str, seed: int) -> Mapping[str, float]:
    """One student with one budget of rows."""
    train, held_out = parts()
    student, target = characters.model(width=24, layers=1, seed=seed), teacher()
    config = DDKConfig(K=K, alpha=1.0 if variant == "ddk, not smoothed" else 0.5)
    history = None
    if variant == "uniform":
        names = sorted(set(train["domain"][:]))
        by_name = [train.filter(lambda row, name=name: row["domain"] == name) for name in names]
        least = STEPS * BATCH // len(names)
        rows = [part.select([i % len(part) for i in range(least)]) for part in by_name]
        data = [row for group in zip(*rows, strict=True) for row in group]
        callback = DistillCallback(target, GKD(beta=0.0, weight=config.gamma), task_weight=1.0)
        characters.train(student, steps=STEPS, seed=seed, callbacks=[callback], data=data)
    else:
        mixture = domains(train, held_out=held_out, batch=BATCH, steps=STEPS, config=config, seed=seed)
        callback = DistillCallback(target, DDK(config))
        characters.train(student, steps=STEPS, seed=seed, callbacks=[callback], data=mixture, sampling="sequential")
        history = mixture.history
    ratios = []
    for name in sorted(set(held_out["domain"][:])):
        rows = list(held_out.filter(lambda row, name=name: row["domain"] == name).remove_columns("domain"))
        own, theirs = (
            characters.compare(model, target, rows)["NLL, nats per character"] for model in (student, target)
        )
        ratios.append(torch.tensor(own - theirs).exp())
    found = torch.stack(ratios)
    figures = {
        "worst ratio of perplexities": float(found.max()),
        "spread of ratios": float(found.max() - found.min()),
        "mean ratio": float(found.mean()),
    }
    if history is not None:
        figures["mean change of weights (L1)"] = float((history[2:] - history[1:-1]).abs().sum(1).mean())
    return figures


CLAIM = Claim(
    published="Qwen1.5-1.8B from 14B, mean of 11 benchmarks: 52.87 with plain distillation, 55.41 with DDK; weights "
    "without smoothing cost 0.9 of a point.",
    check="Characters of four kinds of text (Python's help, its library, licences, time zones). Target: 3 layers of "
    f"width 96, 1,200 steps. Student: 1 layer of width 24, {STEPS} steps of {BATCH} rows of 64 characters, K = {K}.",
    expected="A lower worst ratio and a smaller spread than with uniform sampling; smoother weights than without "
    "smoothing.",
    variants=("uniform", "ddk", "ddk, not smoothed"),
    run=run,
)
