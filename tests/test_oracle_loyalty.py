"""Label and probability loyalty against the calls that their authors recommend."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from hf_compress_evaluation import agreement


def data() -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in oracle.load("loyalty").items()}


def logs(probs: np.ndarray) -> np.ndarray:
    """Log-probabilities, -inf for 0: what the functions take as logits."""
    with np.errstate(divide="ignore"):
        return np.log(probs)


def test_js_distances() -> None:
    given = data()
    student, teacher = given["student_probs"], given["teacher_probs"]

    np.testing.assert_allclose(agreement.js_distance(student, teacher), given["js_distance_natural"], atol=1e-7)
    np.testing.assert_allclose(agreement.js_distance(student, teacher, base=2), given["js_distance_base2"], atol=1e-7)


def test_loyalties() -> None:
    given = data()
    student, teacher = logs(given["student_probs"]), logs(given["teacher_probs"])
    natural = agreement.probability_loyalty(student, teacher)
    binary = agreement.probability_loyalty(student, teacher, base=2)

    assert agreement.label_loyalty(student, teacher) == pytest.approx(float(given["label_loyalty"]), abs=1e-7)
    assert natural == pytest.approx(float(given["probability_loyalty_natural"]), abs=1e-7)
    assert binary == pytest.approx(float(given["probability_loyalty_base2"]), abs=1e-7)
