"""A BERT whose heads keep their size whatever its width; loads from this file."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)


class AutoDistilBertConfig(BertConfig):  # type: ignore[misc]  # transformers is not typed for mypy
    """A BERT's config with a head size of its own.

    Args:
        head_size: of each head, so that the attention is num_attention_heads · head_size wide.
    """

    model_type = "autodistil_bert"

    def __init__(self, head_size: int = 64, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.head_size = head_size
        place = __name__.rpartition(".")[2]
        self.auto_map = {auto: f"{place}.{name}" for auto, name in AUTO.items()}

    @property
    def embedding_size(self) -> int:
        """The width. BERT's attention refuses a width that its heads do not divide, unless a config has this name."""
        size: int = self.hidden_size
        return size


def _set_heads(attention: Any, config: AutoDistilBertConfig) -> None:
    """Projections of num_attention_heads · head_size in place of those that are as wide as the model."""
    width, inner = config.num_attention_heads * config.head_size, attention.self
    inner.attention_head_size, inner.all_head_size, inner.scaling = config.head_size, width, config.head_size**-0.5
    for name in ("query", "key", "value"):
        setattr(inner, name, nn.Linear(config.hidden_size, width))
    attention.output.dense = nn.Linear(width, config.hidden_size)


class AutoDistilBertModel(BertModel):  # type: ignore[misc]  # transformers is not typed for mypy
    """The body."""

    config_class = AutoDistilBertConfig

    def __init__(self, config: AutoDistilBertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config, add_pooling_layer)
        for layer in self.encoder.layer:
            _set_heads(layer.attention, config)
        self.post_init()


class AutoDistilBertForMaskedLM(BertForMaskedLM):  # type: ignore[misc]  # transformers is not typed for mypy
    """With the head that fills in masks."""

    config_class = AutoDistilBertConfig

    def __init__(self, config: AutoDistilBertConfig) -> None:
        super().__init__(config)
        self.bert = AutoDistilBertModel(config, add_pooling_layer=False)
        self.post_init()


class AutoDistilBertForSequenceClassification(BertForSequenceClassification):  # type: ignore[misc]  # as above
    """With a classifier of rows."""

    config_class = AutoDistilBertConfig

    def __init__(self, config: AutoDistilBertConfig) -> None:
        super().__init__(config)
        self.bert = AutoDistilBertModel(config)
        self.post_init()


class AutoDistilBertForTokenClassification(BertForTokenClassification):  # type: ignore[misc]  # as above
    """With a classifier of tokens."""

    config_class = AutoDistilBertConfig

    def __init__(self, config: AutoDistilBertConfig) -> None:
        super().__init__(config)
        self.bert = AutoDistilBertModel(config, add_pooling_layer=False)
        self.post_init()


AUTO = {
    "AutoConfig": "AutoDistilBertConfig",
    "AutoModel": "AutoDistilBertModel",
    "AutoModelForMaskedLM": "AutoDistilBertForMaskedLM",
    "AutoModelForSequenceClassification": "AutoDistilBertForSequenceClassification",
    "AutoModelForTokenClassification": "AutoDistilBertForTokenClassification",
}
"""Every folder names all of them: a body that was found is fine-tuned with a head."""
for _auto, _name in AUTO.items():
    globals()[_name].register_for_auto_class(_auto)
