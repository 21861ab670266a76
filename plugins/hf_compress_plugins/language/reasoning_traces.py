"""Reasoning traces of several teachers, verified, cleaned and described, so that the better source can be chosen.

Tian, Ji, Wang, Chen, Zhao, Peng, Zhao, Li: Not All Correct Answers Are Equal: Why Your Distillation Source Matters,
2025, arXiv:2505.14464.

    1. queries: repeated, empty or unfinished ones, those with addresses or tables, and those of other scripts leave
    2. queries of an evaluation leave: equal but for case and white space, or with a cosine above 0.9
    3. each source answers each query until a verifier of its category gives 0.9 or more, or its tries are used up;
       an answer whose thinking is not closed, or that was cut, has failed
    4. 20 tokens in a row that occur more than 20 times in a source's answers are a template: they are cut out, and
       what is left is verified again
    5. of each answer its tokens and its perplexity under one scorer; above a source's limit it leaves
    6. a source is chosen by them: equally right sources differ in what a student learns of them, and the paper's best
       one had the lowest perplexity and the largest spread of lengths

    data = reasoning_traces(
        queries,                                            # columns: query, category, reference or tests
        sources=[Source(name="a", teacher=ChatServer(url=…, model="a", temperature=0.6), licence="mit"),
                 Source(name="b", teacher=Sampled(model, tokenizer, max_new_tokens=4096), licence="apache-2.0")],
        folder="traces", evaluation=test["query"], scorer=Scorer(strong, its_tokenizer, name="strong"),
    )
    best = choose(data)
    train = data.filter(lambda row: row["source"] == best)

Every try is a line of `folder/<source>.jsonl` as soon as it is verified, and every perplexity one of `scored.jsonl`, so
that a killed collection goes on where it was. `folder/report.json` says of each source how many tries the queries took:
to ask until an answer is right favours easy queries and lucky chains. What training on the rows means for attention
where they are packed is the trainer's: it must not look across rows.

[reconstruction] The paper does not say how often a query is asked (`most_tries`), what part of other scripts is too
much, how perplexity limits were found, or whether a template's text or its answers leave. Maths are compared as
numbers; its symbolic answers, and science, instruction following and chat, which the paper gives to models as judges,
need verifiers of the user's.
"""

from __future__ import annotations

import json
import logging
import math
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median, pstdev
from typing import Any, Literal

import datasets

from hf_compress import facts, files
from hf_compress.bars import shown
from hf_compress.errors import ConfigurationError, UnknownNameError
from hf_compress.registry import Method
from hf_compress_plugins.language._trace_filters import (
    GRAM,
    MOST_UNICODE,
    TIMES,
    Embed,
    filter_queries,
    template_grams,
    without_templates,
)
from hf_compress_plugins.language._trace_sources import Lines, Reply, seed_of
from hf_compress_plugins.language._trace_sources import Sampled as Sampled
from hf_compress_plugins.language._trace_sources import Scorer as Scorer
from hf_compress_plugins.language._trace_sources import Source as Source
from hf_compress_plugins.language._verifiers import VERIFIERS, Verifier

logger = logging.getLogger(__name__)

By = Literal["perplexity", "spread"]


