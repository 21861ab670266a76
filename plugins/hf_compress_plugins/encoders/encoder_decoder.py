"""An encoder-decoder student of a decoder-only teacher: two layouts of one example.

Return of the Encoder: Maximizing Parameter Efficiency for SLMs, 2025, arXiv:2501.16273; microsoft/encoder-decoder-slm
(MIT).

    teacher   reads [source, padded on the left to E ; y_0 … y_D-1],          predicts y_i at position E - 1 + i
    student   encodes the source, its decoder reads [start ; y_0 … y_D-2],    predicts y_i at position i
    p, q      softmax of the teacher's and the student's logits, both cut to the v = min(V_T, V_S) ids that both have
    L_kd      KL(p ‖ q) at each position, y ~ the student itself (temperature 0.9, top-k 128, up to D tokens)
    L_ce      cross-entropy of the data's own answer
    L = a · L_kd + (1 - a) · L_ce                                             two passes of the student a step

L_ce is the task's own loss, of the Trainer's batch; the answer that L_kd is taken on is drawn anew at every step, from
the student as it is. No gradient flows through sampling, none into the teacher. With λ below 1 L_kd is taken on the
data's answers in the other batches, and so it is in evaluation. A source is scored nowhere; the end of an answer is.
No position that is scored sees the padding of an answer. A step writes an answer and runs the student once more than
plain training; both models' logits of the answers are held whole.

Student and teacher read the ids of one tokenizer, compared before training where the teacher brings its own; the sizes
that their vocabularies are padded to may differ. The student is any encoder-decoder that generates (the paper's has
twice as many layers in the encoder as in the decoder), the teacher a causal language model that was tuned on sources
with their answers after them: `with_answers` makes such rows. Batches are those of `DataCollatorForSeq2Seq`.

Differences from the authors' code:
- It averages L_kd over all B · D positions, padding after an answer included, where the teacher's predictions are
  arbitrary. Here values are averaged within each answer and then over answers. `masked=False` is the code's mean.
- It draws an answer when a row is loaded, so that no worker process can load rows. Here the step draws it.
- It turns sampled ids that the tokenizer does not have into the unknown token. Here ids that the teacher does not have
  are not sampled.
- Student and teacher are padded to E and D = 1024 and 256, here to the longest of a batch.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_compress.divergences import kl, log_probabilities
from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.objective import IGNORED, Inputs, Needs, Objective, Signals, Sizes, Step
from hf_compress.on_policy import check_answers, drawn, on_policy
from hf_compress.outputs import decoder_inputs, logits_of
from hf_compress.registry import Method
from hf_compress.taps import unwrap

SAMPLED = "sampled_labels"
"""The student's own answers, in a batch beside the data's."""


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig:
    """Hyper-parameters of distillation into an encoder-decoder."""

    a: float = 0.9
    """a, 0 … 1, weight of L_kd beside 1 - a of the task's own loss. The authors' script; 1 in their class."""
    lmbda: float = 1.0
    """λ, 0 … 1: part of batches whose L_kd is taken on the student's own answers. The paper's is 1."""
    max_new_tokens: int = 256
    """D, of a sampled answer. The authors'."""
    sampling_temperature: float = 0.9
    """Of the samples, the authors'; 0: the likeliest token at each place."""
    top_k: int = 128
    """Of the samples, the authors'; 0: all tokens."""
    masked: bool = True
    """False: the authors' code's mean over D positions of each row, those after its answer included."""

    def __post_init__(self) -> None:
        check_answers("encoder_decoder", self.lmbda, self.max_new_tokens)
        if not 0 <= self.a <= 1:
            raise ConfigurationError(f"encoder_decoder: a must lie in 0 … 1, got {self.a}.")
        if not 0 <= self.sampling_temperature < math.inf or self.top_k < 0:
            raise ConfigurationError(
                "encoder_decoder: sampling_temperature must be finite and at least 0 and top_k at least 0, got "
                f"{self.sampling_temperature} and {self.top_k}."
            )


