"""A trained vision transformer whose blocks learn to spend less on tokens that need less.

Wójcik, Devoto, Pustelnik, Minervini, Scardapane: Adaptive Computation Modules: Granular Conditional Computation for
Efficient Inference, AAAI 2025, arXiv:2312.10193.

    h(z, k) = Σ_{n ≤ k} s_n(z),  s_n a perceptron of 1/N of the block's width,  k = 0 … N chosen for a token by a gate

    1. learners: mean over modules, choices, tokens and features of ( h(z, k) - o )², z and o what goes into and comes
       out of the teacher's own block
    2. gates: -log gate(z)[t],  t the first n ≥ 2 for which ‖h(n - 1) - o‖ / ‖h(n) - o‖ < 1.2, N if none
    3. all: task + 0.1 | spent - β | + 0.05 L_e + 0.05 L_d over the gates' choices: the share of the full cost, minus
       the entropy of a sample's choices, minus twice the mean difference of two samples' means

In 1 the value is the running sum but learner k gets the gradient of choice k alone ("detach"), as in the authors' runs.
The teacher's blocks are frozen; the modules of 1 and 2 are called on its inputs, outside the student's own forward.

A block is a feed-forward block, or a projection q, k, v or o of the attention, whose learners are linear as in the
authors' runs and k ≥ 1, as nothing surrounds it that would let a token pass; its N learners together cost what it did.

Differences from the authors' code: k learners run where k are chosen (the code runs one fewer than the most); labels
follow the paper's n ≥ 2; the gates learn from their softmax, not from a hard sample; the task's gradient reaches them
by straight-through. Vision transformers alone are rebuilt; the authors' speech model is not.

    student = acm(teacher, config={"learners": 4});  run_stages(RECIPE, student, folder, Surroundings(…))
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel

from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.objective import Needs, Objective, Signals, Sizes, Step
from hf_compress.registry import Method
from hf_compress.taps import unwrap
from hf_compress_plugins.encoders._modeling_acm_vit import (
    PROJECTIONS,
    ACMBlock,
    ACMViTConfig,
    ACMViTForImageClassification,
)

Phase = Literal["learners", "gates", "joint"]
Distance = Literal["absolute", "squared", "squared and scaled"]
SCALE = 1e4
"""Of the squared distance, as an option of the authors' code."""


@dataclass(frozen=True, kw_only=True)
class ACMConfig:
    """Hyper-parameters of the three phases; the authors' defaults."""

    phase: Phase = "joint"
    """Which of the three losses."""
    factor: float = 1.2
    """Of 2: a learner pays if it lowers the error by more than this factor."""
    budget: float = 0.5
    """β, 0 … 1, share of the blocks' full cost; 0.25 to 0.75 in the paper."""
    budget_distance: Distance = "absolute"
    """Of the spent share from β; squared, and that times 10,000, are options of the authors' code."""
    budget_weight: float = 0.1
    """Of | spent - β |."""
    entropy_weight: float = 0.05
    """Of L_e."""
    diversity_weight: float = 0.05
    """Of L_d."""
    detach: bool = True
    """Of 1: the gradient of choice k reaches learner k alone; False: all learners up to it, as the paper writes."""

    def __post_init__(self) -> None:
        if (
            self.phase not in ("learners", "gates", "joint")
            or not 0 <= self.budget <= 1
            or not 1 <= self.factor < math.inf
            or self.budget_distance not in get_args(Distance)
        ):
            raise ConfigurationError(
                "acm: phase must be learners, gates or joint, budget in 0 … 1, factor at least 1 and budget_distance "
                f"one of {get_args(Distance)}, got {self}."
            )


def cumulated(each: Tensor, *, detach: bool) -> Tensor:
    """(…, choice, width) h(z, k) for k = 0 … N from each learner's own (…, learner, width)."""
    nothing = torch.zeros_like(each[..., :1, :])
    each = torch.cat([nothing, each], -2)
    total = each.cumsum(-2)
    return each + (total - each).detach() if detach else total


