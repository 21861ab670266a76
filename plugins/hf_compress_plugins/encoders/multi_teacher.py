"""One student of several encoders: their distributions averaged, or their losses.

Avram, Catrina, Cercel, Dascălu, Rebedea, Păiş, Tufiş: Distilling the Knowledge of Romanian BERTs Using Multiple
Teachers, LREC 2022, arXiv:2112.12650. The loss with each teacher is DistilBERT's (Sanh et al., 2019, arXiv:1910.01108):

    L = 5 · T² · KL( p ‖ q ) + 2 · CE_MLM + 1 · ( 1 - cos(h_s, h_t) )     p, q = softmax(z_t / T), softmax(z_s / T)

KL and cosine are means over real tokens, the cosine is of the last hidden states, CE_MLM is the task's own loss.
Several teachers of weights w_k, equal by default and summing to 1, are combined in one of two ways:

    probs     KL( Σ_k w_k p_k ‖ q )        of one vocabulary or label set
    losses    Σ_k w_k KL( p_k ‖ q )        teachers with a tokenizer of their own give the terms of sentences alone

The gradients of the two with regard to the student are equal, as KL( Σ w_k p_k ‖ q ) = Σ w_k KL( p_k ‖ q ) - JS_w(p);
the values are not, and `probs` gives 0 for a student that is the mean. The cosines are averaged in both. A teacher with
its own tokenizer, one of `own_tokens`, adds

    w_k · ( 1 - cos( mean of h_s over the student's tokens, mean of h_k over its own ) )    of each sentence

where the student's states go through a learned projection wherever the widths differ; it is dropped after training.

[reconstruction] How the authors combine two teachers is not known: their student's vocabulary is the first teacher's,
and the second has another one, so that position by position nothing could be averaged. The weights 5, 2, 1 are those of
DistilBERT's script.

    DistillCallback(first, MultiTeacher(), frozen={"second": second})
    data = teacher_tokens(dataset, tokenizers={"second": its_tokenizer}, max_length=128)   # for own_tokens=("second",)

How near a student comes to each of its teachers the paper tells by label, probability and regression loyalty; they are
`label_loyalty`, `probability_loyalty` and `regression_loyalty` of hf_compress_evaluation.agreement, taken by
`hf-compress evaluate` against the one teacher that it is given. The formula of the last is our reading.

On classifiers KL is a mean over rows, and the cosine one over rows of each row's mean. Among sentences of a batch that
has tokens, the term of a sentence is a mean weighed by the sentence's length. With `restrict` KL is taken at labelled
tokens alone, as an option of DistilBERT's script does, and the cosines are the micro-batch's mean there. Logits are
whole here, at every real token; where memory is short KD(temperature=1) from an `EnsembleTeacher` beside Features runs
in chunks. (An EnsembleTeacher averages before the temperature, this method after it: at T = 1 they are one.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from hf_compress.distiller import select_logits
from hf_compress.divergences import check_temperature, kl, log_probabilities
from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.objective import Inputs, Needs, Objective, Shapes, Signals, Sizes, Step
from hf_compress.registry import Method
from hf_compress.teachers.ensemble import mean_logits
from hf_compress_plugins.encoders._triple import (
    STATES,
    mean_of_examples,
    real_states,
    scored,
    squared_logits,
    state_cosine,
)

Combine = Literal["probs", "losses"]
FIRST = "teacher"
"""The run's own teacher among the others, which are named by role."""


@dataclass(frozen=True, kw_only=True)
class MultiTeacherConfig:
    """How several teachers are combined."""

    combine: Combine = "probs"
    """The mean of distributions, or that of losses."""
    teachers: tuple[str, ...] = ("second",)
    """Roles of the teachers beside the run's own: DistillCallback(…, frozen={role: model})."""
    weights: tuple[float, ...] | None = None
    """w of the run's own teacher and of each role, > 0, divided by their sum; None: equal."""
    own_tokens: tuple[str, ...] = ()
    """Roles whose models read ROLE_input_ids and ROLE_attention_mask of the batch (`teacher_tokens`)."""
    temperature: float = 2.0
    """T > 0; DistilBERT's script."""
    soft: float = 5.0
    """Weight of T² · KL; DistilBERT's script."""
    cosine: float = 1.0
    """Weight of the cosines; DistilBERT's script. 0 for models without hidden states."""
    squared: float = 0.0
    """Weight of ‖z_s - z_t‖², an option of DistilBERT's script that it leaves off."""
    restrict: bool = False
    """KL at labelled tokens alone."""

    def __post_init__(self) -> None:
        check_temperature("multi_teacher", self.temperature)
        if self.combine not in get_args(Combine):
            raise ConfigurationError(f"multi_teacher: combine must be 'probs' or 'losses', got {self.combine!r}.")
        names = (FIRST, *self.teachers)
        if not self.teachers or len(set(names)) < len(names):
            raise ConfigurationError(
                f"multi_teacher: teachers must be roles of different names, at least one and none {FIRST!r}, got "
                f"{self.teachers}."
            )
        if self.weights is not None and not (
            len(self.weights) == len(names) and all(0 < weight < math.inf for weight in self.weights)
        ):
            raise ConfigurationError(
                f"multi_teacher: weights must be {len(names)} numbers above 0, of {names}, got {self.weights}."
            )
        if unknown := sorted(set(self.own_tokens) - set(self.teachers)):
            raise ConfigurationError(f"multi_teacher: own_tokens {unknown} are none of the teachers {self.teachers}.")
        if self.own_tokens and self.combine == "probs":
            raise ConfigurationError(
                "multi_teacher: combine='probs' averages distributions over one vocabulary, and models with own_tokens "
                "have another. Set combine='losses'."
            )
        if self.own_tokens and not self.cosine:
            raise ConfigurationError("multi_teacher: models with own_tokens teach by the cosine alone; set cosine > 0.")
        values = (self.soft, self.cosine, self.squared)
        if not all(0 <= value < math.inf for value in values) or not any(values):
            raise ConfigurationError(
                f"multi_teacher: soft, cosine and squared must be at least 0 and finite, one of them above 0, got "
                f"{values}."
            )

    @property
    def shares(self) -> dict[str, float]:
        """w by teacher, summing to 1."""
        names = (FIRST, *self.teachers)
        given = self.weights or (1.0,) * len(names)
        return {name: weight / sum(given) for name, weight in zip(names, given, strict=True)}


