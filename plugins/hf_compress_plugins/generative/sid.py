"""Score identity distillation: a diffusion model into a generator of one or a few steps; real images are optional.

Zhou, Zheng, Wang, Yin, Huang: Score identity Distillation, ICML 2024, arXiv:2404.04057; SiD-LSG (guidance), ICLR 2025,
arXiv:2406.01561; SiDA (real images), ICLR 2025, arXiv:2410.14919; Zhou, Gu, Wang: Few-Step Diffusion via Score identity
Distillation, 2025, arXiv:2505.12674.

    fake score:    v(t) · ( p_ψ(x_t) - p )²                                                     x detached
    generator:     ℓ = Σ (f_φ - f_ψ) · ( (f_φ - x) - α (f_φ - f_ψ) ) / w,   w = mean | x - f_φ | ≥ 10⁻⁵, no gradient
    discriminator: ½ v(t) · ( BCE(d(real_t), 1) + BCE(d(x_t), 0) ),  added to the fake score's
    with it:       ½ ℓ + ½ lsg_gan · C H W · BCE(d(x_t) in -10 … 10, 1) / w

x_t = a x + b ε; p is what the networks predict, f the image that a prediction means, d the channel mean of the fake
network's bottleneck. f_φ is the frozen teacher's, f_ψ that of a network which learns the generator's own images. The
gradient runs through x directly and through the inputs of both networks; their weights are left alone by it. In each
iteration the fake score is trained first, then the generator sees it changed. Values may be negative.

    form    p               v(t)                    t of the fake score         t of the generator
    edm     x               (σ²+σ_d²)/(σσ_d)²       σ = exp(1.2 n - 1.2)        σ = (u-th of the Karras levels)
    latent  ε or v          1, or ᾱ for v           U{20 … 979}                 U{20 … 979}
    flow    ε - x           1                       sigmoid(ln 2 + 1.6 n)       sigmoid(ln 2 + 1.6 n)

Karras levels: (σ_max^{1/7} + (1 - u) (σ_min^{1/7} - σ_max^{1/7}))⁷, u ~ U[0, 1) · t_max / 1000. The generator starts
at σ_init, t_init or 1.

Of K steps a number k ≤ K is drawn once for all ranks and both losses; the first k - 1 run without gradient and the
k-th, from their image with fresh noise of level i / K further down, is the one that learns (uniform mixture).

Guidance p_∅ + κ (p_y - p_∅), with κ1 when the fake score is trained, κ2 = κ3 where the generator's loss asks it, κ4 for
the teacher: all equal and above 1 is long-short guidance; κ4 = 1 and 0 else Zero-CFG; below 0 in the fake score
Anti-CFG. Each batch then holds a column `empty_NAME` beside the condition NAME: the empty prompt of each row.

The student's weights are averaged over the run, and the average is what comes out at its end (`_average.py`); it makes
checkpoints twice as large, and those hold the weights of the moment beside it. `ema_half_life=None` keeps none.

Differences from the authors' code. A NaN stops the run unless `drop_nan`. Then gradients that are not finite are set
to 0 or ±10⁵ at x and at the fake score's weights; at the student's weights they are the Trainer's affair. Gradients
are not clipped by value in half precision; the Trainer clips by norm. ℓ is not scaled (100 for CIFAR-10), which Adam
does not see. The flow form's fake score has flow matching's plain error. The discriminator's weight v and the mean over
the batch in its losses are those of the edm form; elsewhere the mean is each image's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from transformers import AutoConfig, AutoModel

from hf_compress.errors import ConfigurationError
from hf_compress.objective import Inputs, Needs, Objective, Signals, Sizes, Step, batch_size, require_one_shape
from hf_compress.registry import Method
from hf_compress_plugins.generative._adversarial import (
    adversarial_loss,
    bottleneck,
    discriminator_loss,
    features_to_logits,
    watched,
)
from hf_compress_plugins.generative._average import Average
from hf_compress_plugins.generative._diffusion import (
    EDM,
    Conditions,
    Flow,
    Latent,
    Process,
    Renoise,
    clean,
    dropped,
    few_steps,
    guided,
    image_shape,
    mix,
    scaled_linear,
    target,
)
from hf_compress_plugins.generative._modeling_edm import EDMDenoiser, EDMDenoiserConfig

OUTPUT = "output.sample"
LEVEL = "level"
"""Of what the student reads, kept in the batch for the loss."""
RHO = 7
Weighting = Literal[
    "sid_legacy", "1_minus_sigma", "1_minus_sigma_squared", "1/sigma", "1/sigma_squared", "ratio", "ratio_squared"
]
"""1 / w: of `weight`, else 1 - σ, its square, 1 / σ, its square, (1 - σ) / σ, its square."""


@dataclass(frozen=True, kw_only=True)
class SiDConfig:
    """Hyper-parameters of SiD; the authors' for EDM on CIFAR-10 where nothing else is said."""

    form: Literal["edm", "latent", "flow"] = "edm"
    """EDM's preconditioned images; latents of a schedule, as Stable Diffusion's; flow matching, as SANA's and SD3's."""
    alpha: float = 1.2
    """α; 1 … 1.2, beyond it training is unstable. 1.0 in SiD-LSG, SiDA and for flow matching."""
    steps: int = 1
    """K."""
    renoise: Renoise = "fresh"
    """Noise of the steps after the first: fresh, the first one, or what the image before implies."""
    sigma_init: float = 2.5
    """edm: of the noise that the generator starts from."""
    sigma_min: float = 0.002
    """edm: lowest noise level of the generator's loss."""
    sigma_max: float = 80.0
    """edm: highest noise level, were t_max 1000."""
    sigma_data: float = 0.5
    """edm: σ_d, of the data."""
    t_max: float = 800.0
    """edm: 0 … 1000; the highest fifth of the levels is left out."""
    prediction: Literal["epsilon", "v_prediction"] = "epsilon"
    """latent: of all three networks."""
    alphas_cumprod: Sequence[float] | None = None
    """latent: ᾱ by step, e.g. `scheduler.alphas_cumprod.tolist()`; None: Stable Diffusion's 1,000."""
    t_init: int = 625
    """latent: step that the generator starts from."""
    t_low: int = 20
    """latent: lowest step of both losses."""
    t_high: int = 979
    """latent: highest step of both losses."""
    weighting: Weighting | None = None
    """1 / w; None: `1_minus_sigma` in flow form, else `sid_legacy`, the only one for the others."""
    conditions: Sequence[str] = ("class_labels",)
    """Columns that are the networks' conditions, where a batch has them; `("encoder_hidden_states",)` for texts."""
    kappa1: float = 1.0
    """κ1, guidance while the fake score is trained; 1: none."""
    kappa2: float = 1.0
    """κ2 = κ3, guidance of the fake score in the generator's loss."""
    kappa4: float = 1.0
    """κ4, guidance of the teacher. The authors: all four 1.5, 2, 3 or 4.5; or 1 with 0 for the fake score."""
    drop: float = 0.1
    """Part of the images that train the fake score under the empty prompt, if κ1 or κ2 is not 1."""
    real: str | None = None
    """Column of real images, in the generator's range and shape; None: no adversarial term."""
    bottleneck: str | None = None
    """Name of the network's module whose output the discriminator reads: (image, channel, height, width), or channels
    last; `mid_block` in a U-Net of diffusers. None: the middle one of its `layers`."""
    gan_start: float = 200.0
    """Thousands of images seen before the generator's adversarial term begins; 40 in flow form."""
    lsg_gan: float = 1e-4
    """Weight of the adversarial term against ℓ: the authors' 0.01 with ℓ times 100."""
    ema_half_life: float | None = 50.0
    """Of the average of the weights, in thousands of images (SiD-LSG), at most 5 % of those seen; None: none."""
    drop_nan: bool = False
    """Leave images with a NaN out of the losses, whose divisor stays the whole batch; else a NaN stops the run."""
    learning_rate: float = 1e-5
    """Of the fake score (Adam, β = 0 and 0.999), as the student's; 1e-6 for Stable Diffusion, 5e-6 for SANA."""

    def __post_init__(self) -> None:
        positive = (self.alpha, self.sigma_init, self.sigma_min, self.sigma_data, self.learning_rate)
        if not all(0 < value < math.inf for value in positive) or self.steps < 1:
            raise ConfigurationError(f"sid: settings must be positive and finite, got {self}.")
        if not self.sigma_min < self.sigma_max < math.inf or not 0 < self.t_max <= 1000:
            raise ConfigurationError(f"sid: needs sigma_min < sigma_max and t_max in (0, 1000], got {self}.")
        self._check_choices()
        size = 1000 if self.alphas_cumprod is None else len(self.alphas_cumprod)
        if not 0 <= self.t_low <= self.t_high < size or not 0 < self.t_init < size:
            raise ConfigurationError(f"sid: t_low <= t_high and t_init must be steps of the {size}, got {self}.")
        if not all(map(math.isfinite, (self.kappa1, self.kappa2, self.kappa4))) or not 0 <= self.drop <= 1:
            raise ConfigurationError(f"sid: needs finite kappas and drop in 0 … 1, got {self}.")
        if self.ema_half_life is not None and not 0 < self.ema_half_life < math.inf:
            raise ConfigurationError(f"sid: ema_half_life must be positive or None, got {self.ema_half_life}.")
        if not 0 <= self.gan_start < math.inf or not 0 < self.lsg_gan < math.inf:
            raise ConfigurationError(f"sid: needs gan_start of at least 0 and lsg_gan above 0, got {self}.")

    def _check_choices(self) -> None:
        known: Mapping[str, tuple[Any, ...]] = {
            "form": ("edm", "latent", "flow"),
            "prediction": ("epsilon", "v_prediction"),
            "renoise": get_args(Renoise),
            "weighting": (None, *(get_args(Weighting) if self.form == "flow" else ("sid_legacy",))),
        }
        for name, choices in known.items():
            if (value := getattr(self, name)) not in choices:
                raise ConfigurationError(f"sid: {name} of the {self.form} form must be in {choices}, got {value!r}.")

    @property
    def guides(self) -> bool:
        """Whether any network is asked under the empty prompt."""
        return any(kappa != 1 for kappa in (self.kappa1, self.kappa2, self.kappa4))

    @property
    def start(self) -> float:
        """Level of the generator's first step."""
        return {"edm": self.sigma_init, "latent": self.t_init, "flow": 1.0}[self.form]

    def process(self) -> Process:
        """How images and noise are mixed."""
        if self.form == "latent":
            given = self.alphas_cumprod
            kept = scaled_linear() if given is None else torch.tensor(given, dtype=torch.float32)
            return Latent(alphas_cumprod=kept, prediction=self.prediction)
        return EDM() if self.form == "edm" else Flow()


