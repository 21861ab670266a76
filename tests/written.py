"""What is written over an earlier one of its kind: operations for a child, and what must hold whichever write fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import toys
from hf_compress_cards import card
from hf_compress_plugins.language.taid import TAID
from safetensors.torch import load_file, save_file
from tiny import tiny_bert_classifier, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM

from hf_compress import checkpoints, export_onnx, facts, load_onnx, loops, outgoing, quantize_onnx, testing
from hf_compress.onnx import Gate
from hf_compress.teachers import CacheTeacher

GENERATE = "text-generation"
TEXTS = {"input_ids": torch.arange(5, 25).view(4, 5), "attention_mask": torch.ones(4, 5, dtype=torch.long)}


@dataclasses.dataclass(frozen=True)
class Written:
    """An artefact: what is there before, what is done to it, and what anyone may read of it afterwards."""

    before: Callable[[Path], None]
    operation: Callable[[Path], None]
    read: Callable[[Path], Any]
    """Of a folder before, of one after, or of one where the operation failed: one of the two."""


# ---------------------------------------------------------------------- checkpoints of a run


def _run(folder: Path, objective: Any, **settings: Any) -> Any:
    made, _ = toys.run(folder / "run", objective, **({"save_strategy": "steps", "save_steps": 1} | settings))
    return made


def first_step(folder: Path) -> None:
    _run(folder, TAID(), max_steps=1).train()


def second_step(folder: Path) -> None:
    _run(folder, TAID(), max_steps=2).train(resume_from_checkpoint=True)


def first_step_of_networks(folder: Path) -> None:
    _run(folder, toys.WithAdam(), max_steps=1).train()


def second_step_of_networks(folder: Path) -> None:
    _run(folder, toys.WithAdam(), max_steps=2).train(resume_from_checkpoint=True)


def newest(folder: Path) -> Any:
    """Weights of the newest whole checkpoint, and that training goes on from it."""
    found = checkpoints.newest_whole(folder / "run")
    assert found is not None
    model = LlamaForCausalLM.from_pretrained(found)
    return found.name, testing.weights_hash(model)


# ---------------------------------------------------------------------- a cache of targets


def _fill(folder: Path, rows: slice) -> None:
    batch = testing.collate(testing.rows(GENERATE, 8)[rows])
    CacheTeacher(folder / "cache", testing.models(GENERATE)[1]).fill([batch])


def half_a_cache(folder: Path) -> None:
    _fill(folder, slice(4))


def the_other_half(folder: Path) -> None:
    _fill(folder, slice(4, 8))


def first_half(folder: Path) -> Any:
    """The targets that were there before."""
    batch = testing.collate(testing.rows(GENERATE, 4))
    cache = CacheTeacher(folder / "cache")
    cache.prepare(frozenset({"logits"}), torch.device("cpu"))
    _, logits = cache.apart(batch)
    assert logits is not None
    index = batch["attention_mask"][:, :-1].flatten().nonzero().flatten()
    where = torch.arange(batch["input_ids"].numel()).view(4, -1)[:, :-1].flatten()[index]
    return _plain(logits.rows(where, torch.zeros(len(where), testing.VOCAB)))


# ---------------------------------------------------------------------- the record, the card, weights to be pushed


def a_student(folder: Path) -> None:
    tiny_bert_classifier().save_pretrained(folder / "student")
    tiny_tokenizer().save_pretrained(folder / "student")
    _measured(folder, 0.5)
    card.write(folder / "student")


def _measured(folder: Path, value: float) -> None:
    measured = facts.Measurement(metric="accuracy", value=value, unit="ratio", subject="student", how={})
    facts.append(folder / "student", measured)


def another_measurement(folder: Path) -> None:
    _measured(folder, 0.75)


def another_card(folder: Path) -> None:
    card.write(folder / "student", repo_id="me/another")


def the_record(folder: Path) -> Any:
    return facts.load(folder / "student").model_dump(mode="json")


def the_card(folder: Path) -> Any:
    return (folder / "student" / "README.md").read_text(encoding="utf-8")


def with_a_distiller(folder: Path) -> None:
    a_student(folder)
    file = folder / "student" / "model.safetensors"
    save_file(load_file(file) | {"distiller.0_kd.part": torch.ones(3)}, file, metadata={"format": "pt"})


def stripped(folder: Path) -> None:
    outgoing.strip(folder / "student")


def torch_logits(folder: Path) -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(folder / "student").eval()
    with torch.no_grad():
        return _plain(model(**TEXTS).logits)


# ---------------------------------------------------------------------- exports


def exported(folder: Path) -> None:
    a_student(folder)
    export_onnx(folder / "student")


def exported_again(folder: Path) -> None:
    export_onnx(folder / "student")


def quantized(folder: Path) -> None:
    exported(folder)
    quantized_again(folder)


def quantized_again(folder: Path) -> None:
    labels = torch.zeros(4, dtype=torch.long).numpy()
    rows = [{name: values[row].tolist() for name, values in TEXTS.items()} for row in range(4)]
    quantize_onnx(folder / "student", gate=Gate(features=rows, labels=labels, max_drop=1, min_agreement=0))


def float_logits(folder: Path) -> Any:
    return _plain(torch.as_tensor(load_onnx(folder / "student" / "onnx")(**TEXTS)["logits"]))


def int8_logits(folder: Path) -> Any:
    return _plain(torch.as_tensor(load_onnx(folder / "student" / "onnx_int8")(**TEXTS)["logits"]))


# ---------------------------------------------------------------------- the state of a loop of our own


def _steps(folder: Path, steps: int) -> None:
    def step(number: int, state: Any) -> dict[str, float]:
        state["sum"] += number + 1
        return {}

    loops.run(step, {"sum": torch.zeros(64)}, steps=steps, settings={}, resume_from=folder / "loop", save_every=1)


def three_steps(folder: Path) -> None:
    _steps(folder, 3)


def four_steps(folder: Path) -> None:
    _steps(folder, 4)


def the_state(folder: Path) -> Any:
    return _plain(torch.load(folder / "loop" / loops.STATE, weights_only=True)["sum"])


def _plain(values: Tensor) -> Any:
    return [round(value, 5) for value in values.flatten().tolist()]


QUICK: Mapping[str, Written] = {
    "checkpoint": Written(first_step, second_step, newest),
    "checkpoint with networks": Written(first_step_of_networks, second_step_of_networks, newest),
    "cache": Written(half_a_cache, the_other_half, first_half),
    "record": Written(a_student, another_measurement, the_record),
    "card": Written(a_student, another_card, the_card),
    "strip": Written(with_a_distiller, stripped, torch_logits),
    "loop": Written(three_steps, four_steps, the_state),
}
SLOW: Mapping[str, Written] = {
    "export": Written(exported, exported_again, float_logits),
    "int8": Written(quantized, quantized_again, int8_logits),
}
