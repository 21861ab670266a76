"""Methods that train on data of their own making: how the conformance suite's rows become such data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from hf_compress_plugins.encoders.acm import acm
from hf_compress_plugins.encoders.efficient_attention import long_context_student
from hf_compress_plugins.encoders.mend import Episode, mend, padded
from hf_compress_plugins.language.ddk import DDKConfig, domains
from hf_compress_plugins.language.fspad import fspad
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedModel, TrainingArguments

from hf_compress import testing


def in_domains(dataset: Dataset, args: TrainingArguments) -> Mapping[str, Any]:
    """The rows in two domains, each held out too; weights are decided at every step."""
    named = dataset.add_column("domain", ["ab"[place % 2] for place in range(len(dataset))])
    steps = max(args.max_steps, 1)
    return {"train_dataset": domains(named, held_out=named, batch=len(dataset), steps=steps, config=DDKConfig(K=1))}


def for_two_models(dataset: Dataset, args: TrainingArguments) -> Mapping[str, Any]:
    """The teacher reads the same ids, in chunks of one or two tokens."""

    def both(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        found = testing.collate(batch)
        ids, real = found["input_ids"], found["attention_mask"]
        starts = torch.arange(0, ids.shape[1], 2).expand(len(ids), -1)
        ends = torch.minimum(starts + 2, real.sum(1, keepdim=True))
        chunks = torch.stack([starts, ends, starts, ends], -1).masked_fill((ends <= starts)[..., None], -1)
        return found | {"teacher_input_ids": ids, "teacher_attention_mask": real, "chunks": chunks}

    return {"data_collator": both}


def with_prompts(dataset: Dataset, args: TrainingArguments) -> Mapping[str, Any]:
    """Rows whose first token is the prompt."""

    def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        return testing.collate(batch) | {"prompt_length": torch.ones(len(batch), dtype=torch.long)}

    return {"data_collator": collate}


def with_privacy(dataset: Dataset, args: TrainingArguments) -> Mapping[str, Any]:
    """Every third id is private, more or less."""

    def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        found = testing.collate(batch)
        ids = found["input_ids"]
        return found | {"privacy": torch.where(ids % 3 == 0, (ids % 4 + 1) / 4, 0.0) * found["attention_mask"]}

    return {"data_collator": collate}


def in_groups(dataset: Dataset, args: TrainingArguments) -> Mapping[str, Any]:
    """Each row is a query with three passages: its ids, the same in reverse, and those without the last."""

    def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        read = [row["input_ids"] for row in batch]
        flat = [{"input_ids": one} for ids in read for one in (ids, ids[::-1], ids[:-1])]
        return testing.collate(flat) | {"group": torch.arange(len(batch)).repeat_interleave(3)}

    return {"data_collator": collate}


def after_a_token(dataset: Dataset, args: TrainingArguments) -> Mapping[str, Any]:
    """Rows whose first token is the prompt by its label."""

    def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        found = testing.collate(batch)
        if "labels" in found:
            found["labels"][:, 0] = -100
        return found

    return {"data_collator": collate}


def drafter(student: PreTrainedModel) -> PreTrainedModel:
    """Of the suite's teacher, whose features it learns; at the width of the teacher's weights its attention jumps."""
    return fspad(testing.models("text-generation")[1], config={"initializer_range": 0.05})


def half(student: PreTrainedModel) -> PreTrainedModel:
    """Of the layers of the suite's teacher, whose width the student needs."""
    teachers = (testing.models(task)[1] for task in ("fill-mask", "token-classification"))
    return long_context_student(next(teacher for teacher in teachers if type(teacher) is type(student)))


def bart(student: PreTrainedModel) -> PreTrainedModel:
    """An encoder-decoder with the student's vocabulary."""
    sides = ("encoder", "decoder")
    sizes = {f"{side}_{name}": value for side in sides for name, value in BART_SIZES.items()}
    config = BartConfig(
        vocab_size=testing.VOCAB,
        d_model=16,
        dropout=0.0,
        init_std=0.2,
        max_position_embeddings=64,
        pad_token_id=testing.PAD,
        bos_token_id=testing.PAD,
        decoder_start_token_id=testing.PAD,
        eos_token_id=1,
        forced_eos_token_id=None,
        **sizes,
    )
    return BartForConditionalGeneration(config)


