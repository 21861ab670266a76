"""DeAR: a pointwise reranker distilled from a larger one, then a listwise one that reasons over sliding windows.

Abdallah, Mozafari, Piryani, Jatowt: DeAR: Dual-Stage Document Reranking with Reasoning Agents via LLM Distillation,
Findings of EMNLP 2025, arXiv:2508.16998.

Stage 1, with s and t the scores of a query's n passages by student and teacher, passage 0 the relevant one:

    l_q = (1 - α) · L_rank + α · T² · KL( softmax(t / T) ‖ softmax(s / T) )       softmax over the passages
    L_rank: softmax_ce      - log softmax(s)[0]
            ranknet_*       mean over i < j of BCE( σ(s_i - s_j), σ(r_i - r_j) )
            listnet_*       KL( softmax(r) ‖ softmax(s) )
            ranknet_binary_softmax_ce      half of each: with the KL the abstract's hybrid
    r: *_teacher the teacher's scores, *_binary (1, 0, …, 0)

Means over queries are the framework's. The teacher carries no gradient. Binary RankNet has targets σ(1) = 0.73 for the
relevant passage and 0.5 between two others: it pulls the margin to 1 and the others together, unlike hard RankNet. With
n = 2, the authors' default, the KL is nearly a loss of the margin.

    groups = dear_groups(dataset, tokenizer=tokenizer)     # columns query, passages: the relevant one first
    Trainer(model, args, train_dataset=groups, data_collator=GroupCollator(tokenizer),
            callbacks=[DistillCallback(teacher, "dear")])

The authors take LLaMA-2-13B with one logit as the teacher and LLaMA-3 with LoRA (r 32, α 64, dropout 0.1 on all
projections but the keys') as the student, 2 epochs at 1e-4; `teacher_tokens="own"` serves two tokenizers. Their data
set draws the passages for student and teacher apart, so that the teacher scores others than the student: here a group
is drawn once, by `draw_passages`.

Stage 2 is another model of the same base: an instruct model with a LoRA of rank 16, tuned on a teacher's reasonings
that end in a permutation (`rationales` makes the rows; training them is TRL's SFTTrainer, without a loss of ours; the
authors: 20,000 rows, 1e-4, cosine, warm-up 0.1, 5,000 tokens). `rerank` asks any callable from text to text, window by
window from the last passages to the first. The authors' windows stop where the next would begin before the first
passage, so that of 23 passages in windows of 10 by 5 the first three are never ranked, and of fewer than a window none:
here the last window begins at the first passage, and `released=True` is theirs. The prompt is ours; it asks for what
theirs asks for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import datasets
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_compress.divergences import check_temperature, kl, log_probabilities, softened_kl
from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.objective import Signals, Step, require_one_shape
from hf_compress.registry import Method
from hf_compress_plugins.encoders._ranking import GroupCollator as GroupCollator
from hf_compress_plugins.encoders._ranking import RankingObjective, Texts, ranking_groups
from hf_compress_plugins.encoders._ranking import draw_passages as draw_passages

TEXTS = Texts(query_length=32, passage_length=196, query_prefix="query: ", passage_prefix="document: ")
"""The authors' lengths and prefixes. Pass `joined=True` where a tokenizer begins each text of a pair anew (LLaMA)."""
Rank = Literal[
    "softmax_ce",
    "ranknet_teacher",
    "ranknet_binary",
    "listnet_teacher",
    "listnet_binary",
    "ranknet_binary_softmax_ce",
]
WINDOW, STRIDE, FIRST, WORDS = 20, 10, 30, 300
"""Passages of a window and between two windows, passages that are ranked, words kept of a passage. The authors'."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DeARConfig:
    """Hyper-parameters of the first stage; the authors' training script's."""

    loss: Rank = "softmax_ce"
    """L_rank. The abstract's hybrid is "ranknet_binary_softmax_ce"."""
    alpha: float = 0.1
    """α, 0 … 1, part of the KL. 0.1 in the training script, 0.3 and 0.5 are defaults elsewhere in the code."""
    temperature: float = 2.0
    """T > 0."""
    teacher_tokens: Literal["shared", "own"] = "shared"
    """own: the teacher reads the columns teacher_input_ids, teacher_attention_mask, …"""

    def __post_init__(self) -> None:
        check_temperature("dear", self.temperature)
        if not 0 <= self.alpha <= 1:
            raise ConfigurationError(f"dear: alpha must lie in 0 … 1, got {self.alpha}.")
        for name, known in (("loss", get_args(Rank)), ("teacher_tokens", ("shared", "own"))):
            if getattr(self, name) not in known:
                raise ConfigurationError(
                    f"dear: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}."
                )


def softmax_ce(scores: Tensor) -> Tensor:
    """(query,) nats: minus the log probability of the first passage among all; scores (query, passage)."""
    return -scores.log_softmax(-1)[:, 0]


