"""Plans on paper against sums by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hf_compress_evaluation import scaling

PLAIN = scaling.Cluster(flops=1e15, used=0.5, within=1e11, between=1e11, hop=0.0)


def test_compute_is_six_and_two_operations_a_parameter_and_token() -> None:
    plan = scaling.plan("", 8, 8, runs=True, here=True, cluster=PLAIN)
    assert plan.student == pytest.approx(6 * 7e9 * 8192 / 5e14)
    assert plan.teacher == pytest.approx(2 * 70e9 * 8192 / 5e14)
    # logits twice and two gradients of the student's head, one product of the teacher's
    assert plan.heads == pytest.approx((4 * 4096 + 8192) * 2 * 128_256 * 8192 / 5e14)
    assert plan.tokens == pytest.approx(8 * 8192 / (plan.student + plan.teacher + plan.heads))


def test_gathering_brings_what_is_not_here_and_waits_for_each_hop() -> None:
    eight = scaling.gather(scaling.STUDENT, 8, 1, PLAIN)
    assert eight == pytest.approx(2 * 7e9 * 7 / 8 / 1e11)
    assert scaling.gather(scaling.STUDENT, 8, 3, PLAIN) == pytest.approx(3 * eight)
    assert scaling.gather(scaling.STUDENT, 1, 1, PLAIN) == 0
    late = replace(PLAIN, hop=1e-3)
    assert scaling.gather(scaling.STUDENT, 8, 1, late) - eight == pytest.approx(32 * 7 * 1e-3)
    slow = replace(PLAIN, between=1e10)
    assert scaling.gather(scaling.STUDENT, 8, 1, slow) == eight  # within a node
    assert scaling.gather(scaling.STUDENT, 16, 1, slow) == pytest.approx(2 * 7e9 * 15 / 16 / 1e10)


def test_copies_sum_their_gradients_between_nodes() -> None:
    """A ring sends twice its part of 2 bytes a parameter; eight GPUs share what comes into a node."""
    more = scaling.training_traffic(16, 8, PLAIN) - scaling.training_traffic(8, 8, PLAIN)
    assert more == pytest.approx(2 * 2 * 7e9 / 8 * 8 / 1e11)
    alone = scaling.plan("", 16, 8, runs=False, here=False, cluster=PLAIN)
    both = scaling.plan("", 16, 8, runs=True, here=True, cluster=PLAIN)
    assert alone.gathering == scaling.training_traffic(16, 8, PLAIN)
    assert both.gathering - alone.gathering == pytest.approx(scaling.gather(scaling.TEACHER, 8, 1, PLAIN))
    assert both.memory - alone.memory == pytest.approx(140e9 / 8)


def test_what_a_gpu_holds() -> None:
    without = scaling.memory(8, None)
    assert scaling.memory(8, 8) - without == pytest.approx(140e9 / 8)
    assert scaling.memory(4, None) - without == pytest.approx(16 * 7e9 / 8)


def test_a_teacher_that_is_not_run_leaves_the_student_and_its_head() -> None:
    alone = scaling.plan("", 8, 8, runs=False, here=False, cluster=PLAIN)
    assert alone.teacher == 0
    assert alone.heads == pytest.approx(4 * 4096 * 2 * 128_256 * 8192 / 5e14)
    assert alone.tokens == pytest.approx(8 * 8192 / (alone.student + alone.heads))
    assert len(scaling.markdown().splitlines()) == 2 + len(scaling.plans()) + 3 + len(scaling.A_TOKEN)
