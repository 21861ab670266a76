"""What is refused before anything is trained, each with its remedy."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, Trainer, TrainerCallback

from . import foreign
from . import objective as o
from .errors import ConfigurationError, ForeignFileError, MismatchError
from .objective import Inputs, Kind, Needs, Objective, Sizes
from .teachers.model import hub_name

logger = logging.getLogger(__name__)

TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
"""Files of which a model's folder or repository holds one if it has a tokenizer."""


def check_trainer(trainer: Trainer, callback: TrainerCallback) -> None:
    """Refuses set-ups whose loss would be ignored or wrong, before anything is trained."""
    ours = [other for other in trainer.callback_handler.callbacks if isinstance(other, type(callback))]
    if len(ours) > 1:
        raise ConfigurationError(
            "two DistillCallbacks on one Trainer: the second would replace the first's loss. "
            "Give one callback a list: DistillCallback(teacher, method=['kd', 'features'])."
        )
    function = trainer.compute_loss_func
    handled = function is not None and getattr(function, "hf_compress_callback", None) is callback
    if function is not None and not handled:
        raise ConfigurationError(
            "compute_loss_func replaces the model's loss, so distillation would be lost. "
            "Pass Trainer(compute_loss_func=callback.loss(my_loss))."
        )
    if trainer.label_smoother is not None and not handled:
        raise ConfigurationError(
            "label_smoothing_factor makes the Trainer compute its own loss, so distillation would be lost. Set it to 0 "
            "(a teacher's targets are smooth already), or smooth in Trainer(compute_loss_func=callback.loss(my_loss))."
        )
    if makes_log_probabilities(trainer) and trainer.args.loss_type != "nll":
        raise ConfigurationError(
            f"loss_type={trainer.args.loss_type!r} is a loss that SFTTrainer makes itself, and the callback needs the "
            "model's. Set loss_type='nll'."
        )
    if trainer.args.n_gpu > 1:
        raise ConfigurationError(
            "DataParallel (one process, several GPUs) splits the batch behind the callback. "
            "Start with `torchrun` or `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one GPU."
        )
    if trainer.args.push_to_hub and trainer.args.hub_strategy in ("every_save", "checkpoint", "all_checkpoints"):
        raise ConfigurationError(
            f"hub_strategy={trainer.args.hub_strategy.value!r} pushes checkpoints with training state in them. "
            "Use hub_strategy='end', or `hf-compress push` afterwards."
        )
    if trainer.args.hub_token is not None:
        if trainer.args.push_to_hub:
            raise ConfigurationError(
                "the Trainer writes TrainingArguments(hub_token=…) in clear into training_args.bin, and "
                "push_to_hub=True uploads that file. Leave hub_token out: the login or HF_TOKEN serves as well."
            )
        logger.warning(
            "hf_compress: the Trainer writes hub_token in clear into training_args.bin, in each checkpoint and beside "
            "the model. `hf-compress push` leaves that file out, Trainer.push_to_hub uploads it. Leave hub_token out: "
            "the login or HF_TOKEN serves as well."
        )
    data = trainer.train_dataset
    if data is not None and hasattr(data, "__len__") and len(data) == 0:
        raise ConfigurationError("the training data set is empty. Check its filters and splits.")


def makes_log_probabilities(trainer: Trainer) -> bool:
    """Whether it is TRL's SFTTrainer with its own loss, which it makes of log-probabilities instead of logits."""
    own = trainer.compute_loss_func is None
    return own and type(trainer).compute_loss.__module__ == "trl.trainer.sft_trainer"


def check_apart(student: nn.Module, teacher: nn.Module) -> None:
    """Refuses a teacher whose weights are the student's too: freezing it would freeze them, training change it."""
    if student is teacher:
        raise ConfigurationError("student and teacher are one object. shrink() or copy.deepcopy the teacher first.")
    places = {parameter.untyped_storage().data_ptr() for parameter in teacher.parameters()} - {0}
    shared = [name for name, p in student.named_parameters() if p.untyped_storage().data_ptr() in places]
    if shared:
        raise ConfigurationError(
            f"student and teacher share weights, first {shared[0]!r} of {len(shared)}: freezing the teacher would "
            "freeze them and training would change it. Copy them: shrink(teacher, layers=…) or copy.deepcopy."
        )


