"""One training that gives students of every size: a SuperLM, whose top-left parts are all students of a space.

Xu, Mukherjee, Liu, Dey, Wang, Zhang, Awadallah, Gao: AutoDistil: Few-shot Task-agnostic Neural Architecture Search for
Distilling Large Language Models, NeurIPS 2022, arXiv:2201.12507, section 3.

    student (l, h, d, r): layers floor(i · L / l) of the SuperLM, of each matrix the top left block: d hidden units, h
    heads of fixed size, int(d · r) units between. Attention is h · head size wide: where that is d, a student that is
    taken out is a stock BERT, else an AutoDistilBert (_modeling_autodistil.py), which loads with AutoModel too.
    R_a = A_a A_aᵀ / √d_r    A = queries, keys or values of the last layer, cut to A_r · floor(width / A_r) and split
                             into A_r relation heads of width d_r; a model of h heads and one of twelve have as many
    l = Σ_(A = Q, K, V) mean_(a, i, j) ( softmax R_a^teacher - softmax R_a^student )²_ij        the teacher is detached

A step trains the largest student, the smallest and two at random (sandwich rule), the same on all ranks and in all
micro-batches, with one forward of the teacher; their losses are added. Afterwards `search` takes the loss of every
student within a budget on held-out text, and builds what it finds without training it further.

    student = autodistil(teacher, config=architectures(**subspace("small"))[-1]._asdict())
    Trainer(model=student, callbacks=[DistillCallback(teacher, AutoDistil(**subspace("small")))], …).train()
    found = search(teacher, data=held_out_batches, budget=Budget(parameters=20_000_000), student=student)
    found.build(0).save_pretrained("found")

Differences from the authors' code, which takes the scores before the softmax (softmax=False) and adds -10000 to the
scores of padded keys of both models, so that padding counts (masking="added"): here pairs with padding are left out,
and each text is averaged over its own pairs. The forwards of all students of a step are in memory together, and that of
the SuperLM itself alone honours gradient checkpointing.

The published tiny space is one of SuperLMs of twelve layers, of which a student of four has 0, 3, 6 and 9; a SuperLM
that is cut to the seven layers of its largest student trains less, and its students of four have others.

As published only the last queries, keys and values are supervised, each student's own: its last output projection,
feed-forward and norms are not, nor is a head, which the task's own loss of the largest student teaches where there are
labels. The masked-LM variants and the search by fine-tuning all students on one task are left out.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from hf_compress.errors import ConfigurationError, MismatchError, NumericalError, UnknownNameError
from hf_compress.objective import Inputs, Needs, Objective, Signals, Sizes, Step, check_unpacked, tokens
from hf_compress.parts import Budget, Ranking
from hf_compress.registry import Method
from hf_compress.taps import Taps, evaluating, joined_heads, unwrap, watching

from . import _modeling_autodistil as modeling
from ._super_network import LETTERS, READ, Architecture, Student, extract, own_sizes, parameters

HELD = 64
"""Students whose skeletons are kept from step to step."""
PADDED = -10000.0
"""What the authors add to scores of padded keys."""
BERT_BASE = 12
"""Heads of the teacher of the published spaces, of width 768 with 12 layers."""
SUBSPACES: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "base": {"layers": (9, 12), "heads": (9, 12), "hidden": (544, 640), "ratios": (2.5, 4.0)},
    "small": {"layers": (9, 12), "heads": (7, 10), "hidden": (256, 352), "ratios": (2.5, 4.0)},
    "tiny": {"layers": (4, 7), "heads": (7, 10), "hidden": (128, 224), "ratios": (2.0, 3.5)},
}
"""Smallest and largest of each axis of the paper's three, of 39 to 79, 12 to 28 and 4 to 10 million parameters."""


