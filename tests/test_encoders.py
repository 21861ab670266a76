"""The comparison on a real encoder: rates by the first seed, one figure over seeds, tables from what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_compress_evaluation import encoders, intervals
from hf_compress_evaluation.encoders import _grid as grid
from hf_compress_evaluation.encoders import _models

from hf_compress import entries
from hf_compress.errors import ConfigurationError, UnknownNameError

RATES = (1e-3, 2e-3)


def scored(choice: float, right: str) -> grid.Scored:
    """Of a test part whose rows are right (1) or not (0)."""
    rows = tuple(map(float, right))
    return grid.Scored(choice=choice, figures={"f1": grid.Columns(kind="share", columns=(rows, (1.0,) * len(rows)))})


RUNS = {
    ("alone", 1e-3, 0): scored(0.4, "1100"),
    ("alone", 2e-3, 0): scored(0.3, "1111"),
    ("alone", 1e-3, 1): scored(0.1, "1000"),
    ("kd", 1e-3, 0): scored(0.4, "1000"),
    ("kd", 2e-3, 0): scored(0.5, "1110"),
    ("kd", 2e-3, 1): scored(0.2, "1100"),
}


def made(method: str, rate: float, seed: int, target: Path) -> grid.Scored:
    return RUNS[method, rate, seed]


def table(folder: Path, made: Any = made) -> dict[str, Any]:
    rows = grid.run(["alone", "kd"], folder, rates=RATES, seeds=(0, 1), made=made, tell=lambda line: None)
    found = grid.summarise(rows, {"teacher": scored(1.0, "1111")}, about={"command": "c"})
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def test_a_table_by_hand(tmp_path: Path) -> None:
    """Rates are chosen on the choice rows of the first seed: 0.001 alone (1/2, 1/4), 0.002 of kd (3/4, 2/4)."""
    found = table(tmp_path)
    teacher, alone, kd = found["methods"]
    assert (teacher["method"], teacher["figures"]["f1"]["values"], "gap_closed" in teacher) == ("teacher", [1.0], False)
    assert (alone["learning_rate"], alone["figures"]["f1"]["values"]) == (1e-3, [0.5, 0.25])
    assert (kd["learning_rate"], kd["seeds"], kd["figures"]["f1"]["values"]) == (2e-3, [0, 1], [0.75, 0.5])
    assert kd["choice"] == {"0.001": 0.4, "0.002": 0.5}
    assert kd["figures"]["f1"]["mean"] == pytest.approx(0.625)
    assert kd["figures"]["f1"]["sd"] == pytest.approx(0.25 / np.sqrt(2))
    assert kd["gap_closed"]["value"] == pytest.approx((0.625 - 0.375) / (1 - 0.375))
    assert found["main"] == "f1"


def test_a_finished_run_is_not_made_again(tmp_path: Path) -> None:
    first = table(tmp_path)
    (tmp_path / "rows" / "kd-0.002-seed-1.json").unlink()
    asked: list[Any] = []

    def again(*key: Any) -> grid.Scored:
        asked.append(key[:3])
        return made(*key)

    assert table(tmp_path, again)["methods"] == first["methods"]
    assert asked == [("kd", 2e-3, 1)]


def test_a_mean_over_seeds_resamples_their_rows_together() -> None:
    """Two seeds that are right on opposite rows have the same mean in every resample of the rows."""
    one, other = ({"kind": "average", "columns": [[float(c) for c in text]]} for text in ("1010", "0101"))
    found = intervals.estimate(grid.mean_over_seeds([one, other]))
    assert (found.value, found.interval, found.note) == (0.5, None, "every resample gives the same")
    assert intervals.estimate(grid.mean_over_seeds([one, one])).interval is not None


def test_the_page_holds_what_was_measured(tmp_path: Path) -> None:
    assert encoders.markdown(tmp_path) == ""
    encoders.keep("entities", table(tmp_path / "runs") | {"budget": {"epochs": 2.0, "rows": {"train": 4}}}, tmp_path)
    latency = {"1": {"median": 0.00125, "p90": 0.002}, "32": {"median": 0.5, "p90": 1.0}}
    sizes = {"layers": 3, "parameters": 17_300_000, "bytes": 69_400_000, "latency": latency}
    about = {"command": "c", "date": "2026-01-01", "machine": "m", "length": 32}
    encoders.keep("sizes", about | {"models": [sizes]}, tmp_path)
    page = encoders.markdown(tmp_path)
    assert "| 3 | 17.3 M | 69.4 MB | 1.25 | 500.00 |" in page
    assert "### Entities in contracts" in page
    (kd,) = [line for line in page.splitlines() if line.startswith("| kd ")]
    interval = json.loads((tmp_path / "entities.json").read_text())["methods"][2]["figures"]["f1"]["interval"]
    assert f"| 0.002 | 62.5 ± 17.7 ({100 * interval[0]:.1f} to {100 * interval[1]:.1f}) | 40" in kd


def test_every_method_of_a_table_can_be_read() -> None:
    for methods in encoders.TABLES.values():
        assert [entry.name for entry in entries.read(",".join(methods))] == list(methods)


class Letters:
    """A token for each letter, and one at both ends."""

    def num_special_tokens_to_add(self) -> int:
        return 2

    def __call__(self, words: list[str], **settings: Any) -> dict[str, list[int]]:
        assert settings == {"is_split_into_words": True, "add_special_tokens": False}
        return {"input_ids": list(map(ord, "".join(words)))}


def test_sentences_are_joined_to_pages_and_none_is_cut() -> None:
    sizes = (3, 5, 1, 20, 2)
    rows = [{"tokens": ["a" * size, "b"], "tags": ["O", "B-PER"]} for size in sizes]
    pages = _models.joined(rows, Letters(), 12)  # ten tokens of words: 4 + 6, 2, 21, 3
    assert [page["tokens"] for page in pages] == [
        ["aaa", "b", "aaaaa", "b"], ["a", "b"], ["a" * 20, "b"], ["aa", "b"],
    ]  # fmt: skip
    assert [page["tags"] for page in pages] == [["O", "B-PER"] * (len(page["tokens"]) // 2) for page in pages]
    assert rows[0]["tokens"] == ["aaa", "b"]


def test_what_is_missing_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="table"):
        encoders.make("sentimental", tmp_path)
    with pytest.raises(ConfigurationError, match="--headlines FILE"):
        encoders.make("sarcasm", tmp_path)


def test_headlines_are_split_once_and_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("label,text\n" + "".join(f"{row % 2},text {row}\n" for row in range(12)))
    monkeypatch.setattr(encoders, "COUNTS", {"choice": 2, "test": 4, "train": 5})
    parts = encoders._headlines(path)
    assert {name: len(rows) for name, rows in parts.items()} == {"choice": 2, "test": 4, "train": 5}
    assert len({row["text"] for rows in parts.values() for row in rows}) == 11
    assert {(int(row["text"][5:]) % 2, row["label"]) for rows in parts.values() for row in rows} == {
        (0, "plain"), (1, "sarcastic"),
    }  # fmt: skip
    assert parts == encoders._headlines(path)
