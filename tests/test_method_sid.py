"""SiD: two networks, gradients through the frozen teacher's input, killed and resumed with both."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from alone import output_of
from hf_compress_plugins.generative import sid as module
from hf_compress_plugins.generative._modeling_edm import EDMDenoiser, EDMDenoiserConfig
from hf_compress_plugins.generative.sid import SiD, few_steps, generate_images, generator_loss, level
from torch import Tensor
from transformers import Trainer, TrainingArguments

from hf_compress import DistillCallback, testing
from hf_compress.errors import ConfigurationError, MismatchError, ResumeError


def model(seed: int) -> EDMDenoiser:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return EDMDenoiser(EDMDenoiserConfig(image_size=4, hidden_size=16, num_hidden_layers=1, num_classes=3))


def run(folder: Path, method: Any = None, teacher: Any = None, **settings: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "max_steps": 4, "per_device_train_batch_size": 6, "report_to": [], "use_cpu": True, "logging_steps": 1,
        "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-3, "remove_unused_columns": False,
    }  # fmt: skip
    rows = [{"class_labels": place % 3} for place in range(24)]
    callback = DistillCallback(teacher or model(0), method or SiD(learning_rate=1e-3))
    made = Trainer(
        model=model(0),
        args=TrainingArguments(str(folder), **(defaults | {k: v for k, v in settings.items() if k != "resume"})),
        train_dataset=rows,
        callbacks=[callback],
    )
    made.callback = callback
    made.train(resume_from_checkpoint=settings.get("resume"))
    return made


def test_the_levels_leave_the_highest_fifth_out() -> None:
    ends = level(torch.tensor([0.0, 1.0]), sigma_min=0.002, sigma_max=80.0, t_max=1000.0)
    assert ends.tolist() == pytest.approx([0.002, 80.0], rel=1e-4)
    assert level(torch.ones(1), sigma_min=0.002, sigma_max=80.0, t_max=800.0).item() < 25


def test_the_loss_by_hand() -> None:
    """x = 1, f_φ = 3, f_ψ = 2: w = 2; α = 1: 1 · (2 - 1) / 2; α = 1.2: 1 · (2 - 1.2) / 2."""
    shape = (1, 1, 1, 1)
    given = (torch.ones(shape), torch.full(shape, 3.0), torch.full(shape, 2.0))
    assert generator_loss(*given, alpha=1.0).item() == pytest.approx(0.5)
    assert generator_loss(*given, alpha=1.2).item() == pytest.approx(0.4)
    with pytest.raises(MismatchError, match="image size"):
        generator_loss(given[0], torch.ones(1, 1, 2, 2), given[2], alpha=1.0)


def test_steps_go_down_from_the_first_level_with_fresh_noise() -> None:
    read: list[float] = []
    drawn = iter(torch.arange(1.0, 9.0))

    def denoise(sample: Tensor, sigma: Tensor) -> Tensor:
        read.append(float(sigma[0]))
        return torch.full_like(sample, 10.0)

    noisy, sigma = few_steps(
        denoise, lambda: torch.full((2, 1, 1, 1), float(next(drawn))), steps=3, of=4, sigma_init=2.0
    )
    assert read == [2.0, 1.5]
    assert sigma.tolist() == [1.0, 1.0]
    assert noisy.flatten().tolist() == [10.0 + 3.0] * 2
    with pytest.raises(ConfigurationError, match="at least 1"):
        few_steps(denoise, lambda: torch.zeros(1, 1, 1, 1), steps=0, of=4, sigma_init=2.0)


def test_the_student_and_the_fake_score_move_and_the_teacher_does_not(tmp_path: Path) -> None:
    teacher = model(0)
    before = testing.weights_hash(teacher)
    made = run(tmp_path, teacher=teacher)
    assert testing.weights_hash(teacher) == before
    assert all(parameter.grad is None for parameter in teacher.parameters())
    fake = made.callback.run.networks.modules["fake"]
    assert testing.weights_hash(fake) not in (before, testing.weights_hash(made.model))
    assert testing.weights_hash(made.model) != before
    assert not [name for name in made.model.state_dict() if "fake" in name or "distiller" in name]
    logged = [entry for entry in made.state.log_history if "network/fake" in entry]
    assert len(logged) == 4


def test_while_both_networks_are_one_nothing_is_learned(tmp_path: Path) -> None:
    """f_ψ = f_φ makes the loss 0 at every pixel: the first step's, before the fake score has moved."""
    made = run(tmp_path, SiD(learning_rate=1e-30), max_steps=1)
    assert made.state.log_history[0]["distill_loss"] == pytest.approx(0.0, abs=1e-4)


