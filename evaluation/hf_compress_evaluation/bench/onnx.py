"""Our graphs against those that Optimum exports and quantises from the same weights: bytes, and latency on a CPU.

Optimum's export needs an environment of its own, that of `ci/peers`; both graphs then run here, on one ONNX Runtime,
in one process and alternately: ours with the options of `load_onnx`, Optimum's with the default ones that it opens.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from hf_compress.errors import ConfigurationError, ParityError
from hf_compress.onnx import export_onnx, quantize_onnx
from hf_compress.onnx.runtime import open_session
from hf_compress_evaluation.demo.recipe import packaged

from . import Bench, Figures, _sentiment
from ._machine import Machine
from ._peers import plain, python_of

PEER = "optimum-onnx"
VARIANTS = {"float32": "onnx", "int8": "onnx_int8"}
"""Folder by part."""
REPEATS = {(1, 16): 300, (1, 64): 100, (1, 128): 60, (32, 16): 20, (32, 64): 10, (32, 128): 6}
"""Calls of each graph, by (batch, time)."""
WARM = 2
"""Calls before them that are not counted."""
SIDES = ("ours", "Optimum")
EXPORT = """
import sys
from pathlib import Path
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTQuantizer
from optimum.onnxruntime.configuration import AutoQuantizationConfig
student, output = sys.argv[1], Path(sys.argv[2])
main_export(student, output / "onnx", task="text-classification", do_validation=False)
config = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
ORTQuantizer.from_pretrained(output / "onnx").quantize(save_dir=output / "onnx_int8", quantization_config=config)
"""
"""Run by the other environment's Python, on the student's folder and the one to write."""


def prepare(folder: Path) -> None:
    """The classifier of `_sentiment`, exported and quantised by both; `folder/SIDE/` holds the variants of a side.

    Raises:
        ConfigurationError: if Optimum or MiniLM is missing, or Optimum's export fails.
        ParityError: if the two float32 graphs do not give the same logits.
    """
    python, ours = python_of(PEER), folder / SIDES[0]
    _sentiment.prepare(folder)
    (folder / "teacher").rename(ours)
    AutoTokenizer.from_pretrained(packaged()).save_pretrained(ours)
    done = subprocess.run([python, "-c", EXPORT, ours, folder / SIDES[1]], capture_output=True, text=True, env=plain())
    if done.returncode:
        raise ConfigurationError(f"Optimum's export failed, run `ci/peers {PEER}` again: {done.stderr.strip()[-500:]}")
    export_onnx(ours)
    quantize_onnx(ours, gate=None)
    first, second = (
        session.run(["logits"], inputs_of(3, 11))[0] for session in _sessions(folder, "float32", Machine()).values()
    )
    if (gap := float(np.abs(first - second).max())) > 1e-4:
        raise ParityError(f"the logits of the two float32 graphs differ by up to {gap:.3g}: not the same weights.")


def run(part: str, on: Machine, folder: Path) -> Figures:
    """Of both sides: bytes of a variant's graph and weights, accuracy, and the median milliseconds of a call."""
    found = {
        f"{side}, bytes": float(sum(path.stat().st_size for path in (folder / side / VARIANTS[part]).glob("*.onnx*")))
        for side in SIDES
    }
    sessions = _sessions(folder, part, on)
    rows = json.loads((folder / "rows.json").read_text())["test"]
    found |= {f"{side}, accuracy": accuracy(session, rows) for side, session in sessions.items()}
    for shape in REPEATS:
        calls = {side: _call(session, inputs_of(*shape)) for side, session in sessions.items()}
        seconds = alternately(calls, REPEATS[shape])
        found |= {f"{side}, {shape[0]} x {shape[1]}, ms": 1000 * value for side, value in seconds.items()}
    return found


def accuracy(session: Any, rows: Sequence[Mapping[str, Any]]) -> float:
    """Part of the rows, tokenized and with labels, whose class the graph finds, 0 … 1."""
    right = 0
    for start in range(0, len(rows), _sentiment.BATCH):
        batch = {name: one.numpy() for name, one in _sentiment.pad(rows[start : start + _sentiment.BATCH]).items()}
        labels = batch.pop("labels")
        batch["token_type_ids"] = np.zeros_like(batch["input_ids"])
        right += int((session.run(["logits"], batch)[0].argmax(-1) == labels).sum())
    return right / len(rows)


def _sessions(folder: Path, part: str, on: Machine) -> dict[str, Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = on.threads
    graphs = {side: folder / side / VARIANTS[part] for side in SIDES}
    (theirs,) = graphs["Optimum"].glob("*.onnx")  # it names a quantised graph otherwise
    return {
        "ours": open_session(graphs["ours"] / "model.onnx", provider=on.device, threads=on.threads),
        "Optimum": onnxruntime.InferenceSession(str(theirs), options, providers=["CPUExecutionProvider"]),
    }


def inputs_of(batch: int, length: int) -> dict[str, Any]:
    """Ids of whole words and pieces, without padding."""
    ids = np.random.default_rng(0).integers(1000, 30_000, (batch, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def _call(session: Any, inputs: dict[str, Any]) -> Callable[[], Any]:
    return lambda: session.run(None, inputs)


def alternately(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each; who begins changes from one turn to the next."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(WARM + repeats):
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            begun = time.perf_counter()
            calls[name]()
            if turn >= WARM:
                seconds[name].append(time.perf_counter() - begun)
    return {name: median(values) for name, values in seconds.items()}


def ratios(figures: Mapping[str, Figures]) -> Figures:
    """Of ours to Optimum's."""
    units = ["bytes", *(f"{batch} x {length}, ms" for batch, length in REPEATS)]
    found = {
        f"{part}, {unit.removesuffix(', ms')}": figures[part][f"ours, {unit}"] / figures[part][f"Optimum, {unit}"]
        for part in VARIANTS
        for unit in units
    }
    for part in VARIANTS:
        by = {side: figures[part][f"{side}, accuracy"] for side in SIDES}
        found |= {f"{part}, accuracy, {side}": value for side, value in by.items()}
        found[f"{part}, accuracy, Optimum's - ours"] = by["Optimum"] - by["ours"]
    return found


BENCH = Bench(
    setting="MiniLM-L6, fine-tuned to classify rated sentences, accuracy on the demo's test rows: ours / "
    "optimum-onnx 0.1's, both float32 graphs of the same weights, int8 dynamic per channel "
    "(Optimum's for AVX512-VNNI); batch x tokens, ONNX Runtime on a CPU.",
    parts=tuple(VARIANTS),
    prepare=prepare,
    run=run,
    threads=1,
    peer=PEER,
    here=True,
    ratios=ratios,
    bars={f"{part}, bytes": (1.0, 1.0) for part in VARIANTS}
    | {f"{part}, accuracy, Optimum's - ours": (0.005, 0.0) for part in VARIANTS}
    | {f"{part}, {batch} x {length}": (1.05, 0.95) for part in VARIANTS for batch, length in REPEATS},
)