@dataclass(frozen=True, kw_only=True)
class TracesConfig:
    """Hyper-parameters of the collection."""

    threshold: float = 0.9
    """Score from which an answer is taken, 0 … 1. The paper's."""
    most_tries: int = 8
    """Of a query with each source. Ours: the paper gives none."""
    thinking: tuple[str, str] | None = ("<think>", "</think>")
    """What opens and closes the thinking; what stands behind it is verified. None: all is answer."""
    needs_thinking: bool = False
    """Whether an answer without closed thinking has failed, as where a chat template opens it itself."""
    gram: int = GRAM
    """Tokens of a template. The paper's."""
    times: int = TIMES
    """How often as many tokens may occur. The paper's."""
    most_unicode: float = MOST_UNICODE
    """Part of a query's characters that may lie outside of ASCII, 0 … 1. Ours."""
    most_perplexity: Mapping[str, float] = field(default_factory=dict)
    """Limit by source, as scorers like their own kin best; none for a source that is not named."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1 or not 0 <= self.most_unicode <= 1:
            raise ConfigurationError(
                "reasoning_traces: threshold must lie in (0, 1] and most_unicode in 0 … 1, got "
                f"{self.threshold} and {self.most_unicode}."
            )
        if min(self.most_tries, self.gram, self.times) < 1:
            raise ConfigurationError(
                "reasoning_traces: most_tries, gram and times must be at least 1, got "
                f"{self.most_tries}, {self.gram} and {self.times}."
            )


def final_part(text: str, config: TracesConfig) -> str | None:
    """What an answer says behind its thinking; None where its thinking is not closed, or there is nothing behind it."""
    if config.thinking is None:
        return text.strip() or None
    opened, closed = (text.count(mark) for mark in config.thinking)
    if opened > closed or (config.needs_thinking and not closed):
        return None
    return text.rpartition(config.thinking[1])[2].strip() or None


def verify(reply: Reply, row: Mapping[str, Any], verifier: Verifier, config: TracesConfig) -> float:
    """The score of an answer, 0 … 1; 0 for one that was cut or has no final part.

    Raises:
        ConfigurationError: if the verifier gives something else.
    """
    part = final_part(reply.text, config) if reply.finished else None
    if part is None:
        return 0.0
    score = float(verifier(part, row))
    if not 0 <= score <= 1:
        raise ConfigurationError(
            f"reasoning_traces: the verifier of {row.get('category')!r} gave {score}; it must lie in 0 … 1."
        )
    return score


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What is known of one source's answers."""

    answers: int
    tries: float
    """Mean of the queries that were answered."""
    score: float
    """Mean."""
    length: float
    """Mean tokens of an answer."""
    spread: float
    """Standard deviation of the tokens."""
    perplexity: float | None
    """Mean over answers; None without a scorer."""
    median_perplexity: float | None


def statistics(data: datasets.Dataset, *, common: bool = True) -> dict[str, Statistics]:
    """Statistics by source.

    Args:
        data: of `reasoning_traces`.
        common: over the queries that all sources have answered: others would compare their difficulty too.
    """
    rows = list(data)
    names = list(dict.fromkeys(row["source"] for row in rows))
    asked = [{row["query_id"] for row in rows if row["source"] == name} for name in names]
    every = set.intersection(*asked) if asked and common else set().union(*asked)
    found = {}
    for name in names:
        own = [row for row in rows if row["source"] == name and row["query_id"] in every]
        perplexities = [row["perplexity"] for row in own if row["perplexity"] is not None]
        lengths = [row["tokens"] for row in own]
        found[name] = Statistics(
            answers=len(own),
            tries=mean(row["tries"] for row in own) if own else 0.0,
            score=mean(row["score"] for row in own) if own else 0.0,
            length=mean(lengths) if own else 0.0,
            spread=pstdev(lengths) if own else 0.0,
            perplexity=mean(perplexities) if perplexities else None,
            median_perplexity=median(perplexities) if perplexities else None,
        )
    return found


def choose(data: datasets.Dataset, *, by: By = "perplexity") -> str:
    """The source to learn from: that of the lowest mean perplexity, or of the largest spread of lengths.

    Args:
        data: of `reasoning_traces`, with a scorer; compared are the queries that all sources have answered.
        by: what decides; where two are equal the other one does.

    Raises:
        ConfigurationError: if there is nothing to compare.
    """
    found = statistics(data)
    if not found or not all(one.answers for one in found.values()):
        raise ConfigurationError(
            f"reasoning_traces: no query was answered by all of {sorted(found)}, so they cannot be compared. Raise "
            "most_tries, or leave out the source that answers least."
        )
    if by == "perplexity" and any(one.perplexity is None for one in found.values()):
        raise ConfigurationError("reasoning_traces: choosing by perplexity needs reasoning_traces(scorer=…).")

    def rank(name: str) -> tuple[float, float]:
        perplexity, spread = found[name].perplexity or 0.0, -found[name].spread
        return (perplexity, spread) if by == "perplexity" else (spread, perplexity)

    return min(found, key=rank)


@dataclass(frozen=True, kw_only=True)
class _Query:
    """One row of the data, by its content."""

    key: str
    text: str
    row: Mapping[str, Any]
    verifier: Verifier


