"""What serving costs: throughput by hand, the memory of a real process, energy by a stand-in for codecarbon."""

from __future__ import annotations

import importlib
import logging
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import onnx
import pytest
from hf_compress_cards import figures
from hf_compress_evaluation import cost, folder, latency, serving_process, table
from onnx import TensorProto, helper
from recipes import write_rows, write_teacher
from test_cli import Said, call

from hf_compress import facts
from hf_compress.facts import Measurement, Record, Setting

HOW: dict[str, Setting] = {"threads": 1, "batch": 4, "length": 8, "provider": "torch-cpu"}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier with rows beside it."""
    place = tmp_path_factory.mktemp("cost")
    write_teacher(place / "student")
    write_rows(place / "test.csv", 12)
    (place / "task.yaml").write_text("task: text-classification\ndata: test.csv\n")
    return place / "student"


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph that makes 4 KiB of each token."""
    place = tmp_path_factory.mktemp("graph")
    ids, mask = (
        helper.make_tensor_value_info(name, TensorProto.INT64, ["b", "t"]) for name in ("input_ids", "attention_mask")
    )
    nodes = [
        helper.make_node("Mul", ["input_ids", "attention_mask"], ["both"]),
        helper.make_node("Unsqueeze", ["both", "axis"], ["wide"]),
        helper.make_node("Tile", ["wide", "repeats"], ["tiled"]),
        helper.make_node("ReduceSum", ["tiled", "axis"], ["out"], keepdims=0),
    ]
    constants = [
        helper.make_tensor("axis", TensorProto.INT64, [1], [2]),
        helper.make_tensor("repeats", TensorProto.INT64, [3], [1, 1, 512]),
    ]
    out = helper.make_tensor_value_info("out", TensorProto.INT64, ["b", "t"])
    made = helper.make_model(
        helper.make_graph(nodes, "g", [ids, mask], [out], constants),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    onnx.save(made, place / "model.onnx")
    return place


# ---------------------------------------------------------------------- throughput


def test_throughput_by_hand() -> None:
    """Calls of 2 rows of 8 tokens that take 0.625 s in the mean."""
    taken = latency.Latency(mean=0.625, median=0.5, p90=0.75, p99=0.8, runs=3, warmup=1, batch=2, length=8, threads=1)
    rows, tokens = cost.throughput("student", "onnx", taken, provider="CPUExecutionProvider")
    assert (rows.metric, rows.value, rows.unit) == ("throughput", 3.2, "rows/s")
    assert (tokens.metric, tokens.value, tokens.unit) == ("throughput_tokens", 25.6, "tokens/s")
    conditions = {"threads": 1, "batch": 2, "length": 8, "provider": "CPUExecutionProvider", "runs": 3, "warmup": 1}
    assert rows.how == tokens.how == conditions


def test_the_mean_is_of_all_timed_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = (value for end in (50, 1, 2, 6) for value in (0.0, float(end)))  # the first warms up
    monkeypatch.setattr("time.perf_counter", lambda: next(ends))
    found = latency.measure_all({"": lambda: None}, batch=1, length=1, runs=3, warmup=1, threads=1)[""]
    assert (found.mean, found.median) == (3.0, 2.0)


# ---------------------------------------------------------------------- memory


@pytest.mark.slow
def test_a_fresh_process_is_measured_and_not_this_one(student: Path, graph: Path) -> None:
    """This one holds torch and 400 MiB more, of which `ru_maxrss` of a child would begin."""
    ballast = bytearray(b"x" * (400 << 20))
    found = {}
    for variant, source in (("torch", student), ("onnx", graph)):
        (one,) = cost.peak_memory("student", variant, source, device="cpu", how=HOW)
        assert (one.metric, one.unit, one.variant) == ("peak_memory", "bytes", variant)
        assert one.how == {**HOW, "of": "a fresh process, libraries included"}
        found[variant] = one.value
    here = serving_process.resident()
    assert here is not None
    assert here > found["torch"] + len(ballast) / 2
    assert 10e6 < found["onnx"] < found["torch"] / 2  # without torch


def test_memory_is_told_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "status").write_text("VmPeak:\t 9000 kB\nVmHWM:\t    2000 kB\nVmRSS:\t 1000 kB\n")
    monkeypatch.setattr(serving_process, "STATUS", tmp_path / "status")
    assert serving_process.resident() == 2000 * 1024