def teacher_inputs(source_ids: Tensor, source_mask: Tensor, answers: Tensor, *, pad: int) -> Inputs:
    """What a decoder-only model reads of an example: the source, then the answer.

    Args:
        source_ids: (batch, E), padded anywhere.
        source_mask: (batch, E), 1 on real tokens.
        answers: (batch, D) labels, -100 after the answer's end.
        pad: id that fills.

    Returns:
        input_ids, attention_mask and position_ids, each (batch, E + D): the source padded on the left, the answer on
        the right; a row's first real token has position 0.

    Raises:
        MismatchError: for answers that are padded before their first token, or inside.
    """
    real = source_mask.bool()
    width = real.shape[1]
    placed = torch.arange(width, device=real.device) >= width - real.sum(1, keepdim=True)
    source = torch.full_like(source_ids, pad).masked_scatter(placed, source_ids[real])
    scored = answers != IGNORED
    if bool((scored[:, 1:] & ~scored[:, :-1]).any()):
        raise MismatchError(
            "encoder_decoder: labels are padded before their first token, or inside, and the teacher would read a gap. "
            'Pad them on the right: tokenizer.padding_side = "right" for DataCollatorForSeq2Seq.'
        )
    mask = torch.cat([placed, scored], 1).long()
    return {
        "input_ids": torch.cat([source, answers.masked_fill(~scored, pad)], 1),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }


def of_answers(teacher_logits: Tensor, length: int) -> Tensor:
    """(batch, D, vocab) the teacher's predictions of an answer's D tokens, at positions E - 1 … E - 2 + D.

    Args:
        teacher_logits: (batch, time, vocab) of `teacher_inputs`; the last D + 1 positions are enough.
        length: D.
    """
    return teacher_logits[:, -length - 1 : -1]


