"""The test hub itself, asked by the real huggingface_hub: what works, and that it refuses what the real hub refuses."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session, hf_raise_for_status

from .server import Fault, Hub
from .store import card_errors

CARD = "---\nlicense: mit\ntags:\n- distillation\n---\n# A model\n"


@pytest.fixture
def api(hub: Hub) -> HfApi:
    return HfApi(endpoint=hub.url, token=hub.token)


@pytest.fixture
def repo(api: HfApi) -> str:
    return api.create_repo("me/model").repo_id


def add(**contents: bytes) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(name.replace("__", "."), data) for name, data in contents.items()]


def post(hub: Hub, path: str, body: bytes, token: str | None = Hub.token) -> None:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    hf_raise_for_status(get_session().post(hub.url + path, content=body, headers=headers))


def lines(*values: object) -> bytes:
    return b"\n".join(json.dumps(value).encode() for value in values)


HEADER = {"key": "header", "value": {"summary": "by hand", "description": ""}}


def test_whoami_names_the_user_and_the_organisations(api: HfApi) -> None:
    who = api.whoami()
    assert (who["name"], [org["name"] for org in who["orgs"]]) == ("me", ["team"])


def test_a_repository_is_made_once_and_can_be_deleted(api: HfApi, repo: str) -> None:
    assert api.create_repo(repo, exist_ok=True).repo_id == repo
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(repo)
    api.delete_repo(repo)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info(repo)


def test_a_commit_holds_regular_and_lfs_files(hub: Hub, api: HfApi, repo: str) -> None:
    files = {"config.json": b"{}", "model.safetensors": bytes(5000), "README.md": CARD.encode()}
    info = api.create_commit(repo, [CommitOperationAdd(n, d) for n, d in files.items()], commit_message="first")

    assert hub.files(repo) == files
    assert api.model_info(repo).sha == info.oid == hub.history(repo)[0].oid
    entries = {entry.path: entry for entry in api.list_repo_tree(repo, recursive=True)}
    assert entries["model.safetensors"].lfs.size == 5000
    assert entries["config.json"].lfs is None
    assert [entry.path for entry in api.get_paths_info(repo, ["config.json", "none"])] == ["config.json"]
    assert [commit.title for commit in api.list_repo_commits(repo)] == ["first", "initial commit"]


def test_an_unchanged_file_makes_no_commit(hub: Hub, api: HfApi, repo: str) -> None:
    for _ in range(2):
        api.create_commit(repo, add(config__json=b"{}", model__safetensors=bytes(99)), commit_message="again")
    assert len(hub.history(repo)) == 2


def test_files_and_folders_are_deleted_and_a_missing_one_is_refused(hub: Hub, api: HfApi, repo: str) -> None:
    api.create_commit(repo, [CommitOperationAdd("onnx/a.json", b"{}"), *add(b=b"b")], commit_message="add")
    api.create_commit(repo, [CommitOperationDelete("onnx/"), CommitOperationDelete("b")], commit_message="delete")
    assert hub.files(repo) == {}
    with pytest.raises(RemoteEntryNotFoundError):
        api.create_commit(repo, [CommitOperationDelete("b")], commit_message="delete")


def test_files_come_back_whole_and_in_ranges(hub: Hub, api: HfApi, repo: str, tmp_path: Path) -> None:
    data = bytes(range(256)) * 20
    api.create_commit(repo, add(model__safetensors=data), commit_message="first")
    path = api.hf_hub_download(repo, "model.safetensors", cache_dir=tmp_path)
    assert Path(path).read_bytes() == data
    url = f"{hub.url}/{repo}/resolve/main/model.safetensors"
    part = get_session().get(url, headers={"Range": "bytes=256-511"})
    assert (part.status_code, part.content) == (206, bytes(range(256)))
    assert part.headers["Content-Range"] == f"bytes 256-511/{len(data)}"


def test_a_missing_file_carries_the_commit(hub: Hub, api: HfApi, repo: str, tmp_path: Path) -> None:
    with pytest.raises(RemoteEntryNotFoundError) as caught:
        api.hf_hub_download(repo, "none.json", cache_dir=tmp_path)
    assert caught.value.response.headers["X-Repo-Commit"] == hub.history(repo)[0].oid


def test_branches_tags_and_settings(hub: Hub, api: HfApi, repo: str) -> None:
    api.create_branch(repo, branch="dev/one")
    api.create_commit(repo, add(a=b"a"), commit_message="on dev", revision="dev/one")
    api.create_tag(repo, tag="v1", revision="dev/one")
    assert (hub.files(repo), hub.files(repo, "dev/one")) == ({}, {"a": b"a"})
    refs = api.list_repo_refs(repo)
    assert ({b.name for b in refs.branches}, {t.name for t in refs.tags}) == ({"main", "dev/one"}, {"v1"})
    api.delete_branch(repo, branch="dev/one")
    api.delete_tag(repo, tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(repo, revision="dev/one")
    api.update_repo_settings(repo, visibility="private")
    assert hub.repo(repo).private


def test_a_pull_request_leaves_main_alone(hub: Hub, repo: str) -> None:
    stranger = HfApi(endpoint=hub.url, token=hub.stranger)
    info = stranger.create_commit(repo, add(a=b"a"), commit_message="please", create_pr=True)
    assert info.pr_url == f"{hub.url}/{repo}/discussions/1"
    assert (hub.files(repo), hub.files(repo, "refs/pr/1")) == ({}, {"a": b"a"})
    assert [pr.ref for pr in stranger.list_repo_refs(repo, include_pull_requests=True).pull_requests] == ["refs/pr/1"]


def test_from_pretrained_and_cards_work_in_a_child_that_knows_only_this_hub(
    hub: Hub, api: HfApi, repo: str, client: Callable[..., str]
) -> None:
    api.create_commit(repo, add(README__md=CARD.encode()), commit_message="first")
    code = "from huggingface_hub import ModelCard, snapshot_download\nimport os\n"
    code += f"card = ModelCard.load({repo!r}); card.validate()\n"
    code += f"print(card.data.license, *sorted(os.listdir(snapshot_download({repo!r}))))"
    assert client(code, token=None).split() == ["mit", ".gitattributes", "README.md"]


def index(**changes: Any) -> str:
    """A model-index of one result as YAML; whole if `changes` gives it metrics."""
    result = {"task": {"type": "text-classification"}, "dataset": {"type": "a/b", "name": "A"}} | changes
    return yaml.safe_dump({"model-index": [{"name": "small", "results": [result]}]})


def test_whole_metadata_of_a_card_are_taken() -> None:
    more = "license: mit\nbase_model: [a/b, c]\nbase_model_relation: finetune\n"
    assert card_errors(f"---\n{more}{index(metrics=[{'type': 'f1', 'value': 0.0}])}---\n") == []


@pytest.mark.parametrize(
    "metadata",
    [
        "tags: [",
        "- a list",
        "license: null",
        "datasets:\n- null",
        "tags:\n- 1",
        "model-index:\n- results: []",
        "license: MIT",
        "license: mine-1.0",
        "base_model: a b",
        "base_model_relation: distilled",
        "model-index:\n- name: a",
        index(),
        index(metrics=[{"type": "f1"}]),
        index(metrics=[{"value": 1.0}]),
        index(metrics=[{"type": "f1", "value": 0.5, "name": 1}]),
        index(metrics=[{"type": "f1", "value": 0.5}], dataset={"type": "a", "split": "test"}),
        index(metrics=[{"type": "f1", "value": 0.5}], dataset={"type": "a", "name": "A", "config": 1}),
        index(metrics=[{"type": "f1", "value": 0.5}], task={"name": "a"}),
    ],
)
def test_bad_metadata_of_a_card_is_refused(hub: Hub, api: HfApi, repo: str, metadata: str) -> None:
    card = f"---\n{metadata}\n---\n# A model\n".encode()
    with pytest.raises(ValueError, match="Invalid metadata in README"):
        api.create_commit(repo, add(README__md=card), commit_message="bad")
    api.preupload_lfs_files(repo, add(README__md=card))
    change = {"key": "file", "value": {"path": "README.md", "content": CARD_BAD, "encoding": "base64"}}
    with pytest.raises(BadRequestError, match="README"):
        post(hub, f"/api/models/{repo}/commit/main", lines(HEADER, change))
    assert len(hub.history(repo)) == 1


CARD_BAD = "LS0tCi0gYQotLS0KIyBiCg=="  # a card whose metadata is a list


def test_a_stale_parent_is_refused(hub: Hub, api: HfApi, repo: str) -> None:
    old = api.model_info(repo).sha
    api.create_commit(repo, add(a=b"a"), commit_message="first", parent_commit=old)
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit(repo, add(a=b"b"), commit_message="second", parent_commit=old)
    assert hub.files(repo) == {"a": b"a"}


def test_a_pointer_without_its_bytes_is_refused(hub: Hub, repo: str) -> None:
    file = {"path": "model.safetensors", "sample": "", "size": 9}
    post(hub, f"/api/models/{repo}/preupload/main", json.dumps({"files": [file]}).encode())
    value = {"path": "model.safetensors", "algo": "sha256", "oid": "0" * 64, "size": 9}
    with pytest.raises(BadRequestError, match="never uploaded"):
        post(hub, f"/api/models/{repo}/commit/main", lines(HEADER, {"key": "lfsFile", "value": value}))
    assert len(hub.history(repo)) == 1


def test_a_file_that_was_not_announced_or_comes_in_the_wrong_way_is_refused(hub: Hub, repo: str) -> None:
    change = {"key": "file", "value": {"path": "model.safetensors", "content": "YQ==", "encoding": "base64"}}
    with pytest.raises(BadRequestError, match="not announced"):
        post(hub, f"/api/models/{repo}/commit/main", lines(HEADER, change))
    file = {"path": "model.safetensors", "sample": "", "size": 9}
    post(hub, f"/api/models/{repo}/preupload/main", json.dumps({"files": [file]}).encode())
    with pytest.raises(BadRequestError, match="must be sent as lfs"):
        post(hub, f"/api/models/{repo}/commit/main", lines(HEADER, change))


def test_bytes_under_a_wrong_hash_are_refused(hub: Hub) -> None:
    with pytest.raises(BadRequestError, match="announced sha256"):
        hf_raise_for_status(get_session().put(f"{hub.url}/lfs/{'0' * 64}", content=b"other"))
    with pytest.raises(HfHubHTTPError, match="404"):
        post(hub, f"/lfs/{'0' * 64}/verify", b'{"size": 5}')


def test_a_bad_or_missing_token_is_refused(hub: Hub, repo: str) -> None:
    wrong, none = HfApi(endpoint=hub.url, token="hf_wrong"), HfApi(endpoint=hub.url, token=False)
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        wrong.whoami()
    for api in (wrong, none):
        with pytest.raises(HfHubHTTPError, match="401"):
            api.create_repo("me/other")
        with pytest.raises(HfHubHTTPError, match="401"):
            api.create_commit(repo, add(a=b"a"), commit_message="first")


def test_a_foreign_repository_is_refused(hub: Hub, repo: str) -> None:
    for token in (hub.stranger, hub.reader):
        api = HfApi(endpoint=hub.url, token=token)
        with pytest.raises(HfHubHTTPError, match="403"):
            api.create_commit(repo, add(a=b"a"), commit_message="first")
        with pytest.raises(HfHubHTTPError, match="403"):
            api.create_repo("me/other")
    assert hub.files(repo) == {}


def test_a_private_repository_is_hidden(hub: Hub, api: HfApi) -> None:
    api.create_repo("me/secret", private=True)
    for token in (hub.stranger, False):
        with pytest.raises(RepositoryNotFoundError):
            HfApi(endpoint=hub.url, token=token).model_info("me/secret")


def test_faults_happen_once_before_or_after_the_request_took_effect(hub: Hub, api: HfApi, repo: str) -> None:
    hub.plan += [Fault("POST .*/commit/"), Fault("POST .*/commit/", status=None, applied=True)]
    for commits in (1, 2):
        with pytest.raises(Exception, match=r"503|disconnected"):
            api.create_commit(repo, add(a=b"a"), commit_message="first")
        assert len(hub.history(repo)) == commits
    assert hub.plan == []


def test_the_log_finds_what_was_sent_also_inside_base64(hub: Hub, api: HfApi, repo: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        api.create_commit(repo, add(a=b"a canary in a file", w__safetensors=b"one in LFS\0"), commit_message="named")
    assert all(hub.received(text) for text in ("a canary in a file", "one in LFS", "named", hub.token))
    assert not hub.received("something else")
    assert len(hub.asked("POST .*/commit/main")) == 1
