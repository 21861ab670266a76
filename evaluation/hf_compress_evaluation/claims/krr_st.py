"""KRR-ST's claim: twenty distilled images teach a network more than twenty real ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from hf_compress_plugins.dataset_distillation.krr_st import ConvNet, KRRSTConfig, krr_st
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from . import Claim
from . import _digits as digits

IMAGES, DIM, STEPS = 20, 16, 400


class Principal(nn.Module):
    """The target model: the first principal components of the training images, each with unit variance."""

    def __init__(self) -> None:
        super().__init__()
        flat = digits.images()[0][: digits.TRAIN].flatten(1)
        self.mean = flat.mean(0)
        _, values, axes = torch.linalg.svd(flat - self.mean, full_matrices=False)
        self.axes = axes[:DIM] / (values[:DIM, None] / (len(flat) - 1) ** 0.5)

    def forward(self, images: Tensor) -> Tensor:
        """(image, dim)."""
        return (images.flatten(1) - self.mean) @ self.axes.T  # type: ignore[no-any-return]  # torch


def chosen(variant: str, seed: int) -> tuple[Tensor, Tensor]:
    """Images and targets that a network is then trained on."""
    pixels, target = digits.images()[0][: digits.TRAIN], Principal()
    if variant == "KRR-ST":
        config = KRRSTConfig(
            images=IMAGES, steps=STEPS, batch=256, pool=4, widths=(16, 32), life=200, learning_rate=5e-3
        )
        made = krr_st([{"pixel_values": image} for image in pixels], teacher=target, config=config, seed=seed)
        return torch.tensor(made["pixel_values"][:]), torch.tensor(made["labels"][:])
    if variant == "k-means, real":
        flat = pixels.flatten(1).numpy()
        centres = KMeans(IMAGES, n_init=1, random_state=seed).fit(flat).cluster_centers_
        found = pixels[torch.cdist(torch.tensor(centres), pixels.flatten(1)).argmin(1)]
    else:
        found = pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))[:IMAGES]]
    return found, target(found)


class Regressor(nn.Module):
    """A new network that learns the vectors; twice as wide as the pool's."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = ConvNet(1, (8, 8), (32, 64), DIM)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Vectors, and their mean squared error."""
        found = self.net(pixel_values)
        return {"logits": found} if labels is None else {"loss": nn.functional.mse_loss(found, labels), "logits": found}


def run(variant: str, seed: int) -> Mapping[str, float]:
    """Trains a new network on the few images and measures it on the test images."""
    model, target = Regressor(1000 + seed), Principal()
    pixels, labels = digits.images()
    if variant != "untrained":
        images, vectors = chosen(variant, seed)
        rows = [
            {"pixel_values": image, "labels": vector.tolist()} for image, vector in zip(images, vectors, strict=True)
        ]
        digits.train(model, steps=300, seed=seed, data=rows, batch=IMAGES)
    model.eval()
    with torch.no_grad():
        features = model.net.features(pixels).numpy()
        error = (model.net(pixels[digits.TRAIN :]) - target(pixels[digits.TRAIN :])).square().mean()
    few = torch.cat([(labels[: digits.TRAIN] == label).nonzero()[:10, 0] for label in range(10)]).numpy()
    probe = LogisticRegression(max_iter=2000).fit(features[few], labels.numpy()[few])
    return {
        "error to the targets": float(error),
        "linear probe, 10 labels a class": float(probe.score(features[digits.TRAIN :], labels.numpy()[digits.TRAIN :])),
    }


CLAIM = Claim(
    published="Pre-training on the distilled images transfers better than on random or k-means ones, from CIFAR-100, "
    "Tiny-ImageNet and ImageNet to six data sets.",
    check=f"Digits of 8 x 8 pixels: {IMAGES} images, targets the first {DIM} principal components, {STEPS} steps. "
    "A new network, twice as wide as the pool's, learns them in 300 steps; its error to the targets on 597 test "
    "images, and a linear probe.",
    expected="The smallest error to the targets. The probe need not show it: these targets hold little beyond pixels.",
    variants=("untrained", "random, real", "k-means, real", "KRR-ST"),
    run=run,
)
