"""One for all: distilling between any two kinds of network, through exits that the student grows for training.

Hao, Guo, Han, Tang, Hu, Wang, Xu: One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge
Distillation, NeurIPS 2023, arXiv:2310.19444, section 3.

    l = - Σ_c ( (p_t[c] + m[c])^ε - m[c] ) · log p_s[c]       p = softmax(z / T), m the one-hot of the label
    L = CE( z_s, label ) + w_kd · l( z_s, z_t ) + w_exit · Σ_k l( exit_k( f_k ), z_t )

f_k are the student's states after each of its stages; an exit maps them to classes and is thrown away after training.
Of the teacher only the logits are used, so that it may be anything that classifies. It carries no gradient. An example
without a label has m = 0. There is no T².

The form is the authors' code's: the cross-entropy with the label stands apart (hence the - m), and the exponent acts on
all classes; with ε = 1 it is the plain distillation up to the teacher's entropy. Exits of convolutions hold batch norms
as the authors' do, so that their value depends on the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_compress.divergences import check_temperature, log_probabilities
from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.objective import IGNORED, Needs, Objective, Rows, Shapes, Signals, Sizes, Step
from hf_compress.registry import Method

BLOCKS = (2 / 12, 4 / 12, 10 / 12, 1.0)
"""Parts of a transformer's depth after which its stages end: blocks 1, 3, 9 and 11 of 12 in the authors' code."""
GRID = 7
"""Side of the grid of patches that an exit works on; a larger one is merged."""
HEADS = 4


@dataclass(frozen=True, kw_only=True)
class OFAConfig:
    """Hyper-parameters of OFA-KD; the authors' defaults."""

    eps: float = 1.0
    """ε ≥ 1 of the exits; 1.5 for ImageNet, 1 for CIFAR-100 in the authors' examples."""
    eps_last: float = 1.0
    """ε ≥ 1 of the student's own logits."""
    temperature: float = 1.0
    """T > 0."""
    kd_weight: float = 1.0
    """w_kd ≥ 0."""
    exit_weight: float = 1.0
    """w_exit ≥ 0; the authors' CIFAR-100 runs use 0.1."""
    stages: tuple[str, ...] | None = None
    """Taps of the student's stages, e.g. ("output:layer1", …), from the first to the last; None: the outputs of a
    convolutional network's stages, or four blocks of a transformer."""

    def __post_init__(self) -> None:
        check_temperature("ofa", self.temperature)
        if not (self.eps >= 1 and self.eps_last >= 1) or min(self.kd_weight, self.exit_weight) < 0:
            raise ConfigurationError(
                f"ofa: eps must be at least 1 and weights at least 0, got {self.eps}, {self.eps_last}, "
                f"{self.kd_weight} and {self.exit_weight}."
            )


def ofa(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, eps: float, temperature: float) -> Tensor:
    """The adaptive cross-entropy with the teacher's distribution.

    Args:
        student_logits: (example, class), any float type; widened to float32.
        teacher_logits: (example, class), detached here.
        target: (example, class) m: one-hot, or zeros where there is no label.
        eps: ε.
        temperature: T.

    Returns:
        (example,) nats, at least 0.

    Raises:
        MismatchError: if the logits differ in shape.
    """
    log_p, log_q = log_probabilities("ofa", student_logits, teacher_logits, temperature)
    mask = target.to(log_p.dtype)
    return -(((log_p.exp() + mask) ** eps - mask) * log_q).sum(-1)


def one_hot(labels: Tensor | None, like: Tensor) -> Tensor:
    """(example, class) of 0 and 1; a row of zeros for label -100, or for all where there are no labels."""
    if labels is None:
        return torch.zeros_like(like)
    known = labels != IGNORED
    return F.one_hot(labels.masked_fill(~known, 0), like.shape[-1]) * known[:, None]


class ConvExit(nn.Module):
    """From maps (example, channel, height, width) to classes: separable convolutions that halve, pooling, a classifier.

    Args:
        channels: of the maps.
        width: of the last convolution.
        halvings: how many blocks; 0: one convolution of size 1.
        classes: how many.
    """

    def __init__(self, channels: int, width: int, halvings: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for place in range(halvings):
            out = width if place == halvings - 1 else 2 * channels
            layers += [*_separable(channels, channels, 2), *_separable(channels, out, 1)]
            channels = out
        if not halvings:
            layers = [nn.Conv2d(channels, width, 1, bias=False)]
        self.layers = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        _start(self.classifier)

    def forward(self, states: Tensor) -> Tensor:
        """(example, class)."""
        return self.classifier(self.layers(states).mean((2, 3)))  # type: ignore[no-any-return]  # torch


def _separable(channels: int, out: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False),
        nn.Conv2d(channels, out, 1, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(),
    ]


class TokenExit(nn.Module):
    """From tokens (example, token, dim) to classes: patches merged to a small grid, transformer blocks, a classifier.

    Args:
        tokens: how many; those beyond the largest square stand first and are no patches (class token).
        width: dim.
        blocks: how many transformer blocks.
        classes: how many.
    """

    def __init__(self, tokens: int, width: int, blocks: int, classes: int) -> None:
        super().__init__()
        side = math.isqrt(tokens)
        self.first = tokens - side**2
        self.merging = nn.ModuleList(_Merging(width) for _ in range(max(int(math.log2(max(side / GRID, 1))), 0)))
        heads = HEADS if width % HEADS == 0 else 1
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
                )
                for _ in range(blocks)
            )
        )
        self.classifier = nn.Linear(width, classes)
        _start(self.classifier)

    def forward(self, states: Tensor) -> Tensor:
        """(example, class)."""
        lead, patches = states[:, : self.first], states[:, self.first :]
        for merging in self.merging:
            patches = merging(patches)
        states = self.blocks(torch.cat([lead, patches], 1))
        return self.classifier(states[:, 0] if self.first else states.mean(1))  # type: ignore[no-any-return]  # torch


