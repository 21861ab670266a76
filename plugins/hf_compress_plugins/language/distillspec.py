"""Distillation of a draft model, so that a target model accepts more of its tokens in speculative decoding.

Zhou, Lyu, Rawat, Menon, Rostamizadeh, Kumar, Kagy, Agarwal: DistillSpec: Improving Speculative Decoding via Knowledge
Distillation, ICLR 2024, arXiv:2310.08461, sections 3 and 4.

    L = E_x E_{y ~ G(·|x)} [ 1/|y| Σ_i D( p_i , q_i ) ]     p: the target's (the teacher's) distribution, q: the draft's
    forward_kl   D = KL(p ‖ q)
    reverse_kl   D = KL(q ‖ p)
    jsd          D = β KL(p ‖ m) + (1 - β) KL(q ‖ m),  m = β p + (1 - β) q
    tvd          D = ½ Σ |p - q| = 1 - α,  α = Σ min(p, q) the probability that a drafted token is accepted

G, who writes the answers, and D are what the algorithms of the paper's comparison differ in (names as they are recalled
of it):

    Supervised KD    D = forward_kl, on the data's answers                       the defaults
    SeqKD            the likelihood of the target's answers                      `answered`, no method
    ImitKD           D = forward_kl, on the data's and the draft's answers       λ = 0.5
    f-Distill        D = tvd, on the target's and the draft's answers            λ = 0.5 on what `answered` made
    on-policy GKD    any D, on the draft's answers                               λ = 1

With probability λ, one draw a batch and the same on all ranks, the draft answers a batch itself; values are then
averaged within each answer and over answers, otherwise over all positions of the window. `answered` is a data set whose
answers the target wrote, once, before training. No gradient flows through sampling, none into the target; the prompt
is not scored, the end of an answer is. The task's own loss is left out: a draft need not be right, only to agree.

If the mean total variation on the draft's own answers of T tokens is ε, the target accepts at least 1 - T ε of them;
the bound is loose in practice. Which D is best depends on the task and on how tokens are chosen: measure the acceptance
at the temperature, top-k and top-p of the decoding (`python -m hf_compress_evaluation.speculative`); a draft tuned for
samples at temperature 1 is not the best one for greedy decoding.

The total variation has a gradient of bounded size and hardly any where the two distributions are far apart: begin with
the forward KL and go on from there, as the recipe does. A jsd with small β is small: near p = q it is β (1 - β) times
either KL, so give it the weight 1 / (β (1 - β)), or the learning rate. Its limit at β = 0 is 0, not the forward KL.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import datasets
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hf_compress.data import Rows as DataRows
from hf_compress.distiller import generator
from hf_compress.divergences import check_temperature, jsd, kl, log_probabilities, tvd
from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.objective import IGNORED, Inputs, Rows, Step
from hf_compress.on_policy import OnPolicy, check_answers, written
from hf_compress.registry import Method
from hf_compress.taps import evaluating, unwrap

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "tvd"]
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd")


@dataclass(frozen=True, kw_only=True)
class DistillSpecConfig:
    """Hyper-parameters of DistillSpec."""

    divergence: Divergence = "forward_kl"
    """D. Our choice, as the paper has no single one: the one to begin with."""
    beta: float = 0.5
    """β of the jsd, 0 < β < 1; the even one is what the paper compares."""
    temperature: float = 1.0
    """T > 0, divides both logits in the loss."""
    lmbda: float = 0.0
    """λ, 0 … 1: part of batches that the draft answers itself. 0 asks neither for prompts in the data nor for the time
    of sampling."""
    max_new_tokens: int = 128
    """Of an answer of the draft's."""
    sampling_temperature: float = 1.0
    """Of the draft's answers: its own distribution, as the objective says."""

    def __post_init__(self) -> None:
        check_temperature("distillspec", self.temperature)
        check_temperature("distillspec", self.sampling_temperature)
        if self.divergence not in DIVERGENCES:
            raise ConfigurationError(
                f"distillspec: divergence must be one of {', '.join(DIVERGENCES)}, got {self.divergence!r}."
            )
        if not 0 < self.beta < 1:
            raise ConfigurationError(
                f"distillspec: beta must lie between 0 and 1, got {self.beta}. For its ends choose forward_kl or "
                "reverse_kl: the jsd itself tends to 0 there."
            )
        check_answers("distillspec", self.lmbda, self.max_new_tokens)


