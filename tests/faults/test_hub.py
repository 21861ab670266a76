"""Pushes by the real huggingface_hub to a hub that fails: the old model or the new one, whole, and one commit.

The folder of each push is small, and nobody sleeps; `hub/test_push.py` pushes whole models.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub.server import KINDS, Fault, Hub, running_hub
from huggingface_hub.utils import get_session
from safetensors.numpy import load, save_file

from hf_compress import facts, remote
from hf_compress import hub as ours
from hf_compress.errors import HubError
from hf_compress.hub import Pushed, push

CARD = "---\nlicense: apache-2.0\nlibrary_name: transformers\ntags:\n- distillation\n---\n# A model\n"
Count = Callable[..., None]
Files = dict[str, bytes]


def made(folder: Path, seed: int, *extra: str) -> Path:
    """A folder that may be pushed: weights, configuration, card and record, and further weights by name."""
    folder.mkdir(parents=True)
    for name in ("model.safetensors", *extra):
        save_file({"weight": np.random.default_rng(seed).normal(size=(4, 3))}, folder / name, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "seed": seed}))
    (folder / "README.md").write_text(f"{CARD}Of seed {seed}.\n")
    (folder / "training_args.bin").write_bytes(Hub.token.encode())
    facts.register(folder, [folder / "model.safetensors"])
    return folder


def sent(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".bin"}


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the hub holds already; its second weights file is gone in the new model."""
    return made(tmp_path_factory.mktemp("old") / "student", 0, "model-2.safetensors")


@pytest.fixture
def new(tmp_path: Path) -> Path:
    return made(tmp_path / "student", 1)


def hashes(files: Files) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def whole(hub: Hub, ref: str, *models: Path) -> Path | None:
    """The model that the hub holds at a revision, complete to the byte; None: nothing yet."""
    files = hub.files("me/student", ref) if ("models", "me/student") in hub.repos else {}
    if not files:
        return None
    (found,) = [model for model in models if hashes(sent(model)) == hashes(files)]
    assert load(files["model.safetensors"])["weight"].shape == (4, 3)
    return found


class Pushing:
    """Pushes of a new model over an old one, and what holds after each, whatever the hub did."""

    def __init__(self, hub: Hub, old: Path, new: Path, fault: Count) -> None:
        self.hub, self.old, self.new, self.fault = hub, old, new, fault
        self.asked = 0
        self.begin("old")

    def begin(self, holds: str) -> None:
        """The hub as it is before a push: with the old model, or without the repository."""
        self.hub.plan, self.hub.dead = [], False
        self.hub.repos.clear()
        self.hub.stored.clear()
        if holds == "old":
            self.call(self.old)
        self.start = 2 if holds == "old" else 1  # the commit that makes a repository, and the old model's

    def call(self, folder: Path, **settings: Any) -> Pushed:
        known = {"token": self.hub.token, "endpoint": self.hub.url}
        return push(folder, "me/student", **(known | settings))

    def commits(self) -> int:
        there = ("models", "me/student") in self.hub.repos
        return len(self.hub.history("me/student")) - self.start if there else 0

    def under(self, *faults: Fault, note: str = "") -> Pushed | HubError:
        """One push that meets the faults: what it says is true, and nothing is half done. A `note` counts a fault."""
        self.hub.plan, self.hub.fired, self.hub.dead = list(faults), [], False
        before, asked = sent(self.new), len(self.hub.log)
        try:
            result: Pushed | HubError = self.call(self.new)
        except HubError as error:
            result = error
        self.asked = len(self.hub.log) - asked
        if note:
            assert self.hub.fired, "the fault met no request"
            self.fault("hub faults", note=note)
        held = whole(self.hub, "main", self.old, self.new)
        assert self.commits() == (held == self.new)
        assert sent(self.new) == before
        if isinstance(result, Pushed):
            assert held == self.new
            assert result.oid == self.hub.history("me/student")[0].oid
        else:
            said = str(result)
            assert self.hub.token not in said
            assert "\n" not in said
            if held == self.new:
                assert "Nothing was sent" not in said, said
                assert "holds what it held" not in said, said
        return result

    def again(self) -> None:
        """A push to the hub when it is well again: it completes, and one commit stands."""
        self.hub.plan, self.hub.dead = [], False
        pushed = self.call(self.new)
        assert whole(self.hub, "main", self.old, self.new) == self.new
        assert self.commits() == 1
        assert pushed.oid == self.hub.history("me/student")[0].oid


@pytest.fixture
def pushing(fake_hub: Callable[..., Hub], waits: list[float], old: Path, new: Path, fault: Count) -> Pushing:
    return Pushing(fake_hub(), old, new, fault)


