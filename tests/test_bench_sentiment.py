"""Benches beside others' distillation trainers: batches, objectives and figures, without the others."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_compress_evaluation import bench
from hf_compress_evaluation.bench import _sentiment as s
from hf_compress_evaluation.bench import onnx, textbrewer, torchdistill
from hf_compress_evaluation.bench._machine import Machine
from transformers import BertConfig, BertForSequenceClassification, Trainer

from hf_compress import DistillCallback

ROWS = [{"input_ids": [5 + place, 6, *[7] * (place % 3)], "labels": place % 2} for place in range(40)]
GIVEN = s.Recipe(temperature=4.0, soft=1.0, hard=0.5)


def model(layers: int) -> BertForSequenceClassification:
    with torch.random.fork_rng():
        torch.manual_seed(layers)
        config = BertConfig(
            vocab_size=60, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=32,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.5,
        )  # fmt: skip
        return BertForSequenceClassification(config)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model(2).save_pretrained(tmp_path / "teacher")
    model(1).save_pretrained(tmp_path / "student")
    (tmp_path / "rows.json").write_text(json.dumps({"train": ROWS, "test": ROWS}))
    return tmp_path


def test_batches_stay_together_and_change_places() -> None:
    """As a list of cached batches does that is shuffled in place by the same generator; a seed is an order."""
    batches = [batch["input_ids"].tolist() for batch in s.loader(s.drawn(ROWS, 3))]
    expected, shuffled = [], random.Random(3)
    for _ in range(2):
        shuffled.shuffle(batches)
        expected += [row for batch in batches for row in batch]
    found = [row["input_ids"] for row in s.in_order(ROWS, 3, 2)]
    assert found == [[token for token in row if token] for row in expected]
    assert s.in_order(ROWS, 3, 1) != s.in_order(ROWS, 4, 1)
    every = s.in_order(ROWS, 3, 2)
    assert [every.count(row) for row in ROWS] == [2] * 40
    assert s.steps(replace(GIVEN, epochs=2), ROWS) == 6


def test_padding_is_not_read() -> None:
    batch = s.pad(ROWS[:3])
    assert batch["input_ids"].tolist() == [[5, 6, 0, 0], [6, 6, 7, 0], [7, 6, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [0, 1, 0]


def test_ours_optimises_what_the_recipe_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """soft · KL at T without T², and hard · CE: the first step's gradient is that of the sum by hand."""
    found = list[float]()

    def train(trainer: Trainer) -> None:
        batch = next(iter(trainer.get_train_dataloader()))
        labels, logits = batch["labels"], trainer.model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        with torch.no_grad():
            teacher = given.teacher(**{k: v for k, v in batch.items() if k != "labels"}).logits
        soft = torch.nn.functional.kl_div(
            (logits / 4).log_softmax(-1), (teacher / 4).softmax(-1), reduction="batchmean"
        )
        by_hand.append(float((soft + 0.5 * torch.nn.functional.cross_entropy(logits, labels)).detach()))
        callback = next(one for one in trainer.callback_handler.callbacks if isinstance(one, DistillCallback))
        (objective,) = callback.run.distiller.objectives
        assert (objective.weight, objective.config.temperature) == (1 / 16, 4.0)
        found.append(float(original(trainer).training_loss))

    original, by_hand = Trainer.train, list[float]()
    monkeypatch.setattr(Trainer, "train", train)
    given = s.Given.read(folder)
    s.ours(replace(given, train=ROWS[:16]), replace(GIVEN, epochs=1), 0, folder / "out")
    assert found == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_ours_is_trained_saved_and_measured(folder: Path, cached: bool) -> None:
    side = s.ours_cached if cached else s.ours
    found = s.figures(side, GIVEN, folder, on=Machine(), seed=0)
    assert 0 <= found["accuracy"] <= 1
    assert found["seconds"] > 0
    assert found["megabytes"] >= 0


@pytest.mark.slow
def test_a_cached_teacher_gives_the_same_student(folder: Path) -> None:
    live, cached = s.Given.read(folder), s.Given.read(folder)
    s.ours(live, GIVEN, 1, folder / "live")
    s.ours_cached(cached, GIVEN, 1, folder / "cached")
    assert (folder / "live" / "model.safetensors").exists()
    for one, other in zip(live.student.parameters(), cached.student.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_of_soft_losses_are_compared_as_they_are(folder: Path) -> None:
    """A loss without T² has the T²-th part of ours."""

    def plain(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
        assert len(labels) == len(student)
        inputs, targets = (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1)
        return torch.nn.functional.kl_div(inputs, targets, reduction="batchmean")

    found = s.before(folder, {"plain": plain}, Machine())
    for temperature in s.TEMPERATURES:
        ratio = found[s.gradient("ours", temperature)] / found[s.gradient("plain", temperature)]
        assert ratio == pytest.approx(temperature**2, rel=1e-4)


def test_accuracy_is_of_all_rows(folder: Path) -> None:
    given = s.Given.read(folder)
    right = [int(given.teacher(torch.tensor([row["input_ids"]])).logits.argmax()) == row["labels"] for row in ROWS]
    assert s.accuracy(given.teacher, ROWS) == sum(right) / 40


@pytest.mark.parametrize("name", [textbrewer.PEER, torchdistill.PEER])
def test_what_is_compared_is_paired(name: str) -> None:
    found = bench.get(name)
    figures = {
        part: {"accuracy": 0.75 if name in part else 0.5, "seconds": 1.0, "megabytes": 1.0} for part in found.parts
    }
    start = dict.fromkeys((f"{whose}'s accuracy" for whose in ("teacher", "student")), 0.9)
    losses = ("ours", name, torchdistill.UNLABELLED)
    figures[s.START] = start | {s.gradient(side, at): 1.0 for side in losses for at in s.TEMPERATURES}
    ratios = found.ratios(figures)
    assert ratios[f"accuracy, {name} - ours"] == 0.25
    assert ratios[f"accuracy at T = 8, {name}"] == 0.75
    assert ratios["teacher's accuracy"] == 0.9


def test_the_losses_of_torchdistill_have_its_published_weights() -> None:
    """0.9 of the labels and 0.1 of T² KL, whatever T is."""
    for recipe in (torchdistill.RECIPE, torchdistill.recipe(8.0)):
        settings = torchdistill.of_loss(recipe)
        assert settings["alpha"] == 0.9
        assert settings["beta"] == pytest.approx(0.1)
        assert recipe.soft == pytest.approx(0.1 * recipe.temperature**2)


def test_a_graph_s_accuracy_is_of_all_rows() -> None:
    """The last batch is a short one; padding is said to the graph."""

    class Graph:
        def run(self, names: list[str], given: dict[str, Any]) -> list[Any]:
            assert names == ["logits"]
            assert given.keys() == {"input_ids", "attention_mask", "token_type_ids"}
            assert ((given["input_ids"] != 0) == given["attention_mask"].astype(bool)).all()
            return [np.eye(2)[given["input_ids"][:, 0] % 2]]

    rows = [{"input_ids": [5 + place, 7, 7][: 1 + place % 3], "labels": 0} for place in range(s.BATCH + 3)]
    assert onnx.accuracy(Graph(), rows) == pytest.approx(9 / 19)
