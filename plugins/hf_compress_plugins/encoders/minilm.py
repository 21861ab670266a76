"""Deep self-attention distillation, MiniLM and MiniLMv2.

Wang, Wei, Dong, Bao, Yang, Zhou: MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained
Transformers, NeurIPS 2020, arXiv:2002.10957, section 3. Wang, Bao, Huang, Dong, Wei: MiniLMv2: Multi-Head
Self-Attention Relation Distillation for Compressing Pretrained Transformers, Findings of ACL 2021, arXiv:2012.15828,
section 3.

    A_1, A_2, A_3 = Q, K, V of one layer, all heads concatenated and split again into A_r relation heads of width d_r
    R_ij = softmax( A_i A_jᵀ / √d_r + mask )
    l_x = Σ_(i,j) α_ij · 1/(A_r |x|) Σ_a Σ_τ KL( R_ij^teacher ‖ R_ij^student )    for each sentence x of |x| tokens

v2 uses (Q,Q), (K,K), (V,V) with α = 1; v1 is (Q,K), (V,V) with A_r equal to both models' heads, MiniLM(relations=("qk",
"vv"), weights=(1, 1), relation_heads=12). Rows and columns of padding are cut off, so every sentence weighs the same,
whatever its length. The teacher carries no gradient.

Queries and keys are taken after a rotation, where a model has one, and each as wide as it is: where queries share keys,
K and V are narrower than Q, and A_r must divide their width too.

A student of at most half the layers and half the width learns from a teacher assistant (the first paper): a model of
the teacher's layers and the student's width, which learned from the teacher by the same loss. That is a run before the
student's, each with a model of its own:

    Trainer(assistant, …, callbacks=[DistillCallback(teacher, MiniLM())]).train()     # first the width is given up,
    Trainer(student, …, callbacks=[DistillCallback(assistant, MiniLM())]).train()     # then the depth

As published only the student's last queries, keys and values are supervised: its last output projection, feed-forward
and norms get no gradient, nor does a head. Alone it is for pre-training a body; on a classifier add a method on logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.divergences import kl
from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.objective import Needs, Objective, Signals, Sizes, Step, check_unpacked
from hf_compress.registry import Method
from hf_compress.taps import joined_heads

LETTERS = "qkv"


@dataclass(frozen=True, kw_only=True)
class MiniLMConfig:
    """Hyper-parameters of self-attention relation distillation."""

    relations: tuple[str, ...] = ("qq", "kk", "vv")
    """Pairs of q, k, v. v2's; v1's are ("qk", "vv")."""
    weights: tuple[float, ...] = (1.0, 1.0, 1.0)
    """α of each relation. 1 in the paper."""
    relation_heads: int = 48
    """A_r; must divide both widths. 48 for base-size teachers, 64 for large ones; for v1 both models' head count."""
    teacher_layer: int = -1
    """The last for base-size teachers; of 24 layers 21 for BERT-large and 19 for RoBERTa-large, so 20 and 18 from 0."""

    def __post_init__(self) -> None:
        if len(self.relations) != len(self.weights) or not self.relations:
            raise ConfigurationError(f"minilm: {len(self.relations)} relations need as many weights as {self.weights}.")
        wrong = [pair for pair in self.relations if len(pair) != 2 or not set(pair) <= set(LETTERS)]
        if wrong:
            raise ConfigurationError(f"minilm: relations are pairs of q, k and v such as 'qq', got {wrong}.")
        if len(set(self.relations)) != len(self.relations):
            raise ConfigurationError(f"minilm: a relation appears twice in {self.relations}. Give it once, weighted.")
        if self.relation_heads < 1 or not all(0 <= weight < math.inf for weight in self.weights):
            raise ConfigurationError(
                f"minilm: needs relation_heads ≥ 1 and weights 0 … ∞, got {self.relation_heads} and {self.weights}."
            )


def split_heads(vectors: Tensor, heads: int) -> Tensor:
    """(batch, time, dim) to (batch, relation head, time, dim / heads).

    Raises:
        MismatchError: if `heads` does not divide dim.
    """
    if vectors.shape[-1] % heads:
        raise MismatchError(
            f"minilm: relation_heads={heads} does not divide the width {vectors.shape[-1]}. Choose a common divisor of "
            "both widths, e.g. MiniLM(relation_heads=12)."
        )
    batch, time, dim = vectors.shape
    return vectors.reshape(batch, time, heads, dim // heads).transpose(1, 2)


def log_relation(left: Tensor, right: Tensor, mask: Tensor, heads: int) -> Tensor:
    """log R of one model.

    Args:
        left, right: (batch, time, dim), e.g. queries and keys.
        mask: (batch, 1, time or 1, time) bool, which columns a row may look at.
        heads: A_r.

    Returns:
        (batch, relation head, time, time); columns that are masked have probability 0.

    Raises:
        MismatchError: if the two differ in width, as queries and keys do where several queries share a key.
    """
    if left.shape != right.shape:
        raise MismatchError(
            f"minilm: a relation of {tuple(left.shape)} with {tuple(right.shape)} needs one width. Relate each with "
            "itself: MiniLM(relations=('qq', 'kk', 'vv'))."
        )
    a, b = split_heads(left, heads), split_heads(right, heads)
    scores: Tensor = a @ b.transpose(-1, -2) / math.sqrt(a.shape[-1])
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).log_softmax(-1)  # finite: a row of padding stays so


