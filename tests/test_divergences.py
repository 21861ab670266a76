"""Divergences by hand, by their properties, and where float types and exclusions would break them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_compress.divergences import (
    check_temperature,
    cross_entropy,
    jsd,
    kl,
    log_mixture,
    log_probabilities,
    skew_kl,
    softened_kl,
    tvd,
)
from hf_compress.errors import ConfigurationError, MismatchError

Divergence = Callable[[Tensor, Tensor], Tensor]
DIVERGENCES: dict[str, Divergence] = {
    "kl": kl,
    "softened_kl": lambda p, q: softened_kl("test", q, p, temperature=1.0),
    "reverse_kl": lambda p, q: kl(q, p),
    "jsd_0": lambda p, q: jsd(p, q, 0),
    "jsd_0.1": lambda p, q: jsd(p, q, 0.1),
    "jsd_0.5": lambda p, q: jsd(p, q, 0.5),
    "jsd_1": lambda p, q: jsd(p, q, 1),
    "tvd": tvd,
    "skew_kl": lambda p, q: skew_kl(p, q, 0.1),
    "skew_rkl": lambda p, q: skew_kl(q, p, 0.1),
}
MIXED = ("jsd_0.1", "jsd_0.5", "tvd", "skew_kl", "skew_rkl")
"""Finite whatever the supports."""
every = pytest.mark.parametrize("name", DIVERGENCES)

P, Q = (0.5, 0.25, 0.25), (0.25, 0.5, 0.25)


def logs(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def logits(rows: int, vocab: int, seed: int) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value(name: str, student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    return DIVERGENCES[name](*log_probabilities("test", student, teacher, temperature))


def ln(x: float) -> float:
    return math.log(x)


BY_HAND = {
    "kl": 0.25 * ln(2),  # ½ ln 2 - ¼ ln 2
    "softened_kl": 0.25 * ln(2),
    "reverse_kl": 0.25 * ln(2),
    "jsd_0": 0.25 * ln(2),
    "jsd_1": 0.25 * ln(2),
    # m = (3/8, 3/8, 1/4): both halves are ½ ln 4/3 + ¼ ln 2/3
    "jsd_0.5": 0.5 * ln(4 / 3) + 0.25 * ln(2 / 3),
    # m = (0.275, 0.475, 0.25)
    "jsd_0.1": 0.1 * (0.5 * ln(0.5 / 0.275) + 0.25 * ln(0.25 / 0.475))
    + 0.9 * (0.25 * ln(0.25 / 0.275) + 0.5 * ln(0.5 / 0.475)),
    "tvd": 0.25,
    "skew_kl": 0.5 * ln(0.5 / 0.275) + 0.25 * ln(0.25 / 0.475),
    # of q towards (0.475, 0.275... mirrored): the same by symmetry of P and Q
    "skew_rkl": 0.5 * ln(0.5 / 0.275) + 0.25 * ln(0.25 / 0.475),
}


@every
def test_three_classes_by_hand(name: str) -> None:
    found = DIVERGENCES[name](logs(*P), logs(*Q))

    assert found.shape == (1,)
    assert found.item() == pytest.approx(BY_HAND[name], rel=1e-12)


def test_the_direction_of_kl() -> None:
    """p = (¾, ¼), q = (½, ½): KL(p ‖ q) = ¾ ln 3/2 + ¼ ln ½; the reverse is ½ ln 2/3 + ½ ln 2."""
    p, q = logs(0.75, 0.25), logs(0.5, 0.5)

    assert kl(p, q).item() == pytest.approx(0.75 * ln(1.5) + 0.25 * ln(0.5))
    assert kl(q, p).item() == pytest.approx(0.5 * ln(2 / 3) + 0.5 * ln(2))
    assert jsd(p, q, 0).item() == pytest.approx(kl(p, q).item())
    assert jsd(p, q, 1).item() == pytest.approx(kl(q, p).item())


def test_jsd_at_its_ends_is_not_the_limit() -> None:
    p, q = logs(0.75, 0.25), logs(0.5, 0.5)

    assert jsd(p, q, 1e-6).item() < 1e-6 < jsd(p, q, 0).item()
    assert jsd(p, q, 1 - 1e-6).item() < 1e-6 < jsd(p, q, 1).item()


def test_cross_entropy_is_kl_plus_the_entropy_of_p() -> None:
    """p = (¾, ¼), q = (½, ½): ln 2, whatever p."""
    p, q = logs(0.75, 0.25), logs(0.5, 0.5)

    assert cross_entropy(p, q).item() == pytest.approx(ln(2))
    torch.testing.assert_close(cross_entropy(p, q), kl(p, q) + cross_entropy(p, p))


def test_the_mixture_weighs_its_first_argument() -> None:
    """0.1 · 0.75 + 0.9 · 0.5 = 0.525."""
    mixed = log_mixture(logs(0.75, 0.25), logs(0.5, 0.5), 0.1)

    torch.testing.assert_close(mixed, logs(0.525, 0.475))


def test_tvd_of_disjoint_distributions_is_one() -> None:
    assert tvd(logs(1.0, 0.0), logs(0.0, 1.0)).item() == 1.0


rows_of_logits = st.lists(st.lists(st.floats(-20, 20, width=32), min_size=4, max_size=4), min_size=2, max_size=2).map(
    lambda rows: torch.tensor(rows, dtype=torch.float64)
)


@every
@settings(max_examples=15, deadline=None)
@given(student=rows_of_logits, teacher=rows_of_logits, shift=st.floats(-50, 50), data=st.data())
def test_properties(name: str, student: Tensor, teacher: Tensor, shift: float, data: st.DataObject) -> None:
    """At least 0; 0 for equal logits; blind to a shift of all logits and to the order of the vocabulary; row by row."""
    order = torch.tensor(data.draw(st.permutations(range(4))))
    found, close = value(name, student, teacher), {"rtol": 1e-9, "atol": 1e-12}

    assert (found >= -1e-12).all()
    torch.testing.assert_close(value(name, student, student), torch.zeros(2, dtype=torch.float64), **close)
    torch.testing.assert_close(value(name, student + shift, teacher - 2 * shift), found, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(value(name, student[:, order], teacher[:, order]), found, **close)
    torch.testing.assert_close(value(name, student[:1], teacher[:1]), found[:1], **close)
    if name == "tvd":
        assert (found <= 1 + 1e-12).all()


@every
def test_the_gradient_of_a_row_stays_in_it(name: str) -> None:
    student = logits(3, 5, 0).requires_grad_()

    value(name, student, logits(3, 5, 1))[1].backward()

    assert student.grad is not None
    assert student.grad[1].abs().max() > 0
    assert not student.grad[[0, 2]].any()


@every
def test_the_teacher_gets_no_gradient(name: str) -> None:
    student, teacher = logits(2, 5, 0).requires_grad_(), logits(2, 5, 1).requires_grad_()

    value(name, student, teacher).sum().backward()

    assert student.grad is not None
    assert teacher.grad is None


@every
def test_double_precision_passes_gradcheck(name: str) -> None:
    teacher = logits(3, 5, 1)

    assert torch.autograd.gradcheck(lambda s: value(name, s, teacher, 0.7), logits(3, 5, 0).requires_grad_())


@every
def test_a_class_that_both_exclude_is_as_if_it_were_not_there(name: str) -> None:
    student, teacher = logits(3, 5, 0), logits(3, 5, 1)
    student[:, 0] = teacher[:, 0] = -math.inf
    student.requires_grad_()

    found = value(name, student, teacher, 2.0)
    found.sum().backward()

    torch.testing.assert_close(found.detach(), value(name, student.detach()[:, 1:], teacher[:, 1:], 2.0))
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert not student.grad[:, 0].any()


@pytest.mark.parametrize("name", ["kl", "softened_kl", "jsd_0", *MIXED])
def test_a_class_that_the_teacher_alone_excludes_is_finite(name: str) -> None:
    student, teacher = logits(3, 5, 0).requires_grad_(), logits(3, 5, 1)
    teacher[:, 0] = -math.inf

    found = value(name, student, teacher)
    found.sum().backward()

    assert found.isfinite().all()
    assert (found > 0).all()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert (student.grad[:, 0] > 0).all()  # pushed away from what the teacher excludes


@pytest.mark.parametrize("name", ["reverse_kl", "jsd_1", *MIXED])
def test_a_class_that_the_student_alone_excludes_is_finite(name: str) -> None:
    student, teacher = logits(3, 5, 0), logits(3, 5, 1)
    student[:, 0] = -math.inf
    student.requires_grad_()

    found = value(name, student, teacher)
    found.sum().backward()

    assert found.isfinite().all()
    assert (found > 0).all()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_a_plain_kl_is_infinite_where_its_second_argument_excludes_what_the_first_allows() -> None:
    """Never NaN: the run stops and names the term."""
    allows, excludes = logs(0.5, 0.5), logs(1.0, 0.0)

    assert kl(allows, excludes).item() == math.inf
    assert kl(excludes, allows).item() == pytest.approx(ln(2))


def test_cross_entropy_leaves_out_what_the_student_excludes() -> None:
    """p = (½, ¼, ¼), q = (½, ½, 0): ¾ ln 2."""
    student = torch.tensor([[0.0, 0.0, -math.inf]], dtype=torch.float64, requires_grad=True)
    teacher = logs(0.5, 0.25, 0.25)

    found = cross_entropy(*log_probabilities("test", student, teacher))
    found.sum().backward()

    assert found.item() == pytest.approx(0.75 * ln(2))
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_closed_gradient_is_that_of_the_operations(dtype: torch.dtype, temperature: float) -> None:
    teacher, found = logits(4, 7, 1).to(dtype), []
    teacher[0, 0] = -math.inf
    kept = teacher.clone()
    upstream = torch.tensor([1.0, -2.0, 0.0, 0.5])
    for way in ("closed", "by operations"):
        student = logits(4, 7, 0).to(dtype)
        student[:2, 0] = -math.inf
        student.requires_grad_()
        if way == "closed":
            losses = softened_kl("test", student, teacher, temperature=temperature)
        else:
            losses = temperature**2 * kl(*log_probabilities("test", student, teacher, temperature))
        losses[[0, 2, 3]].backward(upstream[[0, 2, 3]].to(losses.dtype))  # row 1 is infinite
        found.append((losses.detach(), student.grad))
    assert torch.isposinf(found[0][0][1])
    assert found[0][1] is not None
    assert found[0][1].dtype == dtype
    torch.testing.assert_close(found[0], found[1], rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=1e-6)
    torch.testing.assert_close(teacher, kept, rtol=0, atol=0)


def test_the_closed_gradient_can_be_differentiated_again() -> None:
    student, teacher = logits(3, 5, 0).requires_grad_(), logits(3, 5, 1)

    def losses(given: Tensor) -> Tensor:
        return softened_kl("test", given, teacher, temperature=0.7)

    once, again = (torch.autograd.grad(losses(student).sum(), student, create_graph=way)[0] for way in (False, True))
    torch.testing.assert_close(again, once)
    assert torch.autograd.gradgradcheck(losses, student)


def test_a_nan_of_either_model_stays_one() -> None:
    broken = logits(2, 5, 0)
    broken[0, 0] = math.nan

    for pair in ((broken, logits(2, 5, 1)), (logits(2, 5, 1), broken)):
        assert softened_kl("test", *pair, temperature=2.0).isnan().tolist() == [True, False]


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_logits_at_a_low_temperature_stay_finite(name: str, dtype: torch.dtype) -> None:
    """±300 at T = 0.05 is ±6,000: the probabilities underflow, the log probabilities do not."""
    student = torch.tensor([[300.0, -300.0, 0.0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-300.0, 300.0, 0.0]], dtype=dtype)

    found = value(name, student, teacher, 0.05)
    found.sum().backward()

    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert student.grad is not None
    assert student.grad.dtype == dtype
    assert student.grad.isfinite().all()


def test_the_temperature_divides_both_logits() -> None:
    student, teacher = logits(2, 5, 0), logits(2, 5, 1)

    for hot, cold in zip(
        log_probabilities("test", student, teacher, 4.0),
        log_probabilities("test", student / 4, teacher / 4),
        strict=True,
    ):
        torch.testing.assert_close(hot, cold)


def test_the_teacher_comes_first() -> None:
    log_p, log_q = log_probabilities("test", torch.zeros(1, 2), torch.tensor([[ln(3.0), 0.0]]))

    torch.testing.assert_close(log_p.exp(), torch.tensor([[0.75, 0.25]]))
    torch.testing.assert_close(log_q.exp(), torch.tensor([[0.5, 0.5]]))


@every
def test_no_position_gives_nothing_that_is_still_connected(name: str) -> None:
    student = torch.zeros(0, 5, requires_grad=True)

    found = value(name, student, torch.zeros(0, 5))
    found.sum().backward()

    assert found.shape == (0,)
    assert student.grad is not None
    assert student.grad.shape == (0, 5)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((3, 1), (3, 11)), ((3, 11), (3, 1)), ((1, 11), (3, 11)), ((2, 1, 11), (2, 3, 11)), ((11,), (3, 11))],
)
def test_unequal_shapes_raise_instead_of_broadcasting(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    for refused in (log_probabilities, partial(softened_kl, temperature=1.0)):
        with pytest.raises(MismatchError, match=r"somebody: student .* must have one shape\. For different vocabular"):
            refused("somebody", torch.zeros(student), torch.zeros(teacher))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_that_is_none_is_refused(temperature: float) -> None:
    with pytest.raises(ConfigurationError, match="somebody: temperature must be positive and finite, got"):
        check_temperature("somebody", temperature)