def ranknet(scores: Tensor, relevance: Tensor) -> Tensor:
    """Soft RankNet.

    Args:
        scores: (query, passage), at least two passages.
        relevance: (query, passage) r, detached here.

    Returns:
        (query,) nats, mean over all pairs of passages.

    Raises:
        MismatchError: if the shapes differ, or for one passage.
    """
    require_one_shape("dear", scores, relevance, "Give a relevance for each passage.")
    count = scores.shape[1]
    if count < 2:
        raise MismatchError(f"dear: {tuple(scores.shape)} has no pairs of passages; at least two were expected.")
    first, second = torch.triu_indices(count, count, offset=1, device=scores.device)
    target = (relevance[:, first] - relevance[:, second]).detach().sigmoid()
    differences = scores[:, first] - scores[:, second]
    return F.binary_cross_entropy_with_logits(differences, target, reduction="none").mean(1)


def listnet(scores: Tensor, relevance: Tensor) -> Tensor:
    """(query,) nats: KL(softmax(r) ‖ softmax(s)) over the passages; arguments as of `ranknet`."""
    return kl(*log_probabilities("dear", scores, relevance))


def binary(scores: Tensor) -> Tensor:
    """(query, passage) r = (1, 0, …, 0)."""
    found = torch.zeros_like(scores, requires_grad=False)
    found[:, 0] = 1.0
    return found


def ranking_loss(scores: Tensor, teacher_scores: Tensor | None, *, loss: Rank) -> Tensor:
    """(query,) L_rank; arguments as of `dear`."""
    if loss == "softmax_ce":
        return softmax_ce(scores)
    if loss == "ranknet_binary_softmax_ce":
        return 0.5 * ranknet(scores, binary(scores)) + 0.5 * softmax_ce(scores)
    kind, _, of = loss.partition("_")
    relevance = binary(scores) if of == "binary" else teacher_scores
    if relevance is None:
        raise ConfigurationError(f"dear: {loss} needs the teacher's scores. Give a teacher, or a loss of labels.")
    return (ranknet if kind == "ranknet" else listnet)(scores, relevance)


def soft_ranking(scores: Tensor, teacher_scores: Tensor, *, temperature: float) -> Tensor:
    """(query,) T² · KL(softmax(t / T) ‖ softmax(s / T)) over the passages; arguments as of `dear`."""
    return softened_kl("dear", scores, teacher_scores, temperature=temperature)


def dear(
    scores: Tensor, teacher_scores: Tensor | None, *, loss: Rank = "softmax_ce", alpha: float, temperature: float
) -> Tensor:
    """The first stage's loss.

    Args:
        scores: (query, passage), the relevant passage first.
        teacher_scores: (query, passage), detached here; None: L_rank alone, whole.
        loss: which L_rank.
        alpha: α.
        temperature: T.

    Returns:
        (query,) nats.

    Raises:
        MismatchError: if the shapes differ.
    """
    rank = ranking_loss(scores, teacher_scores, loss=loss)
    if teacher_scores is None:
        return rank
    return (1 - alpha) * rank + alpha * soft_ranking(scores, teacher_scores, temperature=temperature)


class DeAR(RankingObjective):
    """The first stage: a loss of the order, and the teacher's distribution over a query's passages."""

    Config = DeARConfig
    config: DeARConfig

    def forward(self, signals: Signals, step: Step) -> Tensor:
        own, theirs = self.scores(signals)
        settings = self.config
        values = dear(own, theirs, loss=settings.loss, alpha=settings.alpha, temperature=settings.temperature)
        return self.over_rows(values, signals)


def dear_groups(
    dataset: datasets.Dataset, *, tokenizer: Any, teacher_tokenizer: Any = None, texts: Texts = TEXTS
) -> datasets.Dataset:
    """Queries with passages as token ids; arguments as of `_ranking.ranking_groups`."""
    return ranking_groups(dataset, tokenizer=tokenizer, texts=texts, teacher_tokenizer=teacher_tokenizer)


# ---------------------------------------------------------------------- the second stage


def prompt(query: str, passages: Sequence[str], *, words: int = WORDS) -> str:
    """What the listwise ranker is asked: the needs of the query, which passage meets them, an order.

    Args:
        query: the query.
        passages: of one window, numbered from 1.
        words: kept of each passage.
    """
    listed = "\n".join(f"[{place}] {' '.join(text.split()[:words])}" for place, text in enumerate(passages, 1))
    return (
        f"Rank {len(passages)} passages by how well they answer a query.\n\nQuery: {query}\n\n{listed}\n\n"
        "First list what someone who asks this needs to know. Then say for each passage which of these needs it meets. "
        f"Last give the order of all {len(passages)} passages, the best first, in the form [2] > [1] > …, and nothing "
        "after it."
    )


def parse_order(answer: str, count: int) -> list[int]:
    """The order that an answer gives.

    Args:
        answer: what the ranker said; what it thought, up to `</think>`, is not read.
        count: passages of the window.

    Returns:
        all of 0 … count - 1, the best first: numbers of the answer, from 1 there, in the order in which they come;
        repeated ones and those that are no passage are left out, and passages that it does not name come last in their
        old order.
    """
    named = (int(number) - 1 for number in re.findall("[0-9]{1,9}", answer.rpartition("</think>")[2]))
    known = [place for place in named if 0 <= place < count]
    return list(dict.fromkeys([*known, *range(count)]))


