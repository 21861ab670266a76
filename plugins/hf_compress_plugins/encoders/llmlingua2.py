"""Prompt compression by a small encoder that says of each word whether it stays, taught by a text model's shortenings.

Pan, Wu, Jiang et al.: LLMLingua-2: Data Distillation for Efficient and Faithful Task-Agnostic Prompt Compression,
Findings of ACL 2024, arXiv:2403.12968, sections 3 and 4.

    1. a text teacher shortens each chunk of text by deleting words only
    2. annotation: for each word of the short text, from pointer p: the nearest equal, unlabelled word of the original,
       at p + i before p - i for i < W, is labelled "keep"; p follows, forwards by W // 2 at most
    3. control: variation rate = share of short words that the original lacks; alignment gap = share of original words
       found - share kept. Chunks at or above the 90th percentile of the first are dropped, then of the second.
    4. a token classifier learns the labels, every part of a word that of its word
    5. a prompt keeps the words whose probability is above the (100 · (1 - rate) + 1)-th percentile

    data = llmlingua2(texts, teacher=TextTeacher(ChatServer(url=…, model=…)), tokenizer=tokenizer)
    Trainer(model=AutoModelForTokenClassification…, train_dataset=data, …).train()
    compress_prompt("a long prompt …", model, tokenizer, rate=0.5)

Differences from the authors' code: words come from a regular expression, as they stand, in training and in use (the
code trains on lemmas without commas); padding and special tokens have label -100 (the code learns padding as "drop" and
shifts the last word's label onto the end token); where most gaps are equal they are kept rather than all dropped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import datasets
import numpy as np
import torch
from numpy.typing import NDArray

from hf_compress.errors import ConfigurationError
from hf_compress.objective import IGNORED
from hf_compress.registry import Method

WORD = re.compile(r"\w+(?:[-'’]\w+)*|[^\w\s]")
"""A word: letters and digits with inner hyphens and apostrophes, or one mark."""
WINDOW = 150
"""W, the code's default; its script uses 400."""
PERCENTILE = 90.0
"""Of both controls."""
INSTRUCTION = (
    "Shorten the text below as much as you can while a reader can still recover its meaning. Delete words only: keep "
    "the order, change no word, add none, abbreviate none. Answer with the shortened text and nothing else.\n\n"
)
"""What the text teacher is told before each chunk; our wording of the paper's rules."""


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """Labels of one chunk, and how well the short text fits it."""

    labels: tuple[bool, ...]
    """Of each word of the original: whether it stays."""
    compression_rate: float
    """Words of the short text by words of the original."""
    variation_rate: float
    """Share of the short text's words that the original lacks; 1 for an empty one."""
    hitting_rate: float
    """Words of the short text that the original has, by words of the original."""
    matching_rate: float
    """Share of the original's words that are labelled."""

    @property
    def alignment_gap(self) -> float:
        return self.hitting_rate - self.matching_rate


