"""Distillation of a decoder-only teacher into an encoder-decoder."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import toys
from datasets import Dataset
from hf_compress_plugins.encoders import encoder_decoder as method
from hf_compress_plugins.encoders.encoder_decoder import (
    METHOD,
    EncoderDecoder,
    encoder_decoder,
    of_answers,
    teacher_inputs,
    with_answers,
)
from hf_compress_plugins.general.kd import KD
from scene import logits, signals, sizes, step
from stub import GradientKeeper
from tiny import tiny_plain_tokenizer
from torch import Tensor, nn
from transformers import (
    DataCollatorForSeq2Seq,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from hf_compress import DistillCallback, DistillConfig
from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.objective import IGNORED, Inputs, Sizes
from hf_compress.outputs import decoder_inputs

VOCAB, PAD, END = 20, 0, 1
ENDS = range(END, 8)
"""Of the student's own answers: so many that an untrained model ends some early."""
ROWS = (([5, 6, 7, 8, END], [9, 10, END]), ([11, 12, END], [13, 14, 15, 16, END]), ([17, END], [END]))
"""Source and answer: unequal, so that a mean of means shows."""


TOKENS = signals({}, {}, torch.ones(1, 2, dtype=torch.bool))


@cache
def _models() -> tuple[T5ForConditionalGeneration, GPT2LMHeadModel]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = T5ForConditionalGeneration(
            T5Config(
                vocab_size=VOCAB,
                d_model=8,
                d_kv=4,
                d_ff=8,
                num_layers=1,
                num_heads=2,
                dropout_rate=0.0,
                pad_token_id=PAD,
                decoder_start_token_id=PAD,
                eos_token_id=END,
                initializer_factor=2.0,
            )
        )
        student.generation_config.eos_token_id = list(ENDS)
        torch.manual_seed(1)
        sized: dict[str, Any] = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": VOCAB}
        dropped = {f"{place}_pdrop": 0.0 for place in ("attn", "embd", "resid")}
        teacher = GPT2LMHeadModel(GPT2Config(**sized, **dropped, initializer_range=0.5, bos_token_id=END))
    return student.double(), teacher.double()


def models() -> tuple[T5ForConditionalGeneration, GPT2LMHeadModel]:
    """A student and a teacher with absolute positions, in float64 without dropout."""
    student, teacher = (copy.deepcopy(one) for one in _models())
    return student.train(), teacher.eval()


def rows() -> list[dict[str, Any]]:
    return [{"input_ids": source, "labels": answer} for source, answer in ROWS]


def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    """As DataCollatorForSeq2Seq: padded on the right to the longest."""
    width, length = (max(len(row[name]) for row in batch) for name in ("input_ids", "labels"))
    lengths = torch.tensor([[len(row["input_ids"])] for row in batch])
    return {
        "input_ids": torch.tensor([row["input_ids"] + [PAD] * (width - len(row["input_ids"])) for row in batch]),
        "attention_mask": (torch.arange(width) < lengths).long(),
        "labels": torch.tensor([row["labels"] + [IGNORED] * (length - len(row["labels"])) for row in batch]),
    }


def trainer(
    folder: Path, objective: Any, *callbacks: Any, pair: Any = None, **settings: Any
) -> tuple[Trainer, Any, GradientKeeper]:
    """A Trainer with the method attached, its teacher and its gradients."""
    student, teacher = pair or models()
    given: dict[str, Any] = {
        "max_steps": 1,
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "train_sampling_strategy": "sequential",
    }
    config = settings.pop("config", None)
    more = {name: settings.pop(name) for name in ("processing_class", "eval_dataset") if name in settings}
    kept = GradientKeeper()
    args = TrainingArguments(str(folder), **(given | settings))
    made = Trainer(
        model=student,
        args=args,
        train_dataset=Dataset.from_list(rows()),
        data_collator=collate,
        callbacks=[DistillCallback(teacher, objective, config=config), kept, *callbacks],
        **more,
    )
    return made, teacher, kept


