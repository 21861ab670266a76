"""DisWOT: distances by hand, and a search that returns a student."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hf_compress_plugins.encoders import diswot as module
from hf_compress_plugins.encoders.diswot import channels, combine, diswot, relation, semantics, untrained
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from hf_compress import DistillCallback, testing
from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.parts import Budget

TASK = "text-classification"
LARGE = Budget(parameters=10**9)


def batches(count: int = 2) -> list[dict[str, Any]]:
    return [testing.collate(testing.rows(TASK, 8, seed)) for seed in range(count)]


def test_relation_by_hand() -> None:
    """Two examples, once orthogonal and once equal: I against a matrix of 1/√2: 2 (1 - √½)² + 2 · ½, by 4."""
    value = relation(torch.eye(2), torch.ones(2, 3))
    assert value.item() == pytest.approx((2 * (1 - 0.5**0.5) ** 2 + 1) / 4)


def test_distances_know_no_scale_and_no_width() -> None:
    draw = torch.Generator().manual_seed(0)
    features, other = torch.randn(4, 5, 3, generator=draw), torch.randn(4, 7, generator=draw)
    assert relation(features, 3 * features).item() == pytest.approx(0.0, abs=1e-12)
    assert channels(features, 3 * features).item() == pytest.approx(0.0, abs=1e-12)
    assert semantics(other, 2 * other).item() == pytest.approx(0.0, abs=1e-12)
    wide = torch.cat([other, torch.zeros(4, 2)], 1)
    assert semantics(other, wide).item() == pytest.approx(0.0, abs=1e-12)
    assert relation(features, other) > 0


def test_other_batches_are_refused() -> None:
    with pytest.raises(MismatchError, match="one batch"):
        relation(torch.ones(2, 3), torch.ones(3, 3))
    with pytest.raises(MismatchError, match="channels"):
        channels(torch.ones(2, 3), torch.ones(2, 4))


def test_both_distances_weigh_the_same_whatever_their_size() -> None:
    assert combine([0.1, 0.2, 0.3], [200.0, 300.0, 100.0]) == pytest.approx([1.0, -1.0, 0.0])
    assert combine([3.0], [4.0]) == [0.0]


def test_a_ranking_depends_on_its_seed_alone_and_leaves_the_global_draws() -> None:
    """A vision transformer has weights in no layer (class token, positions), which its constructor draws."""
    task = "image-classification"
    teacher, batch = testing.models(task)[1], testing.collate(testing.rows(task, 8))
    scores = []
    for number in (0, 1):
        torch.manual_seed(number)
        before = torch.get_rng_state()
        found = diswot(teacher, data=[batch], budget=LARGE, space={"num_hidden_layers": [1, 2]}, seed=3)
        assert torch.equal(torch.get_rng_state(), before)
        scores.append((found.configs, found.scores))
    assert scores[0] == scores[1]


def test_a_search_tries_every_configuration_that_fits_and_builds_the_best(tmp_path: Path) -> None:
    teacher = testing.models(TASK)[1]
    space = {"num_hidden_layers": [1, 2], "hidden_size": [46, 48, 64]}  # 46 is not divided by the four heads
    ranking = diswot(teacher, data=batches(), budget=LARGE, space=space)

    assert {tuple(config.values()) for config in ranking.configs} == {(d, w) for d in (1, 2) for w in (48, 64)}
    assert list(ranking.scores) == sorted(ranking.scores, reverse=True)
    assert sum(ranking.scores) == pytest.approx(0.0, abs=1e-9)
    student = ranking.build(0)
    assert type(student) is type(teacher)
    assert (student.config.num_hidden_layers, student.config.hidden_size) == tuple(ranking.configs[0].values())
    made = Trainer(
        model=student,
        args=TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_strategy="no"),
        train_dataset=testing.rows(TASK),
        data_collator=testing.collate,
        callbacks=[DistillCallback(teacher)],
    )
    made.train()


def test_a_ranking_is_the_same_again_and_the_teacher_is_left_alone() -> None:
    teacher = testing.models(TASK)[1]
    before, modes = testing.weights_hash(teacher), [m.training for m in teacher.modules()]
    first, second = (diswot(teacher, data=batches(1), budget=LARGE) for _ in range(2))
    assert (first.configs, first.scores) == (second.configs, second.scores)
    assert testing.weights_hash(teacher) == before
    assert [m.training for m in teacher.modules()] == modes
    assert {"num_hidden_layers", "hidden_size", "intermediate_size"} == set(first.configs[0])


def test_the_teacher_s_own_configuration_is_its_best_likeness() -> None:
    teacher = testing.models(TASK)[1]
    config = teacher.config
    ranking = diswot(
        teacher,
        data=batches(1),
        budget=LARGE,
        space={"hidden_size": [48, config.hidden_size], "num_hidden_layers": [1, 3]},
    )
    assert ranking.configs[0] == {"hidden_size": config.hidden_size, "num_hidden_layers": 3}


def test_a_budget_bounds_size_and_tries() -> None:
    teacher = testing.models(TASK)[1]
    small = sum(p.numel() for p in teacher.parameters()) // 2
    ranking = diswot(teacher, data=batches(1), budget=Budget(parameters=small))
    for place in range(len(ranking.configs)):
        assert sum(p.numel() for p in ranking.build(place).parameters()) <= small
    few = diswot(teacher, data=batches(1), budget=Budget(parameters=10**9, evaluations=6))
    assert len(few.configs) == len({tuple(config.values()) for config in few.configs}) == 6
    with pytest.raises(ConfigurationError, match="10 parameters or less"):
        diswot(teacher, data=batches(1), budget=Budget(parameters=10))


def test_convolutions_are_searched_too() -> None:
    config = ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", num_labels=3
    )
    teacher = ResNetForImageClassification(config)
    draw = torch.Generator().manual_seed(0)
    batch = {"pixel_values": torch.randn(6, 1, 16, 16, generator=draw), "labels": torch.arange(6) % 3}
    ranking = diswot(
        teacher, data=[batch], budget=LARGE, space={"depths": [[1, 1], [2, 2]], "hidden_sizes": [[8, 8], [8, 16]]}
    )
    assert ranking.configs[0] == {"depths": [2, 2], "hidden_sizes": [8, 16]}


def test_weights_are_the_paper_s() -> None:
    model = untrained(testing.models(TASK)[0], 0)
    weight = model.bert.encoder.layer[0].intermediate.dense.weight  # type: ignore[union-attr, index]
    assert weight.std().item() == pytest.approx(1.0, abs=0.05)
    assert not model.training


def test_what_has_no_classifier_or_no_labels_is_refused() -> None:
    batch = {name: value for name, value in batches(1)[0].items() if name != "labels"}
    with pytest.raises(ConfigurationError, match="batches with labels"):
        diswot(testing.models(TASK)[1], data=[batch], budget=LARGE)


@pytest.mark.parametrize("name", ["relation", "semantics", "classifier_gradient", "combine", "untrained"])
def test_each_function_is_reached(name: str) -> None:
    with mock.patch.object(module, name, side_effect=KeyError(name)), pytest.raises(KeyError):
        diswot(testing.models(TASK)[1], data=batches(1), budget=LARGE, space={"num_hidden_layers": [1]})