def encoder_decoder(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(p ‖ q) over the ids that both models have.

    Args:
        student_logits: (position, V_S), any float type; widened to float32.
        teacher_logits: (position, V_T), detached here.

    Returns:
        (position,) nats, at least 0.

    Raises:
        MismatchError: if the numbers of positions differ.
    """
    shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
    log_p, log_q = log_probabilities("encoder_decoder", student_logits[..., :shared], teacher_logits[..., :shared])
    return kl(log_p, log_q)


class EncoderDecoder(Objective):
    """The divergence on the student's own answers, beside the task's own loss on the data's."""

    Config = EncoderDecoderConfig
    config: EncoderDecoderConfig

    def __init__(self, config: Any = None, *, weight: float = 1.0, **settings: Any) -> None:
        super().__init__(config, weight=weight, **settings)
        self.task_weight = 1 - self.config.a  # type: ignore[misc]  # a is a setting here
        self._never = range(0)  # ids of the student's that the teacher does not have

    def overrides(self, method: str) -> bool:
        """With λ = 0 batches stay as they are."""
        return super().overrides(method) and (method != "batch" or self.config.lmbda > 0)

    def needs(self, student: Sizes, teacher: Sizes | None) -> Needs:
        """The method runs both models itself: none is tapped."""
        if student.kind != "tokens" or not getattr(student.config, "is_encoder_decoder", False):
            raise MismatchError(
                f"encoder_decoder: the student must be an encoder-decoder language model (AutoModelForSeq2SeqLM), its "
                f"outputs are {student.kind!r}. For a causal student use method='gkd'."
            )
        if teacher is not None and teacher.kind != "causal":
            raise MismatchError(
                f"encoder_decoder: the teacher must be a causal language model (AutoModelForCausalLM), its outputs are "
                f"{teacher.kind!r}. For a teacher like the student use method='gkd'."
            )
        known = teacher.vocab if teacher is not None else 0  # 0: its config does not tell
        self._never = range(known or student.vocab, student.vocab)
        return Needs(student=frozenset(), teacher=frozenset(), mean_over="examples")

    def batch(self, inputs: Inputs, step: Step) -> Inputs:
        settings = self.config
        if not drawn(step, settings.lmbda):
            return inputs
        sampling: dict[str, Any] = {"do_sample": False}
        if settings.sampling_temperature:
            sampling = {"do_sample": True, "temperature": settings.sampling_temperature, "top_p": 1.0}
            sampling["top_k"] = settings.top_k
        if self._never:
            sampling["suppress_tokens"] = list(self._never)
        sampled = on_policy(_source(inputs, step), step, max_new_tokens=settings.max_new_tokens, **sampling)
        return inputs | {SAMPLED: sampled["labels"]}

    def forward(self, signals: Signals, step: Step) -> Tensor:
        settings, inputs = self.config, signals.inputs
        answers = inputs.get(SAMPLED, inputs.get("labels"))
        if answers is None:
            raise MismatchError(
                "encoder_decoder: without labels there is no answer to compare both models on. Add labels, or train "
                "with lmbda=1 and evaluate on labelled rows."
            )
        if not settings.masked:
            answers = F.pad(answers, (0, max(settings.max_new_tokens - answers.shape[1], 0)), value=IGNORED)
        source, model = _source(inputs, step), unwrap(step.student)
        decoded = decoder_inputs(model, answers)
        output = step.run_student(grad=torch.is_grad_enabled(), **source, decoder_input_ids=decoded, use_cache=False)
        chosen = answers != IGNORED if settings.masked else torch.ones_like(answers, dtype=torch.bool)
        theirs = self._teacher_logits(source, answers, model, step)
        values = encoder_decoder(logits_of(output)[chosen], theirs[chosen])  # chosen first: what is left out may be NaN
        sums = values.new_zeros(len(answers)).index_add(0, chosen.nonzero()[:, 0], values)
        return settings.a * sums / chosen.sum(1).clamp(min=1)

    @staticmethod
    def _teacher_logits(source: Inputs, answers: Tensor, student: Any, step: Step) -> Tensor:
        """(batch, D, vocab)"""
        ids = source["input_ids"]
        real = source.get("attention_mask", torch.ones_like(ids))
        read: dict[str, Any] = dict(teacher_inputs(ids, real, answers, pad=student.config.pad_token_id or 0))
        length = answers.shape[1]
        return of_answers(logits_of(step.run_teacher(**read, logits_to_keep=length + 1)), length)


def _source(inputs: Inputs, step: Step) -> Inputs:
    """What the student's encoder reads of a batch."""
    if "input_ids" not in inputs:
        raise MismatchError(
            f"encoder_decoder: the source must be token ids, which the teacher reads too; the batch has no input_ids, "
            f"it has {sorted(inputs)}."
        )
    known = inspect.signature(unwrap(step.student).forward).parameters
    own = {name: value for name, value in inputs.items() if name in known and name != "labels"}
    return {name: value for name, value in own.items() if not name.startswith("decoder_")}


def with_answers(dataset: Any) -> Any:
    """Rows to tune a teacher on: each source with its answer after it, which alone is labelled.

    Args:
        dataset: a `datasets.Dataset` of an encoder-decoder's rows: input_ids and labels, neither padded.

    Returns:
        input_ids, attention_mask and labels, of one length in each row; the other columns are left out.
    """

    def joined(row: Mapping[str, Any]) -> dict[str, list[int]]:
        source, answer = list(row["input_ids"]), list(row["labels"])
        ids = source + answer
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED] * len(source) + answer}

    return dataset.map(joined, remove_columns=dataset.column_names)


METHOD = Method(
    title="Return of the Encoder: Maximizing Parameter Efficiency for SLMs",
    paper="arXiv:2501.16273",
    authors="Mohamed Elfeki, Rui Liu, Chad Voegele",
    year=2025,
    summary="An encoder-decoder learns from a decoder-only teacher on answers of its own, each model in its layout.",
    bibtex="""@misc{elfeki2025return,
  title = {Return of the Encoder: Maximizing Parameter Efficiency for {SLMs}},
  author = {Elfeki, Mohamed and Liu, Rui and Voegele, Chad},
  year = {2025}, eprint = {2501.16273}, archivePrefix = {arXiv}
}""",
    algorithm=("divergence",),
    knowledge=("feature", "feedback"),
    tasks=("text2text-generation",),
    objective=EncoderDecoder,
    preparation=with_answers,
)
