"""Logits a few positions at a time against whole logits: memory and time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_compress import DistillCallback
from hf_compress.heads import Memory

from . import Bench, Figures
from ._machine import Machine
from ._steps import texts, train

VOCABULARY, ROWS, LENGTH, STEPS = 32_000, 4, 257, 8


def model(width: int, layers: int, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    """An untrained language model."""
    torch.manual_seed(layers)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=2 * width, max_position_embeddings=512,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def run(part: str, on: Machine) -> Figures:
    """Seconds and megabytes of steps with the logits whole, or in chunks."""
    memory: Memory = "dense" if part == "dense" else "chunked"
    callback = DistillCallback(model(128, 2), "kd", memory=memory)
    rows = texts(ROWS, LENGTH, VOCABULARY)
    return train(model(64, 1), rows, steps=STEPS, batch=ROWS, on=on, callbacks=[callback])


def ratios(figures: Mapping[str, Figures]) -> Figures:
    """Of what is chunked to what is whole."""
    whole, chunked = figures["dense"], figures["chunked"]
    return {
        "chunked / dense, extra memory": chunked["megabytes"] / whole["megabytes"],
        "chunked / dense, time": chunked["seconds"] / whole["seconds"],
    }


BENCH = Bench(
    setting=f"Llama of 1 layer of width 64 taught by one of 2 of width 128, vocabulary {VOCABULARY:,}, "
    f"{ROWS * (LENGTH - 1):,} scored positions, kd and the task's own loss; memory over what was there before.",
    parts=("dense", "chunked"),
    run=run,
    gpu=True,
    ratios=ratios,
    bars={"chunked / dense, extra memory": (0.30, 0.20), "chunked / dense, time": (0.60, 0.35)},
)
