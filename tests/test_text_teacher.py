"""Text teachers: a callable or a server, cached, retried, budgeted."""

from __future__ import annotations

import itertools
import json
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from chat import ChatServerState, serving

from hf_compress.errors import ConfigurationError, ForeignFileError, TeacherError
from hf_compress.teachers import endpoint as module
from hf_compress.teachers.text import FAILURES_IN_A_ROW, ChatServer, TextTeacher

KEY = "secret-key-that-must-not-leave"


@pytest.fixture
def server() -> Iterator[ChatServerState]:
    with serving(str.upper) as state:
        yield state


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would have been slept."""
    slept: list[float] = []
    monkeypatch.setattr(module.time, "sleep", slept.append)
    return slept


def chat(server: ChatServerState, **settings: Any) -> ChatServer:
    return ChatServer(**{"url": server.url, "model": "m", "backoff": 0.01, "api_key": KEY} | settings)


def test_a_server_answers_with_what_was_asked_of_it(server: ChatServerState) -> None:
    teacher = TextTeacher(chat(server, system="be short", temperature=0.3, max_tokens=9))
    assert teacher(["one", "two", "one"]) == ["ONE", "TWO", "ONE"]
    assert teacher([]) == []
    assert teacher.calls == len(server.requests) == 2
    body = server.requests[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.3, 9)
    assert body["messages"][0] == {"role": "system", "content": "be short"}
    assert server.keys == [f"Bearer {KEY}"] * 2


def test_answers_are_in_the_order_of_the_questions_whichever_comes_first(server: ChatServerState) -> None:
    second = threading.Event()

    def answer(text: str) -> str:
        if text == "a":
            assert second.wait(20)
        second.set()
        return text.upper()

    server.answer = answer
    assert TextTeacher(chat(server), workers=2)(["a", "b"]) == ["A", "B"]


@pytest.mark.parametrize("fault", [(429, {"retry-after": "0"}), (500, {}), (503, {}), "drop", "half"])
def test_what_passes_is_tried_again(server: ChatServerState, fault: Any, waits: list[float]) -> None:
    server.plan = [fault, fault]
    teacher = TextTeacher(chat(server, backoff=2.0))
    assert teacher(["a"]) == ["A"]
    assert len(server.requests) == 3
    assert waits == [2.0, 4.0]
    assert teacher.calls == 1


@pytest.mark.parametrize(
    ("asked", "least"),
    [("7", 7.0), ("later", 0.01), ("-3", 0.01), (timedelta(seconds=100), 50.0)],
    ids=["seconds", "unreadable", "negative", "date"],
)
def test_the_wait_that_a_server_asks_for_is_kept(
    server: ChatServerState, asked: str | timedelta, least: float, waits: list[float]
) -> None:
    given = format_datetime(datetime.now(UTC) + asked) if isinstance(asked, timedelta) else asked
    server.plan = [(429, {"retry-after": given})]
    assert TextTeacher(chat(server))(["a"]) == ["A"]
    assert len(waits) == 1
    assert least <= waits[0] <= 2 * least


def test_a_server_that_asks_for_a_long_wait_is_given_up(server: ChatServerState, waits: list[float]) -> None:
    server.plan = [(429, {"retry-after": "86400"})]
    with pytest.raises(TeacherError, match=r"asks to wait \d+ seconds, more than longest_wait=120"):
        TextTeacher(chat(server))(["a"])
    assert waits == []
    server.plan = [(503, {})] * 3
    assert TextTeacher(chat(server, backoff=90.0))(["a"]) == ["A"]
    assert waits == [90.0, 120.0, 120.0]


@pytest.mark.parametrize(
    ("fault", "told", "asked"),
    [
        ((400, {}), "said 400", 1),
        ((401, {}), "said 401", 1),
        ((503, {}), r"3 tries \(status 503", 3),
        ("drop", "did not answer after 3 tries", 3),
        ("half", "did not answer after 3 tries", 3),
        ("garbage", "no chat completion", 1),
        ("list", "no chat completion", 1),
        ("deep", "no chat completion", 1),
        ("null", "no chat completion", 1),
        ("length", "'length', max_tokens=512. Raise max_tokens", 1),
    ],
)
def test_what_does_not_pass_is_an_error_without_the_key(
    server: ChatServerState, fault: Any, told: str, asked: int, tmp_path: Path
) -> None:
    server.plan = [fault] * 9
    server.answer = lambda text: f"your key is {KEY}"
    with pytest.raises(TeacherError, match=told) as caught:
        TextTeacher(chat(server, retries=2), cache=tmp_path)(["a"])
    assert len(server.requests) == asked
    assert list(tmp_path.iterdir()) == []
    error: BaseException | None = caught.value
    while error is not None:
        assert KEY not in f"{error}{error!r}{vars(error)}"
        assert KEY.encode() not in pickle.dumps(error)
        error = error.__cause__ or error.__context__
    assert KEY not in repr(chat(server))


def test_the_key_follows_no_redirect_no_proxy_and_no_netrc(
    server: ChatServerState, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with serving(str.lower) as other:
        for status in (301, 302, 307, 308):
            server.plan = [(status, {"location": f"{other.url}/chat/completions"})]
            with pytest.raises(TeacherError, match=f"said {status}"):
                TextTeacher(chat(server))(["a"])
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, other.url.removesuffix("/v1"))
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password word\n")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        server.keys.clear()
        assert TextTeacher(chat(server))(["a"]) == ["A"]
        assert TextTeacher(chat(server, api_key=None))(["a"]) == ["A"]
        assert server.keys == [f"Bearer {KEY}", None]
        assert other.requests == []


def test_netrc_is_not_read_for_https_either(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """There the environment is used, for proxies and certificates: what is sent stays ours."""
    (tmp_path / "netrc").write_text("machine h login user password word\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    sent: list[Any] = []

    def send(self: Any, request: Any, **_: Any) -> Any:
        sent.append((self.trust_env, request.headers.get("authorization")))
        raise module.requests.exceptions.InvalidURL

    monkeypatch.setattr(module.requests.Session, "send", send)
    for key in (KEY, None):
        with pytest.raises(TeacherError, match=r"cannot be asked \(InvalidURL\)"):
            ChatServer(url="https://h/v1", model="m", api_key=key)("a")
    assert sent == [(True, f"Bearer {KEY}"), (True, None)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"url": "ftp://h/v1"},
        {"url": "127.0.0.1:8000/v1"},
        {"url": f"http://user:{KEY}@h/v1"},
        {"url": f"http://h/v1?key={KEY}"},
        {"api_key": f"{KEY}\n"},
        {"timeout": 0.0},
        {"retries": -1},
        {"max_tokens": 0},
        {"temperature": float("nan")},
        {"longest_wait": float("inf")},
    ],
    ids=str,
)
def test_settings_that_cannot_be_served_are_refused_without_the_key(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="ChatServer: ") as caught:
        ChatServer(**{"url": "http://h/v1", "model": "m"} | wrong)
    assert KEY not in str(caught.value)


def test_a_slow_server_is_given_up(server: ChatServerState) -> None:
    done = threading.Event()
    server.answer = lambda text: str(done.wait(20))
    with pytest.raises(TeacherError, match=r"after 2 tries \(ReadTimeout\)"):
        TextTeacher(chat(server, timeout=0.1, retries=1))(["a"])
    done.set()


def test_a_server_that_is_not_there_is_said(waits: list[float]) -> None:
    with serving(str.upper) as gone:
        pass
    with pytest.raises(TeacherError, match=r"after 2 tries \(ConnectionError\)"):
        TextTeacher(chat(gone, retries=1))(["a"])
    assert waits == [0.01]


def test_an_empty_answer_is_an_answer(server: ChatServerState, tmp_path: Path) -> None:
    server.answer = lambda text: ""
    for _ in range(2):
        assert TextTeacher(chat(server), cache=tmp_path)(["a", "b"]) == ["", ""]
    assert len(server.requests) == 2


def test_one_failure_keeps_the_answers_of_the_others(tmp_path: Path) -> None:
    asked: list[str] = []

    def answer(prompt: str) -> str:
        asked.append(prompt)
        if prompt == "bad" and len(asked) < 5:
            raise KeyError(prompt)
        return prompt.upper()

    prompts, told = ["a", "bad", "b", "c"], list[int]()
    with pytest.raises(TeacherError, match=r"1 of 4 prompts have no answer.*KeyError") as caught:
        TextTeacher(answer, cache=str(tmp_path), name="n", workers=2)(prompts, progress=told.append)
    assert isinstance(caught.value.__cause__, KeyError)
    assert told == [1, 2, 3]
    told.clear()
    again = TextTeacher(answer, cache=tmp_path, name="n")
    assert again(prompts, progress=told.append) == ["A", "BAD", "B", "C"]
    assert asked.count("bad") == 2
    assert len(asked) == 5
    assert told == [1]


def test_a_teacher_that_is_gone_is_not_asked_for_the_rest() -> None:
    asked: list[str] = []

    def answer(prompt: str) -> str:
        asked.append(prompt)
        raise OSError("gone")

    with pytest.raises(TeacherError, match=r"200 of 200 prompts .* OSError: gone"):
        TextTeacher(answer, name="n", workers=1)([str(n) for n in range(200)])
    assert len(asked) == FAILURES_IN_A_ROW


def test_failures_that_are_not_in_a_row_stop_nothing() -> None:
    def answer(prompt: str) -> str:
        if int(prompt) % 2:
            raise ValueError(prompt)
        return prompt

    with pytest.raises(TeacherError, match="50 of 100 prompts"):
        TextTeacher(answer, name="n", workers=1)([str(n) for n in range(100)])


def test_an_interrupted_call_asks_no_more_and_keeps_what_it_has(tmp_path: Path) -> None:
    asked: list[str] = []

    def answer(prompt: str) -> str:
        asked.append(prompt)
        return prompt

    def interrupt(count: int) -> None:
        if count == 3:
            raise KeyboardInterrupt

    prompts = [str(n) for n in range(100)]
    with pytest.raises(KeyboardInterrupt):
        TextTeacher(answer, cache=tmp_path, name="n", workers=2)(prompts, progress=interrupt)
    assert 3 <= len(asked) <= 5
    assert len(list(tmp_path.iterdir())) == len(asked)


SCRIPT = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from hf_compress.teachers.text import TextTeacher
folder, kill_at, log = Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
asked = 0
def answer(prompt):
    global asked
    asked += 1
    if asked == kill_at:
        os.kill(os.getpid(), 9)
    with log.open("a") as file:
        file.write(prompt + "\\n")
    time.sleep(0.005)
    return prompt.upper() * 1000
prompts = [f"question {n}" for n in range(20)]
assert TextTeacher(answer, cache=folder, name="n", workers=1)(prompts) == [p.upper() * 1000 for p in prompts]
"""


