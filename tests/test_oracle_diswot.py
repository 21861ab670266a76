"""DisWOT's distances against the authors' code."""

from __future__ import annotations

import oracle
import pytest
import torch
from hf_compress_plugins.encoders.diswot import channels, classifier_gradient, relation, semantics

EXACT = {"rtol": 1e-6, "atol": 1e-9}


@pytest.mark.parametrize(("name", "function"), [("relation", relation), ("ickd", channels)])
def test_distances_of_features(name: str, function: object) -> None:
    data = oracle.load("diswot")
    student = data[f"{name}.student_feat"].requires_grad_()

    loss = function(student, data[f"{name}.teacher_feat"])  # type: ignore[operator]  # both are distances
    loss.backward()

    torch.testing.assert_close(loss.detach(), data[f"{name}.loss"], **EXACT)
    torch.testing.assert_close(student.grad, data[f"{name}.grad_student"], **EXACT)


def test_one_example_is_related_to_nothing_else() -> None:
    data = oracle.load("diswot")
    loss = relation(data["relation.student_feat"][:1], data["relation.teacher_feat"][:1])
    torch.testing.assert_close(loss, data["relation_batch1.loss"], **EXACT)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_the_classifier_s_gradient(side: str) -> None:
    data = oracle.load("diswot")
    found = classifier_gradient(data[f"semantic.{side}_pooled"], data[f"semantic.{side}_fc"], data["semantic.labels"])
    torch.testing.assert_close(found, data[f"semantic.{side}_fc_grad"], **EXACT)


def test_the_distance_of_classes() -> None:
    data = oracle.load("diswot")
    pooled, weight, labels = (data[f"semantic.{name}"] for name in ("student_pooled", "student_fc", "labels"))
    gradient = classifier_gradient(pooled, weight, labels).requires_grad_()

    loss = semantics(gradient, data["semantic_eq.teacher_fc_grad"])
    loss.backward()

    torch.testing.assert_close(loss.detach(), data["semantic_eq.loss"], **EXACT)
    torch.testing.assert_close(gradient.grad, data["semantic_eq.grad_student_fc_grad"], **EXACT)
