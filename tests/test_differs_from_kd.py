"""How far each method's step lies from plain softened targets on the same batch: stated, and measured here.

The distance is that of the two gradients with regard to the student's parameters, divided by kd's norm: one step of a
real Trainer in float64 on the conformance suite's models, each with its published weights.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf_compress_plugins.general.kd import KD
from prepared import PREPARED
from stub import GradientKeeper
from torch import Tensor

from hf_compress import registry, testing
from hf_compress.objective import Objective, kind_of

STATED: dict[str, tuple[str, float, str]] = {
    "kd": ("text-classification", 0.0, "itself"),
    "gkd": ("text-generation", 0.9876, "the divergence alone, bounded by log 2, and no loss of the task's own"),
    "features": ("text-classification", 0.5083, "hidden states instead of logits"),
    "distillspec": (
        "text-generation",
        0.9800,
        "the forward KL at temperature 1, without T² and the task's own loss",
    ),
    "taid": ("text-generation", 0.9579, "towards a target between both models, and no loss of the task's own"),
    "adaspec": ("text-generation", 1.0032, "the four tenths of the tokens with the largest lead of the reference"),
    "ddk": ("text-generation", 0.2739, "temperature 10 of the authors, on rows drawn by domain"),
    "sinkd": ("text-classification", 0.7873, "soft labels without T², the batch's transport, a tenth of the labels"),
    "pld": (
        "text-classification",
        0.5994,
        "the ranking of all classes in place of soft labels and the task's own loss",
    ),
    "topkld": (
        "text-generation",
        1.0040,
        "fifty classes at T = 1, the other ten reversed, without the task's own loss",
    ),
    "aligndistil": ("text-generation", 0.9833, "the reverse KL to a target beyond both frozen models"),
    "swing": ("text-generation", 0.9790, "flat and noisy where a token is private, and no loss of the task's own"),
    "semantic_revision": (
        "text-generation",
        1.0111,
        "a band of the distribution and words, on the student's own corrected answers",
    ),
    "sstoken": ("text-generation", 0.7204, "the labels of six tenths of the tokens, without a teacher"),
    "minilm": ("fill-mask", 0.6703, "relations of queries, keys and values, beside the task's own loss"),
    "multi_teacher": (
        "fill-mask",
        1.6782,
        "the mean of two teachers, five times, the last states, and twice the labels",
    ),
    "efficient_attention": (
        "fill-mask",
        2.8664,
        "five times the soft targets, the last states, and twice the labels",
    ),
    "ernie_tiny": ("text-classification", 0.5106, "the last states and attentions, beside the task's own loss"),
    "mi_alpha": ("text-classification", 0.5017, "information between first tokens' states, beside the task's own loss"),
    "multi_exit": ("text-classification", 0.5250, "the labels after inner layers, without a teacher"),
    "autodistil": ("fill-mask", 0.5337, "relations of the last layer of four students, beside the task's own loss"),
    "acm": ("image-classification", 0.7431, "what gates choose, without a teacher"),
    "ofa": ("image-classification", 0.2316, "exits with the class raised, at temperature 1"),
    "alm": ("text-generation", 0.6693, "likelihoods of chunks at τ = 100, averaged with the text's"),
    "mend": ("text-generation", 0.3086, "a teacher that reads the demonstrations too, at all tokens and temperature 1"),
    "dparallel": ("fill-mask", 1.7098, "two masked views and the entropy of right answers, without a teacher"),
}
"""Task, distance, and what differs."""
NO_STEP = {
    "dmae": "its models have no distributions over classes",
    "sid": "its models make images",
    "ff_g2m": "its rows are joined by edges; its own tests state the part of softened targets in its loss",
    "dm_codec": "its models make sound",
    "margin_mse": "its models give one score a text; its own tests state the step by hand",
    "dear": "its models give one score a text; its own tests state the step by hand",
    "encoder_decoder": "its two models read one example otherwise, which kd refuses; its own tests state the distance "
    "from kd to its aligned teacher",
    "fspad": "its student gives features and no logits; its own tests state the part of soft labels in its step",
}
"""Methods on whose batches kd has no step, and why."""


def gradient(case: testing.Case, folder: Path, objective: Objective | None = None) -> dict[str, Tensor]:
    keeper = GradientKeeper()
    made, _ = testing.trainer(case, folder, objective=objective, dtype=torch.float64, callbacks=(keeper,))
    made.train()
    return {name: value for name, value in keeper.gradients[0].items() if not name.startswith("distiller.")}


@pytest.mark.parametrize("name", STATED)
def test_the_step_lies_as_far_from_kd_as_is_stated(name: str, tmp_path: Path) -> None:
    task, stated, _ = STATED[name]
    case = replace(testing.Case(name, task), **PREPARED.get(name, {}))
    own, plain = gradient(case, tmp_path), gradient(case, tmp_path, KD())
    shapes = own | plain
    gone = {key: own.get(key, torch.zeros_like(value)) - plain.get(key, 0.0) for key, value in shapes.items()}
    distance = torch.stack([value.square().sum() for value in gone.values()]).sum().sqrt()
    norm = torch.stack([value.square().sum() for value in plain.values()]).sum().sqrt()
    assert float(distance / norm) == pytest.approx(stated, abs=1e-3)
    assert (stated > 0.1) == (name != "kd")


def test_every_method_with_an_objective_is_stated() -> None:
    training = {name for name, entry in registry.catalogue().methods.items() if "objective" in entry.parts}
    assert training == STATED.keys() | NO_STEP.keys()
    for name in NO_STEP:
        task, *_ = registry.get(name).tasks
        if task in registry.get("kd").tasks:
            own, theirs = map(kind_of, testing.pair(replace(testing.Case(name, task), **PREPARED[name])))
            assert own == "none" or own != theirs, name