def start(cache: Path, log: Path, *, kill_at: int = 0) -> subprocess.Popen[bytes]:
    root = str(Path(module.__file__).parents[2])
    return subprocess.Popen([sys.executable, "-c", SCRIPT, root, str(cache), str(kill_at), str(log)])


def test_a_killed_process_asks_nothing_twice(tmp_path: Path) -> None:
    cache, log = tmp_path / "cache", tmp_path / "log"
    assert start(cache, log, kill_at=8).wait(60) == -signal.SIGKILL
    assert len(log.read_text().splitlines()) == 7
    assert start(cache, log).wait(60) == 0
    assert len(log.read_text().splitlines()) == 20


def test_two_processes_share_a_cache(tmp_path: Path) -> None:
    cache, log = tmp_path / "cache", tmp_path / "log"
    assert [process.wait(60) for process in [start(cache, log), start(cache, log)]] == [0, 0]
    assert sorted(path.suffix for path in cache.iterdir()) == [".json"] * 20
    never = TextTeacher(lambda prompt: pytest.fail("asked again"), cache=cache, name="n")
    assert never(["question 3"]) == ["QUESTION 3" * 1000]


def test_what_another_process_has_answered_meanwhile_is_not_asked(tmp_path: Path) -> None:
    other, asked = TextTeacher(str.upper, cache=tmp_path, name="n"), list[str]()

    def answer(prompt: str) -> str:
        asked.append(prompt)
        other(["b"])
        return prompt.upper()

    assert TextTeacher(answer, cache=tmp_path, name="n", workers=1)(["a", "b"]) == ["A", "B"]
    assert asked == ["a"]


