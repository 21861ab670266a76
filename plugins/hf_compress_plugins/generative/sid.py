"""Score identity distillation: a diffusion model into a generator of one or a few steps, without real images.

Zhou, Zheng, Wang, Yin, Huang: Score identity Distillation, ICML 2024, arXiv:2404.04057; Zhou, Gu, Wang: Few-Step
Diffusion via Score identity Distillation, 2025, arXiv:2505.12674.

    fake score:  (σ² + σ_d²) / (σ σ_d)² · ( f_ψ(x + σ ε, σ) - x )²,  σ = exp(1.2 n - 1.2)            x detached
    generator:   Σ (f_φ - f_ψ) · ( (f_φ - x) - α (f_φ - f_ψ) ) / w,  w = mean | x - f_φ | at least 10⁻⁵, no gradient
    σ of the generator's: (σ_max^{1/7} + (1 - u) (σ_min^{1/7} - σ_max^{1/7}))⁷,  u ~ U[0, 1) · t_max / 1000

f_φ is the frozen teacher's clean image at x + σ ε, f_ψ that of a network which learns the generator's own images. The
gradient runs through x directly and through the inputs of both networks; their weights are left alone by it. In each
iteration the fake score is trained first, then the generator sees it changed.

Of K steps a number k ≤ K is drawn once for all ranks; the first k - 1 run without gradient and the k-th, from their
image with fresh noise of σ_init (1 - i / K), is the one that learns (uniform mixture). Values may be negative.

Differences from the authors' code: rows with NaN stop the run instead of being dropped; there is no moving average of
the weights, let the learning rate decay; the latent and flow forms and the adversarial term with real images are not
built in.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from transformers import AutoConfig, AutoModel

from hf_compress.errors import ConfigurationError
from hf_compress.objective import Inputs, Needs, Objective, Signals, Sizes, Step, require_one_shape
from hf_compress.registry import Method
from hf_compress_plugins.generative._modeling_edm import EDMDenoiser, EDMDenoiserConfig

OUTPUT = "output.sample"
RHO = 7
Denoise = Callable[[Tensor, Tensor], Tensor]
"""From (image, sigma) to the clean image."""


@dataclass(frozen=True, kw_only=True)
class SiDConfig:
    """Hyper-parameters of SiD; the authors' for EDM."""

    alpha: float = 1.2
    """α; 1 … 1.2, beyond it training is unstable."""
    steps: int = 1
    """K."""
    sigma_init: float = 2.5
    """Of the noise that the generator starts from."""
    sigma_min: float = 0.002
    """Lowest noise level of the generator's loss."""
    sigma_max: float = 80.0
    """Highest noise level, were t_max 1000."""
    sigma_data: float = 0.5
    """σ_d, of the data."""
    t_max: float = 800.0
    """0 … 1000; the highest fifth of the levels is left out."""
    learning_rate: float = 1e-5
    """Of the fake score (Adam, β = 0 and 0.999); the authors' for CIFAR-10."""

    def __post_init__(self) -> None:
        positive = (self.alpha, self.sigma_init, self.sigma_min, self.sigma_data, self.learning_rate)
        if not all(0 < value < math.inf for value in positive) or self.steps < 1:
            raise ConfigurationError(f"sid: settings must be positive and finite, got {self}.")
        if not self.sigma_min < self.sigma_max < math.inf or not 0 < self.t_max <= 1000:
            raise ConfigurationError(f"sid: needs sigma_min < sigma_max and t_max in (0, 1000], got {self}.")


def level(u: Tensor, *, sigma_min: float, sigma_max: float, t_max: float) -> Tensor:
    """σ of the generator's loss from u in 0 … 1, of any shape; the smallest at u = 0."""
    low, high = sigma_min ** (1 / RHO), sigma_max ** (1 / RHO)
    found: Tensor = (high + (1 - u * t_max / 1000) * (low - high)) ** RHO
    return found


def fake_level(normal: Tensor) -> Tensor:
    """σ of the fake score's loss from standard normal draws."""
    return (1.2 * normal - 1.2).exp()


def generator_loss(image: Tensor, real: Tensor, fake: Tensor, *, alpha: float) -> Tensor:
    """The generator's loss at each pixel.

    Args:
        image: (image, channel, height, width) x.
        real: f_φ, as a function of x.
        fake: f_ψ, as a function of x.
        alpha: α.

    Returns:
        the same shape; sum it over pixels.

    Raises:
        MismatchError: if the shapes differ.
    """
    require_one_shape("sid", image, real, "Use a teacher of the student's image size.")
    weight = (image.detach() - real.detach()).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-5)
    return (real - fake) * ((real - image) - alpha * (real - fake)) / weight


def fake_loss(image: Tensor, denoised: Tensor, sigma: Tensor, *, sigma_data: float) -> Tensor:
    """The fake score's loss at each pixel; image is detached here, sigma (image, 1, 1, 1)."""
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return weight * (denoised - image.detach()).square()


def few_steps(
    denoise: Denoise, noise: Callable[[], Tensor], *, steps: int, of: int, sigma_init: float
) -> tuple[Tensor, Tensor]:
    """What the last of some steps reads: its noisy image and (image,) level.

    Args:
        denoise: the generator, called for the steps before the last.
        noise: draws a standard normal image batch.
        steps: k, 1 … of.
        of: K.
        sigma_init: level of the first step.
    """
    clean = torch.zeros_like(drawn := noise())
    for place in range(steps):
        sigma = torch.full((len(drawn),), sigma_init * (1 - place / of), dtype=drawn.dtype, device=drawn.device)
        noisy = clean + sigma.view(-1, 1, 1, 1) * drawn
        if place + 1 == steps:
            return noisy, sigma
        clean, drawn = denoise(noisy, sigma), noise()
    raise ConfigurationError(f"sid: steps must be at least 1, got {steps}.")