def distillspec(
    draft_logits: Tensor,
    target_logits: Tensor,
    *,
    divergence: Divergence,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """D(p, q) at each position.

    Args:
        draft_logits: (position, vocab), any float type; widened to float32.
        target_logits: (position, vocab), detached here.
        divergence: D.
        beta: β, of the jsd alone.
        temperature: T, divides both logits.

    Returns:
        (position,) at least 0, in nats; for tvd 0 … 1, one minus the acceptance at that temperature.

    Raises:
        MismatchError: if the two logits differ in shape.
    """
    log_p, log_q = log_probabilities("distillspec", draft_logits, target_logits, temperature)
    if divergence == "tvd":
        return tvd(log_p, log_q)
    if divergence == "jsd":
        return jsd(log_p, log_q, beta)
    return kl(log_p, log_q) if divergence == "forward_kl" else kl(log_q, log_p)


class DistillSpec(OnPolicy):
    """A divergence of choice, on answers of the data's, the target's or the draft's."""

    Config = DistillSpecConfig
    config: DistillSpecConfig
    task_weight: ClassVar[float | None] = 0.0

    def per_position(self, rows: Rows, step: Step) -> Tensor:
        assert rows.teacher_logits is not None  # tapped by default
        settings = self.config
        return distillspec(
            rows.student_logits,
            rows.teacher_logits,
            divergence=settings.divergence,
            beta=settings.beta,
            temperature=settings.temperature,
        )


def answered(
    dataset: DataRows,
    *,
    teacher: Any,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    batch: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> datasets.Dataset:
    """The data's prompts with answers that the target writes, for SeqKD, f-Distill and the like.

    Args:
        dataset: rows of `input_ids` and of `labels` that are -100 on the prompt; of an encoder-decoder `input_ids` of
            the encoder. Neither packed nor padded. Other columns are kept, but for an `attention_mask`.
        teacher: the target, with `generate`.
        max_new_tokens: of an answer.
        temperature: of the samples; 0: the likeliest token at each place.
        top_k, top_p: of the samples; 0 and 1 leave all tokens in.
        batch: rows of a call of `generate`.
        seed: of the samples, with the place of a row.
        progress: show a bar.

    Returns:
        as many rows, whose labels are -100 on the prompt.

    Raises:
        MismatchError: if a row has no prompt.
        ConfigurationError: for a negative temperature, or no row.
    """
    if temperature < 0 or not len(dataset) or batch < 1:
        raise ConfigurationError(
            f"distillspec: answers need rows, a temperature of at least 0 and a batch of at least 1, got "
            f"{len(dataset)} rows, {temperature} and {batch}."
        )
    sampling: dict[str, Any] = {"do_sample": False, "max_new_tokens": max_new_tokens}
    if temperature:
        sampling |= {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    model = unwrap(teacher)
    rows = [dict(dataset[place]) for place in range(len(dataset))]
    found: list[dict[str, Any]] = []
    starts = range(0, len(rows), batch)
    screen = Console(stderr=True)
    for start in track(starts, "  answers", disable=not progress, transient=True, console=screen):
        part = rows[start : start + batch]
        seeds = generator(torch.device("cpu"), seed, start)
        with torch.random.fork_rng(), torch.no_grad(), evaluating(teacher):
            torch.manual_seed(int(torch.randint(2**62, (), generator=seeds)))
            made = written(_padded(part, model.device), model, teacher.generate, **sampling)
        found += _rows(part, made, model.config.is_encoder_decoder)
    return datasets.Dataset.from_list(found)


def _padded(rows: Sequence[Mapping[str, Any]], device: torch.device) -> Inputs:
    """Rows as a batch, padded on the right."""
    if missing := {"input_ids", "labels"} - rows[0].keys():
        raise MismatchError(
            f"distillspec: the rows have no {sorted(missing)}, they have {sorted(rows[0])}. Give input_ids, and labels "
            "that are -100 on the prompt."
        )
    columns = {name: [torch.tensor(row[name]) for row in rows] for name in ("input_ids", "labels")}
    ids = pad_sequence(columns["input_ids"], batch_first=True)
    real = [torch.ones_like(row) for row in columns["input_ids"]]
    found = {
        "input_ids": ids,
        "attention_mask": pad_sequence(real, batch_first=True),
        "labels": pad_sequence(columns["labels"], batch_first=True, padding_value=IGNORED),
    }
    return {name: values.to(device) for name, values in found.items()}


def _rows(rows: Sequence[Mapping[str, Any]], batch: Inputs, encoder: bool) -> Iterator[dict[str, Any]]:
    """The rows with what stands in a batch without padding; of an encoder-decoder the labels alone are another's."""
    for place, row in enumerate(rows):
        labels, kept = batch["labels"][place], {name: value for name, value in row.items() if name != "attention_mask"}
        if encoder:
            yield kept | {"labels": labels[labels != IGNORED].tolist()}
            continue
        real = batch["attention_mask"][place].bool()
        yield kept | {"input_ids": batch["input_ids"][place][real].tolist(), "labels": labels[real].tolist()}


RECIPE: Mapping[str, Any] = {
    "stages": (
        {
            "name": "forward-kl",
            "teacher": "target",
            "data": "answers",
            "methods": ({"name": "distillspec", "divergence": "forward_kl"},),
        },
        {
            "name": "tvd-on-policy",
            "teacher": "target",
            "data": "answers",
            "methods": ({"name": "distillspec", "divergence": "tvd", "lmbda": 1.0},),
        },
    )
}
"""The forward KL on the data's answers, then the total variation on the draft's own, for
`hf_compress.stages.run_stages` with `models={"target": …}` and `data={"answers": rows with prompts}`."""

METHOD = Method(
    title="DistillSpec: Improving Speculative Decoding via Knowledge Distillation",
    paper="arXiv:2310.08461",
    authors="Yongchao Zhou, Kaifeng Lyu, Ankit Singh Rawat, Aditya Krishna Menon, Afshin Rostamizadeh, Sanjiv Kumar, "
    "Jean-François Kagy, Rishabh Agarwal",
    year=2024,
    summary="A draft learns the target's distributions on answers of its own, so that more of its tokens are accepted.",
    bibtex="""@inproceedings{zhou2024distillspec,
  title = {{DistillSpec}: Improving Speculative Decoding via Knowledge Distillation},
  author = {Zhou, Yongchao and Lyu, Kaifeng and Rawat, Ankit Singh and Menon, Aditya Krishna and
            Rostamizadeh, Afshin and Kumar, Sanjiv and Kagy, Jean-Fran{\\c{c}}ois and Agarwal, Rishabh},
  booktitle = {International Conference on Learning Representations},
  year = {2024}, eprint = {2310.08461}, archivePrefix = {arXiv}
}""",
    algorithm=("divergence",),
    knowledge=("feature", "labelling"),
    tasks=("text-generation", "text2text-generation"),
    objective=DistillSpec,
    preparation=answered,
    recipe=RECIPE,
)
