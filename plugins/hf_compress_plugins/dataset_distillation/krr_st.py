"""Self-supervised dataset distillation: a few images with target vectors, made from many images without labels.

Lee, Lee, Ko, Kawaguchi, Lee, Hwang: Self-Supervised Dataset Distillation for Transfer Learning, ICLR 2024,
arXiv:2310.06511, section 3.

    inner:  θ ← SGD on MSE( net_θ(X_s), Y_s )                                 for each network of a pool, online
    outer:  min over X_s, Y_s of  MSE( K_rs (K_ss + λ I)⁻¹ Y_s , g(X_r) ),  λ = 10⁻⁶ · trace(K_ss)
            K = F Fᵀ, F = the network's features before its head with a column of ones

g is a frozen self-supervised model, X_r a batch of real images. Gradients reach X_s through F_s, and Y_s; they stop at
F_r, g and λ. Nothing is augmented inside: with random augmentation the outer gradient is biased.
To use the product train a network on it with the mean squared error, then drop its head.

Differences from the authors' code: a network of the pool that has had its steps is made anew and its counter set back
(the code leaves it at the limit, so that the network is made anew each time it is drawn); the system is solved in
float64, as K_ss is singular where there are more images than features.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_compress import facts, loops
from hf_compress.distiller import generator
from hf_compress.errors import ConfigurationError
from hf_compress.registry import Method

IMAGES, TARGETS = "pixel_values", "labels"
"""Columns of the product; as labels the vectors are what the stock regression heads learn with MSE."""


@dataclass(frozen=True, kw_only=True)
class KRRSTConfig:
    """Hyper-parameters of KRR-ST; defaults of the authors' code for CIFAR-100 unless said."""

    images: int = 1000
    """Synthetic images."""
    steps: int = 160_000
    """Outer steps."""
    learning_rate: float = 1e-4
    """Of images and targets (AdamW, decayed linearly to a thousandth)."""
    batch: int = 1024
    """Real images of a step."""
    pool: int = 10
    """Networks."""
    widths: tuple[int, ...] = (128, 256, 512)
    """Of the networks' blocks."""
    life: int = 1000
    """Inner steps after which a network is made anew."""
    inner_learning_rate: float = 0.1
    """Of the networks (SGD, momentum 0.9, weight decay 10⁻³)."""

    def __post_init__(self) -> None:
        counts = (self.images, self.steps, self.batch, self.pool, self.life, *self.widths)
        if not self.widths or min(counts) < 1:
            raise ConfigurationError(
                f"krr_st: images, steps, batch, pool, life and widths must be at least 1, got {self}."
            )
        if not (0 < self.learning_rate < math.inf and 0 < self.inner_learning_rate < math.inf):
            raise ConfigurationError(f"krr_st: learning rates must be positive and finite, got {self}.")


def ridge(synthetic: Tensor, targets: Tensor, real: Tensor) -> Tensor:
    """What kernel ridge regression on the synthetic images predicts for the real ones.

    Args:
        synthetic: (image, feature) F_s without the column of ones.
        targets: (image, dim) Y_s.
        real: (real image, feature) F_r, detached here.

    Returns:
        (real image, dim), in float64.
    """
    own, others = _with_ones(synthetic.double()), _with_ones(real.detach().double())
    kernel = own @ own.T
    penalty = 1e-6 * kernel.detach().trace()
    eye = torch.eye(len(own), dtype=own.dtype, device=own.device)
    predicted: Tensor = others @ own.T @ torch.linalg.solve(kernel + penalty * eye, targets.double())
    return predicted


def _with_ones(features: Tensor) -> Tensor:
    return torch.cat([features, torch.ones_like(features[:, :1])], 1)


def krr_loss(synthetic: Tensor, targets: Tensor, real: Tensor, real_targets: Tensor) -> Tensor:
    """() mean squared error of `ridge` over real images and dimensions; real_targets: (real image, dim), detached."""
    return F.mse_loss(ridge(synthetic, targets, real), real_targets.detach().double())


