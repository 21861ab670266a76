"""No secret of a careless user gets anywhere: every byte of a whole compression is searched, and what the hub got.

`training_args.bin` is the exception, and not ours: transformers writes TrainingArguments(hub_token=…) into it in clear,
in each checkpoint and wherever `Trainer.save_model` writes. It is never pushed (`outgoing.ALLOWED`), the callback warns
of it, refuses `push_to_hub=True` beside it, and what a recipe trains has no such file.
"""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest
from canary import Canary, files, received, where
from hub.client import environment
from hub.server import Fault, Hub, running_hub
from huggingface_hub import HfApi
from recipes import write_rows, write_teacher

from hf_compress.facts import Data
from hf_compress.outgoing import ALLOWED

Count = Callable[..., None]
ENVIRONMENT = Canary("HF_TOKEN", "hf_" + "CanaryOfTheEnvironment".ljust(34, "5"))
ARGUMENT = Canary("hub_token", "hf_" + "CanaryOfTheArguments".ljust(34, "6"))
PASSWORD = Canary("password of an address", "Canary+Of.The-Address~8")
FILE = Canary(".env", "CanaryOfTheWorkingFolder9")
SECRETS = (ENVIRONMENT, ARGUMENT, PASSWORD, FILE)
USER, HOST = Canary("user", "canaryuser"), Canary("host", "canaryhost.example")
ARGUMENTS = "training_args.bin"


