"""Methods on a real encoder and real data, side by side: MiniLM of six layers into half of them, and a third.

| table | task | student | how |
|---|---|---|---|
| sentiment | human ratings, two classes | 3 layers | every method that teaches a classifier |
| two-layers | the same | 2 layers | some of them |
| sarcasm | headlines, two classes | 3 layers | the same |
| entities | people, organisations, places in contracts | 3 layers | the same |
| pages | the same, sentences joined to 512 tokens | 3 layers, a Longformer | kd, efficient_attention |
| embeddings | texts without labels | 3 layers | what teaches hidden states |

Each table is a sweep (`hf-compress sweep`) or the same protocol by hand: three learning rates with the first seed, the
one that is best on the choice part with the others, figures on the test part. Nothing that is done is done again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_compress import entries, files, ship, sweeping
from hf_compress.errors import ConfigurationError, UnknownNameError
from hf_compress.recipe import Recipe
from hf_compress_evaluation.demo.data import LABELS, LICENCE, Rows, load_sentiment
from hf_compress_evaluation.demo.recipe import packaged
from hf_compress_evaluation.examples import read_rows

from . import _models, _sizes
from ._page import markdown

__all__ = ["RESULTS", "TABLES", "keep", "make", "markdown"]

RESULTS = Path("evaluation/results/encoders")
"""Where tables are kept, seen from the checkout."""
RATES = (1e-4, 2e-4, 4e-4)
SEEDS = 3
METHODS = (
    "kd",
    "taid",
    "sinkd",
    "pld",
    "features",
    "kd+features",
    "minilm",
    "kd+minilm",
    "ernie_tiny",
    "kd+ernie_tiny",
    "mi_alpha",
    "kd+mi_alpha",
    "multi_exit",
)
"""Those that apply to a classifier: alone, and where they leave the logits out also beside kd."""
BEST = ("kd", "taid", "pld", "mi_alpha")
"""Beside kd the three of them that did best on the choice rows of sentiment with the first seed."""
TABLES = {
    "sentiment": METHODS,
    "two-layers": BEST,
    "sarcasm": BEST,
    "entities": ("kd", "taid", "pld", "kd+features"),  # mi_alpha compares whole rows
    "pages": ("kd", "efficient_attention"),
    "embeddings": ("features", "minilm", "features+minilm"),
}
"""What each table compares by default."""
SIZES = "sizes"
"""Parameters, bytes and latency of the models that the methods train."""
LAYERS = {"sentiment": 3, "sarcasm": 3, "two-layers": 2}
COUNTS = {"choice": 1000, "test": 3000, "train": 2000}
Tell = Callable[[str], None]


def make(
    name: str,
    output: Path,
    *,
    methods: Sequence[str] | None = None,
    headlines: Path | None = None,
    tell: Tell = print,
    progress: bool = False,
) -> dict[str, Any]:
    """Runs what is missing of a table; returns what is kept of it.

    Args:
        name: of `TABLES`, or "sizes".
        output: folder of all tables; each teacher is trained once.
        methods: as `hf-compress sweep` takes them; None: those of the table.
        headlines: for sarcasm, a csv file with columns text and label.
        tell: gets a line for each run.
        progress: show bars.

    Raises:
        UnknownNameError: for another table.
        ConfigurationError: if the package with the encoder or the file of headlines is missing.
    """
    if name == SIZES:
        return _sizes.measure(output / name, tell)
    if name not in TABLES:
        raise UnknownNameError("table", name, (*TABLES, SIZES))
    methods = methods or TABLES[name]
    if name in LAYERS:
        return _classify(name, output, methods, headlines, tell, progress)
    if name == "embeddings":
        return _models.embeddings(output / name, methods, RATES, range(SEEDS), tell, progress)
    return _models.entities(name, output / name, methods, RATES, range(SEEDS), tell, progress)


def _classify(
    name: str, output: Path, methods: Sequence[str], headlines: Path | None, tell: Tell, progress: bool
) -> dict[str, Any]:
    data = "sarcasm" if name == "sarcasm" else "sentiment"
    recipe = _recipe(data, output, headlines)
    teacher = ship.Work(recipe, tell, progress)
    teacher.output.mkdir(parents=True, exist_ok=True)
    teacher.prepare_teacher()
    own = recipe.model_copy(
        update={
            "teacher": teacher.teacher,
            "teacher_training": None,
            "student": recipe.student.model_copy(update={"layers": LAYERS[name]}),
        }
    )
    swept = sweeping.run(
        own,
        entries.read(",".join(methods)),
        seeds=SEEDS,
        learning_rates=RATES,
        choose_once=True,
        cache=True,
        output=output / name,
        command=f"python -m hf_compress_evaluation.encoders {name}",
        tell=tell,
        progress=progress,
    )
    return swept.found


def keep(name: str, found: dict[str, Any], results: Path = RESULTS) -> None:
    """Writes a table to where the README is made from."""
    results.mkdir(parents=True, exist_ok=True)
    files.write_text(results / f"{name}.json", json.dumps(found, indent=1, allow_nan=False) + "\n")


def _recipe(data: str, output: Path, headlines: Path | None) -> Recipe:
    """The teacher's training and the rows, which lie below `output` as a user's would."""
    folder = output / "teachers" / data
    parts = _sentiment() if data == "sentiment" else _headlines(headlines)
    for part, rows in parts.items():
        path = folder / f"{part}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    labels = LABELS if data == "sentiment" else ("plain", "sarcastic")
    return Recipe.model_validate(
        {
            "task": "text-classification",
            "teacher": str(packaged()),
            "teacher_training": {"learning_rate": 1e-4, "epochs": 3.0},
            "data": {
                **{part: str(folder / f"{part}.jsonl") for part in parts},
                "labels": labels,
                "max_length": 64,
                "name": {"sentiment": "human sentiment ratings", "sarcasm": "headlines"}[data],
                "licence": LICENCE,
            },
            "student": {"layers": 3},
            "output": str(folder / "run"),
            "training": {"learning_rate": RATES[0], "epochs": 2.0},
        }
    )


def _sentiment() -> dict[str, list[dict[str, Any]]]:
    made = load_sentiment(Rows(choice=COUNTS["choice"], test=COUNTS["test"], labelled=COUNTS["train"], unlabelled=0))
    rows = {"choice": made.choice.rows, "test": made.test.rows, "train": made.labelled.rows}
    return {part: [{"text": row["text"], "label": LABELS[row["label"]]} for row in rows[part]] for part in rows}


def _headlines(path: Path | None) -> dict[str, list[dict[str, Any]]]:
    if path is None:
        raise ConfigurationError(
            "the headlines are missing: --headlines FILE, a csv with columns text and label (1 sarcastic, 0 not), as "
            "the package evals 3.0.1 has them in registry/data/sarcasm."
        )
    rows = read_rows(path).shuffle(seed=0)
    names = ("plain", "sarcastic")
    parts, start = {}, 0
    for part, count in COUNTS.items():
        taken = rows.select(range(start, start + count))
        parts[part] = [{"text": row["text"], "label": names[int(row["label"])]} for row in taken]
        start += count
    return parts
