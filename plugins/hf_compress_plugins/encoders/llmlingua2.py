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

    server = ChatServer(url="http://127.0.0.1:8000/v1", model="a-chat-model", temperature=0.3)
    teacher = TextTeacher(server, cache="asked", budget=10_000)
    data = llmlingua2(texts, teacher=teacher, tokenizer=tokenizer)
    student = AutoModelForTokenClassification.from_pretrained("a-small-encoder", num_labels=2)
    Trainer(student, args, DataCollatorForTokenClassification(tokenizer), train_dataset=data).train()
    compress_prompt("a long prompt …", student, tokenizer, rate=0.5)

Differences from the authors' code: words come from a regular expression, as they stand, in training and in use (the
code trains on lemmas without commas); chunks are counted in the student's tokens, so that no row is cut; padding and
special tokens have label -100 (the code learns padding as "drop" and shifts the last word's label onto the end token);
chunks with the smallest rate or gap are kept where the percentile is no larger (the code drops all of them); chunks
without a single kept word are dropped. Left out: the choice among several contexts, and dropping forced words that
repeat.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hf_compress.errors import ConfigurationError
from hf_compress.objective import IGNORED
from hf_compress.registry import Method
from hf_compress.taps import evaluating

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

    The smallest values are always kept: where most are equal, as with a good teacher, the percentile is one of them.
    """
    kept = np.arange(len(variation_rates))
    for values in (variation_rates, alignment_gaps):
        if len(kept):
            own = values[kept]
            kept = kept[(own < np.percentile(own, percentile)) | (own == own.min())]
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


def chunks(sizes: Sequence[int], ends: Sequence[bool], limit: int) -> list[tuple[int, int]]:
    """(start, end) of consecutive chunks of words, each ending at the last place where it may, else where it is full.

    Args:
        sizes: tokens of each word; one that is above the limit is a chunk of its own.
        ends: whether a chunk may end after the word, as at a full stop.
        limit: tokens of a chunk, at least 1.
    """
    found, start = [], 0
    while start < len(sizes):
        end, total = start + 1, sizes[start]
        while end < len(sizes) and total + sizes[end] <= limit:
            total += sizes[end]
            end += 1
        if end < len(sizes):
            end = max((place for place in range(start, end) if ends[place]), default=end - 1) + 1
        found.append((start, end))
        start = end
    return found


def joined(text: str, spans: Sequence[tuple[int, int]], stays: Sequence[bool]) -> str:
    """The words that stay; where something was left out or blank between two, a blank, or a line break if one was.

    Args:
        text: what the words are from.
        spans: (start, end) of each word in it.
        stays: which words stay.
    """
    found, before = "", 0
    for (start, end), keep in zip(spans, stays, strict=True):
        if keep:
            gap = "\n" if "\n" in text[before:start] else " "
            found += gap * (start > before and found != "") + text[start:end]
            before = end
    return found


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """A part of a text, with the words that it consists of."""

    text: str
    words: list[str]


def _cut(text: str, tokenizer: Any, max_length: int) -> list[_Chunk]:
    """The text in chunks that a token classifier can read whole."""
    spans = [match.span() for match in WORD.finditer(text)]
    words = [text[start:end] for start, end in spans]
    limit = max_length - tokenizer.num_special_tokens_to_add(pair=False)
    if limit < 1:
        raise ConfigurationError(f"llmlingua2: max_length={max_length} leaves no room beside the special tokens.")
    between = [text[end:start] for (_, end), (start, _) in pairwise(spans)]
    ends = [word == "." or "\n" in gap for word, gap in zip(words, [*between, ""], strict=False)]
    return [
        _Chunk(text=text[spans[start][0] : spans[end - 1][1]], words=words[start:end])
        for start, end in chunks(_sizes(words, tokenizer), ends, limit)
    ]


def _sizes(words: Sequence[str], tokenizer: Any) -> list[int]:
    """Tokens of each word."""
    if not words:
        return []
    if not tokenizer.is_fast:
        raise ConfigurationError(
            f"llmlingua2: {type(tokenizer).__name__} does not tell which word a token is of. Pass a fast tokenizer."
        )
    encoded = tokenizer(
        list(words), is_split_into_words=True, add_special_tokens=False, truncation=False, padding=False, verbose=False
    )
    counts = Counter(encoded.word_ids())
    return [counts[place] for place in range(len(words))]


def llmlingua2(
    dataset: Iterable[Mapping[str, Any]],
    *,
    teacher: Callable[[Sequence[str]], list[str]],
    tokenizer: Any,
    column: str = "text",
    max_length: int = 512,
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
        max_length: tokens of a row at most, special ones included; longer texts become several rows.
        window: W of the annotation.
        percentile: of both controls, 0 … 100.
        instruction: what stands before each chunk.

    Returns:
        input_ids, attention_mask and labels (-100 on special tokens), and the chunk's rates.

    Raises:
        ConfigurationError: if no text has a word, nothing passes the controls, or a setting is out of range.
        TeacherError: from the teacher; what it has answered is in its cache.
    """
    if window < 1 or not 0 <= percentile <= 100:
        raise ConfigurationError(
            f"llmlingua2: window must be above 0 and percentile in 0 … 100, got {window} and {percentile}."
        )
    originals = [chunk for row in dataset for chunk in _cut(row[column], tokenizer, max_length)]
    if not originals:
        raise ConfigurationError(f"llmlingua2: column {column!r} has no words.")
    answers = teacher([instruction + chunk.text for chunk in originals])
    found = [
        annotate(chunk.words, WORD.findall(answer), window=window)
        for chunk, answer in zip(originals, answers, strict=True)
    ]
    kept = well_aligned(
        np.array([one.variation_rate for one in found]),
        np.array([one.alignment_gap for one in found]),
        percentile=percentile,
    )
    rows = [
        _encode(originals[place].words, found[place], tokenizer, max_length)
        for place in kept
        if any(found[place].labels)
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
    """The text without its least telling words: what is left are words of the text in their order, none new.

    Args:
        text: a prompt.
        model: a token classifier whose label 1 says that a word stays; torch, or of `load_onnx`.
        tokenizer: its own, a fast one.
        rate: part of the words that is to stay (of the target's tokens with `target_tokenizer`), 0 … 1.
        force: words that always stay, e.g. (".", "?"); further ones make room.
        keep_digits: words with a digit always stay.
        reduce: how a word's probability comes from its tokens'.
        target_tokenizer: of the model that the prompt is for.
        max_length: tokens that the classifier reads at once, special ones included.

    Raises:
        ConfigurationError: if the rate is not in 0 … 1, or the classifier has other than two labels.
    """
    if not 0 <= rate <= 1:
        raise ConfigurationError(f"llmlingua2: rate must lie in 0 … 1, got {rate}.")
    spans = [match.span() for match in WORD.finditer(text)]
    words = [text[start:end] for start, end in spans]
    if not words:
        return ""
    probabilities = [
        1.0 if word in force or (keep_digits and re.search(r"\d", word)) else probability
        for word, probability in zip(words, _probabilities(text, model, tokenizer, reduce, max_length), strict=True)
    ]
    counts = [1] * len(words)
    if target_tokenizer is not None:
        counts = [max(len(target_tokenizer(word, add_special_tokens=False)["input_ids"]), 1) for word in words]
    limit = threshold(probabilities, counts, rate=rate) if rate < 1 else -1.0
    return joined(text, spans, kept_words(probabilities, limit))


def _probabilities(
    text: str, model: Any, tokenizer: Any, reduce: Literal["mean", "first"], max_length: int
) -> list[float]:
    """Of each word, read in chunks that the classifier can take."""
    found: list[float] = []
    with evaluating(model) if isinstance(model, nn.Module) else nullcontext(), torch.no_grad():
        for chunk in _cut(text, tokenizer, max_length):
            found += _of_chunk(chunk.words, model, tokenizer, reduce, max_length)
    return found


def _of_chunk(
    words: list[str], model: Any, tokenizer: Any, reduce: Literal["mean", "first"], max_length: int
) -> list[float]:
    encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length, return_tensors="pt")
    device = getattr(model, "device", "cpu")
    given = {name: encoded[name].to(device) for name in ("input_ids", "attention_mask")}
    logits = torch.as_tensor(model(**given).logits)[0].float()
    if logits.shape[-1] != 2:
        raise ConfigurationError(
            f"llmlingua2: the classifier has {logits.shape[-1]} labels, not two. Load it with num_labels=2."
        )
    keep = logits.softmax(-1)[:, 1].tolist()
    pairs = [(p, word) for p, word in zip(keep, encoded.word_ids(), strict=True) if word is not None]
    known = sorted({word for _, word in pairs})
    places = [known.index(word) for _, word in pairs]
    read = dict(zip(known, word_probabilities([p for p, _ in pairs], places, reduce=reduce), strict=True))
    return [read.get(place, 1.0) for place in range(len(words))]  # one that has no token, as a control sign, stays


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
    algorithm=("supervised",),
    knowledge=("labelling",),
    tasks=("token-classification",),
    preparation=llmlingua2,
)