def test_the_gradient_runs_through_the_teacher_s_input(tmp_path: Path) -> None:
    """Without it other weights come out: two of the three paths are gone."""
    whole = run(tmp_path, max_steps=3)
    original = module.generator_loss

    def cut(image: Tensor, real: Tensor, fake: Tensor, *, alpha: float) -> Tensor:
        assert real.requires_grad
        assert fake.requires_grad
        return original(image, real.detach(), fake, alpha=alpha)

    with mock.patch.object(module, "generator_loss", cut):
        other = run(tmp_path, max_steps=3)
    assert testing.weights_hash(whole.model) != testing.weights_hash(other.model)


@pytest.mark.parametrize("steps", [1, 3])
def test_resumed_equals_uninterrupted_with_both_networks(steps: int, tmp_path: Path) -> None:
    method = SiD(learning_rate=1e-3, steps=steps)
    whole = run(tmp_path, method, save_strategy="steps", save_steps=2)
    again = run(tmp_path, method, resume=str(tmp_path / "checkpoint-2"))
    assert testing.weights_hash(again.model) == testing.weights_hash(whole.model)
    fakes = [made.callback.run.networks.modules["fake"] for made in (whole, again)]
    assert testing.weights_hash(fakes[0]) == testing.weights_hash(fakes[1])
    (tmp_path / "checkpoint-2/networks.safetensors").unlink()
    with pytest.raises(ResumeError, match="networks"):
        run(tmp_path, method, resume=str(tmp_path / "checkpoint-2"))


def test_killed_and_resumed(tmp_path: Path) -> None:
    """A process that is killed after a save goes on in another one as if it had not been."""
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import test_method_sid as t
from transformers import TrainerCallback
class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
original = t.DistillCallback
class Both(original):
    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
t.DistillCallback = Both
t.run(Path({str(tmp_path / "killed")!r}), save_strategy="steps", save_steps=2)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr[-2000:]
    whole = run(tmp_path / "whole")
    again = run(tmp_path / "killed", resume=str(tmp_path / "killed/checkpoint-2"))
    assert testing.weights_hash(again.model) == testing.weights_hash(whole.model)


def test_images_come_from_the_saved_generator(tmp_path: Path) -> None:
    made = run(tmp_path)
    made.save_model(str(tmp_path / "student"))
    call = "model(torch.ones(2, 1, 4, 4), torch.full((2,), 2.5), torch.tensor([0, 1])).sample"
    alone = output_of(tmp_path / "student", "AutoModel", call)
    labels = torch.tensor([0, 1])
    own = made.model.eval()(sample=torch.ones(2, 1, 4, 4), sigma=torch.full((2,), 2.5), class_labels=labels).sample
    torch.testing.assert_close(alone, own.detach())
    first, second = (generate_images(made.model, labels, count=2, steps=2, seed=3) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, generate_images(made.model, labels, count=2, steps=2, seed=4))


@pytest.mark.parametrize("settings", [{"alpha": 0.0}, {"steps": 0}, {"sigma_min": 100.0}, {"t_max": 0.0}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="sid"):
        SiD(**settings)


@pytest.mark.parametrize("name", ["level", "fake_level", "generator_loss", "fake_loss", "few_steps"])
def test_each_function_is_reached(name: str, tmp_path: Path) -> None:
    with mock.patch.object(module, name, side_effect=KeyError(name)), pytest.raises(KeyError):
        run(tmp_path)
