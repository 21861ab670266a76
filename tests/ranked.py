"""Queries with passages of a few words, and tiny rerankers that read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import torch
from hf_compress_plugins.encoders._ranking import GROUP, GroupCollator
from stub import GradientKeeper, arguments
from tiny import tiny_bert_classifier, tiny_bert_config, tiny_tokenizer
from torch import Tensor
from transformers import BertModel, Trainer, TrainerCallback

from hf_compress import DistillCallback

QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TOKENIZER = tiny_tokenizer()


def texts() -> datasets.Dataset:
    """Three queries of three passages, the relevant one first."""
    return datasets.Dataset.from_dict(
        {
            "query": ["a good film", "slow book", "the actor and music"],
            "passages": [
                ["the film was very good", "dull music", "a story to begin with"],
                ["a book and a slow end", "love the bright actor", "fine"],
                ["the music of the actor is fine", "not a bad book", "a quick story but dull"],
            ],
        }
    )


def cross_encoder(seed: int, layers: int = 2) -> Any:
    """One logit for query and passage together, float64."""
    return tiny_bert_classifier(num_labels=1, seed=seed, num_hidden_layers=layers, **QUIET).double()


def encoder(seed: int) -> Any:
    """Reads one text at a time, float64."""
    return BertModel(tiny_bert_config(seed=seed, **QUIET), add_pooling_layer=False).double().eval()


def train(
    folder: Path, student: Any, teacher: Any, method: Any, groups: Any, *callbacks: TrainerCallback, **settings: Any
) -> tuple[Trainer, list[dict[str, Tensor]]]:
    """A Trainer that has run, and the gradients of its steps."""
    keeper = GradientKeeper()
    given = {name: settings.pop(name) for name in ("eval_dataset",) if name in settings}
    settings = {"per_device_train_batch_size": 3, "remove_unused_columns": True} | settings
    made = Trainer(
        model=student,
        args=arguments(folder, **settings),
        train_dataset=groups,
        data_collator=GroupCollator(TOKENIZER),
        callbacks=[DistillCallback(teacher, method), keeper, *callbacks],
        **given,
    )
    made.train()
    return made, keeper.gradients


def logits(model: Any, groups: Any) -> Tensor:
    """(query, 3) of a model with one logit, with gradient."""
    batch = GroupCollator(TOKENIZER)([groups[place] for place in range(len(groups))])
    own = {name: value for name, value in batch.items() if name != GROUP and not name.startswith("teacher_")}
    found: Tensor = model(**own).logits.view(-1, 3)
    return found


def assert_gradients(found: dict[str, Tensor], model: Any, loss: Tensor) -> None:
    """Those of a loss by hand."""
    names = list(found)
    expected = torch.autograd.grad(loss, [dict(model.named_parameters())[name] for name in names])
    assert max(float(gradient.abs().max()) for gradient in expected) > 1e-4
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-9, msg=name)
