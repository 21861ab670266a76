"""A push that cannot work is refused by a recipe before anything trains or is written, here or on the hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub.server import KINDS, Fault, Hub
from hub.store import Repo
from huggingface_hub import constants
from recipes import write_inputs
from transformers import AutoConfig

from hf_compress import facts, fitting, ship
from hf_compress.errors import ConfigurationError, HubError
from hf_compress.hub import authorize, private_for, push
from hf_compress.recipe import Recipe, read_recipe, validated

from .test_hub import made

FINE = "hf_" + "FineGrainedOfTheTestHub".ljust(30, "4")
SECRET = "SecretOfTheAddress"
Count = Callable[..., None]


@pytest.fixture
def hub(fake_hub: Callable[..., Hub], waits: list[float], monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub of this process, its owner's token in the environment; whoever trains fails the test."""
    monkeypatch.setattr(fitting, "fit", lambda *args, **kwargs: pytest.fail("trained first"))
    monkeypatch.setenv("HF_TOKEN", Hub.token)
    hub = fake_hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    hub.users[FINE] = ("me", "fineGrained")
    return hub


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("inputs")
    return folder, write_inputs(folder)


@pytest.fixture
def work(
    inputs: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., ship.Work]:
    """`work(push=…)`: that recipe, before its first stage. A teacher `me/big` is on the hub."""
    folder, values = inputs
    config = AutoConfig.from_pretrained(folder / "big")
    monkeypatch.setattr(ship.Work, "_teacher_config", property(lambda self: config))
    data = {k: str(folder / v) if str(v).endswith(".csv") else v for k, v in values["data"].items()}
    known = values | {"data": data, "teacher": str(folder / "big"), "output": str(tmp_path / "made"), "licence": "mit"}
    return lambda **changes: ship.Work(validated(Recipe, known | changes, "recipe"), lambda line: None, False)


