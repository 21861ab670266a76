"""AutoDistiller: what finished runs on other data tell of a way of distilling.

He et al.: Distiller, SustaiNLP 2021, arXiv:2109.11105, section 4. `mi_alpha.auto_distiller` says what is ours in it.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.feature_extraction import DictVectorizer

from hf_compress import files
from hf_compress.errors import ConfigurationError, ForeignFileError

Run = Mapping[str, Any]
"""A finished run, by column of the authors' table."""
FIELDS = {
    "loss": "intermediate_loss_type",
    "alpha": "alpha",
    "layers": "intermediate_strategy",
    "logits": "kd_loss_type",
}
"""The table's columns that are settings of `MIAlpha`."""
PLAIN = {"mixup": "FALSE", "repeated_aug": 1, "aug_p": 0.3, "contextual": 0, "backtranslation": 0, "random": 0}
"""Its columns of mixup and augmented data, as they are without."""
MODELS = ("Model", "Teacher")
SIZE = "#example"
"""Its column of how many examples the task has."""


def read_runs(path: Path | str) -> list[Run]:
    """Finished runs from a CSV file with a line of names, as the authors' auto_distiller_tabular_data.csv.

    Raises:
        ForeignFileError: if a column is missing or a ratio is no number.
    """
    rows = list(csv.DictReader(io.StringIO(files.read_text(Path(path)))))
    needed = {*FIELDS.values(), "task", "ratio"}
    if not rows or (missing := sorted(needed - rows[0].keys())):
        problem = f"has no {'rows' if not rows else f'columns {missing}'}."
        raise ForeignFileError(path, problem, f"A table of runs has the columns {sorted(needed)}.")
    for place, row in enumerate(rows, 2):
        if not _number(row["ratio"]):
            raise ForeignFileError(path, f"line {place}: the ratio {row['ratio']!r} is no number.", "Leave it out.")
    return list(rows)


def _number(text: Any) -> bool:
    if isinstance(text, bool):
        return False
    try:
        return math.isfinite(float(text))
    except (TypeError, ValueError):
        return False


def ranks(ratios: Sequence[float], tasks: Sequence[str]) -> np.ndarray:
    """(run,) the place of each ratio among those of its task, 0 … 1, higher is better; equal ones share theirs."""
    values, names = np.asarray(ratios, dtype=float), np.asarray(tasks)
    found = np.empty(len(values))
    for name in dict.fromkeys(tasks):
        own = names == name
        found[own] = (rankdata(values[own]) - 0.5) / own.sum()
    return found


def features(run: Run) -> dict[str, str | float]:
    """What is read of a run: its pipeline, each setting a category, α under mi alone; log10 of its task's examples."""
    chosen = {name: run[name] for name in (*FIELDS.values(), *PLAIN, *MODELS) if name in run}
    if chosen[FIELDS["loss"]] != "mi":
        chosen.pop(FIELDS["alpha"], None)
    found: dict[str, str | float] = {
        name: f"{float(value):g}" if _number(value) else str(value).lower() for name, value in chosen.items()
    }
    return found | ({"size": math.log10(max(float(run[SIZE]), 1))} if SIZE in run else {})


def recommender(
    runs: Sequence[Run], *, seed: int = 0, target: Callable[[Sequence[float], Sequence[str]], Any] = ranks
) -> Callable[[Sequence[Run]], np.ndarray]:
    """Learns from finished runs what to expect of others.

    Args:
        runs: with the fields of `FIELDS`, "task" and "ratio"; others are optional.
        seed: of the trees.
        target: from ratios and tasks to what is regressed.

    Returns:
        a function from runs, of which only the pipeline is read, to (run,) expected targets.

    Raises:
        ConfigurationError: if there are less than two runs.
    """
    if len(runs) < 2:
        raise ConfigurationError(f"mi_alpha: a recommender learns from finished runs, got {len(runs)}.")
    encoder = DictVectorizer(sparse=False)
    model = GradientBoostingRegressor(n_estimators=200, max_depth=4, random_state=seed)
    given = encoder.fit_transform([features(run) for run in runs])
    model.fit(given, target([float(run["ratio"]) for run in runs], [str(run["task"]) for run in runs]))

    def expected(others: Sequence[Run]) -> np.ndarray:
        return np.asarray(model.predict(encoder.transform([features(run) for run in others])))

    return expected