def level(u: Tensor, *, sigma_min: float, sigma_max: float, t_max: float) -> Tensor:
    """σ of the generator's loss from u in 0 … 1, of any shape; the smallest at u = 0."""
    low, high = sigma_min ** (1 / RHO), sigma_max ** (1 / RHO)
    found: Tensor = (high + (1 - u * t_max / 1000) * (low - high)) ** RHO
    return found


def fake_level(normal: Tensor) -> Tensor:
    """σ of the fake score's loss from standard normal draws."""
    return (1.2 * normal - 1.2).exp()


def flow_level(normal: Tensor) -> Tensor:
    """t of both losses of the flow form from standard normal draws."""
    return (math.log(2) + 1.6 * normal).sigmoid()


def fake_weight(process: Process, levels: Tensor, *, sigma_data: float) -> Tensor:
    """v(t), (image, 1, 1, 1)."""
    a, b = process.parts(levels)
    if process.prediction == "sample":
        return (b**2 + sigma_data**2) / (b * sigma_data) ** 2
    return a**2 / (a**2 + b**2) if process.prediction == "v_prediction" else torch.ones_like(a)


def fake_loss(predicted: Tensor, wanted: Tensor, *, weight: Tensor) -> Tensor:
    """The fake score's loss at each pixel; what is wanted is detached here, weight (image, 1, 1, 1)."""
    return weight * (predicted - wanted.detach()).square()