def check_pair(needs: Sequence[Needs], student: Sizes, teacher: Sizes, processing_class: Any = None) -> int | None:
    """Refuses a teacher whose classes are not the student's, where logits are compared.

    Args:
        needs: of the methods.
        student: the one side.
        teacher: the other.
        processing_class: the Trainer's; its tokenizer tells which part of two padded vocabularies is real.

    Returns:
        how many of the classes both have, where one vocabulary is padded further than the other; else None.

    Raises:
        MismatchError: naming both sides and the way out.
    """
    if not any(need.same_tokens and need.teacher and "logits" in need.teacher for need in needs):
        return None
    if student.kind != teacher.kind:
        raise MismatchError(
            f"the student's outputs are {student.kind!r}, the teacher's {teacher.kind!r}. Use a teacher with the same "
            "kind of head, or a method on hidden states: method='features'."
        )
    known = all(size.vocab or size.config is not None for size in (student, teacher))
    if known and student.vocab != teacher.vocab:
        real = _real(processing_class)
        if all(real is not None and real <= size.vocab == _embedded(size) for size in (student, teacher)):
            return real
        what = "labels" if student.kind in ("rows", "labels") else "classes or vocabulary entries"
        raise MismatchError(
            f"the student has {student.vocab} {what}, the teacher {teacher.vocab}. Give both one label set or "
            "vocabulary (shrink(teacher, layers=…) keeps it), the Trainer a processing_class if they are only padded "
            "otherwise, or use a method on hidden states: method='features'."
        )
    names = [getattr(size.config, "id2label", None) or {} for size in (student, teacher)]
    if student.kind in ("rows", "labels", "tokens") and all(names) and len(names[0]) == student.vocab:
        default = {index: f"LABEL_{index}" for index in range(student.vocab)}
        if names[0] != names[1] and default not in names:
            raise MismatchError(
                f"the label orders differ: student {names[0]}, teacher {names[1]}. Set the student's config.id2label "
                "to the teacher's and map the data's labels accordingly."
            )
    return None