def _collect(
    queries: Sequence[_Query], source: Source, lines: Lines, config: TracesConfig, seed: int, *, bar: bool
) -> dict[str, list[dict[str, Any]]]:
    """The tries of each query in order, up to the first that is taken."""
    tries: dict[str, list[dict[str, Any]]] = {query.key: [] for query in queries}
    for row in lines.rows:
        tries.setdefault(row["query"], []).append(row)
    lock = threading.Lock()

    def solved(query: _Query, before: int) -> bool:
        return any(row["score"] >= config.threshold for row in tries[query.key][:before])

    done: set[str] = set()
    with shown(f"answers of {source.name}", len(queries), bar=bar) as advance:

        def tell(key: str) -> None:
            if key not in done:
                done.add(key)
                advance()

        for number in range(config.most_tries):
            asked = [query for query in queries if not solved(query, number)]
            for key in {query.key for query in queries} - {query.key for query in asked}:
                tell(key)

            def keep(place: int, reply: Reply, asked: Sequence[_Query] = asked, number: int = number) -> None:
                query = asked[place]
                score = verify(reply, query.row, query.verifier, config)
                row = {"query": query.key, "try": number + 1, "score": score, **asdict(reply)}
                with lock:
                    lines.add([row])
                    tries[query.key].append(row)
                    if score >= config.threshold:
                        tell(query.key)

            wanted = [place for place, query in enumerate(asked) if len(tries[query.key]) <= number]
            source.ask([query.text for query in asked], wanted, seed=seed_of(seed, source.name, number), keep=keep)
    return tries


def _taken(
    queries: Sequence[_Query],
    source: Source,
    tries: Mapping[str, Sequence[Mapping[str, Any]]],
    config: TracesConfig,
    lost: Counter[str],
) -> list[dict[str, Any]]:
    """The first verified answer of each query, without templates."""
    found: list[tuple[_Query, Mapping[str, Any]]] = []
    for query in queries:
        right = next((row for row in tries[query.key] if row["score"] >= config.threshold), None)
        if right is None:
            lost["never verified"] += 1
        else:
            found.append((query, right))
    grams = template_grams((row["text"] for _, row in found), size=config.gram, times=config.times)
    rows = []
    for query, right in found:
        text, score = without_templates(right["text"], grams, size=config.gram), right["score"]
        if text != right["text"]:
            lost["cut, a template in it"] += 1
            score = verify(Reply(text=text), query.row, query.verifier, config)
            if score < config.threshold:
                lost["wrong without its template"] += 1
                continue
        about = {"source": source.name, "licence": source.licence, "tries": right["try"], "score": score}
        rows.append({**query.row, "query_id": query.key, "answer": text, **about})
    return rows


def _score(rows: list[dict[str, Any]], scorer: Scorer | None, lines: Lines, column: str, *, bar: bool) -> None:
    """Puts tokens (words without a scorer) and perplexity into the rows."""
    if scorer is None:
        for row in rows:
            row |= {"tokens": len(row["answer"].split()), "perplexity": None}
        return
    known = {line["answer"]: line for line in lines.rows}
    keys = [facts.fingerprint([[scorer.name, row[column], row["answer"]]]) for row in rows]
    missing = {key: (row[column], row["answer"]) for key, row in zip(keys, rows, strict=True) if key not in known}
    order = sorted(missing, key=lambda key: len(missing[key][1]))  # of one length together: little padding
    with shown(f"perplexity by {scorer.name}", len(order), bar=bar) as advance:
        for start in range(0, len(order), scorer.batch):
            part = order[start : start + scorer.batch]
            values = scorer([missing[key] for key in part])
            new = [{"answer": key, "tokens": n, "nats": nats} for key, (n, nats) in zip(part, values, strict=True)]
            lines.add(new)
            known |= {line["answer"]: line for line in new}
            for _ in part:
                advance()
    for key, row in zip(keys, rows, strict=True):
        row |= {"tokens": known[key]["tokens"], "perplexity": math.exp(known[key]["nats"])}


def _queries(dataset: Any, places: Sequence[int], verifiers: Mapping[str, Verifier], column: str) -> list[_Query]:
    found = []
    for place in places:
        row = dataset[place]
        found.append(
            _Query(key=facts.fingerprint([row]), text=row[column], row=row, verifier=verifiers[row["category"]])
        )
    return found


