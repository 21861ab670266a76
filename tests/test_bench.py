"""Benches: alternating parts, medians, and a results file that keeps the rows of others."""

from __future__ import annotations

import json
import mmap
import operator
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_parts import read, write
from hf_compress_evaluation import bench
from hf_compress_evaluation.bench import _language as language
from hf_compress_evaluation.bench import _machine, _peers, _steps, chunked, limit, onnx, scale
from hf_compress_evaluation.bench._machine import Machine
from tiny import tiny_bert_classifier
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer

from hf_compress import DistillCallback
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
    row = bench.measure("toy", output, rounds=1, on=Machine(threads=3), progress=said.append)
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
    assert row["seeds"] == [{"two / one": 3.0}] * 3


def test_figures_of_seeds_are_means_and_those_of_rounds_medians(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = [{"seconds": value} for value in (1.0, 2.0, 6.0)]
    for seeded, middle in ((False, 2.0), (True, 3.0)):
        given = iter(found)
        monkeypatch.setattr(bench, "_alone", lambda *_, given=given, **__: next(given))
        toy = replace(TOY, seeded=seeded, parts=("one",), prepare=None, ratios=lambda row: row["one"])
        monkeypatch.setattr(bench, "get", lambda name, toy=toy: toy)
        row = bench.measure("toy", tmp_path / "bench.json", rounds=3)
        assert row["ratios"] == row["figures"]["one"] == {"seconds": middle}
        assert row["spread"] == {"seconds": [1.0, 6.0]}
        assert row.get("seeds") == (found if seeded else None)


def test_what_is_measured_once_stands_for_all_rounds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = list[str]()
    monkeypatch.setattr(bench, "get", lambda name: replace(TOY, seeded=True, once=("one",)))
    row = bench.measure("toy", tmp_path / "bench.json", rounds=2, progress=said.append)
    assert said[1:] == ["toy: round 1 of 2, one", "toy: round 1 of 2, two", "toy: round 2 of 2, two"]
    assert row["figures"] == {"one": {"seconds": 6.0}, "two": {"seconds": 19.5}}


def test_a_killed_run_goes_on_with_the_part_it_was_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What was measured of another setting is not taken."""
    said, output = list[str](), tmp_path / "bench.json"

    def killed(line: str) -> None:
        said.append(line)
        if line.endswith("round 2 of 3, two"):
            raise KeyboardInterrupt

    monkeypatch.setattr(bench, "get", lambda name: replace(TOY, seeded=True))
    with pytest.raises(KeyboardInterrupt):
        bench.measure("toy", output, rounds=3, progress=killed)
    assert not output.exists()
    said.clear()
    row = bench.measure("toy", output, rounds=3, progress=said.append)
    assert said == ["toy: prepare", *(f"toy: round {place}" for place in ("2 of 3, two", "3 of 3, one", "3 of 3, two"))]
    assert row["figures"] == {"one": {"seconds": 7.667}, "two": {"seconds": 23.0}}
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
    assert row["command"].endswith("bench toy --rounds 3")
    with pytest.raises(KeyboardInterrupt):
        bench.measure("toy", output, rounds=3, progress=killed)
    monkeypatch.setattr(bench, "get", lambda name: replace(TOY, seeded=True, setting="Other."))
    said.clear()
    bench.measure("toy", output, rounds=1, progress=said.append)
    assert said == ["toy: prepare", "toy: round 1 of 1, one", "toy: round 1 of 1, two"]


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
    toy = replace(TOY, peer="safetensors", parts=(), ratios=lambda _: {}, prepare=None)
    for here in (False, True):
        monkeypatch.setattr(bench, "get", lambda name, here=here: replace(toy, here=here))
        row = bench.measure("toy", tmp_path / "bench.json", rounds=1)
        assert row["versions"]["safetensors"] == version("safetensors")
        assert row["beside"] == "safetensors"
    assert _peers.run_in("safetensors", sorted, [1, 2], reverse=True) == [2, 1]
    with pytest.raises(ConfigurationError, match=r"(?s)`ci/peers safetensors` mends it.*ZeroDivisionError"):
        _peers.run_in("safetensors", operator.truediv, 1, 0)


def test_graphs_take_turns() -> None:
    order = list[str]()
    seconds = onnx.alternately({name: lambda name=name: order.append(name) for name in ("a", "b")}, 2)
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
    inside: list[bool] = []

    @contextmanager
    def highest(self: Machine) -> Iterator[list[int]]:
        inside.append(True)  # what a warm process takes anew of its own memory may be nothing
        yield [5 << 20]

    monkeypatch.setattr(Machine, "highest", highest)
    found = chunked.run("chunked", Machine())
    assert inside == [True]
    assert 0 < found["seconds"] < 60
    assert found["megabytes"] == 5


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux tells the most memory of a process")
def test_memory_that_was_given_back_at_once_is_seen() -> None:
    for size in (64 << 20, 16 << 20):  # the second begins anew
        with Machine().highest() as memory, mmap.mmap(-1, size) as kept:  # malloc would hand out the first's again
            kept[::4096] = b"x" * (size // 4096)
        assert memory[0] == pytest.approx(size, abs=4 << 20)


@pytest.mark.parametrize(("marks", "found"), [((7, 9), 2 << 10), ((9, 7), 0)])
def test_memory_is_what_comes_on_top_and_never_below_nothing(
    marks: tuple[int, int], found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = iter(marks)
    monkeypatch.setattr(_machine, "resident", lambda: next(told) << 10)
    monkeypatch.setattr(_machine.Path, "write_text", lambda *args, **settings: 1)
    with Machine().highest() as memory:
        pass
    assert memory == [found]


def test_a_graph_s_products_are_those_that_are_counted_elsewhere() -> None:
    """torch counts the operations of a forward pass by another way."""
    model = tiny_bert_classifier(attn_implementation="eager", vocab_size=30_000).eval()
    counted = limit.products(model, 2, 6)
    with FlopCounterMode(display=False) as theirs, torch.no_grad():
        model(**{name: torch.tensor(value) for name, value in limit.inputs_of(2, 6).items()})
    assert limit.operations(counted) == theirs.get_total_flops() > 0
    left, right = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    (product,) = limit._product(tuple(left.shape), tuple(right.shape), on=Machine())()
    assert product.shape == (left @ right).shape


def test_growth_is_read_off_the_logarithms() -> None:
    assert scale.exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2.0)
    assert [sizes for sizes in scale.grid() if sizes["batch"] == 8] == [dict(scale.BASE, batch=8)]


def test_a_step_of_the_grid_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many objectives as are said, whichever way the logits go."""
    sizes = {"batch": 2, "length": 8, "vocabulary": 300, "objectives": 3}
    for way in scale.WAYS:
        assert 0 < scale.run(scale.named(way, sizes), Machine())["seconds"] < 60


def test_a_machine_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for wrong in ({"device": "tpu"}, {"precision": "int8"}):
        with pytest.raises(ConfigurationError, match="must be one of"):
            Machine(**wrong)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigurationError, match="no CUDA GPU"):
        Machine(device="cuda")
    monkeypatch.setattr(bench, "get", lambda name: TOY)
    with pytest.raises(ConfigurationError, match="is for a CPU and float32"):
        bench.measure("toy", tmp_path / "bench.json", on=Machine(precision="bfloat16"))


