"""Reasoning traces: verifiers, filters, a collection that asks again, goes on after a kill and loses nothing."""

from __future__ import annotations

import json
import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from chat import serving
from datasets import Dataset
from hf_compress_plugins.language import _trace_filters, _trace_sources, _verifiers
from hf_compress_plugins.language import reasoning_traces as module
from hf_compress_plugins.language._trace_filters import (
    filter_queries,
    similarity,
    template_grams,
    unfit,
    without_templates,
)
from hf_compress_plugins.language._trace_sources import Reply, Sampled, Scorer, Source
from hf_compress_plugins.language._verifiers import code, exact, final_number, mathematics
from hf_compress_plugins.language.reasoning_traces import (
    TracesConfig,
    choose,
    final_part,
    reasoning_traces,
    statistics,
    verify,
)
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_compress.errors import (
    ConfigurationError,
    ForeignFileError,
    MismatchError,
    TeacherError,
    TruncatedError,
    UnknownNameError,
)
from hf_compress.teachers.text import ChatServer

# ---------------------------------------------------------------------- verifiers


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("37*24 = 888", 888),
        ("so it is 1,234.50.", Fraction("1234.5")),
        ("10-3=7 and 7-10 = -3", -3),
        ("the step 9-4", 4),
        (r"thus \boxed{\frac{3}{4}}, not 7", Fraction(3, 4)),
        (r"\boxed{{12}} 5", 12),
        ("a half, 1/2", Fraction(1, 2)),
        ("x = .5", Fraction(1, 2)),
        ("−5", -5),
        ("none", None),
    ],
)
def test_the_final_number_is_read(text: str, number: Fraction | int | None) -> None:
    assert final_number(text) == number


def test_maths_are_compared_as_numbers_and_texts_but_for_case_and_space() -> None:
    row = {"reference": "0.5"}
    assert mathematics("it is 1/2", row) == 1.0
    assert mathematics("it is 0.51", row) == 0.0
    assert mathematics("nothing", row) == 0.0
    assert exact(" New\n york", {"reference": "New York"}) == 1.0
    assert exact("York", {"reference": "New York"}) == 0.0
    with pytest.raises(ConfigurationError, match="holds no number"):
        mathematics("1", {"reference": "x"})


PROGRAM = (
    "```python\nimport sys\nn = int(sys.stdin.read() or 0)\n\ndef twice(x):\n    return 2 * x\n\nprint(twice(n))\n```"
)


def test_a_program_scores_the_part_of_its_tests_that_it_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    tests = [{"input": "3", "output": "6\n"}, {"input": "4", "output": "9"}, {"assert": "assert twice(5) == 10"}]
    assert code(f"First wrong.\n```python\nraise SystemExit(1)\n```\nThen:\n{PROGRAM}", {"tests": tests}) == 2 / 3
    monkeypatch.setattr(_verifiers, "SECONDS", 1.0)
    monkeypatch.setattr(_verifiers, "MEMORY", 128 * 2**20)
    for bad in ("while True: pass", "x = bytearray(2**30)\nprint(1)", "print('1' * 2**22)"):
        assert code(bad, {"tests": [{"input": "", "output": "1"}]}) == 0.0
    with pytest.raises(ConfigurationError, match="no tests"):
        code(PROGRAM, {"tests": []})


def test_thinking_that_is_not_closed_has_failed() -> None:
    config, row = TracesConfig(), {"reference": "4", "category": "mathematics"}
    assert final_part("<think>5?</think> 4 ", config) == "4"
    assert final_part("4", config) == "4"
    assert final_part("<think>4", config) is None
    assert final_part("<think>4</think>", config) is None
    assert final_part("4", TracesConfig(needs_thinking=True)) is None
    assert final_part("<think>4", TracesConfig(thinking=None)) == "<think>4"
    assert verify(Reply(text="<think>4"), row, mathematics, config) == 0.0
    assert verify(Reply(text="4", finished=False), row, mathematics, config) == 0.0
    assert verify(Reply(text="<think>5</think>4"), row, mathematics, config) == 1.0
    with pytest.raises(ConfigurationError, match=r"'mathematics' gave 2\.0"):
        verify(Reply(text="4"), row, lambda *_: 2.0, config)