def test_other_settings_are_another_teacher(server: ChatServerState, tmp_path: Path) -> None:
    for settings in ({}, {"temperature": 1.0}, {"model": "other"}, {"system": "s"}):
        TextTeacher(chat(server, **settings), cache=tmp_path)(["a"])
    TextTeacher(chat(server), cache=tmp_path, name="of other weights")(["a"])
    assert len(server.requests) == 5
    for settings in ({"api_key": "another"}, {"temperature": 0}, {"system": ""}, {"max_tokens": 9}, {"retries": 0}):
        TextTeacher(chat(server, **settings), cache=tmp_path)(["a"])
    with serving(str.upper) as moved:
        TextTeacher(chat(moved), cache=tmp_path)(["a"])
        assert len(server.requests) == 5
        assert moved.requests == []
    assert KEY not in "".join(path.name + path.read_text() for path in tmp_path.iterdir())


def test_a_budget_covers_all_or_asks_nothing(server: ChatServerState) -> None:
    teacher = TextTeacher(chat(server), budget=2)
    with pytest.raises(TeacherError, match=r"3 prompts .* budget is 2"):
        teacher(["a", "b", "c"])
    assert not server.requests
    assert teacher(["a", "b", "a"]) == ["A", "B", "A"]
    assert teacher(["a"]) == ["A"]
    with pytest.raises(TeacherError, match="Raise the budget"):
        teacher(["c"])


