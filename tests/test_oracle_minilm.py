"""MiniLM against bloomberg/minilmv2.bb: through the function, and end to end on two BERTs through the callback."""

from __future__ import annotations

from pathlib import Path

import oracle
import pytest
import torch
from datasets import Dataset
from hf_compress_plugins.encoders.minilm import MiniLM, minilm_relation
from stub import GradientKeeper, arguments
from torch import Tensor
from transformers import BertConfig, BertModel, Trainer

from hf_compress import DistillCallback

CASES = ("v2_ar6", "v2_ar3_weights", "v2_ar1", "v1_like_heads4", "v2_ar6_batch1")
CLOSE = {"rtol": 1e-6, "atol": 1e-9}


@pytest.mark.parametrize("case", CASES)
def test_relations_value_and_gradient(case: str) -> None:
    data = oracle.load("minilm")
    given = oracle.metadata("minilm")[case.removesuffix("_batch1")]
    rows = 1 if case.endswith("batch1") else 3
    weights: dict[str, float] = given["relations(teacher/student pair->weight)"]
    student = {letter: data[f"student_{letter}"][:rows].clone().requires_grad_() for letter in "qkv"}
    teacher = {letter: data[f"teacher_{letter}"][:rows] for letter in "qkv"}
    tokens = data["attention_mask"][:rows].bool()

    values = {
        pair: minilm_relation(
            (student[pair[0]], student[pair[1]]),
            (teacher[pair[0]], teacher[pair[1]]),
            tokens,
            heads=given["num_relation_heads"],
        ).mean()
        for pair in weights
    }
    loss = torch.stack([weight * values[pair] for pair, weight in weights.items()]).sum()
    loss.backward()

    torch.testing.assert_close(loss.detach(), data[f"{case}.loss"], **CLOSE)
    for pair, value in values.items():
        if f"{case}.kl_{pair}" in data:
            torch.testing.assert_close(value.detach(), data[f"{case}.kl_{pair}"], **CLOSE)
    for letter, tensor in student.items():
        gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        torch.testing.assert_close(gradient, data[f"{case}.grad_student_{letter}"], **CLOSE)


def bert(data: dict[str, Tensor], side: str) -> BertModel:
    given = oracle.metadata("minilm")["bert"]
    config = BertConfig(
        vocab_size=given["vocab_size"],
        hidden_size=given[side]["hidden"],
        num_hidden_layers=given[side]["layers"],
        num_attention_heads=given[side]["heads"],
        intermediate_size=given[side]["intermediate"],
        max_position_embeddings=given["max_position_embeddings"],
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertModel(config, add_pooling_layer=False)
    prefix = f"bert.{side}."
    model.load_state_dict({k.removeprefix(prefix): v for k, v in data.items() if k.startswith(prefix)})
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_two_berts_through_the_callback(attention: str, tmp_path: Path) -> None:
    """Three sentences of 7, 5 and 1 tokens; the user's attention backend stays and the tap gives the same numbers."""
    data = oracle.load("minilm")
    student, teacher = bert(data, "student"), bert(data, "teacher")
    for model in (student, teacher):
        model.set_attn_implementation(attention)
    rows = [
        {"input_ids": data["bert.input_ids"][i].tolist(), "attention_mask": data["attention_mask"][i].tolist()}
        for i in range(3)
    ]
    method = MiniLM(relation_heads=6, weights=(1 / 3, 1 / 3, 1 / 3), teacher_layer=1)
    kept = GradientKeeper()
    trainer = Trainer(
        model=student,
        args=arguments(tmp_path, per_device_train_batch_size=3),
        train_dataset=Dataset.from_list(rows),
        data_collator=lambda batch: {name: torch.tensor([row[name] for row in batch]) for name in batch[0]},
        callbacks=[DistillCallback(teacher, method), kept],
    )
    trainer.train()

    assert student.config._attn_implementation == attention
    assert trainer.state.log_history[0]["distill_loss"] == pytest.approx(data["bert.loss"].item(), rel=1e-3)
    for layer in (0, 1):
        torch.testing.assert_close(
            kept.gradients[0][f"encoder.layer.{layer}.attention.self.query.weight"],
            data[f"bert.grad_student_l{layer}_query_weight"],
            rtol=1e-3,
            atol=1e-6,
        )
