"""hf_compress.hub against the loopback hub: one commit of the allowed files, or none and a plain word."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from hf_compress import facts
from hf_compress.errors import ForeignFileError, HubError
from hf_compress.hub import Pushed, authorize, check, collect, strip, write_commit
from hf_compress.hub import push as push_folder
from tests.tiny import tiny_bert_classifier, tiny_tokenizer

from .server import Fault, Hub
from .store import Blob

CANARY = "hf_" + "CanaryThatMustNotLeave".ljust(34, "7")
CARD = "---\nlicense: apache-2.0\nlibrary_name: transformers\ntags:\n- distillation\n---\n# A small model\n"
SENT = {
    "LICENSE", "README.md", "compression.json", "config.json", "evidence/curve.png", "evidence/runs/loss.parquet",
    "model.safetensors", "onnx_int8/config.json", "onnx_int8/model.onnx", "onnx/config.json", "onnx/export.json",
    "onnx/model.onnx", "onnx/model.onnx_data", "onnx/tokenizer.json", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


LOOKALIKE = b"KiUVHhf_INeIrSdTioaYTSNVFWJFIRVXdUDPKZ@ULQ"
"""Weights of eight bits as a real student had them; see `outgoing._check_secrets`."""


def graph(name: str, metadata: str = "") -> bytes:
    weights = onnx.helper.make_tensor("weights", onnx.TensorProto.INT8, [len(LOOKALIKE)], LOOKALIKE, raw=True)
    model = onnx.helper.make_model(onnx.helper.make_graph([], name, [], [], initializer=[weights]))
    onnx.helper.set_model_props(model, {"made": metadata} if metadata else {})
    return model.SerializeToString()


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What training, export and card leave behind, with secrets where they are found in practice."""
    folder = tmp_path_factory.mktemp("built") / "student"
    tiny_bert_classifier().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    write(folder / "README.md", CARD)
    write(folder / "LICENSE", "Apache License")
    write(folder / "onnx/model.onnx_data", LOOKALIKE)
    for name in ("onnx/model.onnx", "onnx_int8/model.onnx"):
        write(folder / name, graph(f"graph of {name}"))
    for name in ("onnx/config.json", "onnx/export.json", "onnx_int8/config.json", "onnx/tokenizer.json"):
        write(folder / name, "{}")
    evidence = [
        write(folder / "evidence/curve.png", b"\x89PNG\0"),
        write(folder / "evidence/runs/loss.parquet", b"PAR1\0"),
    ]
    facts.register(folder, [folder / "onnx/model.onnx", folder / "model.safetensors", *evidence])

    write(folder / "training_args.bin", pickle.dumps({"hub_token": CANARY}))
    write(folder / ".env", f"HF_TOKEN={CANARY}")
    write(folder / "notes.json", json.dumps({"token": CANARY}))
    write(folder / "optimizer.pt", CANARY)
    write(folder / "checkpoint-5/model.safetensors", CANARY)
    write(folder / "onnx/notes.txt", CANARY)
    write(folder / "evidence/.hidden.json", CANARY)
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "student"))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_compress.hub.WAITS", (0.0, 0.0))


@pytest.fixture
def push(hub: Hub, folder: Path) -> Callable[..., Pushed]:
    """`push` of that folder to me/student, with the owner's token unless told otherwise."""

    def call(**settings: object) -> Pushed:
        known = {"folder": folder, "repo_id": "me/student", "token": hub.token, "endpoint": hub.url}
        return push_folder(**(known | settings))

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_one_commit_holds_exactly_the_allowed_files(hub: Hub, push: Callable[..., Pushed], folder: Path) -> None:
    before = contents(folder)
    pushed = push()
    assert hub.files("me/student") == {name: (folder / name).read_bytes() for name in SENT}
    assert (pushed.oid, set(pushed.files), pushed.new) == (hub.history("me/student")[0].oid, SENT, True)
    assert len(hub.history("me/student")) == 2  # the hub's own first commit, and ours
    assert pushed.url == f"{hub.url}/me/student/commit/{pushed.oid}"
    assert contents(folder) == before


