"""Pushes a model folder to the hub: one commit that holds all of it, or none.

    hub.push(Path("student"), "me/my-small-model")

`outgoing.py` decides which files may leave and checks them first. The commit names the head that it was made for, so
somebody else's push is never overwritten. huggingface_hub does not retry a commit, rightly: a lost reply looks like a
failure. So after a failure the hub is asked what it holds before anything is tried again or said.
"""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]
from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

from . import facts, files, licences
from .errors import ConfigurationError, ForeignFileError, HubError
from .outgoing import ALLOWED, MANAGED, Outgoing, collect, strip
from .outgoing import check as _check
from .remote import Remote, file_hashes, limited, remote_hash

__all__ = [
    "Outgoing", "Pushed", "authorize", "check", "collect", "private_for", "push", "repository_of", "strip",
    "write_commit",
]  # fmt: skip

WAITS = (1.0, 4.0, 16.0)
"""Seconds before the commit is tried again; as many retries as there are entries."""
LONGEST_WAIT = 60.0
"""Seconds that a `Retry-After` of the hub is followed at most."""
BUSY = frozenset({408, 429, 500, 502, 503, 504})
_NETWORK_ERROR = HfHubHTTPError.__mro__[1]  # the base of huggingface_hub's HTTP library, whose name changes


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What the hub holds after a push."""

    url: str
    """Of the commit, or of the pull request."""
    oid: str
    files: tuple[str, ...]
    deleted: tuple[str, ...] = ()
    """Files of an earlier push that this folder has no more."""
    new: bool = True
    """False: the hub held exactly these files, no commit was made."""

    def describe(self) -> str:
        """One sentence for a terminal."""
        if not self.new:
            return f"The hub holds these {len(self.files)} files already: no new commit. {self.url}"
        gone = f", {len(self.deleted)} files of an earlier push deleted" if self.deleted else ""
        return f"One commit with {len(self.files)} files{gone}: {self.url}"


def check(folder: Path, *, token: str | None = None) -> Outgoing:
    """What a push would send, after every check that needs no hub; see `outgoing.check`.

    Raises:
        HubError: for the first file that is not fit to leave, with what to do.
    """
    try:
        return _check(Path(folder), token=token)
    except ForeignFileError as error:
        raise HubError(f"{error} Nothing was sent.") from error


def write_commit(folder: Path, output: Path) -> Path:
    """Writes the commit that `push` would make as a folder: the same checks, the same files, nothing else.

    Raises:
        HubError: if a check fails, or `output` holds something else than an earlier commit; it is then untouched.
    """
    sent, output = check(folder), Path(output)
    if output.resolve().is_relative_to(sent.folder.resolve()) or sent.folder.resolve().is_relative_to(output.resolve()):
        raise HubError(f"{output} and {folder} lie in one another. Choose an output outside the model folder.")
    if output.exists():
        held = [path.relative_to(output).as_posix() for path in output.rglob("*") if not path.is_dir()]
        others = [name for name in held if not ALLOWED.fullmatch(name)]
        if others or not output.is_dir():
            what = others[0] if others else "no folder"
            raise HubError(f"{output} is no earlier commit (it holds {what}). Choose a new or an empty folder.")
    with files.atomic_folder(output) as part:
        for name in sent.files:
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(sent.folder / name, part / name)
    return output


def repository_of(target: str) -> tuple[str, str | None]:
    """(owner/name, endpoint or None) of a repository's name or URL.

    Raises:
        ConfigurationError: for a URL without a repository in it, or with a user or a password.
    """
    if "@" in target:
        raise ConfigurationError(  # without the address: it may hold a password
            "the address of the repository holds a user or a password. Give it without; a token goes into HF_TOKEN."
        )
    try:
        parts = urlsplit(target)
    except ValueError as error:  # half of a bracketed address
        raise ConfigurationError(
            f"{target} is no URL ({error}): expected OWNER/NAME or https://HUB/OWNER/NAME."
        ) from error
    if not parts.scheme:
        return target, None
    name = parts.path.strip("/")
    if parts.scheme not in ("http", "https") or not parts.netloc or name.count("/") != 1:
        shown = f"{parts.scheme}://{parts.netloc}{parts.path}"
        raise ConfigurationError(f"{shown} names no repository: expected OWNER/NAME or https://HUB/OWNER/NAME.")
    return name, f"{parts.scheme}://{parts.netloc}"


def authorize(
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    create_pr: bool = False,
) -> str:
    """Finds out, without writing anything, whether a push to that repository can work; ask before training.

    Args:
        private, token, endpoint, create_pr: as they will be given to `push`.

    Returns:
        The repository's full name, with the user's name before a bare one.

    Raises:
        HubError: without a token or a connection, with a token that may not write there, for somebody else's
            repository, a name that no repository can have, or a public one where a private one is asked for.
    """
    remote = Remote.of(repo_id, token=token, endpoint=endpoint)
    remote.repo_id = remote.authorize(create_pr)
    if (held := remote.existing()) is not None:
        remote.check_visibility(held, private)
    elif create_pr:
        raise HubError(f"There is no {remote.repo_id} to propose a pull request to. Nothing was sent.")
    return remote.repo_id


def private_for(teachers: Iterable[str], private: bool | None) -> bool | None:
    """The visibility of a student: as asked for; else True where a teacher is private or gated, as its students are
    not for everybody either.

    Args:
        teachers: hub ids, looked up at `HF_ENDPOINT` with the token of the login.
        private: what was asked for.

    Raises:
        HubError: if nothing was asked for and the hub cannot say.
    """
    for teacher in teachers if private is None else ():
        remote = Remote.of(teacher, token=None, endpoint=None)
        remedy = "Say for its student: private=True or False, --private or --no-private. Nothing was sent."
        with remote.asking(f"whether the teacher {teacher} is private or gated", remedy):
            info = remote.api.model_info(teacher)
        if info.private or info.gated:
            return True
    return private


def push(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    revision: str = "main",
    create_pr: bool = False,
    message: str | None = None,
    tag: str | None = None,
) -> Pushed:
    """Makes the hub hold a model folder, in one commit. The folder is only read.

    Files of an earlier push that the folder lacks now are deleted in the same commit (weights, ONNX, tokenizer; not
    licence and evidence). A folder that the hub holds already makes no commit, so a push can always be repeated.

    Args:
        private: visibility of a new repository, None: private if the record names a teacher that is private or gated,
            else the account's default. True refuses an existing public one.
        token: None: that of the login or of `HF_TOKEN`.
        endpoint: None: the public hub or `HF_ENDPOINT`.
        revision: an existing branch.
        create_pr: propose the commit as a pull request to `main`; the one way to push to somebody else's repository.
        message: title of the commit.
        tag: a name for the commit that stays, e.g. v1.

    Raises:
        HubError: if its card names no licence; if the push did not happen or cannot be shown to have happened; says
            what the hub holds.
    """
    if create_pr and revision != "main":
        raise HubError(f"A pull request goes to main, not to {revision!r}. Leave revision out. Nothing was sent.")
    if create_pr and tag is not None:
        raise HubError("A proposed commit gets no tag before it is merged. Leave the tag out. Nothing was sent.")
    remote = Remote.of(repo_id, token=token, endpoint=endpoint, revision=revision)
    sent = check(Path(folder), token=remote.token)
    ours = Local(sent)
    remote.repo_id = remote.authorize(create_pr)
    _check_licence(sent.folder)
    if not create_pr:
        private = private_for(_teachers(facts.load(Path(folder))), private)
    head, listed = remote.open(private, create=not create_pr)
    held = remote.files(head, "Nothing was sent.")
    if lacking := listed - held.keys():  # what is not seen would not be deleted, and stay beside the new model
        raise HubError(f"The hub's list of {remote.repo_id} lacks {min(lacking)}. Nothing was sent. Push again.")
    stale = ours.stale(held)
    same = not stale and ours.same(held)
    if tag is not None:
        remote.check_tag(tag, head if same else None)
    if same:
        remote.tag(tag, head)
        return Pushed(url=remote.commit_url(head), oid=head, files=sent.names, new=False)
    if create_pr and (made := remote.proposed(ours)) is not None:
        return Pushed(url=made[1], oid=made[0], files=sent.names, new=False)
    oid, url = _commit(remote, ours, stale, head, create_pr, message or "Compressed model with its evidence and card")
    if not ours.same(remote.files(oid, f"{url} was made and could not be read back. Push again to compare.")):
        raise HubError(
            f"{url} shows other bytes than were checked: {folder} changed meanwhile, or the hub's list is wrong. Look "
            "at it, push again."
        )
    remote.tag(tag, oid)
    return Pushed(url=url, oid=oid, files=sent.names, deleted=stale)


def _check_licence(folder: Path) -> None:
    """A model without a licence may be used by nobody; so its maker is asked before anything is sent."""
    if licences.of_card(folder / licences.CARD) is None:
        _, why = licences.of(folder)
        raise HubError(
            f"The card of {folder} names no licence ({why}). Say it: `hf-compress push --license apache-2.0 …` and the "
            "like, or `license:` at the top of its README.md. Nothing was sent."
        )


def _teachers(record: facts.Record) -> list[str]:
    """The hub ids of all models that the student learned from."""
    training = record.training
    stages = () if training is None else (training, *training.before)
    models = [model for stage in stages for model in (stage.teacher, *stage.frozen.values()) if model is not None]
    return list(dict.fromkeys(model.name for model in models if model.name))


class Local:
    """Our files, comparable with what a repository lists; hashed once, so that a later change of the folder shows."""

    def __init__(self, sent: Outgoing) -> None:
        self.sent = sent
        self._hashes = {path.as_posix(): file_hashes(sent.folder / path) for path in sent.files}

    def same(self, held: dict[str, RepoFile]) -> bool:
        """Whether a commit holds each of our files with our bytes."""
        return all(name in held and remote_hash(held[name]) in ours for name, ours in self._hashes.items())

    def stale(self, held: dict[str, RepoFile]) -> tuple[str, ...]:
        """Files of an earlier push in a commit, which this folder has no more."""
        return tuple(sorted(name for name in held if MANAGED.fullmatch(name) and name not in self._hashes))

    def additions(self) -> list[CommitOperationAdd]:
        return [
            CommitOperationAdd(n, self.sent.folder / p) for n, p in zip(self.sent.names, self.sent.files, strict=True)
        ]


def _commit(
    remote: Remote, ours: Local, stale: tuple[str, ...], head: str, create_pr: bool, message: str
) -> tuple[str, str]:
    """Uploads, then commits; after each failure looks at what the hub holds. Returns the commit's hash and URL."""
    still = f"{remote.repo_id} holds what it held ({remote.revision} at {head[:7]})."
    known = remote.pull_requests() if create_pr else {}
    additions = ours.additions()
    with remote.asking("to take the files", f"{still} Push again: what has arrived is not sent twice."):
        remote.api.preupload_lfs_files(
            remote.repo_id, additions, revision=remote.revision, create_pr=create_pr, free_memory=False
        )
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *additions,
        *(CommitOperationDelete(name) for name in stale),
    ]
    for wait in (*WAITS, None):
        try:
            with limited(), warnings.catch_warnings():  # parquet in a model repository is evidence here, and meant
                warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")
                info = remote.api.create_commit(
                    remote.repo_id,
                    operations,
                    commit_message=message,
                    revision=remote.revision,
                    create_pr=create_pr,
                    parent_commit=head,
                )
            return info.oid, info.pr_url or info.commit_url
        except Exception as error:  # whatever it is, the commit may have been made
            if made := _made(remote, ours, head, known if create_pr else None, error):
                return made
            if wait is None or not _may_pass(error):
                told = f"The commit to {remote.repo_id} failed: {remote.told(error)}. {still}"
                raise HubError(f"{told} Push again when the cause is gone.") from remote.cause(error)
            time.sleep(max(wait, _asked_to_wait(error)))
    raise AssertionError("the last round returns or raises")


