"""Every feature of a Trainer with every method on every task: what the table in README.md says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import features
import pytest

from hf_compress.testing import Case


def tried() -> list[Any]:
    """The cells that say what happens; in the others there is nothing to try."""
    every = [(case, feature) for case in features.CASES for feature in features.FEATURES]
    found = [(*cell, features.rule(cell[1], cell[0])) for cell in every]
    return [pytest.param(*cell, id=f"{cell[0]}-{cell[1]}") for cell in found if cell[2] is None or cell[2].refused]


@pytest.mark.parametrize(("case", "feature", "said"), tried())
def test_a_feature(case: Case, feature: str, said: features.Rule | None, tmp_path: Path) -> None:
    if said is None:
        features.FEATURES[feature](case, tmp_path)
        return
    with pytest.raises(Exception, match=re.escape(said.says)):
        features.FEATURES[feature](case, tmp_path)


@pytest.mark.parametrize("rule", features.RULES, ids=lambda rule: f"{rule.feature}: {rule.says}")
def test_every_rule_is_of_a_feature_and_decides_a_cell(rule: features.Rule) -> None:
    assert rule.feature in features.FEATURES
    assert any(features.rule(rule.feature, case) is rule for case in features.CASES)
