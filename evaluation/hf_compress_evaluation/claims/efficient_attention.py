"""The claim of long-context students: half the layers keep most of the teacher, and long rows stay cheap."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from hf_compress_plugins.encoders.efficient_attention import EfficientAttention, long_context_student
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LongformerConfig,
    LongformerForMaskedLM,
    PreTrainedModel,
)

from hf_compress import DistillCallback
from hf_compress_evaluation.latency import measure_all

from . import Claim, _training
from . import _characters as characters

SHORT, LENGTH, WINDOW, LAYERS = 64, 512, 32, 4
"""Characters that the BERT reads from which the teacher is made, and that teacher and students read."""
SPECIAL, PAD, MASK = 2, 0, 1
"""Ids before the characters'."""
MASKED, READ = 0.25, 2048
"""Part that is masked, and characters of a batch."""
STEPS: Mapping[str, int] = {"short": 3000, "converted": 200, "student": 200}
TESTED = 24
"""Held-out rows."""
LENGTHS = (128, 256, 512, 1024, 2048)
SIZES: Mapping[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.12,
    "pad_token_id": PAD,
}
STUDENTS: Mapping[str, tuple[str, bool]] = {
    "every other layer, three terms": ("teacher", True),
    "every other layer, masked tokens alone": ("teacher", False),
    "random start, three terms": ("random", True),
}
TIMED: Mapping[str, tuple[type[PreTrainedModel], type, int]] = {
    f"{name} of {layers} layers": (model, config, layers)
    for name, model, config in (
        ("Longformer", LongformerForMaskedLM, LongformerConfig),
        ("BERT", BertForMaskedLM, BertConfig),
    )
    for layers in (LAYERS, LAYERS // 2)
}
TIMES = "times"
"""The variant that trains nothing."""


@cache
def rows(length: int) -> list[dict[str, Any]]:
    """Rows of that many characters of Python's help."""
    ids = [characters.alphabet()[letter] + SPECIAL for letter in characters.text()[: -characters.HELD_OUT]]
    return [{"input_ids": ids[start : start + length]} for start in range(0, len(ids) - length + 1, length)]


def hide(tokens: Tensor, draw: torch.Generator | None = None) -> dict[str, Tensor]:
    """Some of the characters masked, these as labels."""
    hidden = torch.rand(tokens.shape, generator=draw) < MASKED
    return {
        "input_ids": tokens.masked_fill(hidden, MASK),
        "attention_mask": torch.ones_like(tokens),
        "labels": tokens.masked_fill(~hidden, -100),
    }


def masked(batch: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """A batch of the Trainer."""
    return hide(torch.tensor([row["input_ids"] for row in batch]))


def made(model: type[PreTrainedModel], config: type, *, layers: int, length: int, seed: int) -> Any:
    """Untrained."""
    settings = {"attention_window": WINDOW} if model is LongformerForMaskedLM else {}
    vocab, places = SPECIAL + len(characters.alphabet()) + 1, length + PAD + 1
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model(
            config(**SIZES, **settings, vocab_size=vocab, max_position_embeddings=places, num_hidden_layers=layers)
        )


def train(model: Any, *, length: int, steps: int, rate: float, seed: int, **settings: Any) -> Any:
    """A plain Trainer on rows of that length."""
    return _training.train(
        model,
        data=rows(length),
        data_collator=masked,
        steps=steps,
        seed=seed,
        batch=READ // length,
        learning_rate=rate,
        warmup_steps=20,
        **settings,
    )


@cache
def teacher() -> LongformerForMaskedLM:
    """A BERT that has learned short rows, turned into a Longformer and trained on long ones."""
    bert = made(BertForMaskedLM, BertConfig, layers=LAYERS, length=SHORT, seed=0)
    with torch.no_grad():  # places as waves: neighbours are soon found
        table = bert.bert.embeddings.position_embeddings.weight
        angles = torch.arange(len(table))[:, None] * torch.logspace(0, -3, table.shape[1] // 2)
        table.copy_(0.3 * torch.stack([angles.sin(), angles.cos()], -1).flatten(1))
    train(bert, length=SHORT, steps=STEPS["short"], rate=3e-3, seed=0)
    config = {"attention": "longformer", "window": WINDOW, "length": LENGTH, "layers": LAYERS}
    converted: Any = long_context_student(bert, config=config)
    found: LongformerForMaskedLM = train(converted, length=LENGTH, steps=STEPS["converted"], rate=1e-3, seed=0)
    return found


def held_out(model: PreTrainedModel) -> dict[str, float]:
    """Cross-entropy and accuracy of masked characters, the same ones for every model."""
    ids = [characters.alphabet()[letter] + SPECIAL for letter in characters.text()[-characters.HELD_OUT :]]
    inputs = hide(torch.tensor(ids[: TESTED * LENGTH]).view(TESTED, LENGTH), torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model.eval()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    wanted = inputs["labels"] != -100
    loss = torch.nn.functional.cross_entropy(logits[wanted], inputs["labels"][wanted])
    same = (logits[wanted].argmax(-1) == inputs["labels"][wanted]).float().mean()
    return {"held-out loss, nats per masked character": float(loss), "accuracy of masked characters": float(same)}


def milliseconds() -> dict[str, float]:
    """Of a forward of one row, median, on one thread, all models in turn at each length."""
    models = {
        name: made(model, config, layers=layers, length=max(LENGTHS), seed=0).eval()
        for name, (model, config, layers) in TIMED.items()
    }
    found: dict[str, float] = {}
    for length in LENGTHS:
        tokens = torch.full((1, length), 7)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        with torch.no_grad():
            calls: dict[str, Callable[[], Any]] = {name: partial(one, **inputs) for name, one in models.items()}
            taken = measure_all(calls, batch=1, length=length, runs=25, warmup=3, threads=1)
        found |= {f"ms of {name} at {length} tokens": 1000 * one.median for name, one in taken.items()}
    return found


def run(variant: str, seed: int) -> Mapping[str, float]:
    """A student's held-out loss, or the time of a forward."""
    if variant == TIMES:
        return milliseconds()
    start, distilled = STUDENTS[variant]
    untrained = made(LongformerForMaskedLM, LongformerConfig, layers=LAYERS // 2, length=LENGTH, seed=100 + seed)
    student = long_context_student(teacher()) if start == "teacher" else untrained
    callbacks = [DistillCallback(teacher(), EfficientAttention())] if distilled else []
    train(student, length=LENGTH, steps=STEPS["student"], rate=1e-3, seed=seed, callbacks=callbacks)
    return held_out(student) | {f"{name}, of the teacher": value for name, value in held_out(teacher()).items()}


CLAIM = Claim(
    published="Students of half the layers keep up to 98.6 % of their long-context teachers on short tasks and 98.8 % "
    "on long named-entity recognition, at up to 57.8 % less time.",
    check=f"Characters of Python's help, {MASKED:.0%} masked. Teacher: a BERT of {LAYERS} layers and width "
    f"{SIZES['hidden_size']}, {STEPS['short']} steps on rows of {SHORT}, turned into a Longformer of window {WINDOW}, "
    f"{STEPS['converted']} steps on rows of {LENGTH}. Students: Longformers of {LAYERS // 2} layers, "
    f"{STEPS['student']} steps of {READ // LENGTH} rows of {LENGTH}. Time: a forward of one row with the head on one "
    "thread, the median of 25 of all models in turn, against a BERT of the same sizes.",
    expected="Every other layer with three terms below the other students in loss; Longformer's time linear in the "
    "length and BERT's above linear; half the layers at about half the time.",
    variants=(*STUDENTS, TIMES),
    run=run,
)