class ConvNet(nn.Module):
    """Blocks of convolution, batch norm, ReLU and 2 x 2 average pooling, and a linear head.

    Args:
        channels: of the images.
        size: height and width of the images; halved by each block.
        widths: channels of each block.
        dim: of the targets.
    """

    def __init__(self, channels: int, size: tuple[int, int], widths: tuple[int, ...], dim: int) -> None:
        super().__init__()
        made, before = [], channels
        for width in widths:
            made.append(_Block(before, width))
            before = width
        self.layers = nn.ModuleList(made)
        left = [side // 2 ** len(widths) for side in size]
        if min(left) < 1:
            raise ConfigurationError(
                f"krr_st: images of {size} are too small for {len(widths)} blocks that halve them."
            )
        self.fc = nn.Linear(before * left[0] * left[1], dim)

    def features(self, images: Tensor) -> Tensor:
        """(image, feature), what the head receives."""
        for layer in self.layers:
            images = layer(images)
        return images.flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        """(image, dim)."""
        return self.fc(self.features(images))  # type: ignore[no-any-return]  # nn.Linear is untyped


class _Block(nn.Module):
    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.AvgPool2d(2)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.block(images)  # type: ignore[no-any-return]  # nn.Sequential is untyped


class _Pool:
    """Networks that are trained online on the synthetic images, each with its optimizer and age."""

    def __init__(self, config: KRRSTConfig, shape: tuple[int, int, int], dim: int, seed: int) -> None:
        self.config, self.shape, self.dim, self.seed = config, shape, dim, seed
        self.nets = [self._net(place, 0) for place in range(config.pool)]
        self.optimizers = [self._optimizer(net) for net in self.nets]
        self.ages = [0] * config.pool

    def _net(self, *place: int) -> ConvNet:
        with torch.random.fork_rng():
            torch.manual_seed(generator(torch.device("cpu"), self.seed, *place).initial_seed())
            return ConvNet(self.shape[0], self.shape[1:], self.config.widths, self.dim)

    def _optimizer(self, net: nn.Module) -> torch.optim.SGD:
        return torch.optim.SGD(net.parameters(), lr=self.config.inner_learning_rate, momentum=0.9, weight_decay=1e-3)

    def advance(self, place: int, images: Tensor, targets: Tensor, number: int) -> None:
        """One inner step of a network, or a new one in its place."""
        if self.ages[place] >= self.config.life:
            self.nets[place] = self._net(place, number + 1)
            self.optimizers[place] = self._optimizer(self.nets[place])
            self.ages[place] = 0
        net = self.nets[place].train()
        loss = F.mse_loss(net(images.detach()), targets.detach())
        self.optimizers[place].zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch
        self.optimizers[place].step()
        self.ages[place] += 1

    def state(self) -> dict[str, Any]:
        return {
            "nets": [net.state_dict() for net in self.nets],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "ages": list(self.ages),
        }

    def load(self, state: dict[str, Any]) -> None:
        for net, own in zip(self.nets, state["nets"], strict=True):
            net.load_state_dict(own)
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)
        self.ages = list(state["ages"])


