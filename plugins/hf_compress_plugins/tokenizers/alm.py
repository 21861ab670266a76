"""Distillation into a student with another tokenizer, by the likelihoods of pieces of text that both can spell.

Minixhofer, Vulić, Ponti: Cross-Tokenizer Distillation via Approximate Likelihood Matching, 2025, arXiv:2503.20083.

    chunk c: the shortest pair of token runs, one of each model, that spell the same bytes
    ℓ_c = Σ_{i in c} log p( u_i | u_<i )                             of each model
    e_c = log Σ_{v begins with space, tab or newline, or is special} p( v | all tokens up to the chunk's last )
    L_c = ℓ_c + e_c                                                  "these bytes, and then the end of a token"
    d(c) = - [ e^a b + (1 - e^a) log(1 - e^b) ],   a = L_teacher / τ - ε,  b = L_student / τ - ε

Chunks are joined up to the next one whose teacher has exp(e) > γ; a joined chunk's end is its last one's. The teacher
carries no gradient. The student may learn the text itself (`sft`) and the teacher's states at the chunks' ends
(`latents`) beside it; the losses are averaged, or weighed by the inverse of the norm of their gradients with regard to
the student's last block (`weighting="gradients"`, which needs one more backward pass through that block a loss and
changes its meaning with accumulation).

A student that is the teacher with another tokenizer starts with its embeddings: `fvt` copies those of tokens of the
same bytes or role and averages those of the old pieces of the others. One that reads bytes (`byte_tokenizer`) may also
be `expanded`: at each byte the old embedding of the longest old token that ends there is added.

Differences from the authors' code: the mean runs over the joined chunks of each row and then over rows, as their number
is not known before the teacher has run (without joining and other losses: over all chunks of a window, as published).
The code applies the joining matrix twice when it counts, so that its loss is a little larger. A chunk counts where both
models predict something of it; the code asks the teacher alone. Its network of one layer over all embeddings, on by
default, is left out: it is a way to train new embeddings, no part of the objective.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.objective import Inputs, Needs, Objective, Signals, Sizes, Step
from hf_compress.registry import Method
from hf_compress.taps import blocks, unwrap
from hf_compress_plugins.tokenizers._alignment import space_mask as space_mask
from hf_compress_plugins.tokenizers._embeddings import byte_tokenizer as byte_tokenizer
from hf_compress_plugins.tokenizers._embeddings import expanded as expanded
from hf_compress_plugins.tokenizers._embeddings import fvt as fvt
from hf_compress_plugins.tokenizers._modeling_expanded_input import ExpandedInputConfig, ExpandedInputForCausalLM
from hf_compress_plugins.tokenizers._preparation import two_tokenizations as two_tokenizations

Distance = Literal["binary_ce", "reverse_binary_kl", "binary_kl_temp_limit", "abs", "joschu_k2", "joschu_k3"]
DISTANCES = ("binary_ce", "reverse_binary_kl", "binary_kl_temp_limit", "abs", "joschu_k2", "joschu_k3")
EPSILON = 1e-6
"""ε: keeps a chunk of probability 1 away from log 0 (authors' code)."""
COLUMNS = frozenset({"teacher_input_ids", "teacher_attention_mask", "chunks"})
"""Of `two_tokenizations`: the teacher's tokens; (row, chunk, 4) start and end among the teacher's and the student's."""
STATES = "hidden:-1"


@dataclass(frozen=True, kw_only=True)
class ALMConfig:
    """Hyper-parameters of ALM; the authors' defaults."""

    distance: Distance = "binary_ce"
    """d."""
    temperature: float = 100.0
    """τ > 0."""
    ends: bool = True
    """Add e_c; needs the masks of `spaces`."""
    join: bool = True
    """Join chunks whose end is unlikely."""
    threshold: float = 0.1
    """γ, 0 … 1."""
    sft: bool = True
    """Learn the text too."""
    latents: Literal["none", "l2", "l2_channelwise"] = "none"
    """Learn the teacher's states at the ends of chunks, by squared distance over the mean square of all states or of
    each channel; for a student that is the teacher with another tokenizer."""
    weighting: Literal["mean", "gradients"] = "mean"
    """How the losses are combined; the authors recommend "gradients". The gradient of d is about 1/τ of the text's: at
    τ = 100 a mean of both hardly learns from the teacher."""

    def __post_init__(self) -> None:
        if self.distance not in DISTANCES or self.latents not in ("none", "l2", "l2_channelwise"):
            raise ConfigurationError(
                f"alm: distance must be one of {', '.join(DISTANCES)} and latents none, l2 or l2_channelwise, got "
                f"{self.distance!r} and {self.latents!r}."
            )
        if self.weighting not in ("mean", "gradients"):
            raise ConfigurationError(f"alm: weighting must be mean or gradients, got {self.weighting!r}.")
        if not 0 < self.temperature < math.inf or not 0 <= self.threshold <= 1:
            raise ConfigurationError(
                f"alm: needs temperature > 0 and threshold in 0 … 1, got {self.temperature} and {self.threshold}."
            )


def membership(starts: Tensor, ends: Tensor, length: int) -> Tensor:
    """(row, token, chunk) of 0 and 1: whether a token belongs to a chunk; starts and ends (row, chunk), -1 for none."""
    place = torch.arange(length, device=starts.device)[None, :, None]
    return ((place >= starts[:, None]) & (place < ends[:, None])).float()


def chunk_likelihoods(logits: Tensor, ids: Tensor, member: Tensor) -> Tensor:
    """ℓ: (row, chunk) log-likelihoods.

    Args:
        logits: (row, token, vocab), any float type; widened to float32.
        ids: (row, token).
        member: (row, token, chunk); the first token is never predicted and counts nowhere.
    """
    used = member[:, 1:].any(2)  # rows are chosen before any softmax: padding may hold NaN
    log_p = _log_probabilities(logits[:, :-1][used])
    following = torch.zeros(used.shape, dtype=log_p.dtype, device=log_p.device)
    following = following.masked_scatter(used, log_p.gather(1, ids[:, 1:][used][:, None]).squeeze(1))
    return torch.einsum("rt,rtc->rc", following, member[:, 1:].to(following))


def end_likelihoods(logits: Tensor, member: Tensor, spaces: Tensor) -> Tensor:
    """e: (row, chunk) log-probability that a token which begins a word follows the chunk's last.

    Args:
        logits: (row, token, vocab).
        member: (row, token, chunk).
        spaces: (vocab,) bool.
    """
    there = member.any(1)
    rows = logits[
        torch.arange(len(logits), device=logits.device)[:, None].expand_as(there)[there], _last(member)[there]
    ]
    inside = _log_probabilities(rows).masked_fill(~spaces.bool(), -math.inf).logsumexp(-1).clamp(max=0)
    return torch.zeros(there.shape, dtype=inside.dtype, device=inside.device).masked_scatter(there, inside)


def _log_probabilities(logits: Tensor) -> Tensor:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(dtype).log_softmax(-1).clamp(max=0)


def _last(member: Tensor) -> Tensor:
    """(row, chunk) place of each chunk's last token; 0 for none."""
    place = torch.arange(member.shape[1], device=member.device)[None, :, None]
    return (member.bool() * place).amax(1)


def groups(ends: Tensor, threshold: float) -> Tensor:
    """(row, chunk) number of the joined chunk that each belongs to: a new one begins after an end likelier than γ.

    Args:
        ends: (row, chunk) the teacher's e.
        threshold: γ.
    """
    boundary = ends.exp() > threshold
    return boundary.long().cumsum(1) - boundary.long()


def join(values: Tensor, group: Tensor) -> Tensor:
    """(row, group) sums of (row, chunk) values over their groups."""
    return torch.zeros_like(values).scatter_add(1, group, values)


def join_ends(ends: Tensor, group: Tensor, valid: Tensor) -> Tensor:
    """(row, group) the end of each group's last valid chunk; 0 for an empty group."""
    place = torch.arange(group.shape[1], device=group.device).expand_as(group)
    last = torch.full_like(group, -1).scatter_reduce(1, group, place.masked_fill(~valid, -1), "amax")
    return ends.gather(1, last.clamp(min=0)).masked_fill(last < 0, 0.0)


def distance(teacher: Tensor, student: Tensor, *, kind: Distance, temperature: float) -> Tensor:
    """d of two log-likelihoods of any shape, ≤ 0 each; the teacher's is detached here."""
    teacher = teacher.detach()
    if kind == "binary_kl_temp_limit":
        own, theirs = student - EPSILON, teacher - EPSILON
        return (theirs - own) + theirs * (torch.log(-own) - torch.log(-theirs))
    a, b = teacher / temperature - EPSILON, student / temperature - EPSILON
    ratio = (teacher - student) / temperature
    if kind == "abs":
        return (teacher - student).abs()
    if kind == "joschu_k2":
        return ratio.square() / 2
    if kind == "joschu_k3":
        return ratio.exp() - 1 - ratio
    if kind == "reverse_binary_kl":
        return b.exp() * (b - a) + (1 - b.exp()) * (_log_rest(b) - _log_rest(a))
    return -(a.exp() * b + (1 - a.exp()) * _log_rest(b))


def _log_rest(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, without cancellation at either end."""
    small = x < -math.log(2)
    return torch.where(
        small, torch.log1p(-torch.where(small, x, -1.0).exp()), torch.log(-torch.expm1(torch.where(small, -0.1, x)))
    )


def latents(student: Tensor, teacher: Tensor, valid: Tensor, *, channelwise: bool) -> Tensor:
    """Squared distance of states at the ends of chunks, by the teacher's mean square.

    Args:
        student: (row, chunk, dim).
        teacher: (row, chunk, dim), detached here.
        valid: (row, chunk) bool.
        channelwise: divide each dimension by its own mean square instead of by the mean over all.

    Returns:
        (row, chunk); its mean over valid chunks is the loss.
    """
    theirs, weight = teacher.detach().float(), valid.float()[..., None]
    square = (theirs.square() * weight).mean((0, 1) if channelwise else (0, 1, 2)) / weight.mean()
    return ((student.float() - theirs).square() * weight / (square + 1e-8)).mean(-1)


class ALM(Objective):
    """Likelihoods of chunks, beside the text itself and the teacher's states.

    Args:
        config: an `ALMConfig`; alternatively its fields as keywords.
        spaces: `space_mask` of the student and of the teacher; needed for `ends` and `join`.
        weight: factor of all terms.
    """

    Config = ALMConfig
    config: ALMConfig
    task_weight: ClassVar[float | None] = 0.0
    student_spaces: Tensor
    teacher_spaces: Tensor

    def __init__(
        self, config: Any = None, *, spaces: tuple[Tensor, Tensor] | None = None, weight: float = 1.0, **settings: Any
    ) -> None:
        super().__init__(config, weight=weight, **settings)
        if spaces is None and (self.config.ends or self.config.join):
            raise ConfigurationError(
                "alm: give ALM(spaces=(space_mask(tokenizer, vocab), space_mask(teacher_tokenizer, vocab))), or "
                "ends=False and join=False."
            )
        if spaces is not None:
            self.register_buffer("student_spaces", spaces[0], persistent=False)
            self.register_buffer("teacher_spaces", spaces[1], persistent=False)

    def needs(self, student: Sizes, teacher: Sizes | None) -> Needs:
        taps = frozenset({"logits"} if self.config.latents == "none" else {"logits", STATES})
        return Needs(
            student=taps,
            teacher=taps,
            columns=COLUMNS,
            same_tokens=False,
            mean_over="examples",
            relates_positions=self.config.weighting == "gradients",
        )

    def teacher_batch(self, inputs: Inputs, step: Step) -> Inputs:
        return {"input_ids": inputs["teacher_input_ids"], "attention_mask": inputs["teacher_attention_mask"]}

    @property
    def _over_chunks(self) -> bool:
        """Whether one mean fits: unjoined chunks are known from the batch, and no other loss runs over rows."""
        return not (self.config.join or self.config.sft or self.config.latents != "none")

    def count(self, inputs: Inputs) -> int | None:
        return int(self._valid(*self._members(inputs)).sum()) if self._over_chunks else None

    @staticmethod
    def _members(inputs: Inputs) -> tuple[Tensor, Tensor]:
        """(row, token, chunk) of the teacher's and the student's tokens."""
        chunks = inputs["chunks"]
        sides = ((0, "teacher_input_ids"), (2, "input_ids"))
        teacher, student = (
            membership(chunks[..., first], chunks[..., first + 1], inputs[name].shape[1]) for first, name in sides
        )
        return teacher, student

    @staticmethod
    def _valid(teacher: Tensor, student: Tensor) -> Tensor:
        """(row, chunk) chunks of which both models predict something."""
        return teacher[:, 1:].any(1) & student[:, 1:].any(1)

    def forward(self, signals: Signals, step: Step) -> Mapping[str, Tensor]:
        members = self._members(signals.inputs)
        valid = self._valid(*members)
        found = {"alm": self._likelihoods(signals, members, valid)}
        if self.config.sft:
            found["sft"] = self._text(signals)
        if self.config.latents != "none":
            found["latents"] = self._states(signals, members)
        return self._weighed(found, step)

    def _likelihoods(self, signals: Signals, members: tuple[Tensor, Tensor], valid: Tensor) -> Tensor:
        """(row,) mean distance of a row's chunks; their sum where the mean runs over those of the window."""
        names, settings = ("teacher_input_ids", "input_ids"), self.config
        logits = (signals.teacher["logits"], signals.student["logits"])
        if logits[0].shape[:2] != signals.inputs[names[0]].shape:
            raise MismatchError(
                f"alm: the teacher gave logits for {tuple(logits[0].shape[:2])} tokens, it was to read "
                f"{tuple(signals.inputs[names[0]].shape)}."
            )
        members = (members[0] * valid[:, None], members[1] * valid[:, None])
        likely = [
            chunk_likelihoods(one, signals.inputs[name], member)
            for one, name, member in zip(logits, names, members, strict=True)
        ]
        if settings.ends or settings.join:
            spaces = (self.teacher_spaces, self.student_spaces)
            ends = [end_likelihoods(one, m, s) for one, m, s in zip(logits, members, spaces, strict=True)]
        if settings.join:
            group = groups(ends[0].detach(), settings.threshold)
            counted = join(valid.float(), group) > 0
            likely = [join(one * valid, group) for one in likely]
            ends = [join_ends(one, group, valid) for one in ends]
        else:
            counted = valid
        both = [
            one + end if settings.ends else one
            for one, end in zip(likely, ends if settings.ends else likely, strict=True)
        ]
        both = [one.masked_fill(~counted, -1.0) for one in both]
        value = distance(*both, kind=settings.distance, temperature=settings.temperature).masked_fill(~counted, 0.0)
        total = value.sum(1)
        return total if self._over_chunks else total / counted.sum(1).clamp(min=1)

    @staticmethod
    def _text(signals: Signals) -> Tensor:
        """(row,) mean cross-entropy of the student on the text."""
        where, logits = signals.positions, signals.student["logits"]
        if where.labels is None:
            return logits.sum() * torch.zeros(signals.examples, device=logits.device)
        rows = logits.flatten(0, 1)[where.index].float()
        losses = nn.functional.cross_entropy(rows, where.labels, reduction="none")
        count = torch.bincount(where.example, minlength=signals.examples).clamp(min=1)
        return torch.zeros(signals.examples, device=losses.device).index_add(
            0, where.example, losses / count[where.example]
        )

    def _states(self, signals: Signals, members: tuple[Tensor, Tensor]) -> Tensor:
        """(row,) mean distance of states, of every chunk that has tokens."""
        valid = members[0].any(1) & members[1].any(1)
        states = [
            taps[STATES].gather(1, _last(member)[..., None].expand(-1, -1, taps[STATES].shape[-1]))
            for taps, member in zip((signals.teacher, signals.student), members, strict=True)
        ]
        if states[0].shape != states[1].shape:
            raise MismatchError(f"alm: latents need one width, got {states[1].shape[-1]} and {states[0].shape[-1]}.")
        value = latents(states[1], states[0], valid, channelwise=self.config.latents == "l2_channelwise")
        return value.sum(1) / valid.sum(1).clamp(min=1)

    def _weighed(self, found: dict[str, Tensor], step: Step) -> Mapping[str, Tensor]:
        weights = {name: 1 / len(found) for name in found}
        if self.config.weighting == "gradients" and torch.is_grad_enabled() and len(found) > 1:
            weights = gradient_weights(found, _last_parameters(step.student))
        return {name: weights[name] * value for name, value in found.items()}


def _last_parameters(student: nn.Module) -> list[nn.Parameter]:
    """What is trained of the student's last block."""
    config = unwrap(student).config
    stack = blocks(student, config.get_text_config().num_hidden_layers)
    return [parameter for parameter in stack[-1].parameters() if parameter.requires_grad]


def gradient_weights(losses: Mapping[str, Tensor], parameters: Sequence[nn.Parameter]) -> dict[str, float]:
    """Weights that sum to 1 and give each loss the same norm of gradients.

    Args:
        losses: each of any shape; its mean counts.
        parameters: with regard to which gradients are taken; the graph is kept.
    """
    inverse = {}
    for name, loss in losses.items():
        gradients = torch.autograd.grad(loss.mean(), parameters, retain_graph=True, allow_unused=True)
        norm = (
            torch.stack([g.float().square().sum() for g in gradients if g is not None] or [torch.zeros(())])
            .sum()
            .sqrt()
        )
        inverse[name] = 1 / max(float(norm), 1e-12)
    return {name: value / sum(inverse.values()) for name, value in inverse.items()}


AutoConfig.register("expanded_input", ExpandedInputConfig, exist_ok=True)
AutoModelForCausalLM.register(ExpandedInputConfig, ExpandedInputForCausalLM, exist_ok=True)

METHOD = Method(
    title="Cross-Tokenizer Distillation via Approximate Likelihood Matching",
    paper="arXiv:2503.20083",
    authors="Benjamin Minixhofer, Ivan Vulić, Edoardo Maria Ponti",
    year=2025,
    summary="Distils into a student with another tokenizer, by the likelihoods of text that both models can spell.",
    bibtex="""@misc{minixhofer2025crosstokenizer,
  title = {Cross-Tokenizer Distillation via Approximate Likelihood Matching},
  author = {Minixhofer, Benjamin and Vuli{\\'c}, Ivan and Ponti, Edoardo Maria},
  year = {2025}, eprint = {2503.20083}, archivePrefix = {arXiv}
}""",
    algorithm=("divergence",),
    knowledge=("feature",),
    tasks=("text-generation",),
    objective=ALM,
    preparation=two_tokenizations,
    tokenizer=fvt,
)
