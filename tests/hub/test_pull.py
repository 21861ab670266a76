"""hf_compress.pulling against the loopback hub: the whole folder, as its record says, or none and a plain word."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from typer.testing import CliRunner

from hf_compress import cli, facts
from hf_compress.errors import ConfigurationError, HubError
from hf_compress.hub import push
from hf_compress.pulling import Pulled
from hf_compress.pulling import pull as pull_folder
from tests.tiny import tiny_bert_classifier, tiny_tokenizer

from .server import Fault, Hub

CARD = "---\nlicense: apache-2.0\n---\n# A small model\n"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with its record."""
    folder = tmp_path_factory.mktemp("built") / "student"
    tiny_bert_classifier().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    (folder / "evidence").mkdir()
    (folder / "evidence/curve.png").write_bytes(b"\x89PNG\0")
    facts.register(folder, [folder / "model.safetensors", folder / "config.json", folder / "evidence/curve.png"])
    return folder


@pytest.fixture
def pushed(hub: Hub, built: Path) -> Path:
    """me/student holds it, and beside it what others put there."""
    push(built, "me/student", token=hub.token, endpoint=hub.url)
    change(hub, {"pytorch_model.bin": pickle.dumps("weights"), "notes.txt": b"by hand"})
    return built


@pytest.fixture
def pull(hub: Hub, tmp_path: Path) -> Callable[..., Pulled]:
    """`pull` of me/student to tmp_path/here, without a token unless told otherwise."""

    def call(**settings: object) -> Pulled:
        known = {"repo_id": "me/student", "folder": tmp_path / "here", "endpoint": hub.url}
        return pull_folder(**(known | settings))  # type: ignore[arg-type]

    return call


def change(hub: Hub, contents: dict[str, bytes], **settings: object) -> str:
    """A commit to me/student by somebody."""
    operations = [CommitOperationAdd(name, data) for name, data in contents.items()]
    api = HfApi(endpoint=hub.url, token=hub.token)
    return str(api.create_commit("me/student", operations, commit_message="by hand", **settings).oid)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_was_pushed_comes_back_and_nothing_else(
    hub: Hub, pushed: Path, pull: Callable[..., Pulled], tmp_path: Path
) -> None:
    found = pull()
    assert contents(tmp_path / "here") == contents(pushed)
    assert (found.oid, found.new, found.recorded) == (hub.history("me/student")[0].oid, True, 3)
    assert set(found.left) == {"notes.txt", "pytorch_model.bin"}
    assert "Left there: notes.txt, pytorch_model.bin." in found.describe()
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert not hub.asked("GET .*(pytorch_model.bin|notes.txt)")


def test_pulled_again_nothing_is_fetched_and_other_files_are_not_written_over(
    hub: Hub, pushed: Path, pull: Callable[..., Pulled], tmp_path: Path
) -> None:
    pull()
    hub.log.clear()
    again = pull()
    assert not again.new
    assert "holds these" in again.describe()
    assert not hub.asked("GET .*/resolve/")
    (tmp_path / "here/config.json").write_text("{}")
    with pytest.raises(ConfigurationError, match=r"its config\.json is missing or not what the hub holds"):
        pull()
    assert (tmp_path / "here/config.json").read_text() == "{}"


def test_a_revision_is_a_commit_a_tag_or_a_branch(hub: Hub, pushed: Path, pull: Callable[..., Pulled]) -> None:
    first = hub.history("me/student")[0].oid
    HfApi(endpoint=hub.url, token=hub.token).create_tag("me/student", tag="v1")
    change(hub, {"README.md": CARD.encode() + b"later"})
    assert pull(revision="v1").oid == first
    assert pull(revision=first).new is False
    with pytest.raises(HubError, match=r"for v2 of me/student failed.*Nothing was pulled"):
        pull(revision="v2")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "evidence/curve.png"])
def test_a_file_changed_on_the_hub_is_named_and_leaves_nothing(
    hub: Hub, pushed: Path, pull: Callable[..., Pulled], tmp_path: Path, name: str
) -> None:
    data = bytearray((pushed / name).read_bytes())
    data[-1] ^= 1
    change(hub, {name: bytes(data)})
    with pytest.raises(HubError, match=rf"me/student was not pulled: {name}: changed"):
        pull()
    assert not list(tmp_path.iterdir())


