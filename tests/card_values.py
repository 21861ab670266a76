"""Whether the metadata of a card on a hub say what `compression.json` beside it says; read without the cards' own code.

    python -m card_values OWNER/NAME...

asks the hub of `HF_ENDPOINT`: it validates each card there, compares, and prints one line of JSON, for each repository
how many values were compared and in sentences which differ.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCard, hf_hub_download

METRICS = {
    "accuracy": "accuracy",
    "f1_macro": "f1",
    "f1_micro": "f1",
    "matthews_correlation": "matthews_correlation",
    "seqeval_f1": "f1",
    "seqeval_precision": "precision",
    "seqeval_recall": "recall",
    "spearmanr": "spearmanr",
    "pearsonr": "pearsonr",
    "mean_squared_error": "mse",
}
"""The hub's metric by the record's; the hub has a page for each."""
WITHOUT = frozenset({"calibration_error", "kl"})
"""Scores that a task may ask for and the hub has no metric for."""
TASKS = {"text-regression": "text-classification"}
"""The hub's name of a task, where the record has another."""
STUDENTS = ("small-sentiment", "small-tagger", "small-embedder", "small-writer", "small-watcher")
"""Repositories of `ci/cards`; `card_students.py`, which takes seconds to import, makes them."""
MARKS = {"distillation", "hf_compress"}
Found = dict[str, Any]


@dataclass(frozen=True)
class Copy:
    """What a hub holds of one repository."""

    name: str
    """Without its owner."""
    card: str
    record: Mapping[str, Any]
    config: Mapping[str, Any]
    leaderboards: tuple[Any, ...] = ()
    """The files of `.eval_results`, parsed."""

    @classmethod
    def download(cls, repository: str) -> Copy:
        """Of the hub that `HF_ENDPOINT` names."""

        def text(name: str) -> str:
            return Path(hf_hub_download(repository, name)).read_text(encoding="utf-8")

        names = [name for name in HfApi().list_repo_files(repository) if name.startswith(".eval_results/")]
        return cls(
            name=repository.rpartition("/")[2],
            card=str(ModelCard.load(repository)),
            record=json.loads(text("compression.json")),
            config=json.loads(text("config.json")),
            leaderboards=tuple(yaml.safe_load(text(name)) for name in names),
        )


def main(repositories: Iterable[str]) -> None:
    found = {}
    for repository in repositories:
        copy = Copy.download(repository)
        values, faults = compared(copy)
        try:
            ModelCard(copy.card).validate()
        except ValueError as error:
            faults = [*faults, f"the hub refuses the card: {error}"]
        found[repository] = {"values": values, "differences": faults}
    print(json.dumps(found))


def compared(copy: Copy) -> tuple[int, list[str]]:
    """How many values were compared, and each that differs in a sentence."""
    said, expected = stated(copy), recorded(copy)
    faults = [
        f"{key}: the card says {said[key]!r}, compression.json {value!r}"
        for key, value in expected.items()
        if said[key] != value
    ]
    return sum(len(value) if isinstance(value, list) else 1 for value in expected.values()), faults


def stated(copy: Copy) -> Found:
    """What the card says, as huggingface_hub parses it, and the files of leaderboards."""
    data = ModelCard(copy.card).data
    results = data.get("eval_results") or []
    entries = [entry for file in copy.leaderboards for entry in file]
    tags = data.get("tags") or []
    return {
        "license": data.get("license"),
        "pipeline_tag": data.get("pipeline_tag"),
        "base_model": _listed(data.get("base_model")),
        "base_model_relation": data.get("base_model_relation"),
        "datasets": _listed(data.get("datasets")),
        "metrics": sorted(_listed(data.get("metrics"))),
        "tags": sorted(MARKS.union(_methods(copy.record)).intersection(tags)),
        "model name": data.get("model_name") if results else None,
        "model-index": _sorted(
            [
                each.task_type, each.dataset_type, each.dataset_name, each.dataset_config, each.dataset_split,
                each.metric_type, _variant(each.metric_name), each.metric_value,
            ]
            for each in results
        ),
        "leaderboards": _sorted(
            [entry["dataset"]["id"], entry["dataset"]["task_id"], entry["value"]] for entry in entries
        ),
    }  # fmt: skip


def recorded(copy: Copy) -> Found:
    """What the card must say. A licence of which the record is silent is left out: then its maker has said it."""
    training = copy.record.get("training") or {}
    scores = _scores(copy.record)
    models = [training.get("teacher") or {}, training.get("student") or {}]
    names = list(dict.fromkeys(model["name"] for model in models if model.get("name")))
    task, data = TASKS.get(training.get("task"), training.get("task")), training.get("data") or {}
    carried = models[1].get("start") or models[1].get("name")
    found: Found = {
        "pipeline_tag": task,
        "base_model": names,
        "base_model_relation": "finetune" if names and carried else None,
        "datasets": _listed(data.get("hub_id")),
        "metrics": sorted({METRICS[score["metric"]] for score in scores}),
        "tags": sorted(MARKS.union(_methods(copy.record))),
        "model name": copy.name if scores else None,
        "model-index": _sorted(
            [
                task, score["data"].get("hub_id") or score["data"]["name"], score["data"]["name"],
                score["data"].get("config"), score["data"].get("split"), METRICS[score["metric"]],
                score.get("variant", "torch"), score["value"],
            ]
            for score in scores
        ),
        "leaderboards": _sorted(
            [score["data"]["hub_id"], score["data"].get("config") or "default", score["value"]]
            for score in scores
            if score["data"].get("hub_id")
        ),
    }  # fmt: skip
    if not training:  # then nothing but the model's head tells the task
        del found["pipeline_tag"]
    if licence := _licence(copy):
        found["license"] = licence
    return found


def _licence(copy: Copy) -> str | None:
    """As the maker has said in the record, or in the config; else of teacher and data where they agree on one."""
    training = copy.record.get("training") or {}
    sources = [training[who].get("licence") for who in ("teacher", "data") if training.get(who)]
    agreed = sources[0] if sources and len({str(each).lower() for each in sources}) == 1 else None
    said = copy.record.get("licence") or copy.config.get("license") or agreed
    return str(said).lower() if said else None


def _scores(record: Mapping[str, Any]) -> list[Found]:
    """The student's newest score of each kind that the hub knows, in the order of the record."""
    newest: dict[tuple[Any, ...], Found] = {}
    for each in record.get("measurements", ()):
        data = each.get("data")
        if each["subject"] == "student" and each["metric"] in METRICS and data:
            newest[each["metric"], each.get("variant", "torch"), data["name"], data.get("split")] = each
    return list(newest.values())


def _methods(record: Mapping[str, Any]) -> set[str]:
    return {method["name"] for method in (record.get("training") or {}).get("methods", ())}


def _variant(name: str | None) -> str:
    """Of `Accuracy, onnx_int8`; float32 torch has no name."""
    found = re.fullmatch(r"[^,]+(?:, (.+))?", name or "")
    return (found and found[1]) or "torch"


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _sorted(rows: Iterable[list[Any]]) -> list[list[Any]]:
    return sorted(rows, key=str)


if __name__ == "__main__":
    main(sys.argv[1:])