class Answers:
    """Every batch's sampled answers, kept."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.settings: list[dict[str, Any]] = []
        self.original = method.on_policy

    def __call__(self, inputs: Inputs, step: Any, **settings: Any) -> Inputs:
        found = self.original(inputs, step, **settings)
        assert "labels" not in inputs
        self.seen.append(found["labels"])
        self.settings.append(settings)
        return found


def by_hand(student: Any, teacher: Any, batch: Inputs, answers: Tensor) -> Tensor:
    """L_kd, a row at a time and without padding, averaged within each answer and over answers."""
    found = []
    for source, mask, answer in zip(batch["input_ids"], batch["attention_mask"], answers, strict=True):
        real, wanted = source[mask.bool()], answer[answer != IGNORED]
        start = torch.tensor([PAD])
        own = student(input_ids=real[None], decoder_input_ids=torch.cat([start, wanted[:-1]])[None]).logits[0]
        with torch.no_grad():
            theirs = teacher(input_ids=torch.cat([real, wanted])[None]).logits[0, len(real) - 1 : -1]
        p, log_q = theirs.softmax(-1), own.log_softmax(-1)
        found.append((p * (p.log() - log_q)).sum(-1).mean())
    return torch.stack(found).mean()


def test_two_ids_by_hand_and_those_that_one_model_has_alone_count_nowhere() -> None:
    """Teacher (3/4, 1/4), student (1/2, 1/2): KL = 3/4 ln 3/2 + 1/4 ln 1/2."""
    teacher = torch.tensor([[math.log(3.0), 0.0]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert encoder_decoder(torch.zeros(1, 2), teacher).item() == pytest.approx(expected)
    wider = torch.tensor([[math.log(3.0), 0.0, 9.0]])
    assert encoder_decoder(torch.zeros(1, 2), wider).item() == pytest.approx(expected)
    assert encoder_decoder(torch.tensor([[0.0, 0.0, 5.0]]), teacher).item() == pytest.approx(expected)
    student = logits(3, 5, 0).requires_grad_()
    gradient = torch.autograd.grad(encoder_decoder(student, logits(3, 4, 1)).sum(), student)[0]
    torch.testing.assert_close(
        gradient[:, :4], student.detach()[:, :4].softmax(-1) - logits(3, 4, 1).softmax(-1), rtol=1e-6, atol=1e-9
    )
    assert not gradient[:, 4].any()
    with pytest.raises(MismatchError, match="must have one shape"):
        encoder_decoder(logits(3, 4, 0), logits(2, 4, 1))


def test_the_teacher_reads_source_and_answer_without_a_gap() -> None:
    """Padding of the source on either side and inside ends up on the left, positions begin with the first token."""
    source = torch.tensor([[5, 6, PAD, PAD], [PAD, 7, PAD, 8], [9, 9, 9, 9]])
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [1, 1, 1, 1]])
    answers = torch.tensor([[3, END], [END, IGNORED], [4, 5]])
    found = teacher_inputs(source, mask, answers, pad=PAD)
    assert found["input_ids"].tolist() == [[0, 0, 5, 6, 3, 1], [0, 0, 7, 8, 1, 0], [9, 9, 9, 9, 4, 5]]
    assert found["attention_mask"].tolist() == [[0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
    assert found["position_ids"].tolist() == [[0, 0, 0, 1, 2, 3], [0, 0, 0, 1, 2, 2], [0, 1, 2, 3, 4, 5]]


def test_labels_that_are_padded_on_the_left_are_refused() -> None:
    """As DataCollatorForSeq2Seq gives them where the tokenizer pads on the left."""
    tokenizer = tiny_plain_tokenizer()
    features = [{"input_ids": source, "labels": answer} for source, answer in ROWS]
    for side in ("right", "left"):
        tokenizer.padding_side = side
        found = DataCollatorForSeq2Seq(tokenizer)([dict(row) for row in features])
        given = found["input_ids"], found["attention_mask"], found["labels"]
        if side == "right":
            assert teacher_inputs(*given, pad=PAD)["input_ids"].shape == (3, 10)
            continue
        with pytest.raises(MismatchError, match="labels are padded before their first token"):
            teacher_inputs(*given, pad=PAD)


def test_a_prediction_sees_the_source_and_the_tokens_before_it() -> None:
    """Of both models position i is changed by token i - 1 and by none from i on."""
    student, teacher = models()
    batch = collate(rows())
    answers = torch.tensor([[3, 4, 5, 6]] * 3)

    def both(given: Tensor) -> tuple[Tensor, Tensor]:
        read = teacher_inputs(batch["input_ids"], batch["attention_mask"], given, pad=PAD)
        source = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            return student(**source, decoder_input_ids=decoder_inputs(student, given)).logits, of_answers(
                teacher(**read).logits, 4
            )

    other = answers.clone()
    other[:, 2] = 7
    for before, after in zip(both(answers), both(other), strict=True):
        assert before.shape == (3, 4, VOCAB)
        changed = (before != after).any(-1)
        torch.testing.assert_close(before[:, :3], after[:, :3], rtol=1e-9, atol=1e-12)
        assert changed[:, 3].all()


@pytest.mark.parametrize(("lmbda", "memory"), [(1.0, "dense"), (1.0, "chunked"), (0.0, "dense")])
def test_a_step_is_the_weighed_sum_of_both_passes(lmbda: float, memory: Any, tmp_path: Path) -> None:
    """0.9 of the divergence on the student's own answers, or the data's, and 0.1 of the data's cross-entropy."""
    student, teacher = models()
    answers = Answers()
    with mock.patch.object(method, "on_policy", answers):
        made, frozen, kept = trainer(
            tmp_path, EncoderDecoder(lmbda=lmbda, max_new_tokens=6), config=DistillConfig(memory=memory)
        )
        start = {name: value.clone() for name, value in frozen.state_dict().items()}
        made.train()
    batch = collate(rows())
    sampled = answers.seen[0] if lmbda else batch["labels"]
    kd = by_hand(student, teacher, batch, sampled)
    ce = student(**batch).loss
    (0.9 * kd + 0.1 * ce).backward()

    assert toys.logged(made, "distill_loss") == [pytest.approx(0.9 * kd.item(), rel=1e-6)]
    assert toys.logged(made, "task_loss") == [pytest.approx(ce.item(), rel=1e-6)]
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(kept.gradients[0][name], parameter.grad, rtol=1e-6, atol=1e-9, msg=name)
    assert all(torch.equal(value, start[name]) for name, value in frozen.state_dict().items())
    if lmbda:
        assert answers.settings == [
            {"do_sample": True, "temperature": 0.9, "top_p": 1.0, "top_k": 128, "max_new_tokens": 6}
        ]
        assert not torch.equal(sampled, batch["labels"])
        lengths = (sampled != IGNORED).sum(1)
        assert len(set(lengths.tolist())) > 1  # the mask decides


