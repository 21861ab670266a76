"""Several teachers: the two ways of combining them, teachers with other widths and tokenizers, settings."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from datasets import Dataset
from hf_compress_plugins.encoders import multi_teacher as module
from hf_compress_plugins.encoders._triple import mean_of_examples, real_states
from hf_compress_plugins.encoders.multi_teacher import MultiTeacher, teacher_tokens, teachers_kl
from hf_compress_plugins.general.kd import KD, kd
from scene import logits, sizes
from stub import GradientKeeper
from tiny import tiny_plain_tokenizer
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, PreTrainedConfig, Trainer

from hf_compress import DistillConfig, testing
from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.objective import IGNORED
from hf_compress.teachers import EnsembleTeacher

CASE = testing.Case("multi_teacher", "fill-mask")
WEIGHTS = (0.2, 0.5, 0.3)


def combined(student: Tensor, combine: Any, *, temperature: float = 2.0) -> Tensor:
    teachers = [logits(6, 5, seed) for seed in (1, 2, 3)]
    return teachers_kl(student, teachers, WEIGHTS, temperature=temperature, combine=combine)


def test_both_ways_give_one_gradient_and_differ_by_the_teachers_own_divergence() -> None:
    values, gradients = [], []
    for combine in ("probs", "losses"):
        student = logits(6, 5, 0).requires_grad_()
        value = combined(student, combine)
        value.sum().backward()
        values.append(value.detach())
        gradients.append(student.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    p = torch.stack([(logits(6, 5, seed) / 2).softmax(-1) for seed in (1, 2, 3)])
    mean = (torch.tensor(WEIGHTS, dtype=torch.float64)[:, None, None] * p).sum(0)
    own = torch.stack([weight * (one * (one / mean).log()).sum(-1) for weight, one in zip(WEIGHTS, p, strict=True)])
    torch.testing.assert_close(values[1] - values[0], 4 * own.sum(0))
    assert ((values[1] - values[0]) > 0.01).all()


def test_two_opposite_teachers_by_hand() -> None:
    """(3/4, 1/4) and (1/4, 3/4): the mean is even, and an even student has nothing to learn from it."""
    one = torch.tensor([[3.0, 1.0]]).log()
    even = torch.zeros(1, 2)
    found = [
        teachers_kl(even, [one, one.flip(-1)], [0.5, 0.5], temperature=1.0, combine=combine).item()
        for combine in ("probs", "losses")
    ]
    assert found == pytest.approx([0.0, math.log(2) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25)], abs=1e-6)


def test_one_teacher_twice_is_kd() -> None:
    student, teacher = logits(6, 5, 0), logits(6, 5, 1)
    for combine in ("probs", "losses"):
        found = teachers_kl(student, [teacher, teacher], [0.3, 0.7], temperature=3.0, combine=combine)  # type: ignore[arg-type]  # both
        torch.testing.assert_close(found, kd(student, teacher, temperature=3.0))
    with pytest.raises(MismatchError, match="one shape"):
        teachers_kl(student, [teacher, teacher[:, :4]], [0.5, 0.5], temperature=1.0, combine="losses")


def test_means_of_examples_by_hand() -> None:
    states = torch.tensor([[[1.0], [3.0], [9.0]], [[5.0], [9.0], [9.0]], [[9.0], [9.0], [9.0]]])
    tokens = torch.tensor([[True, True, False], [True, False, False], [False] * 3])
    chosen, example = real_states(states, tokens)
    assert (chosen.flatten().tolist(), example.tolist()) == ([1.0, 3.0, 5.0], [0, 0, 1])
    assert mean_of_examples(chosen, example, 3).tolist() == [[2.0], [5.0], [0.0]]
    every, example = real_states(states, torch.ones(3, 1, dtype=torch.bool))  # images
    assert (len(every), example.tolist()) == (9, [0, 0, 0, 1, 1, 1, 2, 2, 2])
    with pytest.raises(MismatchError, match="cosine=0"):
        real_states(states, tokens[:, :2])


def run(folder: Path, method: Any, **settings: Any) -> tuple[Trainer, dict[str, Tensor]]:
    keeper = GradientKeeper()
    given = {"dtype": torch.float64, "callbacks": (keeper,)} | settings
    trainer, _ = testing.trainer(CASE, folder, objective=method, **given)
    trainer.train()
    return trainer, keeper.gradients[0]


def test_the_mean_of_probabilities_is_the_ensemble_s_kd(tmp_path: Path) -> None:
    """On rows whose tokens all have labels, at T = 1, kd from the ensemble is the same step."""
    method = MultiTeacher(soft=1.0, cosine=0.0, temperature=1.0)
    _, found = run(tmp_path, method)
    second = testing.frozen(CASE, method, torch.float64)["second"]
    config = DistillConfig(task_weight=2.0)
    _, expected = run(
        tmp_path, KD(temperature=1.0), config=config, wrap=lambda teacher: EnsembleTeacher([teacher, second])
    )
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def masked() -> list[dict[str, Any]]:
    """Rows with a label at their first token alone."""
    return [
        row | {"labels": [row["labels"][0]] + [IGNORED] * (len(row["labels"]) - 1)} for row in testing.rows("fill-mask")
    ]


@pytest.mark.parametrize("restrict", [False, True])
def test_the_cosines_and_where_logits_are_compared(restrict: bool, tmp_path: Path) -> None:
    """Weights (1, 3) of a wider teacher, through a projection, and of a second of the student's width."""
    method = MultiTeacher(weights=(1.0, 3.0), combine="losses", restrict=restrict)
    trainer, gradients = run(tmp_path, method, data=masked(), learning_rate=0.0)
    assert {n for n in gradients if n.startswith("distiller")} == {"distiller.0_multi_teacher.project.teacher.weight"}
    student, teacher = testing.models("fill-mask", torch.float64)
    second = testing.frozen(CASE, method, torch.float64)["second"]
    batch = testing.collate(masked())
    real, scored = batch["attention_mask"].bool(), batch["labels"] != IGNORED
    with torch.no_grad():
        outputs = [
            model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
            for model in (student, teacher, second)
        ]
    learned = trainer.callback_handler.callbacks
    distiller = next(one.run.distiller for one in learned if hasattr(one, "run"))
    projection = distiller["0_multi_teacher"].project["teacher"].weight.detach()
    own = outputs[0].hidden_states[-1][real]
    expected = 0.0
    for weight, seen, theirs in ((0.25, own @ projection.T, outputs[1]), (0.75, own, outputs[2])):
        cosine = torch.nn.functional.cosine_similarity(seen, theirs.hidden_states[-1][real], dim=-1)
        expected += weight * (1 - cosine).mean().item()
    log = trainer.state.log_history[0]
    assert log["distill/multi_teacher.cosine"] == pytest.approx(expected, rel=1e-5)
    where = scored if restrict else real
    soft = sum(
        weight * kd(outputs[0].logits[where], other.logits[where], temperature=2.0).mean().item()
        for weight, other in ((0.25, outputs[1]), (0.75, outputs[2]))
    )
    assert log["distill/multi_teacher.soft"] == pytest.approx(5 * soft, rel=1e-5)