class _Merging(nn.Module):
    """Four neighbours to one patch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4 * width), nn.Linear(4 * width, width, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        side = math.isqrt(patches.shape[1])
        even = side // 2 * 2
        grid = patches.reshape(len(patches), side, side, -1)[:, :even, :even]
        near = torch.cat([grid[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1).flatten(1, 2)
        return F.gelu(self.linear(self.norm(near)))


def _start(classifier: nn.Linear) -> None:
    nn.init.trunc_normal_(classifier.weight, std=0.02)
    nn.init.zeros_(classifier.bias)


class OFA(Objective):
    """The teacher's logits for the student's own and for an exit after each of its stages."""

    Config = OFAConfig
    config: OFAConfig
    task_weight: ClassVar[float | None] = 1.0
    exits: nn.ModuleList

    def needs(self, student: Sizes, teacher: Sizes | None) -> Needs:
        self.stages = self.config.stages or stages(student)
        self.width = max(_last_width(size.config) for size in (student, teacher) if size is not None)
        return Needs(student=frozenset({"logits", *self.stages}), teacher=frozenset({"logits"}))

    def build(self, student: Shapes, teacher: Shapes) -> None:
        classes = student["logits"][-1]
        made: list[nn.Module] = []
        for place, tap in enumerate(self.stages, 1):
            shape, left = student[tap], len(self.stages) - place
            if len(shape) == 4:
                made.append(ConvExit(shape[1], max(self.width, student[self.stages[-1]][1]), left, classes))
            elif len(shape) == 3:
                made.append(TokenExit(shape[1], shape[2], max(left, 1), classes))
            else:
                raise MismatchError(f"ofa: stage {tap} gives {tuple(shape)}; maps or tokens of an image were expected.")
        self.exits = nn.ModuleList(made)

    def per_position(self, rows: Rows, step: Step) -> Tensor:
        assert rows.teacher_logits is not None  # tapped by default
        target, settings = one_hot(rows.labels, rows.student_logits), self.config
        value = ofa(
            rows.student_logits, rows.teacher_logits, target, eps=settings.eps_last, temperature=settings.temperature
        )
        return settings.kd_weight * value

    def forward(self, signals: Signals, step: Step) -> Mapping[str, Tensor]:
        teacher, settings = signals.teacher["logits"], self.config
        target = one_hot(signals.positions.labels, teacher)
        found = {}
        for place, (tap, module) in enumerate(zip(self.stages, self.exits, strict=True), 1):
            states = signals.student[tap]
            logits = module(states.to(next(module.parameters()).dtype))
            value = ofa(logits, teacher, target, eps=settings.eps, temperature=settings.temperature)
            found[f"exit_{place}"] = settings.exit_weight * value
        return found


def stages(student: Sizes) -> tuple[str, ...]:
    """Taps after the student's stages, by its config.

    Raises:
        ConfigurationError: if the config tells of neither stages nor blocks.
    """
    depths = getattr(student.config, "depths", None)
    if depths is not None:
        return tuple(f"hidden:{place + 1}" for place in range(len(depths)))
    if student.layers:
        chosen = sorted({max(round(part * student.layers), 1) for part in BLOCKS})
        return tuple(f"hidden:{block}" for block in chosen)
    raise ConfigurationError(
        'ofa: the student\'s config tells neither depths nor layers. Name its stages: OFA(stages=("output:NAME", …)).'
    )


def _last_width(config: Any) -> int:
    widths = getattr(config, "hidden_sizes", None)
    return int(widths[-1]) if widths else int(getattr(config, "hidden_size", 0) or 0)


METHOD = Method(
    title="One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation",
    paper="arXiv:2310.19444",
    authors="Zhiwei Hao, Jianyuan Guo, Kai Han, Yehui Tang, Han Hu, Yunhe Wang, Chang Xu",
    year=2023,
    summary="Distils between any two kinds of image classifier, through exits that the student grows for training.",
    bibtex="""@inproceedings{hao2023oneforall,
  title = {One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation},
  author = {Hao, Zhiwei and Guo, Jianyuan and Han, Kai and Tang, Yehui and Hu, Han and Wang, Yunhe and Xu, Chang},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023}, eprint = {2310.19444}, archivePrefix = {arXiv}
}""",
    algorithm=("divergence",),
    knowledge=("feature",),
    tasks=("image-classification",),
    objective=OFA,
)