def _made(
    remote: Remote, ours: Local, head: str, known: dict[str, str] | None, error: Exception
) -> tuple[str, str] | None:
    """The commit that holds our files, if one was made although we were told of a failure.

    Raises:
        HubError: if another commit came first, or the hub cannot be asked.
    """
    try:
        if known is not None:
            for ref, oid in remote.pull_requests().items():
                if ref not in known and ours.same(remote.files(oid)):
                    return oid, remote.discussion_url(ref.split("/")[-1])
            return None
        at = remote.head()
        if at == head:
            return None
        if ours.same(remote.files(at)):
            return at, remote.commit_url(at)
    except HubError as silent:
        raise HubError(
            f"The commit to {remote.repo_id} failed ({remote.told(error)}), and whether the hub made it is not known: "
            f"{silent} Push again: the hub is compared first, so nothing is committed twice."
        ) from remote.cause(error)
    raise HubError(
        f"Somebody else pushed to {remote.repo_id} meanwhile: {remote.revision} is at {at[:7]}, not {head[:7]}. "
        "It holds their commit and nothing of yours. Look at it, then push again."
    ) from remote.cause(error)


def _may_pass(error: Exception) -> bool:
    """Whether trying again may help: the hub is busy, the connection broke, or an error page came for an answer."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in BUSY
    return isinstance(error, _NETWORK_ERROR | ConnectionError | TimeoutError | json.JSONDecodeError)


def _asked_to_wait(error: Exception) -> float:
    """Seconds, at most `LONGEST_WAIT`: until a limit of requests is lifted, or as a Retry-After says."""
    if not isinstance(error, HfHubHTTPError):
        return 0.0
    headers = error.response.headers
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return min(float(limit.reset_in_seconds), LONGEST_WAIT)
    try:
        return min(float(Retry().parse_retry_after(headers.get("Retry-After", "0"))), LONGEST_WAIT)
    except (InvalidHeader, OverflowError, ValueError):
        return 0.0