@dataclass(frozen=True, kw_only=True)
class AutoDistilConfig:
    """The space, and hyper-parameters of its training."""

    layers: tuple[int, ...] | None = None
    """Numbers of layers. None: four from three quarters of the SuperLM's to all, as the paper's base space."""
    heads: tuple[int, ...] | None = None
    """Numbers of heads; None: as of the layers."""
    hidden: tuple[int, ...] | None = None
    """Widths; None: four from 0.85 of the SuperLM's, as above."""
    ratios: tuple[float, ...] | None = None
    """Width between the feed-forward layers by the width; None: four from 0.625 of the SuperLM's, as above."""
    random_students: int = 2
    """Drawn at each step, beside the largest and the smallest. 2 in the paper."""
    relation_heads: int | None = None
    """A_r. None: as many as the teacher has heads, as the 12 of the authors' code and of their teacher."""
    teacher_layer: int = -1
    """The last in the paper."""
    softmax: bool = True
    """Relations are compared after a softmax over the keys, as in the paper; False: scores before it, as in the code,
    where large ones decide."""
    masking: Literal["zeroed", "added"] = "zeroed"
    """Padding: left out, or -10000 on the scores of padded keys as in the authors' code, where it counts."""
    seed: int = 0
    """Of the draws of students, beside the step."""

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "hidden", "ratios"):
            values = getattr(self, name)
            if values is not None and (not values or list(values) != sorted({*values}) or values[0] <= 0):
                raise ConfigurationError(f"autodistil: {name} must be above 0 and in rising order, got {values}.")
        heads = 1 if self.relation_heads is None else self.relation_heads
        if self.random_students < 0 or heads < 1 or self.masking not in ("zeroed", "added"):
            raise ConfigurationError(
                "autodistil: needs random_students ≥ 0, relation_heads ≥ 1 and masking zeroed or added, got "
                f"{self.random_students}, {self.relation_heads} and {self.masking!r}."
            )


def subspace(name: str) -> dict[str, tuple[Any, ...]]:
    """Settings of one of the paper's three spaces, four values an axis, for a SuperLM cut from a BERT of base size.

    Raises:
        UnknownNameError: for another name.
    """
    if name not in SUBSPACES:
        raise UnknownNameError("sub-space", name, SUBSPACES)
    found = {axis: torch.linspace(*ends, 4, dtype=torch.float64).tolist() for axis, ends in SUBSPACES[name].items()}
    return {axis: tuple(values if axis == "ratios" else map(round, values)) for axis, values in found.items()}


def published_cost(layers: int, heads: int, hidden: int, ratio: float) -> float:
    """Parameters of a student by the authors' formula, whose attention is not that of the sliced matrices.

    Args:
        layers, hidden: of the student.
        heads: of 12.
        ratio: of the feed-forward layers' width.
    """
    embeddings = hidden * (30522 + 516)
    attention = 3 * hidden**2 * heads / BERT_BASE + hidden**2 + 6 * hidden
    return (
        embeddings + layers * (attention + 2 * hidden**2 * ratio + hidden * ratio + 3 * hidden) + hidden**2 + 2 * hidden
    )


def architectures(
    layers: Sequence[int], heads: Sequence[int], hidden: Sequence[int], ratios: Sequence[float]
) -> list[Architecture]:
    """All students of a space by rising cost of the authors' formula, from the smallest to the largest."""
    every = sorted(itertools.product(layers, heads, hidden, ratios), key=lambda sizes: published_cost(*sizes))
    return [Architecture(l, h, d, math.floor(d * r + 1e-6)) for l, h, d, r in every]  # noqa: E741 (the paper's names)


def sandwich(students: Sequence[Architecture], *, draws: int, seed: int, step: int) -> dict[str, Architecture]:
    """Largest, smallest and some at random, by name: a function of seed and step alone, so equal on all ranks.

    A space of one student, e.g. to train one that was found on, gives that alone.
    """
    if len(students) == 1:
        return {"alone": students[0]}
    draw = random.Random(f"{seed},{step}")
    chosen = {f"random_{place}": draw.choice(students) for place in range(1, draws + 1)}
    return {"largest": students[-1], "smallest": students[0], **chosen}


def relation_scores(vectors: Tensor, *, heads: int) -> Tensor:
    """(batch, relation head, time, time) scaled products of (batch, time, width) vectors with themselves.

    Raises:
        MismatchError: if there are more relation heads than the vectors are wide.
    """
    size = vectors.shape[-1] // heads
    if size < 1:
        raise MismatchError(
            f"autodistil: relation_heads={heads} is more than the width {vectors.shape[-1]}. Choose fewer."
        )
    batch, time = vectors.shape[:2]
    split = vectors[..., : heads * size].reshape(batch, time, heads, size).transpose(1, 2)
    scores: Tensor = split @ split.mT / math.sqrt(size)
    return scores