def test_a_larger_batch_takes_more_memory(graph: Path) -> None:
    values = [
        cost.peak_memory("student", "onnx", graph, device="cpu", how=HOW | {"batch": batch, "length": 64})[0].value
        for batch in (1, 256)
    ]
    assert values[1] - values[0] == pytest.approx(256 * 64 * 4096, rel=0.5)


def test_a_process_that_fails_leaves_memory_unmeasured(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert cost.peak_memory("student", "onnx", tmp_path, device="cpu", how=HOW) == ()
    assert "student onnx: peak memory is not measured" in caplog.text
    assert "ended with code 1" in caplog.text


def test_a_process_that_does_not_end_is_given_up(
    graph: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cost, "LONGEST", 0.05)
    assert cost.peak_memory("student", "onnx", graph, device="cpu", how=HOW) == ()
    assert "timed out" in caplog.text


def test_a_graph_of_one_token_type_runs(tmp_path: Path) -> None:
    """Its table of types has one row: any id but 0 would end the run."""
    inputs = [helper.make_tensor_value_info("token_type_ids", TensorProto.INT64, ["batch", "length"])]
    outputs = [helper.make_tensor_value_info("states", TensorProto.FLOAT, ["batch", "length", 1])]
    table_of_types = helper.make_tensor("types", TensorProto.FLOAT, [1, 1], [0.5])
    nodes = [helper.make_node("Gather", ["types", "token_type_ids"], ["states"])]
    graph = helper.make_graph(nodes, "types", inputs, outputs, [table_of_types])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "model.onnx")
    assert serving_process.run_onnx(str(tmp_path), batch=2, length=3, threads=1, device="cpu") is None


# ---------------------------------------------------------------------- energy


class Tracker:
    """Stands in for `codecarbon.OfflineEmissionsTracker`, as its documentation describes it."""

    made: list[Tracker]
    energy: Any = 0.002

    def __init__(self, **settings: Any) -> None:
        self.settings, self.said = settings, ["made"]
        type(self).made.append(self)

    def start(self) -> None:
        self.said.append("start")

    def stop(self) -> float:
        self.said.append("stop")
        if self.energy is not None:
            self.final_emissions_data = types.SimpleNamespace(energy_consumed=self.energy)
        return 0.1  # kg of CO2, which nothing here uses


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> type[Tracker]:
    module = types.ModuleType("codecarbon")
    module.__spec__ = ModuleSpec("codecarbon", None)
    kind = type("Made", (Tracker,), {"made": []})
    module.OfflineEmissionsTracker = kind  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "codecarbon", module)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"codecarbon": "3.0"}[name])
    return kind


def test_energy_is_what_codecarbon_tells_of_the_rows_that_ran(tracker: type[Tracker]) -> None:
    """0.002 kWh, that is 2 Wh, of 4 rows a call, as many calls as there are in the time."""
    called: list[int] = []
    (found,) = cost.energy("student", "torch", lambda: called.append(1), how=HOW, seconds=0.01)
    (made,) = tracker.made
    assert made.said == ["made", "start", "stop"]
    assert made.settings == {
        "country_iso_code": "USA", "measure_power_secs": 1, "tracking_mode": "machine", "save_to_file": False,
        "save_to_api": False, "log_level": "critical",
    }  # fmt: skip
    assert (found.metric, found.unit) == ("energy_per_1000_rows", "Wh")
    assert found.value == pytest.approx(1000 * 2 / (4 * len(called)))
    conditions = {"codecarbon": "3.0", "tracking_mode": "machine", "rows": 4 * len(called)}
    assert found.how == {**HOW, **conditions}


