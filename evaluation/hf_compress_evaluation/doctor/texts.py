"""What texts, labels and tokenizers show: duplicates, classes, truncation, unknown tokens. No text is ever told."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_compress import foreign
from hf_compress.objective import IGNORED

from .findings import Finding, graded, judged, not_looked_at

COPIED, MOSTLY_COPIED = 0.01, 0.1
"""Test rows that are training rows too. One in a hundred moves an accuracy by less than most intervals are wide; one
in ten decides which of two models looks better."""
CUT, MOSTLY_CUT = 0.05, 0.25
"""Rows of which tokens are cut off: neither model sees the rest, and the teacher may have been trained with it."""
UNKNOWN, MOSTLY_UNKNOWN = 0.01, 0.1
"""Tokens that the tokenizer does not know. A subword vocabulary of the right language has next to none."""
LOPSIDED = 0.9
"""Share of one class from which accuracy says little."""
COMPARED = 200
"""Texts that both tokenizers read."""


def tokenizers(student: Any, teacher: Any, texts: Sequence[str], *, shared: bool) -> Finding:
    """Whether both make the same ids of some texts.

    Args:
        student, teacher: tokenizers.
        texts: some; the first `COMPARED` are read.
        shared: the teacher was given the student's ids, as methods do that do not say otherwise.
    """
    read = list(texts[:COMPARED])
    with foreign.encoding(student):
        own = student(read, verbose=False)["input_ids"]
    with foreign.encoding(teacher):
        other = teacher(read, verbose=False)["input_ids"]
    apart = sum(a != b for a, b in zip(own, other, strict=True))
    return judged(
        "tokenizers", "bad" if apart and shared else "ok", of=f"token ids of {len(read)} texts from both",
        figure=f"{apart} of {len(read)} texts differ{'' if shared else ', and the teacher read ids of its own'}",
        values={"texts": len(read), "different": apart},
        meaning="The teacher was given the student's token ids, which stand for other words in its vocabulary.",
        remedy="Use the teacher's tokenizer, or a method for other tokens (alm).",
    )  # fmt: skip


def tokens(tokenizer: Any, texts: Sequence[str], limit: int, where: str) -> list[Finding]:
    """How many rows are longer than what is kept, and how many tokens are unknown.

    Args:
        tokenizer: the student's.
        texts: at least one.
        limit: tokens kept of a row, special ones included.
        where: which rows, in words.
    """
    with foreign.encoding(tokenizer):
        ids = tokenizer(list(texts), verbose=False)["input_ids"]
    lengths = np.array([len(row) for row in ids])
    cut = float((lengths > limit).mean())
    truncated = judged(
        "truncation", graded(cut, CUT, MOSTLY_CUT), of=f"{len(ids)} {where} rows at {limit} tokens",
        figure=f"{cut:.1%} of the rows are longer, the longest has {int(lengths.max())} tokens",
        values={"rows": len(ids), "limit": limit, "fraction": cut, "longest": int(lengths.max())},
        meaning="What is cut off neither of the two models sees.",
        remedy="Raise max_length as far as both models take it, or split the texts.",
    )  # fmt: skip
    if (unknown := getattr(tokenizer, "unk_token_id", None)) is None:
        return [truncated]  # byte-level: every text has its tokens
    total = max(int(lengths.sum()), 1)
    share = sum(row.count(unknown) for row in ids) / total
    odd = judged(
        "unknown tokens", graded(share, UNKNOWN, MOSTLY_UNKNOWN), of=f"{total} tokens of {len(ids)} {where} rows",
        figure=f"{share:.2%} are the unknown token", values={"tokens": total, "fraction": share},
        meaning="Words outside the vocabulary look all the same to both models.",
        remedy="Take a tokenizer and models of the texts' language, case and script.",
    )  # fmt: skip
    return [truncated, odd]


def duplicates(training: Sequence[str], test: Sequence[str]) -> Finding:
    """Test rows that are training rows too, but for case and white space."""
    known = {_key(text) for text in training}
    copied = sum(_key(text) in known for text in test)
    share = copied / len(test)
    return judged(
        "duplicates", graded(share, COPIED, MOSTLY_COPIED),
        of=f"{len(test)} test rows among {len(training)} training rows",
        figure=f"{copied} of {len(test)} test rows are training rows too",
        values={"test_rows": len(test), "copied": copied, "fraction": share, "training_rows": len(training)},
        meaning="Test scores count what was learned by heart, which favours the larger model.",
        remedy="Take those rows out of the training rows and train again.",
    )  # fmt: skip


def _key(text: str) -> bytes:
    return hashlib.blake2b(" ".join(text.lower().split()).encode("utf-8", "backslashreplace"), digest_size=16).digest()


def classes(labels: NDArray[np.int64], count: int) -> Finding:
    """How the labels of the training rows are spread over the classes."""
    known = labels[labels != IGNORED]
    if not len(known):
        return not_looked_at("classes", "give training rows with labels: --data train.csv")
    counts = np.bincount(known, minlength=count)
    empty, share = int((counts == 0).sum()), float(counts.max() / len(known))
    values = {"rows": len(known), "classes": count, "empty": empty, "largest": share, "smallest": int(counts.min())}
    constant = "A constant is right as often as its share."
    return judged(
        "classes", "look" if empty or share > LOPSIDED else "ok", of=f"labels of {len(known)} training rows",
        figure=f"largest class {share:.1%}, smallest {int(counts.min())} rows, {empty} of {count} without a row",
        values=values,
        meaning="A class without a row is learned from the teacher alone." if empty else constant,
        remedy="Add rows of the rare classes, and look at macro-F1 instead of accuracy.",
    )  # fmt: skip


def labelled(rows: int, with_label: int, *, task_weight: float | None, where: str) -> Finding:
    """How many of the training rows have a label, and whether the loss on labels had any to learn from."""
    weight = task_weight or 0.0
    return judged(
        "labelled rows", "look" if with_label == 0 and weight else "ok", of=where,
        figure=f"{with_label} of {rows} rows have a label", values={"rows": rows, "labelled": with_label},
        meaning=f"The task's own loss has weight {weight:g} and no row to count on.",
        remedy="Check the name of the label column, or leave the task's own loss out.",
    )  # fmt: skip
