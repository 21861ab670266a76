"""Benches: alternating parts, medians, and a results file that keeps the rows of others."""

from __future__ import annotations

import json
import operator
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
from bench_parts import read, write
from hf_compress_evaluation import bench
from hf_compress_evaluation.bench import _peers, _steps, chunked, onnx

from hf_compress.errors import ConfigurationError, UnknownNameError


def ratios(figures: Mapping[str, bench.Figures]) -> bench.Figures:
    return {"two / one": figures["two"]["seconds"] / figures["one"]["seconds"]}


TOY = bench.Bench(
    setting="Nothing.",
    parts=("one", "two"),
    run=read,
    ratios=ratios,
    bars={"two / one": (2.5, 2.0)},
    prepare=write,
    threads=1,
)


def test_a_row_is_written_beside_those_of_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of what its parts share, which is prepared once, at the bench's own number of threads."""
    said = list[str]()
    monkeypatch.setattr(bench, "get", lambda name: TOY)
    output = tmp_path / "results" / "bench.json"
    output.parent.mkdir()
    output.write_text('{"zzz": {"ratios": {}, "bars": {}, "spread": {}}}')
    row = bench.measure("toy", output, rounds=1, threads=3, progress=said.append)
    assert row["ratios"] == {"two / one": 3.0}
    assert row["figures"] == {"one": {"seconds": 6.0}, "two": {"seconds": 18.0}}
    assert row["threads"] == 1
    assert said == ["toy: prepare", "toy: round 1 of 1, one", "toy: round 1 of 1, two"]
    assert list(json.loads(output.read_text())) == ["toy", "zzz"]
    assert bench.table({"toy": row})[1] == ["toy", "two / one", "3", "3 … 3", "≤ 2.5", "2"]
    assert "| toy | two / one | 3 |" in bench.markdown({"toy": row})


def test_a_round_may_be_a_seed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Figures are the mean over seeds."""
    monkeypatch.setattr(bench, "get", lambda name: replace(TOY, seeded=True))
    row = bench.measure("toy", tmp_path / "bench.json", rounds=3)
    assert row["figures"] == {"one": {"seconds": 7.667}, "two": {"seconds": 23.0}}


def test_without_optimum_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(_peers.FOLDER, str(tmp_path))
    with pytest.raises(ConfigurationError, match="run `ci/peers optimum-onnx` first"):
        onnx.prepare(tmp_path)


def environment(folder: Path, peer: str) -> None:
    """This one's Python, where that of a peer would be."""
    python = folder / peer / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)


def test_a_peer_s_functions_run_in_its_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without this one's paths; what fails over there is told."""
    environment(tmp_path, "safetensors")
    monkeypatch.setenv(_peers.FOLDER, str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", "nowhere")
    assert _peers.run_in("safetensors", os.getenv, "PYTHONPATH") is None
    alone = replace(TOY, peer="safetensors", parts=(), ratios=lambda _: {}, prepare=None)
    monkeypatch.setattr(bench, "get", lambda name: alone)
    row = bench.measure("toy", tmp_path / "bench.json", rounds=1)
    assert row["versions"]["safetensors"] == version("safetensors")
    assert _peers.run_in("safetensors", sorted, [1, 2], reverse=True) == [2, 1]
    with pytest.raises(ConfigurationError, match=r"(?s)`ci/peers safetensors` mends it.*ZeroDivisionError"):
        _peers.run_in("safetensors", operator.truediv, 1, 0)


def test_graphs_take_turns() -> None:
    order = list[str]()
    seconds = onnx._alternately({name: lambda name=name: order.append(name) for name in ("a", "b")}, 2)
    assert order == ["b", "a", "a", "b"] * (onnx.WARM // 2 + 1)
    assert seconds.keys() == {"a", "b"}


@pytest.mark.parametrize("name", bench.names())
def test_every_bench_has_parts_bars_and_a_setting(name: str) -> None:
    found = bench.get(name)
    assert len(found.parts) >= 2
    assert found.setting.endswith(".")
    made = {part: _Any() for part in found.parts}
    assert found.bars.keys() <= found.ratios(made).keys()


class _Any(dict[str, float]):
    def __missing__(self, key: str) -> float:
        return 1.0


def test_an_unknown_bench_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'chunked'"):
        bench.get("chunkd")


def test_time_and_memory_of_steps_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("VOCABULARY", 300), ("LENGTH", 9), ("STEPS", 5)):
        monkeypatch.setattr(chunked, name, value)
    found = chunked.run("chunked", 1)
    assert 0 < found["seconds"] < 60
    assert found["megabytes"] > 0
    with _steps.highest() as memory:
        kept = bytearray(64 << 20)
        kept[::4096] = b"x" * len(kept[::4096])
        for _ in range(20):
            sum(range(100_000))
    assert memory[0] > 50 << 20