def windows(count: int, *, window: int = WINDOW, stride: int = STRIDE, released: bool = False) -> list[tuple[int, int]]:
    """Begin and end of the windows over so many passages, from the last to the first.

    Args:
        count: passages.
        window: passages of a window, the last one excepted.
        stride: by how many a window begins before the one before; at most `window`, or some are never ranked.
        released: True: the authors' code, which leaves out a window that would begin before the first passage.

    Raises:
        ConfigurationError: for sizes that leave passages out.
    """
    if not 1 <= stride <= window or window < 2:
        raise ConfigurationError(
            f"dear: a window needs at least 2 passages and a stride of 1 to all of them, got {window} and {stride}."
        )
    found, end = list[tuple[int, int]](), count
    while count > 1 and (end >= window or not released):
        found.append((max(end - window, 0), end))
        if end <= window:
            break
        end -= stride
    return found


def slide(
    items: Sequence[T],
    order: Callable[[Sequence[T]], Sequence[int]],
    *,
    window: int = WINDOW,
    stride: int = STRIDE,
    released: bool = False,
) -> list[T]:
    """Items ranked window by window: the best of each move on into the next.

    Args:
        items: best first as they are known to be.
        order: from the items of a window to its places, best first, each once.
        window: as of `windows`.
        stride: as of `windows`; as many as move on are certain to reach the top.
        released: as of `windows`.

    Raises:
        MismatchError: if an order is no permutation of its window.
    """
    found = list(items)
    for start, end in windows(len(found), window=window, stride=stride, released=released):
        part = found[start:end]
        places = list(order(part))
        if sorted(places) != list(range(len(part))):
            raise MismatchError(f"dear: {places} is no order of {len(part)} passages; each place once was expected.")
        found[start:end] = [part[place] for place in places]
    return found


def rerank(
    query: str,
    passages: Sequence[str],
    answer: Callable[[str], str],
    *,
    window: int = WINDOW,
    stride: int = STRIDE,
    first: int = FIRST,
    released: bool = False,
) -> list[int]:
    """The listwise ranker over a query's passages.

    Args:
        query: the query.
        passages: in the order of the first stage.
        answer: from a prompt to a text: a pipeline, a `TextTeacher`, a server. The authors sample at temperature 0.5
            and take at most 1,024 tokens.
        window: as of `windows`.
        stride: as of `windows`.
        first: so many passages are ranked, the others stay behind them.
        released: as of `windows`.

    Returns:
        places of the passages, best first.
    """

    def order(places: Sequence[int]) -> list[int]:
        return parse_order(answer(prompt(query, [passages[place] for place in places])), len(places))

    places = list(range(len(passages)))
    return slide(places[:first], order, window=window, stride=stride, released=released) + places[first:]


def rationales(dataset: datasets.Dataset, *, teacher: Callable[[str], str]) -> datasets.Dataset:
    """Rows for the second stage's tuning: a teacher's reasonings over the passages of each query.

    Args:
        dataset: columns `query` and `passages`, in the order of the first stage or shuffled.
        teacher: from a prompt to a reasoning that ends in an order.

    Returns:
        columns `prompt` and `completion`; rows whose answer does not name every passage are left out.
    """

    def ask(row: dict[str, Any]) -> dict[str, str]:
        question = prompt(row["query"], row["passages"])
        return {"prompt": question, "completion": teacher(question)}

    def whole(row: dict[str, Any]) -> bool:
        said = row["completion"].rpartition("</think>")[2]
        return all(re.search(rf"\[{place}\]", said) for place in range(1, len(row["passages"]) + 1))

    asked = dataset.map(ask, load_from_cache_file=False).filter(whole, load_from_cache_file=False)
    return asked.select_columns(["prompt", "completion"])


METHOD = Method(
    title="DeAR: Dual-Stage Document Reranking with Reasoning Agents via LLM Distillation",
    paper="arXiv:2508.16998",
    authors="Abdelrahman Abdallah, Jamshid Mozafari, Bhawna Piryani, Adam Jatowt",
    year=2025,
    summary="A reranker learns a larger one's distribution over a query's passages; a second one reasons in windows.",
    bibtex="""@inproceedings{abdallah2025dear,
  title = {{DeAR}: Dual-Stage Document Reranking with Reasoning Agents via {LLM} Distillation},
  author = {Abdallah, Abdelrahman and Mozafari, Jamshid and Piryani, Bhawna and Jatowt, Adam},
  booktitle = {Findings of the Association for Computational Linguistics: EMNLP 2025},
  year = {2025}, eprint = {2508.16998}, archivePrefix = {arXiv}
}""",
    algorithm=("divergence", "ranking"),
    knowledge=("feature", "labelling"),
    tasks=("text-ranking",),
    objective=DeAR,
    preparation=dear_groups,
)
