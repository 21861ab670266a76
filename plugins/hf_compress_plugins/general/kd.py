"""Softened-target distillation.

Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531, section 2.

    l_i = T² · KL( softmax(z_t,i / T) ‖ softmax(z_s,i / T) )    at each scored position i

The T² keeps the gradient's size about constant in T (ibid.). The teacher carries no gradient. The task's own loss stays
beside it with weight 1: the paper asks for a weighted average of both and names no weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_compress.divergences import check_temperature, softened_kl
from hf_compress.objective import Objective, Rows, Step
from hf_compress.registry import Method


@dataclass(frozen=True, kw_only=True)
class KDConfig:
    """Hyper-parameters of softened-target distillation."""

    temperature: float = 2.0
    """T > 0, divides both logits. Our choice; the paper has no single value."""

    def __post_init__(self) -> None:
        check_temperature("kd", self.temperature)


def kd(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """KL from the teacher's to the student's softened distribution, times T², at each position.

    Args:
        student_logits: (position, vocab), any float type; the softmax is taken in float32 or wider.
        teacher_logits: (position, vocab), detached here.
        temperature: T.

    Returns:
        (position,) nats, at least 0. Weights and the mean are the framework's.

    Raises:
        MismatchError: if the two logits differ in shape, e.g. in vocabulary size.
    """
    return softened_kl("kd", student_logits, teacher_logits, temperature=temperature)


class KD(Objective):
    """Softened targets at every scored position of classifiers, taggers and language models."""

    Config = KDConfig
    config: KDConfig

    def per_position(self, rows: Rows, step: Step) -> Tensor:
        assert rows.teacher_logits is not None  # tapped by default
        return kd(rows.student_logits, rows.teacher_logits, temperature=self.config.temperature)


METHOD = Method(
    title="Distilling the Knowledge in a Neural Network",
    paper="arXiv:1503.02531",
    authors="Geoffrey Hinton, Oriol Vinyals, Jeff Dean",
    year=2015,
    summary="The student matches the teacher's distribution, softened by a temperature.",
    bibtex="""@misc{hinton2015distilling,
  title = {Distilling the Knowledge in a Neural Network},
  author = {Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff},
  year = {2015}, eprint = {1503.02531}, archivePrefix = {arXiv}
}""",
    algorithm=("divergence",),
    knowledge=("feature",),
    tasks=(
        "text-classification",
        "token-classification",
        "question-answering",
        "fill-mask",
        "text-generation",
        "text2text-generation",
        "image-classification",
        "audio-classification",
        "automatic-speech-recognition",
    ),
    default_for=(
        "text-classification",
        "token-classification",
        "question-answering",
        "fill-mask",
        "image-classification",
        "audio-classification",
    ),
    objective=KD,
)
