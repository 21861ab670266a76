"""Generated, translated and transcribed texts against one or several references."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hf_compress.errors import MismatchError

from ._base import ONE_OR_MANY, TEXTS, Offline, needs

ROUGES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class Rouge(Offline):
    """F1 of what a text has in common with its reference, in [0, 1], mean over the rows.

    `rouge1`, `rouge2`: words and pairs of words; `rougeL`: longest common subsequence; `rougeLsum`: the same, line by
    line.

    `references` may hold several texts a row; the one with the highest score counts, for each type. `rouge_types`:
    also other n-grams, e.g. "rouge3". `use_stemmer`: Porter's, for English. `tokenizer`: a function of a text to its
    tokens; without it words of the letters a-z and digits in lower case, so that **other scripts score 0**.
    `use_aggregator=False`: a list of the rows' values. An empty prediction or reference gives 0.

    Lin: ROUGE: A Package for Automatic Evaluation of Summaries, 2004; computed by Google's package rouge-score. The
    online metric gives the median of 1,000 means over resampled rows, which differs by its resampling error.
    """

    INPUTS = "predictions: texts; references: texts, or lists of texts"
    CITATION = """@inproceedings{rouge,
  title = {{ROUGE}: A Package for Automatic Evaluation of Summaries},
  author = {Lin, Chin-Yew},
  booktitle = {Text Summarization Branches Out},
  pages = {74--81},
  year = {2004}
}"""
    FEATURES = ONE_OR_MANY

    def score(
        self,
        *,
        predictions: Sequence[str],
        references: Sequence[str] | Sequence[Sequence[str]],
        rouge_types: Sequence[str] | None = None,
        use_aggregator: bool = True,
        use_stemmer: bool = False,
        tokenizer: Callable[[str], list[str]] | None = None,
    ) -> dict[str, float | list[float]]:
        names = list(rouge_types or ROUGES)
        scorer = needs("rouge", "rouge_score.rouge_scorer", "rouge-score").RougeScorer(
            rouge_types=names, use_stemmer=use_stemmer, tokenizer=tokenizer and _Tokenizer(tokenizer)
        )
        rows = [
            scorer.score_multi(true, given)
            for given, true in zip(predictions, several("rouge", references), strict=True)
        ]
        values = {name: [float(row[name].fmeasure) for row in rows] for name in names}
        return {name: float(np.mean(each)) if use_aggregator else each for name, each in values.items()}


class _Tokenizer:
    """A function as the object that rouge-score calls."""

    def __init__(self, tokenize: Callable[[str], list[str]]) -> None:
        self.tokenize = tokenize


class Sacrebleu(Offline):
    """BLEU of the whole corpus as WMT counts it, `score` in [0, 100].

    With `counts`, `totals` and `precisions` (per cent) of 1- to 4-grams, the brevity penalty `bp` in [0, 1] and the
    lengths `sys_len`, `ref_len` in tokens. Every row has as many references. `tokenize`: "13a" (for None), "zh",
    "intl", "char", "none", or what sacrebleu knows beside these. For single sentences set `use_effective_order`. Empty
    predictions give 0.

    Papineni et al.: BLEU, ACL 2002; Post: A Call for Clarity in Reporting BLEU Scores, WMT 2018, arXiv:1804.08771;
    computed by the package sacrebleu.

    Raises:
        MismatchError: if rows differ in their number of references.
    """

    INPUTS = "predictions: texts; references: texts, or lists of texts"
    CITATION = """@inproceedings{sacrebleu,
  title = {A Call for Clarity in Reporting {BLEU} Scores},
  author = {Post, Matt},
  booktitle = {Proceedings of the Third Conference on Machine Translation: Research Papers},
  pages = {186--191},
  year = {2018}
}"""
    FEATURES = ONE_OR_MANY

    def score(
        self,
        *,
        predictions: Sequence[str],
        references: Sequence[str] | Sequence[Sequence[str]],
        smooth_method: str = "exp",
        smooth_value: float | None = None,
        force: bool = False,
        lowercase: bool = False,
        tokenize: str | None = None,
        use_effective_order: bool = False,
    ) -> dict[str, Any]:
        streams = _streams("sacrebleu", references)
        found = needs("sacrebleu", "sacrebleu", "sacrebleu").corpus_bleu(
            predictions,
            streams,
            smooth_method=smooth_method,
            smooth_value=smooth_value,
            force=force,
            lowercase=lowercase,
            use_effective_order=use_effective_order,
            **({"tokenize": tokenize} if tokenize else {}),
        )
        names = ("score", "counts", "totals", "precisions", "bp", "sys_len", "ref_len")
        return {name: getattr(found, name) for name in names}


class Chrf(Offline):
    """F-score of character n-grams of the whole corpus, `score` in [0, 100]; chrF++ with `word_order=2`.

    With the settings that decide it: `char_order` (6), `word_order` (0), `beta` (2: recall counts twice). Every row has
    as many references. Empty predictions give 0.

    Popović: chrF: character n-gram F-score for automatic MT evaluation, 2015; chrF++, 2017; computed by the package
    sacrebleu.

    Raises:
        MismatchError: if rows differ in their number of references.
    """

    INPUTS = "predictions: texts; references: texts, or lists of texts"
    CITATION = """@inproceedings{chrf,
  title = {chr{F}: character n-gram {F}-score for automatic {MT} evaluation},
  author = {Popovi{\\'c}, Maja},
  booktitle = {Proceedings of the Tenth Workshop on Statistical Machine Translation},
  pages = {392--395},
  year = {2015}
}"""
    FEATURES = ONE_OR_MANY

    def score(
        self,
        *,
        predictions: Sequence[str],
        references: Sequence[str] | Sequence[Sequence[str]],
        char_order: int = 6,
        word_order: int = 0,
        beta: int = 2,
        lowercase: bool = False,
        whitespace: bool = False,
        eps_smoothing: bool = False,
    ) -> dict[str, float]:
        streams = _streams("chrf", references)
        made = needs("chrf", "sacrebleu", "sacrebleu").CHRF(
            char_order=char_order,
            word_order=word_order,
            beta=beta,
            lowercase=lowercase,
            whitespace=whitespace,
            eps_smoothing=eps_smoothing,
        )
        found = made.corpus_score(predictions, streams)
        return {name: getattr(found, name) for name in ("score", "char_order", "word_order", "beta")}


class _ErrorRate(Offline):
    INPUTS = "predictions: transcripts; references: transcripts"
    CITATION = """@inproceedings{wer,
  title = {From {WER} and {RIL} to {MER} and {WIL}: improved evaluation measures for connected speech recognition},
  author = {Morris, Andrew and Maier, Viktoria and Green, Phil},
  booktitle = {Interspeech},
  year = {2004}
}"""
    FEATURES = TEXTS
    UNIT = ""
    JOINT = ""

    def score(self, *, predictions: Sequence[str], references: Sequence[str], concatenate_texts: bool = False) -> float:
        if concatenate_texts:
            predictions, references = [self.JOINT.join(predictions)], [self.JOINT.join(references)]
        process = getattr(needs(self.name, "jiwer", "jiwer"), f"process_{self.UNIT}")
        found = process(list(references), list(predictions))
        true = found.hits + found.substitutions + found.deletions
        if not true:
            raise MismatchError(f"{self.name}: the references hold no {self.UNIT}, so that there is no rate of errors.")
        return float((found.substitutions + found.deletions + found.insertions) / true)


class Wer(_ErrorRate):
    """Words substituted, left out or put in, for each word of the references; at least 0, a plain number as online.

    It is above 1 where many are put in. Texts are compared as they stand: put case and punctuation of both into one
    form first. An empty prediction has left out every word. `concatenate_texts`: aligned as one long text instead of
    row by row.

    Computed by the package jiwer.

    Raises:
        MismatchError: if the references hold no word.
    """

    UNIT, JOINT = "words", " "


class Cer(_ErrorRate):
    """As `wer`, of characters, blanks included; `concatenate_texts` joins without one."""

    UNIT, JOINT = "characters", ""


def several(metric: str, references: Sequence[str] | Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """A list of references for each row, one of one where a text was given."""
    rows = [[row] if isinstance(row, str) else row for row in references]
    if not all(rows):
        raise MismatchError(f"{metric}: row {list(map(bool, rows)).index(False)} has no reference.")
    return rows


def _streams(metric: str, references: Sequence[str] | Sequence[Sequence[str]]) -> list[list[str]]:
    """First references of all rows, second ones, ..., as sacrebleu takes them."""
    rows = several(metric, references)
    counts = set(map(len, rows))
    if len(counts) > 1:
        raise MismatchError(f"{metric}: rows have {min(counts)} to {max(counts)} references, expected equally many.")
    return [list(stream) for stream in zip(*rows, strict=True)]
