"""Mutual information between the two models' hidden states, and which way of distilling suits a data set.

He, Shi, Mueller, Zha, Li, Karypis: Distiller: A Systematic Study of Model Distillation Methods in Natural Language
Processing, SustaiNLP 2021, arXiv:2109.11105, section 3; the bound is that of Poole et al., ICML 2019, arXiv:1905.06922.

    S[i, j] = f(h_student,i , h_teacher,j)                       critic, over the K examples of a micro-batch
    b[i] = q(h_teacher,i)                                        learned log baseline
    a[i, j] = log( 1/(K-1) Σ_{k≠j} exp S[i, k] )
    m[i, j] = log( α exp a[i, j] + (1 - α) exp b[i] )
    I_α = 1 + mean_{i≠j} ( S[i, i] - m[i, j] ) - mean_{i≠j} exp( S[i, j] - m[i, i] )
    L = w_kd · L_kd(logits) + Σ_{(s, t) ∈ map} w_inter · ℓ(h_s, h_t) + w_hard · L_task,      ℓ = -I_α

α = 0 is the learned baseline alone (low bias, high variance), α = 1 the batch's (low variance); for α > 0 no I_α is
above log(K/α) + 1, and nothing overflows. The released code's docstring has the two ends the wrong way round.

The published total, whose weights are w_kd = w_inter = 1 and w_hard = 0, out of parts of ours:

    DistillCallback(teacher, [KD(temperature=1), MIAlpha()], task_weight=0)      # the gradient of the authors' kd_ce
    DistillCallback(teacher, MIAlpha(logits="mse"))                              # kd_mse, which no other method has

Alone and without `logits` the hidden states are taught beside the task's own loss. ℓ may be any of the study's.

I_α relates the examples of one process's micro-batch: accumulation is not the same as a larger batch, as with the
authors; one example has nothing to be told from and gives 0. Equal examples in a batch are false negatives. The other
ℓ are means over the micro-batch too; for exact ones take `features`.

Critic and baseline learn by the same loss, in the student's optimizer and at its rate; they are in every checkpoint
and dropped from the student. One critic serves all pairs of a map, under "emd" each pair has one. Differences from the
authors' code: its transformer critic swaps the axes of batch and time, here it relates examples; [CLS] is a row's first
real token, on whichever side the padding is. What the transformer critic is made of is ours, as are its sizes.

`auto_distiller` is the paper's AutoDistiller: gradient boosting on the settings of finished runs, with the rank of a
run's ratio (student's score / teacher's) within its task as target; the paper regressed the ratio, which recommends
worse on the authors' own runs. Of a data set its size is read; the paper had a hundred numbers more. The authors' 1,239
runs lie in their repository (autodistiller_experiments/auto_distiller_tabular_data.csv), without a licence, and so not
here: `read_runs` reads their table, or one of your own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_compress import shrink
from hf_compress.distiller import select_rows
from hf_compress.divergences import check_temperature, cross_entropy, log_mixture, log_probabilities
from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.objective import Inputs, Needs, Objective, Shapes, Signals, Sizes, Step, batch_size, require_one_shape
from hf_compress.parts import Budget, Ranking
from hf_compress.registry import Method
from hf_compress.taps import blocks
from hf_compress_plugins.encoders._auto_distiller import FIELDS, PLAIN, SIZE, Run, read_runs, recommender

LayerMap = Literal["skip", "last", "emd"]
Loss = Literal["mi", "ce", "mse", "cos", "pkd"]
LogitsLoss = Literal["ce", "mse"]
CHOICES = {
    "loss": ("mi", "ce", "mse", "cos", "pkd"),
    "layers": ("skip", "last", "emd"),
    "logits": (None, "ce", "mse"),
    "critic": ("mlp", "transformer"),
}
HEADS = 4
"""Of the transformer critic."""


@dataclass(frozen=True, kw_only=True)
class MIAlphaConfig:
    """Hyper-parameters of the intermediate loss."""

    alpha: float = 0.9
    """α, 0 … 1. 0.9 or 0.5 do well in the paper; near 0 the values of a young critic may overflow."""
    layers: LayerMap = "skip"
    """Which layers are paired, the embeddings among them: spread evenly, the teacher's last ones, or all with all,
    weighed by the earth mover's distance."""
    loss: Loss = "mi"
    """ℓ: -I_α, or one that it was compared with."""
    logits: LogitsLoss | None = None
    """L_kd in this method: cross-entropy or squared difference of the logits by T, without T²; None: leave it out."""
    temperature: float = 1.0
    """T of L_kd. The authors' default."""
    embeddings: bool = True
    """Whether the embeddings are a pair, as published. False: for frozen ones, as under adapters."""
    critic: Literal["mlp", "transformer"] = "mlp"
    """Perceptrons on [CLS], or an encoder on all tokens, which the paper finds better and which costs more."""
    hidden: int = 256
    """Width of the critic. Our choice."""
    out: int = 64
    """Size of the vectors whose product is a score. The authors'."""
    score_limit: float | None = None
    """Scores are cut to ± this; for α near 0. None, as published: they are not."""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ConfigurationError(f"mi_alpha: alpha must lie in 0 … 1, got {self.alpha}.")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigurationError(f"mi_alpha: {name} must be one of {known}, got {getattr(self, name)!r}.")
        check_temperature("mi_alpha", self.temperature)
        if self.hidden < 1 or self.out < 1 or (self.critic == "transformer" and self.hidden % HEADS):
            raise ConfigurationError(
                f"mi_alpha: hidden and out must be at least 1, hidden a multiple of {HEADS} for a transformer critic, "
                f"got {self.hidden} and {self.out}."
            )
        if self.score_limit is not None and not self.score_limit > 0:
            raise ConfigurationError(f"mi_alpha: score_limit must be above 0 or None, got {self.score_limit}.")


