"""A long-context encoder of half the layers, by DistilBERT's three terms.

Brown, Williamson, Anderson, Lawrence: Efficient Transformer Knowledge Distillation: A Performance Review, EMNLP 2023
Industry Track, arXiv:2311.13657. The loss is DistilBERT's (Sanh, Debut, Chaumond, Wolf, 2019, arXiv:1910.01108):

    L = 5 · T² · KL( softmax(z_t / T) ‖ softmax(z_s / T) ) + 2 · CE_MLM + 1 · ( 1 - cos(h_s, h_t) )

KL and cosine are means over real tokens, the cosine is of the last hidden states, CE_MLM is the task's own loss, a mean
over masked tokens. The teacher carries no gradient. T = 2 and the weights are those of the command in DistilBERT's
script; [reconstruction] the weights of this paper are not known, nor is its code.

The teacher is an encoder whose attention is linear in the length (Longformer, BigBird, Nyströmformer), or one with full
attention; the student has every other layer of it, 0, 2, 4, 7, 9, 11 of 12, with embeddings and head:

    student = long_context_student(teacher)                                  # of the teacher's class
    student = long_context_student(bert, config={"attention": "longformer", "window": 512, "length": 4096})
    data = long_rows(dataset, tokenizer=tokenizer, length=4096)              # texts one after another
    Trainer(student, …, data, DataCollatorForLanguageModeling(tokenizer), callbacks=[DistillCallback(teacher,
            "efficient_attention")])

then it is tuned for each task. With full attention in the teacher both read the same rows, so these are as long as the
teacher's positions go.

What such encoders do silently is an error here, before the first forward of a window: a BigBird computes full attention
on rows that are short for its blocks, and stays so (`keep_sparse` lets it choose anew each time; a student and a
teacher that went through `long_context_student` have it); a Nyströmformer with as many landmarks as tokens, its
default, computes full attention, with rows of another length than `segment_means_seq_len` it mixes sentences
(`set_length`), and it takes padding into its means. (Whatever is done, its rows depend a little on each other: its
inverse starts from a maximum over the batch.) A column `global_attention_mask` goes to each model that takes one; a
student that takes none beside a teacher that does learns what it has no way to compute. Attention maps of Longformer
are (batch, heads, time, window + 1), so methods on attention refuse it. To ONNX none of the three is exported: with
transformers 5.24 and torch 2.13 the exporter traces none of them at more than one length.

KL at every real token is taken some tokens at a time, and computed again in backward: kept are both models' logits, and
a copy of those at real tokens. With `restrict` it is taken at masked tokens, as an option of DistilBERT's script does;
the cosine is then the micro-batch's mean. `restrict` and cosine=0 beside Features(layers="last") keeps no whole logits
at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hf_compress import shrink
from hf_compress.distiller import select_logits
from hf_compress.divergences import check_temperature, softened_kl
from hf_compress.errors import ConfigurationError, MismatchError, UnknownNameError
from hf_compress.objective import Inputs, Needs, Objective, Rows, Signals, Sizes, Step
from hf_compress.registry import Method
from hf_compress_plugins.encoders._long_attention import (
    alternate,
    check_attention,
    check_length,
    is_landmarks,
    keep_sparse,
    kind,
    set_length,
    switched,
    to_longformer,
)
from hf_compress_plugins.encoders._triple import (
    STATES,
    real_states,
    scored,
    state_cosine,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["EfficientAttention", "keep_sparse", "long_context_student", "long_rows", "set_length"]
POSITIONS = 1024
"""Tokens whose KL is taken at once."""
GLOBAL = "global_attention_mask"


@dataclass(frozen=True, kw_only=True)
class EfficientAttentionConfig:
    """Hyper-parameters of the three terms; the task's own is `task_weight`, 2 by default."""

    temperature: float = 2.0
    """T > 0; DistilBERT's script."""
    soft: float = 5.0
    """Weight of T² · KL; DistilBERT's script."""
    cosine: float = 1.0
    """Weight of the cosine; DistilBERT's script. 0 for models of different widths."""
    restrict: bool = False
    """KL at masked tokens alone."""

    def __post_init__(self) -> None:
        check_temperature("efficient_attention", self.temperature)
        values = (self.soft, self.cosine)
        if not all(0 <= value < math.inf for value in values) or not any(values):
            raise ConfigurationError(
                f"efficient_attention: soft and cosine must be at least 0 and finite, one above 0, got {values}."
            )


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """What a student is made of."""

    layers: int | None = None
    """How many; None: half of the teacher's, rounded down."""
    attention: Literal["teacher", "longformer"] = "teacher"
    """The teacher's own, or Longformer's with the weights of a BERT or RoBERTa."""
    window: int = 512
    """Tokens that each token of a new Longformer sees."""
    length: int | None = None
    """Most tokens of a row, for a new Longformer; of every row, for a Nyströmformer; None: the teacher's."""

    def __post_init__(self) -> None:
        if self.attention not in ("teacher", "longformer"):
            raise ConfigurationError(
                f"efficient_attention: attention must be 'teacher' or 'longformer', got {self.attention!r}."
            )
        if self.length is not None and self.length < 1:
            raise ConfigurationError(f"efficient_attention: length must be at least 1 token, got {self.length}.")


