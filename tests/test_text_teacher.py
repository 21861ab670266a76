"""Text teachers: a callable or a server, cached, retried, budgeted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from chat import ChatServerState, serving

from hf_compress.errors import ConfigurationError, ForeignFileError, TextTeacherError
from hf_compress.teachers.text import ChatServer, TextTeacher

KEY = "secret-key-that-must-not-leave"


@pytest.fixture
def server() -> Iterator[ChatServerState]:
    with serving(str.upper) as state:
        yield state


def chat(server: ChatServerState, **settings: object) -> ChatServer:
    given = {"url": server.url, "model": "m", "backoff": 0.01, "api_key": KEY} | settings
    return ChatServer(**given)  # type: ignore[arg-type]


def test_a_server_answers_with_what_was_asked_of_it(server: ChatServerState) -> None:
    teacher = TextTeacher(chat(server, system="be short", temperature=0.3, max_tokens=9))
    assert teacher(["one", "two", "one"]) == ["ONE", "TWO", "ONE"]
    assert teacher.calls == len(server.requests) == 2
    body = server.requests[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.3, 9)
    assert body["messages"][0] == {"role": "system", "content": "be short"}
    assert server.keys == [f"Bearer {KEY}"] * 2


@pytest.mark.parametrize("fault", [(429, {"retry-after": "0"}), (503, {}), "drop"])
def test_what_passes_is_tried_again(server: ChatServerState, fault: object) -> None:
    server.plan = [fault, fault]  # type: ignore[list-item]
    assert TextTeacher(chat(server))(["a"]) == ["A"]
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("fault", "told", "asked"),
    [
        ((400, {}), "said 400", 1),
        ((503, {}), "said 503", 3),
        ("drop", "did not answer after 3 tries", 3),
        ("garbage", "no chat completion", 1),
        ("empty", "not text", 1),
        ((302, {"location": "http://127.0.0.1:9/v1/chat/completions"}), "said 302", 1),
    ],
)
def test_what_does_not_pass_is_an_error_without_the_key(
    server: ChatServerState, fault: object, told: str, asked: int
) -> None:
    server.plan = [fault] * 9  # type: ignore[list-item]
    with pytest.raises(TextTeacherError, match=told) as caught:
        TextTeacher(chat(server, retries=2))(["a"])
    assert len(server.requests) == asked
    assert KEY not in str(caught.value)
    assert KEY not in repr(chat(server))


def test_a_slow_server_is_given_up(server: ChatServerState) -> None:
    import time

    server.answer = lambda text: time.sleep(0.6) or text  # type: ignore[func-returns-value]
    with pytest.raises(TextTeacherError, match="did not answer"):
        TextTeacher(chat(server, timeout=0.1, retries=0))(["a"])


def test_a_killed_run_asks_nothing_twice_and_one_failure_keeps_the_others(tmp_path: Path) -> None:
    asked: list[str] = []

    def answer(prompt: str) -> str:
        asked.append(prompt)
        if prompt == "bad" and len(asked) < 5:
            raise KeyError(prompt)
        return prompt.upper()

    prompts = ["a", "bad", "b", "c"]
    with pytest.raises(KeyError):
        TextTeacher(answer, cache=tmp_path, name="n", workers=2)(prompts)
    told: list[int] = []
    again = TextTeacher(answer, cache=tmp_path, name="n")
    assert again(prompts, progress=told.append) == ["A", "BAD", "B", "C"]
    assert asked.count("bad") == 2
    assert len(asked) == 5
    assert told == [1]
    assert KEY not in "".join(path.read_text() for path in tmp_path.iterdir())


def test_other_settings_are_another_teacher(server: ChatServerState, tmp_path: Path) -> None:
    for settings in ({}, {"temperature": 1.0}, {"model": "other"}, {"system": "s"}):
        TextTeacher(chat(server, **settings), cache=tmp_path)(["a"])
    assert len(server.requests) == 4
    TextTeacher(chat(server, api_key="another"), cache=tmp_path)(["a"])
    assert len(server.requests) == 4


def test_a_budget_covers_all_or_asks_nothing(server: ChatServerState) -> None:
    teacher = TextTeacher(chat(server), budget=2)
    with pytest.raises(TextTeacherError, match=r"3 prompts .* budget is 2"):
        teacher(["a", "b", "c"])
    assert not server.requests
    teacher(["a", "b"])
    assert teacher(["a"]) == ["A"]
    with pytest.raises(TextTeacherError, match="Raise the budget"):
        teacher(["c"])


def test_a_callable_has_a_name_and_a_damaged_answer_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="name="):
        TextTeacher(str.upper)
    teacher = TextTeacher(str.upper, cache=tmp_path, name="n")
    teacher(["a"])
    (path,) = tmp_path.iterdir()
    path.write_text(json.dumps({"answer": 3}))
    with pytest.raises(ForeignFileError, match="holds no answer"):
        teacher(["a"])
    path.write_text("{")
    with pytest.raises(ForeignFileError):
        teacher(["a"])