def grant(**rights: str) -> Callable[[Hub, pytest.MonkeyPatch], None]:
    """A fine-grained token with one right to each of these."""

    def set_up(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", FINE)
        hub.grants = {name.replace("__", "/"): ["repo.content.read", right] for name, right in rights.items()}

    return set_up


def offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def dead(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.dead = True


def busy(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.plan = [Fault(KINDS["whoami"], times=50)]


def reader(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.roles["team"] = "read"


def held(id: str, **settings: bool) -> Callable[[Hub, pytest.MonkeyPatch], None]:
    """A repository that is there already."""

    def set_up(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        repo = hub.repos["models", id] = Repo("models", id, **settings)
        repo.commit("main", "initial commit", {}, None)

    return set_up


def both(*set_ups: Callable[[Hub, pytest.MonkeyPatch], None]) -> Callable[[Hub, pytest.MonkeyPatch], None]:
    def set_up(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        for each in set_ups:
            each(hub, monkeypatch)

    return set_up


def nothing(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub as it is."""


# token, role of a token and somebody else's repository: test_ship.py
@pytest.mark.parametrize(
    ("set_up", "changes", "kind", "said"),
    [
        (offline, {}, HubError, "who you are failed.*offline"),
        (dead, {}, HubError, "who you are failed"),
        (busy, {}, HubError, "who you are failed.*503"),
        (nothing, {"push": "me/not a name"}, HubError, "'me/not a name' can be no repository's name"),
        (nothing, {"push": "me/a--b"}, HubError, "can be no repository's name"),
        (nothing, {"push": "me/small.git"}, HubError, "can be no repository's name"),
        (nothing, {"push": "x" * 97}, HubError, "can be no repository's name"),
        (nothing, {"push": "me/a/b"}, HubError, "can be no repository's name"),
        (grant(me="repo.access.read"), {}, HubError, "fine-grained token of me may not write to me/small"),
        (grant(me__other="repo.write"), {}, HubError, "fine-grained token of me may not write"),
        (reader, {"push": "team/small"}, HubError, "me may only read in team"),
        (held("me/small"), {"private": True}, HubError, "me/small is public"),
        (both(held("me/small"), held("me/big", private=True)), {"teacher": "me/big"}, HubError, "me/small is public"),
        (nothing, {"teacher": "me/big"}, HubError, "whether the teacher me/big .*--private or --no-private"),
        (nothing, {"push": f"https://me:{SECRET}@hub.example/me/small"}, ConfigurationError, "user or a password"),
        (nothing, {"push": f"me:{SECRET}@hub.example/me/small"}, ConfigurationError, "user or a password"),
        (nothing, {"push": f"https://hub.example/small?token={SECRET}"}, ConfigurationError, "names no repository"),
    ],
)  # fmt: skip
def test_a_push_that_cannot_work_is_refused_before_training(
    hub: Hub,
    work: Callable[..., ship.Work],
    monkeypatch: pytest.MonkeyPatch,
    fault: Count,
    set_up: Callable[[Hub, pytest.MonkeyPatch], None],
    changes: dict[str, Any],
    kind: type[Exception],
    said: str,
) -> None:
    set_up(hub, monkeypatch)
    before = set(hub.repos)
    found = work(**({"push": "me/small"} | changes))
    with pytest.raises(kind, match=said) as caught:
        found.check()
    if set_up in (offline, dead, busy):
        fault("hub faults", note=f"{set_up.__name__}, before training")
    assert not [secret for secret in (SECRET, Hub.token, FINE) if secret in str(caught.value)]
    assert not found.output.exists()
    assert {request.method for request in hub.log} <= {"GET"}
    assert set(hub.repos) == before


@pytest.mark.parametrize(
    ("set_up", "changes", "private"),
    [
        (nothing, {}, None),
        (held("me/small"), {}, None),
        (grant(me="repo.write"), {}, None),
        (grant(me__small="repo.write"), {}, None),
        (nothing, {"push": "team/small"}, None),
        (held("me/big"), {"teacher": "me/big"}, None),
        (held("me/big", private=True), {"teacher": "me/big"}, True),
        (held("me/big", gated=True), {"teacher": "me/big"}, True),
        (held("me/big", gated=True), {"teacher": "me/big", "private": False}, False),
        (both(held("me/small", private=True), held("me/big", gated=True)), {"teacher": "me/big"}, True),
        (nothing, {"teacher": "me/big", "private": True}, True),
        (offline, {"push": None}, None),
    ],
)
def test_a_push_that_can_work_is_not_refused_and_a_private_teacher_makes_it_private(
    hub: Hub,
    work: Callable[..., ship.Work],
    monkeypatch: pytest.MonkeyPatch,
    set_up: Callable[[Hub, pytest.MonkeyPatch], None],
    changes: dict[str, Any],
    private: bool | None,
) -> None:
    set_up(hub, monkeypatch)
    found = work(**({"push": "me/small"} | changes))
    found.check()
    assert found.private is private
    assert {request.method for request in hub.log} <= {"GET"}


def test_that_a_student_becomes_private_is_told(
    hub: Hub, work: Callable[..., ship.Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    held("me/big", gated=True)(hub, monkeypatch)
    found, told = work(push="me/small", teacher="me/big"), list[str]()
    found.tell = told.append
    found.check()
    assert told == ["me/big is private or gated, so the student will be private (private: true)"]


@pytest.mark.parametrize("where", ["teacher", "frozen", "before"])
@pytest.mark.parametrize(("asked", "private"), [(None, True), (False, False), (True, True)])
def test_a_folder_whose_record_names_a_private_teacher_becomes_private(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, asked: bool | None, private: bool
) -> None:
    held("me/big", private=True)(hub, monkeypatch)
    folder = made(tmp_path / "student", 0)
    big, own = (facts.Model(name=name, architecture="Bert", parameters=1) for name in ("me/big", None))
    training = facts.Training(
        task="text-classification", teacher=own, student=own, methods=(), task_weight=1.0,
        data=facts.Data(name="rows", rows=1, fingerprint="0" * 16), steps=1, epochs=1.0, seconds=1.0, seed=0,
        hardware="a processor", versions={},
    )  # fmt: skip
    changed = training.model_copy(update={where: {"big": big} if where == "frozen" else big})
    if where == "before":
        changed = training.model_copy(update={"before": (training.model_copy(update={"teacher": big}),)})
    facts.save(folder, facts.load(folder).model_copy(update={"training": changed}))
    push(folder, "me/small", private=asked)
    assert hub.repo("me/small").private is private


def test_a_pull_request_to_nothing_is_refused(hub: Hub) -> None:
    with pytest.raises(HubError, match="There is no you/small to propose a pull request to"):
        authorize("you/small", create_pr=True)


def test_what_was_asked_for_is_not_looked_up(hub: Hub) -> None:
    assert private_for(["me/nowhere"], False) is False
    assert hub.log == []


def test_a_recipe_may_say_it_all(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "task: text-classification\nteacher: me/big\ndata: {train: rows.csv}\nstudent: {layers: 2}\n"
        "push: me/small\nprivate: true\n"
    )
    assert read_recipe(tmp_path / "recipe.yaml").private is True