def test_every_step_s_answers_are_of_the_student_as_it_is_and_a_resumed_run_draws_the_same(tmp_path: Path) -> None:
    def run(folder: str, steps: int, again: bool = False) -> tuple[list[Tensor], Trainer]:
        answers = Answers()
        saving = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
        with mock.patch.object(method, "on_policy", answers):
            made, *_ = trainer(tmp_path / folder, EncoderDecoder(max_new_tokens=5), **saving)
            made.train(resume_from_checkpoint=again)
        return answers.seen, made

    whole, first = run("whole", 3)
    run("parts", 2)
    rest, second = run("parts", 3, again=True)
    assert len(whole) == 3
    assert not torch.equal(whole[0], whole[1])
    assert torch.equal(rest[0], whole[2])
    for one, other in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_without_the_mask_the_mean_is_over_all_d_positions(tmp_path: Path) -> None:
    """Those after the end of an answer included, and as many as D = 7 makes, as in the authors' code."""
    student, teacher = models()
    student.generation_config.eos_token_id = list(range(VOCAB))  # each answer ends with its first token
    answers = Answers()
    with mock.patch.object(method, "on_policy", answers):
        unmasked = EncoderDecoder(max_new_tokens=7, masked=False, a=1.0, sampling_temperature=0.0)
        made, *_ = trainer(tmp_path, unmasked, pair=(copy.deepcopy(student), teacher))
        made.train()
    batch, (sampled,) = collate(rows()), answers.seen
    padded = torch.full((3, 7), IGNORED)
    padded[:, :1] = sampled
    read = teacher_inputs(batch["input_ids"], batch["attention_mask"], padded, pad=PAD)
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        own = student(**source, decoder_input_ids=decoder_inputs(student, padded)).logits
        theirs = of_answers(teacher(**read).logits, 7)
    expected = encoder_decoder(own.flatten(0, 1), theirs.flatten(0, 1)).mean()
    assert toys.logged(made, "distill_loss") == [pytest.approx(expected.item(), rel=1e-6)]
    assert answers.settings == [{"do_sample": False, "max_new_tokens": 7}]


