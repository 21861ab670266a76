"""The card's front matter: what the hub's filters and its table of results read."""

from __future__ import annotations

import re
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from hf_compress.facts import Measurement, Model, Record, Training

from .text import plain

METRICS = {
    "accuracy": ("accuracy", "Accuracy"),
    "f1_macro": ("f1", "F1 (macro)"),
    "f1_micro": ("f1", "F1 (micro)"),
    "matthews_correlation": ("matthews_correlation", "Matthews correlation"),
    "seqeval_f1": ("f1", "F1 (entities)"),
    "seqeval_precision": ("precision", "Precision (entities)"),
    "seqeval_recall": ("recall", "Recall (entities)"),
    "spearmanr": ("spearmanr", "Spearman correlation"),
    "pearsonr": ("pearsonr", "Pearson correlation"),
    "mean_squared_error": ("mse", "Mean squared error"),
}
EMPTY: tuple[Any, ...] = (None, "", [], {})
"""What the hub refuses as a value of the metadata."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(?:/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)


class _Dumper(yaml.SafeDumper):
    """Quotes each text that begins as a number: PyYAML takes 1e3 and 0o17 for texts, the hub's reader for numbers."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "'" if re.match(r"[-+]?[.\d]", value) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style)


_Dumper.add_representer(str, _text)


def to_yaml(data: ModelCardData) -> str:
    """The front matter without its marks, one line for each text."""
    return dumped(data.to_dict())  # type: ignore[no-untyped-call]  # huggingface_hub


def dumped(values: dict[Any, Any]) -> str:
    """Lines of a front matter; empty values are left out, as the hub wants them."""
    kept = {key: value for key, value in values.items() if value not in EMPTY}
    return yaml.dump(kept, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=float("inf")).strip()


def hub_id(name: str | None) -> str | None:
    """The name if the hub could know a repository by it, else None: a null in the metadata breaks the card."""
    valid = name is not None and _HUB_ID.fullmatch(name) and ".." not in name and "--" not in name
    return name if valid and not name.endswith((".git", ".", "-")) else None  # type: ignore[union-attr]  # valid: no None


def metadata(record: Record, *, name: str, tag: str | None, licence: Any) -> ModelCardData:
    """Only what is known: every key has a value, every value is a text, a number or a list of texts."""
    training = record.training
    results = eval_results(record, tag) or None
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=tag,
        license=licence if isinstance(licence, str) and re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence) else None,
        base_model=_ids(training.teacher, training.student) if training else None,
        base_model_relation=_relation(training),
        datasets=[found] if training and (found := hub_id(training.data.hub_id)) else None,
        metrics=sorted({METRICS[x.metric][0] for x in scores(record)}) or None,
        tags=_tags(record),
        model_name=plain(name) if results else None,
        eval_results=results,
    )


def _ids(*models: Model | None) -> list[str] | None:
    return list(dict.fromkeys(found for model in models if model and (found := hub_id(model.name)))) or None


def _relation(training: Training | None) -> str | None:
    """The hub's word for weights that were carried over and trained further; it has none for distillation."""
    named = training is not None and _ids(training.teacher, training.student)
    return "finetune" if named and training is not None and (training.student.start or training.student.name) else None


def _tags(record: Record) -> list[str]:
    methods = record.training.methods if record.training else ()
    names = ["distillation", "hf_compress", *(plain(method.name, 80) for method in methods)]
    return [name for name in dict.fromkeys(names) if name]


def scores(record: Record) -> list[Measurement]:
    """The newest score of the student for each metric, variant and data set that has a name."""
    scores = [x for x in record.measurements if x.subject == "student" and x.metric in METRICS]
    named = [(x, plain(x.data.name)) for x in scores if x.data is not None]
    return list({(x.metric, x.variant, name, x.data and x.data.split): x for x, name in named if name}.values())


def eval_results(record: Record, tag: str | None) -> list[EvalResult]:
    """The student's scores as the hub's model-index holds them; a score without a data set or a task has no place."""
    task = tag or (plain(record.training.task) if record.training else None)
    results = []
    for score in scores(record):
        data, (kind, title) = score.data, METRICS[score.metric]
        if not task or data is None:
            continue
        results.append(
            EvalResult(
                task_type=task,
                dataset_type=hub_id(data.hub_id) or plain(data.name),
                dataset_name=plain(data.name),
                dataset_config=plain(data.config) or None if data.config else None,
                dataset_split=plain(data.split) or None if data.split else None,
                metric_type=kind,
                metric_name=title if score.variant == "torch" else f"{title}, {plain(score.variant, 80)}",
                metric_value=score.value,
            )
        )
    return results
