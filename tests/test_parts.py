"""The types that parts of methods share."""

from __future__ import annotations

from dataclasses import fields

import pytest

from hf_compress import parts, registry
from hf_compress.errors import ConfigurationError


def test_every_part_is_a_keyword_of_a_method() -> None:
    assert set(parts.PARTS) <= {field.name for field in fields(registry.Method)}


@pytest.mark.parametrize(("configs", "scores"), [((), ()), (({"a": 1},), (1.0, 2.0)), (({}, {}), (1.0, 2.0))])
def test_a_ranking_that_is_none_is_refused(configs: tuple[dict[str, int], ...], scores: tuple[float, ...]) -> None:
    with pytest.raises(ConfigurationError, match="Ranking"):
        parts.Ranking(configs=configs, scores=scores, build=lambda place: None)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("budget", [{"parameters": 0}, {"parameters": 1, "evaluations": 0}])
def test_a_budget_of_nothing_is_refused(budget: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match="Budget"):
        parts.Budget(**budget)
