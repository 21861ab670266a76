"""Distillation into an encoder-decoder against the authors' code."""

from __future__ import annotations

import oracle
import pytest
import torch
from hf_compress_plugins.encoders.encoder_decoder import encoder_decoder, of_answers, teacher_inputs
from transformers import T5Config, T5ForConditionalGeneration

from hf_compress.objective import IGNORED
from hf_compress.outputs import decoder_inputs

CLOSE = {"rtol": 1e-6, "atol": 1e-9}


@pytest.mark.parametrize("case", ["b2", "b1", "same_vocab"])
def test_value_and_gradient_of_the_mean_over_all_positions(case: str) -> None:
    """E = 4 and D = 3: the teacher's positions 3 … 5 of 7, and as many of its columns as the student has."""
    data = oracle.load("return_of_the_encoder")
    own = data["same_vocab.student_logits"] if case == "same_vocab" else data["student_logits"]
    rows = 2 if case == "b2" else 1
    student = own[:rows].clone().requires_grad_()
    theirs = of_answers(
        data["teacher_logits"][:rows], oracle.metadata("return_of_the_encoder")["hyper"]["decoder_seq_len"]
    )

    loss = encoder_decoder(student.flatten(0, 1), theirs.flatten(0, 1)).mean()
    loss.backward()

    torch.testing.assert_close(loss.detach(), data[f"{case}.loss"], **CLOSE)
    torch.testing.assert_close(student.grad, data[f"{case}.grad_student_logits"], **CLOSE)


def test_the_two_layouts_of_one_example() -> None:
    data = oracle.load("return_of_the_encoder")
    hyper = oracle.metadata("return_of_the_encoder")["hyper"]["align"]
    source, answer = data["align.source_ids"], data["align.generated_ids"]
    width, length = hyper["encoder_seq_len"], hyper["decoder_seq_len"]
    ids = torch.full((1, width), hyper["pad"])
    ids[0, : len(source)] = source
    labels = torch.full((1, length), IGNORED)
    labels[0, : len(answer)] = answer

    read = teacher_inputs(ids, (torch.arange(width) < len(source)).long()[None], labels, pad=hyper["pad"])

    assert torch.equal(read["input_ids"][0], data["align.teacher_input_ids"])
    assert torch.equal(read["attention_mask"][0], data["align.teacher_attention_mask"])
    config = T5Config(
        vocab_size=32, d_model=8, d_ff=8, num_layers=1, pad_token_id=hyper["pad"], decoder_start_token_id=hyper["bos"]
    )
    decoded = decoder_inputs(T5ForConditionalGeneration(config), labels)
    assert torch.equal(decoded[0], data["align.student_decoder_input_ids"])
