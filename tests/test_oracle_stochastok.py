"""StochasTok against its authors' code, which draws positions from NumPy's and expansions from Python's generator."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import oracle
import pytest
from hf_compress_plugins.tokenizers.stochastok import StochasTokConfig, expand, expansions

CASES = {
    **{f"p{p}": StochasTokConfig(p=p) for p in (0.0, 0.1, 0.5, 2.0)},
    "pmax3_0.5": StochasTokConfig(p=0.5, max_num_to_expand=3),
}


def vocabulary() -> dict[bytes, int]:
    data = oracle.metadata("stochastok")
    single = {bytes.fromhex(digits): index for index, digits in enumerate(data["single_byte_order_hex"])}
    return single | {bytes.fromhex(digits): index for digits, index in data["mergeable_ranks_hex"].items()}


def as_pairs(given: dict[str, Any]) -> dict[int, list[tuple[int, int]]]:
    return {int(index): [(left, right) for left, right in pairs] for index, pairs in given.items()}


def test_the_table_of_expansions() -> None:
    assert expansions(vocabulary()) == as_pairs(oracle.metadata("stochastok")["expansions"])


def test_the_ids_spell_the_text() -> None:
    spelt = {index: token for token, index in vocabulary().items()}
    text = b"".join(spelt[index] for index in oracle.load("stochastok")["ids"].tolist())
    assert text.decode() == oracle.metadata("stochastok")["text"]


@pytest.mark.parametrize("case", CASES)
def test_the_expanded_ids(case: str) -> None:
    data, positions, choices = oracle.load("stochastok"), np.random.RandomState(0), random.Random(0)
    ids, _ = expand(
        data["ids"].tolist(),
        expansions(vocabulary()),
        position=lambda length: int(positions.randint(length)),
        choose=choices.choice,
        config=CASES[case],
    )
    assert ids == data[f"expanded.{case}"].tolist()