def test_no_secret_was_ever_received(hub: Hub, push: Callable[..., Pushed], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    push()
    assert not hub.received(CANARY)
    assert not hub.received(str(Path.home()) + "/")


def test_what_is_sent_and_what_stays_can_be_told_before(folder: Path) -> None:
    sent = check(folder)
    assert set(sent.names) == SENT
    assert sent.stays == (".env", "checkpoint-5/", "notes.json", "optimizer.pt", "training_args.bin")
    assert "stays here: .env, checkpoint-5/" in sent.describe()
    assert f"{(folder / 'model.safetensors').stat().st_size:,}  model.safetensors" in sent.describe()


def test_a_second_push_makes_no_commit_and_says_so(hub: Hub, push: Callable[..., Pushed]) -> None:
    first, second = push(), push()
    assert (second.oid, second.new) == (first.oid, False)
    assert "no new commit" in second.describe()
    assert len(hub.asked("POST .*/commit/")) == 1


def test_a_file_that_is_gone_here_is_taken_away_there_but_not_what_others_added(
    hub: Hub, push: Callable[..., Pushed], folder: Path
) -> None:
    push()
    api = HfApi(endpoint=hub.url, token=hub.token)
    api.create_commit("me/student", [CommitOperationAdd("notes.md", b"by hand")], commit_message="by hand")
    shutil.rmtree(folder / "onnx_int8")
    pushed = push()
    assert pushed.deleted == ("onnx_int8/config.json", "onnx_int8/model.onnx")
    assert "2 files of an earlier push deleted" in pushed.describe()
    assert set(hub.files("me/student")) == SENT - set(pushed.deleted) | {"notes.md"}


def test_licence_and_evidence_of_an_earlier_push_stay(hub: Hub, push: Callable[..., Pushed], folder: Path) -> None:
    """By hand or by a push: what was measured once, and on which terms, is not taken away."""
    push()
    api = HfApi(endpoint=hub.url, token=hub.token)
    kept = ("LICENSE", "LICENSE-weights.txt", "evidence/earlier/curve.png")
    added = [CommitOperationAdd(name, b"kept") for name in (*kept, "model-00001-of-00002.safetensors")]
    api.create_commit("me/student", added, commit_message="earlier")
    write(folder / "vocab.txt", "[PAD]\n")
    assert push().deleted == ("model-00001-of-00002.safetensors",)
    assert set(kept) <= set(hub.files("me/student"))


def test_the_pushed_model_loads_with_from_pretrained(
    hub: Hub, push: Callable[..., Pushed], client: Callable[..., str], folder: Path
) -> None:
    push()
    code = (
        "import torch\n"
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n"
        "model = AutoModelForSequenceClassification.from_pretrained('me/student')\n"
        "batch = AutoTokenizer.from_pretrained('me/student')('a good film', return_tensors='pt')\n"
        "print(model(**batch).logits.tolist())"
    )
    import torch

    with torch.inference_mode():
        expected = tiny_bert_classifier()(**tiny_tokenizer()("a good film", return_tensors="pt")).logits
    assert json.loads(client(code, token=None).splitlines()[-1])[0] == pytest.approx(expected[0].tolist(), abs=1e-5)


def test_a_lost_reply_after_the_commit_is_recognised(hub: Hub, push: Callable[..., Pushed]) -> None:
    for status in (503, None, 200):  # 200: a page instead of the answer
        hub.plan = [Fault("POST .*/commit/", status=status, applied=True)]
        hub.repos.clear()
        assert push().oid == hub.history("me/student")[0].oid
        assert (set(hub.files("me/student")), len(hub.history("me/student")), hub.plan) == (SENT, 2, [])


@pytest.mark.parametrize(
    "faults",
    [
        [Fault("POST .*/commit/")],
        [Fault("POST .*/commit/", status=429, headers={"Retry-After": "1"})],
        [Fault("POST .*/commit/", status=None), Fault("POST .*/commit/", status=502, applied=True)],
        [Fault("POST .*/commit/", seconds=0.3)],
    ],
)
def test_a_failure_before_the_commit_is_retried_to_one_commit(
    hub: Hub, push: Callable[..., Pushed], faults: list[Fault]
) -> None:
    hub.plan = [*faults]
    push()
    assert (set(hub.files("me/student")), len(hub.history("me/student")), hub.plan) == (SENT, 2, [])


def test_a_hub_that_stays_busy_ends_in_an_error_and_a_later_push_completes(
    hub: Hub, push: Callable[..., Pushed], folder: Path
) -> None:
    before = contents(folder)
    hub.plan = [Fault("POST .*/commit/") for _ in range(3)]
    with pytest.raises(HubError, match=r"503.*holds what it held") as caught:
        push()
    assert (hub.files("me/student"), hub.plan, contents(folder)) == ({}, [], before)
    assert hub.history("me/student")[0].oid[:7] in str(caught.value)
    push()
    assert len(hub.history("me/student")) == 2
    assert len(hub.asked("PUT /lfs/")) == len({r.path for r in hub.asked("PUT /lfs/")})  # nothing was uploaded twice


def test_somebody_elses_push_in_between_stops_ours(
    hub: Hub, push: Callable[..., Pushed], monkeypatch: pytest.MonkeyPatch
) -> None:
    push()
    _push_of_another_during_ours(hub, monkeypatch)
    theirs = hub.files("me/student") | {"config.json": b"{}"}
    with pytest.raises(HubError, match="Somebody else pushed to me/student") as caught:
        push()
    assert hub.files("me/student") == theirs
    assert hub.history("me/student")[0].oid[:7] in str(caught.value)
    assert hub.history("me/student")[0].title == "theirs"


def _push_of_another_during_ours(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes the remote between our look at its head and our commit; ours has something to commit too."""
    create, repo = HfApi.create_commit, hub.repo("me/student")
    repo.commit(
        "main",
        "ours of yesterday",
        repo.at("main").files | {"model.safetensors": repo.at("main").files["config.json"]},
        repo.refs["main"],
    )

    def late(self: HfApi, *args: object, **settings: object) -> object:
        if len(hub.history("me/student")) == 3:
            full = {name: Blob(data, False) for name, data in hub.files("me/student").items()} | {
                "config.json": Blob(b"{}", False)
            }
            repo.commit("main", "theirs", full, repo.refs["main"])
        return create(self, *args, **settings)

    monkeypatch.setattr(HfApi, "create_commit", late)


def test_bytes_that_were_not_checked_do_not_pass_for_a_success(
    hub: Hub, push: Callable[..., Pushed], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = HfApi.preupload_lfs_files

    def late(self: HfApi, *args: object, **settings: object) -> None:
        write(folder / "LICENSE", "another licence")
        upload(self, *args, **settings)

    monkeypatch.setattr(HfApi, "preupload_lfs_files", late)
    with pytest.raises(HubError, match="other bytes than were checked"):
        push()


def test_a_commit_that_cannot_be_read_back_is_said_to_be_made(hub: Hub, push: Callable[..., Pushed]) -> None:
    hub.plan = [Fault("GET .*/tree/", status=403, skip=1)]
    with pytest.raises(HubError, match="was made and could not be read back"):
        push()
    assert push().new is False


def test_a_hub_that_cannot_be_asked_after_a_failure_is_said_to_be_unknown(
    hub: Hub, push: Callable[..., Pushed]
) -> None:
    hub.plan = [
        Fault("POST .*/commit/", status=None, applied=True),
        Fault("GET .*/revision/main", status=403, skip=1),  # the first time is before the commit
    ]
    with pytest.raises(HubError, match="not known") as caught:
        push()
    assert "Push again" in str(caught.value)
    assert push().new is False
    assert len(hub.history("me/student")) == 2


def test_a_pull_request_leaves_main_alone_and_a_lost_reply_makes_no_second_one(
    hub: Hub, push: Callable[..., Pushed]
) -> None:
    HfApi(endpoint=hub.url, token=hub.token).create_repo("me/student")
    hub.plan = [Fault("POST .*/commit/", applied=True)]
    pushed = push(token=hub.stranger, create_pr=True)
    assert (set(hub.files("me/student", "refs/pr/1")), hub.files("me/student")) == (SENT, {})
    assert pushed.url == f"{hub.url}/me/student/discussions/1"
    assert [ref for ref in hub.repo("me/student").refs if ref.startswith("refs/pr/")] == ["refs/pr/1"]
    with pytest.raises(HubError, match="goes to main"):
        push(create_pr=True, revision="dev")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"token": "hf_" + "NobodyKnowsThisOne".ljust(30, "3")}, "Asking the hub who you are failed"),
        ({"token": Hub.stranger}, "does not belong to stranger"),
        ({"token": Hub.reader}, "may only read"),
        ({"repo_id": "other/student"}, "does not belong to me or team"),
        ({"revision": "nowhere"}, "nowhere of me/student"),
        ({"endpoint": "http://127.0.0.1:9"}, "Asking the hub who you are failed"),
        ({"repo_id": "me/not a name"}, "me/not a name"),
    ],
)
def test_a_push_that_cannot_work_sends_no_file(
    hub: Hub, push: Callable[..., Pushed], settings: dict[str, str], told: str
) -> None:
    with pytest.raises(HubError, match=told) as caught:
        push(**settings)
    assert "Nothing was sent" in str(caught.value)
    assert not hub.asked("preupload|commit|lfs")


def test_without_a_token_the_remedy_is_named(
    hub: Hub, push: Callable[..., Pushed], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_compress.remote.get_token", lambda: None)
    with pytest.raises(HubError, match="hf auth login"):
        push(token=None)


def test_a_bare_name_belongs_to_the_user_and_the_organisation_works(hub: Hub, push: Callable[..., Pushed]) -> None:
    push(repo_id="mine")
    push(repo_id="team/ours", private=True)
    assert hub.repo("me/mine").private is False
    assert hub.repo("team/ours").private is True


def test_a_public_repository_is_not_taken_for_a_private_one(hub: Hub, push: Callable[..., Pushed]) -> None:
    HfApi(endpoint=hub.url, token=hub.token).create_repo("me/student")
    with pytest.raises(HubError, match="is public"):
        push(private=True)
    assert not hub.asked("preupload")


def test_no_message_holds_a_token(hub: Hub, push: Callable[..., Pushed]) -> None:
    endpoint = hub.url.replace("://", f"://me:{CANARY}@")
    hub.plan = [Fault("GET /api/whoami", status=500, headers={"X-Error-Message": f"no {hub.token}"}) for _ in range(9)]
    for settings in ({}, {"endpoint": endpoint}, {"endpoint": endpoint, "token": CANARY}):
        with pytest.raises(HubError) as caught:
            push(**settings)
        shown = "".join(traceback.format_exception(caught.value))
        assert hub.token not in shown
        assert CANARY not in shown


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("README.md", CARD.replace("license: apache-2.0", "license: null"), "license is null"),
        ("README.md", CARD.replace("- distillation", "- null"), "tags.0 is null"),
        ("README.md", CARD.replace("license: apache-2.0", "base_model: a b c"), "a b c"),
        ("README.md", CARD.replace("license: apache-2.0", "base_model: [3]"), "base_model must hold texts"),
        ("README.md", "# no metadata\n", "no block of metadata"),
        ("README.md", "---\na: &a [1]\nb: *a\n---\n", "alias"),
        ("README.md", "---\n- a\n---\n", "instead of a mapping"),
        ("README.md", "---\na: [\n---\n", "metadata that the hub refuses"),
        ("README.md", "---\nmodel-index:\n- results: 3\n---\n", "metadata that the hub refuses"),
        ("README.md", CARD + CANARY, "holds a token"),
        ("README.md", CARD + f"{Path.cwd()}/x", "path of your working folder"),
        ("onnx/export.json", f'{{"made": "{Path.home()}/x"}}', "path of your home folder"),
        ("onnx_int8/model.onnx", graph("int8", metadata=CANARY), "holds a token"),
        ("onnx_int8/model.onnx", graph("int8", metadata=f"{Path.home()}/x"), "path of your home folder"),
        ("onnx_int8/model.onnx", b"no graph", "not a readable ONNX graph"),
        ("onnx/model.onnx", b"other\0", "has changed since it was recorded"),
        ("model.safetensors", b"no weights", "has changed|no safetensors"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "model-1.safetensors"}}', "which is missing"),
        ("model.safetensors.index.json", '{"weight_map": 3}', "no weight_map"),
        ("spiece.model", pickle.dumps({}), "is a pickle"),
        ("compression.json", "{", "not valid JSON"),
    ],
)  # fmt: skip
def test_a_folder_that_is_not_fit_is_refused_before_anything_is_asked(
    hub: Hub, push: Callable[..., Pushed], folder: Path, name: str, data: bytes | str, told: str
) -> None:
    write(folder / name, data)
    with pytest.raises(HubError, match=told) as caught:
        push()
    assert name in str(caught.value)
    assert "Nothing was sent" in str(caught.value)
    assert hub.log == []


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "README.md"])
def test_a_folder_that_lacks_a_part_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    for each in folder.rglob("*.onnx"):
        each.unlink()
    with pytest.raises(HubError, match="Nothing was sent"):
        check(folder)


def test_the_value_of_the_token_is_found_whatever_it_looks_like(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder / "README.md", CARD + "my-own-proxy-secret")
    check(folder)
    with pytest.raises(HubError, match="your token"):
        check(folder, token="my-own-proxy-secret")
    monkeypatch.setenv("HF_TOKEN", "my-own-proxy-secret")
    with pytest.raises(HubError, match="your token"):
        check(folder)


def test_the_value_of_a_token_is_found_in_weights_too(folder: Path) -> None:
    with pytest.raises(HubError, match="your token"):
        check(folder, token=LOOKALIKE[5:30].decode())


def test_a_token_in_the_header_of_weights_is_found(folder: Path) -> None:
    (folder / "compression.json").unlink()
    save_file({"weight": np.frombuffer(LOOKALIKE, np.int8)}, folder / "model.safetensors")
    check(folder)
    save_file({"weight": np.zeros(2)}, folder / "model.safetensors", metadata={"made": CANARY})
    with pytest.raises(HubError, match="holds a token"):
        check(folder)


def test_links_out_of_the_folder_or_to_a_secret_are_refused(folder: Path, tmp_path: Path) -> None:
    outside = write(tmp_path / "outside/secret.txt", CANARY)
    for link, target in (("vocab.txt", outside), ("LICENSE.txt", folder / ".env"), ("onnx_fp16", outside.parent)):
        (folder / link).symlink_to(target)
        write(outside.parent / "config.json", "{}")
        with pytest.raises(ForeignFileError, match=r"leads out|must not leave"):
            collect(folder)
        (folder / link).unlink()
    (folder / "vocab.txt").symlink_to(folder / "tokenizer.json")
    assert Path("vocab.txt") in collect(folder)


def with_distiller(path: Path) -> None:
    tensors = load_file(path) | {"distiller.kd.step": np.zeros(3), "distiller.features.weight": np.zeros((2, 2))}
    save_file(tensors, path, metadata={"format": "pt", "made": "here"})


def test_entries_of_the_distiller_are_refused_and_strip_takes_them_out(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    with_distiller(path)
    facts.register(folder, [path])
    with pytest.raises(HubError, match=r"2 entries of the distiller.*hf_compress\.hub\.strip"):
        check(folder)
    mode = path.stat().st_mode

    assert set(strip(folder)) == {"distiller.kd.step", "distiller.features.weight"}
    assert strip(folder) == ()
    check(folder)
    with safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"format": "pt", "made": "here"}
    stripped = load_file(path)
    assert stripped.keys() == weights.keys()
    assert all(np.array_equal(stripped[key], weights[key]) for key in weights)
    assert path.stat().st_mode == mode


def test_strip_follows_the_shards_of_an_index(folder: Path) -> None:
    (folder / "compression.json").unlink()
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    with_distiller(folder / "model-00001-of-00001.safetensors")
    names = dict.fromkeys(load_file(folder / "model-00001-of-00001.safetensors"), "model-00001-of-00001.safetensors")
    write(folder / "model.safetensors.index.json", json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    strip(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in weights.values())
    check(folder)


def test_strip_leaves_the_old_file_when_the_disk_is_full(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_distiller(folder / "model.safetensors")
    facts.register(folder, [folder / "model.safetensors"])
    before = contents(folder)
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        strip(folder)
    assert contents(folder) == before


def test_a_commit_is_written_as_a_folder_without_a_hub(folder: Path, tmp_path: Path) -> None:
    for _ in range(2):
        output = write_commit(folder, tmp_path / "commit")
    assert contents(output) == {name: (folder / name).read_bytes() for name in SENT}


def test_a_folder_that_is_no_commit_is_never_replaced(folder: Path, tmp_path: Path) -> None:
    precious = write(tmp_path / "home/thesis.tex", "years of work")
    for output in (tmp_path / "home", folder, folder / "commit", tmp_path, precious):
        with pytest.raises(HubError, match=r"in one another|no earlier commit"):
            write_commit(folder, output)
    assert precious.read_text() == "years of work"


def test_whether_a_push_can_work_is_found_out_without_writing(hub: Hub) -> None:
    assert authorize("student", token=hub.token, endpoint=hub.url) == "me/student"
    with pytest.raises(HubError, match="does not belong"):
        authorize("you/student", token=hub.token, endpoint=hub.url)
    assert {request.method for request in hub.log} == {"GET"}
    assert not hub.repos


# ---------------------------------------------------------------------- licence and tags


def test_a_model_without_a_licence_does_not_leave(push: Callable[..., Pushed], hub: Hub, folder: Path) -> None:
    write(folder / "README.md", CARD.replace("license: apache-2.0\n", ""))
    with pytest.raises(HubError, match=r"names no licence .*`license:` at the top"):
        push()
    assert not hub.repos


def test_a_tag_names_the_commit_and_stays_where_it_is(push: Callable[..., Pushed], hub: Hub, folder: Path) -> None:
    def tags() -> dict[str, str]:
        refs = HfApi(endpoint=hub.url, token=hub.token).list_repo_refs("me/student")
        return {tag.name: tag.target_commit for tag in refs.tags}

    first = push(tag="v1")
    assert tags() == {"v1": first.oid}
    again = push(tag="v1")  # the same files: no new commit, and the tag is there
    assert (again.new, again.oid) == (False, first.oid)
    assert push(tag="v1.0").oid == first.oid
    write(folder / "README.md", CARD + "\nMore.\n")
    with pytest.raises(HubError, match=r"has a tag v1 at .*Nothing was sent"):
        push(tag="v1")
    second = push(tag="v2")
    assert tags() == {"v1": first.oid, "v1.0": first.oid, "v2": second.oid}
    with pytest.raises(HubError, match="can be no tag"):
        push(tag="v 3")
    with pytest.raises(HubError, match="before it is merged"):
        push(tag="v3", create_pr=True)
