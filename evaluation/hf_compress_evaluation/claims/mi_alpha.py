"""MI-α's claim: a bound between bias and variance; and AutoDistiller's: runs elsewhere tell what to try here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from hf_compress_plugins.encoders._auto_distiller import SIZE, Run, ranks, recommender
from hf_compress_plugins.encoders.mi_alpha import Critic, MIAlphaConfig, mi_alpha
from scipy.stats import spearmanr
from torch import Tensor

from hf_compress import files
from hf_compress.errors import ForeignFileError

from . import Claim
from . import _digits as digits

K, STEPS, BATCHES = 64, 300, 200
COMPONENTS = 10
NOISES = {"weak": 2.0, "strong": 0.05}
"""Variance of what is added to the student's side."""
TABLE = Path("tests/oracles/distiller_pipeline_table.safetensors")
"""The authors' runs, which have no licence and are in a checkout alone."""
FIRST = 5
TARGETS: Mapping[str, Callable[[Sequence[float], Sequence[str]], Any]] = {
    "AutoDistiller": ranks,
    "AutoDistiller, without the size of the data": ranks,
    "AutoDistiller, the ratio itself": lambda ratios, _: np.asarray(ratios),
}


@cache
def variances() -> Tensor:
    """(COMPONENTS,) of the digits along their principal components."""
    pixels = digits.images()[0].flatten(1).double()
    found: Tensor = torch.linalg.eigvalsh(pixels.T.cov()).flip(0)[:COMPONENTS]
    return found


def information(noise: float) -> float:
    """Nats between Gaussians of those variances and the same with noise: -½ Σ ln(1 - ρ²), ρ² = λ / (λ + noise)."""
    return float(0.5 * (1 + variances() / noise).log().sum())


def draw(noise: float, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(count, 1, COMPONENTS) of each side."""
    clean = torch.randn(count, 1, COMPONENTS, generator=generator) * variances().sqrt().float()
    return clean + noise**0.5 * torch.randn(clean.shape, generator=generator), clean


def bound(alpha: float, noise: float, seed: int) -> list[float]:
    """I_α of fresh batches after the critic has learned by it, nats."""
    generator, tokens = torch.Generator().manual_seed(seed), torch.ones(K, 1, dtype=torch.bool)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        critic = Critic(COMPONENTS, COMPONENTS, MIAlphaConfig(alpha=alpha))
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        mi_alpha(*critic(*draw(noise, K, generator), tokens), alpha=alpha).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        return [-float(mi_alpha(*critic(*draw(noise, K, generator), tokens), alpha=alpha)) for _ in range(BATCHES)]


@cache
def runs() -> tuple[Run, ...]:
    """1,239 published runs on eight tasks.

    Raises:
        ForeignFileError: outside the root of a checkout.
    """
    if not TABLE.exists():
        raise ForeignFileError(TABLE, "is not here.", "Run this claim in the root of a checkout.")
    with files.safetensors(TABLE) as table:
        categories: dict[str, list[str]] = files.parse_json(TABLE, table.metadata()["categories"])
        columns = {name: table.get_tensor(name).tolist() for name in table.keys() if name != "dataset_features"}  # noqa: SIM118
    for name, words in categories.items():
        columns[name] = [words[code] for code in columns[name]]
    columns[SIZE] = columns.pop("n_example")
    return tuple(dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))


def held_out(variant: str, task: str, seed: int) -> tuple[float, float]:
    """Of a task whose runs were not learned from: mean place of the first five, 0 … 1, and Spearman's ρ of all."""
    without = {SIZE} if variant.endswith("size of the data") else set[str]()
    known = [{name: value for name, value in run.items() if name not in without} for run in runs()]
    own = [run for run in known if run["task"] == task]
    expected = recommender([run for run in known if run["task"] != task], seed=seed, target=TARGETS[variant])(own)
    truth = ranks([run["ratio"] for run in own], [task] * len(own))
    best = np.unique(expected)[
        -FIRST:
    ]  # runs of one pipeline count as one, by their mean: the table lists the best first
    return mean(float(truth[expected == value].mean()) for value in best), float(spearmanr(expected, truth).statistic)


def run(variant: str, seed: int) -> Mapping[str, float]:
    """Of a bound, its values; of a recommender, what it says of each task in turn."""
    if variant in TARGETS:
        found = [held_out(variant, task, seed) for task in dict.fromkeys(run["task"] for run in runs())]
        places, correlations = zip(*found, strict=True)
        return {
            "place of the first five": mean(places),
            "of the worst task": min(places),
            "tasks above a half": sum(place > 0.5 for place in places),
            "Spearman's ρ": mean(correlations),
            "tasks with ρ above 0": sum(rho > 0 for rho in correlations),
        }
    alpha, figures = float(variant.removeprefix("α = ")), dict[str, float]()
    for name, noise in NOISES.items():
        values = bound(alpha, noise, seed)
        figures |= {
            f"{name}: truth, nats": information(noise),
            f"{name}: I_α, nats": mean(values),
            f"{name}: its deviation over batches": stdev(values),
        }
    return figures | {"log(K/α) + 1": math.log(K / alpha) + 1}


CLAIM = Claim(
    published="MI-α does best among losses of hidden states; α trades bias for variance; a regressor on finished runs "
    "recommends pipelines for data that it has not seen.",
    check=f"Gaussians with the variances of the digits' first {COMPONENTS} principal components, and the same with "
    f"noise of variance {NOISES['weak']} (weak) or {NOISES['strong']} (strong): the information is known. Perceptron "
    f"critic, {STEPS} steps of Adam at 1e-3, K = {K}; the bound on {BATCHES} fresh batches. The authors' 1,239 runs on "
    "eight tasks: each task held out, the mean place (0 the worst, 1 the best) of the first five pipelines recommended "
    "among its own runs.",
    expected="Every I_α below the truth and below log(K/α) + 1, and a larger deviation with the smaller α. The first "
    "five above the middle (0.5) for every task, and higher where ranks are learned than where the ratio itself is.",
    variants=("α = 0.1", "α = 0.5", "α = 0.9", *TARGETS),
    run=run,
)
