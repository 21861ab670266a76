"""What the teacher and the students of the tables weigh and take: the methods of a table all train the same model."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_compress import export_onnx, facts, files, shrink
from hf_compress_evaluation import latency, quality
from hf_compress_evaluation.candidates import load_variants, timed_call
from hf_compress_evaluation.demo.recipe import packaged

DEPTHS = (6, 3, 2)
BATCHES, LENGTH, RUNS, WARMUP = (1, 32), 32, 30, 5


def measure(output: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    """Parameters, bytes and latency on one thread of ONNX Runtime, float32, of each depth; timed in turn.

    The head is untrained, which changes none of these.
    """
    every = []
    for depth in DEPTHS:
        tell(f"{depth} layers")
        if not (folder := output / f"{depth}-layers").exists():
            whole = AutoModelForSequenceClassification.from_pretrained(packaged(), num_labels=2)
            with files.atomic_folder(folder) as part:
                (whole if depth == whole.config.num_hidden_layers else shrink(whole, layers=depth)).save_pretrained(
                    part
                )
                AutoTokenizer.from_pretrained(packaged()).save_pretrained(part)
                files.readable(part)
        if not (folder / "onnx" / "model.onnx").exists():
            export_onnx(folder)
        (one,) = load_variants("student", folder, ["onnx"], "cpu", 1)
        every.append((depth, folder, one))
    rows: list[dict[str, Any]] = []
    for depth, folder, _ in every:
        found = [*quality.measure_size("student", "torch", folder), *quality.measure_size("student", "onnx", folder)]
        parameters = next(one.value for one in found if one.metric == "parameters")
        size = next(one.value for one in found if (one.variant, one.metric) == ("onnx", "bytes"))
        rows.append({"layers": depth, "parameters": parameters, "bytes": size, "latency": {}})
    for batch in BATCHES:
        calls = {str(depth): timed_call(one, batch, LENGTH, 0) for depth, _, one in every}
        taken = latency.measure_all(calls, batch=batch, length=LENGTH, runs=RUNS, warmup=WARMUP, threads=1)
        for row in rows:
            own = taken[str(row["layers"])]
            row["latency"][str(batch)] = {"median": own.median, "p90": own.p90}
    about = {"machine": facts.hardware(), "versions": facts.versions(), "date": date.today().isoformat()}
    return {"command": "python -m hf_compress_evaluation.encoders sizes", **about, "length": LENGTH, "models": rows}
