"""What conditional computation saves once it is a graph: ACM's gates, one number of learners for all, and exits.

A graph computes all learners and multiplies those that a token does not take by 0, so the gates save nothing in it;
what a user can have is one number for all tokens, or a model that is cut after an exit.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from hf_compress_plugins.encoders.acm import acm
from hf_compress_plugins.encoders.multi_exit import cut
from transformers import ViTConfig, ViTForImageClassification

from hf_compress.onnx import export_model
from hf_compress.onnx.runtime import open_session

from . import Bench, Figures
from ._machine import Machine

LEARNERS, DEPTH, SIZE = 4, 6, 64
CALLS, WARM, BATCH = 30, 3, 8
WHOLE, GATES, HALF, EXIT = "the model itself", "ACM, gates", "ACM, 2 of 4 learners", "cut after 3 of 6 layers"


def _models() -> Mapping[str, Any]:
    torch.manual_seed(0)
    whole = ViTForImageClassification(
        ViTConfig(
            hidden_size=192, intermediate_size=768, num_hidden_layers=DEPTH, num_attention_heads=3, image_size=SIZE,
            patch_size=8, num_labels=10,
        )
    ).eval()  # fmt: skip
    settings = {"learners": LEARNERS}
    gates, half = (acm(whole, config=settings | more) for more in ({}, {"taken": LEARNERS // 2}))
    return {WHOLE: whole, GATES: gates, HALF: half, EXIT: cut(whole, DEPTH // 2)}


def prepare(folder: Path) -> None:
    """Every model as a graph; exports are compared with torch as always."""
    for name, model in _models().items():
        export_model(model.eval(), None, folder / name)


def run(part: str, on: Machine, folder: Path) -> Figures:
    """Median milliseconds of a call of one graph."""
    pixels = np.random.default_rng(0).standard_normal((BATCH, 3, SIZE, SIZE), dtype=np.float32)
    session = open_session(folder / part / "model.onnx", provider=on.device, threads=on.threads)
    taken = []
    for _ in range(WARM + CALLS):
        began = time.perf_counter()
        session.run(None, {"pixel_values": pixels})
        taken.append(1000 * (time.perf_counter() - began))
    return {"ms": median(taken[WARM:])}


def ratios(figures: Mapping[str, Figures]) -> Figures:
    """Against the model that was not cut."""
    return {f"{part} / {WHOLE}": figures[part]["ms"] / figures[WHOLE]["ms"] for part in (GATES, HALF, EXIT)}


BENCH = Bench(
    setting=f"Untrained ViT of {DEPTH} layers of width 192, {BATCH} images of {(SIZE // 8) ** 2 + 1} tokens, float32 "
    f"on ONNX Runtime: itself; as ACM with {LEARNERS} learners a block, of which gates choose, and all are computed, "
    "or of which every token takes half; and cut after an exit. Time of a call.",
    parts=(WHOLE, GATES, HALF, EXIT),
    run=run,
    ratios=ratios,
    bars={},
    prepare=prepare,
    threads=1,
)
