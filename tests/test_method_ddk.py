"""DDK: weights of domains, by hand and in a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from datasets import Dataset
from hf_compress_plugins.general.gkd import gkd
from hf_compress_plugins.language import ddk as module
from hf_compress_plugins.language.ddk import DDK, DDKConfig, Domains, ddk, domains, initial, update
from hypothesis import given
from hypothesis import strategies as st
from scene import logits
from torch import Tensor
from transformers import Trainer

from hf_compress import testing
from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.stepping import _Calls

TASK = "text-generation"
BATCH, STEPS, K = 2, 12, 3


def test_the_weights_by_hand() -> None:
    """Three domains at α = 0.5 with ratios that fall, and five updates with equal ones from (0.9, 0.05, 0.05)."""
    weights = initial(torch.tensor([2.0, 1.25, 1.0], dtype=torch.float64))
    assert weights.tolist() == pytest.approx([0.54340561, 0.25668664, 0.19990775])
    weights = update(weights, torch.tensor([1.5, 1.25, 1.0], dtype=torch.float64), alpha=0.5)
    assert weights.tolist() == pytest.approx([0.48093253, 0.28227862, 0.23678886])
    weights = update(weights, torch.tensor([1.2, 1.2, 1.0], dtype=torch.float64), alpha=0.5)
    assert weights.tolist() == pytest.approx([0.41791724, 0.31413572, 0.26794704])

    weights = torch.tensor([0.9, 0.05, 0.05], dtype=torch.float64)
    for _ in range(5):
        weights = update(weights, torch.ones(3, dtype=torch.float64), alpha=0.5)
    assert weights.tolist() == pytest.approx([0.35104167, 0.32447917, 0.32447917])


@given(
    st.lists(st.floats(0.5, 2000.0), min_size=2, max_size=6),
    st.floats(0.0, 1.0),
    st.floats(-5.0, 5.0),
)
def test_weights_are_a_distribution_with_a_floor_and_blind_to_a_constant(
    ratios: list[float], alpha: float, shift: float
) -> None:
    count = len(ratios)
    start, given_ratios = (
        torch.full((count,), 1 / count, dtype=torch.float64),
        torch.tensor(ratios, dtype=torch.float64),
    )
    found = update(start, given_ratios, alpha=alpha)
    assert found.sum().item() == pytest.approx(1.0)
    assert found.min().item() >= (1 - alpha) / count - 1e-12
    torch.testing.assert_close(update(start, given_ratios + shift, alpha=alpha), found)


def test_the_loss_is_the_forward_kl() -> None:
    student, teacher = logits(4, 6, 0), logits(4, 6, 1)
    torch.testing.assert_close(ddk(student, teacher, temperature=2.0), gkd(student, teacher, beta=0.0, temperature=2.0))
    with pytest.raises(MismatchError, match="one shape"):
        ddk(student, teacher[:, :5], temperature=1.0)


def rows(count: int = 12) -> Dataset:
    """Rows of two domains, two thirds of them of the first."""
    return Dataset.from_list(testing.rows(TASK, count)).add_column("domain", ["large", "large", "small"] * (count // 3))


def run(folder: Path, config: DDKConfig | None = None, fetched: int = 1, **settings: Any) -> tuple[Trainer, Domains]:
    config = config or DDKConfig(K=K)
    data = domains(rows(), held_out=rows(6), batch=BATCH, steps=STEPS, config=config, fetched=fetched)
    case = testing.Case("ddk", TASK, prepare=lambda *_: {"train_dataset": data})
    settings = {"max_steps": STEPS, "per_device_train_batch_size": BATCH} | settings
    trainer, _ = testing.trainer(case, folder, objective=DDK(config), **settings)
    return trainer, data


def test_the_first_rows_come_by_size_and_then_as_decided(tmp_path: Path) -> None:
    """The weights start from the untrained student's ratios; each decision continues them in the mixture's history."""
    asked: list[tuple[int, str, Tensor]] = []
    original = _Calls.evaluate

    def noted(self: _Calls, dataset: Any, who: Any) -> Tensor:
        found = original(self, dataset, who)
        asked.append((self.run.trainer.state.global_step, who, found))
        return found

    trainer, data = run(tmp_path)
    with mock.patch.object(_Calls, "evaluate", noted):
        trainer.train()

    teacher = torch.stack([found.double().mean() for _, who, found in asked if who == "teacher"]).exp()
    student = [found.double().mean() for _, who, found in asked if who == "student"]
    ratios = torch.stack(student).exp().view(-1, 2) / teacher
    assert len(teacher) == 2
    assert len(ratios) == 1 + STEPS // K
    assert data.history[0].tolist() == pytest.approx([2 / 3, 1 / 3])
    weights = initial(ratios[0])
    for interval, found in enumerate(ratios[1:], 1):
        weights = update(weights, found, alpha=0.5)
        if interval < len(data.history):
            torch.testing.assert_close(data.history[interval], weights)
    assert not torch.allclose(data.history[1], data.history[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_reads_the_same_rows(workers: int, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 5, "dataloader_num_workers": workers}
    settings["fetched"] = 1 + 2 * workers
    whole, data = run(tmp_path, **settings)
    whole.train()
    again, resumed = run(tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert torch.equal(data.history.nan_to_num(), resumed.history.nan_to_num())
    assert testing.weights_hash(again.model) == testing.weights_hash(whole.model)


def test_the_task_s_loss_and_a_fifth_of_the_kl(tmp_path: Path) -> None:
    trainer, _ = run(tmp_path, max_steps=1)
    trainer.train()
    (log,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert log["loss"] == pytest.approx(log["task_loss"] + log["distill_loss"], rel=1e-5)
    doubled, _ = run(tmp_path, DDKConfig(K=K, gamma=0.4), max_steps=1)
    doubled.train()
    assert doubled.state.log_history[0]["distill_loss"] == pytest.approx(2 * log["distill_loss"], rel=1e-5)


def test_other_data_or_another_config_is_refused(tmp_path: Path) -> None:
    trainer, _ = testing.trainer(testing.Case("ddk", TASK), tmp_path)
    with pytest.raises(ConfigurationError, match=r"train_dataset=domains"):
        trainer.train()
    trainer, data = run(tmp_path)
    data.config = DDKConfig(K=K + 1)
    with pytest.raises(ConfigurationError, match="the method's config"):
        trainer.train()


def test_domains_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"\['small'\]"):
        domains(rows(), held_out=rows(3).select([0, 1]), batch=1, steps=1)
    with pytest.raises(ConfigurationError, match="no column 'topic'"):
        domains(rows(), held_out=rows(), batch=1, steps=1, column="topic")


@pytest.mark.parametrize("settings", [{"K": 0}, {"alpha": 1.5}, {"gamma": -1.0}, {"gamma": math.inf}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="ddk"):
        DDK(**settings)


@pytest.mark.parametrize("name", ["initial", "update", "ddk"])
def test_each_function_is_reached(name: str, tmp_path: Path) -> None:
    trainer, _ = run(tmp_path)
    with mock.patch.object(module, name, side_effect=KeyError(name)), pytest.raises(KeyError):
        trainer.train()