def test_all_that_differs_from_the_record_is_named(hub: Hub, pushed: Path, pull: Callable[..., Pulled]) -> None:
    change(hub, {"config.json": b"{}", "evidence/curve.png": b"other"})
    with pytest.raises(HubError, match=r"config\.json: changed.*evidence/curve\.png: changed"):
        pull()


def test_a_repository_without_a_record_is_pulled_and_says_so(
    hub: Hub, built: Path, pull: Callable[..., Pulled], tmp_path: Path
) -> None:
    HfApi(endpoint=hub.url, token=hub.token).create_repo("me/student")
    change(hub, {name: (built / name).read_bytes() for name in ("config.json", "model.safetensors")})
    found = pull()
    assert found.recorded == 0
    assert "No compression.json records their hashes" in found.describe()
    assert set(contents(tmp_path / "here")) == {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b"\x80"}, "holds no weights as safetensors or ONNX"),
        ({"config.json": b"{}", "model.safetensors": pickle.dumps("x" * 99)}, "model.safetensors is no safetensors"),
        ({"model.onnx": b"", "onnx/model.onnx": b"", "spiece.model": pickle.dumps("x")}, "spiece.model is a pickle"),
        ({"model.safetensors": b"", "compression.json": b"[]"}, "compression.json holds a list"),
    ],
)
def test_what_no_model_folder_may_hold_is_refused_by_name(
    hub: Hub, pull: Callable[..., Pulled], tmp_path: Path, files: dict[str, bytes], said: str
) -> None:
    HfApi(endpoint=hub.url, token=hub.token).create_repo("me/student")
    change(hub, files)
    with pytest.raises(HubError, match=said):
        pull()
    assert not list(tmp_path.iterdir())


def test_a_pull_that_was_cut_off_goes_on_and_its_folder_appears_whole(
    hub: Hub, pushed: Path, pull: Callable[..., Pulled], tmp_path: Path
) -> None:
    hub.plan = [Fault("/resolve/.*/tokenizer.json", status=404, times=20)]
    with pytest.raises(HubError, match=r"kept in \.here\.pulling: pull again to go on"):
        pull()
    assert not (tmp_path / "here").exists()
    kept = contents(tmp_path / ".here.pulling")
    hub.plan, hub.log = [], []
    assert pull().new
    assert contents(tmp_path / "here") == contents(pushed)
    assert not (tmp_path / ".here.pulling").exists()
    for name in set(kept) & set(contents(pushed)):  # what had arrived
        assert not hub.asked(f"GET .*/resolve/.*/{name}$"), name


def test_what_an_earlier_commit_left_behind_does_not_stay(
    hub: Hub, pushed: Path, pull: Callable[..., Pulled], tmp_path: Path
) -> None:
    stage = Path(shutil.copytree(pushed, tmp_path / ".here.pulling"))
    (stage / "onnx_old").mkdir()
    (stage / "onnx_old/model.onnx").write_bytes(b"old")
    (stage / "config.json").write_text("{}")
    pull()
    assert contents(tmp_path / "here") == contents(pushed)
    assert not (tmp_path / "here/onnx_old").exists()


def test_a_private_repository_needs_its_owners_token(hub: Hub, built: Path, pull: Callable[..., Pulled]) -> None:
    push(built, "me/student", token=hub.token, endpoint=hub.url, private=True)
    with pytest.raises(HubError, match="failed"):
        pull()
    with pytest.raises(HubError, match="failed") as refused:
        pull(token=hub.stranger)
    assert hub.stranger not in str(refused.value)
    assert pull(token=hub.token).new


def test_the_command_takes_a_url_and_names_the_folder_like_the_repository(
    hub: Hub, pushed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_compress.cli.shared.quiet", lambda: None)  # it is for a process of its own
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.app, ["pull", f"{hub.url}/me/student"], catch_exceptions=False)
    assert (done.exit_code, done.stdout) == (0, "")
    assert "3 of them have the hashes that compression.json records." in done.stderr
    assert contents(tmp_path / "student") == contents(pushed)
