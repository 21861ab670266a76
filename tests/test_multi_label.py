"""Heads with several labels a row: a Bernoulli divergence for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from hf_compress_plugins.general.kd import KD
from stub import GradientKeeper
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from hf_compress import DistillCallback, testing
from hf_compress.errors import MismatchError
from hf_compress.objective import positions
from hf_compress.outputs import two_outcomes
from hf_compress.stepping import row_cross_entropy
from hf_compress.teachers.cache import CacheTeacher
from hf_compress.teachers.ensemble import EnsembleTeacher

LABELS = 3


def model(seed: int, layers: int = 1) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=testing.VOCAB, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=16,
        num_labels=LABELS, problem_type="multi_label_classification", initializer_range=0.4,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config).double()


def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    found = testing.collate([{"input_ids": row["input_ids"]} for row in batch])
    if "labels" in batch[0]:
        found["labels"] = torch.tensor([row["labels"] for row in batch], dtype=torch.float64)
    return found


def rows(labelled: bool = True) -> list[dict[str, Any]]:
    found = testing.rows("feature-extraction", 4)
    for place, row in enumerate(found if labelled else ()):
        row["labels"] = [float(place % 2), 1.0, float(place > 1)]
    return found


def trained(
    folder: Path, teacher: Any, method: Any = "kd", *, labelled: bool = True, size: int = 4, steps: int = 1, **more: Any
) -> tuple[Trainer, dict[str, Tensor]]:
    keeper = GradientKeeper()
    made = Trainer(
        model=model(0),
        args=TrainingArguments(
            str(folder), max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=steps, report_to=[],
            use_cpu=True, save_strategy="no", max_grad_norm=0.0, disable_tqdm=True, logging_steps=1,
            train_sampling_strategy="sequential", **more,
        ),
        train_dataset=rows(labelled),  # type: ignore[arg-type]  # map-style
        eval_dataset=rows(),
        data_collator=collate,
        callbacks=[DistillCallback(teacher, method), keeper],
    )  # fmt: skip
    made.train()
    return made, keeper.gradients[0]


def expected(temperature: float, *, labelled: bool) -> tuple[float, dict[str, Tensor]]:
    """By hand, from the definition of the Bernoulli divergence."""
    student, teacher = model(0), model(1, layers=2).eval()
    batch = collate(rows())
    labels = batch.pop("labels")
    z = student(**batch).logits / temperature
    with torch.no_grad():
        t = teacher(**batch).logits / temperature
    p = t.sigmoid()
    divergence = p * (F.logsigmoid(t) - F.logsigmoid(z)) + (1 - p) * (F.logsigmoid(-t) - F.logsigmoid(-z))
    value = temperature**2 * divergence.mean()
    total = value + (F.binary_cross_entropy_with_logits(z * temperature, labels) if labelled else 0.0)
    total.backward()
    return float(value), {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(("size", "steps"), [(4, 1), (1, 4), (3, 2)])
def test_each_label_has_its_own_divergence(labelled: bool, size: int, steps: int, tmp_path: Path) -> None:
    value, gradients = expected(3.0, labelled=labelled)
    made, found = trained(tmp_path, model(1, layers=2), KD(temperature=3.0), labelled=labelled, size=size, steps=steps)
    assert toys.logged(made, "distill_loss") == pytest.approx([value], rel=1e-4)
    assert found.keys() == gradients.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-5, atol=1e-8, msg=name)
    assert made.model.config.compression["task"] == "text-classification"


@pytest.mark.parametrize("method", [["kd", "features"], "gkd", "taid", None])
def test_methods_on_each_position_and_on_states_train_it(method: Any, tmp_path: Path) -> None:
    made, gradients = trained(tmp_path, model(1, layers=2), method, eval_strategy="steps", eval_steps=1)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert toys.logged(made, "eval_distill_loss")[0] > 0


@pytest.mark.parametrize("kind", ["cache", "ensemble"])
def test_other_teachers_teach_it_too(kind: str, tmp_path: Path) -> None:
    teacher: Any = CacheTeacher(tmp_path / "c", model(1, layers=2), dtype="float32")
    if kind == "ensemble":
        teacher = EnsembleTeacher([model(1, layers=2), model(1, layers=2)], mean="logits")
    _, found = trained(tmp_path / "a", teacher)
    _, gradients = trained(tmp_path / "b", model(1, layers=2))
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_method_on_one_distribution_a_row_is_refused(tmp_path: Path) -> None:
    class Whole(toys.Toy):
        def forward(self, signals: Any, step: Any) -> Tensor:
            return signals.student["logits"].sum(-1)

    with pytest.raises(MismatchError, match="toy compares one distribution over classes a row"):
        trained(tmp_path, model(1, layers=2), Whole())


def test_two_outcomes_are_the_label_s_probabilities() -> None:
    logits = torch.tensor([[0.3, -2.0]])
    torch.testing.assert_close(two_outcomes(logits).softmax(-1)[..., 1], logits.sigmoid())
    where = positions("labels", {"x": torch.zeros(2, 1), "labels": torch.tensor([[1.0, 0.0], [0.0, 1.0]])}).of_labels(2)
    assert where.index.tolist() == [0, 1, 2, 3]
    assert where.example.tolist() == [0, 0, 1, 1]
    assert where.labels is not None
    assert where.labels.tolist() == [1, 0, 0, 1]
    inputs = {"x": torch.zeros(1, 1), "labels": torch.tensor([[1.0, 0.0]])}
    entropy = F.binary_cross_entropy_with_logits(logits, inputs["labels"])
    torch.testing.assert_close(row_cross_entropy("labels", logits, inputs), entropy[None])