def relation_distance(
    student: Tensor,
    teacher: Tensor,
    real: Tensor,
    *,
    heads: int,
    softmax: bool = True,
    masking: Literal["zeroed", "added"] = "zeroed",
) -> Tensor:
    """Mean squared difference of both models' relations of one kind, for each text.

    Args:
        student: (batch, time, width) queries, keys or values, all heads concatenated.
        teacher: (batch, time, width of its own), detached here.
        real: (batch, time) bool, the real tokens.
        heads: A_r.
        softmax: over the keys, before the difference.
        masking: "zeroed": mean over pairs of real tokens; "added": over all pairs, padded keys at -10000.

    Returns:
        (batch,); 0 for a text without tokens.

    Raises:
        MismatchError: if the models read different numbers of texts or tokens.
    """
    for vectors in (student, teacher):
        if vectors.shape[:2] != real.shape:
            raise MismatchError(
                f"autodistil: vectors of shape {tuple(vectors.shape)} do not fit tokens of shape {tuple(real.shape)}. "
                "Both models must see the same tokens."
            )
    dtype = torch.promote_types(student.dtype, torch.float32)
    keys = real[:, None, None, :]
    pairs = keys & real[:, None, :, None]
    found = []
    for vectors in (student, teacher.detach()):
        clean = vectors if masking == "added" else vectors.masked_fill(~real[..., None], 0.0)
        scores = relation_scores(clean.to(dtype), heads=heads)
        if masking == "added":
            scores = scores + (~keys).to(dtype) * PADDED
        elif softmax:
            scores = scores.masked_fill(~keys, torch.finfo(dtype).min)  # finite: a row of padding stays so
        found.append(scores.softmax(-1) if softmax else scores)
    squares = (found[0] - found[1]).square()
    if masking == "added":
        return squares.mean((1, 2, 3))
    total = torch.where(pairs, squares, 0.0).sum((1, 2, 3))
    return total / (heads * pairs.sum((1, 2, 3)).clamp(min=1))


def space_of(settings: AutoDistilConfig, config: Any) -> list[Architecture]:
    """The students of a SuperLM of that config, smallest first.

    Raises:
        MismatchError: if one is larger than the SuperLM.
    """
    own = own_sizes(config)
    ratio = own.intermediate_size / own.hidden_size

    def shares(lowest: float, size: int) -> tuple[int, ...]:
        return tuple(
            sorted({round(size * share) for share in torch.linspace(lowest, 1, 4, dtype=torch.float64).tolist()})
        )

    found = architectures(
        settings.layers or shares(0.75, own.num_hidden_layers),
        settings.heads or shares(0.75, own.num_attention_heads),
        settings.hidden or shares(0.85, own.hidden_size),
        settings.ratios or [ratio * share for share in torch.linspace(0.625, 1, 4, dtype=torch.float64).tolist()],
    )
    if any(size > most for size, most in zip(found[-1], own, strict=True)):
        raise MismatchError(
            f"autodistil: a SuperLM of {own._asdict()} cannot hold a student of {found[-1]._asdict()}. Give smaller "
            "layers, heads, hidden and ratios, or cut a larger SuperLM with autodistil(teacher, config=…)."
        )
    return found