def gate_labels(errors: Tensor, *, factor: float) -> Tensor:
    """(…,) how many learners pay: the first n ≥ 2 whose error is not below the one before by that factor, N if none.

    Args:
        errors: (…, choice) distance from the teacher's output with k = 0 … N learners.
        factor: at least 1.
    """
    stops = errors[..., 1:-1] / errors[..., 2:].clamp(min=1e-30) < factor
    last = errors.shape[-1] - 1
    first = torch.where(stops.any(-1), stops.int().argmax(-1) + 2, last)
    return first


def spent(choices: list[Tensor], costs: list[float], lowest: list[int]) -> Tensor:
    """() share of the full cost.

    Args:
        choices: of each module the gate's (batch, token, choice) probabilities.
        costs: of one learner of each.
        lowest: learners of the first choice of each: 0, or 1 where a token needs one.
    """
    full, used = 0.0, []
    for choice, cost, least in zip(choices, costs, lowest, strict=True):
        full += cost * (choice.shape[-1] - 1 + least)
        used.append(cost * (choice * _numbers(choice, least)).sum(-1).mean())
    return torch.stack(used).sum() / full


def budget_loss(share: Tensor, budget: float, *, distance: Distance) -> Tensor:
    """How far the spent share is from the budget β, both 0 … 1; shapes stay."""
    if distance == "absolute":
        return (share - budget).abs()
    return (share - budget).square() * (SCALE if distance == "squared and scaled" else 1.0)


def choice_entropy(choices: list[Tensor]) -> Tensor:
    """() minus the normalised entropy of each sample's histogram of choices, mean over samples and modules."""
    found = []
    for choice in choices:
        share = choice.mean(1)
        share = share / share.sum(-1, keepdim=True).clamp(min=1e-10)
        plogp = share * share.clamp(min=1e-10).log()  # hard choices leave shares of 0, where log has no gradient
        found.append((plogp.sum(-1) / math.log(choice.shape[-1])).mean())
    return torch.stack(found).mean()


def choice_diversity(choices: list[Tensor], lowest: list[int]) -> Tensor:
    """() minus twice the mean difference of two samples' mean choice (over tokens, modules and choices)."""
    each = [(choice * _numbers(choice, least)).mean((1, 2)) for choice, least in zip(choices, lowest, strict=True)]
    means = torch.stack(each).mean(0)
    return -2 * (means[:, None] - means[None, :]).abs().mean()


def _numbers(choice: Tensor, lowest: int) -> Tensor:
    return torch.arange(choice.shape[-1], dtype=choice.dtype, device=choice.device) + lowest


def modules(layers: int, *, projections: bool) -> list[str]:
    """Names of what is replaced, in the teacher and in the student."""
    parts = ("mlp", *(f"attention.{name}" for name in PROJECTIONS if projections))
    return [f"vit.layers.{layer}.{part}" for layer in range(layers) for part in parts]


def acm(teacher: PreTrainedModel, *, config: Mapping[str, Any] | None = None) -> ACMViTForImageClassification:
    """A student with the teacher's weights everywhere but in its blocks, which are modules.

    Args:
        teacher: a `ViTForImageClassification`.
        config: what the modules are, see `ACMViTConfig`; `projections` False: of the feed-forward blocks alone.

    Raises:
        MismatchError: for another architecture.
    """
    if type(teacher).__name__ != "ViTForImageClassification":
        raise MismatchError(f"acm: the teacher must be a ViTForImageClassification, got {type(teacher).__name__}.")
    settings = {k: v for k, v in teacher.config.to_dict().items() if k not in ("model_type", "architectures")}
    student = ACMViTForImageClassification(ACMViTConfig(**settings, **(config or {})))
    student.load_state_dict(teacher.state_dict(), strict=False)
    return student


