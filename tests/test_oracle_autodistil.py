"""AutoDistil's sliced attention, relations, gradients and spaces against the authors' code."""

from __future__ import annotations

import itertools
from typing import Any

import oracle
import pytest
import torch
from hf_compress_plugins.encoders import _modeling_autodistil as modeling
from hf_compress_plugins.encoders._super_network import Architecture, student_weights
from hf_compress_plugins.encoders.autodistil import (
    BERT_BASE,
    architectures,
    published_cost,
    relation_distance,
    relation_scores,
    subspace,
)
from torch import Tensor
from transformers import BertConfig, BertModel

CLOSE: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-5}
CASES = {"full": (12, 48), "w0.75_h0.5": (9, 24), "w7of12_h1": (7, 48)}
LETTERS = {"query": "QQ", "key": "KK", "value": "VV"}


def model(data: dict[str, Tensor], who: str) -> Any:
    """One layer with their projections; all else of the model is not in their file and not used."""
    made = BertModel(
        BertConfig(
            vocab_size=3, hidden_size=48, num_attention_heads=12, num_hidden_layers=1, intermediate_size=4,
            attention_probs_dropout_prob=0.0, attn_implementation="eager",
        )
    )  # fmt: skip
    own = made.encoder.layer[0].attention.self
    for name in LETTERS:
        layer = own.get_submodule(name)
        layer.load_state_dict({part: data[f"{who}.{name}.{part}"] for part in ("weight", "bias")})
    return made


def vectors(attention: Any, hidden: Tensor) -> dict[str, Tensor]:
    return {name: attention.get_submodule(name)(hidden) for name in LETTERS}


def added(data: dict[str, Tensor]) -> Tensor:
    return (1.0 - data["attention_mask"][:, None, None, :].float()) * -10000.0


def test_the_teacher_s_relations() -> None:
    data = oracle.load("autodistil")
    found = vectors(model(data, "teacher").encoder.layer[0].attention.self, data["hidden_teacher"])
    for name, relation in LETTERS.items():
        scores = relation_scores(found[name], heads=12) + added(data)
        torch.testing.assert_close(scores.detach(), data[f"teacher.{relation}"], **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_a_sliced_student(case: str) -> None:
    data = oracle.load("autodistil")
    heads, width = CASES[case]
    whole = model(data, "student")
    config = modeling.AutoDistilBertConfig(head_size=4, **whole.config.to_dict() | sizes(heads, width)._asdict())
    config._attn_implementation = "eager"
    small: Any = modeling.AutoDistilBertModel(config).train()
    prefix = "encoder.layer.0.attention.self."
    weights = {
        name.removeprefix(prefix): value
        for name, value in student_weights(whole, small).items()
        if name.startswith(prefix)
    }
    hidden = data[f"{case}.hidden_student"].clone().requires_grad_()
    attention = small.encoder.layer[0].attention.self
    own = {
        name: torch.nn.functional.linear(hidden, weights[f"{name}.weight"], weights[f"{name}.bias"]) for name in LETTERS
    }
    theirs = vectors(model(data, "teacher").encoder.layer[0].attention.self, data["hidden_teacher"])
    real = data["attention_mask"].bool()
    losses = []
    for name, relation in LETTERS.items():
        scores = relation_scores(own[name], heads=12) + added(data)
        torch.testing.assert_close(scores.detach(), data[f"{case}.{relation}"], **CLOSE)
        losses.append(relation_distance(own[name], theirs[name], real, heads=12, softmax=False, masking="added"))
    context = torch.func.functional_call(attention, weights, (hidden.detach(), added(data)))[0]
    torch.testing.assert_close(context.detach(), data[f"{case}.context"], **CLOSE)
    loss = torch.stack(losses).sum(0).mean()
    torch.testing.assert_close(loss.detach(), data[f"{case}.loss"], **CLOSE)
    loss.backward()
    query: Tensor = whole.encoder.layer[0].attention.self.query.weight
    assert hidden.grad is not None
    assert query.grad is not None
    torch.testing.assert_close(hidden.grad, data[f"{case}.grad_hidden_student"], **CLOSE)
    torch.testing.assert_close(query.grad, data[f"{case}.grad_query_weight"], **CLOSE)
    assert not query.grad[4 * heads :].any()
    assert not query.grad[:, width:].any()


def sizes(heads: int, width: int) -> Architecture:
    return Architecture(1, heads, width, 4)


@pytest.mark.parametrize("name", ["base", "small", "tiny"])
def test_the_published_spaces_in_order_of_their_formula(name: str) -> None:
    data, settings = oracle.load("autodistil"), subspace(name)
    every = sorted(itertools.product(*settings.values()), key=lambda sizes: published_cost(*sizes))
    shares = torch.tensor([[n / 12, h / BERT_BASE, d / 768, r] for n, h, d, r in every], dtype=torch.float64)
    torch.testing.assert_close(shares, data[f"space.{name}.archs_sorted"], rtol=1e-9, atol=1e-9)
    costs = torch.tensor([published_cost(*sizes) for sizes in every], dtype=torch.float64)
    torch.testing.assert_close(costs, data[f"space.{name}.params_sorted"], rtol=1e-9, atol=0.5)
    assert architectures(**settings) == [Architecture(n, h, d, int(d * r)) for n, h, d, r in every]
