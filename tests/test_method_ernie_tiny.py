"""ERNIE-Tiny: the latent loss by hand, and four stages through the recipe."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hf_compress_plugins.encoders import ernie_tiny as module
from hf_compress_plugins.encoders.ernie_tiny import (
    RECIPE,
    ERNIETiny,
    attention,
    attention_loss,
    layer_map,
    state_loss,
)
from scene import signals, sizes, step
from transformers import AutoModelForSequenceClassification

from hf_compress import export_onnx, testing
from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.stages import LEARNED, Surroundings, run_stages, stages_of

TASK = "text-classification"
REAL = torch.tensor([[True, True, False]])


def test_layers_are_spread_evenly() -> None:
    assert layer_map(4, 12) == (3, 6, 9, 12)
    assert layer_map(2, 3) == (2, 3)
    with pytest.raises(MismatchError, match="of 4 layers"):
        layer_map(4, 3)


def test_attention_sees_real_tokens_alone_and_repeats_keys() -> None:
    queries, keys = torch.randn(1, 4, 3, 2), torch.randn(1, 2, 3, 2)
    found = attention(queries, keys, REAL)
    assert found.shape == (1, 4, 3, 3)
    assert not found[..., 2].any()
    torch.testing.assert_close(found.sum(-1), torch.ones(1, 4, 3))
    expected = (queries[0, 3] @ keys[0, 1].T / 2**0.5)[:, :2].softmax(-1)
    torch.testing.assert_close(found[0, 3, :, :2], expected)


def test_a_decoder_attends_to_what_comes_before_alone() -> None:
    queries, keys, real = torch.randn(1, 2, 3, 2), torch.randn(1, 2, 3, 2), torch.ones(1, 3, dtype=torch.bool)
    found = attention(queries, keys, real, causal=True)
    assert torch.equal(found.triu(1), torch.zeros_like(found))
    torch.testing.assert_close(found[..., 2, :], attention(queries, keys, real)[..., 2, :])
    behind = attention(queries, keys, torch.tensor([[False, True, True]]), causal=True)  # padding on the left
    assert behind.isfinite().all()
    assert torch.equal(behind[0, :, 1], torch.tensor([[0.0, 1.0, 0.0]] * 2))


@pytest.mark.parametrize(("student", "teacher"), [("causal", "none"), ("none", "causal"), ("none", "none")])
def test_attention_is_compared_as_the_models_have_it(student: Any, teacher: Any) -> None:
    """What comes after a token counts for neither model where one of the two does not see it."""
    objective = ERNIETiny(hidden=False)
    needs = objective.needs(sizes(1, student), sizes(1, teacher))
    real = torch.ones(1, 3, dtype=torch.bool)
    own, theirs = (
        {name: torch.randn(1, 2, 3, 2) for name in sorted(names)} for names in (needs.student, needs.teacher)
    )
    found = objective.forward(signals(own, theirs, real), step())["attention"]
    causal = "causal" in (student, teacher)
    maps = [attention(one["q:0"], one["k:0"], real, causal=causal) for one in (own, theirs)]
    torch.testing.assert_close(found, attention_loss(maps[0], maps[1], real))


def test_losses_by_hand() -> None:
    """Two real tokens: (1, 0) against (1/2, 1/2) differs by 1/4 a key; states that differ by 2 by 4."""
    student, teacher = torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3)
    student[..., 0], teacher[..., :2] = 1.0, 0.5
    assert attention_loss(student, teacher, REAL).tolist() == [0.25, 0.25]
    assert state_loss(torch.ones(1, 3, 2), torch.full((1, 3, 2), 3.0), REAL).tolist() == [4.0, 4.0]
    with pytest.raises(MismatchError, match="number of heads"):
        attention_loss(student, torch.zeros(1, 2, 3, 3), REAL)
    with pytest.raises(MismatchError, match="same tokens"):
        state_loss(torch.ones(1, 3, 2), torch.ones(1, 3, 3), REAL)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(tmp_path: Path) -> None:
    case = testing.Case("ernie_tiny", TASK, student=lambda _: testing.models(TASK)[1])
    made, _ = testing.trainer(case, tmp_path)
    made.train()
    (log,) = [entry for entry in made.state.log_history if "loss" in entry]
    assert log["distill_loss"] == pytest.approx(0.0, abs=1e-10)


def test_other_head_counts_and_empty_settings_are_refused() -> None:
    with pytest.raises(MismatchError, match="heads"):
        ERNIETiny().needs(sizes(2), dataclasses.replace(sizes(3), heads=3))
    ERNIETiny(attention=False).needs(sizes(2), dataclasses.replace(sizes(3), heads=3))
    with pytest.raises(ConfigurationError, match="both off"):
        ERNIETiny(attention=False, hidden=False)


def test_between_two_stages_one_thing_changes() -> None:
    stages = stages_of(RECIPE)
    seen = [(s.teacher, s.data, s.methods[0], len(s.methods), s.labels) for s in stages]
    assert [
        sum(a != b for a, b in zip(one[:2], other[:2], strict=True)) for one, other in itertools.pairwise(seen)
    ] == [1, 1, 0]
    assert [len(s.methods) for s in stages] == [1, 1, 1, 2]
    assert [s.labels for s in stages] == [False, False, False, True]
    assert [s.trainable for s in stages] == ["body"] * 3 + ["all"]


def surroundings() -> Surroundings:
    return Surroundings(
        models={"pretrained": testing._model(TASK, width=96, layers=3, seed=5), "finetuned": testing.models(TASK)[1]},
        data={"general": testing.rows(TASK, 8, seed=3), "task": testing.rows(TASK, 8)},
        arguments={
            "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "use_cpu": True,
        },
        data_collator=testing.collate,
        progress=False,
    )  # fmt: skip


def test_four_stages_from_a_general_teacher_to_the_task(tmp_path: Path) -> None:
    student = run_stages(RECIPE, testing.models(TASK)[0], tmp_path, surroundings())
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert folders == ["0-general", "1-general-enhanced", "2-task-adaptive", "3-task-specific"]
    record: Any = student.config.compression
    stages = [*record["before"], record]
    assert [stage["data"]["name"] for stage in stages] == ["general", "general", "task", "task"]
    assert [[m["name"] for m in stage["methods"]] for stage in stages] == [["ernie_tiny"]] * 3 + [["ernie_tiny", "kd"]]
    start = testing.models(TASK)[0]
    third = AutoModelForSequenceClassification.from_pretrained(tmp_path / "2-task-adaptive")
    assert torch.equal(third.classifier.weight, start.classifier.weight)
    assert not torch.equal(student.classifier.weight, start.classifier.weight)
    assert (tmp_path / "0-general" / LEARNED).exists()
    student.save_pretrained(tmp_path / "student")
    export_onnx(tmp_path / "student")


@pytest.mark.parametrize("name", ["attention", "attention_loss", "state_loss", "layer_map"])
def test_each_function_is_reached_by_the_stages(name: str, tmp_path: Path) -> None:
    with mock.patch.object(module, name, side_effect=KeyError(name)), pytest.raises(KeyError):
        run_stages(RECIPE, testing.models(TASK)[0], tmp_path, surroundings())
