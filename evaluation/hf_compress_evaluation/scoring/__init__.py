"""How models of each task are loaded, run and scored.

| task | model | rows | scores | with the teacher |
|---|---|---|---|---|
| text-classification | one class a row | text, label | accuracy, macro-F1, … | equal labels, near probabilities, KL |
| the same, one number a row | regression | text, number | Pearson, Spearman | regression and rank loyalty |
| token-classification | one tag a word | list of words, list of tags | F1 of entities, accuracy of words | equal tags |
| sentence-similarity | embeddings | two texts, number | Spearman of their cosines | rank loyalty, cosine |

A further task is one more `Scorer`.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

from ._base import Rows, Scorer
from .classes import Classes
from .numbers import Numbers
from .sentences import Sentences
from .tags import Tags

__all__ = ["AUTO", "Rows", "Scorer", "scorer"]

AUTO: dict[str, Any] = {
    "text-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "sentence-similarity": AutoModel,
}
"""What opens a torch model, by task."""


def scorer(task: str, config: Any) -> Scorer:
    """The scorer of a task for a student with that config."""
    if task == "token-classification":
        return Tags()
    if task == "sentence-similarity":
        return Sentences()
    one = config.problem_type == "regression" or (config.num_labels == 1 and config.problem_type is None)
    return Numbers() if one else Classes()
