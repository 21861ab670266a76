"""Masked autoencoders as distillers: a small one learns a large one's states on the same visible patches.

Bai, Wang, Xiao, Wei, Wang, Yuille, Zhou, Xie: Masked Autoencoders Enable Efficient Knowledge Distillers, CVPR 2023,
arXiv:2208.12256, section 3.

    L = L_rec + mean over images, tokens, dimensions of | norm(f_t) - norm(W f_s + b) |

Both encoders see the same visible patches: one noise a batch decides which. f are the raw outputs of one block each at
three quarters of the depth, the class token included; norm divides each token by its Euclidean length. L_rec is the
student's own reconstruction loss, weight 1. The teacher carries no gradient and stops after its block. Without a
projector, which needs one width, the states are compared as they are, as in the authors' code.

Some releases of transformers leave the fixed position embeddings of a new ViTMAE at zero (5.24 does), with which
neither masking nor reconstruction knows where a patch is. `masked_student` makes one that has them.

    student = masked_student(teacher, config={"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6})
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, ViTMAEConfig, ViTMAEForPreTraining

from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.objective import Inputs, Needs, Objective, Shapes, Signals, Sizes, Step, require_one_shape
from hf_compress.registry import Method
from hf_compress.taps import unwrap

logger = logging.getLogger(__name__)

NOISE = "noise"
"""Input of a masked autoencoder's forward: (image, patch); the smallest are visible."""
DEPTH = 0.75
SAME = ("image_size", "patch_size", "mask_ratio")
"""Settings without which one noise does not mean the same patches to both."""


@dataclass(frozen=True, kw_only=True)
class DMAEConfig:
    """Hyper-parameters of DMAE; the authors' defaults."""

    distance: Literal["L1", "L2"] = "L1"
    """Absolute or squared difference."""
    projector: bool = True
    """False: no projection and no normalisation; needs one width."""
    student_layer: int | None = None
    """Block, from 0; None: at three quarters of the depth (8 of 12)."""
    teacher_layer: int | None = None
    """Block, from 0; None: at three quarters of the depth (17 of 24)."""

    def __post_init__(self) -> None:
        if self.distance not in ("L1", "L2"):
            raise ConfigurationError(f"dmae: distance must be L1 or L2, got {self.distance!r}.")


def patch_noise(images: int, patches: int, draw: torch.Generator) -> Tensor:
    """(image, patch) uniform noise, by which both models choose what they see."""
    return torch.rand(images, patches, generator=draw, device=draw.device)


def dmae(student: Tensor, teacher: Tensor, *, distance: Literal["L1", "L2"], normalise: bool) -> Tensor:
    """How far the student's states are from the teacher's, for each image.

    Args:
        student: (image, token, dim) after the projection; widened to float32.
        teacher: (image, token, dim), detached here.
        distance: absolute or squared differences.
        normalise: each token to length 1 first.

    Returns:
        (image,) mean over tokens and dimensions, at least 0.

    Raises:
        MismatchError: if the shapes differ.
    """
    require_one_shape("dmae", student, teacher, "Use the projector, and models of one patch size and mask ratio.")
    dtype = torch.promote_types(student.dtype, torch.float32)
    own, theirs = student.to(dtype), teacher.detach().to(dtype)
    if normalise:
        own, theirs = F.normalize(own, dim=-1), F.normalize(theirs, dim=-1)
    difference = own - theirs
    return (difference.abs() if distance == "L1" else difference.square()).mean((1, 2))


