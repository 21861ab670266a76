"""Metrics by name that need no network.

`evaluate.load("accuracy")` fetches a script from the hub; these are `evaluate.Metric` objects behind the same names,
with the same argument and result names and nothing to fetch, so `compute`, `add_batch` and `evaluate.combine` work
offline. Where the online one needs a hub model or has no such name, the docstring says so.

| names | results | needs |
|---|---|---|
| `accuracy`, `f1`, `f1_macro`, `f1_micro`, `matthews_correlation` | fractions, -1 to 1 for the last | |
| `pearsonr`, `spearmanr` | -1 to 1 | |
| `seqeval` | fractions, over all entities and by type | seqeval |
| `squad` | per cent | |
| `exact_match`, `anls` | fractions | |
| `rouge` | fractions | rouge-score |
| `sacrebleu`, `chrf` | 0 to 100 | sacrebleu |
| `wer`, `cer` | errors for each word or character of the reference | jiwer |
| `perplexity`, `bits_per_byte` | at least 1; bits | |
| `acceptance_rate` | fraction, of a draft's tokens | |
| `ndcg`, `mrr` | fractions | |
| `mean_iou` | fractions | |

What is needed comes with `pip install "hf-compress[metrics]"` and is imported when the metric computes.
"""

from __future__ import annotations

from typing import Any

import evaluate

from hf_compress.errors import UnknownNameError

from .classes import F1, Accuracy, F1Macro, F1Micro, MatthewsCorrelation, Pearsonr, Spearmanr
from .language import AcceptanceRate, BitsPerByte, Perplexity
from .rankings import Mrr, Ndcg
from .segmentation import MeanIou
from .spans import Anls, ExactMatch, Seqeval, Squad, entities
from .texts import Cer, Chrf, Rouge, Sacrebleu, Wer

__all__ = ["METRICS", "entities", "load"]

METRICS: dict[str, type[evaluate.Metric]] = {
    "accuracy": Accuracy,
    "f1": F1,
    "f1_macro": F1Macro,
    "f1_micro": F1Micro,
    "matthews_correlation": MatthewsCorrelation,
    "pearsonr": Pearsonr,
    "spearmanr": Spearmanr,
    "seqeval": Seqeval,
    "squad": Squad,
    "exact_match": ExactMatch,
    "anls": Anls,
    "rouge": Rouge,
    "sacrebleu": Sacrebleu,
    "chrf": Chrf,
    "wer": Wer,
    "cer": Cer,
    "perplexity": Perplexity,
    "bits_per_byte": BitsPerByte,
    "acceptance_rate": AcceptanceRate,
    "ndcg": Ndcg,
    "mrr": Mrr,
    "mean_iou": MeanIou,
}


def load(name: str, **settings: Any) -> evaluate.Metric:
    """The metric of that name.

    Args:
        name: a key of `METRICS`.
        settings: of `evaluate.Metric`, e.g. `experiment_id`. Rows stay in memory unless `keep_in_memory=False`.

    Raises:
        UnknownNameError: with the nearest names.

    >>> load("accuracy").compute(predictions=[0, 1, 1, 0], references=[0, 1, 0, 0])
    {'accuracy': 0.75}
    """
    if name not in METRICS:
        raise UnknownNameError("metric", name, METRICS)
    return METRICS[name](**{"keep_in_memory": True} | settings)