def annotate(original: Sequence[str], compressed: Sequence[str], *, window: int = WINDOW) -> Annotation:
    """Finds the words of a shortened text in the original; upper and lower case are the same.

    Args:
        original: words, at least one.
        compressed: words, possibly none.
        window: W.
    """
    words, labels, pointer = [word.lower() for word in original], [False] * len(original), 0
    last, found = len(words) - 1, 0
    known = set(words)
    for word in (short.lower() for short in compressed):
        found += word in known
        for step in range(window):
            ahead, behind = min(pointer + step, last), max(pointer - step, 0)
            if words[ahead] == word and not labels[ahead]:
                labels[ahead] = True
                pointer = min(ahead, pointer + window // 2)
                break
            if words[behind] == word and not labels[behind]:
                labels[behind] = True
                pointer = behind
                break
    return Annotation(
        labels=tuple(labels),
        compression_rate=len(compressed) / len(words),
        variation_rate=1 - found / len(compressed) if compressed else 1.0,
        hitting_rate=found / len(words),
        matching_rate=sum(labels) / len(words),
    )


def well_aligned(
    variation_rates: NDArray[np.float64], alignment_gaps: NDArray[np.float64], *, percentile: float = PERCENTILE
) -> NDArray[np.int64]:
    """Places of the chunks that are kept: below the percentile of the variation rates, then of the gaps left.

    Where a percentile is the smallest value, as with many equal ones, nothing is dropped by it.
    """
    kept = np.arange(len(variation_rates))
    for values in (variation_rates, alignment_gaps):
        if len(kept):
            limit = np.percentile(values[kept], percentile)
            kept = kept[values[kept] < limit] if limit > values[kept].min() else kept
    return kept


def word_probabilities(
    probabilities: Sequence[float], words: Sequence[int], *, reduce: Literal["mean", "first"] = "mean"
) -> list[float]:
    """The probability of each word from those of its tokens.

    Args:
        probabilities: of each token, special ones left out.
        words: number of the word that each token belongs to, rising from 0.
        reduce: the mean of a word's tokens, or its first.
    """
    groups: list[list[float]] = [[] for _ in range(max(words, default=-1) + 1)]
    for probability, word in zip(probabilities, words, strict=True):
        groups[word].append(probability)
    return [group[0] if reduce == "first" else sum(group) / len(group) for group in groups]


def threshold(probabilities: Sequence[float], counts: Sequence[int], *, rate: float) -> float:
    """What a word's probability must exceed.

    Args:
        probabilities: of each word.
        counts: tokens of each word in the model that the prompt is for.
        rate: part of those tokens that is to stay, 0 … 1.
    """
    repeated = np.repeat(np.asarray(probabilities, dtype=np.float64), counts)
    return float(np.percentile(repeated, min(int(100 * (1 - rate) + 1), 100)))


def kept_words(probabilities: Sequence[float], limit: float) -> list[bool]:
    """Which words stay: above the limit, or certain where the limit is 1."""
    return [p > limit or p == limit == 1.0 for p in probabilities]


def chunks(words: Sequence[str], limit: int) -> list[tuple[int, int]]:
    """(start, end) of consecutive chunks of at most so many words, each ending with a full stop where it has one."""
    found, start = [], 0
    while start < len(words):
        end = min(start + limit, len(words))
        if end < len(words):
            stops = [place for place in range(start, end) if words[place] == "."]
            end = stops[-1] + 1 if stops else end
        found.append((start, end))
        start = end
    return found


def llmlingua2(
    dataset: Any,
    *,
    teacher: Callable[[Sequence[str]], list[str]],
    tokenizer: Any,
    column: str = "text",
    max_length: int = 512,
    chunk_words: int = 256,
    window: int = WINDOW,
    percentile: float = PERCENTILE,
    instruction: str = INSTRUCTION,
) -> datasets.Dataset:
    """Texts as rows for a token classifier of two labels, 1 for words that stay.

    Args:
        dataset: rows with a text in `column`.
        teacher: a `TextTeacher`, or a function from prompts to answers.
        tokenizer: the student's, a fast one.
        column: name of the texts.
        max_length: tokens of a row; longer ones are cut.
        chunk_words: words of a chunk at most.
        window: W of the annotation.
        percentile: of both controls.
        instruction: what stands before each chunk.

    Returns:
        input_ids, attention_mask and labels (-100 on special tokens), and the chunk's rates.

    Raises:
        ConfigurationError: if no text has a word, or nothing passes the controls.
    """
    originals = []
    for row in dataset:
        words = WORD.findall(row[column])
        originals += [words[start:end] for start, end in chunks(words, chunk_words)]
    if not originals:
        raise ConfigurationError(f"llmlingua2: column {column!r} has no words.")
    answers = teacher([instruction + " ".join(words) for words in originals])
    found = [
        annotate(words, WORD.findall(answer), window=window) for words, answer in zip(originals, answers, strict=True)
    ]
    kept = well_aligned(
        np.array([one.variation_rate for one in found]),
        np.array([one.alignment_gap for one in found]),
        percentile=percentile,
    )
    rows = [
        _encode(originals[place], found[place], tokenizer, max_length) for place in kept if any(found[place].labels)
    ]
    if not rows:
        raise ConfigurationError(f"llmlingua2: none of {len(found)} shortened chunks kept a word of its original.")
    return datasets.Dataset.from_list(rows)


def _encode(words: Sequence[str], annotation: Annotation, tokenizer: Any, max_length: int) -> dict[str, Any]:
    encoded = tokenizer(list(words), is_split_into_words=True, truncation=True, max_length=max_length, padding=False)
    labels = [IGNORED if word is None else int(annotation.labels[word]) for word in encoded.word_ids()]
    return {
        "input_ids": encoded["input_ids"],
        "attention_mask": encoded["attention_mask"],
        "labels": labels,
        "variation_rate": annotation.variation_rate,
        "alignment_gap": annotation.alignment_gap,
    }


def compress_prompt(
    text: str,
    model: Any,
    tokenizer: Any,
    *,
    rate: float,
    force: Sequence[str] = (),
    keep_digits: bool = False,
    reduce: Literal["mean", "first"] = "mean",
    target_tokenizer: Any = None,
    max_length: int = 512,
) -> str:
    """The text without its least telling words; what is left is a subsequence of it.

    Args:
        text: a prompt.
        model: a token classifier whose label 1 says that a word stays; torch, or of `load_onnx`.
        tokenizer: its own, a fast one.
        rate: part of the words that is to stay (of the target's tokens with `target_tokenizer`), 0 … 1.
        force: words that always stay, e.g. (".", "?").
        keep_digits: words with a digit always stay.
        reduce: how a word's probability comes from its tokens'.
        target_tokenizer: of the model that the prompt is for.
        max_length: tokens that the classifier reads at once.

    Raises:
        ConfigurationError: if the rate is not in 0 … 1.
    """
    if not 0 <= rate <= 1:
        raise ConfigurationError(f"llmlingua2: rate must lie in 0 … 1, got {rate}.")
    spans = [match.span() for match in WORD.finditer(text)]
    words = [text[start:end] for start, end in spans]
    if not words:
        return ""
    probabilities = _probabilities(words, model, tokenizer, reduce, max_length)
    for place, word in enumerate(words):
        if word in force or (keep_digits and re.search(r"\d", word)):
            probabilities[place] = 1.0
    counts = [1] * len(words)
    if target_tokenizer is not None:
        counts = [max(len(target_tokenizer(word, add_special_tokens=False)["input_ids"]), 1) for word in words]
    stays = kept_words(probabilities, threshold(probabilities, counts, rate=rate) if rate < 1 else -1.0)
    found, before = "", None
    for (start, end), keep in zip(spans, stays, strict=True):
        if keep:
            gap = before is not None and re.search(r"\s", text[before:start]) is not None
            found += " " * gap + text[start:end]
            before = end
    return found


def _probabilities(
    words: Sequence[str], model: Any, tokenizer: Any, reduce: Literal["mean", "first"], max_length: int
) -> list[float]:
    """Of each word, read in chunks that the classifier can take."""
    found: list[float] = []
    limit = max(max_length // 2, 1)
    for start, end in chunks(words, limit):
        part = list(words[start:end])
        encoded = tokenizer(part, is_split_into_words=True, truncation=True, max_length=max_length, return_tensors="pt")
        with torch.no_grad():
            given = {name: encoded[name] for name in ("input_ids", "attention_mask")}
            keep = torch.as_tensor(model(**given).logits)[0].float().softmax(-1)[:, 1].tolist()
        pairs = [(p, word) for p, word in zip(keep, encoded.word_ids(), strict=True) if word is not None]
        seen = sorted({word for _, word in pairs})
        places = [seen.index(word) for _, word in pairs]
        own = word_probabilities([p for p, _ in pairs], places, reduce=reduce)
        read = dict(zip(seen, own, strict=True))
        found += [read.get(place, 1.0) for place in range(len(part))]  # a word without tokens stays
    return found


METHOD = Method(
    title="LLMLingua-2: Data Distillation for Efficient and Faithful Task-Agnostic Prompt Compression",
    paper="arXiv:2403.12968",
    authors="Zhuoshi Pan, Qianhui Wu, Huiqiang Jiang, Menglin Xia, Xufang Luo, Jue Zhang, Qingwei Lin, Victor Rühle, "
    "Yuqing Yang, Chin-Yew Lin, H. Vicky Zhao, Lili Qiu, Dongmei Zhang",
    year=2024,
    summary="A small encoder shortens prompts by leaving out words, taught by a text model's shortenings.",
    bibtex="""@inproceedings{pan2024llmlingua2,
  title = {{LLMLingua}-2: Data Distillation for Efficient and Faithful Task-Agnostic Prompt Compression},
  author = {Pan, Zhuoshi and Wu, Qianhui and Jiang, Huiqiang and Xia, Menglin and Luo, Xufang and Zhang, Jue and
            Lin, Qingwei and R{\\"u}hle, Victor and Yang, Yuqing and Lin, Chin-Yew and Zhao, H. Vicky and
            Qiu, Lili and Zhang, Dongmei},
  booktitle = {Findings of the Association for Computational Linguistics: ACL},
  year = {2024}, eprint = {2403.12968}, archivePrefix = {arXiv}
}""",
    tasks=("token-classification",),
    preparation=llmlingua2,
)
