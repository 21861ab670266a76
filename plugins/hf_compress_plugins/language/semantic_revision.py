"""Multi-granularity semantic revision: corrected samples, a divergence on a learned band, relations inside spans.

Liu, Zhang, Li, Li, Huang, Chen, Tang, Hu, Xiong, Wang: Multi-Granularity Semantic Revision for Large Language Model
Distillation, ACL 2026, arXiv:2407.10068.

    answers   y ~ student;  E = { i : y_i ≠ t_i },  t_i = argmax p_i,   p_i, q_i given the student's own y_<i
              j = argmax_{i ∈ E} KL( p_i ‖ q_i );  y_j ← t_j, what follows j is written anew by the student; once
    tokens    p_(1) ≥ … ≥ p_(V), c_k = p_(1) + … + p_(k), c_0 = 0;  (l, u) = f_sub( log p, log q at the 64 likeliest )
              m_k = σ( (c_k - l) / s ) · σ( (u - c_(k-1)) / s ),  m_1 = 1
              l_i = Σ_k m_k p_k log(p_k / q_k) + r_p log( r_p / r_q ),   r = 1 - Σ m p,  1 - Σ m q
                    + max( 0, 0.5 - Σ_k m_k p_k )
    spans     R_i = p_i ∘ p_(i+1) for neighbours i, i+1 in one span;  mean over pairs of ‖ R_i^teacher - R_i^student ‖
    L         the task's loss + tokens + spans, each with weight 1, means within an answer, then over answers

Each part works alone: `revised=0`, `dac_weight=0`, `span_weight=0` leave one out. The teacher carries no gradient, nor
do f_sub's inputs and the answers; f_sub is learned with the student by the tokens' term and dropped afterwards.

[reconstruction] No code of the authors is public and their text leaves much open: the form of f_sub and its mask, the
direction of the KL that finds j, what is done where E is empty (here: nothing), and whether the distance of relations
is squared (`squared`). In the form above, tokens outside of the band are one class more, so that l_i without its last
summand lies between 0 and the whole KL; `form="renormalised"` divides p and q by what is kept of each instead, as the
text suggests. In both a mask that keeps the first token alone is the easiest to please: the last summand, ours, works
against it, and the kept mass is logged as `distill/semantic_revision.kept_mass`. Spans are those of a chunker of the
user's (`with_spans`), or words: the paper takes phrases.

With revised answers the task's own loss is left out, as their labels are the student's own words. R_i has entries
of the size 1/V², so that at weight 1 the spans' gradient is small beside the tokens': raise `span_weight` by what the
logs say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from hf_compress.distiller import select_logits, select_rows
from hf_compress.divergences import REMEDY, kl, log_probabilities
from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.objective import (
    IGNORED,
    Inputs,
    Needs,
    Objective,
    Rows,
    Shapes,
    Signals,
    Sizes,
    Step,
    positions,
    require_one_shape,
)
from hf_compress.on_policy import drawn, ends_of, on_policy
from hf_compress.outputs import logits_of
from hf_compress.registry import Method
from hf_compress.taps import evaluating, unwrap
from hf_compress_plugins.language._spans import ALONE, BEGINS, SPANS
from hf_compress_plugins.language._spans import boundaries as boundaries
from hf_compress_plugins.language._spans import with_spans as with_spans

WIDTH = 64
"""Tokens whose probabilities f_sub reads, and neurons of its hidden layer [reconstruction]."""
START = (0.05, 0.95)
"""l and u before training [reconstruction]."""
LEAST_LOG = -50.0
"""What f_sub reads of a token that is excluded."""
Form = Literal["bucket", "renormalised"]


@dataclass(frozen=True, kw_only=True)
class SemanticRevisionConfig:
    """Hyper-parameters of semantic revision; the weights are the paper's, the rest reconstructed."""

    revised: float = 1.0
    """Part of batches, 0 … 1, whose answers are the student's own, corrected; 0: the data's answers."""
    max_new_tokens: int = 128
    """Of an answer, corrected or not. GKD's."""
    sampling_temperature: float = 1.0
    """Of the samples, from the whole vocabulary; 0: the likeliest tokens."""
    dac_weight: float = 1.0
    """Weight of the divergence on the band; 0: there is no f_sub."""
    form: Form = "bucket"
    """What becomes of tokens outside of the band: one class more, or left out of both distributions."""
    softness: float = 0.02
    """s > 0, in probability mass."""
    least_mass: float = 0.5
    """Of the teacher's probability, below which the band's loss is raised by what is lacking, 0 … 1."""
    span_weight: float = 1.0
    """Weight of the relations; 0: no spans are needed, and logits may be taken in chunks."""
    squared: bool = False
    """Whether the distance of two relations is squared."""

    def __post_init__(self) -> None:
        weights = (self.dac_weight, self.span_weight, self.sampling_temperature)
        if not 0 <= self.revised <= 1 or not all(0 <= value < math.inf for value in weights):
            raise ConfigurationError(
                "semantic_revision: revised must lie in 0 … 1, and dac_weight, span_weight and sampling_temperature be "
                f"finite and at least 0, got {self.revised} and {weights}."
            )
        if not (self.revised or self.dac_weight or self.span_weight):
            raise ConfigurationError(
                "semantic_revision: revised, dac_weight and span_weight are all 0: nothing is done."
            )
        if self.form not in ("bucket", "renormalised"):
            raise ConfigurationError(f"semantic_revision: form must be bucket or renormalised, got {self.form!r}.")
        if not 0 < self.softness < math.inf or not 0 <= self.least_mass <= 1 or self.max_new_tokens < 1:
            raise ConfigurationError(
                "semantic_revision: softness must be positive and finite, least_mass lie in 0 … 1 and max_new_tokens "
                f"be at least 1, got {self.softness}, {self.least_mass} and {self.max_new_tokens}."
            )


