"""Small models, texts and a tokenizer for the scripts, which otherwise look as their users' do."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, TrainingArguments

WORDS = "a book film story was very good bad long short and the actor music end i liked hated it not"
TEXTS = ["the film was very good", "a bad book", "i liked the music and the end", "the story was not good"] * 4
SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}


def tokenizer() -> PreTrainedTokenizerFast:
    special = ("[PAD]", "[UNK]", "[MASK]", "[EOS]")
    words = {word: place for place, word in enumerate((*special, *WORDS.split()))}
    made = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]", eos_token="[EOS]"
    )


def arguments(output: str, kind: type[TrainingArguments] = TrainingArguments, **more: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4, "num_train_epochs": 1, "logging_steps": 1, "eval_strategy": "epoch",
        "save_strategy": "epoch", "report_to": [], "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    return kind(output, **(settings | more))