def autodistil(teacher: PreTrainedModel, *, config: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """A SuperLM with the teacher's weights: every k-th layer, the top left of each matrix.

    Args:
        teacher: a BERT.
        config: num_hidden_layers, num_attention_heads, hidden_size and intermediate_size of the largest student; what
            is left out is as large as the teacher's.

    Raises:
        UnknownNameError: for another key.
        MismatchError: for another architecture, or sizes above the teacher's.
    """
    for name in config or {}:
        if name not in Architecture._fields:
            raise UnknownNameError("size of a SuperLM", name, Architecture._fields)
    return extract(teacher, own_sizes(teacher.config)._replace(**(config or {})), of="teacher")


class AutoDistil(Objective):
    """Relations of several students of a SuperLM against the teacher's, at each step."""

    Config = AutoDistilConfig
    config: AutoDistilConfig

    def needs(self, student: Sizes, teacher: Sizes | None) -> Needs:
        if teacher is None or not (student.layers and teacher.layers and teacher.heads):
            raise MismatchError("autodistil: both models must be transformers, with layers and heads in their configs.")
        self.heads = self.config.relation_heads or teacher.heads
        self.students = space_of(self.config, student.config)
        self._made: dict[Architecture, Student] = {}
        return Needs(
            student=frozenset(f"{letter}:-1" for letter in LETTERS),
            teacher=frozenset(f"{letter}:{self.config.teacher_layer}" for letter in LETTERS),
            mean_over="examples",
        )

    def forward(self, signals: Signals, step: Step) -> dict[str, Tensor]:
        check_unpacked(self.name, signals.inputs)
        settings = self.config
        teacher = {letter: joined_heads(signals.teacher[f"{letter}:{settings.teacher_layer}"]) for letter in LETTERS}
        own = {letter: joined_heads(signals.student[f"{letter}:-1"]) for letter in LETTERS}
        body: PreTrainedModel = unwrap(step.student).base_model
        draws = settings.random_students if torch.is_grad_enabled() else 0  # an evaluation is of the same students
        chosen = sandwich(self.students, draws=draws, seed=settings.seed, step=step.global_step)
        found = {}
        for name, sizes in chosen.items():
            vectors = own if sizes == own_sizes(body.config) else self._vectors(body, sizes, signals, own["q"].dtype)
            found[name] = loss(vectors, teacher, signals.tokens, settings, self.heads)
        return found

    def _vectors(
        self, body: PreTrainedModel, sizes: Architecture, signals: Signals, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Of a student, in the precision that the SuperLM's own forward had."""
        if sizes not in self._made:
            if len(self._made) >= HELD:
                self._made.clear()
            self._made[sizes] = Student(body, sizes)
        with torch.autocast(body.device.type, dtype=dtype, enabled=dtype.itemsize < body.dtype.itemsize):
            return self._made[sizes].vectors(body, signals.inputs)


def loss(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    real: Tensor,
    settings: AutoDistilConfig,
    heads: int,
) -> Tensor:
    """(batch,) sum of the distances of queries, keys and values, by letter (batch, time, width)."""
    found = [
        relation_distance(
            student[name], teacher[name], real, heads=heads, softmax=settings.softmax, masking=settings.masking
        )
        for name in LETTERS
    ]
    return torch.stack(found).sum(0)


def search(
    teacher: PreTrainedModel,
    *,
    data: Sequence[Inputs],
    budget: Budget,
    student: PreTrainedModel,
    config: AutoDistilConfig | None = None,
    allowed: Callable[[PreTrainedModel], bool] | None = None,
    seed: int = 0,
) -> Ranking:
    """Ranks the students of a trained SuperLM by their loss on held-out text, without training any ("agnostic").

    Args:
        teacher: the one that it was trained with.
        data: batches; labels are not read.
        budget: most parameters of a student, and how many are looked at; of more a part is drawn.
        student: the SuperLM.
        config: space and loss; None: those that it was trained with, from its record.
        allowed: a further limit, as on measured latency; is called with each student within the budget, built.
        seed: of the draw.

    Returns:
        the students within the limits, that of the lowest loss first; scores are minus the losses. `build` gives one as
        it is in the SuperLM, to save or to fine-tune.

    Raises:
        ConfigurationError: if none is within the limits, or neither config nor record says the space.
        NumericalError: if a loss is not finite.
    """
    settings = _as_trained(student) if config is None else config
    fitting = [sizes for sizes in space_of(settings, student.config) if _fits(student, sizes, budget, allowed)]
    if not fitting:
        raise ConfigurationError(
            f"autodistil: no student of the space has {budget.parameters:,} parameters or less and is allowed."
        )
    if len(fitting) > budget.evaluations:
        fitting = random.Random(seed).sample(fitting, budget.evaluations)
    losses = _held_out(teacher, student, data, fitting, settings)
    ranked = sorted(zip(losses, fitting, strict=True))
    return Ranking(
        configs=tuple(sizes._asdict() for _, sizes in ranked),
        scores=tuple(-value for value, _ in ranked),
        build=lambda place: extract(student, ranked[place][1]),
    )


def _fits(
    model: PreTrainedModel, sizes: Architecture, budget: Budget, allowed: Callable[[PreTrainedModel], bool] | None
) -> bool:
    if parameters(model, sizes) > budget.parameters:
        return False
    return allowed is None or allowed(extract(model, sizes).eval())


def _held_out(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    data: Sequence[Inputs],
    candidates: Sequence[Architecture],
    settings: AutoDistilConfig,
) -> list[float]:
    """Mean loss of each candidate over the rows of all batches, one forward of the teacher a batch."""
    total, count = [0.0] * len(candidates), 0
    body: Any = student.base_model
    heads = settings.relation_heads or teacher.config.num_attention_heads
    taps = Taps(teacher, {f"{letter}:{settings.teacher_layer}" for letter in LETTERS}, teacher.config.num_hidden_layers)
    try:
        with torch.no_grad(), evaluating(teacher), evaluating(student):
            made = [Student(body, sizes) for sizes in candidates[:HELD]]
            for batch in data:
                with watching(taps):
                    output = teacher(**{name: value for name, value in batch.items() if name in READ})
                theirs = {name[0]: joined_heads(value) for name, value in taps.read(output).items()}
                real = tokens(batch)
                count += len(real)
                for place, sizes in enumerate(candidates):
                    one = made[place] if place < len(made) else Student(body, sizes)
                    total[place] += float(loss(one.vectors(body, batch), theirs, real, settings, heads).sum())
    finally:
        taps.remove()
    found = [value / max(count, 1) for value in total]
    for sizes, value in zip(candidates, found, strict=True):
        if not math.isfinite(value):
            raise NumericalError(
                f"autodistil: the held-out loss of {sizes._asdict()} is {value}; the SuperLM is not whole."
            )
    return found


def _as_trained(student: PreTrainedModel) -> AutoDistilConfig:
    """The settings in the student's record.

    Raises:
        ConfigurationError: if it was not trained so last: other students than those of a space are of no size trained.
    """
    record = getattr(student.config, "compression", None) or {}
    own = next((method["settings"] for method in record.get("methods", ()) if method["name"] == "autodistil"), None)
    if own is None:
        raise ConfigurationError(
            "autodistil: the record of this student does not say that it was trained as a SuperLM, nor with which "
            "space. Pass config=AutoDistilConfig(…)."
        )
    settings: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in own.items()}
    return AutoDistilConfig(**settings)


AutoConfig.register("autodistil_bert", modeling.AutoDistilBertConfig, exist_ok=True)
for _auto, _name in list(modeling.AUTO.items())[1:]:
    getattr(transformers, _auto).register(modeling.AutoDistilBertConfig, getattr(modeling, _name), exist_ok=True)

METHOD = Method(
    title="AutoDistil: Few-shot Task-agnostic Neural Architecture Search for Distilling Large Language Models",
    paper="arXiv:2201.12507",
    authors="Dongkuan Xu, Subhabrata Mukherjee, Xiaodong Liu, Debadeepta Dey, Wenhui Wang, Xiang Zhang, "
    "Ahmed Hassan Awadallah, Jianfeng Gao",
    year=2022,
    summary="One training of a BERT whose parts are students of all sizes; a search takes one out, ready to use.",
    bibtex="""@inproceedings{xu2022autodistil,
  title = {{AutoDistil}: Few-shot Task-agnostic Neural Architecture Search for Distilling Large Language Models},
  author = {Xu, Dongkuan and Mukherjee, Subhabrata and Liu, Xiaodong and Dey, Debadeepta and Wang, Wenhui and
            Zhang, Xiang and Awadallah, Ahmed Hassan and Gao, Jianfeng},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2022}, eprint = {2201.12507}, archivePrefix = {arXiv}
}""",
    algorithm=("similarity",),
    knowledge=("feature",),
    tasks=("feature-extraction", "fill-mask"),
    objective=AutoDistil,
    student=autodistil,
    search=search,
)
