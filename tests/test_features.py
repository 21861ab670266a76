"""Every feature of a Trainer with every method on every task: what the table in README.md says."""

from __future__ import annotations

import re
from pathlib import Path

import features
import pytest

from hf_compress.testing import Case


@pytest.mark.parametrize("feature", features.FEATURES)
@pytest.mark.parametrize("case", features.CASES, ids=str)
def test_a_feature(case: Case, feature: str, tmp_path: Path) -> None:
    said = features.rule(feature, case)
    if said is None:
        features.FEATURES[feature](case, tmp_path)
    elif said.refused:
        with pytest.raises(Exception, match=re.escape(said.says)):
            features.FEATURES[feature](case, tmp_path)
