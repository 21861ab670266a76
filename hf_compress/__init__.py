"""Distillation for the Hugging Face stack: one callback on an unmodified Trainer.

Names are imported when they are first used: `hf-compress --help` must not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .callback import DistillCallback
    from .onnx import export_onnx, load_onnx, quantize_onnx
    from .publishing import ExportCallback, PublishCallback
    from .run import DistillConfig
    from .shrinking import shrink, shrink_vocabulary

_HOME = {
    "DistillCallback": "callback",
    "DistillConfig": "run",
    "ExportCallback": "publishing",
    "PublishCallback": "publishing",
    "export_onnx": "onnx",
    "load_onnx": "onnx",
    "quantize_onnx": "onnx",
    "shrink": "shrinking",
    "shrink_vocabulary": "shrinking",
}

__all__ = [
    "DistillCallback",
    "DistillConfig",
    "ExportCallback",
    "PublishCallback",
    "export_onnx",
    "load_onnx",
    "quantize_onnx",
    "shrink",
    "shrink_vocabulary",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
