"""Every feature of a Trainer with every method on every task: what the table in README.md says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import features
import pytest

from hf_compress.testing import Case


def tried() -> list[Any]:
    """The cells that say what happens; in the others there is nothing to try.

    Of cases that are wired alike each feature takes another one in its turn; with the rest it is slow.
    """
    found = []
    for turn, feature in enumerate(features.FEATURES):
        alike: dict[Any, list[Case]] = {}
        for case in features.CASES:
            said = features.rule(feature, case)
            if said is None or said.refused:
                alike.setdefault((said, features.wiring(case)), []).append(case)
        for (said, _), cases in alike.items():
            for place, case in enumerate(cases):
                marks = [pytest.mark.slow] if place != turn % len(cases) else []
                found.append(pytest.param(case, feature, said, id=f"{case}-{feature}", marks=marks))
    return found


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