def test_evaluation_is_on_the_data_s_answers(tmp_path: Path) -> None:
    student, teacher = models()
    made, *_ = trainer(
        tmp_path,
        EncoderDecoder(max_new_tokens=3),
        eval_dataset=Dataset.from_list(rows()),
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=2,
        learning_rate=0.0,
    )
    made.train()
    batch = collate(rows())
    expected = 0.9 * by_hand(student, teacher, batch, batch["labels"])
    assert toys.logged(made, "eval_distill_loss") == [pytest.approx(expected.item(), rel=1e-6)]


class AlignedForConditionalGeneration(nn.Module):
    """The teacher as a model of the student's kind: its predictions of the labels."""

    def __init__(self, teacher: GPT2LMHeadModel, student: T5ForConditionalGeneration) -> None:
        super().__init__()
        self.inner, self.config = teacher, copy.deepcopy(student.config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> dict[str, Tensor]:
        labels = torch.nn.functional.pad(decoder_input_ids[:, 1:], (0, 1), value=END)  # the last one is not read
        read = teacher_inputs(input_ids, attention_mask, labels, pad=PAD)
        return {"logits": of_answers(self.inner(**read).logits, labels.shape[1])}


def test_the_step_lies_as_far_from_kd_as_is_stated(tmp_path: Path) -> None:
    """Plain softened targets refuse the pair; they are given the aligned teacher, on the data's answers."""
    with pytest.raises(MismatchError, match="the student's outputs are 'tokens', the teacher's 'causal'"):
        trainer(tmp_path, KD())[0].train()
    found = []
    for objective, pair in (
        (EncoderDecoder(sampling_temperature=0.0, max_new_tokens=4), models()),
        (KD(), (student := models()[0], AlignedForConditionalGeneration(models()[1], student))),
    ):
        made, _, kept = trainer(tmp_path, objective, pair=pair)
        made.train()
        found.append(kept.gradients[0])
    own, plain = found
    distance = torch.stack([(own[name] - plain[name]).square().sum() for name in plain]).sum().sqrt()
    norm = torch.stack([value.square().sum() for value in plain.values()]).sum().sqrt()
    assert float(distance / norm) == pytest.approx(1.0150, abs=1e-3)


def test_a_vocabulary_that_is_padded_further_is_never_sampled_there(tmp_path: Path) -> None:
    """The student embeds 8 ids more than the teacher and would choose one of them; the tokenizers are compared."""
    tokenizer = tiny_plain_tokenizer()
    student, _ = models()
    real = len(tokenizer)
    student.resize_token_embeddings(real + 8)
    with torch.no_grad():
        student.shared.weight[real:] *= 100
    config = _models()[1].config.to_dict() | {"vocab_size": real}
    teacher = GPT2LMHeadModel(GPT2Config(**config)).double()
    (tmp_path / "teacher").mkdir()
    with pytest.raises(MismatchError, match="there are no two tokenizers to compare"):
        trainer(tmp_path, EncoderDecoder(), pair=(copy.deepcopy(student), teacher), processing_class=tokenizer)[
            0
        ].train()
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "teacher", dtype=torch.float64)
    answers = Answers()
    with mock.patch.object(method, "on_policy", answers):
        made, *_ = trainer(
            tmp_path, EncoderDecoder(max_new_tokens=5), pair=(student, loaded), processing_class=tokenizer
        )
        made.train()
    assert int(answers.seen[0].max()) < real
    assert answers.settings[0]["suppress_tokens"] == list(range(real, real + 8))
    assert toys.logged(made, "distill_loss")[0] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"a": 1.1}, "a must lie in 0 … 1, got 1.1"),
        ({"a": math.nan}, "a must lie in 0 … 1"),
        ({"lmbda": -0.1}, "lmbda must lie in 0 … 1"),
        ({"max_new_tokens": 0}, "max_new_tokens be at least 1"),
        ({"sampling_temperature": -1.0}, "sampling_temperature must be finite and at least 0"),
        ({"sampling_temperature": math.inf}, "sampling_temperature must be finite and at least 0"),
        ({"top_k": -1}, "top_k at least 0"),
    ],
)
def test_settings_that_cannot_be_served_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"encoder_decoder: .*{message}"):
        EncoderDecoder(**settings)


