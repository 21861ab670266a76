"""A sentence encoder at half its layers: our side learns, rates are chosen on the choice texts, sides are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_compress_evaluation.bench import sentence_transformers as bench
from hf_compress_evaluation.bench._machine import Machine
from hf_compress_evaluation.demo import recipe
from hf_compress_evaluation.demo.data import Rows, load_sentiment
from hf_compress_evaluation.encoders import _models
from hf_compress_evaluation.gallery import _data
from transformers import AutoModel

from hf_compress import files, shrink

WORDS = [
    {"sentence1": a, "sentence2": b, "score": float(score)}
    for score, (a, b) in enumerate([("good", "film"), ("bad", "worse"), ("film", "movie"), ("the", "a")])
]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Few rows and an invented encoder of four layers beside the folder that the parts read."""
    data = load_sentiment(Rows(choice=30, test=30, labelled=200, unlabelled=0))
    encoder = tmp_path / "encoder"
    recipe.invented(encoder, data.labelled.rows)
    texts = [{"text": text} for text in data.labelled.rows["text"]]
    for name, value in (("TEXTS", 192), ("CHOICE", 20), ("TEST", 20), ("BATCH", 8), ("RATES", (1e-6, 1e-3))):
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "LAYERS", {"our layers": (0, 3), "their layers": (1, 3)})
    monkeypatch.setattr(bench, "MAIN", {bench.OURS: bench.MAIN[bench.OURS]})
    monkeypatch.setattr(bench, "packaged", lambda: encoder)
    monkeypatch.setattr(bench, "load_sentiment", lambda: data)
    monkeypatch.setattr(_data, "texts", lambda: {"train": texts})
    monkeypatch.setattr(_data, "pairs", lambda: dict.fromkeys(_data.PAIRS, WORDS))
    _models._loaded.cache_clear()
    return tmp_path / "given"


@pytest.mark.slow
def test_our_side_comes_nearer_to_the_teacher(small: Path) -> None:
    """With the rate that is better on the choice texts; the start is that of its layers, not trained."""
    small.mkdir()
    bench.prepare(small)
    assert files.read_json(small / "rates.json") == {bench.OURS: 1e-3}
    start = bench.run(f"{bench.START}, our layers", Machine(), small, seed=0)
    found = bench.run(bench.MAIN[bench.OURS], Machine(), small, seed=1)
    assert start[bench.COSINE] < found[bench.COSINE] < 1
    assert found["seconds"] > 0
    assert found["megabytes"] >= 0
    assert start["learning rate"] == 0
    assert all(-1 <= one[name] <= 1 for one in (start, found) for name in _data.PAIRS)
    other = bench.run(f"{bench.START}, their layers", Machine(), small, seed=0)
    assert other[bench.COSINE] != start[bench.COSINE]


@pytest.fixture
def prepared(small: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, without the training that chooses the rates."""
    small.mkdir()
    monkeypatch.setattr(bench, "chosen", lambda part, rate, folder: -rate)
    bench.prepare(small)
    return small


def test_what_is_reported_is_on_the_test_texts(prepared: Path) -> None:
    assert files.read_json(prepared / "rates.json") == {bench.OURS: 1e-6}
    tasks = files.read_json(prepared / "given.json")["tasks"]
    parts = [set(Path(tasks[part]["data"]).read_text().splitlines()) for part in ("choice", "test")]
    assert [len(part) for part in parts] == [10, 10]
    assert not parts[0] & parts[1]


def test_a_seed_is_another_order_of_the_same_texts(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    kept = bench.taught

    def taught(part: str, given: Any, target: Path) -> Any:
        seen.append(given)
        return kept(part, given, target)

    monkeypatch.setattr(bench, "taught", taught)
    for seed in (0, 1):
        bench.run(f"{bench.START}, our layers", Machine(), prepared, seed=seed)
    assert seen[0].texts != seen[1].texts
    assert sorted(seen[0].texts) == sorted(seen[1].texts)
    assert [one.seed for one in seen] == [0, 1]


def test_layers_cut_their_way_are_those_that_shrink_keeps(small: Path) -> None:
    whole = AutoModel.from_pretrained(small.parent / "encoder")
    expected = shrink(whole, layers=(1, 3)).state_dict()
    found = bench.reduced(whole, (1, 3))
    assert found.config.num_hidden_layers == 2
    torch.testing.assert_close(dict(found.state_dict()), dict(expected))


def test_figures_are_compared_side_by_side() -> None:
    """Of the documented sides: ours with its layers, theirs with their own."""
    base = {bench.COSINE: 0.5, **dict.fromkeys(_data.PAIRS, 0.25), "seconds": 2.0, "megabytes": 3.0}
    figures = {part: dict(base) for part in bench.PARTS}
    figures[bench.MAIN[bench.OURS]] |= {bench.COSINE: 0.75, "seconds": 6.0}
    found = bench.ratios(figures)
    assert found[f"{bench.COSINE}, MSELoss above ours"] == -0.25
    assert found[f"{bench.COSINE}, EmbedDistillLoss above ours"] == -0.25
    assert found["SimLex-999, MSELoss above ours"] == 0
    assert found["time, to MSELoss"] == 3
    assert found["memory, to EmbedDistillLoss"] == 1
    assert found[f"{bench.COSINE}, features, our layers"] == 0.75