def test_a_failed_call_is_counted(server: ChatServerState) -> None:
    teacher = TextTeacher(chat(server, retries=0), budget=3)
    server.plan = ["garbage"]
    with pytest.raises(TeacherError, match="1 of 2"):
        teacher(["a", "b"])
    assert teacher.calls == 2
    assert teacher(["a", "b"]) == ["A", "B"]
    assert teacher.calls == 3


def test_two_threads_do_not_spend_one_budget_twice() -> None:
    both, number = threading.Barrier(2, timeout=20), itertools.count()

    def answer(prompt: str) -> str:
        if next(number) < 2:
            both.wait()  # both calls have passed the check of the whole
        return prompt

    teacher = TextTeacher(answer, name="n", budget=6, workers=1)
    outcomes: list[str] = []

    def ask(letter: str) -> None:
        try:
            teacher([f"{letter}{n}" for n in range(5)])
            outcomes.append("all")
        except TeacherError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=ask, args=(letter,)) for letter in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert teacher.calls == 6
    assert any("budget is 6" in outcome for outcome in outcomes)


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="name="):
        TextTeacher(str.upper)
    with pytest.raises(ConfigurationError, match="got 0 and None"):
        TextTeacher(str.upper, name="n", workers=0)
    with pytest.raises(ConfigurationError, match="got 4 and -1"):
        TextTeacher(str.upper, name="n", budget=-1)
    with pytest.raises(ConfigurationError, match=r"Pass \[prompt\]"):
        TextTeacher(str.upper, name="n")("a text")
    with pytest.raises(TeacherError, match="a NoneType, not text"):
        TextTeacher(lambda prompt: None, name="n")(["a"])  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    "damaged", ["{", "", json.dumps({"prompt": "a", "answer": 3}), json.dumps({"prompt": "b", "answer": "B"})]
)
def test_a_damaged_answer_is_said_before_anything_is_asked(tmp_path: Path, damaged: str) -> None:
    TextTeacher(str.upper, cache=tmp_path, name="n")(["a"])
    (path,) = tmp_path.iterdir()
    path.write_text(damaged)
    teacher = TextTeacher(str.upper, cache=tmp_path, name="n")
    with pytest.raises(ForeignFileError, match="Remove it; the teacher is asked again"):
        teacher(["b", "a"])
    assert teacher.calls == 0
    path.unlink()
    assert teacher(["b", "a"]) == ["B", "A"]
