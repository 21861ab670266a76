"""Invented tiny models and a tiny tokenizer, made in milliseconds and without a network."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast, PreTrainedTokenizerFast

WORDS = [
    "a", "an", "the", "film", "book", "was", "is", "not", "and", "but", "very", "good", "bad", "fine", "dull",
    "bright", "slow", "quick", "story", "actor", "music", "end", "begin", "love", "hate", "like", "enjoy",
    "in", "of", "to", "with",
]  # fmt: skip
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = [prefix + chr(code) for code in range(ord("a"), ord("z") + 1) for prefix in ("", "##")]
VOCAB = list(dict.fromkeys([*SPECIAL, *WORDS, *LETTERS]))
MAX_LENGTH = 64


def tiny_tokenizer() -> BertTokenizerFast:
    """A WordPiece tokenizer of some 90 entries: a few whole words, every other word by letters."""
    ids = {token: index for index, token in enumerate(VOCAB)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    return BertTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_LENGTH)


def tiny_plain_tokenizer() -> PreTrainedTokenizerFast:
    """The same without token types."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=MAX_LENGTH,
        pad_token="[PAD]",
        eos_token="[SEP]",
    )


def tiny_bert_config(*, seed: int = 0, **settings: object) -> BertConfig:
    """Two layers of width 32; seeds torch, so that the model built next is always the same."""
    torch.manual_seed(seed)
    defaults: dict[str, object] = {
        "vocab_size": len(VOCAB),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": MAX_LENGTH,
        "initializer_range": 0.3,  # logits that differ by more than rounding
        "pad_token_id": VOCAB.index("[PAD]"),
    }
    return BertConfig(**(defaults | settings))


def tiny_bert_classifier(*, num_labels: int = 3, seed: int = 0, **settings: object) -> BertForSequenceClassification:
    """A BERT classifier with random weights, in eval mode."""
    return BertForSequenceClassification(tiny_bert_config(seed=seed, num_labels=num_labels, **settings)).eval()