def test_other_pairs_are_refused_and_settings_decide_the_weights() -> None:
    def of(model: Any, kind: Any) -> Sizes:
        return Sizes(kind=kind, layers=1, width=8, heads=2, vocab=VOCAB, config=model.config)

    student, teacher = models()
    own, theirs = of(student, "tokens"), of(teacher, "causal")
    found = EncoderDecoder().needs(own, theirs)
    assert (found.student, found.teacher, found.mean_over) == (frozenset(), frozenset(), "examples")
    with pytest.raises(MismatchError, match="the student must be an encoder-decoder"):
        EncoderDecoder().needs(theirs, theirs)
    with pytest.raises(MismatchError, match="the student must be an encoder-decoder"):
        EncoderDecoder().needs(sizes(1), theirs)
    with pytest.raises(MismatchError, match="the teacher must be a causal language model"):
        EncoderDecoder().needs(own, own)
    assert EncoderDecoder().task_weight == pytest.approx(0.1)
    assert EncoderDecoder(a=1.0).task_weight == 0.0
    assert EncoderDecoder().overrides("batch")
    assert not EncoderDecoder(lmbda=0.0).overrides("batch")
    unknown = EncoderDecoder()
    unknown.needs(own, replace(theirs, vocab=0))
    assert not unknown._never
    with pytest.raises(MismatchError, match=r"the batch has no input_ids, it has \['input_features', 'labels'\]"):
        unknown.forward(
            replace(TOKENS, inputs={"input_features": torch.zeros(1, 2), "labels": torch.ones(1, 2)}), step()
        )
    with pytest.raises(MismatchError, match="without labels there is no answer"):
        unknown.forward(TOKENS, step())


def test_a_teacher_s_rows_label_the_answer_alone() -> None:
    found = with_answers(Dataset.from_list([{"input_ids": [5, 1], "labels": [6, 7, 1], "note": "x"}]))
    assert found[:] == {
        "input_ids": [[5, 1, 6, 7, 1]],
        "attention_mask": [[1] * 5],
        "labels": [[IGNORED, IGNORED, 6, 7, 1]],
    }
    assert METHOD.preparation is with_answers
