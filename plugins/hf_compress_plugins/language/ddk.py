"""Domain knowledge-guided distillation: more data from the domains where the student is furthest behind.

Liu, Zhang, Guo et al.: DDK: Distilling Domain Knowledge for Efficient Large Language Models, NeurIPS 2024,
arXiv:2407.16154, equations 1 to 3 and algorithm 1.

    ρ[i] = exp( CE_student(V_i) ) / exp( CE_teacher(V_i) )                   ratio of perplexities on held-out rows V_i
    r⁰ = softmax( ρ⁰ );   ψ[i] = r[i] · exp( ρ[i] );   r[i] ← α ψ[i] / Σ ψ + (1 - α) / N       every K steps
    L = CE( student, y ) + γ · KL( softmax(z_t / T) ‖ softmax(z_s / T) )     at each scored position

Until the first update rows come from the domains as often as they hold rows; then by r. The teacher's perplexities are
taken once. Teacher and r carry no gradient. Products are taken in log space: ρ may be in the hundreds for a student
that has just begun. Both models must read the same tokens, or ratios of perplexities mean nothing.

The paper prints the student as the KL's first argument and does not say which direction was run; this is the forward
KL. A decision takes force when the rows that the loaders have already fetched are used up: `lag` rows later.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_compress.data import Mixture
from hf_compress.divergences import check_temperature, kl, log_probabilities
from hf_compress.errors import ConfigurationError
from hf_compress.objective import Objective, Rows, Shapes, Step
from hf_compress.registry import Method


@dataclass(frozen=True, kw_only=True)
class DDKConfig:
    """Hyper-parameters of DDK; the paper's values."""

    K: int = 1000
    """Optimizer steps between two changes of the weights."""
    alpha: float = 0.5
    """α, 0 … 1: how much of the new weights is not uniform; each domain keeps (1 - α) / N at least."""
    gamma: float = 0.2
    """γ ≥ 0, weight of the KL."""
    temperature: float = 1.0
    """T > 0, divides both logits; there is no T²."""

    def __post_init__(self) -> None:
        check_temperature("ddk", self.temperature)
        if self.K < 1 or not 0 <= self.alpha <= 1 or not 0 <= self.gamma < math.inf:
            raise ConfigurationError(
                f"ddk: K must be at least 1, alpha in 0 … 1 and gamma at least 0, got {self.K}, {self.alpha} and "
                f"{self.gamma}."
            )


def initial(ratios: Tensor) -> Tensor:
    """(domain,) weights from the first ratios of perplexities (equation 1)."""
    return ratios.softmax(-1)


def update(weights: Tensor, ratios: Tensor, *, alpha: float) -> Tensor:
    """The next weights (equation 2).

    Args:
        weights: (domain,) r, sums to 1.
        ratios: (domain,) ρ; adding a constant changes nothing.
        alpha: α.

    Returns:
        (domain,) sums to 1, each at least (1 - α) / N.
    """
    return alpha * (weights.log() + ratios).softmax(-1) + (1 - alpha) / len(weights)


