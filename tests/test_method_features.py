"""Hidden-state matching: distances by hand, layer maps, projections, images, settings."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from hf_compress_plugins.general.features import (
    Distance,
    Features,
    FeaturesConfig,
    LayerMap,
    hidden_distance,
    layer_pairs,
    select_tokens,
)
from scene import logits, signals, sizes, step
from torch import Tensor

from hf_compress.errors import ConfigurationError, MismatchError

TOKENS = torch.tensor([[True, True, True], [True, False, False]])


def states(width: int, seed: int) -> Tensor:
    """(2, 3, width)"""
    return logits(6, width, seed).view(2, 3, width)


def test_mse_by_hand() -> None:
    """(1, 2) against (4, -2): (9 + 16) / 2."""
    found = hidden_distance(torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, -2.0]]), distance="mse")

    assert found.tolist() == [12.5]


def test_cosine_by_hand() -> None:
    """The same direction, at right angles, opposed: 0, 1, 2, whatever the lengths."""
    student = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0]])
    teacher = torch.tensor([[5.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])

    assert hidden_distance(student, teacher, distance="cosine").tolist() == pytest.approx([0.0, 1.0, 2.0])


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_the_teacher_gets_no_gradient_and_gradcheck_passes(distance: Distance) -> None:
    student, teacher = logits(3, 4, 0).requires_grad_(), logits(3, 4, 1).requires_grad_()

    hidden_distance(student, teacher, distance=distance).sum().backward()

    assert teacher.grad is None
    assert torch.autograd.gradcheck(lambda s: hidden_distance(s, teacher.detach(), distance=distance), student)


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_half_precision_states_of_300_stay_finite(distance: Distance) -> None:
    student = torch.full((2, 8), 300.0, dtype=torch.float16, requires_grad=True)
    teacher = torch.full((2, 8), -300.0, dtype=torch.float16)

    found = hidden_distance(student, teacher, distance=distance)
    found.sum().backward()

    assert found.tolist() == pytest.approx([360_000.0 if distance == "mse" else 2.0] * 2)
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_a_state_of_zeros_has_a_finite_cosine_and_gradient() -> None:
    student = torch.zeros(1, 4, requires_grad=True)

    hidden_distance(student, torch.ones(1, 4), distance="cosine").sum().backward()

    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize(("student", "teacher"), [((3, 1), (3, 11)), ((1, 4), (3, 4))])
def test_unequal_shapes_raise_instead_of_broadcasting(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    with pytest.raises(MismatchError, match=r"features: student .* must have one shape"):
        hidden_distance(torch.zeros(student), torch.zeros(teacher), distance="mse")


@pytest.mark.parametrize("shape", [(2, 4, 8), (2, 8), (1, 3, 8), (2, 3, 4, 8)])
def test_states_that_do_not_fit_the_tokens_raise(shape: tuple[int, ...]) -> None:
    with pytest.raises(MismatchError, match="features: hidden states of shape"):
        select_tokens(torch.zeros(shape), TOKENS)


@pytest.mark.parametrize(
    ("layers", "student", "teacher", "expected"),
    [
        ("uniform", 3, 6, ((1, 2), (2, 4), (3, 6))),
        ("uniform", 3, 12, ((1, 4), (2, 8), (3, 12))),
        ("uniform", 4, 2, ((1, 1), (2, 1), (3, 2), (4, 2))),
        ("uniform", 2, 3, ((1, 2), (2, 3))),
        ("last", 2, 6, ((1, 5), (2, 6))),
        ("first", 2, 6, ((1, 1), (2, 2))),
        ("last", 3, 3, ((1, 1), (2, 2), (3, 3))),
        ({2: 5}, 2, 6, ((2, 5),)),
        ({-1: -1, 1: 2}, 3, 6, ((1, 2), (3, 6))),
        ({-3: -6}, 3, 6, ((1, 1),)),
    ],
)
def test_layer_maps(layers: LayerMap, student: int, teacher: int, expected: tuple[tuple[int, int], ...]) -> None:
    assert layer_pairs(layers, student, teacher) == expected


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({4: 1}, r"features: pairs \[\(4, 1\)\] name blocks beyond the student's 3 or the teacher's 6"),
        ({1: 7}, r"pairs \[\(1, 7\)\]"),
        ({0: 1}, r"pairs \[\(0, 1\)\]"),
        ({1: 0}, r"pairs \[\(1, 0\)\]"),
        ({-4: 1}, r"pairs \[\(-4, 1\)\]"),
        ({3: 1, -1: 2}, "names a block of the student twice"),
    ],
)
def test_maps_that_name_no_block_raise(layers: dict[int, int], message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        layer_pairs(layers, 3, 6)


@pytest.mark.parametrize("layers", ["last", "first"])
def test_a_shallower_teacher_is_refused_for_last_and_first(layers: LayerMap) -> None:
    with pytest.raises(
        MismatchError, match=f"features: layers='{layers}' needs a teacher with at least 4 blocks, got 2"
    ):
        layer_pairs(layers, 4, 2)


def built(student: dict[str, Tensor], teacher: dict[str, Tensor], layers: tuple[int, int], **settings: Any) -> Features:
    objective = Features(**settings)
    needs = objective.needs(sizes(layers[0]), sizes(layers[1]))
    assert (needs.student, needs.teacher) == (set(student), set(teacher))
    assert needs.mean_over == "tokens"
    objective.build({k: v.shape for k, v in student.items()}, {k: v.shape for k, v in teacher.items()})
    return objective


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_the_value_of_a_token_is_the_mean_over_the_pairs(distance: Distance) -> None:
    student = {"hidden:1": states(4, 0), "hidden:2": states(4, 1)}
    teacher = {"hidden:2": states(4, 2), "hidden:4": states(4, 3)}
    objective = built(student, teacher, (2, 4), distance=distance)

    found = objective(signals(student, teacher, TOKENS), step())

    one = hidden_distance(student["hidden:1"][TOKENS], teacher["hidden:2"][TOKENS], distance=distance)
    two = hidden_distance(student["hidden:2"][TOKENS], teacher["hidden:4"][TOKENS], distance=distance)
    torch.testing.assert_close(found, (one + two) / 2)
    assert found.shape == (4,)
    assert not list(objective.parameters())


def test_nan_in_padding_changes_neither_value_nor_gradient() -> None:
    student, teacher = {"hidden:1": states(4, 0)}, {"hidden:1": states(4, 1)}
    objective, found = built(student, teacher, (1, 1)), []
    for fill in (0.0, math.nan):
        given = {k: v.masked_fill(~TOKENS[..., None], fill).requires_grad_() for k, v in student.items()}
        seen = {k: v.masked_fill(~TOKENS[..., None], fill) for k, v in teacher.items()}
        value = objective(signals(given, seen, TOKENS), step())
        value.sum().backward()
        found.append((value.detach(), given["hidden:1"].grad))

    torch.testing.assert_close(found[1], found[0])


def test_a_projection_is_made_where_widths_differ_and_there_alone() -> None:
    student = {"hidden:1": states(4, 0), "hidden:2": states(4, 1)}
    teacher = {"hidden:1": states(4, 2), "hidden:2": states(6, 3)}
    objective = built(student, teacher, (2, 2), distance="mse").double()

    found = objective(signals(student, teacher, TOKENS), step())
    found.sum().backward()

    (name, weight), *others = objective.named_parameters()
    assert (name, tuple(weight.shape), others) == ("project.2.weight", (6, 4), [])
    assert weight.grad is not None
    assert weight.grad.abs().max() > 0
    projected = hidden_distance(student["hidden:2"] @ weight.T, teacher["hidden:2"], distance="mse")[TOKENS]
    plain = hidden_distance(student["hidden:1"], teacher["hidden:1"], distance="mse")[TOKENS]
    torch.testing.assert_close(found, (projected + plain) / 2)


def test_half_precision_states_go_through_a_single_precision_projection() -> None:
    student, teacher = {"hidden:1": states(4, 0).half()}, {"hidden:1": states(6, 1).half()}

    found = built(student, teacher, (1, 1))(signals(student, teacher, TOKENS), step())

    assert found.dtype == torch.float32


@pytest.mark.parametrize("images", [0, 2])
def test_images_have_no_tokens_and_weigh_one_each(images: int) -> None:
    """Tokens (batch, 1) and no mask: the mean over an image's patches."""
    student, teacher = {"hidden:1": states(4, 0)[:images]}, {"hidden:1": states(4, 1)[:images]}
    objective = built(student, teacher, (1, 1), distance="mse")

    found = objective(signals(student, teacher, torch.ones(images, 1, dtype=torch.bool), masked=False), step())

    expected = (student["hidden:1"] - teacher["hidden:1"]).square().mean(-1).mean(-1)
    torch.testing.assert_close(found, expected)
    assert found.shape == (images,)