def test_a_row_of_another_precision_stands_beside_the_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the command that measures it again; the steps' forwards are in it."""
    monkeypatch.setattr(bench, "get", lambda name: replace(TOY, gpu=True))
    for on in (Machine(), Machine(precision="bfloat16")):
        bench.measure("toy", tmp_path / "bench.json", rounds=1, on=on)
    rows = json.loads((tmp_path / "bench.json").read_text())
    assert list(rows) == ["toy", "toy, bfloat16"]
    assert rows["toy, bfloat16"]["command"].endswith("bench toy --rounds 1 --precision bfloat16")
    seen = list[torch.dtype]()
    model = tiny_bert_classifier()
    model.classifier.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    rows_ = [{"input_ids": [2, 5, 3], "labels": 0}] * 4
    _steps.train(model, rows_, steps=2, batch=2, warm=0, on=Machine(precision="bfloat16"))
    assert set(seen) == {torch.bfloat16}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_s_step_is_timed_and_its_own_memory_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("VOCABULARY", 300), ("LENGTH", 9), ("STEPS", 5)):
        monkeypatch.setattr(chunked, name, value)
    found = chunked.run("chunked", Machine(device="cuda", precision="bfloat16"))
    assert found["seconds"] > 0
    with Machine(device="cuda").highest() as memory:
        torch.zeros(64 << 20, dtype=torch.uint8, device="cuda")
    assert memory[0] >= 64 << 20