def scale(image: Tensor, real: Tensor) -> Tensor:
    """w, (image, 1, 1, 1), without gradient."""
    return (image.detach() - real.detach()).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-5)


def flow_weight(sigma: Tensor, weighting: Weighting) -> Tensor:
    """1 / w of the flow form from the noise's part σ, of any shape."""
    kept = 1 - sigma
    return {
        "1_minus_sigma": kept,
        "1_minus_sigma_squared": kept**2,
        "1/sigma": 1 / sigma,
        "1/sigma_squared": 1 / sigma**2,
        "ratio": kept / sigma,
        "ratio_squared": (kept / sigma) ** 2,
    }[weighting]


def generator_loss(image: Tensor, real: Tensor, fake: Tensor, *, alpha: float, weight: Tensor) -> Tensor:
    """ℓ at each pixel.

    Args:
        image: (image, channel, height, width) x.
        real: f_φ, as a function of x.
        fake: f_ψ, as a function of x.
        alpha: α.
        weight: (image, 1, 1, 1) 1 / w.

    Returns:
        the same shape; sum it over pixels.
    """
    return (real - fake) * ((real - image) - alpha * (real - fake)) * weight


def whole(*tensors: Tensor) -> Tensor:
    """(image,) indices of the images without a NaN in any of those tensors."""
    kept = ~torch.stack([tensor.isnan().flatten(1).any(1) for tensor in tensors]).any(0)
    return kept.nonzero().squeeze(-1)


