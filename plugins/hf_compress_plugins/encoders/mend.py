"""Demonstrations of a task as a few input vectors of a frozen language model, made in one pass of a small one.

Li, Ma, Lu, Lee, Liu, Guo: MEND: Meta dEmonstratioN Distillation for Efficient and Effective In-Context Learning,
ICLR 2024, arXiv:2403.06914.

    S = D([E_D(demonstrations) ; P]) at the places of P, through tanh(W · + b) where D is not as wide as the LLM
    student: LLM([S ; E(query, answer)]), its logits at query and answer
    teacher: LLM([demonstrations ; query, answer]), its logits at query and answer
    L_kd = mean over all tokens of query and answer of KL( softmax(z_teacher / T) ‖ softmax(z_student / T) ), T = 1
    L = L_task + λ L_kd, L_task the next-token cross-entropy of the answer

D, P and the adapter are trained, and the gradient flows to S through the frozen LLM; the teacher carries none, and
there is no T². Stage 1 reads plain text, whose first 80 % stand for demonstrations, with L_kd alone. Stage 2 reads
episodes: demonstrations are drawn from the query's own task without the query, and λ, this objective's weight, is 1.

    student = mend(llm, config={"distiller": shrink(llm, layers=2)})
    run_stages(RECIPE, student, folder, Surroundings(models={"llm": llm}, data={"text": …, "tasks": …}, …))
    virtual = student.distill(demonstration_ids)                      # once
    student.generate(query_ids, virtual_tokens=virtual, max_new_tokens=20)

The language model is inside the student's folder, once: a folder that needs another one, by a name that may move, is
no model, and what S means is bound to these very weights. While it trains, the teacher is a second copy in memory, as a
teacher is another object than the student. Exported to ONNX is what is trained, from demonstrations to S.

Both layouts come from `episodes`, and the tokens that they select are compared: a teacher's row that was cut elsewhere
would be another example. Places are counted over real tokens, so that padding moves nothing; a query stands behind as
many places as there are vectors, not as many as its demonstrations had. Encoder-decoders, which the authors try too,
are refused. The identifier and the authors' list are from memory.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from hf_compress.divergences import check_temperature, kl, log_probabilities
from hf_compress.errors import ConfigurationError, MismatchError, UnknownNameError
from hf_compress.objective import Inputs, Needs, Objective, Signals, Sizes, Step
from hf_compress.registry import Method
from hf_compress.stepping import row_cross_entropy
from hf_compress_plugins.encoders._episodes import Episode as Episode
from hf_compress_plugins.encoders._episodes import candidates as candidates
from hf_compress_plugins.encoders._episodes import episode as episode
from hf_compress_plugins.encoders._episodes import episodes as episodes
from hf_compress_plugins.encoders._episodes import padded as padded
from hf_compress_plugins.encoders._modeling_mend import (
    DemonstrationConfig,
    DemonstrationModel,
    MENDForCausalLM,
    MENDModelConfig,
)

COLUMNS = frozenset({"teacher_input_ids", "teacher_attention_mask", "teacher_demonstrations"})
"""Of `episodes`, the teacher's alone."""
SETTINGS = {"distiller": None, "num_virtual_tokens": 100, "start": "normal"}
"""Of `mend`, with their defaults; the authors' number of vectors."""
FIRST_WORD = 100
"""Ids below stand for special and rare tokens and are not drawn for a start from the vocabulary (authors' code)."""


@dataclass(frozen=True, kw_only=True)
class MENDConfig:
    """Hyper-parameters of the objective."""

    temperature: float = 1.0
    """T, the authors'."""

    def __post_init__(self) -> None:
        check_temperature("mend", self.temperature)


def selected(logits: Tensor, mask: Tensor) -> Tensor:
    """(token, vocab) logits of query and answer, chosen before any softmax.

    Args:
        logits: (batch, time, vocab).
        mask: (batch, time) bool.
    """
    return logits[mask]


def check_tokens(student_ids: Tensor, teacher_ids: Tensor) -> None:
    """Refuses layouts whose queries and answers differ.

    Args:
        student_ids: (token,) what the student reads.
        teacher_ids: (token,) what the teacher reads behind its demonstrations.

    Raises:
        MismatchError: unless they are equal, in number and one by one.
    """
    if student_ids.shape != teacher_ids.shape or bool((student_ids != teacher_ids).any()):
        raise MismatchError(
            f"mend: the student reads {len(student_ids)} tokens of queries and answers, the teacher {len(teacher_ids)} "
            "behind its demonstrations, and they are not the same. A row that was cut differently in both layouts "
            "would be compared with another place: make both with episodes(…)."
        )


