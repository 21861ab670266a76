"""`.eval_results/*.yaml`: scores on benchmarks of the hub, which the hub shows on their leaderboards.

Only data with a hub id have a place there; the card's model-index holds the rest too.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.constants import EVAL_RESULTS_FOLDER as FOLDER

from hf_compress import files
from hf_compress.facts import Measurement, Record

from .metadata import METRICS, hub_id, scores
from .text import plain


def entries(record: Record) -> dict[str, list[EvalResultEntry]]:
    """The student's scores by file name, one file for each benchmark and task."""
    found: dict[str, list[EvalResultEntry]] = {}
    for score in scores(record):
        if score.data is None or (dataset := hub_id(score.data.hub_id)) is None:
            continue
        task = plain(score.data.config or "default", 80)
        name = re.sub(r"[^a-z0-9]+", "-", f"{dataset}-{task}".lower()).strip("-")
        found.setdefault(f"{name}.yaml", []).append(_entry(score, dataset, task))
    return found


def _entry(score: Measurement, dataset: str, task: str) -> EvalResultEntry:
    split = f", split {plain(score.data.split, 80)}" if score.data is not None and score.data.split else ""
    return EvalResultEntry(
        dataset_id=dataset,
        task_id=task,
        value=score.value,
        notes=f"{METRICS[score.metric][1]}, {plain(score.unit, 40)}, {plain(score.variant, 40)}{split}",
    )


def write(folder: Path, record: Record) -> None:
    """Writes the files of a model folder, and takes away earlier ones of ours that hold nothing more.

    What somebody else has written there stays as it is, also under a name that ours would have.
    """
    wanted = entries(record)
    place = folder / FOLDER
    held = sorted(place.glob("*.yaml")) if place.is_dir() else []
    theirs = {path.name for path in held if not _is_ours(path)}
    for old in held:
        if old.name not in wanted and old.name not in theirs:
            old.unlink()
    for name, each in wanted.items():
        if name not in theirs:
            place.mkdir(exist_ok=True)
            text = yaml.safe_dump(eval_result_entries_to_yaml(each), sort_keys=False)
            files.write_text(place / name, f"{_OURS}\n{text}")


_OURS = "# written by hf-compress from compression.json; without this line it is left as it is"


def _is_ours(path: Path) -> bool:
    with path.open("rb") as file:
        return file.readline(len(_OURS) + 2).rstrip() == _OURS.encode()