def ddk(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """KL from the teacher's to the student's distribution at each position.

    Args:
        student_logits: (position, vocab), any float type; widened to float32.
        teacher_logits: (position, vocab), detached here.
        temperature: T.

    Returns:
        (position,) nats, at least 0.

    Raises:
        MismatchError: if the logits differ in shape.
    """
    return kl(*log_probabilities("ddk", student_logits, teacher_logits, temperature))


class Domains(Mixture):
    """A mixture with the held-out rows of its domains, by which the weights are decided."""

    held_out: Mapping[str, Any]
    config: DDKConfig


def domains(
    dataset: Any,
    *,
    held_out: Any,
    batch: int,
    steps: int,
    config: DDKConfig | None = None,
    column: str = "domain",
    fetched: int = 1,
    seed: int = 0,
) -> Domains:
    """The training set of a run.

    Args:
        dataset: a `datasets.Dataset` of labelled rows with their domain in `column`.
        held_out: the same with other rows of the same domains; 500 a domain in the paper.
        batch: rows of an optimizer step over all processes: device batch · accumulation · processes.
        steps: of the run.
        config: the objective's.
        column: name of the domain's column; it is taken out.
        fetched: batches that may have been read ahead: 1 without workers, else 1 + workers · prefetch factor.
        seed: of the draws.

    Raises:
        ConfigurationError: if a domain has no held-out rows.
    """
    config = config or DDKConfig()
    parts, tests = _by_domain(dataset, column), _by_domain(held_out, column)
    if missing := sorted(parts.keys() ^ tests.keys()):
        raise ConfigurationError(f"ddk: {missing} are in one of dataset and held_out alone; each domain needs both.")
    total = sum(len(rows) for rows in parts.values())
    made = Domains(
        parts,
        size=batch * steps,
        interval=batch * config.K,
        lag=batch * fetched,
        weights=[len(rows) / total for rows in parts.values()],
        seed=seed,
    )
    made.held_out, made.config = tests, config
    return made


def _by_domain(dataset: Any, column: str) -> dict[str, Any]:
    if column not in dataset.column_names:
        raise ConfigurationError(f"ddk: the data has no column {column!r} with domains; it has {dataset.column_names}.")
    values = dataset[column][:]
    rows = dataset.remove_columns(column)
    return {
        str(name): rows.select([i for i, value in enumerate(values) if value == name]) for name in sorted(set(values))
    }


class DDK(Objective):
    """A forward KL, and weights of the domains that follow the student's perplexities."""

    Config = DDKConfig
    config: DDKConfig
    task_weight: ClassVar[float | None] = 1.0
    weights: Tensor
    teacher_perplexity: Tensor

    def build(self, student: Shapes, teacher: Shapes) -> None:
        """The number of domains is the data's, which is known at the first step; a run has at most this many."""
        self.register_buffer("weights", torch.full((MOST,), math.nan, dtype=torch.float64))
        self.register_buffer("teacher_perplexity", torch.full((MOST,), math.nan, dtype=torch.float64))

    def per_position(self, rows: Rows, step: Step) -> Tensor:
        assert rows.teacher_logits is not None  # tapped by default
        if torch.is_grad_enabled() and self.weights.isnan().all():
            self._keep(self.weights, initial(self._ratios(step)))
        settings = self.config
        return settings.gamma * ddk(rows.student_logits, rows.teacher_logits, temperature=settings.temperature)

    def after_step(self, step: Step, means: Mapping[str, Tensor]) -> None:
        done = step.global_step + 1
        if done % self.config.K:
            return
        data = self._domains(step)
        ratios = self._ratios(step)
        self._keep(self.weights, update(self.weights[: len(ratios)], ratios, alpha=self.config.alpha))
        data.decide(done // self.config.K, self.weights[: len(ratios)])

    def _domains(self, step: Step) -> Domains:
        data = step.dataset
        if not isinstance(data, Domains) or data.config != self.config or len(data.names) > MOST:
            raise ConfigurationError(
                f"ddk: needs Trainer(train_dataset=domains(…, config=…)) with the method's config and at most {MOST} "
                f"domains, got {type(data).__name__}."
            )
        return data

    def _ratios(self, step: Step) -> Tensor:
        """(domain,) perplexity of the student by that of the teacher, which is taken once."""
        data = self._domains(step)
        student = torch.stack([step.evaluate(data.held_out[name], "student").double().mean() for name in data.names])
        if self.teacher_perplexity.isnan().all():
            means = [step.evaluate(data.held_out[name], "teacher").double().mean() for name in data.names]
            self._keep(self.teacher_perplexity, torch.stack(means).exp())
        return student.exp() / self.teacher_perplexity[: len(student)]

    @staticmethod
    def _keep(buffer: Tensor, values: Tensor) -> None:
        buffer[: len(values)] = values.to(buffer)


MOST = 64
"""Domains that a run may have; the buffers are made before the data is known."""

METHOD = Method(
    title="DDK: Distilling Domain Knowledge for Efficient Large Language Models",
    paper="arXiv:2407.16154",
    authors="Jiaheng Liu, Chenchen Zhang, Jinyang Guo, Yuanxing Zhang, Haoran Que, Ken Deng, Zhiqi Bai, Jie Liu, "
    "Ge Zhang, Jiakai Wang, Yanan Wu, Congnan Liu, Wenbo Su, Jiamang Wang, Lin Qu, Bo Zheng",
    year=2024,
    summary="Trains more on the domains where the student is furthest behind the teacher.",
    bibtex="""@inproceedings{liu2024ddk,
  title = {{DDK}: Distilling Domain Knowledge for Efficient Large Language Models},
  author = {Liu, Jiaheng and Zhang, Chenchen and Guo, Jinyang and others},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024}, eprint = {2407.16154}, archivePrefix = {arXiv}
}""",
    algorithm=("divergence",),
    knowledge=("feature", "curation"),
    tasks=("text-generation",),
    objective=DDK,
    preparation=domains,
)