def distillation(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """(token,) nats, KL from the teacher's to the student's softened distribution, without T².

    Args:
        student_logits: (token, vocab).
        teacher_logits: (token, vocab), detached here.
        temperature: T.
    """
    return kl(*log_probabilities("mend", student_logits, teacher_logits, temperature))


def answer_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """(row,) mean log-probability of the labelled tokens, nats, at most 0: the largest is the chosen answer.

    Args:
        logits: (row, time, vocab).
        labels: (row, time), -100 outside of the answer.
    """
    return -row_cross_entropy("causal", logits, {"labels": labels})


class MEND(Objective):
    """What the language model says behind all demonstrations, for a student that has but vectors of them."""

    Config = MENDConfig
    config: MENDConfig
    task_weight: ClassVar[float | None] = 1.0

    def needs(self, student: Sizes, teacher: Sizes | None) -> Needs:
        if not isinstance(student.config, MENDModelConfig):
            raise MismatchError("mend: the student must come from mend(llm), which reads demonstrations.")
        return Needs(columns=COLUMNS, same_tokens=False, mean_over="tokens")

    def teacher_batch(self, inputs: Inputs, step: Step) -> Inputs:
        if "demonstration_ids" not in inputs:  # the student would read queries behind nothing
            raise MismatchError("mend: the batch has no demonstration_ids. Make its rows with episodes(…).")
        return {"input_ids": inputs["teacher_input_ids"], "attention_mask": inputs["teacher_attention_mask"]}

    def forward(self, signals: Signals, step: Step) -> Tensor:
        inputs = signals.inputs
        theirs = inputs["teacher_attention_mask"].bool() & ~inputs["teacher_demonstrations"].bool()
        check_tokens(inputs["input_ids"][signals.tokens], inputs["teacher_input_ids"][theirs])
        return distillation(
            selected(signals.student["logits"], signals.tokens),
            selected(signals.teacher["logits"], theirs),
            temperature=self.config.temperature,
        )


def mend(teacher: PreTrainedModel, *, config: Mapping[str, Any] | None = None) -> MENDForCausalLM:
    """A student around a frozen copy of a language model.

    Args:
        teacher: a causal language model.
        config: `distiller`, a smaller causal language model of the same vocabulary, whose body starts D; None: the
            teacher's own. `num_virtual_tokens`, 100. `start` of P: "normal", or "vocabulary", D's embeddings of tokens
            that are drawn from torch's generator.

    Raises:
        UnknownNameError: for another setting.
        MismatchError: for an encoder-decoder, or a distiller of a smaller vocabulary.
        ConfigurationError: for a value out of its range.
    """
    for name in config or {}:
        if name not in SETTINGS:
            raise UnknownNameError("setting of mend", name, SETTINGS)
    distiller, count, start = (SETTINGS | dict(config or {})).values()
    if start not in ("normal", "vocabulary") or not (isinstance(count, int) and count > 0):
        raise ConfigurationError(
            f"mend: num_virtual_tokens must be above 0 and start normal or vocabulary, got {count!r} and {start!r}."
        )
    own: Any = teacher if distiller is None else distiller
    for model in (teacher, own):
        if getattr(model.config, "is_encoder_decoder", False) or model.get_output_embeddings() is None:
            raise MismatchError(f"mend: takes causal language models, got a {type(model).__name__}.")
    sizes = [model.get_input_embeddings().weight.shape[0] for model in (own, teacher)]
    if sizes[0] < sizes[1]:
        raise MismatchError(
            f"mend: the distiller knows {sizes[0]} tokens, the language model {sizes[1]}. Both read the same ids: "
            "take a distiller of the same tokenizer."
        )
    width = teacher.get_input_embeddings().weight.shape[1]
    inner = DemonstrationConfig(body_config=own.base_model.config, num_virtual_tokens=count, target_size=width)
    made = MENDForCausalLM(MENDModelConfig(text_config=teacher.config, demonstration_config=inner))
    made.to(teacher.dtype)
    made.language_model.load_state_dict(teacher.state_dict())
    made.demonstration_model.body.load_state_dict(own.base_model.state_dict())
    made.generation_config = copy.deepcopy(teacher.generation_config)
    if start == "vocabulary":
        _start_from_vocabulary(made.demonstration_model)
    made.eval()
    return made


def _start_from_vocabulary(model: DemonstrationModel) -> None:
    """P becomes copies of embeddings of random tokens."""
    table: Any = model.get_input_embeddings().weight
    first = FIRST_WORD if len(table) > FIRST_WORD else 0
    drawn = torch.randint(first, len(table), (len(model.virtual_tokens),))
    with torch.no_grad():
        model.virtual_tokens.copy_(table[drawn.to(table.device)])


TRAINED = r"demonstration_model\."
RECIPE: Mapping[str, Any] = {
    "stages": (
        {
            "name": "pretraining",
            "teacher": "llm",
            "data": "text",
            "preparation": "mend",
            "methods": ("mend",),
            "labels": False,
            "trainable": TRAINED,
            "arguments": {"learning_rate": 5e-5},
        },
        {
            "name": "finetuning",
            "teacher": "llm",
            "data": "tasks",
            "preparation": "mend",
            "methods": ("mend",),
            "trainable": TRAINED,
            "arguments": {"learning_rate": 1e-5},
        },
    )
}
"""Both stages, for `hf_compress.stages.run_stages`; the authors take 30,000 steps in each, one row on a device."""

AutoConfig.register("mend_demonstrations", DemonstrationConfig, exist_ok=True)
AutoModel.register(DemonstrationConfig, DemonstrationModel, exist_ok=True)
AutoConfig.register("mend", MENDModelConfig, exist_ok=True)
AutoModelForCausalLM.register(MENDModelConfig, MENDForCausalLM, exist_ok=True)

METHOD = Method(
    title="MEND: Meta dEmonstratioN Distillation for Efficient and Effective In-Context Learning",
    paper="arXiv:2403.06914",
    authors="Yichuan Li, Xiyao Ma, Sixing Lu, Kyumin Lee, Xiaohu Liu, Chenlei Guo",
    year=2024,
    summary="A small model turns the demonstrations in a prompt into a few vectors, also of tasks it never saw.",
    bibtex="""@inproceedings{li2024mend,
  title = {{MEND}: Meta dEmonstratioN Distillation for Efficient and Effective In-Context Learning},
  author = {Li, Yichuan and Ma, Xiyao and Lu, Sixing and Lee, Kyumin and Liu, Xiaohu and Guo, Chenlei},
  booktitle = {International Conference on Learning Representations},
  year = {2024}, eprint = {2403.06914}, archivePrefix = {arXiv}
}""",
    algorithm=("divergence",),
    knowledge=("feature",),
    tasks=("text-generation",),
    objective=MEND,
    student=mend,
    preparation=episodes,
    recipe=RECIPE,
)