@pytest.mark.parametrize("told", [0.0, float("nan"), None])
def test_energy_that_codecarbon_does_not_tell_is_not_measured(
    tracker: type[Tracker], told: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tracker.energy = told
    assert cost.energy("student", "torch", lambda: None, how=HOW, seconds=0.0) == ()
    assert "student torch: energy is not measured" in caplog.text


def test_the_tracker_is_stopped_if_a_call_raises(tracker: type[Tracker]) -> None:
    def broken() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cost.energy("student", "torch", broken, how=HOW)
    assert tracker.made[0].said[-1] == "stop"


def test_without_codecarbon_there_is_no_energy() -> None:
    if cost.measures_energy():
        pytest.skip("codecarbon is installed")
    with pytest.raises(ModuleNotFoundError, match="codecarbon"):
        cost.energy("student", "torch", lambda: None, how=HOW)


# ---------------------------------------------------------------------- record, table and card


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    return lambda *arguments: call(capsys, *arguments)


def test_evaluate_measures_cost_where_it_is_asked(
    student: Path, command: Callable[..., Said], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[tuple[Any, ...]] = []

    def memory(subject: str, variant: str, source: Any, *, device: str, how: Any) -> tuple[Measurement, ...]:
        asked.append((variant, source, device, how["batch"], how["length"]))
        return (Measurement(subject=subject, variant=variant, metric="peak_memory", value=5e8, unit="bytes", how=how),)

    monkeypatch.setattr(cost, "peak_memory", memory)
    monkeypatch.setattr(cost, "measures_energy", lambda: False)
    task = student.parent / "task.yaml"
    with caplog.at_level(logging.INFO):
        said = command("evaluate", student, "--task", task, "--cost")
    assert said.code == 0, said.err
    assert asked == [("torch", student, "cpu", 32, 64)]
    assert "pip install 'hf-compress[energy]'" in caplog.text
    record = facts.load(student)
    rows, taken = record.find("throughput"), record.find("latency_p90", batch=32)
    assert rows is not None
    assert taken is not None
    assert (rows.how["batch"], record.find("throughput", batch=1)) == (32, None)
    assert 0 < 32 / rows.value < 10 * taken.value
    assert "500.0 MB of memory" in said.out
    assert "rows a second" in said.out
    asked.clear()
    assert command("evaluate", student, "--task", task).code == 0
    assert asked == []


def test_energy_is_measured_for_each_model_with_its_call(
    student: Path, tracker: type[Tracker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "peak_memory", lambda *args, **kwargs: ())
    monkeypatch.setattr(cost.energy, "__kwdefaults__", {"seconds": 0.0})
    (one,) = folder.load_variants("student", student, ("torch",), "cpu", 1)
    candidates = [one, replace(one, subject="teacher", folder=None)]
    timing = folder.Timing(batches=(1, 4), length=8)
    found = list(folder._costs(candidates, timing, 1, "cpu", 0, False))
    assert [(one.subject, one.metric, one.how["batch"], one.how["rows"]) for one in found] == [
        ("student", "energy_per_1000_rows", 4, 4),
        ("teacher", "energy_per_1000_rows", 4, 4),
    ]
    assert list(folder._costs(candidates, folder.Timing(batches=()), 1, "cpu", 0, False)) == []


def test_what_a_process_loads_is_the_variants_folder_or_the_hub_id(student: Path) -> None:
    (one,) = folder.load_variants("student", student, ("torch",), "cpu", 1)
    assert folder._source(one) == student
    assert folder._source(replace(one, variant="onnx")) == student / "onnx"
    one.model.name_or_path = "me/big"
    assert folder._source(replace(one, folder=None)) == "me/big"


def fact(metric: str, value: float, unit: str) -> Measurement:
    return Measurement(subject="student", variant="onnx", metric=metric, value=value, unit=unit, how=HOW)


def test_a_card_shows_cost_in_words_and_says_what_is_missing() -> None:
    record = Record(
        measurements=(
            fact("throughput", 1234.5, "rows/s"), fact("throughput_tokens", 9876.0, "tokens/s"),
            fact("peak_memory", 5.121e8, "bytes"), fact("energy_per_1000_rows", 0.01234, "Wh"),
        )
    )  # fmt: skip
    cells = figures.other_cells(record)
    assert cells is not None
    at = "(batch 4, 8 tokens, threads 1)"
    assert [(row[0], row[3]) for row in cells[1]] == [
        (f"throughput {at}", "1.23 k rows/s"),
        (f"peak memory of a process that serves {at}", "512 MB"),
        (f"energy per 1,000 rows {at}", "0.0123 Wh"),
    ]
    assert figures.show(fact("throughput_tokens", 82.13, "tokens/s")) == "82.1 tokens/s"
    assert {"peak memory", "energy per 1,000 rows"} <= set(figures.missing(Record()))
    torch = record.model_copy(
        update={"measurements": tuple(m.model_copy(update={"variant": "torch"}) for m in record.measurements)}
    )
    assert not {"peak memory", "energy per 1,000 rows"} & set(figures.missing(torch))
    (row,) = table.rows(record)
    assert {name: value.value for name, value in row.cost.items()}["peak_memory"] == 5.121e8
