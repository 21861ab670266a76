"""Several models as one teacher, and the student without its adapters as its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import toys
from stub import GradientKeeper
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Trainer, TrainingArguments

from hf_compress import DistillCallback, testing
from hf_compress.errors import ConfigurationError, MismatchError
from hf_compress.teachers import EnsembleTeacher, SelfTeacher
from hf_compress.teachers.ensemble import mean_logits
from hf_compress.teachers.model import ModelTeacher

LANGUAGE = "text-generation"


def trainer(
    folder: Path,
    student: nn.Module,
    teacher: Any,
    method: Any = "kd",
    task: str = LANGUAGE,
    *,
    memory: Any = "auto",
    kind: Any = None,
    held: Any = None,
    **more: Any,
) -> tuple[Trainer, GradientKeeper]:
    keeper = GradientKeeper()
    settings: dict[str, Any] = {
        "max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "disable_tqdm": True, "use_cpu": True,
        "save_strategy": "no", "logging_steps": 1, "max_grad_norm": 0.0, "learning_rate": 1e-2,
    }  # fmt: skip
    made = Trainer(
        model=student,
        args=TrainingArguments(str(folder), **(settings | more)),
        train_dataset=testing.rows(task, 4),  # type: ignore[arg-type]  # map-style
        eval_dataset=held,
        data_collator=testing.collate,
        callbacks=[DistillCallback(teacher, method, memory=memory, kind=kind), keeper],
    )
    return made, keeper


def others(task: str = LANGUAGE) -> list[PreTrainedModel]:
    return [testing._model(task, width=96, layers=3, seed=seed) for seed in (1, 2)]


class Mean(nn.Module):
    """The ensemble by hand, as one model."""

    def __init__(self, models: list[PreTrainedModel], weights: tuple[float, float], mean: str) -> None:
        super().__init__()
        self.models, self.weights, self.mean = nn.ModuleList(models), weights, mean
        self.config = models[0].config

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        logits = [model(input_ids=input_ids, attention_mask=attention_mask).logits for model in self.models]
        if self.mean == "logits":
            return {"logits": self.weights[0] * logits[0] + self.weights[1] * logits[1]}
        return {"logits": (self.weights[0] * logits[0].softmax(-1) + self.weights[1] * logits[1].softmax(-1)).log()}


@pytest.mark.parametrize("memory", ["dense", "chunked"])
@pytest.mark.parametrize("mean", ["probabilities", "logits"])
def test_an_ensemble_teaches_the_mean(mean: Any, memory: str, tmp_path: Path) -> None:
    by_hand = Mean(others(), (0.75, 0.25), mean)
    found = []
    for teacher, mode in ((by_hand, "dense"), (EnsembleTeacher(others(), weights=[3, 1], mean=mean), memory)):
        student = testing.models(LANGUAGE)[0]
        made, keeper = trainer(tmp_path, student, teacher, memory=mode, kind="causal")
        made.train()
        found.append(keeper.gradients[0])
    for name, gradient in found[1].items():
        torch.testing.assert_close(gradient, found[0][name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_mean_of_one_is_itself_and_of_two_lies_between() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0]])
    torch.testing.assert_close(mean_logits([logits], [1.0], "probabilities"), logits.log_softmax(-1))
    torch.testing.assert_close(mean_logits([logits], [1.0], "logits"), logits)
    other = logits.flip(-1)
    probabilities = mean_logits([logits, other], [0.5, 0.5], "probabilities").exp()
    torch.testing.assert_close(probabilities, (logits.softmax(-1) + other.softmax(-1)) / 2)
    torch.testing.assert_close(mean_logits([logits, other], [0.5, 0.5], "logits"), torch.tensor([[0.5, 0.0, 0.5]]))


def test_an_ensemble_is_recorded_frozen_and_given_back(tmp_path: Path) -> None:
    models = others("text-classification")
    hashes = [testing.weights_hash(model) for model in models]
    made, _ = trainer(
        tmp_path, testing.models("text-classification")[0], EnsembleTeacher(models), task="text-classification"
    )
    made.train()
    assert [testing.weights_hash(model) for model in models] == hashes
    assert all(parameter.requires_grad for model in models for parameter in model.parameters())
    about = made.model.config.compression["teacher"]
    assert about["architecture"] == "mean of BertForSequenceClassification, BertForSequenceClassification"
    assert about["parameters"] == sum(p.numel() for model in models for p in model.parameters())


def test_what_an_ensemble_cannot_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="2 models need as many weights above 0"):
        EnsembleTeacher(others(), weights=[1.0])
    with pytest.raises(ConfigurationError, match="weights above 0"):
        EnsembleTeacher(others(), weights=[1.0, 0.0])
    with pytest.raises(ConfigurationError, match="mean must be"):
        EnsembleTeacher(others(), mean="median")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="heads of real values have no probabilities"):
        EnsembleTeacher(others("text-ranking"))
    with pytest.raises(MismatchError, match="heads differ"):
        EnsembleTeacher([*others(), *others("text-classification")])
    with pytest.raises(ConfigurationError, match=r"no mean of \['hidden:2'"):
        trainer(tmp_path, testing.models(LANGUAGE)[0], EnsembleTeacher(others()), "features")


# ---------------------------------------------------------------------- the student itself


def adapted(dropout: float = 0.0) -> nn.Module:
    student = testing.models(LANGUAGE)[0]
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False, lora_dropout=dropout)
    made: nn.Module = peft.get_peft_model(student, lora)
    return made


def test_adapters_hand_on_what_the_model_inside_reads() -> None:
    """Places of tokens, which a batch that is padded on the left needs."""
    inner = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9))
    teacher = ModelTeacher(
        peft.get_peft_model(inner, peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM"))
    )
    given = {"input_ids": torch.tensor([[1, 2]]), "position_ids": torch.tensor([[5, 6]]), "nobody": torch.zeros(1)}
    assert teacher.prepared(given).keys() - {"use_cache"} == {"input_ids", "position_ids"}
    assert teacher.reads is not None
    assert "position_ids" in teacher.reads


@pytest.mark.parametrize("memory", ["dense", "chunked"])
@pytest.mark.parametrize("method", ["kd", ["kd", "features"]])
def test_a_student_without_its_adapters_teaches_as_a_copy_of_the_base(method: Any, memory: str, tmp_path: Path) -> None:
    found = []
    for teacher in (copy.deepcopy(testing.models(LANGUAGE)[0]), SelfTeacher()):
        made, keeper = trainer(tmp_path, adapted(), teacher, method, memory=memory)
        made.train()
        found.append(
            (keeper.gradients, [entry["distill_loss"] for entry in made.state.log_history if "distill_loss" in entry])
        )
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-5)
    assert found[1][1][0] > 1e-3
    for own, expected in zip(found[1][0], found[0][0], strict=True):
        assert own.keys() == expected.keys()
        for name, gradient in own.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_its_dropout_is_off_for_the_teacher_and_as_it_was_for_the_student(tmp_path: Path) -> None:
    student = adapted(dropout=0.5)
    frozen = student.base_model.model.model.layers[0]  # kept in eval mode by the user
    modes: list[tuple[bool, bool]] = []
    student.base_model.model.lm_head.register_forward_hook(lambda m, *_: modes.append((m.training, frozen.training)))
    made, _ = trainer(tmp_path, student, SelfTeacher(), memory="dense", max_steps=1)
    made.train()
    assert modes == [(False, False), (True, True)]  # the teacher runs first
    assert student.training
    ids = torch.ones(1, 3, dtype=torch.long)
    assert not torch.equal(student(input_ids=ids).logits, student(input_ids=ids).logits)


def test_it_evaluates_and_saves_a_clean_adapter(tmp_path: Path) -> None:
    student = adapted()
    made, _ = trainer(tmp_path, student, SelfTeacher(), held=testing.rows(LANGUAGE, 2), eval_strategy="epoch")
    made.train()
    assert toys.logged(made, "eval_distill_loss")[0] > 0
    assert not student._forward_hooks
    assert "distiller" not in dict(student.named_children())


def test_a_student_without_adapters_cannot_teach_itself(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="LlamaForCausalLM has no adapters to turn off"):
        trainer(tmp_path, testing.models(LANGUAGE)[0], SelfTeacher())