def minilm_relation(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], tokens: Tensor, *, heads: int, causal: bool = False
) -> Tensor:
    """KL between the two models' relations of one pair, for each sentence.

    Args:
        student: two of queries, keys, values, each (batch, time, dim of the student), all heads concatenated.
        teacher: the same of the teacher, of its own width; detached here.
        tokens: (batch, time) bool, the real tokens.
        heads: A_r.
        causal: a row looks at itself and what comes before.

    Returns:
        (batch,) nats: mean over relation heads and real tokens; 0 for a sentence without tokens.

    Raises:
        MismatchError: if the models read different numbers of sentences or tokens.
    """
    for vectors in (*student, *teacher):
        if vectors.shape[:2] != tokens.shape:
            raise MismatchError(
                f"minilm: vectors of shape {tuple(vectors.shape)} do not fit tokens of shape {tuple(tokens.shape)}. "
                "Both models must see the same tokens."
            )
    mask = tokens[:, None, None, :]
    if causal:
        time = tokens.shape[1]
        mask = mask & torch.ones(time, time, dtype=torch.bool, device=tokens.device).tril()
    dtype = torch.promote_types(student[0].dtype, torch.float32)
    padding = ~tokens[..., None]
    s = [vectors.to(dtype).masked_fill(padding, 0.0) for vectors in student]
    t = [vectors.detach().to(dtype).masked_fill(padding, 0.0) for vectors in teacher]
    rows = kl(log_relation(t[0], t[1], mask, heads), log_relation(s[0], s[1], mask, heads))  # (batch, head, time)
    total = torch.where(tokens[:, None, :], rows, 0.0).sum((1, 2))
    return total / (heads * tokens.sum(1).clamp(min=1))


class MiniLM(Objective):
    """Relations of the student's last layer against one layer of the teacher."""

    Config = MiniLMConfig
    config: MiniLMConfig
    causal: bool

    def needs(self, student: Sizes, teacher: Sizes | None) -> Needs:
        if teacher is None or not student.layers or not teacher.layers:
            raise MismatchError("minilm: both models must be transformers with num_hidden_layers in their configs.")
        self.causal = student.causal or teacher.causal
        letters = set("".join(self.config.relations))
        return Needs(
            student=frozenset(f"{letter}:-1" for letter in letters),
            teacher=frozenset(f"{letter}:{self.config.teacher_layer}" for letter in letters),
            same_tokens=False,
            mean_over="examples",
        )

    def forward(self, signals: Signals, step: Step) -> dict[str, Tensor]:
        check_unpacked(self.name, signals.inputs)
        letters, layer = set("".join(self.config.relations)), self.config.teacher_layer
        student = {letter: joined_heads(signals.student[f"{letter}:-1"]) for letter in letters}
        teacher = {letter: joined_heads(signals.teacher[f"{letter}:{layer}"]) for letter in letters}
        return {
            pair: weight
            * minilm_relation(
                (student[pair[0]], student[pair[1]]),
                (teacher[pair[0]], teacher[pair[1]]),
                signals.tokens,
                heads=self.config.relation_heads,
                causal=self.causal,
            )
            for pair, weight in zip(self.config.relations, self.config.weights, strict=True)
        }


METHOD = Method(
    title="MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained Transformers",
    paper="arXiv:2012.15828",
    authors="Wenhui Wang, Hangbo Bao, Shaohan Huang, Li Dong, Furu Wei",
    year=2021,
    summary="The student's last self-attention relates queries, keys and values as one layer of the teacher does.",
    bibtex="""@inproceedings{wang2021minilmv2,
  title = {{MiniLMv2}: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained Transformers},
  author = {Wang, Wenhui and Bao, Hangbo and Huang, Shaohan and Dong, Li and Wei, Furu},
  booktitle = {Findings of the Association for Computational Linguistics},
  year = {2021}, eprint = {2012.15828}, archivePrefix = {arXiv}
}""",
    algorithm=("similarity",),
    knowledge=("feature",),
    tasks=("feature-extraction", "fill-mask", "text-classification", "token-classification", "text-generation"),
    objective=MiniLM,
)