class ACM(Objective):
    """The loss of one phase."""

    Config = ACMConfig
    config: ACMConfig
    task_weight: ClassVar[float | None] = 1.0

    def needs(self, student: Sizes, teacher: Sizes | None) -> Needs:
        self.names = modules(student.layers, projections=getattr(student.config, "projections", False))
        if self.config.phase == "joint":
            return Needs(
                student=frozenset(f"output:{name}.route" for name in self.names), teacher=None, mean_over="batch"
            )
        taps = frozenset(f"{side}:{name}" for name in self.names for side in ("input", "output"))
        return Needs(student=frozenset(), teacher=taps, mean_over="examples")

    def forward(self, signals: Signals, step: Step) -> Mapping[str, Tensor]:
        student = unwrap(step.student)
        blocks = [student.get_submodule(name) for name in self.names]
        for block in blocks:
            if not isinstance(block, ACMBlock):
                raise MismatchError(
                    f"acm: the student must come from acm(teacher, …); a block is {type(block).__name__}."
                )
        if self.config.phase == "joint":
            return self._joint([signals.student[f"output:{name}.route"] for name in self.names], blocks)
        values = [
            self._block(block, signals.teacher[f"input:{name}"], signals.teacher[f"output:{name}"])
            for name, block in zip(self.names, blocks, strict=True)
        ]
        return {self.config.phase: torch.stack(values).mean(0)}

    def _block(self, block: nn.Module, inputs: Tensor, outputs: Tensor) -> Tensor:
        """(example,) what one module has to learn from one block of the teacher's."""
        assert isinstance(block, ACMBlock)  # forward has checked
        inputs = inputs.to(next(block.parameters()).dtype)
        if self.config.phase == "learners":
            every = cumulated(block.each(inputs), detach=self.config.detach)[..., block.lowest :, :]
            return (every - outputs[..., None, :]).square().mean((1, 2, 3))
        with torch.no_grad():
            errors = (cumulated(block.each(inputs), detach=False) - outputs[..., None, :]).norm(dim=-1)
            labels = gate_labels(errors, factor=self.config.factor) - block.lowest
        logits = block.gate(inputs)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).mean(1)

    def _joint(self, choices: list[Tensor], blocks: list[nn.Module]) -> Mapping[str, Tensor]:
        settings = self.config
        choices = [choice.to(torch.promote_types(choice.dtype, torch.float32)).clamp(0, 1) for choice in choices]
        made = [block for block in blocks if isinstance(block, ACMBlock)]
        costs, lowest = [float(block.cost) for block in made], [block.lowest for block in made]
        distance = budget_loss(spent(choices, costs, lowest), settings.budget, distance=settings.budget_distance)
        return {
            "budget": settings.budget_weight * distance,
            "entropy": settings.entropy_weight * choice_entropy(choices),
            "diversity": settings.diversity_weight * choice_diversity(choices, lowest),
        }


RECIPE: Mapping[str, Any] = {
    "stages": (
        {
            "name": "learners",
            "teacher": "teacher",
            "data": "train",
            "methods": ({"name": "acm", "phase": "learners"},),
            "labels": False,
            "trainable": r"\.learners\.",
            "arguments": {"learning_rate": 1e-3},
        },
        {
            "name": "gates",
            "teacher": "teacher",
            "data": "train",
            "methods": ({"name": "acm", "phase": "gates"},),
            "labels": False,
            "trainable": r"\.gate\.",
            "arguments": {"learning_rate": 1e-2},
        },
        {
            "name": "joint",
            "teacher": None,
            "data": "train",
            "methods": ({"name": "acm", "phase": "joint"},),
            "arguments": {"learning_rate": 1e-4},
        },
    )
}
"""The three phases, for `hf_compress.stages.run_stages`."""

AutoConfig.register("acm_vit", ACMViTConfig, exist_ok=True)
AutoModelForImageClassification.register(ACMViTConfig, ACMViTForImageClassification, exist_ok=True)

METHOD = Method(
    title="Adaptive Computation Modules: Granular Conditional Computation for Efficient Inference",
    paper="arXiv:2312.10193",
    authors="Bartosz Wójcik, Alessio Devoto, Karol Pustelnik, Pasquale Minervini, Simone Scardapane",
    year=2025,
    summary="A trained vision transformer learns to spend less of its blocks' width on tokens that need less.",
    bibtex="""@inproceedings{wojcik2025adaptive,
  title = {Adaptive Computation Modules: Granular Conditional Computation for Efficient Inference},
  author = {Wójcik, Bartosz and Devoto, Alessio and Pustelnik, Karol and Minervini, Pasquale and
            Scardapane, Simone},
  booktitle = {AAAI Conference on Artificial Intelligence},
  year = {2025}, eprint = {2312.10193}, archivePrefix = {arXiv}
}""",
    algorithm=("similarity",),
    knowledge=("feature",),
    tasks=("image-classification",),
    objective=ACM,
    student=acm,
    recipe=RECIPE,
)
