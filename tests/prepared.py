"""Methods that train on data of their own making: how the conformance suite's rows become such data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from hf_compress_plugins.language.ddk import DDKConfig, domains
from transformers import TrainingArguments


def in_domains(dataset: Dataset, args: TrainingArguments) -> Mapping[str, Any]:
    """The rows in two domains, each held out too; weights are decided at every step."""
    named = dataset.add_column("domain", ["ab"[place % 2] for place in range(len(dataset))])
    steps = max(args.max_steps, 1)
    return {"train_dataset": domains(named, held_out=named, batch=len(dataset), steps=steps, config=DDKConfig(K=1))}


PREPARED: Mapping[str, Mapping[str, Any]] = {"ddk": {"prepare": in_domains, "settings": {"K": 1}}}
"""Fields of `testing.Case`, by method."""