def grid_positions(side: int, dim: int) -> Tensor:
    """(1, 1 + side², dim) the fixed position embeddings of masked autoencoders; the class token's is zero.

    The first half of a patch's is sines, then cosines of its column, the second half those of its row, at frequencies
    10000^(-4 j / dim), j = 0 … dim / 4 - 1; patches row by row.

    Raises:
        ConfigurationError: if dim is no multiple of 4.
    """
    if dim % 4:
        raise ConfigurationError(f"dmae: position embeddings need a width that is a multiple of 4, got {dim}.")
    angles = torch.arange(side)[:, None] * 10000.0 ** (-torch.arange(dim // 4) / (dim // 4))
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    places = torch.arange(side**2)
    patches = torch.cat([waves[places % side], waves[places // side]], 1)
    return torch.cat([torch.zeros(1, dim), patches])[None]


def masked_student(teacher: PreTrainedModel, *, config: Mapping[str, Any] | None = None) -> ViTMAEForPreTraining:
    """An untrained masked autoencoder that sees what the teacher sees.

    Args:
        teacher: a ViTMAE.
        config: what differs from the teacher's config: widths, layers, heads, decoder.

    Raises:
        MismatchError: for a teacher of another architecture.
    """
    if not isinstance(teacher.config, ViTMAEConfig):
        raise MismatchError(f"dmae: the teacher must be a masked autoencoder (ViTMAE), got {type(teacher).__name__}.")
    settings = {k: v for k, v in teacher.config.to_dict().items() if k not in ("model_type", "architectures")}
    student = ViTMAEForPreTraining(ViTMAEConfig(**settings | dict(config or {})))
    for positions in (student.vit.embeddings.position_embeddings, student.decoder.decoder_pos_embed):
        positions.data.copy_(grid_positions(int((positions.shape[1] - 1) ** 0.5), positions.shape[2]))
    return student


def block_at(layer: int | None, depth: int, whose: str) -> int:
    """The block that is compared: the given one, or that at three quarters of the depth.

    Raises:
        MismatchError: if the model has no such block.
    """
    block = max(int(DEPTH * depth) - 1, 0) if layer is None else layer
    if not 0 <= block < depth:
        raise MismatchError(f"dmae: the {whose} has blocks 0 … {depth - 1}, asked for {block}.")
    return block


class DMAE(Objective):
    """States of one block of each model, on the same visible patches."""

    Config = DMAEConfig
    config: DMAEConfig
    task_weight: ClassVar[float | None] = 1.0
    projection: nn.Linear

    def needs(self, student: Sizes, teacher: Sizes | None) -> Needs:
        assert teacher is not None  # the callback asks for one first
        self._check(student.config, teacher.config)
        own = block_at(self.config.student_layer, student.layers, "student") + 1
        theirs = block_at(self.config.teacher_layer, teacher.layers, "teacher") + 1
        self.taps = (f"hidden:{own}", f"hidden:{theirs}")
        return Needs(
            student=frozenset(self.taps[:1]),
            teacher=frozenset(self.taps[1:]),
            teacher_until=self.taps[1] if theirs < teacher.layers else None,
            mean_over="examples",
        )

    @staticmethod
    def _check(student: Any, teacher: Any) -> None:
        for name in SAME:
            own, theirs = (getattr(config, name, None) for config in (student, teacher))
            if own is None or own != theirs:
                raise MismatchError(
                    f"dmae: student and teacher must be masked autoencoders (ViTMAE) with one {name}, got {own} and "
                    f"{theirs}."
                )

    def build(self, student: Shapes, teacher: Shapes) -> None:
        if self.config.projector:
            self.projection = nn.Linear(student[self.taps[0]][-1], teacher[self.taps[1]][-1])

    def batch(self, inputs: Inputs, step: Step) -> Inputs:
        student = unwrap(step.student)
        if step.global_step == step.micro == 0 and not student.vit.embeddings.position_embeddings.any():
            logger.warning(
                "dmae: the student's position embeddings are all zero, so that it cannot tell patches apart. Make it "
                "with masked_student(teacher, config=…)."
            )
        config = student.config
        pixels = inputs["pixel_values"]
        patches = (pixels.shape[-2] // config.patch_size) * (pixels.shape[-1] // config.patch_size)
        return inputs | {NOISE: patch_noise(len(pixels), patches, step.generator)}

    def forward(self, signals: Signals, step: Step) -> Tensor:
        own = signals.student[self.taps[0]]
        if self.config.projector:
            own = self.projection(own.to(next(self.projection.parameters()).dtype))
        settings = self.config
        return dmae(own, signals.teacher[self.taps[1]], distance=settings.distance, normalise=settings.projector)


METHOD = Method(
    title="Masked Autoencoders Enable Efficient Knowledge Distillers",
    paper="arXiv:2208.12256",
    authors="Yutong Bai, Zeyu Wang, Junfei Xiao, Chen Wei, Huiyu Wang, Alan Yuille, Yuyin Zhou, Cihang Xie",
    year=2023,
    summary="A small masked autoencoder learns a large one's states on the same visible patches, without labels.",
    bibtex="""@inproceedings{bai2023masked,
  title = {Masked Autoencoders Enable Efficient Knowledge Distillers},
  author = {Bai, Yutong and Wang, Zeyu and Xiao, Junfei and Wei, Chen and Wang, Huiyu and Yuille, Alan and
            Zhou, Yuyin and Xie, Cihang},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2023}, eprint = {2208.12256}, archivePrefix = {arXiv}
}""",
    algorithm=("similarity",),
    knowledge=("feature",),
    tasks=("image-feature-extraction",),
    objective=DMAE,
    student=masked_student,
)