PAGE = b"<html><body>502 Bad Gateway</body></html>"
BEFORE: dict[str, dict[str, Any]] = {
    "429 with a wait": {"status": 429, "headers": {"Retry-After": "7"}},
    "503": {"status": 503},
    "drop before": {"status": None},
    "412": {"status": 412},
    "page with 502": {"status": 502, "body": PAGE},
    "page with 200": {"status": 200, "body": PAGE},
    "slow drip": {"drip": 0.005},
}
AFTER: dict[str, dict[str, Any]] = {
    "drop after": {"status": None, "applied": True},
    "503 after": {"status": 503, "applied": True},
    "page with 200 after": {"status": 200, "body": PAGE, "applied": True},
}
OF_A_PUSH = ("whoami", "create_repo", "info", "tree", "validate", "preupload", "batch", "upload", "verify", "commit")
RETRIED = {"tree", "validate", "preupload", "batch", "upload", "verify", "commit"}
"""Requests that are tried again, by huggingface_hub or, with the commit, by us."""
OF_THE_COMMIT = {"validate", "commit"}


@pytest.mark.parametrize("name", [*BEFORE, *AFTER])
@pytest.mark.parametrize("kind", OF_A_PUSH)
def test_a_fault_leaves_one_whole_model_and_the_next_push_completes(
    pushing: Pushing, waits: list[float], kind: str, name: str
) -> None:
    result = pushing.under(Fault(KINDS[kind], **(BEFORE | AFTER)[name]), note=f"{name}, {kind}")
    passes = name == "slow drip" or (kind in RETRIED and name in ("429 with a wait", "503", "drop before"))
    passes |= kind in OF_THE_COMMIT and name in ("page with 502", "page with 200")
    if passes or (name in AFTER and kind == "commit"):
        assert isinstance(result, Pushed), result
    if name == "429 with a wait" and kind in RETRIED - {"validate"}:  # whose status huggingface_hub does not look at
        assert max(waits) >= 7
    pushing.again()


def test_a_push_asks_for_nothing_that_the_matrix_leaves_out(pushing: Pushing) -> None:
    asked = len(pushing.hub.log)
    pushing.call(pushing.new)
    lines = [f"{request.method} {request.path}" for request in pushing.hub.log[asked:]]
    assert not [line for line in lines if not any(Fault(KINDS[kind]).meets(line) for kind in OF_A_PUSH)]


@pytest.mark.parametrize("name", ["429 with a wait", "503", "drop before", "page with 502"])
@pytest.mark.parametrize("kind", OF_A_PUSH)
def test_a_hub_that_stays_broken_ends_in_one_error(pushing: Pushing, kind: str, name: str) -> None:
    result = pushing.under(Fault(KINDS[kind], times=50, **BEFORE[name]), note=f"{name} for good, {kind}")
    assert isinstance(result, HubError)
    assert len(pushing.hub.fired) <= 25
    pushing.again()


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("holds", ["old", "nothing"])
def test_a_hub_that_dies_at_any_request_holds_one_whole_model(pushing: Pushing, holds: str, applied: bool) -> None:
    """At the first request, the second, … until a push gets through; in an order that a seed draws."""
    pushing.begin(holds)
    assert isinstance(pushing.under(), Pushed)
    requests = pushing.asked
    assert requests >= len(OF_A_PUSH)
    for skip in random.Random(f"{holds}, {applied}").sample(range(requests + 1), requests + 1):
        pushing.begin(holds)
        note = ("death after an answer was made" if applied else "death") if skip < requests else ""
        result = pushing.under(Fault("", skip=skip, dies=True, applied=applied), note=note)
        if skip == requests:
            assert isinstance(result, Pushed)
            assert not pushing.hub.fired
            continue
        assert isinstance(result, HubError), skip
        pushing.again()


def test_another_commit_in_between_is_kept_and_stops_the_push(pushing: Pushing, fault: Count) -> None:
    """The real 412: ours names the head that it was made for."""
    repo = pushing.hub.repo("me/student")

    class Late(Fault):
        def meets(self, line: str) -> bool:
            if super().meets(line) and len(repo.commits) == 2:
                files = repo.at("main").files
                repo.commit("main", "theirs", files | {"config.json": files["README.md"]}, repo.refs["main"])
                pushing.hub.fired.append(line)
            return False

    pushing.hub.plan = [Late(KINDS["commit"])]
    with pytest.raises(HubError, match="Somebody else pushed to me/student"):
        pushing.call(pushing.new)
    assert pushing.hub.fired, "the fault met no request"
    fault("hub faults", note="412 after another's commit")
    assert pushing.hub.history("me/student")[0].title == "theirs"
    pushing.hub.plan = []
    pushing.call(pushing.new)
    assert whole(pushing.hub, "main", pushing.old, pushing.new) == pushing.new
    assert len(pushing.hub.history("me/student")) == 4


