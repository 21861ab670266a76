"""Exposure of a canary."""

from __future__ import annotations

import math

import pytest
import torch
from hf_compress_evaluation.exposure import candidate_log_likelihoods, exposure
from transformers import LlamaConfig, LlamaForCausalLM

from hf_compress.errors import MismatchError, NumericalError


def test_by_hand() -> None:
    """Of eight candidates the best stands out by 3 bits, the second by 2, the last not at all."""
    values = [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0, -8.0]
    assert [exposure(values, place) for place in (0, 1, 3, 7)] == [3.0, 2.0, 1.0, 0.0]
    assert exposure([0.0] * 8, 5) == 3.0  # equal ones are not better
    assert exposure([-math.inf, 0.0], 0) == 0.0


def test_who_knows_nothing_has_1_44_bits_on_average() -> None:
    count = 10_000
    mean = sum(exposure(range(count), place) for place in range(0, count, 100)) / 100
    assert mean == pytest.approx(1 / math.log(2), abs=0.1)


def test_wrong_likelihoods_are_refused() -> None:
    with pytest.raises(MismatchError, match="candidate 2"):
        exposure([0.0, 1.0], 2)
    with pytest.raises(NumericalError, match="NaN"):
        exposure([0.0, math.nan], 0)


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=12, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def test_likelihoods_are_those_of_the_whole_secret() -> None:
    """Token by token from the model, whatever the batch and the length of the others."""
    made, prefix, candidates = model(), [3, 4, 5], [[6, 7], [8, 9, 10], [1], [2, 2, 2]]
    expected = []
    for one in candidates:
        seen, total = list(prefix), 0.0
        for token in one:
            with torch.no_grad():
                total += made(torch.tensor([seen])).logits[0, -1].double().log_softmax(-1)[token].item()
            seen.append(token)
        expected.append(total)
    for batch in (1, 3, 100):
        assert candidate_log_likelihoods(made, prefix, candidates, batch=batch) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(MismatchError, match="prefix"):
        candidate_log_likelihoods(made, [], candidates)
    with pytest.raises(MismatchError, match="shortest of 0"):
        candidate_log_likelihoods(made, prefix, [[1], []])