def reasoning_traces(
    dataset: Any,
    *,
    sources: Sequence[Source],
    folder: Path | str,
    evaluation: Sequence[str] = (),
    embed: Embed | None = None,
    verifiers: Mapping[str, Verifier] | None = None,
    scorer: Scorer | None = None,
    config: TracesConfig | None = None,
    column: str = "query",
    seed: int = 0,
    progress: bool = True,
) -> datasets.Dataset:
    """Verified answers of each source to the queries.

    Args:
        dataset: a `datasets.Dataset` with queries in `column`, a "category" that has a verifier, and what that reads:
            "reference" of mathematics and exact, "tests" of code.
        sources: who answers, one after the other.
        folder: where every try is kept; a second call goes on there. One process at a time.
        evaluation: queries that must not be trained on.
        embed: finds those that are near to one of them; None: equal ones alone.
        verifiers: by category, beside mathematics, exact and code, or instead of them.
        scorer: gives perplexities; None: there are none, and lengths are words.
        config: None: the defaults.
        column: name of the queries.
        seed: of the samples of models that run here.
        progress: whether bars are shown.

    Returns:
        For each source a row for each query that it has answered: the data set's columns, `query_id`, `answer`,
        `source`, `licence`, `tries`, `score`, `tokens` and `perplexity`. Its info names the licences.

    Raises:
        UnknownNameError: for a category without a verifier; nothing is asked.
        ConfigurationError: if two sources have one name, or nothing was answered.
        TeacherError: if a source does not answer; what came is kept.
        ForeignFileError: if a file of the folder is damaged.
    """
    config, folder = config or TracesConfig(), Path(folder)
    known = {**VERIFIERS, **(verifiers or {})}
    names = [source.name for source in sources]
    if not names or len(set(names)) < len(names):
        raise ConfigurationError(f"reasoning_traces: sources must have names of their own, got {names}.")
    if lacking := sorted({column, "category"} - set(dataset.column_names)):
        raise ConfigurationError(f"reasoning_traces: the data has no column {lacking}; it has {dataset.column_names}.")
    for category in sorted(set(dataset["category"])):
        if category not in known:
            raise UnknownNameError("verifier of the category", category, known)
    places, filtered = filter_queries(
        dataset[column][:], evaluation=evaluation, embed=embed, most_unicode=config.most_unicode
    )
    logger.info("reasoning_traces: %d of %d queries stay; left out: %s", len(places), len(dataset), filtered or "none")
    queries = _queries(dataset, places, known, column)
    found: list[dict[str, Any]] = []
    report: dict[str, Any] = {"queries": len(queries), "left_out": filtered, "sources": {}}
    for source in sources:
        lost: Counter[str] = Counter()
        lines = Lines(folder / f"{source.name}.jsonl", "query", "try", "score", "text", "finished")
        tries = _collect(queries, source, lines, config, seed, bar=progress)
        rows = _taken(queries, source, tries, config, lost)
        _score(rows, scorer, Lines(folder / "scored.jsonl", "answer", "tokens", "nats"), column, bar=progress)
        limit = config.most_perplexity.get(source.name, math.inf)
        kept = [row for row in rows if row["perplexity"] is None or row["perplexity"] <= limit]
        lost["above its perplexity"] = len(rows) - len(kept)
        found += kept
        asked = [len(tries[query.key]) for query in queries]
        cut = sum(not row["finished"] for query in queries for row in tries[query.key])
        report["sources"][source.name] = {
            "licence": source.licence,
            "answers": len(kept),
            "left_out": {reason: count for reason, count in lost.items() if count},
            "queries_by_tries": {str(number): asked.count(number) for number in sorted(set(asked))},
            "tries_cut": cut,
        }
        logger.info("reasoning_traces: %s: %s", source.name, report["sources"][source.name])
    made = datasets.Dataset.from_list(found)
    for name, told in (statistics(made, common=False) if found else {}).items():
        report["sources"][name] |= {"scorer": None if scorer is None else scorer.name, **asdict(told)}
    files.write_text(folder / "report.json", json.dumps(report, indent=1) + "\n")
    if not found:
        raise ConfigurationError(f"reasoning_traces: no answer of {names} is left: {json.dumps(report)}")
    made.info.license = ", ".join(sorted({source.licence or "unknown" for source in sources}))
    made.info.description = f"Answers of {', '.join(names)}, verified at {config.threshold} (arXiv:2505.14464)."
    return made


METHOD = Method(
    title="Not All Correct Answers Are Equal: Why Your Distillation Source Matters",
    paper="arXiv:2505.14464",
    authors="Xiaoyu Tian, Yunjie Ji, Haotian Wang, Shuaiting Chen, Sitong Zhao, Yiping Peng, Han Zhao, Xiangang Li",
    year=2025,
    summary="Collects verified reasoning traces of several teachers and tells by length and perplexity whose to learn.",
    bibtex="""@misc{tian2025not,
  title = {Not All Correct Answers Are Equal: Why Your Distillation Source Matters},
  author = {Tian, Xiaoyu and Ji, Yunjie and Wang, Haotian and Chen, Shuaiting and Zhao, Sitong and Peng, Yiping and
            Zhao, Han and Li, Xiangang},
  year = {2025}, eprint = {2505.14464}, archivePrefix = {arXiv}
}""",
    algorithm=("supervised",),
    knowledge=("labelling", "curation"),
    tasks=("text-generation",),
    preparation=reasoning_traces,
)
