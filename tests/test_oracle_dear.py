"""DeAR against the authors' code: losses of the first stage, parser and windows of the second."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import oracle
import pytest
import torch
from hf_compress_plugins.encoders.dear import dear, parse_order, slide

EXACT = {"rtol": 1e-6, "atol": 1e-9}
STORED = [name.removesuffix(".loss") for name in oracle.outputs("dear") if name.endswith(".loss")]
SLIDES = [name.removesuffix(".final_ids") for name in oracle.outputs("dear") if name.endswith(".final_ids")]


@pytest.mark.parametrize("name", STORED)
def test_the_first_stage(name: str) -> None:
    data = oracle.load("dear")
    case, loss_type, settings = name.split(".", 2)
    student, teacher = data[f"{case}.student"].requires_grad_(), data[f"{case}.teacher"]
    found = re.fullmatch(r"T([\d.]+)_a([\d.]+)", settings)
    temperature, alpha = map(float, found.groups()) if found else (2.0, 0.1)

    values = dear(student, teacher if found else None, loss=loss_type, alpha=alpha, temperature=temperature)
    values.mean().backward()

    torch.testing.assert_close(values.mean().detach(), data[f"{name}.loss"], **EXACT)
    torch.testing.assert_close(student.grad, data[f"{name}.grad_student"], **EXACT)


@pytest.mark.parametrize("place", range(6))
def test_the_parser(place: int) -> None:
    about = oracle.metadata("dear")
    inputs = about["parse_inputs"] if isinstance(about["parse_inputs"], list) else json.loads(about["parse_inputs"])
    assert parse_order(inputs[place], int(about["parse_n"])) == oracle.load("dear")[f"parse.{place}"].tolist()


@pytest.mark.parametrize("name", SLIDES)
def test_sliding_windows(name: str) -> None:
    """With the authors' windows, which leave out what lies before the first passage."""
    data = oracle.load("dear")
    relevance = data[f"{name}.relevance"].tolist()
    _, window, stride = map(int, re.findall(r"\d+", name))

    def perfect(part: Sequence[int]) -> list[int]:
        return sorted(range(len(part)), key=lambda place: -relevance[part[place]])

    found = slide(range(len(relevance)), perfect, window=window, stride=stride, released=True)
    assert found == data[f"{name}.final_ids"].tolist()
    whole = slide(range(len(relevance)), perfect, window=window, stride=stride)
    best = sorted(range(len(relevance)), key=lambda place: -relevance[place])[:stride]
    assert whole[:stride] == best
    assert (whole == found) == (name.split(".")[1].split("_")[0] in ("n25", "n30"))
