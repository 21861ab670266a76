"""SiD: two networks, gradients through the frozen teacher's input, three forms, killed and resumed with all state."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from alone import output_of
from hf_compress_plugins.generative import _adversarial, _average
from hf_compress_plugins.generative import sid as module
from hf_compress_plugins.generative._adversarial import adversarial_loss, features_to_logits
from hf_compress_plugins.generative._average import Average, decay, trained
from hf_compress_plugins.generative._diffusion import (
    EDM,
    Flow,
    Latent,
    clean,
    few_steps,
    guided,
    image_shape,
    mix,
    scaled_linear,
    target,
)
from hf_compress_plugins.generative._modeling_edm import DenoiserOutput, EDMDenoiser, EDMDenoiserConfig
from hf_compress_plugins.generative.sid import (
    SiD,
    SiDConfig,
    fake_loss,
    fake_weight,
    flow_level,
    flow_weight,
    generate_images,
    generator_loss,
    level,
    scale,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from hf_compress import DistillCallback, testing
from hf_compress.errors import ConfigurationError, MismatchError, NumericalError, ResumeError

EMPTY = 3
"""Class of the empty prompt."""


class LatentConfig(PreTrainedConfig):
    model_type = "tiny_latent"

    def __init__(self, image_size: int = 4, num_channels: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.image_size, self.num_channels = image_size, num_channels


class LatentDenoiser(PreTrainedModel):
    """A network that is told a `timestep`; `calls` has the module and the classes of each call."""

    config_class = LatentConfig
    main_input_name = "sample"
    calls: ClassVar[list[tuple[nn.Module, list[int]]]] = []

    def __init__(self, config: LatentConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList([nn.Linear(17, 16)])
        self.classes = nn.Embedding(EMPTY + 1, 16)
        self.last = nn.Linear(16, 16)
        self.post_init()

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> DenoiserOutput:
        self.calls.append((self, class_labels.tolist()))
        told = timestep.view(-1, 1).to(sample.dtype) / 1000
        hidden = torch.tanh(self.layers[0](torch.cat([sample.flatten(1), told], 1)) + self.classes(class_labels))
        return DenoiserOutput(sample=self.last(hidden).view_as(sample))


def model(seed: int, form: str = "edm") -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if form != "edm":
            return LatentDenoiser(LatentConfig())
        return EDMDenoiser(EDMDenoiserConfig(image_size=4, hidden_size=16, num_hidden_layers=1, num_classes=3))


def run(
    folder: Path, method: Any = None, teacher: Any = None, callbacks: Any = (), student: Any = None, **settings: Any
) -> Trainer:
    """A trained Trainer; rows have classes, the empty class and a real image."""
    defaults: dict[str, Any] = {
        "max_steps": 4, "per_device_train_batch_size": 6, "report_to": [], "use_cpu": True, "logging_steps": 1,
        "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-3,
    }  # fmt: skip
    method = method or SiD(learning_rate=1e-3)
    images = 100 * torch.randn(24, 1, 4, 4, generator=torch.Generator().manual_seed(0))  # far from generated ones
    rows = [
        {"class_labels": place % 3, "empty_class_labels": EMPTY, "pixel_values": images[place]} for place in range(24)
    ]
    callback = DistillCallback(teacher or model(0, method.config.form), method)
    made = Trainer(
        model=student or model(0, method.config.form),
        args=TrainingArguments(str(folder), **(defaults | {k: v for k, v in settings.items() if k != "resume"})),
        train_dataset=rows,
        callbacks=[callback, *callbacks],
    )
    made.callback = callback
    LatentDenoiser.calls.clear()
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
    weight = 1 / scale(*given[:2])
    assert generator_loss(*given, alpha=1.0, weight=weight).item() == pytest.approx(0.5)
    assert generator_loss(*given, alpha=1.2, weight=weight).item() == pytest.approx(0.4)
    assert scale(given[0], given[0]).item() == pytest.approx(1e-5)


def test_the_fake_score_s_weights_by_hand() -> None:
    """σ = ½: (¼ + ¼) / (½ · ½)² = 8; ε: 1; v: snr / (snr + 1) = ᾱ."""
    assert fake_weight(EDM(), torch.tensor([0.5]), sigma_data=0.5).item() == pytest.approx(8.0)
    kept, at = torch.tensor([0.9, 0.3]), torch.tensor([0, 1])
    assert fake_weight(Latent(alphas_cumprod=kept), at, sigma_data=0.5).flatten().tolist() == [1.0, 1.0]
    velocity = Latent(alphas_cumprod=kept, prediction="v_prediction")
    assert fake_weight(velocity, at, sigma_data=0.5).flatten().tolist() == pytest.approx([0.9, 0.3])
    assert fake_loss(torch.tensor([3.0]), torch.tensor([1.0]), weight=torch.tensor(2.0)).item() == 8.0


def test_the_flow_form_s_levels_and_weights_by_hand() -> None:
    assert flow_level(torch.zeros(1)).item() == pytest.approx(2 / 3)
    assert flow_level(torch.ones(1)).item() == pytest.approx(1 / (1 + math.exp(-math.log(2) - 1.6)))
    quarter = torch.tensor([0.25])
    wanted = {
        "1_minus_sigma": 0.75,
        "1_minus_sigma_squared": 0.5625,
        "1/sigma": 4.0,
        "1/sigma_squared": 16.0,
        "ratio": 3.0,
        "ratio_squared": 9.0,
    }
    for name, value in wanted.items():
        assert flow_weight(quarter, name).item() == pytest.approx(value), name  # type: ignore[arg-type]  # the names


LATENT = Latent(alphas_cumprod=scaled_linear())
PROCESSES = [
    (EDM(), torch.tensor([0.1, 2.5])),
    (LATENT, torch.tensor([20, 625])),
    (Latent(alphas_cumprod=scaled_linear(), prediction="v_prediction"), torch.tensor([20, 625])),
    (Flow(), torch.tensor([0.3, 1.0])),
]


@pytest.mark.parametrize(("process", "levels"), PROCESSES)
def test_a_perfect_prediction_means_the_image(process: Any, levels: Tensor) -> None:
    draw = torch.Generator().manual_seed(0)
    image, noise = (torch.randn(2, 1, 3, 3, generator=draw) for _ in range(2))
    noisy = mix(process, image, noise, levels)
    found = clean(process, target(process, image, noise, levels), noisy, levels)
    torch.testing.assert_close(found, image, rtol=1e-4, atol=1e-4)
    a, b = process.parts(levels)
    torch.testing.assert_close(noisy, a * image + b * noise)


def test_what_networks_are_told_of_the_level() -> None:
    assert EDM().told(torch.tensor([2.5]))["sigma"].item() == 2.5
    assert LATENT.told(LATENT.level(468.75, torch.zeros(1)))["timestep"].item() == 468
    assert Flow().told(torch.tensor([0.25]))["timestep"].item() == 250.0


def test_guidance_by_hand() -> None:
    """p_y = 3, p_∅ = 1; networks are asked no more than κ needs."""
    asked: list[str] = []

    def predict(given: Any) -> Tensor:
        asked.extend(given)
        return torch.tensor(3.0 if "y" in given else 1.0)

    values = {
        kappa: guided(predict, {"y": torch.zeros(1)}, {"∅": torch.zeros(1)}, kappa).item()
        for kappa in (1.0, 0.0, 2.0, -1.0)
    }
    assert values == {1.0: 3.0, 0.0: 1.0, 2.0: 5.0, -1.0: -1.0}
    assert "".join(asked) == "y" + "∅" + "∅y" + "∅y"


def test_steps_go_down_from_the_first_level_with_fresh_noise() -> None:
    read: list[float] = []
    drawn = iter(torch.arange(1.0, 9.0))

    def denoise(sample: Tensor, sigma: Tensor) -> Tensor:
        read.append(float(sigma[0]))
        return torch.full_like(sample, 10.0)

    def noise() -> Tensor:
        return torch.full((2, 1, 1, 1), float(next(drawn)))

    noisy, sigma = few_steps(EDM(), denoise, noise, start=2.0, steps=3, of=4)
    assert read == [2.0, 1.5]
    assert sigma.tolist() == [1.0, 1.0]
    assert noisy.flatten().tolist() == [10.0 + 3.0] * 2
    for steps in (0, 5):
        with pytest.raises(ConfigurationError, match="1 … 4"):
            few_steps(EDM(), denoise, noise, start=2.0, steps=steps, of=4)


@pytest.mark.parametrize(("renoise", "noise"), [("fixed", 2.0), ("ddim", 4 / 3)])
def test_later_noise_may_be_the_first_one_or_what_the_image_implies(renoise: Any, noise: float) -> None:
    """Levels 1, ¾, ½; x = 2, D = 4; x = ¼ 4 + ¾ 2 = 2.5, D = 6, which implies (2.5 - ¼ 6) / ¾; x = ½ 6 + ½ ε."""
    images, drawn = iter([4.0, 6.0]), iter([torch.full((1, 1, 1, 1), 2.0)])
    noisy, _ = few_steps(
        Flow(),
        lambda sample, _: torch.full_like(sample, next(images)),
        lambda: next(drawn),
        start=1.0,
        steps=3,
        of=4,
        renoise=renoise,
    )
    assert noisy.item() == pytest.approx(3 + noise / 2)


def test_the_images_shape_in_two_dialects() -> None:
    assert image_shape(SimpleNamespace(num_channels=1, image_size=8)) == (1, 8, 8)
    assert image_shape(SimpleNamespace(in_channels=4, sample_size=(64, 32))) == (4, 64, 32)
    with pytest.raises(ConfigurationError, match="sample_size"):
        image_shape(SimpleNamespace(in_channels=4))


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


@pytest.mark.parametrize("form", ["edm", "latent", "flow"])
def test_while_both_networks_are_one_nothing_is_learned(form: Any, tmp_path: Path) -> None:
    """f_ψ = f_φ makes the loss 0 at every pixel: the first step's, before the fake score has moved."""
    made = run(tmp_path, SiD(learning_rate=1e-30, form=form), max_steps=1)
    assert made.state.log_history[0]["distill_loss"] == pytest.approx(0.0, abs=1e-4)