def generate_images(
    model: Any,
    class_labels: Tensor | None,
    *,
    count: int,
    steps: int = 1,
    of: int | None = None,
    seed: int = 0,
    sigma_init: float = 2.5,
) -> Tensor:
    """(image, channel, height, width) of a distilled generator.

    Args:
        model: with `image_size` and `num_channels` in its config.
        class_labels: (image,) conditions; None: none.
        count: how many images.
        steps: how many steps.
        of: K of its training; None: steps.
        seed: of the noise.
        sigma_init: as in training.
    """
    draw = torch.Generator(model.device).manual_seed(seed)
    side, channels = model.config.image_size, model.config.num_channels

    def noise() -> Tensor:
        return torch.randn(count, channels, side, side, generator=draw, device=model.device)

    def denoise(sample: Tensor, sigma: Tensor) -> Tensor:
        found: Tensor = model(sample=sample, sigma=sigma, class_labels=class_labels).sample
        return found

    with torch.no_grad():
        return denoise(*few_steps(denoise, noise, steps=steps, of=of or steps, sigma_init=sigma_init))


class SiD(Objective):
    """The generator's loss, with a network that learns the generator's own images."""

    Config = SiDConfig
    config: SiDConfig
    task_weight: ClassVar[float | None] = 0.0

    def needs(self, student: Sizes, teacher: Sizes | None) -> Needs:
        return Needs(student=frozenset({OUTPUT}), teacher=frozenset(), mean_over="examples")

    def networks(self, teacher: nn.Module | None) -> Mapping[str, tuple[nn.Module, Optimizer]]:
        if teacher is None:
            raise ConfigurationError("sid: the teacher must be a model; the fake score begins as a copy of it.")
        fake = copy.deepcopy(teacher).requires_grad_(True)
        for module in fake.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        return {"fake": (fake, Adam(fake.parameters(), lr=self.config.learning_rate, betas=(0.0, 0.999)))}

    def network_losses(self, inputs: Inputs, step: Step) -> Mapping[str, Tensor]:
        settings, draw = self.config, step.generator
        given: dict[str, Any] = self._start(inputs, step)
        with torch.no_grad():
            image = step.run_student(**given).sample
        normal = torch.randn(len(image), 1, 1, 1, generator=draw, device=image.device)
        sigma = fake_level(normal)
        noisy = image + sigma * torch.randn(image.shape, generator=draw, device=image.device)
        fake = step.networks["fake"](**self._conditions(inputs), sample=noisy, sigma=sigma.flatten()).sample
        values = fake_loss(image, fake, sigma, sigma_data=settings.sigma_data)
        return {"fake": values.sum() / len(image)}

    def batch(self, inputs: Inputs, step: Step) -> Inputs:
        return self._start(inputs, step)

    def _conditions(self, inputs: Inputs) -> Inputs:
        return {"class_labels": inputs["class_labels"]} if "class_labels" in inputs else {}

    def _start(self, inputs: Inputs, step: Step) -> Inputs:
        """What the step that learns reads, after k - 1 steps without gradient."""
        config: Any = getattr(step.student, "config", None)
        conditions: dict[str, Any] = dict(self._conditions(inputs))
        count = len(next(iter(inputs.values())))
        device = next(iter(inputs.values())).device
        shape = (count, config.num_channels, config.image_size, config.image_size)
        steps = int(torch.randint(1, self.config.steps + 1, (), generator=step.shared, device=step.shared.device))
        noisy, sigma = few_steps(
            lambda sample, sigma: step.run_student(sample=sample, sigma=sigma, **conditions).sample,
            lambda: torch.randn(shape, generator=step.generator, device=device),
            steps=steps,
            of=self.config.steps,
            sigma_init=self.config.sigma_init,
        )
        return {"sample": noisy, "sigma": sigma, **conditions}

    def forward(self, signals: Signals, step: Step) -> Tensor:
        settings, draw, image = self.config, step.generator, signals.student[OUTPUT]
        u = torch.rand(len(image), 1, 1, 1, generator=draw, device=image.device)
        sigma = level(u, sigma_min=settings.sigma_min, sigma_max=settings.sigma_max, t_max=settings.t_max)
        noisy = image + sigma * torch.randn(image.shape, generator=draw, device=image.device)
        given: dict[str, Any] = self._conditions(signals.inputs) | {"sample": noisy, "sigma": sigma.flatten()}
        real = step.run_teacher(grad=True, **given).sample
        fake = step.networks["fake"](**given).sample
        return generator_loss(image, real, fake, alpha=settings.alpha).sum((1, 2, 3))


AutoConfig.register("edm_denoiser", EDMDenoiserConfig, exist_ok=True)
AutoModel.register(EDMDenoiserConfig, EDMDenoiser, exist_ok=True)

METHOD = Method(
    title="Few-Step Diffusion via Score identity Distillation",
    paper="arXiv:2505.12674",
    authors="Mingyuan Zhou, Yi Gu, Zhendong Wang",
    year=2025,
    summary="A diffusion model into a generator of one or a few steps, without real images.",
    bibtex="""@misc{zhou2025fewstep,
  title = {Few-Step Diffusion via Score identity Distillation},
  author = {Zhou, Mingyuan and Gu, Yi and Wang, Zhendong},
  year = {2025}, eprint = {2505.12674}, archivePrefix = {arXiv}
}""",
    tasks=("unconditional-image-generation",),
    objective=SiD,
)