class _Distillation:
    """The outer loop's objects, and their passage into a state and back."""

    def __init__(self, real: Tensor, targets: Tensor, config: KRRSTConfig, seed: int) -> None:
        self.real, self.targets, self.config, self.seed = real, targets, config, seed
        chosen = torch.randperm(len(real), generator=self._draw(-1))[: config.images]
        self.images = real[chosen].clone().requires_grad_()
        self.vectors = targets[chosen].clone().requires_grad_()
        self.optimizer = torch.optim.AdamW([self.images, self.vectors], lr=config.learning_rate, weight_decay=0.0)
        self.pool = _Pool(config, tuple(real.shape[1:]), targets.shape[1], seed)  # type: ignore[arg-type]  # (C, H, W)
        self.ready = False

    def _draw(self, number: int) -> torch.Generator:
        return generator(torch.device("cpu"), self.seed, number)

    def begin(self, state: loops.State) -> None:
        """Takes a state that was saved, or ages the pool's networks by different numbers of steps."""
        self.ready = True
        if state:
            self.images.data.copy_(state["images"])
            self.vectors.data.copy_(state["vectors"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.pool.load(state["pool"])
            return
        for place in range(self.config.pool):
            age = int(torch.randint(1, max(self.config.life, 2), (), generator=self._draw(-2 - place)))
            for _ in range(age):
                self.pool.advance(place, self.images, self.vectors, -1)

    def step(self, number: int, state: loops.State) -> dict[str, float]:
        """One outer step and one inner one."""
        if not self.ready:
            self.begin(state)
        draw = self._draw(number)
        place = int(torch.randint(self.config.pool, (), generator=draw))
        batch = torch.randint(len(self.real), (min(self.config.batch, len(self.real)),), generator=draw)
        net = self.pool.nets[place].eval()
        with torch.no_grad():
            real = net.features(self.real[batch])
        loss = krr_loss(net.features(self.images), self.vectors, real, self.targets[batch])
        gradients = torch.autograd.grad(loss, [self.images, self.vectors])
        self.images.grad, self.vectors.grad = gradients
        part = number / max(self.config.steps, 1)
        self.optimizer.param_groups[0]["lr"] = self.config.learning_rate * (1 - (1 - 1e-3) * part)
        self.optimizer.step()
        self.pool.advance(place, self.images, self.vectors, number)
        state |= {"images": self.images.detach(), "vectors": self.vectors.detach()}
        state |= {"optimizer": self.optimizer.state_dict(), "pool": self.pool.state()}
        return {"outer loss": float(loss.detach())}


def krr_st(
    dataset: Any,
    *,
    teacher: nn.Module,
    progress: loops.Progress | None = None,
    resume_from: Path | None = None,
    config: KRRSTConfig | None = None,
    column: str = IMAGES,
    seed: int = 0,
) -> datasets.Dataset:
    """Distils images without labels into a few with target vectors.

    Args:
        dataset: rows with an image (channel, height, width) in `column`.
        teacher: g, frozen; its output is a tensor, or has `pooler_output` or `logits`.
        progress: is told of each outer step and its loss.
        resume_from: folder in which the state is kept; a killed run goes on from there.
        config: None: the defaults.
        column: name of the images' column.
        seed: of everything that is drawn.

    Returns:
        rows of `pixel_values` and `labels` (the vectors); how they were made is in its description, as JSON.

    Raises:
        ConfigurationError: if there are fewer real images than synthetic ones are asked for.
        ResumeError: if the folder is of a run with other data, teacher or settings.
    """
    config = config or KRRSTConfig()
    real = torch.stack([torch.as_tensor(row[column], dtype=torch.float32) for row in dataset])
    if len(real) < config.images:
        raise ConfigurationError(f"krr_st: {config.images} images cannot be chosen from {len(real)}. Ask for fewer.")
    targets = _targets(teacher, real)
    about = {
        "method": "krr_st",
        "config": asdict(config),
        "seed": seed,
        "real": facts.fingerprint([real]),
        "targets": facts.fingerprint([targets]),
    }
    work = _Distillation(real, targets, config, seed)
    state = loops.run(
        work.step, {}, steps=config.steps, settings=about, progress=progress, resume_from=resume_from, save_every=500
    )
    columns = {
        IMAGES: datasets.Array3D(tuple(real.shape[1:]), "float32"),
        TARGETS: datasets.List(datasets.Value("float32")),
    }
    info = datasets.DatasetInfo(description=json.dumps(about), features=datasets.Features(columns))
    rows = {IMAGES: state["images"].numpy(), TARGETS: state["vectors"].numpy()}
    return datasets.Dataset.from_dict(rows, features=info.features, info=info)


def _targets(teacher: nn.Module, images: Tensor) -> Tensor:
    """(image, dim) of the frozen model, its modes restored."""
    modes = [module for module in teacher.modules() if module.training]
    teacher.eval()
    with torch.no_grad():
        outputs = [teacher(images[at : at + 256]) for at in range(0, len(images), 256)]
    for module in modes:
        module.training = True
    return torch.cat([_vectors(output) for output in outputs]).float()


def _vectors(output: Any) -> Tensor:
    for name in ("pooler_output", "logits"):
        if isinstance(value := getattr(output, name, None), Tensor):
            return value.flatten(1)
    if isinstance(output, Tensor):
        return output.flatten(1)
    raise ConfigurationError(f"krr_st: the teacher returns a {type(output).__name__} without pooler_output or logits.")


METHOD = Method(
    title="Self-Supervised Dataset Distillation for Transfer Learning",
    paper="arXiv:2310.06511",
    authors="Dong Bok Lee, Seanie Lee, Joonho Ko, Kenji Kawaguchi, Juho Lee, Sung Ju Hwang",
    year=2024,
    summary="A few images with target vectors, on which a network learns features without labels.",
    bibtex="""@inproceedings{lee2024selfsupervised,
  title = {Self-Supervised Dataset Distillation for Transfer Learning},
  author = {Lee, Dong Bok and Lee, Seanie and Ko, Joonho and Kawaguchi, Kenji and Lee, Juho and Hwang, Sung Ju},
  booktitle = {International Conference on Learning Representations},
  year = {2024}, eprint = {2310.06511}, archivePrefix = {arXiv}
}""",
    dataset=("kernel regression",),
    tasks=("image-feature-extraction",),
    synthesis=krr_st,
)
