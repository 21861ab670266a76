"""Swing distillation: what the teacher knows of private text is not handed to the student.

Li, Wu, Dong, Wu, Bian, Xiong: Swing Distillation: A Privacy-Preserving Knowledge Distillation Framework, 2022,
arXiv:2212.08349.

    T_i = T + (T_max - T) s_i                        temperature of each scored position
    p_i = softmax( z_t,i / T_i ),   and where s_i > 0:   p_i ← normalised max( p_i + Laplace(0, b s_i), 0 )
    q_i = softmax( z_s,i / T_i )                     or at T everywhere, with `temper_student=False`
    l_i = - T² Σ_v p_i[v] log q_i[v]

s_i, 0 … 1, tells how likely the token that position i predicts is private. It comes with the batch, in a column
`privacy` of the shape of input_ids; `private_tokens` makes it from patterns. The teacher carries no gradient.

A reconstruction: the paper's abstract says that the temperature is set per token by how likely it is private and that
noise is put into the soft targets; the two functions are ours. The noise is no certified differential privacy. T² is
that of the base temperature, not of T_i, which would give a private position its gradient back. With both sides
tempered the optimum is still the teacher: the protection is a weak gradient, and long training wears it off. With the
teacher's side alone the optimum itself is flat. What is not detected is not protected. The labels hold the secret too:
the task's own loss is left out (weight 0), and a weight that the user sets teaches what this method hides.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_compress.distiller import select_rows
from hf_compress.divergences import check_temperature, cross_entropy
from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.objective import IGNORED, Needs, Objective, Signals, Sizes, Step, require_one_shape
from hf_compress.registry import Method

COLUMN = "privacy"
PATTERNS: Mapping[str, float] = {
    r"[\w.+-]+@[\w-]+\.[\w.-]+": 1.0,
    r"\+?\d(?:[ ()./-]{0,2}\d){3,}": 1.0,
}
"""Score by pattern: e-mail addresses, and four digits or more, with spaces and signs between them: telephone and card
numbers, codes, dates. Ours; names need a tagger."""


@dataclass(frozen=True, kw_only=True)
class SwingConfig:
    """Hyper-parameters of swing distillation. The paper's values are not known; these are ours."""

    temperature: float = 1.0
    """T > 0, where nothing is private."""
    max_temperature: float = 16.0
    """T_max ≥ T, where s = 1. With 4 a student of our own trial knew half as much again of a secret as with 16."""
    noise: float = 0.05
    """b ≥ 0, scale of the noise on a probability where s = 1. It is on each entry: of V its mass is about b s V / 2, at
    0.05 and 32,000 entries 800 times the target's, and little of the teacher is left. Scale it by the vocabulary where
    tokens are only possibly private."""
    temper_student: bool = True
    """False: the student has temperature T everywhere, and learns to be flat where the text is private."""

    def __post_init__(self) -> None:
        check_temperature("swing", self.temperature)
        if not self.temperature <= self.max_temperature < math.inf or not 0 <= self.noise < math.inf:
            raise ConfigurationError(
                f"swing: needs temperature ≤ max_temperature < ∞ and noise of at least 0, got {self.temperature}, "
                f"{self.max_temperature} and {self.noise}."
            )


def temperatures(scores: Tensor, *, temperature: float, max_temperature: float) -> Tensor:
    """(position,) T_i from privacy scores (position,), 0 … 1."""
    return temperature + (max_temperature - temperature) * scores


def laplace(scores: Tensor, vocab: int, *, noise: float, generator: torch.Generator) -> Tensor:
    """(position, vocab) draws of Laplace(0, b s_i), finite; by the inverse of the distribution function.

    Each position draws from a seed of its own, so that entries which a model's vocabulary is padded with move nothing.

    Args:
        scores: (position,) s.
        vocab: number of entries.
        noise: b.
        generator: of the seeds.
    """
    device = generator.device
    seeds = torch.randint(2**62, (len(scores),), generator=generator, device=device).tolist()
    draws = [torch.rand(vocab, generator=torch.Generator(device).manual_seed(seed), device=device) for seed in seeds]
    place = 2 * torch.stack(draws).to(scores) - 1 if draws else scores.new_empty(0, vocab)
    edge = 1 - torch.finfo(torch.float32).eps  # rand gives 0 now and then, whose logarithm is infinite
    return -noise * scores[:, None] * place.sign() * torch.log1p(-place.abs().clamp(max=edge))


def soft_targets(teacher_logits: Tensor, temperature: Tensor, noise: Tensor) -> Tensor:
    """p with its noise.

    Args:
        teacher_logits: (position, vocab), any float type; widened to float32; detached here.
        temperature: (position,) T_i.
        noise: (position, vocab), added to probabilities; 0 where nothing is private.

    Returns:
        (position, vocab) sums to 1, at least 0, and 0 where the teacher excludes an entry; uniform over the others
        where the noise leaves nothing.
    """
    dtype = torch.promote_types(teacher_logits.dtype, torch.float32)
    logits = teacher_logits.detach().to(dtype)
    possible = logits != -math.inf
    clean = (logits / temperature.to(dtype)[:, None]).softmax(-1)
    noisy = torch.where(possible, (clean + noise.to(dtype)).clamp(min=0.0), 0.0)
    total = noisy.sum(-1, keepdim=True)
    flat = possible.to(dtype) / possible.sum(-1, keepdim=True)
    found = torch.where(total > 0, noisy / total, flat)
    return torch.where(clean.isnan(), math.nan, found)  # a broken teacher is not hidden