def test_images_in_another_number_of_patches_are_refused() -> None:
    student, teacher = {"hidden:1": states(4, 0)}, {"hidden:1": states(4, 1)[:, :2]}

    with pytest.raises(MismatchError, match="Both models must see the same tokens"):
        built(student, teacher, (1, 1))(
            signals(student, teacher, torch.ones(2, 1, dtype=torch.bool), masked=False), step()
        )


@pytest.mark.parametrize("pair", [(0, 4), (4, 0)])
def test_a_model_without_blocks_is_refused(pair: tuple[int, int]) -> None:
    with pytest.raises(MismatchError, match="features: both models must have hidden states"):
        Features().needs(sizes(pair[0]), sizes(pair[1]))


def test_without_a_teacher_it_is_refused() -> None:
    with pytest.raises(MismatchError, match="features"):
        Features().needs(sizes(2), None)


def test_a_layer_map_survives_json() -> None:
    """JSON turns the keys into text."""
    config = FeaturesConfig(layers={1: -1, -1: 2})

    loaded = json.loads(json.dumps(dataclasses.asdict(config)))

    assert FeaturesConfig(**loaded) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": "middle"}, "layers must be 'uniform', 'last', 'first' or a mapping, got 'middle'"),
        ({"layers": {}}, "the layer map is empty"),
        ({"layers": 3}, "layers must be a name or a mapping, got 3"),
        ({"layers": [1, 2]}, r"layers must be a name or a mapping, got \[1, 2\]"),
        ({"layers": {1: 1.5}}, "numbers of blocks alone"),
        ({"layers": {"one": 1}}, "numbers of blocks alone"),
        ({"layers": {1: 2, "1": 3}}, "a block of the student appears twice"),
        ({"distance": "l1"}, "distance must be 'mse' or 'cosine', got 'l1'"),
    ],
)
def test_settings_that_cannot_be_served_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^features: .*{message}"):
        Features(**settings)