def generate_images(
    model: Any,
    conditions: Conditions | None = None,
    *,
    count: int,
    config: SiDConfig | None = None,
    steps: int = 1,
    seed: int = 0,
) -> Tensor:
    """(image, channel, height, width) of a distilled generator; latents for their decoder in the latent form.

    Args:
        model: with the size of its images in its config.
        conditions: by the model's argument, a row an image.
        count: how many images.
        config: the training's.
        steps: 1 … K of the training.
        seed: of the noise.
    """
    settings, given = config or SiDConfig(), dict(conditions or {})
    process = settings.process()
    draw = torch.Generator(model.device).manual_seed(seed)

    def noise() -> Tensor:
        return torch.randn(count, *image_shape(model.config), generator=draw, device=model.device)

    def denoise(noisy: Tensor, levels: Tensor) -> Tensor:
        return clean(process, model(sample=noisy, **process.told(levels), **given).sample, noisy, levels)

    with torch.no_grad():
        last = few_steps(
            process, denoise, noise, start=settings.start, steps=steps, of=settings.steps, renoise=settings.renoise
        )
        return denoise(*last)


class SiD(Objective):
    """The generator's loss, with a network that learns the generator's own images."""

    Config = SiDConfig
    config: SiDConfig
    task_weight: ClassVar[float | None] = 0.0

    def __init__(self, config: Any = None, *, weight: float = 1.0, **settings: Any) -> None:
        super().__init__(config, weight=weight, **settings)
        self.process = self.config.process()
        self.average = Average(self.config.ema_half_life)
        self._steps = 1
        """k of the iteration."""

    def needs(self, student: Sizes, teacher: Sizes | None) -> Needs:
        settings = self.config
        empty = {f"empty_{name}" for name in settings.conditions} if settings.guides else set()
        return Needs(
            student=frozenset({OUTPUT}),
            teacher=frozenset(),
            columns=frozenset(empty | ({settings.real} if settings.real else set())),
            relates_positions=settings.real is not None and self._over != (1, 2, 3),
            mean_over="examples",
        )

    @property
    def _over(self) -> tuple[int, ...]:
        """Over which axes the discriminator's verdicts are averaged."""
        return (0, 1, 2, 3) if self.config.form == "edm" else (1, 2, 3)

    def networks(self, teacher: nn.Module | None) -> Mapping[str, tuple[nn.Module, Optimizer]]:
        if teacher is None:
            raise ConfigurationError("sid: the teacher must be a model; the fake score begins as a copy of it.")
        fake = copy.deepcopy(teacher).requires_grad_(True)
        for module in fake.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        if self.config.real is not None:
            bottleneck(fake, self.config.bottleneck)  # one that is missing is found out before the first step
        optimizer = Adam(fake.parameters(), lr=self.config.learning_rate, betas=(0.0, 0.999))
        if self.config.drop_nan:
            optimizer.register_step_pre_hook(_make_finite)
        return {"fake": (fake, optimizer)}

    def network_losses(self, inputs: Inputs, step: Step) -> Mapping[str, Tensor]:
        settings, process, fake = self.config, self.process, step.networks["fake"]
        if step.micro == 0:  # the window's, for the generator's loss too
            self._steps = int(torch.randint(settings.steps, (), generator=step.shared, device=step.shared.device)) + 1
        noisy, start = self._start(inputs, step)
        given, empty = self._conditions(inputs)
        with torch.no_grad():
            image = clean(process, step.run_student(**self._call(noisy, start, given)).sample, noisy, start)
        levels, noise = self._levels(step, image, fake=True), self._noise(step, image)
        if settings.kappa1 != 1 or settings.kappa2 != 1:
            left_out = torch.rand(len(image), generator=step.generator, device=image.device) < settings.drop
            given = dropped(given, empty, left_out)
        read = mix(process, image.nan_to_num(0.0) if settings.drop_nan else image, noise, levels)
        with self._watched(fake) as seen:
            found = self._predict(fake, read, levels, given, empty, settings.kappa1)
            if settings.real is not None:
                asked = given if settings.kappa1 else empty
                fake(**self._call(mix(process, inputs[settings.real], noise, levels), levels, asked))
        weight = fake_weight(process, levels, sigma_data=settings.sigma_data)
        kept = self._kept(image, found)
        values = fake_loss(found[kept], target(process, image, noise, levels)[kept], weight=weight[kept])
        losses = {"fake": values.sum() / len(image)}
        if settings.real is not None:
            generated, real = (features_to_logits(features)[kept] for features in seen[-2:])
            plain = weight[kept] if settings.form == "edm" else torch.ones_like(weight[kept])
            judged = discriminator_loss(real, generated, weight=plain, over=self._over)
            losses["discriminator"] = judged.sum() / len(image)
        return losses

    def batch(self, inputs: Inputs, step: Step) -> Inputs:
        self.average.count(batch_size(inputs), micro=step.micro)
        noisy, start = self._start(inputs, step)
        return {**inputs, LEVEL: start, **self._call(noisy, start, {})}

    def _start(self, inputs: Inputs, step: Step) -> tuple[Tensor, Tensor]:
        """What the step that learns reads, after k - 1 steps without gradient: noisy image and level."""
        settings, process = self.config, self.process
        given, _ = self._conditions(inputs)
        device = next(iter(inputs.values())).device
        shape = (batch_size(inputs), *image_shape(getattr(step.student, "config", None)))

        def denoise(noisy: Tensor, levels: Tensor) -> Tensor:
            return clean(process, step.run_student(**self._call(noisy, levels, given)).sample, noisy, levels)

        return few_steps(
            process,
            denoise,
            lambda: torch.randn(shape, generator=step.generator, device=device),
            start=settings.start,
            steps=self._steps,
            of=settings.steps,
            renoise=settings.renoise,
        )

    def _conditions(self, inputs: Inputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Conditions of the batch, and the empty ones where it has them."""
        names = [name for name in self.config.conditions if name in inputs]
        if self.config.guides and len(names) < len(self.config.conditions):
            raise ConfigurationError(
                f"sid: guidance needs the conditions {self.config.conditions}, got {sorted(inputs)}."
            )
        empty = {name: inputs[f"empty_{name}"] for name in names if f"empty_{name}" in inputs}
        return {name: inputs[name] for name in names}, empty

    def _call(self, noisy: Tensor, levels: Tensor, given: Conditions) -> dict[str, Any]:
        return {"sample": noisy, **self.process.told(levels), **given}

    def _predict(
        self, network: Any, noisy: Tensor, levels: Tensor, given: Conditions, empty: Conditions, kappa: float
    ) -> Tensor:
        return guided(lambda asked: network(**self._call(noisy, levels, asked)).sample, given, empty, kappa)

    def _watched(self, network: nn.Module) -> AbstractContextManager[list[Tensor]]:
        """The bottleneck's outputs while the network is asked inside, if there is a discriminator."""
        if self.config.real is None:
            return nullcontext([])
        return watched(bottleneck(network, self.config.bottleneck))

    def _kept(self, *tensors: Tensor) -> Tensor:
        """(image,) indices of the images that count."""
        return whole(*tensors) if self.config.drop_nan else torch.arange(len(tensors[0]), device=tensors[0].device)

    def _levels(self, step: Step, image: Tensor, *, fake: bool) -> Tensor:
        """(image,) drawn levels of a loss."""
        settings, count = self.config, len(image)
        given: dict[str, Any] = {"generator": step.generator, "device": image.device}
        if settings.form == "latent":
            return torch.randint(settings.t_low, settings.t_high + 1, (count,), **given)
        if settings.form == "flow":
            return flow_level(torch.randn(count, **given))
        if fake:
            return fake_level(torch.randn(count, **given))
        ends = {"sigma_min": settings.sigma_min, "sigma_max": settings.sigma_max}
        return level(torch.rand(count, **given), **ends, t_max=settings.t_max)

    def _noise(self, step: Step, image: Tensor) -> Tensor:
        return torch.randn(image.shape, generator=step.generator, device=image.device)

    def forward(self, signals: Signals, step: Step) -> Mapping[str, Tensor]:
        settings, process, inputs = self.config, self.process, signals.inputs
        image = clean(process, signals.student[OUTPUT], inputs["sample"], inputs[LEVEL])
        if settings.drop_nan:
            image.register_hook(_finite)  # type: ignore[no-untyped-call]  # torch
        given, empty = self._conditions(inputs)
        levels = self._levels(step, image, fake=False)
        noisy = mix(process, image, self._noise(step, image), levels)

        def teacher(**asked: Any) -> Any:
            return step.run_teacher(grad=True, **asked)

        network = step.networks["fake"]
        predicted = self._predict(teacher, noisy, levels, given, empty, settings.kappa4)
        real = clean(process, predicted, noisy, levels)
        require_one_shape("sid", image, real, "Use a teacher of the student's image size.")
        with self._watched(network) as seen:
            predicted = self._predict(network, noisy, levels, given, empty, settings.kappa2)
        fake = clean(process, predicted, noisy, levels)

        kept = self._kept(image, real, fake)
        image, real, fake = image[kept], real[kept], fake[kept]
        weight = self._weight(image, real, levels[kept])
        values = generator_loss(image, real, fake, alpha=settings.alpha, weight=weight).sum((1, 2, 3))
        found = {self.name: values}
        if settings.real is not None:
            begun = float(self.average.images) >= 1000 * settings.gan_start
            judged = adversarial_loss(features_to_logits(seen[-1])[kept], weight=weight, over=self._over).flatten()
            part = 0.5 * settings.lsg_gan * image[0].numel() if begun else 0.0
            found = {self.name: values * (0.5 if begun else 1.0), "adversarial": judged * part}
        nothing = values.new_zeros(signals.examples)
        return {name: nothing.index_put((kept,), value) for name, value in found.items()}

    def _weight(self, image: Tensor, real: Tensor, levels: Tensor) -> Tensor:
        """1 / w."""
        weighting = self.config.weighting or ("1_minus_sigma" if self.config.form == "flow" else "sid_legacy")
        if weighting == "sid_legacy":
            return 1 / scale(image, real)
        return flow_weight(levels, weighting).view(-1, 1, 1, 1)

    def after_step(self, step: Step, means: Mapping[str, Tensor]) -> None:
        self.average.update(step.student)

    def finish(self, step: Step) -> None:
        self.average.fold(step.student)


def _finite(gradient: Tensor) -> Tensor:
    """NaN becomes 0, infinities ±10⁵."""
    return gradient.nan_to_num(0.0, 1e5, -1e5)


def _make_finite(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad = _finite(parameter.grad)


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
    algorithm=("divergence",),
    knowledge=("feature",),
    tasks=("unconditional-image-generation",),
    objective=SiD,
)