def error_positions(
    student_logits: Tensor, teacher_logits: Tensor, tokens: Tensor, example: Tensor, examples: int
) -> Tensor:
    """Where each answer goes wrong most: the largest KL among the tokens that the teacher would not choose.

    Args:
        student_logits: (position, vocab), each given the answer before it.
        teacher_logits: (position, vocab).
        tokens: (position,) what the student wrote.
        example: (position,) the answer, 0 … examples - 1, that each belongs to.
        examples: number of answers.

    Returns:
        (example,) index of a position; -1 for an answer whose every token the teacher would choose too.

    Raises:
        MismatchError: if the logits differ in shape.
    """
    log_p, log_q = log_probabilities("semantic_revision", student_logits, teacher_logits)
    wrong = log_p.argmax(-1) != tokens
    distance = kl(log_p, log_q)
    found = example.new_full((examples,), -1)
    for one in range(examples):
        mine = (wrong & (example == one)).nonzero().squeeze(-1)
        if len(mine):
            found[one] = mine[distance[mine].argmax()]
    return found


def corrected(
    sampled: Inputs,
    place: Tensor,
    choice: Tensor,
    regenerate: Callable[[Inputs, int], Inputs],
    *,
    limit: int,
    ends: Sequence[int],
) -> Inputs:
    """The batch with one token of each answer replaced and the rest of it written anew.

    Args:
        sampled: as `on_policy` gives it: prompts padded on the left, labels on the answers alone.
        place: (batch,) of the token, from the answer's first, 0; -1: the answer stays as it is.
        choice: (batch,) what is put there.
        regenerate: from rows whose every token is a prompt, and how many tokens are wanted, to their continuations, in
            the form of `sampled`.
        limit: most tokens of an answer.
        ends: ids of end-of-sequence tokens; an answer is not continued after one.

    Returns:
        The same columns.
    """
    ids, labels, mask = sampled["input_ids"], sampled["labels"], sampled["attention_mask"].bool()
    start = int((labels != IGNORED).any(0).long().argmax())
    changed = place >= 0
    last = torch.where(changed, start + place, ids.shape[1])
    column = torch.arange(ids.shape[1], device=ids.device)
    ids = torch.where(changed[:, None] & (column == last[:, None]), choice[:, None], ids)
    stays = mask & (column <= last[:, None])
    answers = [row[start:][kept[start:]] for row, kept in zip(ids, stays, strict=True)]
    end = torch.isin(choice, torch.tensor(list(ends), dtype=choice.dtype, device=choice.device))
    rows = (changed & ~end & (place + 1 < limit)).nonzero().squeeze(-1)
    if len(rows):
        prompts = {"input_ids": ids[rows], "attention_mask": stays[rows].long()}
        wanted = limit - 1 - int(place[rows].min())
        found = regenerate(prompts | {"labels": torch.full_like(ids[rows], IGNORED)}, wanted)
        for row, new, label in zip(rows.tolist(), found["input_ids"], found["labels"], strict=True):
            answers[row] = torch.cat([answers[row], new[label != IGNORED]])[:limit]
    answer = pad_sequence(answers, batch_first=True)
    real = pad_sequence([torch.ones_like(one) for one in answers], batch_first=True)
    made = {
        "input_ids": torch.cat([ids[:, :start], answer], 1),
        "attention_mask": torch.cat([mask[:, :start].long(), real], 1),
        "labels": torch.cat([labels[:, :start], answer.masked_fill(real == 0, IGNORED)], 1),
    }
    if "position_ids" in sampled:
        made["position_ids"] = (made["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return sampled | made


def log_mask(log_p: Tensor, lower: Tensor, upper: Tensor, *, softness: float) -> Tensor:
    """log m of each token, softly 0 between the two quantiles.

    Args:
        log_p: (position, vocab) of the teacher, the likeliest token first.
        lower: (position,) l, 0 … 1.
        upper: (position,) u, at least l.
        softness: s.

    Returns:
        (position, vocab) at most 0; 0 for the first token.
    """
    mass = log_p.exp().cumsum(-1)
    before = F.pad(mass[:, :-1], (1, 0))
    inside = F.logsigmoid((mass - lower[:, None]) / softness) + F.logsigmoid((upper[:, None] - before) / softness)
    first = torch.arange(log_p.shape[-1], device=log_p.device) == 0
    return inside.masked_fill(first, 0.0)


def kept_mass(log_p: Tensor, log_m: Tensor) -> Tensor:
    """(position,) Σ m p, 0 … 1."""
    return (log_p + log_m).exp().sum(-1)


def dac_kl(log_p: Tensor, log_q: Tensor, log_m: Tensor, *, form: Form) -> Tensor:
    """The divergence of what the mask keeps.

    Args:
        log_p: (position, vocab) of the teacher, normalised.
        log_q: (position, vocab) of the student, in the same order.
        log_m: (position, vocab) of `log_mask`; -inf: left out.
        form: bucket: what is left out is one class more; renormalised: it is left out of both.

    Returns:
        (position,) nats, at least 0; as a bucket at most KL(p ‖ q).
    """
    kept = (log_p + log_m).exp()
    difference = torch.where(kept > 0, log_p - log_q, 0.0)
    if form == "renormalised":
        of_p, of_q = ((one + log_m).logsumexp(-1) for one in (log_p, log_q))
        return ((log_p + log_m - of_p[:, None]).exp() * difference).sum(-1) - of_p + of_q
    left_out = -torch.expm1(log_m)
    rest_p, rest_q = ((left_out * one.exp()).sum(-1) for one in (log_p, log_q))
    tiny = torch.finfo(rest_q.dtype).tiny  # 0 · log 0 = 0; a quotient's gradient would overflow
    return (kept * difference).sum(-1) + rest_p * (rest_p.clamp(min=tiny).log() - rest_q.clamp(min=tiny).log())


class Band(nn.Module):
    """f_sub: where the band of a position lies. A smaller vocabulary reads as one with tokens that are excluded."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(2 * WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        nn.init.normal_(self.out.weight, std=1e-3)
        with torch.no_grad():
            self.out.bias.copy_(torch.tensor(START).logit())

    def forward(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """(position,) l and u, 0 … 1, from (position, vocab) log-probabilities in the teacher's order."""
        lacking = max(WIDTH - log_p.shape[-1], 0)
        read = [F.pad(one.detach()[:, :WIDTH], (0, lacking), value=LEAST_LOG) for one in (log_p, log_q)]
        features = torch.cat(read, -1).clamp(min=LEAST_LOG).to(self.out.weight.dtype)
        ends = self.out(self.hidden(features).relu()).sigmoid()
        return ends.amin(-1), ends.amax(-1)


def span_ids(kinds: Tensor) -> Tensor:
    """(batch, time) a number for each span of a row, from what `boundaries` says of its tokens."""
    alone = kinds == ALONE
    begins = alone | (kinds == BEGINS) | F.pad(alone[:, :-1], (1, 0), value=True)
    return begins.cumsum(1)


def neighbours(spans: Tensor, index: Tensor, example: Tensor) -> Tensor:
    """The positions whose token and the next one lie in one span.

    Args:
        spans: (position,) of the token that each position predicts, negative for none.
        index: (position,) row of the flattened logits; neighbours follow one another.
        example: (position,)

    Returns:
        (pair,) index i of each pair (i, i + 1).
    """
    together = (spans[1:] == spans[:-1]) & (spans[1:] >= 0) & (index[1:] == index[:-1] + 1)
    return (together & (example[1:] == example[:-1])).nonzero().squeeze(-1)


def span_relation(student_logits: Tensor, teacher_logits: Tensor, left: Tensor, *, squared: bool) -> Tensor:
    """How far the two models' relations of neighbours are apart.

    Args:
        student_logits: (position, vocab), any float type; widened to float32.
        teacher_logits: (position, vocab), detached here.
        left: (pair,) of `neighbours`; other positions are not looked at.
        squared: whether the distance is squared.

    Returns:
        (pair,) 0 … √2, or 0 … 2; its gradient is 0 where both are equal.

    Raises:
        MismatchError: if the logits differ in shape.
    """
    require_one_shape("semantic_revision", student_logits, teacher_logits, REMEDY)
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    own, theirs = (
        logits[left].to(dtype).softmax(-1) * logits[left + 1].to(dtype).softmax(-1)
        for logits in (student_logits, teacher_logits.detach())
    )
    distance = own - theirs
    return distance.square().sum(-1) if squared else torch.linalg.vector_norm(distance, dim=-1)


class SemanticRevision(Objective):
    """Answers that are corrected once, the divergence on a learned band, and relations inside spans.

    Args:
        config: a `SemanticRevisionConfig`; alternatively its fields as keywords.
        boundaries: `boundaries(tokenizer)`, by which words are the spans; None: the batch has a column "span_ids", as
            `with_spans` makes it, which the student's own answers cannot have.
        weight: factor of all terms.

    Raises:
        ConfigurationError: if spans are asked for in revised answers, and no boundaries are given.
    """

    Config = SemanticRevisionConfig
    config: SemanticRevisionConfig
    logged: ClassVar[frozenset[str]] = frozenset({"kept_mass"})
    kinds: Tensor

    def __init__(
        self, config: Any = None, *, boundaries: Tensor | None = None, weight: float = 1.0, **settings: Any
    ) -> None:
        super().__init__(config, weight=weight, **settings)
        revised = self.config.revised > 0
        self.task_weight = 0.0 if revised else 1.0  # type: ignore[misc]  # by config: own tokens are no labels
        self.worded = boundaries is not None
        if boundaries is not None:
            self.register_buffer("kinds", boundaries, persistent=False)
        elif revised and self.config.span_weight:
            raise ConfigurationError(
                "semantic_revision: the student's own answers have no span ids. Give "
                "SemanticRevision(boundaries=boundaries(tokenizer)), or span_weight=0, or revised=0."
            )

    def overrides(self, method: str) -> bool:
        """A part that is switched off is not there: logits may then be taken in chunks, and a cache may teach."""
        settings = self.config
        off = {
            "batch": not settings.revised,
            "build": not settings.dac_weight,
            "per_position": not settings.dac_weight,
            "forward": not settings.span_weight,
        }
        return super().overrides(method) and not off.get(method, False)

    def needs(self, student: Sizes, teacher: Sizes | None) -> Needs:
        if student.kind != "causal":
            raise MismatchError(f"semantic_revision: the student must be a causal language model, got {student.kind}.")
        columns = frozenset({SPANS} if self.config.span_weight and not self.worded else ())
        return Needs(columns=columns, mean_over="examples", rescored=self.config.revised > 0)

    def build(self, student: Shapes, teacher: Shapes) -> None:
        self.band = Band()

    def batch(self, inputs: Inputs, step: Step) -> Inputs:
        settings = self.config
        if not drawn(step, settings.revised):
            return inputs
        sampling: dict[str, Any] = {"do_sample": False}
        if settings.sampling_temperature:
            sampling = {"do_sample": True, "temperature": settings.sampling_temperature, "top_k": 0, "top_p": 1.0}

        def write(asked: Inputs, count: int) -> Inputs:
            return on_policy(asked, step, max_new_tokens=count, **sampling)

        sampled = write(inputs, settings.max_new_tokens)
        place, choice = self._errors(sampled, step)
        ends = ends_of(unwrap(step.student))
        return corrected(sampled, place, choice, write, limit=settings.max_new_tokens, ends=ends)

    def _errors(self, sampled: Inputs, step: Step) -> tuple[Tensor, Tensor]:
        """(batch,) place in the answer, -1 for none, and the teacher's choice there."""
        given: dict[str, Any] = {
            name: sampled[name] for name in ("input_ids", "attention_mask", "position_ids") if name in sampled
        }
        where = positions("causal", sampled)
        assert where.labels is not None  # made by `on_policy`
        with evaluating(step.student):
            both = [logits_of(run(**given)) for run in (step.run_student, step.run_teacher)]
        classes = min(logits.shape[-1] for logits in both)
        own, theirs = (select_logits(logits, where)[:, :classes] for logits in both)
        found = error_positions(own, theirs, where.labels, where.example, len(given["input_ids"]))
        first = int((sampled["labels"] != IGNORED).any(0).long().argmax())
        place = where.index[found] % sampled["labels"].shape[1] + 1 - first
        return torch.where(found < 0, -1, place), theirs.argmax(-1)[found]

    def per_position(self, rows: Rows, step: Step) -> Mapping[str, Tensor]:
        assert rows.teacher_logits is not None  # tapped by default
        settings = self.config
        log_p, log_q = log_probabilities("semantic_revision", rows.student_logits, rows.teacher_logits)
        log_p, order = log_p.sort(-1, descending=True)
        log_q = log_q.gather(-1, order)
        log_m = log_mask(log_p, *self.band(log_p, log_q), softness=settings.softness)
        mass = kept_mass(log_p, log_m)
        return {
            "dac_kl": settings.dac_weight * dac_kl(log_p, log_q, log_m, form=settings.form),
            "lacking_mass": settings.dac_weight * (settings.least_mass - mass).clamp(min=0),
            "kept_mass": mass.detach(),
        }

    def forward(self, signals: Signals, step: Step) -> Mapping[str, Tensor]:
        rows, where = select_rows(signals), signals.positions
        assert rows.teacher_logits is not None  # tapped by default
        spans = span_ids(self.kinds[signals.inputs["input_ids"]]) if self.worded else signals.inputs[SPANS]
        predicted = F.pad(spans[:, 1:], (0, 1), value=-1).flatten()[where.index]
        left = neighbours(predicted, where.index, where.example)
        values = span_relation(rows.student_logits, rows.teacher_logits, left, squared=self.config.squared)
        of = where.example[left]
        sums = values.new_zeros(signals.examples).index_add(0, of, values)
        return {"span": self.config.span_weight * sums / torch.bincount(of, minlength=signals.examples).clamp(min=1)}


METHOD = Method(
    title="Multi-Granularity Semantic Revision for Large Language Model Distillation",
    paper="arXiv:2407.10068",
    authors="Xiaoyu Liu, Yun Zhang, Wei Li, Simiao Li, Xudong Huang, Hanting Chen, Yehui Tang, Jie Hu, Zhiwei Xiong, "
    "Yunhe Wang",
    year=2026,
    summary="The student's answers, corrected once where it is furthest off, are learned on a learned band of the "
    "teacher's distribution and by relations inside spans; much of it is a reconstruction.",
    bibtex="""@inproceedings{liu2026multigranularity,
  title = {Multi-Granularity Semantic Revision for Large Language Model Distillation},
  author = {Liu, Xiaoyu and Zhang, Yun and Li, Wei and Li, Simiao and Huang, Xudong and Chen, Hanting and Tang, Yehui
            and Hu, Jie and Xiong, Zhiwei and Wang, Yunhe},
  booktitle = {Annual Meeting of the Association for Computational Linguistics},
  year = {2026}, eprint = {2407.10068}, archivePrefix = {arXiv}
}""",
    algorithm=("divergence", "similarity"),
    knowledge=("feature", "feedback"),
    tasks=("text-generation",),
    objective=SemanticRevision,
    preparation=with_spans,
)