def test_the_gradient_runs_through_the_teacher_s_input(tmp_path: Path) -> None:
    """Without it other weights come out: two of the three paths are gone."""
    whole = run(tmp_path, max_steps=3)
    original = module.generator_loss

    def cut(image: Tensor, real: Tensor, fake: Tensor, **settings: Any) -> Tensor:
        assert real.requires_grad
        assert fake.requires_grad
        return original(image, real.detach(), fake, **settings)

    with mock.patch.object(module, "generator_loss", cut):
        other = run(tmp_path, max_steps=3)
    assert testing.weights_hash(whole.model) != testing.weights_hash(other.model)


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 1},
        {"steps": 3, "ema_half_life": None},
        {"steps": 3, "form": "latent", "kappa1": 2.0, "kappa2": 2.0, "kappa4": 2.0},
        {"real": "pixel_values", "gan_start": 0.015},
    ],
)
def test_resumed_equals_uninterrupted_with_both_networks(settings: dict[str, Any], tmp_path: Path) -> None:
    method = SiD(learning_rate=1e-3, **settings)
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


@pytest.mark.slow
def test_images_come_from_the_saved_generator(tmp_path: Path) -> None:
    made = run(tmp_path)
    made.save_model(str(tmp_path / "student"))
    call = "model(torch.ones(2, 1, 4, 4), torch.full((2,), 2.5), torch.tensor([0, 1])).sample"
    alone = output_of(tmp_path / "student", "AutoModel", call)
    labels = torch.tensor([0, 1])
    own = made.model.eval()(sample=torch.ones(2, 1, 4, 4), sigma=torch.full((2,), 2.5), class_labels=labels).sample
    torch.testing.assert_close(alone, own.detach())
    given: dict[str, Any] = {"count": 2, "steps": 2, "config": SiDConfig(steps=2)}
    conditions = {"class_labels": labels}
    first, second = (generate_images(made.model, conditions, seed=3, **given) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, generate_images(made.model, conditions, seed=4, **given))
    with pytest.raises(ConfigurationError, match="steps"):
        generate_images(made.model, conditions, count=2, steps=2)