def soft_targets_apart(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float, positions: int = POSITIONS
) -> Tensor:
    """T² · KL at each position, `positions` of them at a time, of which backward keeps the logits alone.

    Args:
        student_logits: (position, vocab), any float type; the softmax is taken in float32 or wider.
        teacher_logits: (position, vocab), detached here.
        temperature: T.
        positions: how many are taken at once.

    Returns:
        (position,) nats, at least 0.

    Raises:
        MismatchError: if the shapes differ.
    """
    if len(student_logits) != len(teacher_logits) or len(student_logits) <= positions:
        return softened_kl("efficient_attention", student_logits, teacher_logits, temperature=temperature)
    parts = zip(*(torch.split(logits, positions) for logits in (student_logits, teacher_logits.detach())), strict=True)
    found = [
        checkpoint(
            softened_kl,
            "efficient_attention",
            *part,
            temperature=temperature,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for part in parts
    ]
    return torch.cat(found)


def long_context_student(teacher: PreTrainedModel, *, config: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """A student with every other layer of an encoder, and its embeddings and head.

    Args:
        teacher: an encoder of transformers; a BigBird is turned back to sparse attention and kept so.
        config: fields of `StudentConfig`.

    Raises:
        UnknownNameError: for a field that there is not.
        ConfigurationError: for settings that the architecture cannot be given.
    """
    known = StudentConfig.__dataclass_fields__
    for name in (config or {}).keys() - known.keys():
        raise UnknownNameError("setting of long_context_student", name, known)
    settings = StudentConfig(**(config or {}))
    keep_sparse(teacher)
    depth = int(teacher.config.num_hidden_layers)
    layers = alternate(depth, settings.layers if settings.layers is not None else max(depth // 2, 1))
    if settings.attention == "longformer":
        if settings.length is None:
            raise ConfigurationError("efficient_attention: a new Longformer needs a length, the most tokens of a row.")
        return to_longformer(teacher, layers, window=settings.window, length=settings.length)
    student = shrink(teacher, layers=layers)
    if settings.length is not None:
        if kind(student.config) != "nystromformer":
            raise ConfigurationError(
                "efficient_attention: length is for attention='longformer' and for a Nyströmformer, and the teacher is "
                f"a {type(teacher).__name__}, whose positions stay."
            )
        set_length(student, settings.length)
    keep_sparse(student)
    return student


def long_rows(dataset: Any, *, tokenizer: Any, length: int, column: str = "text") -> Any:
    """Texts one after another, cut into rows of one length.

    Args:
        dataset: a `datasets.Dataset` with texts.
        tokenizer: its first and last special tokens, where it has such, stand at both ends of a row, and the last one
            behind each text.
        length: tokens of every row, special ones included, at least 3; what is left at the end of each thousand texts
            is dropped.
        column: name of the texts.

    Returns:
        the data set with input_ids and attention_mask alone.

    Raises:
        ConfigurationError: if no column of that name is there, or the texts do not fill a row.
    """
    if column not in dataset.column_names:
        raise ConfigurationError(f"efficient_attention: the data set has no {column!r}, it has {dataset.column_names}.")
    if length < 3:
        raise ConfigurationError(f"efficient_attention: rows must have at least 3 tokens, got {length}.")
    names = ("cls_token_id", "bos_token_id"), ("sep_token_id", "eos_token_id")
    first, last = (
        [value for value in (getattr(tokenizer, name, None) for name in both) if value is not None][:1]
        for both in names
    )
    inside = length - len(first) - len(last)

    def pack(rows: Mapping[str, Any]) -> dict[str, Any]:
        read = tokenizer(rows[column], add_special_tokens=False)["input_ids"]
        stream = [token for ids in read for token in (*ids, *last)]
        starts = range(0, len(stream) - inside + 1, inside)
        found = [[*first, *stream[start : start + inside], *last] for start in starts]
        return {"input_ids": found, "attention_mask": [[1] * length for _ in found]}

    packed = dataset.map(pack, batched=True, remove_columns=dataset.column_names)
    if not len(packed):
        raise ConfigurationError(f"efficient_attention: the texts are shorter than one row of {length} tokens.")
    return packed


class EfficientAttention(Objective):
    """Soft targets and cosine of last states, on rows that both models compute as their configs say."""

    Config = EfficientAttentionConfig
    config: EfficientAttentionConfig
    task_weight: ClassVar[float | None] = 2.0

    def needs(self, student: Sizes, teacher: Sizes | None) -> Needs:
        settings = self.config
        if student.kind != "tokens" or getattr(student.config, "is_encoder_decoder", False):
            raise MismatchError(
                f"efficient_attention is for masked language models and taggers; this one's outputs are "
                f"{student.kind!r}. Distil such a model first, and tune the student on the task."
            )
        if settings.cosine and teacher is not None and teacher.width not in (0, student.width):  # 0: a cache's
            raise MismatchError(
                f"efficient_attention: the cosine compares states of one width, and the student has {student.width}, "
                f"the teacher {teacher.width}. Take long_context_student(teacher), or set cosine=0."
            )
        self.configs = {"student": student.config, "teacher": None if teacher is None else teacher.config}
        for whose, config in self.configs.items():
            check_attention(config, whose)
        if kind(student.config) == "nystromformer" and not is_landmarks(student.config):
            raise ConfigurationError(
                "efficient_attention: the student, a Nyströmformer with as many landmarks as tokens of a row, computes "
                "full attention. Call set_length(student, length) with the length of the rows."
            )
        taps = {"logits"} if settings.soft else set()
        taps |= {STATES} if settings.cosine else set()
        return Needs(
            student=frozenset(taps),
            teacher=frozenset(taps),
            relates_positions=settings.restrict and settings.soft > 0 and settings.cosine > 0,
            mean_over="positions" if settings.restrict and settings.soft else "tokens",
        )

    def overrides(self, method: str) -> bool:
        """Logits of masked tokens can be taken in chunks; all else is one value a real token."""
        apart = self.config.restrict and self.config.soft > 0
        if method == "per_position":
            return apart
        return super().overrides(method) and (method != "forward" or not apart or self.config.cosine > 0)

    def count(self, inputs: Inputs) -> int | None:
        """No denominator of its own; but it is called before any forward, which a row of another length would spoil."""
        given = inputs.get("input_ids", inputs.get("inputs_embeds"))
        if given is not None:
            mask = inputs.get("attention_mask")
            padded = mask is not None and not bool(mask.all())
            for whose, config in self.configs.items():
                check_length(config, given.shape[1], whose, padded=padded)
        return None

    def per_position(self, rows: Rows, step: Step) -> Mapping[str, Tensor]:
        assert rows.teacher_logits is not None  # tapped
        _check_sparse(step)
        return {"soft": self._soft(rows.student_logits, rows.teacher_logits)}

    def forward(self, signals: Signals, step: Step) -> Mapping[str, Tensor]:
        _check_sparse(step)
        settings, found = self.config, dict[str, Tensor]()
        if settings.soft and not settings.restrict:
            where = scored(signals, of_tokens=True)
            logits = [select_logits(side["logits"], where) for side in (signals.student, signals.teacher)]
            found["soft"] = self._soft(*logits)
        if settings.cosine:
            states = [real_states(side[STATES], signals.tokens)[0] for side in (signals.student, signals.teacher)]
            value = settings.cosine * state_cosine(*states)
            alone = settings.restrict and settings.soft > 0
            found["cosine"] = value.mean().expand(len(signals.positions.index)) if alone else value
        return found

    def _soft(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        value = soft_targets_apart(student_logits, teacher_logits, temperature=self.config.temperature)
        return self.config.soft * value


def _check_sparse(step: Step) -> None:
    if switched(step.student):
        raise MismatchError(
            "efficient_attention: the student, a BigBird, was turned to full attention by an earlier short batch. Call "
            "keep_sparse(student) before training."
        )


METHOD = Method(
    title="Efficient Transformer Knowledge Distillation: A Performance Review",
    paper="arXiv:2311.13657",
    authors="Nathan Brown, Ashton Williamson, Tahj Anderson, Logan Lawrence",
    year=2023,
    summary="A long-context encoder of half the layers, by soft targets, last states and masked tokens, weighed as in "
    "DistilBERT [reconstruction].",
    bibtex="""@inproceedings{brown2023efficient,
  title = {Efficient Transformer Knowledge Distillation: A Performance Review},
  author = {Brown, Nathan and Williamson, Ashton and Anderson, Tahj and Lawrence, Logan},
  booktitle = {Conference on Empirical Methods in Natural Language Processing: Industry Track},
  year = {2023}, eprint = {2311.13657}, archivePrefix = {arXiv}
}""",
    algorithm=("divergence", "similarity"),
    knowledge=("feature",),
    tasks=("fill-mask", "token-classification"),
    objective=EfficientAttention,
    student=long_context_student,
    preparation=long_rows,
)