def other_vocabulary() -> BertForMaskedLM:
    """Of width 32, with 40 words instead of 60."""
    torch.manual_seed(5)
    return BertForMaskedLM(
        BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ).eval()


def own_columns(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The second teacher reads seven tokens of each row, the first ones real."""
    found = testing.collate([{k: row[k] for k in ("input_ids", "labels")} for row in batch])
    return found | {
        f"second_{k}": torch.tensor([row[f"second_{k}"] for row in batch]) for k in ("input_ids", "attention_mask")
    }


def test_a_teacher_with_its_own_tokenizer_gives_terms_of_sentences(tmp_path: Path) -> None:
    data = [
        row | {"second_input_ids": [7 + place] * 7, "second_attention_mask": [1] * (2 + place) + [0] * (5 - place)}
        for place, row in enumerate(testing.rows("fill-mask"))
    ]
    second = other_vocabulary().double()
    settings: dict[str, Any] = {
        "data": data,
        "config": DistillConfig(frozen={"second": second}),
        "give": lambda _: {"data_collator": own_columns},
        "learning_rate": 0.0,
    }
    method = MultiTeacher(combine="losses", own_tokens=("second",), cosine=3.0)
    trainer, gradients = run(tmp_path, method, **settings)
    learned = {"distiller.0_multi_teacher.project.teacher.weight", "distiller.0_multi_teacher.project.second.weight"}
    assert learned == {name for name in gradients if name.startswith("distiller")}
    distiller = next(one.run.distiller for one in trainer.callback_handler.callbacks if hasattr(one, "run"))
    projection = distiller["0_multi_teacher"].project["second"].weight.detach()
    student, _ = testing.models("fill-mask", torch.float64)
    total = 0.0
    for row in data:
        ids, theirs = torch.tensor([row["input_ids"]]), torch.tensor([row["second_input_ids"]])
        real = torch.tensor([row["second_attention_mask"]])
        with torch.no_grad():
            own = student.eval().bert(ids).last_hidden_state[0].mean(0)
            other = second.bert(theirs, attention_mask=real).last_hidden_state[0][real[0].bool()].mean(0)
        cosine = torch.nn.functional.cosine_similarity(projection @ own, other, dim=0)
        total += len(row["input_ids"]) * (1 - cosine.item())
    tokens = sum(len(row["input_ids"]) for row in data)
    assert trainer.state.log_history[0]["distill/multi_teacher.sentences"] == pytest.approx(
        3 * 0.5 * total / tokens, rel=1e-5
    )

    parts = [
        run(
            tmp_path,
            MultiTeacher(method.config),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            **settings,
        )[1]
    ]
    for name, gradient in gradients.items():
        torch.testing.assert_close(parts[0][name], gradient, rtol=1e-5, atol=1e-9, msg=name)

    with mock.patch.object(module, "state_cosine", side_effect=RuntimeError("reached")), pytest.raises(RuntimeError):
        run(tmp_path, MultiTeacher(method.config), **settings)


def test_a_teacher_of_the_student_s_tokens_is_compared_beside_one_of_its_own(tmp_path: Path) -> None:
    """Its other classes are refused, whatever a third one reads."""
    aligned, apart = (testing.models("token-classification")[1] for _ in range(2))
    aligned.config.num_labels = testing.CLASSES + 1
    method = MultiTeacher(teachers=("second", "third"), own_tokens=("third",), combine="losses")
    frozen = {"second": type(aligned)(aligned.config), "third": apart}
    case = testing.Case("multi_teacher", "token-classification")
    with pytest.raises(MismatchError, match="classes or vocabulary entries, the teacher 6"):
        testing.trainer(case, tmp_path, objective=method, config=DistillConfig(frozen=frozen))


def test_texts_are_read_by_each_teacher_s_tokenizer() -> None:
    texts = Dataset.from_dict({"text": ["a good film", "dull"], "labels": [0, 1]})
    found = teacher_tokens(texts, tokenizers={"second": tiny_plain_tokenizer()}, max_length=6)
    assert found.column_names == ["text", "labels", "second_input_ids", "second_attention_mask"]
    assert found["second_attention_mask"][:] == [[1] * 5 + [0], [1] * 3 + [0] * 3]
    assert (
        found[1]["second_input_ids"] == tiny_plain_tokenizer()("dull", padding="max_length", max_length=6)["input_ids"]
    )
    with pytest.raises(ConfigurationError, match="has no 'body'"):
        teacher_tokens(texts, tokenizers={}, max_length=6, column="body")


def test_other_kinds_of_output_are_refused_with_the_remedy() -> None:
    with pytest.raises(MismatchError, match="Use EnsembleTeacher"):
        MultiTeacher().needs(sizes(2, "causal"), sizes(2, "causal"))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"combine": "mean"}, "combine"),
        ({"teachers": ()}, "at least one"),
        ({"teachers": ("teacher",)}, "none 'teacher'"),
        ({"weights": (1.0,)}, "2 numbers above 0"),
        ({"weights": (1.0, 0.0)}, "2 numbers above 0"),
        ({"own_tokens": ("third",), "combine": "losses"}, "none of the teachers"),
        ({"own_tokens": ("second",)}, "Set combine='losses'"),
        ({"own_tokens": ("second",), "combine": "losses", "cosine": 0.0}, "set cosine > 0"),
        ({"soft": 0.0, "cosine": 0.0}, "one of them above 0"),
        ({"temperature": 0.0}, "temperature"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_served_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^multi_teacher: .*{said}"):
        MultiTeacher(**wrong)


def test_encoder_decoders_whose_logits_follow_other_tokens_are_refused() -> None:
    """Their logits are of the decoder's tokens, the batch's mask of the encoder's."""
    both = replace(sizes(2, "tokens"), config=PreTrainedConfig(is_encoder_decoder=True))
    with pytest.raises(MismatchError, match="taggers and masked language models"):
        MultiTeacher().needs(both, both)
