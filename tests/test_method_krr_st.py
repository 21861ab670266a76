"""KRR-ST: a data set as product, from its own loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import pytest
import torch
from hf_compress_plugins.dataset_distillation import krr_st as module
from hf_compress_plugins.dataset_distillation.krr_st import ConvNet, KRRSTConfig, krr_loss, krr_st, ridge
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from hf_compress.errors import ConfigurationError, ResumeError

SMALL = KRRSTConfig(images=4, steps=6, batch=8, pool=2, widths=(4, 4), life=3, learning_rate=1e-2)


def real(count: int = 12) -> datasets.Dataset:
    draw = torch.Generator().manual_seed(0)
    return datasets.Dataset.from_dict({"pixel_values": torch.randn(count, 1, 8, 8, generator=draw).tolist()})


def teacher(dim: int = 3) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, dim), nn.Dropout(0.5))


def make(**settings: Any) -> datasets.Dataset:
    settings = {"teacher": teacher(), "config": SMALL} | settings
    return krr_st(real(), **settings)


def test_ridge_reproduces_the_targets_of_images_that_it_knows() -> None:
    draw = torch.Generator().manual_seed(0)
    features, targets = torch.randn(4, 9, generator=draw), torch.randn(4, 2, generator=draw)
    torch.testing.assert_close(ridge(features, targets, features), targets.double(), rtol=1e-3, atol=1e-3)
    assert krr_loss(features, targets, features, targets) < 1e-6


def test_one_image_by_hand() -> None:
    """F_s = 1 and a one: K = 2; F_r = 3: K_rs = 4; the prediction is 4 / (2 + 2·10⁻⁶) · y."""
    value = ridge(torch.ones(1, 1), torch.full((1, 1), 5.0), torch.full((1, 1), 3.0))
    assert value.item() == pytest.approx(20 / (2 + 2e-6))


def test_gradients_stop_at_the_real_images() -> None:
    parts = [torch.randn(3, 4).requires_grad_() for _ in range(2)]
    targets, theirs = torch.randn(3, 2).requires_grad_(), torch.randn(3, 2).requires_grad_()
    krr_loss(parts[0], targets, parts[1], theirs).backward()
    assert parts[0].grad is not None
    assert targets.grad is not None
    assert parts[1].grad is None
    assert theirs.grad is None


def test_the_product_is_a_data_set_that_a_trainer_learns_from(tmp_path: Path) -> None:
    made = make()
    assert made.column_names == ["pixel_values", "labels"]
    images = torch.tensor(made["pixel_values"][:])
    assert images.shape == (4, 1, 8, 8)
    about = json.loads(made.info.description)
    assert about["config"]["images"] == 4
    made.save_to_disk(tmp_path / "data")
    again = datasets.load_from_disk(tmp_path / "data")
    config = ResNetConfig(
        num_channels=1,
        embedding_size=4,
        hidden_sizes=[4],
        depths=[1],
        layer_type="basic",
        num_labels=3,
        problem_type="regression",
    )
    trainer = Trainer(
        model=ResNetForImageClassification(config),
        args=TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_strategy="no"),
        train_dataset=again.with_format("torch"),
    )
    trainer.train()


def test_images_start_from_real_ones_and_move_with_their_targets() -> None:
    start, end = make(config=KRRSTConfig(**vars(SMALL) | {"steps": 1, "learning_rate": 1e-12})), make()
    pixels = torch.tensor(real()["pixel_values"][:])
    first = torch.tensor(start["pixel_values"][:])
    assert all((pixels - image).abs().amax((1, 2, 3)).min() < 1e-6 for image in first)
    assert (torch.tensor(end["pixel_values"][:]) - first).abs().max() > 1e-2
    assert (torch.tensor(end["labels"][:]) - torch.tensor(start["labels"][:])).abs().max() > 1e-2


def test_the_outer_loss_falls() -> None:
    losses: list[float] = []
    make(
        config=KRRSTConfig(images=4, steps=60, batch=12, pool=2, widths=(8, 8), life=20, learning_rate=3e-2),
        progress=lambda done, of, values: losses.append(values["outer loss"]),
    )
    assert sum(losses[-15:]) < 0.8 * sum(losses[:15])


@pytest.mark.parametrize("at", [2, 5])
def test_a_killed_run_goes_on_as_if_it_had_not_been(at: int, tmp_path: Path) -> None:
    def stop(done: int, of: int, values: dict[str, float]) -> None:
        if done == at:
            raise KeyboardInterrupt

    with mock.patch.object(module.loops, "run", _saving_each_step):
        whole = make()
        with pytest.raises(KeyboardInterrupt):
            make(progress=stop, resume_from=tmp_path / "state")
        again = make(resume_from=tmp_path / "state")
    assert whole["pixel_values"][:] == again["pixel_values"][:]
    assert whole["labels"][:] == again["labels"][:]
    with pytest.raises(ResumeError, match="other settings or data"):
        make(resume_from=tmp_path / "state", seed=1)


_run = module.loops.run


def _saving_each_step(*args: Any, **settings: Any) -> Any:
    return _run(*args, **(settings | {"save_every": 1}))


def test_the_same_seed_gives_the_same_images_and_the_teacher_is_left_as_it_was() -> None:
    model = teacher()
    first, second, other = make(teacher=model), make(teacher=model), make(teacher=model, seed=1)
    assert first["pixel_values"][:] == second["pixel_values"][:]
    assert first["pixel_values"][:] != other["pixel_values"][:]
    assert all(module_.training for module_ in model.modules())


def test_a_network_is_made_anew_after_its_life() -> None:
    pool = module._Pool(SMALL, (1, 8, 8), 3, 0)
    images, targets = torch.randn(4, 1, 8, 8), torch.randn(4, 3)
    before = pool.nets[0]
    for _ in range(SMALL.life):
        pool.advance(0, images, targets, 0)
    assert pool.nets[0] is before
    pool.advance(0, images, targets, 7)
    assert pool.nets[0] is not before
    assert pool.ages[0] == 1


@pytest.mark.parametrize("settings", [{"images": 0}, {"widths": ()}, {"learning_rate": 0.0}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises((ConfigurationError, ValueError)):
        KRRSTConfig(**settings)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="cannot be chosen from 12"):
        make(config=KRRSTConfig(images=13))
    with pytest.raises(ConfigurationError, match="too small"):
        ConvNet(1, (8, 8), (4, 4, 4, 4), 2)
    with pytest.raises(ConfigurationError, match="returns a dict"):
        make(teacher=_Answering({}))


class _Answering(nn.Module):
    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, images: Any) -> Any:
        return self.answer


@pytest.mark.parametrize("name", ["ridge", "krr_loss"])
def test_each_function_is_reached(name: str) -> None:
    with mock.patch.object(module, name, side_effect=KeyError(name)), pytest.raises(KeyError):
        make()