def teachers_kl(
    student_logits: Tensor,
    teachers_logits: Sequence[Tensor],
    weights: Sequence[float],
    *,
    temperature: float,
    combine: Combine,
) -> Tensor:
    """T² times the divergence from several teachers.

    Args:
        student_logits: (position, class), any float type; the softmax is taken in float32 or wider.
        teachers_logits: of each teacher (position, class), detached here.
        weights: w of each; those of `probs` sum to 1.
        temperature: T.
        combine: probs, the KL from the mean of the distributions, or losses, the mean of the KLs.

    Returns:
        (position,) nats, at least 0.

    Raises:
        MismatchError: if the logits differ in shape.
    """
    pairs = [log_probabilities("multi_teacher", student_logits, logits, temperature) for logits in teachers_logits]
    log_q = pairs[0][1]
    if combine == "probs":
        return temperature**2 * kl(mean_logits([log_p for log_p, _ in pairs], weights, "probabilities"), log_q)
    each = [weight * kl(log_p, log_q) for weight, (log_p, _) in zip(weights, pairs, strict=True)]
    return temperature**2 * torch.stack(each).sum(0)


def teacher_tokens(dataset: Any, *, tokenizers: Mapping[str, Any], max_length: int, column: str = "text") -> Any:
    """A data set with each further teacher's own reading of the text, padded to one length for any collator.

    Args:
        dataset: a `datasets.Dataset` with texts, and whatever the student reads.
        tokenizers: by role, of the teachers that are named in `own_tokens`.
        max_length: tokens kept of a text.
        column: name of the texts; it stays.

    Returns:
        the data set with ROLE_input_ids and ROLE_attention_mask beside its columns. A collator that masks tokens masks
        the student's alone: these teachers read the whole text.

    Raises:
        ConfigurationError: if no column of that name is there.
    """
    if column not in dataset.column_names:
        raise ConfigurationError(f"multi_teacher: the data set has no {column!r}, it has {dataset.column_names}.")

    def read(rows: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for role, tokenizer in tokenizers.items():
            own = tokenizer(rows[column], truncation=True, padding="max_length", max_length=max_length)
            found |= {f"{role}_{name}": own[name] for name in ("input_ids", "attention_mask")}
        return found

    return dataset.map(read, batched=True)


class MultiTeacher(Objective):
    """Soft targets and cosines of several teachers."""

    Config = MultiTeacherConfig
    config: MultiTeacherConfig
    task_weight: ClassVar[float | None] = 2.0

    def needs(self, student: Sizes, teacher: Sizes | None) -> Needs:
        if student.kind not in ("rows", "tokens") or getattr(student.config, "is_encoder_decoder", False):
            raise MismatchError(
                f"multi_teacher is for classifiers, taggers and masked language models; this one's outputs are "
                f"{student.kind!r}. Use EnsembleTeacher with a method for it."
            )
        settings = self.config
        self.rows, self.of_tokens = student.kind == "rows", student.kind == "tokens" and not settings.restrict
        taps = {"logits"} if settings.soft or settings.squared else set()
        taps |= {STATES} if settings.cosine else set()
        return Needs(
            student=frozenset(taps),
            teacher=frozenset(taps),
            frozen=settings.teachers,
            columns=frozenset(
                f"{role}_{name}" for role in settings.own_tokens for name in ("input_ids", "attention_mask")
            ),
            other_tokens=frozenset(settings.own_tokens),
            relates_positions=settings.restrict and not self.rows and settings.cosine > 0,
            mean_over="tokens" if self.of_tokens else "positions",
        )

    def build(self, student: Shapes, teacher: Shapes) -> None:
        self.project = nn.ModuleDict()
        if not self.config.cosine:
            return
        for name in self.config.shares:
            own, theirs = student[STATES][-1], teacher[STATES if name == FIRST else f"{name}/{STATES}"][-1]
            if own != theirs:
                self.project[name] = nn.Linear(own, theirs, bias=False)

    def frozen_batch(self, role: str, inputs: Inputs, step: Step) -> Inputs:
        if role not in self.config.own_tokens:
            return inputs
        return {name: inputs[f"{role}_{name}"] for name in ("input_ids", "attention_mask")}

    def forward(self, signals: Signals, step: Step) -> Mapping[str, Tensor]:
        settings, shares = self.config, self.config.shares
        taps = {name: signals.teacher if name == FIRST else signals.frozen[name] for name in shares}
        aligned = [name for name in shares if name not in settings.own_tokens]
        found: dict[str, Tensor] = {}
        if settings.soft or settings.squared:
            where = scored(signals, of_tokens=self.of_tokens)
            student = select_logits(signals.student["logits"], where)
            logits = [select_logits(taps[name]["logits"], where) for name in aligned]
            weights = [shares[name] for name in aligned]
            if settings.soft:
                found["soft"] = settings.soft * teachers_kl(
                    student, logits, weights, temperature=settings.temperature, combine=settings.combine
                )
            if settings.squared:
                squares = [w * squared_logits(student, one) for w, one in zip(weights, logits, strict=True)]
                found["squared"] = settings.squared * torch.stack(squares).sum(0)
        if settings.cosine:
            found["cosine"] = settings.cosine * self._over_tokens(signals, taps, shares, aligned)
        if settings.own_tokens:
            found["sentences"] = settings.cosine * self._over_sentences(signals, taps, shares)
        return found

    def _over_tokens(
        self, signals: Signals, taps: Mapping[str, Mapping[str, Tensor]], shares: Mapping[str, float], names: list[str]
    ) -> Tensor:
        """The cosines of aligned teachers: a value for each token, or for each position the mean that it stands for."""
        student, example = real_states(signals.student[STATES], signals.tokens)
        values = [
            shares[name]
            * state_cosine(self._projected(student, name), real_states(taps[name][STATES], signals.tokens)[0])
            for name in names
        ]
        total = torch.stack(values).sum(0)
        if self.rows:
            return mean_of_examples(total, example, signals.examples)
        return total if self.of_tokens else total.mean().expand(len(signals.positions.index))

    def _over_sentences(
        self, signals: Signals, taps: Mapping[str, Mapping[str, Tensor]], shares: Mapping[str, float]
    ) -> Tensor:
        """The cosines of pooled states, one a sentence, given to each token or position of it."""
        student, example = real_states(signals.student[STATES], signals.tokens)
        pooled = mean_of_examples(student, example, signals.examples)
        values = []
        for role in self.config.own_tokens:
            mask = signals.inputs[f"{role}_attention_mask"].bool()
            theirs = mean_of_examples(*real_states(taps[role][STATES], mask), signals.examples)
            values.append(shares[role] * state_cosine(self._projected(pooled, role), theirs))
        total = torch.stack(values).sum(0)
        if self.rows:
            return total
        return total[example if self.of_tokens else signals.positions.example]

    def _projected(self, states: Tensor, name: str) -> Tensor:
        """States of the student in the width of that teacher."""
        if name not in self.project:
            return states
        projection = self.project[name]
        projected: Tensor = projection(states.to(next(projection.parameters()).dtype))
        return projected


METHOD = Method(
    title="Distilling the Knowledge of Romanian BERTs Using Multiple Teachers",
    paper="arXiv:2112.12650",
    authors="Andrei-Marius Avram, Darius Catrina, Dumitru-Clementin Cercel, Mihai Dascălu, Traian Rebedea, "
    "Vasile Păiş, Dan Tufiş",
    year=2022,
    summary="One small encoder learns from several, by the mean of their distributions or of their losses "
    "[reconstruction].",
    bibtex="""@inproceedings{avram2022distilling,
  title = {Distilling the Knowledge of {Romanian} {BERT}s Using Multiple Teachers},
  author = {Avram, Andrei-Marius and Catrina, Darius and Cercel, Dumitru-Clementin and Dasc{\\u{a}}lu, Mihai and
            Rebedea, Traian and P{\\u{a}}i{\\c{s}}, Vasile and Tufi{\\c{s}}, Dan},
  booktitle = {Language Resources and Evaluation Conference},
  year = {2022}, eprint = {2112.12650}, archivePrefix = {arXiv}
}""",
    algorithm=("divergence", "similarity"),
    knowledge=("feature",),
    tasks=("fill-mask", "token-classification", "text-classification", "image-classification"),
    objective=MultiTeacher,
    preparation=teacher_tokens,
)