# ---------------------------------------------------------------------- filters


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("What is 2+2?", None),
        ("  ", "empty"),
        ("Sum the numbers in (", "incomplete"),
        ("Mend this:\n```python\nx", "incomplete"),
        ("See https://a.b/c for it.", "url"),
        ("a | b\n--- | ---\n1 | 2", "table"),
        ("Is a|b the same as b|a?", None),
        ("计算二加二等于多少", "unicode"),
    ],
)
def test_queries_that_are_unfit(query: str, reason: str | None) -> None:
    assert unfit(query) == reason
    assert unfit("计算二加二等于多少", most_unicode=1.0) is None


def test_an_evaluation_s_queries_leave_also_in_another_spelling() -> None:
    queries = ["One plus one?", "Two plus two?", "Two plus two?", "one  PLUS\nthree?", "Three and four?"]
    kept, reasons = filter_queries(queries, evaluation=["One plus three?"])
    assert kept == [0, 1, 4]
    assert reasons == {"repeated": 1, "evaluation": 1}


def test_near_queries_leave_above_the_cosine() -> None:
    vectors = {
        "a": [2.0, 0.0],
        "b": [0.9, math.sqrt(1 - 0.81) + 1e-3],
        "c": [0.91, math.sqrt(1 - 0.91**2)],
        "e": [3, 0],
    }
    kept, reasons = filter_queries(["a", "b", "c"], evaluation=["e"], embed=lambda texts: [vectors[t] for t in texts])
    assert kept == [1]
    assert reasons == {"near an evaluation": 2}
    with pytest.raises(MismatchError, match="one dim"):
        similarity(np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(MismatchError, match="not finite"):
        similarity(np.full((1, 2), np.nan), np.ones((1, 2)))


def test_twenty_tokens_that_occur_twenty_one_times_are_removed_and_twenty_times_kept() -> None:
    template, rare = (" ".join(f"{mark}{n}" for n in range(20)) for mark in "tr")
    texts = [f"start{n} {template} end{n}" for n in range(21)] + [f"begin{n} {rare} stop{n}" for n in range(20)]
    grams = template_grams(texts)
    assert grams == {tuple(template.split())}
    assert without_templates(texts[3], grams) == "start3 end3"
    assert without_templates(texts[30], grams) == texts[30]
    inside = template_grams([" ".join(["so"] * 40)])
    assert inside == {("so",) * 20}
    assert without_templates(f"{' '.join(['so'] * 40)} 7", inside) == "7"


# ---------------------------------------------------------------------- a collection


def queries(count: int = 4) -> Dataset:
    rows = [{"query": f"{n}+{n}=", "category": "mathematics", "reference": str(2 * n)} for n in range(count)]
    return Dataset.from_list(rows)


class Answers:
    """Answers sums from the n-th try on, wrongly before; keeps what it was asked."""

    def __init__(self, right_from: Mapping[str, int] | int = 1, form: str = "<think>well</think>{}") -> None:
        self.right_from, self.form = right_from, form
        self.asked: Counter[str] = Counter()
        self.lock = threading.Lock()

    def __call__(self, prompt: str) -> str:
        with self.lock:
            self.asked[prompt] += 1
            number = self.asked[prompt]
        right = self.right_from if isinstance(self.right_from, int) else self.right_from.get(prompt, 1)
        value = 2 * int(prompt.partition("+")[0]) + (number < right)
        return self.form.format(value)


def collect(folder: Path, *sources: Source, data: Dataset | None = None, **settings: Any) -> Dataset:
    return reasoning_traces(
        queries() if data is None else data, sources=sources, folder=folder, progress=False, **settings
    )


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def test_a_wrong_answer_is_asked_again_until_one_is_right(tmp_path: Path) -> None:
    answers = Answers({"1+1=": 3, "2+2=": 99})
    data = collect(
        tmp_path, Source(name="a", teacher=answers, licence="mit"), config=TracesConfig(most_tries=4), data=queries()
    )
    assert answers.asked == {"0+0=": 1, "1+1=": 3, "2+2=": 4, "3+3=": 1}
    assert [(row["query"], row["tries"], row["answer"]) for row in data] == [
        ("0+0=", 1, "<think>well</think>0"),
        ("1+1=", 3, "<think>well</think>2"),
        ("3+3=", 1, "<think>well</think>6"),
    ]
    assert {(row["source"], row["licence"], row["score"], row["reference"]) for row in data} == {
        ("a", "mit", 1.0, row["reference"]) for row in data
    }
    assert data.info.license == "mit"
    told = report(tmp_path)["sources"]["a"]
    assert told["tries"] == pytest.approx(5 / 3)
    assert told["queries_by_tries"] == {"1": 2, "3": 1, "4": 1}
    assert told["left_out"] == {"never verified": 1}
    assert told["tries_cut"] == 0


def test_a_score_just_below_the_threshold_is_asked_again_and_one_on_it_is_taken(tmp_path: Path) -> None:
    scores = iter([0.89, 0.9])
    answers = Answers()
    data = collect(
        tmp_path, Source(name="a", teacher=answers), data=queries(1), verifiers={"mathematics": lambda *_: next(scores)}
    )
    assert answers.asked == {"0+0=": 2}
    assert (data[0]["tries"], data[0]["score"]) == (2, 0.9)


def test_a_killed_collection_goes_on_and_asks_nothing_twice(tmp_path: Path) -> None:
    """The line that the kill has torn is asked again; all others are there."""

    class Killed(Answers):
        def __call__(self, prompt: str) -> str:
            if sum(self.asked.values()) == 3:
                raise KeyboardInterrupt
            return super().__call__(prompt)

    first, second = Killed(2), Answers(2)
    with pytest.raises(BaseException):  # noqa: B017, PT011 (an interrupt, by whichever thread)
        collect(tmp_path, Source(name="a", teacher=first, batch=1))
    path = tmp_path / "a.jsonl"
    assert len(path.read_text().splitlines()) == 3
    path.write_text(path.read_text()[:-10])
    second.asked.update({"0+0=": 1, "1+1=": 1})
    data = collect(tmp_path, Source(name="a", teacher=second, batch=1))
    assert second.asked == {f"{n}+{n}=": 2 for n in range(4)}
    assert data["tries"][:] == [2] * 4
    again = Answers()
    assert collect(tmp_path, Source(name="a", teacher=again))["answer"][:] == data["answer"][:]
    assert not again.asked


def test_one_question_that_fails_does_not_lose_the_others(tmp_path: Path) -> None:
    class Broken(Answers):
        def __call__(self, prompt: str) -> str:
            if prompt == "1+1=":
                raise OSError("gone")
            return super().__call__(prompt)

    with pytest.raises(TeacherError, match="OSError: gone"):
        collect(tmp_path, Source(name="a", teacher=Broken(), batch=2))
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 3
    (tmp_path / "a.jsonl").write_text("[]\n")
    with pytest.raises(ForeignFileError, match="line 1"):
        collect(tmp_path, Source(name="a", teacher=Answers()))


def test_a_server_s_answer_that_was_cut_is_a_failed_try(tmp_path: Path) -> None:
    with serving(Answers()) as state:
        state.plan = ["length"]
        server = ChatServer(url=state.url, model="m", temperature=0.6, backoff=0.01)
        data = collect(tmp_path, Source(name="m", teacher=server, batch=1), data=queries(2))
    assert [row["tries"] for row in data] == [2, 1]
    assert report(tmp_path)["sources"]["m"]["tries_cut"] == 1
    with serving(str) as state:
        state.plan = ["length"]
        server = ChatServer(url=state.url, model="m")
        with pytest.raises(TruncatedError, match="not whole"):
            server("q")


def test_a_server_that_would_repeat_itself_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    Source(name="m", teacher=ChatServer(url="http://127.0.0.1:1/v1", model="m"))
    assert "temperature 0" in caplog.text


def test_an_answer_that_is_wrong_without_its_template_leaves(tmp_path: Path) -> None:
    """All answers begin with one text of 20 words; where the sum is among them, nothing right is left."""
    text = " ".join(f"w{n}x" for n in range(19))
    good = Answers(form=f"{text} end {{}}")
    data = collect(tmp_path, Source(name="a", teacher=good), data=queries(3), config=TracesConfig(times=2))
    assert data["answer"][:] == ["0", "2", "4"]
    assert report(tmp_path)["sources"]["a"]["left_out"] == {"cut, a template in it": 3}
    same = Dataset.from_list([{"query": f"q{n}", "category": "mathematics", "reference": "2"} for n in range(3)])
    with pytest.raises(ConfigurationError, match="wrong without its template"):
        collect(
            tmp_path / "c", Source(name="c", teacher=lambda _: f"{text} 2"), data=same, config=TracesConfig(times=2)
        )


def test_unknown_categories_and_names_are_refused_before_anything_is_asked(tmp_path: Path) -> None:
    answers = Answers()
    science = queries().map(lambda _: {"category": "science"})
    with pytest.raises(UnknownNameError, match="science"):
        collect(tmp_path, Source(name="a", teacher=answers), data=science)
    with pytest.raises(ConfigurationError, match="names of their own"):
        collect(tmp_path, Source(name="a", teacher=answers), Source(name="a", teacher=answers))
    with pytest.raises(ConfigurationError, match="a source's name"):
        Source(name="../a", teacher=answers)
    with pytest.raises(ConfigurationError, match=r"no column \['category'\]"):
        collect(tmp_path, Source(name="a", teacher=answers), data=queries().remove_columns("category"))
    assert not answers.asked
    with pytest.raises(ConfigurationError, match=r"'science' gave 2\.0"):
        collect(tmp_path, Source(name="a", teacher=Answers()), data=science, verifiers={"science": lambda *_: 2.0})
    data = collect(
        tmp_path, Source(name="a", teacher=answers), data=science, verifiers={"science": lambda a, row: 0.95}
    )
    assert set(data["score"]) == {0.95}


# ---------------------------------------------------------------------- models


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    letters = {letter: place for place, letter in enumerate(["<end>", *"0123456789+= abc"])}
    made = Tokenizer(models.WordLevel(letters, unk_token="<end>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")


@cache
def model() -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(vocab_size=17, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                        eos_token_id=0, bos_token_id=0, pad_token_id=0, initializer_range=0.3)
        ).eval()  # fmt: skip


def test_a_model_draws_the_same_for_the_same_questions_and_seed_and_tells_what_was_cut() -> None:
    sampled = Sampled(model(), tokenizer(), max_new_tokens=24, temperature=1.0)
    asked = ["1+1=", "12+30="] * 4
    first = sampled(asked, seed=1)
    assert first == sampled(asked, seed=1)
    assert first != sampled(asked, seed=2)
    assert {reply.finished for reply in first} == {True, False}
    assert all(len(reply.text) == 24 for reply in first if not reply.finished)
    assert all(len(reply.text) < 24 for reply in first if reply.finished)
    with pytest.raises(ConfigurationError, match="temperature above 0"):
        Sampled(model(), tokenizer(), max_new_tokens=1, temperature=0)


def test_a_model_s_collection_is_the_same_after_a_kill(tmp_path: Path) -> None:
    source = Source(name="s", teacher=Sampled(model(), tokenizer(), max_new_tokens=40, temperature=1.0), batch=3)
    verifiers: dict[str, Callable[[str, Mapping[str, Any]], float]] = {
        "mathematics": lambda text, _: float(len(text) % 2)
    }
    settings: dict[str, Any] = {"data": queries(8), "verifiers": verifiers, "config": TracesConfig(most_tries=3)}
    collect(tmp_path / "whole", source, **settings)
    whole = (tmp_path / "whole/s.jsonl").read_text()
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/s.jsonl").write_text("".join(whole.splitlines(keepends=True)[:10])[:-4])
    collect(tmp_path / "parts", source, **settings)
    assert (tmp_path / "parts/s.jsonl").read_text() == whole


def test_a_scorer_gives_the_mean_nats_of_the_answer_alone() -> None:
    pairs = [("1+1=", "2"), ("12+30=", "42 abc")]
    found = Scorer(model(), tokenizer(), name="m")(pairs)
    for (query, answer), (tokens, nats) in zip(pairs, found, strict=True):
        ids = torch.tensor([tokenizer()(query + answer)["input_ids"]])
        log_q = model()(ids).logits[0].log_softmax(-1)
        own = [-log_q[place - 1, ids[0, place]].item() for place in range(len(query), ids.shape[1])]
        assert tokens == len(answer) == len(own)
        assert nats == pytest.approx(sum(own) / len(own), rel=1e-5)


def test_the_source_of_the_lowest_perplexity_is_chosen(tmp_path: Path) -> None:
    """Over the queries that both have answered; scores are kept, and a limit by source leaves answers out."""
    nats = {"plain": 0.1, "long": 2.0}

    class Fixed(Scorer):
        calls = 0

        def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[int, float]]:
            type(self).calls += len(pairs)
            return [(len(answer), nats["long" if " " in answer else "plain"]) for _, answer in pairs]

    scorer = Fixed(None, None, name="fixed")
    sources = [
        Source(name="long", teacher=Answers(form="a b c {}")),
        Source(name="plain", teacher=Answers({"0+0=": 99}, form="{}")),
    ]
    data = collect(tmp_path, *sources, scorer=scorer, config=TracesConfig(most_tries=2))
    assert choose(data) == "plain"
    assert choose(data, by="spread") in ("plain", "long")
    found = statistics(data)
    assert (found["long"].answers, statistics(data, common=False)["long"].answers) == (3, 4)
    assert found["long"].perplexity == pytest.approx(math.exp(2.0))
    assert found["plain"].length == 1.0
    assert report(tmp_path)["sources"]["long"]["perplexity"] == pytest.approx(math.exp(2.0))
    assert Fixed.calls == 7
    limited = TracesConfig(most_tries=2, most_perplexity={"long": 3.0})
    kept = collect(tmp_path, *sources, scorer=scorer, config=limited)
    assert Fixed.calls == 7
    assert set(kept["source"]) == {"plain"}
    with pytest.raises(ConfigurationError, match="needs reasoning_traces"):
        choose(collect(tmp_path / "other", sources[0]))


def test_where_no_query_is_common_nothing_is_chosen(tmp_path: Path) -> None:
    one = Source(name="one", teacher=Answers({"0+0=": 99}))
    two = Source(name="two", teacher=Answers({"1+1=": 99}))
    data = collect(tmp_path, one, two, data=queries(2), config=TracesConfig(most_tries=1))
    with pytest.raises(ConfigurationError, match="cannot be compared"):
        choose(data)


@pytest.mark.parametrize("settings", [{"threshold": 0.0}, {"most_tries": 0}, {"gram": 0}, {"most_unicode": 2.0}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        TracesConfig(**settings)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (module, "verify"), (module, "final_part"), (module, "filter_queries"), (module, "template_grams"),
        (module, "without_templates"), (module, "statistics"), (_trace_filters, "unfit"), (_trace_sources, "seed_of"),
    ],
)  # fmt: skip
def test_each_function_is_reached(place: Any, name: str, tmp_path: Path) -> None:
    teacher = Sampled(model(), tokenizer(), max_new_tokens=60, temperature=1.0)
    with mock.patch.object(place, name, side_effect=KeyError(name)), pytest.raises(KeyError):
        collect(tmp_path, Source(name="s", teacher=teacher), verifiers={"mathematics": lambda *_: 1.0})