def _real(processing_class: Any) -> int | None:
    """How many token ids a tokenizer uses; None without one."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    return max(tokenizer.get_vocab().values()) + 1 if hasattr(tokenizer, "get_vocab") else None


def check_head(student: Sizes, objectives: Sequence[Objective], needs: Sequence[Needs]) -> None:
    """Refuses a head without the distributions that the methods compare.

    Raises:
        MismatchError: for a regression head; for a multi-label one and a method on one distribution a row.
    """
    if student.kind == "none" and o.is_regression(student.config):
        raise MismatchError(
            "a regression head has no distribution over classes, which the method compares. Use a method on hidden "
            "states: method='features'."
        )
    for objective, need in zip(objectives, needs, strict=True):
        if student.kind == "labels" and objective.overrides("forward") and "logits" in need.student:
            raise MismatchError(
                f"{objective.name} compares one distribution over classes a row, and a multi-label head has one of two "
                "outcomes for each label. Use a method whose values are per position, or one on hidden states."
            )


def check_labels(kind: Kind, classes: int, inputs: Inputs, *, distributions: bool) -> None:
    """Refuses class ids that the head does not have, before the forward turns them into an index error.

    Args:
        distributions: whether a method compares distributions over classes; real labels tell that there are none.

    Raises:
        MismatchError: with the offending id and the range.
    """
    labels = inputs.get("labels")
    if distributions and kind == "rows" and labels is not None and labels.is_floating_point():
        raise MismatchError(
            "the labels are real numbers, and the head is taken to choose one class a row, whose ids are integers. Set "
            'problem_type="multi_label_classification" in the configs of student and teacher, or map the labels.'
        )
    if kind not in ("rows", "tokens", "causal") or not classes or labels is None or labels.is_floating_point():
        return
    wrong = labels[(labels != o.IGNORED) & ((labels < 0) | (labels >= classes))]
    if len(wrong):
        raise MismatchError(
            f"label {int(wrong[0])} is out of range: the model has classes 0 … {classes - 1}, and -100 for unlabelled. "
            "Map the labels, or load the model with the right num_labels."
        )


def check_ids(teacher: Sizes, inputs: Inputs) -> None:
    """Refuses token ids that the teacher does not embed, before its forward turns them into an index error."""
    ids, rows = inputs.get("input_ids"), _embedded(teacher)
    if ids is None or rows is None or not ids.numel():
        return
    if (largest := int(ids.max())) >= rows:
        raise MismatchError(
            f"the batch has token id {largest}, the teacher embeds 0 … {rows - 1}. Use a teacher with the student's "
            "tokenizer, or a method of the tokenizers family."
        )


def _embedded(sizes: Sizes) -> int | None:
    """How many token ids a model reads, by its config."""
    config: Any = sizes.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "vocab_size", None)


def check_tokenizers(processing_class: Any, student: Sizes, teacher: Sizes) -> None:
    """Refuses a teacher that would read other words than the student: the same ids must mean the same tokens to both.

    Raises:
        MismatchError: naming both sizes, or the first token that differs.
    """
    rows, own = _embedded(teacher), _embedded(student)
    if rows is None or own is None:
        return
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    known = hasattr(tokenizer, "get_vocab")
    if known and len(tokenizer) > rows:
        raise MismatchError(
            f"the tokenizer has {len(tokenizer)} tokens, the teacher embeds {rows}. Tokenize with the teacher's "
            "tokenizer, or choose a method of the tokenizers family."
        )
    theirs = tokenizer_beside(teacher.config) if known else None
    if theirs is None:
        if own != rows:
            raise MismatchError(
                f"the student embeds {own} tokens, the teacher {rows}, and there are no two tokenizers to compare, so "
                "the teacher may read other words. Give the teacher as a folder with its tokenizer and the Trainer a "
                "processing_class, or use a teacher with the student's vocabulary."
            )
        logger.info("hf_compress: the teacher brings no tokenizer to compare; its ids are taken to be the student's")
        return
    ids = theirs.get_vocab()
    differing = [token for token, index in tokenizer.get_vocab().items() if ids.get(token) != index]
    if differing:
        raise MismatchError(
            f"{len(differing)} tokens of the tokenizer have another id in the teacher's, first {differing[0]!r}. The "
            "teacher would read other words. Use its tokenizer, or a method of the tokenizers family."
        )


def tokenizer_beside(config: PreTrainedConfig | None) -> Any | None:
    """The tokenizer in the folder or the repository that a model came from; None: there is none, or none to reach."""
    source = str(getattr(config, "_name_or_path", "") or "")
    if not (Path(source).is_dir() if source else False) and hub_name(source) is None:
        return None
    if not any(foreign.fetched(source, name) for name in TOKENIZERS):  # without one some classes make an empty one
        return None
    try:
        return foreign.tokenizer(source)
    except (ForeignFileError, ImportError) as error:
        logger.warning("hf_compress: the teacher's tokenizer cannot be read, and its ids are not compared: %s", error)
        return None


def warn_of_probabilities(scores: Tensor) -> None:
    """Says it where a teacher's scores are squashed already: their softmax is nearly flat.

    Args:
        scores: (position, class), all of a batch that are scored.
    """
    if scores.numel() >= 8 and 0 <= float(scores.min()) < float(scores.max()) <= 1:
        logger.warning(
            "hf_compress: the teacher's scores all lie between 0 and 1, as probabilities do; taken as logits they "
            "differ too little to teach. Give its logits, or the logarithms of its probabilities."
        )