def swing(student_logits: Tensor, targets: Tensor, temperature: Tensor) -> Tensor:
    """(position,) cross-entropy of the tempered student to the targets, in nats.

    Args:
        student_logits: (position, vocab), any float type; widened to float32.
        targets: (position, vocab) probabilities.
        temperature: (position,) of the student.

    Raises:
        MismatchError: if the shapes differ.
    """
    require_one_shape("swing", student_logits, targets, "Both models need one vocabulary.")
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    log_q = (student_logits.to(dtype) / temperature.to(dtype)[:, None]).log_softmax(-1)
    return cross_entropy(targets.log(), log_q)


def private_tokens(
    dataset: Any,
    *,
    tokenizer: Any,
    max_length: int,
    column: str = "text",
    patterns: Mapping[str, float] = PATTERNS,
) -> Any:
    """Texts as tokens with the privacy of each, padded to one length for the default collator.

    Args:
        dataset: a `datasets.Dataset` with texts in `column`.
        tokenizer: a fast one, as it has to tell where in the text a token stands.
        max_length: tokens kept of a text.
        column: name of the texts.
        patterns: score, 0 … 1, by regular expression; a token has the largest of those that it touches.

    Returns:
        input_ids, attention_mask, labels and privacy.

    Raises:
        ConfigurationError: if the tokenizer is slow, or a score out of range.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigurationError(f"swing: needs a fast tokenizer, got {type(tokenizer).__name__}.")
    if wrong := {pattern: score for pattern, score in patterns.items() if not 0 <= score <= 1}:
        raise ConfigurationError(f"swing: scores of privacy lie in 0 … 1, got {wrong}.")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0

    def read(row: Mapping[str, Any]) -> dict[str, list[Any]]:
        text = row[column]
        found = tokenizer(text, truncation=True, max_length=max_length, return_offsets_mapping=True)
        ids = found["input_ids"]
        empty = max_length - len(ids)
        scores = [_score(span, text, patterns) for span in found["offset_mapping"]]
        return {
            "input_ids": ids + [pad] * empty,
            "attention_mask": [1] * len(ids) + [0] * empty,
            "labels": ids + [IGNORED] * empty,
            COLUMN: scores + [0.0] * empty,
        }

    return dataset.map(read, remove_columns=dataset.column_names)


def _score(span: Sequence[int], text: str, patterns: Mapping[str, float]) -> float:
    """The largest score of a pattern that a token's place in the text touches."""
    touched = [
        score
        for pattern, score in patterns.items()
        if any(found.start() < span[1] and span[0] < found.end() for found in re.finditer(pattern, text))
    ]
    return max(touched, default=0.0)


class Swing(Objective):
    """Softened targets that are flatter and noisier the more private a token is."""

    Config = SwingConfig
    config: SwingConfig
    task_weight: ClassVar[float | None] = 0.0

    def needs(self, student: Sizes, teacher: Sizes | None) -> Needs:
        return Needs(columns=frozenset({COLUMN}))

    def forward(self, signals: Signals, step: Step) -> Tensor:
        rows, settings = select_rows(signals), self.config
        assert rows.teacher_logits is not None  # tapped by default
        scores = self._scores(signals).to(torch.promote_types(rows.student_logits.dtype, torch.float32))
        own = temperatures(scores, temperature=settings.temperature, max_temperature=settings.max_temperature)
        noise = torch.zeros_like(rows.teacher_logits, dtype=scores.dtype)
        private = scores > 0
        vocab = noise.shape[-1]
        noise[private] = laplace(scores[private], vocab, noise=settings.noise, generator=step.generator)
        targets = soft_targets(rows.teacher_logits, own, noise)
        students = own if settings.temper_student else torch.full_like(own, settings.temperature)
        return settings.temperature**2 * swing(rows.student_logits, targets, students)

    def _scores(self, signals: Signals) -> Tensor:
        """(position,) s of the token that each position predicts."""
        found = signals.inputs.get(COLUMN)
        if found is None or found.shape != signals.tokens.shape:
            raise MismatchError(
                f"swing: needs a column {COLUMN!r} of the shape of input_ids, {tuple(signals.tokens.shape)}, got "
                f"{None if found is None else tuple(found.shape)}. `private_tokens` makes it from patterns."
            )
        if not bool(((found >= 0) & (found <= 1)).all()):
            raise MismatchError(f"swing: scores of privacy lie in 0 … 1, got {found.min()} … {found.max()}.")
        return F.pad(found, (0, 1))[:, 1:].flatten()[signals.positions.index]


METHOD = Method(
    title="Swing Distillation: A Privacy-Preserving Knowledge Distillation Framework",
    paper="arXiv:2212.08349",
    authors="Junzhuo Li, Xinwei Wu, Weilong Dong, Shuangzhi Wu, Chao Bian, Deyi Xiong",
    year=2022,
    summary="Flatter and noisier targets where a token is private, so that secrets stay with the teacher "
    "(a reconstruction from the abstract).",
    bibtex="""@misc{li2022swing,
  title = {Swing Distillation: A Privacy-Preserving Knowledge Distillation Framework},
  author = {Li, Junzhuo and Wu, Xinwei and Dong, Weilong and Wu, Shuangzhi and Bian, Chao and Xiong, Deyi},
  year = {2022}, eprint = {2212.08349}, archivePrefix = {arXiv}
}""",
    algorithm=("divergence",),
    knowledge=("feature",),
    tasks=("text-generation",),
    objective=Swing,
    preparation=private_tokens,
)