BART_SIZES = {"layers": 1, "attention_heads": 2, "ffn_dim": 16}


def as_episodes(dataset: Dataset, args: TrainingArguments) -> Mapping[str, Any]:
    """A third of each row is the demonstration, a third the query and the rest the answer."""

    def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        found = []
        for row in batch:
            ids, third = row["input_ids"], len(row["input_ids"]) // 3
            found.append(Episode(demonstrations=ids[:third], query=ids[third : 2 * third], answer=ids[2 * third :]))
        columns = padded(found, pad=testing.PAD, labels="labels" in batch[0])
        for place, row in enumerate(batch):
            if "labels" in row and set(row["labels"]) == {-100}:
                columns["labels"][place] = -100
        return columns

    return {"data_collator": collate}


def around(student: PreTrainedModel) -> PreTrainedModel:
    """The suite's teacher, frozen, and its student as the network that reads demonstrations."""
    teacher = testing.models("text-generation", student.dtype)[1]
    return mend(teacher, config={"distiller": student, "num_virtual_tokens": 3})


SPACES = (torch.arange(testing.VOCAB) % 3 == 0, torch.arange(testing.VOCAB) % 3 == 0)

WORDS = (torch.arange(testing.VOCAB) % 4 == 0).to(torch.int8)
"""Every fourth token begins a word, the others go on with it."""

PREPARED: Mapping[str, Mapping[str, Any]] = {
    "ddk": {"prepare": in_domains, "settings": {"K": 1}},
    "acm": {"student": acm, "elsewhere": frozenset({"cumulated", "gate_labels"})},
    "fspad": {"student": drafter},
    "margin_mse": {
        "prepare": in_groups,
        "elsewhere": frozenset(
            {"pointwise_mse", "ranknet_weighted", "mse_ranknet", "inter_passage_mse", "combined", "scored"}
        ),
    },
    "dear": {
        "prepare": in_groups,
        "elsewhere": frozenset(
            {"ranknet", "listnet", "binary", "prompt", "parse_order", "windows", "slide", "rerank", "rationales"}
        ),
    },
    "autodistil": {"settings": {"layers": (1, 2)}, "elsewhere": frozenset({"subspace"})},
    "efficient_attention": {"student": half},
    "topkld": {"elsewhere": frozenset({"matrices", "quantize", "dequantize"})},
    "multi_exit": {"elsewhere": frozenset({"contrast", "pooled", "joined", "cut"})},
    "mi_alpha": {"elsewhere": frozenset({"hidden_loss", "logits_loss", "transport"})},
    "dmae": {"elsewhere": frozenset({"grid_positions"})},
    "dparallel": {
        "prepare": with_prompts,
        "settings": {"mask_token_id": testing.VOCAB - 1, "block": 4},
        "elsewhere": frozenset({"sureness", "unmask", "unmask_some", "tokens_each_step"}),
    },
    "semantic_revision": {
        "prepare": after_a_token,
        "settings": {"max_new_tokens": 4, "sampling_temperature": 0.0, "boundaries": WORDS},
    },
    "encoder_decoder": {
        "task": "text-generation",
        "student": bart,
        "settings": {"max_new_tokens": 4, "sampling_temperature": 0.0},
    },
    "mend": {
        "prepare": as_episodes,
        "student": around,
        "elsewhere": frozenset({"answer_scores"}),
    },
    "swing": {"prepare": with_privacy, "elsewhere": frozenset({"private_tokens"})},
    "alm": {
        "prepare": for_two_models,
        "settings": {"spaces": SPACES},
        "elsewhere": frozenset({"latents", "gradient_weights"}),
    },
}
"""Fields of `testing.Case`, by method."""


SIGNED = {"mi_alpha"}
"""Methods whose loss may be below 0, and is 0 for a batch of one row."""


def cases() -> list[testing.Case]:
    """Every case that the suite can run with what is prepared here: further methods with models of their own."""
    found = testing.cases()
    named = {case.method for case in found}
    found += [testing.Case(name, fields["task"]) for name, fields in PREPARED.items() if name not in named]
    return [replace(case, **PREPARED.get(case.method, {})) for case in found]