class Watch(TrainerCallback):
    """The student's weights after each step, before the method's own callback has looked at them or after: the same."""

    def __init__(self) -> None:
        self.weights: list[list[Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights.append([p.detach().clone() for p in trained(kwargs["model"])])


def test_decay_by_hand() -> None:
    """Half-life of 5 % of 1,000 images is 50; never more than 2,000."""
    settings = {"half_life": 2.0, "ramp_up": 0.05}
    assert decay(1000, 50, **settings) == pytest.approx(0.5)
    assert decay(10**9, 1000, **settings) == pytest.approx(0.5**0.5)
    assert decay(0, 50, **settings) == 0.0


def test_what_is_averaged_is_what_the_student_itself_learns() -> None:
    student = nn.ModuleDict({"own": nn.Linear(2, 1), "fixed": nn.Linear(2, 1), "distiller": nn.Linear(2, 1)})
    student["fixed"].requires_grad_(False)
    assert [id(p) for p in trained(student)] == [id(p) for p in student["own"].parameters()]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_saved_student_is_the_average_of_its_weights(accumulation: int, tmp_path: Path) -> None:
    watch = Watch()
    made = run(
        tmp_path,
        callbacks=[watch],
        per_device_train_batch_size=6 // accumulation,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
    )
    average = watch.weights[0]
    for place, weights in enumerate(watch.weights):
        beta = 0.5 ** (6 / (0.05 * 6 * place)) if place else 0.0
        average = [beta * old + (1 - beta) * new for old, new in zip(average, weights, strict=True)]
    made.save_model(str(tmp_path / "student"))
    stored = load_file(tmp_path / "student/model.safetensors")
    assert not [name for name in stored if "distiller" in name]
    names = [name for name, _ in made.model.named_parameters()]
    torch.testing.assert_close([stored[name] for name in names], average)
    assert not torch.allclose(average[0], watch.weights[-1][0], rtol=1e-7, atol=1e-9)
    own = made.callback.run.distiller["0_sid"].average
    assert own.images.item() == 24


@pytest.mark.parametrize("resumed", [False, True])
def test_without_an_average_the_last_weights_come_out(resumed: bool, tmp_path: Path) -> None:
    """Also where the checkpoint has one."""
    watch = Watch()
    if resumed:
        run(tmp_path, save_strategy="steps", save_steps=2)
    folder = {"resume": str(tmp_path / "checkpoint-2")} if resumed else {}
    made = run(tmp_path, SiD(learning_rate=1e-3, ema_half_life=None), callbacks=[watch], **folder)
    torch.testing.assert_close([p.detach() for p in trained(made.model)], watch.weights[-1], rtol=0, atol=0)


def test_a_second_training_starts_its_average_anew(tmp_path: Path) -> None:
    watch = Watch()
    made = run(tmp_path, callbacks=[watch], max_steps=1)
    made.train()
    torch.testing.assert_close([p.detach() for p in trained(made.model)], watch.weights[-1], rtol=0, atol=0)


def test_the_average_is_in_checkpoints_and_missed_when_it_is_not(tmp_path: Path) -> None:
    run(tmp_path / "with", save_strategy="steps", save_steps=2)
    stored = load_file(tmp_path / "with/checkpoint-2/model.safetensors")
    weights = sum(tensor.numel() for name, tensor in stored.items() if "distiller" not in name)
    assert stored["distiller.0_sid.average._extra_state"].shape == (weights,)
    assert stored["distiller.0_sid.average.images"].item() == 12
    run(tmp_path / "none", SiD(ema_half_life=None), save_strategy="steps", save_steps=2)
    with pytest.raises(ResumeError, match="ema_half_life"):
        run(tmp_path / "none", resume=str(tmp_path / "none/checkpoint-2"))


def test_images_are_counted_over_processes_and_micro_batches() -> None:
    average = Average(None)
    average.count(3, micro=0)
    average.count(2, micro=1)
    with mock.patch.object(_average, "reduce", lambda count, reduction: count * 2):
        average.update(nn.Linear(1, 1))
    average.count(4, micro=0)
    average.update(nn.Linear(1, 1))
    assert average.images.item() == 14


def test_one_number_of_steps_serves_both_losses_and_all_micro_batches(tmp_path: Path) -> None:
    drawn: list[int] = []
    original = module.few_steps

    def watched(*args: Any, **settings: Any) -> Any:
        drawn.append(settings["steps"])
        return original(*args, **settings)

    with mock.patch.object(module, "few_steps", watched):
        run(tmp_path, SiD(steps=4), max_steps=6, gradient_accumulation_steps=2)
    windows = [set(drawn[place : place + 4]) for place in range(0, len(drawn), 4)]
    assert len(windows) == 6
    assert all(len(window) == 1 for window in windows)
    assert len(set(drawn)) > 1


def calls_of(made: Trainer) -> dict[str, list[list[int]]]:
    """Classes of each call of the fake score and of the teacher."""
    run_ = made.callback.run  # type: ignore[attr-defined]  # set by `run`
    who = {id(run_.networks.modules["fake"]): "fake", id(run_.teacher.model): "teacher", id(made.model): "student"}
    found: dict[str, list[list[int]]] = {"fake": [], "teacher": [], "student": []}
    for caller, labels in LatentDenoiser.calls:
        found[who[id(caller)]].append(labels)
    return found


def test_an_output_with_the_loss_survives_being_taken_apart_as_ddp_does() -> None:
    output = DenoiserOutput(sample=torch.zeros(1))
    output["loss"] = torch.ones(1)
    again = tree_unflatten(*tree_flatten(output))
    assert again.loss.item() == 1.0


def test_zero_guidance_asks_the_fake_score_without_prompts_and_the_teacher_with_them(tmp_path: Path) -> None:
    calls = calls_of(run(tmp_path, SiD(form="latent", kappa1=0.0, kappa2=0.0, real="pixel_values"), max_steps=2))
    assert calls["fake"] == [[EMPTY] * 6] * 6
    assert len(calls["teacher"]) == 2
    assert not any(EMPTY in labels for labels in calls["teacher"] + calls["student"])


def test_guided_networks_are_asked_twice_and_prompts_are_dropped_where_the_fake_score_learns(tmp_path: Path) -> None:
    settings: Any = {"form": "latent", "kappa1": 1.0, "kappa2": 2.0, "kappa4": 2.0}
    calls = calls_of(run(tmp_path, SiD(drop=1.0, **settings), max_steps=1))
    learned, *asked = calls["fake"]
    assert learned == [EMPTY] * 6
    assert [EMPTY in labels for labels in asked] == [True, False]
    assert [EMPTY in labels for labels in calls["teacher"]] == [True, False]
    kept = calls_of(run(tmp_path, SiD(drop=0.0, **settings), max_steps=1))["fake"][0]
    assert EMPTY not in kept
    some = calls_of(run(tmp_path, SiD(drop=0.5, **settings), max_steps=4))["fake"]
    assert {EMPTY in labels and len(set(labels)) > 1 for labels in some[::3]} == {True}
    plain = calls_of(run(tmp_path, SiD(form="latent", drop=1.0), max_steps=1))["fake"]
    assert [EMPTY in labels for labels in plain] == [False, False]


def test_both_losses_stay_between_the_lowest_and_the_highest_step(tmp_path: Path) -> None:
    read: list[list[int]] = []
    original = Latent.parts

    def parts(self: Latent, level: Tensor) -> tuple[Tensor, Tensor]:
        read.append(sorted(set(level.tolist())))
        return original(self, level)

    with mock.patch.object(Latent, "parts", parts):
        run(tmp_path, SiD(form="latent", t_low=30, t_high=31), max_steps=8)
    assert {step for steps in read for step in steps} == {625, 30, 31}


@pytest.mark.parametrize("form", ["latent", "flow"])
def test_guidance_changes_what_is_learned(form: Any, tmp_path: Path) -> None:
    found = {
        kappas: testing.weights_hash(
            run(
                tmp_path,
                SiD(form=form, **dict(zip(("kappa1", "kappa2", "kappa4"), kappas, strict=True))),
                max_steps=2,
            ).model
        )
        for kappas in ((1.0, 1.0, 1.0), (2.0, 2.0, 2.0), (2.0, 2.0, 1.0), (1.0, 2.0, 2.0), (-1.0, -1.0, 1.0))
    }
    assert len(set(found.values())) == len(found)


def test_a_batch_without_the_empty_prompt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="empty_texts"):
        run(tmp_path, SiD(form="latent", kappa4=2.0, conditions=("texts",)))
    with pytest.raises(MismatchError, match="photos"):
        run(tmp_path, SiD(real="photos"))


def test_velocity_and_other_weightings_and_schedules_are_heard(tmp_path: Path) -> None:
    variants: list[dict[str, Any]] = [
        {"form": "latent"},
        {"form": "latent", "prediction": "v_prediction"},
        {"form": "latent", "alphas_cumprod": torch.linspace(0.99, 0.01, 1000).tolist()},
        {"form": "latent", "t_init": 300},
        {"form": "latent", "t_low": 500},
        {"form": "flow"},
        {"form": "flow", "weighting": "sid_legacy"},
        {"form": "flow", "weighting": "ratio"},
    ]
    found = [testing.weights_hash(run(tmp_path, SiD(**settings), max_steps=2).model) for settings in variants]
    assert len(set(found)) == len(variants)


class Spoilt(LatentDenoiser):
    """NaN for the images of class 1, in the frozen teacher alone or in the fake score, its copy, too."""

    both: ClassVar[bool] = False

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> DenoiserOutput:
        found = super().forward(sample, timestep, class_labels).sample
        if self.both or not self.last.weight.requires_grad:
            factor = torch.where(class_labels == 1, torch.nan, 1.0)
            found = found * factor.view(-1, 1, 1, 1)
        return DenoiserOutput(sample=found)


def spoilt() -> Spoilt:
    teacher = Spoilt(LatentConfig())
    teacher.load_state_dict(model(1, "latent").state_dict())
    return teacher


@pytest.mark.parametrize(("both", "name"), [(False, "sid"), (True, "fake")])
def test_images_with_nan_are_left_out_if_asked_for_and_else_stop_the_run(
    both: bool, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With both spoilt the gradient of the fake score's last layer is NaN, and 0 then."""
    monkeypatch.setattr(Spoilt, "both", both)
    teacher = spoilt()
    with pytest.raises(NumericalError, match=name):
        run(tmp_path, SiD(form="latent"), teacher=teacher)
    made = run(tmp_path, SiD(form="latent", drop_nan=True, learning_rate=1e-3), teacher=teacher)
    assert all(parameter.isfinite().all() for parameter in made.model.parameters())
    assert not torch.equal(made.model.last.weight, model(0, "latent").last.weight)
    fake = made.callback.run.networks.modules["fake"]
    assert all(parameter.isfinite().all() for parameter in fake.parameters())
    assert both == torch.equal(fake.last.weight, teacher.last.weight)


class Flaky(LatentDenoiser):
    """NaN for the images of class 1 where no gradient is asked for, as in the images that the fake score learns."""

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> DenoiserOutput:
        found = super().forward(sample, timestep, class_labels).sample
        spoil = (class_labels == 1).view(-1, 1, 1, 1) & (not torch.is_grad_enabled())
        return DenoiserOutput(sample=found.masked_fill(spoil, torch.nan))


def test_the_fake_score_learns_from_the_images_without_nan(tmp_path: Path) -> None:
    teacher, student = model(0, "latent"), Flaky(LatentConfig())
    student.load_state_dict(teacher.state_dict())
    made = run(tmp_path, SiD(form="latent", drop_nan=True, learning_rate=1e-3), teacher, student=student, max_steps=1)
    fake = made.callback.run.networks.modules["fake"]
    assert not torch.equal(fake.last.weight, teacher.last.weight)
    assert fake.last.weight.isfinite().all()


def test_the_generator_s_weight_is_told_by_the_teacher(tmp_path: Path) -> None:
    seen: list[bool] = []
    original = module.generator_loss

    def watched(image: Tensor, real: Tensor, fake: Tensor, *, alpha: float, weight: Tensor) -> Tensor:
        seen.append(torch.equal(weight, 1 / scale(image, real)))
        return original(image, real, fake, alpha=alpha, weight=weight)

    with mock.patch.object(module, "generator_loss", watched):
        run(tmp_path)
    assert seen == [True] * 4


@pytest.mark.parametrize(("name", "logged_as"), [("generator_loss", "distill/sid"), ("fake_loss", "network/fake")])
def test_the_divisor_stays_the_whole_batch(
    name: str, logged_as: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where images are NaN each loss is the sum over the others by all six."""
    monkeypatch.setattr(Spoilt, "both", True)
    kept: list[Tensor] = []
    original = getattr(module, name)

    def watched(*args: Any, **settings: Any) -> Tensor:
        kept.append((values := original(*args, **settings)).detach())
        return values

    with mock.patch.object(module, name, watched):
        made = run(tmp_path, SiD(form="latent", drop_nan=True, learning_rate=1e-3), teacher=spoilt())
    logged = [entry[logged_as] for entry in made.state.log_history if logged_as in entry]
    assert logged == pytest.approx([float(values.sum()) / 6 for values in kept], rel=1e-4)
    assert {len(values) for values in kept} - {6}


def test_features_become_one_logit_a_place() -> None:
    image = torch.arange(8.0).view(1, 2, 2, 2)
    assert features_to_logits(image).flatten().tolist() == [2.0, 3.0, 4.0, 5.0]
    assert features_to_logits(torch.tensor([[[1.0, 3.0], [5.0, 7.0]]])).flatten().tolist() == [2.0, 6.0]
    assert features_to_logits(torch.tensor([[1.0, 3.0]])).shape == (1, 1, 1, 1)


def test_the_adversarial_loss_by_hand() -> None:
    """BCE(0, 1) = ln 2; a logit of -50 counts as -10."""
    weight = torch.ones(2, 1, 1, 1)
    logits = torch.tensor([0.0, -50.0]).view(2, 1, 1, 1)
    each = adversarial_loss(logits, weight=weight, over=(1, 2, 3)).flatten()
    assert each.tolist() == pytest.approx([math.log(2), math.log1p(math.exp(10))])
    both = adversarial_loss(logits, weight=weight, over=(0, 1, 2, 3)).flatten()
    assert both.tolist() == pytest.approx([each.mean().item()] * 2)


@pytest.mark.parametrize("form", ["edm", "flow"])
def test_the_adversarial_term_begins_after_some_images(form: Any, tmp_path: Path) -> None:
    """12 of them: the third step's is the first."""
    made = run(tmp_path, SiD(form=form, real="pixel_values", gan_start=0.012, lsg_gan=1.0))
    logged = [entry for entry in made.state.log_history if "network/discriminator" in entry]
    assert [entry["distill/sid.adversarial"] > 0 for entry in logged] == [False, False, True, True]
    assert [entry["distill/sid.adversarial"] == 0 for entry in logged] == [True, True, False, False]
    fake = made.callback.run.networks.modules["fake"]
    assert not any(layer._forward_hooks for layer in fake.modules())
    without = run(tmp_path, SiD(form=form))
    assert testing.weights_hash(without.model) != testing.weights_hash(made.model)


def test_both_terms_are_halved_once_the_adversarial_one_has_begun(tmp_path: Path) -> None:
    """ℓ is 1 at each of 16 pixels and the adversarial loss 1 an image."""

    def ones(image: Tensor, *args: Any, **settings: Any) -> Tensor:
        return torch.ones_like(image) + 0 * image

    def one(logits: Tensor, *, weight: Tensor, over: Any) -> Tensor:
        return torch.ones_like(weight) + 0 * logits.mean()

    with mock.patch.object(module, "generator_loss", ones), mock.patch.object(module, "adversarial_loss", one):
        made = run(tmp_path, SiD(real="pixel_values", gan_start=0.012, lsg_gan=0.1))
    logged = [entry for entry in made.state.log_history if "distill/sid" in entry]
    assert [entry["distill/sid"] for entry in logged] == pytest.approx([16.0, 16.0, 8.0, 8.0])
    assert [entry["distill/sid.adversarial"] for entry in logged] == pytest.approx([0.0, 0.0, 0.8, 0.8])


@pytest.mark.parametrize(
    ("settings", "over"), [({}, (0, 1, 2, 3)), ({"form": "latent", "prediction": "v_prediction"}, (1, 2, 3))]
)
def test_the_discriminator_s_weight_and_its_mean_over_the_batch_are_those_of_the_edm_form(
    settings: dict[str, Any], over: tuple[int, ...], tmp_path: Path
) -> None:
    seen: list[tuple[bool, Any]] = []
    original = module.discriminator_loss

    def watched(real: Tensor, fake: Tensor, *, weight: Tensor, over: Any) -> Tensor:
        seen.append((bool((weight == 1).all()), over))
        return original(real, fake, weight=weight, over=over)

    with mock.patch.object(module, "discriminator_loss", watched):
        run(tmp_path, SiD(real="pixel_values", **settings), max_steps=1)
    assert seen == [(bool(settings), over)]


def test_the_discriminator_tells_real_from_generated_images_in_that_order(tmp_path: Path) -> None:
    """Real images are a hundred times larger, and the layer that is read is linear in them."""
    seen: list[tuple[float, float]] = []
    original = module.discriminator_loss

    def watched(real: Tensor, fake: Tensor, **settings: Any) -> Tensor:
        seen.append((float(real.detach().std()), float(fake.detach().std())))
        return original(real, fake, **settings)

    with mock.patch.object(module, "discriminator_loss", watched):
        run(tmp_path, SiD(real="pixel_values", bottleneck="first"))
    assert all(real > 10 * fake for real, fake in seen)


def test_the_bottleneck_is_the_middle_layer_or_the_named_one(tmp_path: Path) -> None:
    deep = EDMDenoiser(EDMDenoiserConfig(image_size=4, hidden_size=8, num_hidden_layers=3))
    assert _adversarial.bottleneck(deep, None) is deep.layers[1]
    assert _adversarial.bottleneck(deep, "noise.0") is deep.noise[0]
    with pytest.raises(ConfigurationError, match="mid_block"):
        run(tmp_path, SiD(real="pixel_values", bottleneck="mid_block"))
    with pytest.raises(ConfigurationError, match="Linear"):
        _adversarial.bottleneck(nn.Linear(1, 1), None)
    other = [
        testing.weights_hash(
            run(tmp_path, SiD(real="pixel_values", bottleneck=name)).callback.run.networks.modules["fake"]
        )
        for name in ("layers.0", "first")
    ]
    assert other[0] != other[1]


def test_a_tuple_s_first_output_is_the_bottleneck_s() -> None:
    class Pair(nn.Module):
        def forward(self, given: Tensor) -> tuple[Tensor, int]:
            return given, 0

    pair = Pair()
    with _adversarial.watched(pair) as seen:
        pair(torch.ones(1))
    pair(torch.ones(1))
    assert [tensor.item() for tensor in seen] == [1.0]


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": 0.0},
        {"steps": 0},
        {"sigma_min": 100.0},
        {"t_max": 0.0},
        {"form": "pixels"},
        {"form": "latent", "prediction": "sample"},
        {"form": "latent", "weighting": "ratio"},
        {"renoise": "never"},
        {"t_low": 980},
        {"alphas_cumprod": [0.9, 0.5]},
        {"kappa2": math.nan},
        {"drop": 1.5},
        {"ema_half_life": 0.0},
        {"gan_start": -1.0},
        {"lsg_gan": 0.0},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="sid"):
        SiD(**settings)


REACHED = {
    "level": {},
    "fake_level": {},
    "generator_loss": {},
    "fake_loss": {},
    "fake_weight": {},
    "scale": {},
    "few_steps": {},
    "clean": {},
    "mix": {},
    "target": {},
    "guided": {},
    "scaled_linear": {"form": "latent"},
    "flow_level": {"form": "flow"},
    "flow_weight": {"form": "flow"},
    "dropped": {"form": "latent", "kappa1": 2.0},
    "whole": {"drop_nan": True},
    "features_to_logits": {"real": "pixel_values"},
    "adversarial_loss": {"real": "pixel_values"},
    "discriminator_loss": {"real": "pixel_values"},
}


@pytest.mark.parametrize("name", REACHED)
def test_each_function_is_reached(name: str, tmp_path: Path) -> None:
    with mock.patch.object(module, name, side_effect=KeyError(name)), pytest.raises(KeyError):
        run(tmp_path, SiD(**REACHED[name]))


@pytest.mark.parametrize(("place", "name"), [(_average, "decay"), (_average, "trained"), (_adversarial, "verdict")])
def test_each_shared_function_is_reached(place: Any, name: str, tmp_path: Path) -> None:
    with mock.patch.object(place, name, side_effect=KeyError(name)), pytest.raises(KeyError):
        run(tmp_path, SiD(real="pixel_values"))
