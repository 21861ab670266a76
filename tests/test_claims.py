"""The runner of claims: resumable, a row a run, nothing measured twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from hf_compress_evaluation import claims

from hf_compress import registry
from hf_compress.errors import ForeignFileError, UnknownNameError

RESULTS = Path(__file__).resolve().parent.parent / "evaluation/results/claims"


class Counted:
    """A claim that fails at its n-th run."""

    def __init__(self, fails_at: int = 0) -> None:
        self.fails_at, self.asked = fails_at, list[tuple[str, int]]()

    def __call__(self, variant: str, seed: int) -> Mapping[str, float]:
        self.asked.append((variant, seed))
        if len(self.asked) == self.fails_at:
            raise KeyboardInterrupt
        return {"score": seed + (variant == "with")}

    def claim(self, check: str = "c") -> claims.Claim:
        return claims.Claim(published="p", check=check, expected="e", variants=("without", "with"), run=self)


def test_a_killed_run_goes_on_and_repeats_no_row(tmp_path: Path) -> None:
    first, second = Counted(fails_at=3), Counted()
    with pytest.raises(KeyboardInterrupt):
        claims.measure("mine", tmp_path / "mine.json", claim=first.claim())

    found = claims.measure("mine", tmp_path / "mine.json", claim=second.claim())

    assert second.asked == [("without", 1), ("with", 1), ("without", 2), ("with", 2)]
    assert found == json.loads((tmp_path / "mine.json").read_text())
    assert claims.table(found) == [["variant", "seeds", "score"], ["without", "3", "1 ± 1"], ["with", "3", "2 ± 1"]]


def test_rows_of_another_claim_are_not_mixed_in(tmp_path: Path) -> None:
    claims.measure("mine", tmp_path / "mine.json", claim=Counted().claim(), seeds=(0,))
    with pytest.raises(ForeignFileError, match="check changed"):
        claims.measure("mine", tmp_path / "mine.json", claim=Counted().claim("other"), seeds=(0,))


def test_examples_are_made_once_and_shown_as_code(tmp_path: Path) -> None:
    made: list[int] = []

    def examples() -> list[dict[str, str]]:
        made.append(1)
        return [{"before": "a|b", "after": "a\n`b`"}]

    claim = replace(Counted().claim(), examples=examples)
    for _ in range(2):
        found = claims.measure("mine", tmp_path / "mine.json", claim=claim, seeds=(0,))
    assert made == [1]
    assert found["examples"] == json.loads((tmp_path / "mine.json").read_text())["examples"]
    lines = claims.markdown(found).splitlines()
    assert "| before | after |" in lines
    assert "| `a¦b` | `a⏎'b'` |" in lines
    assert "| before | after |" not in claims.markdown({**found, "examples": []})


def test_an_unknown_claim_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="claim"):
        claims.get("nothing_of_that_name")


@pytest.mark.parametrize("name", claims.names())
def test_each_claim_is_of_a_method_and_can_be_shown(name: str) -> None:
    registry.get(name)
    assert len(claims.get(name).variants) >= 1


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_results_are_those_of_the_claim_as_it_stands(path: Path) -> None:
    found, claim = json.loads(path.read_text()), claims.get(path.stem)
    assert (found["published"], found["check"], found["expected"]) == (claim.published, claim.check, claim.expected)
    assert {row["variant"] for row in found["rows"]} == set(claim.variants)