@dataclass(frozen=True)
class Ran:
    """What a careless user's run left behind."""

    hub: Hub
    work: Path
    home: Path
    out: str
    log: str

    @property
    def errors(self) -> dict[str, str]:
        return {path.stem: path.read_text() for path in (self.work / "errors").iterdir()}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    """`secrets_run.py` in a process, a home and a working folder of its own, with a private teacher on the hub."""
    folder = tmp_path_factory.mktemp("careless")
    work, home, big = folder / "work", folder / "home-of-canaryuser", folder / "big"
    work.mkdir()
    home.mkdir()
    write_teacher(big)
    write_rows(work / "rows.csv", 8)
    (work / ".env").write_text(f"HF_TOKEN={FILE.value}\nHF_ENDPOINT=http://{FILE.value}.example\n")
    with running_hub() as hub:
        hub.users[ENVIRONMENT.value] = ("me", "write")
        api = HfApi(endpoint=hub.url, token=ENVIRONMENT.value)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
            patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
            api.create_repo("me/big", private=True)
            api.upload_folder(repo_id="me/big", folder_path=big)
        hub.log.clear()
        told = json.dumps({"error": f"this token is no good: {ENVIRONMENT.value}"}).encode()  # no header: httpcore2
        kind = {"Content-Type": "application/json"}  # logs the headers of answers, whatever they hold
        hub.plan = [Fault("POST /api/repos/create", skip=1, status=500, headers=kind, body=told)]
        given = {"CANARY_ARGUMENT": ARGUMENT.value, "CANARY_PASSWORD": PASSWORD.value, "CANARY_HOST": HOST.value}
        known = environment(hub.url, home, ENVIRONMENT.value) | given | {"USER": USER.value, "LOGNAME": USER.value}
        script = Path(__file__).with_name("secrets_run.py")
        done = subprocess.run(
            [sys.executable, str(script)], cwd=work, env=known, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert not hub.plan, "the hub never repeated the token"
        yield Ran(hub, work, home, done.stdout, done.stderr)


def test_the_search_finds_every_form(canary_token: Canary, fault: Count) -> None:
    for canary in (canary_token, *SECRETS):
        for before in range(6):
            text = b"x" * before + canary.value.encode() + b"yy"
            for shown in (
                text,
                base64.b64encode(text),
                base64.urlsafe_b64encode(text),
                quote(text).encode(),
                text.hex(),
            ):
                assert canary.within(shown), (canary, shown)
        assert not canary.within(canary.value[:-1] + "!")
    assert where([PASSWORD], {"a": PASSWORD.value, "b": ""}) == ["password of an address in a"]


def test_no_secret_is_in_a_file_that_a_run_leaves(ran: Ran, fault: Count) -> None:
    places = files(ran.work, ran.home)
    del places[str(ran.work / ".env")]
    found = where(SECRETS, {path: data for path, data in places.items() if not path.endswith(ARGUMENTS)})
    assert found == []
    for name in ("model.safetensors", "onnx/model.onnx", "README.md", "compression.json", "tokenizer.json"):
        assert str(ran.work / "student" / name) in places
    fault("secrets", note="files")


def test_the_token_of_the_arguments_is_where_transformers_puts_it_and_nowhere_else(ran: Ran, fault: Count) -> None:
    """If this fails because the first list is empty, transformers has mended it, and our warning can go."""
    arguments = {path: data for path, data in files(ran.work).items() if path.endswith(ARGUMENTS)}
    held = [place.rpartition("/")[0].rpartition("/")[2] for place in where([ARGUMENT], arguments)]
    assert {"checkpoint-1", "checkpoint-2", "student"} <= set(held)
    assert where([ENVIRONMENT, PASSWORD, FILE], arguments) == []
    assert not ALLOWED.fullmatch(ARGUMENTS)
    assert ARGUMENTS not in ran.hub.files("me/small")
    assert "hub_token" in ran.log
    assert "training_args.bin" in ran.log
    fault("secrets", note="hub_token")


def test_no_secret_is_logged_or_printed_at_debug(ran: Ran, fault: Count) -> None:
    assert len(ran.log) > 50_000
    for library in ("httpx2", "httpcore2", "huggingface_hub", "transformers", "hf_compress"):
        assert library in ran.log, f"{library} logged nothing"
    assert where(SECRETS, {"log": ran.log, "output": ran.out}) == []
    assert "One commit with" in ran.out
    fault("secrets", note="logs")


FAILING = {
    "a NaN": "NumericalError",
    "a token as a name": "facts must not hold a token",
    "arguments that would be uploaded": "Leave hub_token out",
    "an unknown token": "who you are failed",
    "an address with a password": "holds a user or a password",
    "a hub that repeats the token": "this token is no good: hf_…",
    "a hub that is gone": "who you are failed",
    "a token in a card": "holds a token",
    "a token in a recipe": "'token'",
    "a token as a number": "seed",
    "a token in a record": "facts must not hold a token",
    "a command with a password": "holds a user or a password",
    "a command with an address of no repository": "names no repository",
    "a distill with a password": "holds a user or a password",
}


def test_no_secret_is_in_an_error_or_its_traceback(ran: Ran, fault: Count) -> None:
    errors = ran.errors
    assert errors.keys() == FAILING.keys()
    assert [name for name, said in FAILING.items() if said not in errors[name]] == []
    assert where(SECRETS, errors) == []
    for name in errors:
        fault("secrets", note=name)


def test_the_hub_is_sent_the_token_in_its_own_header_alone(ran: Ran, fault: Count) -> None:
    sent = received(ran.hub)
    own = [
        ENVIRONMENT,
        PASSWORD,
        FILE,
        USER,
        HOST,
        Canary("working folder", str(ran.work)),
        Canary("home", str(ran.home)),
    ]
    assert where(own, sent) == []
    assert where([ARGUMENT], sent) == []
    headers = [request.headers for request in ran.hub.log]
    assert {line for text in headers for line in re.findall("(?im)^authorization: .*$", text)} == {
        f"authorization: Bearer {token.value}"
        for token in (ENVIRONMENT, ARGUMENT)  # the second was asked for
    }
    fault("secrets", note="requests")


def test_the_student_of_a_private_teacher_is_private(ran: Ran) -> None:
    assert ran.hub.repo("me/small").private


def test_no_place_user_or_host_is_in_what_was_pushed(ran: Ran, fault: Count) -> None:
    places = [USER, HOST, Canary("home", str(ran.home)), Canary("working folder", str(ran.work))]
    places += [Canary("this host", name) for name in (socket.gethostname(), os.uname().nodename) if len(name) > 5]
    places += [Canary("packages", str(Path(sys.prefix))), Canary("checkout", str(Path(__file__).parents[2]))]
    student = {path: data for path, data in files(ran.work / "student").items() if not path.endswith(ARGUMENTS)}
    assert where(places, student) == []
    assert where(places, ran.hub.files("me/small")) == []
    fault("secrets", note="places")


def test_a_record_shows_no_token_in_its_error(canary_token: Canary) -> None:
    with pytest.raises(ValueError, match="facts must not hold a token") as caught:
        Data(name=f"rows of {canary_token.value}", rows=1, fingerprint="0")
    assert where([canary_token], {"error": str(caught.value)}) == []
