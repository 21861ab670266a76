"""ssToken's choice and loss against the authors' code."""

from __future__ import annotations

import oracle
import pytest
import torch
from hf_compress_plugins.language.sstoken import keep, scores, to_prompt, token_losses
from torch import Tensor

CHOICES = ["prop0.3_ratio0.0", "prop0.3_ratio0.5", "prop0.3_ratio1.0", "prop0.6_ratio0.0", "prop0.6_ratio0.5"]
CHOICES += ["prop0.6_ratio1.0", "prop1.0_ratio0.0", "prop1.0_ratio0.5", "prop1.0_ratio1.0"]


def chosen(labels: Tensor, *, rho: float, gamma: float) -> Tensor:
    """The authors' new labels: what is not kept is -100. A token is predicted by the logits before it."""
    data = oracle.load("sstoken")
    answer = labels != -100
    current = torch.zeros(len(labels))
    current[1:] = token_losses(data["logits"][:-1], labels[1:])
    attending = to_prompt(data["attn_mean_heads"], ~answer)
    excess = (data["history_token_losses"] - current)[answer]
    example = torch.zeros(int(answer.sum()), dtype=torch.long)
    kept = keep(scores(excess, attending[answer], example, gamma=gamma), example, rho=rho)
    return labels.masked_scatter(answer, torch.where(kept, labels[answer], -100))


@pytest.mark.parametrize("case", CHOICES)
def test_which_tokens_are_kept(case: str) -> None:
    data = oracle.load("sstoken")
    rho, gamma = (float(part.lstrip("abcdefghijklmnopqrstuvwxyz")) for part in case.split("_"))
    assert torch.equal(chosen(data["labels"], rho=rho, gamma=gamma), data[f"{case}/new_labels"])


def test_without_a_history_attention_alone_decides() -> None:
    data = oracle.load("sstoken")
    assert torch.equal(chosen(data["labels"], rho=0.6, gamma=0.0), data["no_history_prop0.6/new_labels"])


def test_an_answer_of_one_token_is_kept() -> None:
    data = oracle.load("sstoken")
    assert torch.equal(chosen(data["one_response/labels"], rho=0.6, gamma=0.5), data["one_response/new_labels"])
    assert (data["one_response/labels"] != -100).sum() == 1


def test_the_mean_over_what_is_kept() -> None:
    data = oracle.load("sstoken")
    labels = chosen(data["labels"], rho=0.6, gamma=0.5)
    logits = data["logits"].clone().requires_grad_()
    kept = labels[1:] != -100
    loss = token_losses(logits[:-1][kept], labels[1:][kept]).sum() / kept.sum()
    loss.backward()

    torch.testing.assert_close(loss.detach(), data["prop0.6_ratio0.5/loss"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logits.grad, data["prop0.6_ratio0.5/grad"], rtol=1e-4, atol=1e-6)
