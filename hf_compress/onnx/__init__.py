"""A student folder into ONNX that is proven to give the same numbers, into fewer bits behind a gate, and back to run.

    export_onnx(student)                            # student/onnx/
    quantize_onnx(student, gate=Gate(features=texts, labels=labels))     # student/onnx_int8/
    model = load_onnx(student / "onnx_int8")        # called like the torch model; for pipelines and `generate`

One folder per variant, readable by transformers' `ExportedModel` and by Optimum's `ORTModelFor*`. A folder is written
whole or not at all, and only after the written files gave the model's numbers. Names are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .export import check, export_model, export_onnx
    from .folder import Exported
    from .gate import Gate
    from .loading import load_onnx
    from .models import OnnxModel
    from .parity import Parity, check_parity, parity_batches
    from .precision import PRECISIONS, quantize_onnx

_HOME = {
    "Exported": "folder",
    "Gate": "gate",
    "OnnxModel": "models",
    "PRECISIONS": "precision",
    "Parity": "parity",
    "check": "export",
    "check_parity": "parity",
    "export_model": "export",
    "export_onnx": "export",
    "load_onnx": "loading",
    "parity_batches": "parity",
    "quantize_onnx": "precision",
}

__all__ = [
    "PRECISIONS",
    "Exported",
    "Gate",
    "OnnxModel",
    "Parity",
    "check",
    "check_parity",
    "export_model",
    "export_onnx",
    "load_onnx",
    "parity_batches",
    "quantize_onnx",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