def layer_pairs(layers: LayerMap, student: int, teacher: int) -> tuple[tuple[int, int], ...]:
    """(student, teacher) entries of `hidden_states`, the embeddings (0) included; of "emd" all of them.

    Raises:
        MismatchError: under "last", if the student is the deeper one.
    """
    if layers == "emd":
        return ((0, 0), *itertools.product(range(1, student + 1), range(1, teacher + 1)))
    if layers == "last" and teacher < student:
        raise MismatchError(
            f"mi_alpha: layers='last' needs a teacher of at least {student} layers, got {teacher}. Take layers='skip'."
        )
    if layers == "last":
        return tuple((s, teacher - student + s) for s in range(student + 1))
    return tuple((s, s * teacher // student) for s in range(student + 1))


def leave_one_out(scores: Tensor) -> Tensor:
    """a: (K, K) log of the mean of exp of a row's other scores, K ≥ 2."""
    edge = scores.new_full((len(scores), 1), -math.inf)
    before = torch.cat([edge, scores.logcumsumexp(1)[:, :-1]], 1)
    behind = torch.cat([scores.flip(1).logcumsumexp(1).flip(1)[:, 1:], edge], 1)
    return torch.logaddexp(before, behind) - math.log(len(scores) - 1)


def mi_alpha(scores: Tensor, log_baseline: Tensor, *, alpha: float) -> Tensor:
    """-I_α: minus a lower bound of the mutual information between two models' states of one example.

    Args:
        scores: (K, K) of each of the student's examples with each of the teacher's; widened to float32.
        log_baseline: (K,) b of the teacher's.
        alpha: α.

    Returns:
        () nats, at least -(1 + log(K/α)); 0 for one example.

    Raises:
        MismatchError: if the shapes do not fit.
    """
    count = len(scores)
    if scores.shape != (count, count) or log_baseline.shape != (count,):
        raise MismatchError(
            f"mi_alpha: scores {tuple(scores.shape)} must be square and have as many rows as the log baseline "
            f"{tuple(log_baseline.shape)}. Give both models the same examples."
        )
    if count == 1:
        return 0.0 * (scores.sum() + log_baseline.sum())
    dtype = torch.promote_types(scores.dtype, torch.float32)
    scores, log_baseline = scores.to(dtype), log_baseline.to(dtype)[:, None].expand(-1, count)
    if alpha == 0:
        mixed = log_baseline
    else:
        others = leave_one_out(scores)
        mixed = others if alpha == 1 else log_mixture(others, log_baseline, alpha)
    apart = ~torch.eye(count, dtype=torch.bool, device=scores.device)
    joint = (scores.diagonal()[:, None] - mixed)[apart].mean()
    marginal = (scores - mixed.diagonal()[:, None])[apart].exp().mean()
    return -(1 + joint - marginal)


def first_tokens(hidden: Tensor, tokens: Tensor) -> Tensor:
    """(batch, dim) state of each row's first real token, of hidden (batch, time, dim) and tokens (batch, time) bool.

    Raises:
        MismatchError: if the states are not of those tokens.
    """
    _check(hidden, tokens)
    return hidden[torch.arange(len(hidden), device=hidden.device), tokens.int().argmax(1)]


def _check(hidden: Tensor, tokens: Tensor) -> None:
    if hidden.dim() != 3 or hidden.shape[:2] != tokens.shape:
        raise MismatchError(
            f"mi_alpha: hidden states of shape {tuple(hidden.shape)} do not fit tokens of shape {tuple(tokens.shape)}. "
            "Both models must be text models that read the same tokens."
        )


def hidden_loss(student: Tensor, teacher: Tensor, tokens: Tensor, *, loss: Loss) -> Tensor:
    """The study's other ℓ.

    Args:
        student: (batch, time, dim), projected already; widened to float32.
        teacher: the same shape, detached here.
        tokens: (batch, time) bool, the real ones.
        loss: ce, of the softmax over dim; mse; cos, one minus the cosine; pkd, the squared distance of the first
            tokens' states of length 1.

    Returns:
        () the mean over real tokens, of pkd over rows.

    Raises:
        MismatchError: if the shapes differ.
    """
    require_one_shape("mi_alpha", student, teacher, "Give both models the same tokens of each example.")
    _check(student, tokens)
    dtype = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(dtype), teacher.detach().to(dtype)
    if loss == "pkd":
        own, theirs = (F.normalize(first_tokens(states, tokens), dim=-1) for states in (student, teacher))
        return (own - theirs).square().sum(-1).mean()
    own, theirs = student[tokens], teacher[tokens]
    if loss == "ce":
        return cross_entropy(*log_probabilities("mi_alpha", own, theirs)).mean()
    if loss == "mse":
        return F.mse_loss(own, theirs)
    return (1 - F.cosine_similarity(own, theirs, dim=-1)).mean()


def logits_loss(student_logits: Tensor, teacher_logits: Tensor, *, loss: LogitsLoss, temperature: float) -> Tensor:
    """(position,) L_kd of logits (position, class), the teacher's detached: cross-entropy in nats, or the mean over
    classes of the squared difference; both of the logits by T, without a factor T²."""
    if loss == "ce":
        return cross_entropy(*log_probabilities("mi_alpha", student_logits, teacher_logits, temperature))
    require_one_shape("mi_alpha", student_logits, teacher_logits, "Give both models the same classes.")
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    apart = student_logits.to(dtype) - teacher_logits.detach().to(dtype)
    return (apart / temperature).square().mean(-1)


def transport(costs: Tensor) -> Tensor:
    """Flow of the earth mover's distance between two sets of layers of equal weight.

    Args:
        costs: (student layer, teacher layer), detached here; may be negative.

    Returns:
        the same shape, at least 0; rows sum to 1 / rows, columns to 1 / columns. Uniform where a cost is not finite.
    """
    rows, columns = costs.shape
    if not costs.isfinite().all():
        return costs.new_full(costs.shape, 1 / costs.numel())
    sums = np.concatenate([np.kron(np.eye(rows), np.ones(columns)), np.kron(np.ones(rows), np.eye(columns))])
    wanted = np.concatenate([np.full(rows, 1 / rows), np.full(columns, 1 / columns)])
    found = linprog(costs.detach().double().cpu().numpy().ravel(), A_eq=sums, b_eq=wanted)
    return torch.as_tensor(found.x.reshape(rows, columns), dtype=costs.dtype, device=costs.device)


def perceptron(width: int, hidden: int, out: int) -> nn.Sequential:
    """Three linear layers with ReLU between, as the authors' critic."""
    return nn.Sequential(
        nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, out)
    )


class Reader(nn.Module):
    """An encoder layer over all tokens and the mean over the real ones, for the transformer critic."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.enter = nn.Linear(width, hidden)
        self.encode = nn.TransformerEncoderLayer(hidden, HEADS, hidden, dropout=0.0, batch_first=True)
        self.leave = nn.Linear(hidden, out)

    def forward(self, states: Tensor, tokens: Tensor) -> Tensor:
        """(batch, out) of states (batch, time, width) and tokens (batch, time) bool."""
        _check(states, tokens)
        padding = ~tokens
        some = padding & tokens.any(1, keepdim=True)  # a row of padding alone would be NaN
        found = self.encode(self.enter(states.masked_fill(padding[..., None], 0.0)), src_key_padding_mask=some)
        total = found.masked_fill(padding[..., None], 0.0).sum(1)
        leave: Tensor = self.leave(total / tokens.sum(1, keepdim=True).clamp(min=1))
        return leave


class Critic(nn.Module):
    """f and q, of states of the given widths."""

    def __init__(self, student: int, teacher: int, config: MIAlphaConfig) -> None:
        super().__init__()
        self.whole = config.critic == "transformer"
        make: Callable[[int, int, int], nn.Module] = Reader if self.whole else perceptron
        self.student = make(student, config.hidden, config.out)
        self.teacher = make(teacher, config.hidden, config.out)
        self.baseline = make(teacher, config.hidden, 1) if config.alpha < 1 else None  # α = 1 has no use for one

    def forward(self, student: Tensor, teacher: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(K, K) scores and (K,) log baselines, of states (K, time, width) and tokens (K, time) bool."""
        dtype = next(self.parameters()).dtype
        own, theirs = (self._given(states.to(dtype), tokens) for states in (student, teacher.detach()))
        scores = self.student(*own) @ self.teacher(*theirs).T
        return scores, scores.new_zeros(len(scores)) if self.baseline is None else self.baseline(*theirs)[:, 0]

    def _given(self, states: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        return (states, tokens) if self.whole else (first_tokens(states, tokens),)


class MIAlpha(Objective):
    """ℓ of every pair of layers, summed, and L_kd where asked for; all means over the micro-batch."""

    Config = MIAlphaConfig
    config: MIAlphaConfig
    task_weight: ClassVar[float | None] = None
    pairs: tuple[tuple[int, int], ...]

    def __init__(self, config: MIAlphaConfig | None = None, *, weight: float = 1.0, **settings: Any) -> None:
        super().__init__(config, weight=weight, **settings)
        if self.config.logits is not None:
            self.task_weight = 0.0  # type: ignore[misc]  # w_hard of the published total, which is then here

    def needs(self, student: Sizes, teacher: Sizes | None) -> Needs:
        if teacher is None or not student.layers or not teacher.layers:
            raise MismatchError("mi_alpha: both models must have hidden states: num_hidden_layers in their configs.")
        if self.config.logits == "ce" and student.kind == "none":
            raise MismatchError("mi_alpha: logits='ce' needs a model that gives classes. Take logits='mse'.")
        pairs = layer_pairs(self.config.layers, student.layers, teacher.layers)
        self.pairs = pairs if self.config.embeddings else pairs[1:]
        logits = {"logits"} if self.config.logits is not None else set[str]()
        return Needs(
            student=frozenset({f"hidden:{s}" for s, _ in self.pairs} | logits),
            teacher=frozenset({f"hidden:{t}" for _, t in self.pairs} | logits),
            mean_over="batch",
        )

    def build(self, student: Shapes, teacher: Shapes) -> None:
        widths = {(s, t): (student[f"hidden:{s}"][-1], teacher[f"hidden:{t}"][-1]) for s, t in self.pairs}
        if len(set(widths.values())) > 1:
            raise MismatchError(
                f"mi_alpha: the layers of a model differ in width, {sorted(set(widths.values()))}. If it is the "
                "embeddings, leave them out: embeddings=False."
            )
        own, theirs = next(iter(widths.values()))
        if self.config.loss == "mi":
            keys = dict.fromkeys(self._critic(s, t) for s, t in self.pairs)
            self.critics = nn.ModuleDict({key: Critic(own, theirs, self.config) for key in keys})
        else:
            layers = dict.fromkeys(str(s) for s, _ in self.pairs) if own != theirs else {}
            self.projections = nn.ModuleDict({layer: nn.Linear(own, theirs) for layer in layers})

    def _critic(self, s: int, t: int) -> str:
        return f"{s}_{t}" if self.config.layers == "emd" else "shared"

    def forward(self, signals: Signals, step: Step) -> Mapping[str, Tensor]:
        values = {pair: self._pair(signals, *pair) for pair in self.pairs}
        if self.config.layers == "emd":
            first = values.pop((0, 0), None)
            rows, columns = max(values)
            costs = torch.stack(list(values.values())).view(rows, columns)
            total = (transport(costs) * costs).sum() + (0.0 if first is None else first)
        else:
            total = torch.stack(list(values.values())).sum()
        found: dict[str, Tensor] = {self.config.loss: total}
        if (loss := self.config.logits) is not None:
            scored = select_rows(signals)
            assert scored.teacher_logits is not None  # tapped, as `needs` says
            apart = logits_loss(
                scored.student_logits, scored.teacher_logits, loss=loss, temperature=self.config.temperature
            )
            found["logits"] = apart.mean()
        return found

    def _pair(self, signals: Signals, s: int, t: int) -> Tensor:
        own, theirs, tokens = signals.student[f"hidden:{s}"], signals.teacher[f"hidden:{t}"], signals.tokens
        if self.config.loss != "mi":
            if str(s) in self.projections:
                projection: Any = self.projections[str(s)]
                own = projection(own.to(projection.weight.dtype).masked_fill(~tokens[..., None], 0.0))
            return hidden_loss(own, theirs, tokens, loss=self.config.loss)
        scores, log_baseline = self.critics[self._critic(s, t)](own, theirs, tokens)
        if (limit := self.config.score_limit) is not None:
            scores = scores.clamp(-limit, limit)
        return mi_alpha(scores, log_baseline, alpha=self.config.alpha)


SPACE: Mapping[str, Sequence[Any]] = {
    "loss": CHOICES["loss"],
    "alpha": (0.0, 0.1, 0.5, 0.7, 0.9, 1.0),
    "layers": CHOICES["layers"],
    "logits": ("ce", "mse"),
}
"""Settings that were tried by the authors."""


def auto_distiller(
    teacher: PreTrainedModel,
    *,
    data: Iterable[Inputs],
    budget: Budget,
    runs: Sequence[Run] | Path | str,
    space: Mapping[str, Sequence[Any]] = SPACE,
    like: Run | None = None,
    seed: int = 0,
) -> Ranking:
    """Ranks ways of distilling by what finished runs on other data tell of them, without training any.

    `configs` are settings of this method's objective: `DistillCallback(teacher, MIAlpha(**ranking.configs[0]))` trains
    `ranking.build(0)` as the first of them says. The student is the same for all places.

    Args:
        teacher: what the student is cut from.
        data: the batches to train on; how many rows they have is what is read of them.
        budget: the student has as many layers as its parameters allow, at least one less than the teacher; the ranking
            has at most as many places as evaluations.
        runs: finished ones, or the file that `read_runs` reads.
        space: values by setting of `MIAlpha`. α varies under mi alone.
        like: further columns of the runs that hold for all candidates: {"Model": "TinyBERT4"}; {"#example": 67000},
            instead of the rows of the data. Without it candidates are like no model of the runs. Mixup and augmented
            data, which runs may have, are not among the candidates: nothing here makes them.
        seed: of the trees.

    Raises:
        ConfigurationError: if no student fits, the space has other settings than the runs', or there are no runs.
    """
    if set(space) != set(FIELDS) or not all(space.values()):
        raise ConfigurationError(f"mi_alpha: a space gives values for each of {list(FIELDS)}, got {dict(space)}.")
    layers, tried = _layers(teacher, budget), _candidates(space)
    fixed = {SIZE: sum(batch_size(batch) for batch in data)} | PLAIN | dict(like or {})
    expected = recommender(read_runs(runs) if isinstance(runs, Path | str) else runs, seed=seed)
    scores = expected([{FIELDS[name]: value for name, value in config.items()} | fixed for config in tried])
    order = np.argsort(-scores, kind="stable")[: budget.evaluations]
    return Ranking(
        configs=tuple(tried[place] for place in order),
        scores=tuple(float(scores[place]) for place in order),
        build=lambda _: shrink(teacher, layers=layers),
    )


def _candidates(space: Mapping[str, Sequence[Any]]) -> list[Mapping[str, Any]]:
    """Every combination that `MIAlpha` takes; α at its default where it has no part."""
    found: list[Mapping[str, Any]] = []
    for values in itertools.product(*space.values()):
        settings = dict(zip(space, values, strict=True))
        if settings["loss"] != "mi":
            settings["alpha"] = MIAlphaConfig.alpha
        MIAlphaConfig(**settings)
        if settings not in found:
            found.append(settings)
    return found


def _layers(teacher: PreTrainedModel, budget: Budget) -> int:
    """The most layers, less than the teacher has, with which a student is within the budget."""
    depth = teacher.config.num_hidden_layers
    total, block = (sum(p.numel() for p in m.parameters()) for m in (teacher, blocks(teacher, depth)[0]))
    fitting = [layers for layers in range(1, depth) if total - (depth - layers) * block <= budget.parameters]
    if not fitting:
        raise ConfigurationError(
            f"mi_alpha: no student of less than {depth} layers has {budget.parameters:,} parameters or less. Raise "
            "the budget, or make the teacher narrower first: shrink(teacher, hidden=…)."
        )
    return fitting[-1]


METHOD = Method(
    title="Distiller: A Systematic Study of Model Distillation Methods in Natural Language Processing",
    paper="arXiv:2109.11105",
    authors="Haoyu He, Xingjian Shi, Jonas Mueller, Sheng Zha, Mu Li, George Karypis",
    year=2021,
    summary="The student's hidden states tell the teacher's of the same example from those of the others, by a learned "
    "critic; finished runs tell which way of distilling to try.",
    bibtex="""@inproceedings{he2021distiller,
  title = {Distiller: A Systematic Study of Model Distillation Methods in Natural Language Processing},
  author = {He, Haoyu and Shi, Xingjian and Mueller, Jonas and Zha, Sheng and Li, Mu and Karypis, George},
  booktitle = {Workshop on Simple and Efficient Natural Language Processing (SustaiNLP)},
  year = {2021}, eprint = {2109.11105}, archivePrefix = {arXiv}
}""",
    algorithm=("similarity",),
    knowledge=("feature",),
    tasks=("text-classification", "text-regression", "question-answering"),
    objective=MIAlpha,
    search=auto_distiller,
)
