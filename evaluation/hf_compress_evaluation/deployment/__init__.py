"""Models of every kind as ONNX: `python -m hf_compress_evaluation.deployment [NAME …]` measures and writes the figures.

Each model is exported, compared with torch, put into 8 bits, reloaded, and timed beside torch on one thread. A row that
is there is not measured again; a figure that misses its bar is written as it was measured.
"""

from __future__ import annotations

import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor

from hf_compress import files
from hf_compress.errors import GateError
from hf_compress.facts import hardware, versions
from hf_compress.onnx import export_model, load_onnx, quantize_onnx
from hf_compress_evaluation import latency

from ._cases import CASES, Case

__all__ = ["CASES", "RESULTS", "markdown", "measure"]

RESULTS = Path("evaluation/results/deployment.json")
NEW_TOKENS = 10
Row = dict[str, Any]


def measure(
    name: str,
    output: Path = RESULTS,
    *,
    again: bool = False,
    device: str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> Row:
    """The figures of one model; measured if they are not there yet.

    Args:
        name: a key of `CASES`.
        output: the results file; rows of other models are kept.
        again: measure what is there already.
        device: "cpu", or "cuda": then torch in half precision is the baseline, float16 takes the place of 8 bits, and
            TensorRT runs where ONNX Runtime has it.
        progress: called with a line before each part.
    """
    rows: dict[str, Row] = files.read_json(output) if output.exists() else {}
    if name in rows and not again:
        return rows[name]

    def tell(line: str) -> None:
        if progress is not None:
            progress(f"{name}: {line}")

    torch.set_num_threads(1)
    tell("make")
    case = CASES[name]()
    with tempfile.TemporaryDirectory() as folder, latency.torch_threads(1):
        row = _row(case, Path(folder) / "student", tell, device)
    row |= {
        "command": f'python -m hf_compress_evaluation.deployment "{name}"',
        "date": date.today().isoformat(),
        "machine": hardware(),
        "versions": versions(),
    }
    rows = files.read_json(output) if output.exists() else {}
    rows[name] = row
    output.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(output, json.dumps({key: rows[key] for key in CASES if key in rows}, indent=1) + "\n")
    return row


def _row(case: Case, folder: Path, tell: Callable[[str], None], device: str) -> Row:
    case.model.save_pretrained(folder)
    if case.processing is not None:
        case.processing.save_pretrained(folder)
    started = time.perf_counter()
    exported = export_model(case.model, case.processing, folder / "onnx", progress=tell)
    row: Row = {
        "class": type(case.model).__name__,
        "parameters": case.model.num_parameters(),
        "safetensors bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "export seconds": round(time.perf_counter() - started, 1),
        "largest difference": exported.value("parity_max_abs_diff"),
        "allowed for rounding": exported.measurements[0].how.get("allowed_for_rounding", 0.0),
        "onnx bytes": _bytes(exported.folder),
    }
    precision = "int8" if device == "cpu" else "fp16"
    variant = f"onnx_{precision}"
    tell(precision)
    try:
        int8 = quantize_onnx(folder, gate=case.gate, precision=precision, progress=tell)
        row[precision] = {one.metric: round(one.value, 5) for one in int8.measurements if one.metric != "bytes"} | {
            "way": str(int8.measurements[0].how["way"])
        }
        row[f"{variant} bytes"] = _bytes(int8.folder)
    except GateError as error:
        row[precision] = {"gate": str(error)}
    models = _models(case, folder, variant, device)
    tell("compare")
    row["same tokens as torch"] = _same_tokens(case, models) if case.model.can_generate() else None
    row["decides like torch"] = _agreement(case, models["onnx"])
    for label, score in case.scores.items():
        row[label] = {kind: round(score(model), 4) for kind, model in models.items()}
    tell("time")
    row["timed"] = case.shape
    for rows in (1, 32):
        row[f"milliseconds, {rows}"] = _times(case, models, rows, device)
    if case.texts and not case.model.config.is_encoder_decoder:
        row["tokens a second"] = {kind: _speed(case, model) for kind, model in models.items()}
    return row


def _models(case: Case, folder: Path, variant: str, device: str) -> dict[str, Any]:
    """What is compared, torch first."""
    model = case.model.eval().to(device)
    found: dict[str, Any] = {"torch": model, "onnx": load_onnx(folder, threads=1, provider=device)}
    if (folder / variant).is_dir():
        found[variant] = load_onnx(folder / variant, threads=1, provider=device)
    if device == "cuda":
        found["torch fp16"] = copy.deepcopy(model).half()
        if "TensorrtExecutionProvider" in onnxruntime.get_available_providers():
            found["TensorRT fp16"] = load_onnx(folder, provider="tensorrt", options={"trt_fp16_enable": True})
    return found


def _bytes(folder: Path) -> int:
    """Of the graphs and their weights."""
    return sum(path.stat().st_size for path in folder.iterdir() if ".onnx" in path.name)


def _encoded(case: Case) -> dict[str, Tensor]:
    """The texts padded left, as prompts are."""
    if not case.texts:
        return dict(case.inputs(2))
    tokenizer = case.processing
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    sides = {} if case.model.config.is_encoder_decoder else {"padding_side": "left"}
    found = tokenizer(list(case.texts), padding=True, truncation=True, max_length=64, return_tensors="pt", **sides)
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def _generate(case: Case, model: Any, inputs: Mapping[str, Tensor], **settings: Any) -> Tensor:
    pad = getattr(case.processing, "pad_token_id", None)
    given = {"pad_token_id": pad} if pad is not None else {}
    made: Tensor = model.generate(
        **{name: value.to(model.device) for name, value in _halved(inputs, model).items()}, **given, **settings
    )
    return made.cpu()


def _same_tokens(case: Case, models: Mapping[str, Any]) -> dict[str, bool]:
    """Whether ONNX float32 gives torch's tokens: greedy, by beams, sampled."""
    inputs, found = _encoded(case), {}
    ways: Mapping[str, dict[str, Any]] = {
        "greedy": {"do_sample": False},
        "4 beams": {"num_beams": 4, "do_sample": False},
        "sampled": {"do_sample": True, "top_k": 20},
    }
    for way, settings in ways.items():
        made = []
        for kind in ("torch", "onnx"):
            torch.manual_seed(0)
            made.append(_generate(case, models[kind], inputs, max_new_tokens=20, **settings))
        found[way] = bool(made[0].shape == made[1].shape and (made[0] == made[1]).all())
    return found


def _agreement(case: Case, exported: Any) -> float | None:
    """Fraction of equal decisions of torch and ONNX float32 on eight rows; None for hidden states."""
    inputs = dict(case.inputs(8))
    if case.model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.arange(16).reshape(8, 2) + 5
    with torch.inference_mode():
        ours, theirs = (
            model(**{name: value.to(model.device) for name, value in inputs.items()})
            for model in (exported, case.model)
        )
    if "logits" not in theirs:
        return None
    same: float = (ours["logits"].cpu().argmax(-1) == theirs["logits"].cpu().argmax(-1)).double().mean().item()
    return round(same, 5)


def _times(case: Case, models: Mapping[str, Any], rows: int, device: str) -> dict[str, float]:
    """Median milliseconds of a forward, or of generating where there is a decoder of its own; p90 and p99 on a GPU."""
    inputs = {name: value.to(device) for name, value in case.inputs(rows).items()}

    def call(model: Any) -> Callable[[], object]:
        if case.model.config.is_encoder_decoder:
            return lambda: _generate(case, model, inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
        return lambda: model(**_halved(inputs, model))

    calls = {kind: call(model) for kind, model in models.items()}
    with torch.inference_mode():
        started = time.perf_counter()
        for each in calls.values():
            each()
        once = time.perf_counter() - started
    runs = max(3, min(30, int(20 / max(once, 1e-3)))) if device == "cpu" else 200
    taken = latency.measure_all(calls, batch=rows, length=1, runs=runs, warmup=1, threads=1)
    found = {kind: float(f"{one.median * 1000:.4g}") for kind, one in taken.items()}
    if device == "cuda":
        found |= {f"{kind}, p{at}": float(f"{value * 1000:.4g}") for kind, one in taken.items()
                  for at, value in ((90, one.p90), (99, one.p99))}  # fmt: skip
    return found


def _halved(inputs: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Images and spectra in the precision of a torch model; graphs cast by themselves."""
    half = isinstance(next(iter(model.parameters()), None), Tensor) and model.dtype == torch.float16
    return {name: value.half() if half and value.is_floating_point() else value for name, value in inputs.items()}


def _speed(case: Case, model: Any) -> float:
    """New tokens a second after one prompt, the median of three runs."""
    inputs = {name: value[:1] for name, value in _encoded(case).items()}
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        _generate(case, model, inputs, max_new_tokens=32, min_new_tokens=32, do_sample=False)
        seconds.append(time.perf_counter() - started)
    return round(32 / statistics.median(seconds), 1)


def markdown(rows: Mapping[str, Row]) -> str:
    """The results as a table, in the order of `CASES`."""
    lines = [
        "| model | parameters | largest difference | decides like torch | generates torch's tokens "
        "| bytes / safetensors | int8 / float32 | int8 against float32 | torch, ONNX, int8: ms for 1 | for 32 "
        "| tokens a second |",
        "|---|---:|---:|---:|---|---:|---:|---|---|---|---|",
    ]
    for name, row in rows.items():
        tokens = row["same tokens as torch"]
        right = "" if tokens is None else ", ".join(way for way, same in tokens.items() if same) or "no"
        int8 = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in row["int8"].items())
        for label, values in row.items():
            if isinstance(values, dict) and label.startswith("word error"):
                int8 += f"; {label}: {_list(values)}"
        left = row.get("allowed for rounding", 0.0)
        small = row["onnx_int8 bytes"] / row["onnx bytes"] if "onnx_int8 bytes" in row else None
        cells = (
            f"{name} ({row['timed']})",
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['largest difference']:.1e}" + (f" (rounding {left:.1e})" if left else ""),
            "" if row["decides like torch"] is None else f"{row['decides like torch']:.3f}",
            right,
            f"{row['onnx bytes'] / row['safetensors bytes']:.3f}",
            "" if small is None else f"{small:.3f}",
            int8,
            _list(row["milliseconds, 1"]),
            _list(row["milliseconds, 32"]),
            _list(row.get("tokens a second", {})),
        )
        lines.append(f"| {' | '.join(cells)} |")
    machines = sorted({f"{row['date']}, {row['machine']}" for row in rows.values()})
    lines += ["", f"`python -m hf_compress_evaluation.deployment`, one thread, {'; '.join(machines)}."]
    return "\n".join(lines) + "\n"


def _list(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{value:g}" for value in values.values())