def test_the_front_page_has_what_has_a_bar_and_a_peer() -> None:
    row = {
        "ratios": {"time": 0.25, "exponent": 1.0}, "bars": {"time": {"at_most": 0.6, "aim": 0.35}}, "beside": "peer",
        "versions": {"peer": "1.2"}, "command": "python -m bench", "date": "2026-01-01", "machine": "a CPU",
    }  # fmt: skip
    lines = bench.beside({"one": row, "two": row | {"beside": None}}).splitlines()
    assert lines[2:] == ["| peer 1.2 | time | 0.25 | ≤ 0.6 | 0.35 | `python -m bench` |", "", "2026-01-01, a CPU."]
    assert bench.beside({"two": row | {"beside": None}}) == ""


def test_what_is_of_language_models_is_compared_by_side_and_way() -> None:
    figures = {
        language.VALUES: {language.DIFFERENCE: 1e-7},
        "ours, on the data": {"seconds": 1.0, "megabytes": 3.0},
        "other, on the data": {"seconds": 4.0, "megabytes": 6.0},
        "ours, micro-batches": {language.DIFFERENCE: 0.0},
        "other, micro-batches": {language.DIFFERENCE: 3.0},
    }
    found = language.ratios(figures, "KL", {"other": (language.DATA,)})
    assert found == {
        "KL, relative difference": 1e-7,
        "time, on the data, to other": 0.25,
        "memory, on the data, to other": 0.5,
        "gradient of 4 micro-batches against 1, ours": 0.0,
        "gradient of 4 micro-batches against 1, other": 3.0,
    }
    assert language.bars("KL", "other").keys() <= found.keys()


def test_values_differ_by_the_largest_part_of_the_others() -> None:
    pairs = [(torch.tensor(2.0), torch.tensor(2.0)), (torch.tensor(3.0), torch.tensor(4.0))]
    found = language.run(language.VALUES, Machine(), sides={}, values=lambda: iter(pairs))
    assert found == {language.DIFFERENCE: 0.25}


def test_micro_batches_are_told_from_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours are one; the mean of micro-batch means, over rows of unequal lengths, is not."""
    monkeypatch.setattr(language, "VOCABULARY", 60)
    monkeypatch.setattr(language, "models", lambda: tuple(chunked.model(16, layers, 60) for layers in (1, 2)))
    sides = {
        "ours": lambda teacher, way: {"callbacks": [DistillCallback(teacher, "kd", task_weight=0.0)]},
        "means": lambda teacher, way: {"made": MeansTrainer},
    }
    part = f"{{}}, {language.PARTS}"
    found = {
        side: language.run(part.format(side), Machine(), sides=sides, values=lambda: iter(()))[language.DIFFERENCE]
        for side in sides
    }
    assert found["ours"] < 1e-5
    assert found["means"] > 0.01


class MeansTrainer(Trainer):
    """Whose loss is each micro-batch's own mean."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return model(**inputs).loss / self.args.gradient_accumulation_steps