@pytest.mark.parametrize("status", [302, 307])
@pytest.mark.parametrize("kind", OF_A_PUSH)
def test_a_redirect_to_another_host_takes_no_token_there(
    pushing: Pushing, elsewhere: Hub, kind: str, status: int
) -> None:
    pushing.under(Fault(KINDS[kind], status=status, redirect=elsewhere.url), note=f"redirect, {kind}")
    assert elsewhere.log or (kind, status) == ("upload", 307)  # a file that was read once is not sent on
    assert not elsewhere.received(Hub.token)
    assert not any("authorization" in request.headers.lower() for request in elsewhere.log)
    pushing.again()


def test_a_redirect_within_the_hub_is_followed(pushing: Pushing) -> None:
    """As that of a repository that was given another name."""
    result = pushing.under(Fault(KINDS["commit"], status=307, redirect=pushing.hub.url), note="redirect within the hub")
    assert isinstance(result, Pushed)


def test_files_that_are_stored_on_another_host_take_no_token_there(pushing: Pushing) -> None:
    with running_hub() as storage:
        storage.stored = pushing.hub.stored
        pushing.hub.storage = storage.url
        assert isinstance(pushing.under(), Pushed)
        assert {request.method for request in storage.log} == {"PUT"}
        assert not storage.received(Hub.token)


@pytest.mark.parametrize("kind", OF_A_PUSH)
@pytest.mark.parametrize("applied", [False, True])
def test_a_hub_that_falls_silent_is_given_up(
    pushing: Pushing, monkeypatch: pytest.MonkeyPatch, kind: str, applied: bool
) -> None:
    monkeypatch.setattr(remote, "SILENCE", 0.5)
    started = time.monotonic()
    result = pushing.under(Fault(KINDS[kind], status=None, seconds=5.0, applied=applied), note=f"silence, {kind}")
    assert time.monotonic() - started < 4.0
    assert isinstance(result, Pushed) == (kind in RETRIED), result
    monkeypatch.setattr(remote, "SILENCE", 60.0)
    pushing.again()


def test_the_limit_of_silence_is_taken_off_the_shared_client_again(pushing: Pushing) -> None:
    before = get_session().event_hooks
    pushing.under(Fault(KINDS["commit"], status=412))
    assert get_session().event_hooks == before


@pytest.mark.parametrize(
    ("headers", "waited"),
    [
        ({"Retry-After": "9"}, 9.0),
        ({"Retry-After": "86400"}, ours.LONGEST_WAIT),
        ({"Retry-After": "Mon, 01 Jan 2990 00:00:00 GMT"}, ours.LONGEST_WAIT),
        ({"Retry-After": "soon"}, ours.WAITS[0]),
        ({"RateLimit": '"api";r=0;t=33', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}, 33.0),
    ],
)
def test_a_commit_waits_as_long_as_the_hub_asks(
    pushing: Pushing, waits: list[float], headers: dict[str, str], waited: float
) -> None:
    waits.clear()
    result = pushing.under(Fault(KINDS["commit"], status=429, headers=headers), note="429 with a wait")
    assert isinstance(result, Pushed)
    assert waits == [waited]


@pytest.mark.parametrize("applied", [False, True])
def test_a_pull_request_is_opened_once_whenever_the_hub_dies(pushing: Pushing, fault: Count, applied: bool) -> None:
    hub = pushing.hub

    def propose() -> Pushed | HubError:
        try:
            return pushing.call(pushing.new, token=hub.stranger, create_pr=True)
        except HubError as error:
            return error

    for skip in range(30):
        pushing.begin("old")
        hub.plan, hub.fired = [Fault("", skip=skip, dies=True, applied=applied)], []
        result = propose()
        if not hub.fired:
            assert isinstance(result, Pushed)
            break
        fault("hub faults", note="death, pull request")
        assert isinstance(result, HubError)
        hub.plan, hub.dead = [], False
        assert isinstance(propose(), Pushed)
        assert [ref for ref in hub.repo("me/student").refs if ref.startswith("refs/pr/")] == ["refs/pr/1"]
        assert whole(hub, "refs/pr/1", pushing.old, pushing.new) == pushing.new
        assert whole(hub, "main", pushing.old, pushing.new) == pushing.old
    else:
        raise AssertionError("no push got through")
