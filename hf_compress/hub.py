"""Pushes a model folder to the hub: one commit that holds all of it, or none.

    hub.push(Path("student"), "me/my-small-model")

`outgoing.py` decides which files may leave and checks them first. The commit names the head that it was made for, so
somebody else's push is never overwritten. huggingface_hub does not retry a commit, rightly: a lost reply looks like a
failure. So after a failure the hub is asked what it holds before anything is tried again or said.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.hf_api import ModelInfo, RepoFile
from huggingface_hub.utils import get_session, parse_ratelimit_headers, validate_repo_id  # type: ignore[attr-defined]
from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

from . import facts, files, licences
from .errors import ConfigurationError, ForeignFileError, HubError
from .outgoing import ALLOWED, MANAGED, Outgoing, collect, strip
from .outgoing import check as _check

__all__ = [
    "Outgoing", "Pushed", "authorize", "check", "collect", "private_for", "push", "repository_of", "strip",
    "write_commit",
]  # fmt: skip

WAITS = (1.0, 4.0, 16.0)
"""Seconds before the commit is tried again; as many retries as there are entries."""
LONGEST_WAIT = 60.0
"""Seconds that a `Retry-After` of the hub is followed at most."""
SILENCE = 300.0
"""Seconds without a byte from the hub after which a request is given up; huggingface_hub would wait for ever."""
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
    ours = _Local(sent)
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


class _Local:
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


def file_hashes(path: Path) -> tuple[str, str]:
    """The names that LFS and git have for the bytes of a file."""
    git = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(2**20):
            git.update(block)
    return files.sha256(path), git.hexdigest()


def remote_hash(file: RepoFile) -> str:
    return file.lfs.sha256 if file.lfs else file.blob_id


@dataclass
class Remote:
    """One repository at one revision, as its owner's client sees it; its failures are HubErrors without a token."""

    api: HfApi
    repo_id: str
    revision: str
    token: str | None

    @classmethod
    def of(cls, repo_id: str, *, token: str | None, endpoint: str | None, revision: str = "main") -> Remote:
        token = token or get_token()
        api = HfApi(endpoint=endpoint, token=token or False)
        if "@" in urlsplit(api.endpoint).netloc:  # it would be part of every URL that is printed, logged and kept
            raise HubError(
                "The address of the hub holds a user or a password. Give it without; a token goes into HF_TOKEN or "
                "token=…. Nothing was sent."
            )
        return cls(api, repo_id, revision, token)

    @cached_property
    def user(self) -> dict[str, Any]:
        if self.token is None:
            raise HubError("There is no token. Log in with `hf auth login` or set HF_TOKEN. Nothing was sent.")
        with self.asking("who you are", "Check the token, the endpoint and the connection. Nothing was sent."):
            user = dict(self.api.whoami())
            if not isinstance(user.get("name"), str):
                raise ValueError("the answer names nobody")
            return user

    def authorize(self, create_pr: bool) -> str:
        name, access = self.user["name"], self.user.get("auth", {}).get("accessToken", {})
        repo_id = self.repo_id if "/" in self.repo_id else f"{name}/{self.repo_id}"
        orgs = {org["name"]: org for org in self.user.get("orgs", [])}
        owner = repo_id.split("/")[0]
        try:
            validate_repo_id(repo_id)
        except ValueError as error:
            raise HubError(f"{repo_id!r} can be no repository's name: {self.told(error)}. Nothing was sent.") from error
        if access.get("role") == "read":
            raise HubError(
                f"The token of {name} may only read. Make one that may write to {repo_id}. Nothing was sent."
            )
        if owner not in (name, *orgs) and not create_pr:
            raise HubError(
                f"{repo_id} does not belong to {' or '.join((name, *orgs))}. "
                "Choose a repository of yours, or propose it with create_pr=True. Nothing was sent."
            )
        if not create_pr and orgs.get(owner, {}).get("roleInOrg") == "read":
            raise HubError(f"{name} may only read in {owner}. Ask for the right to write there. Nothing was sent.")
        if not create_pr and not _may_write(access, {owner, repo_id}):
            raise HubError(
                f"The fine-grained token of {name} may not write to {repo_id}. Give it that right. Nothing was sent."
            )
        return repo_id

    def existing(self) -> ModelInfo | None:
        """The repository, if this user can see one."""
        with self.asking(f"for the repository {self.repo_id}", "Nothing was sent."):
            try:
                return self.api.model_info(self.repo_id)
            except RepositoryNotFoundError:
                return None

    def check_visibility(self, held: ModelInfo, private: bool | None) -> None:
        if private and not held.private:
            raise HubError(
                f"{self.repo_id} is public, and its student was to be private, as asked for or because the teacher is "
                "private or gated. Choose another repository, or say private=False, --no-private. Nothing was sent."
            )

    def open(self, private: bool | None, create: bool) -> tuple[str, set[str]]:
        """The head of the revision and the names of its files, of a repository that is made if need be."""
        if create:
            with self.asking(f"for the repository {self.repo_id}", "Nothing was sent."):
                self.api.create_repo(self.repo_id, private=private, exist_ok=True)
        with self.asking(f"for {self.revision} of {self.repo_id}", "Nothing was sent. Check repository and branch."):
            info = self.api.model_info(self.repo_id, revision=self.revision)
        self.check_visibility(info, private)
        return str(info.sha), {file.rfilename for file in info.siblings or ()}

    def head(self) -> str:
        with self.asking(f"for the head of {self.repo_id}", ""):
            return str(self.api.model_info(self.repo_id, revision=self.revision).sha)

    def files(self, revision: str, remedy: str = "") -> dict[str, RepoFile]:
        """The files of a commit by name."""
        with self.asking(f"for the files of {self.repo_id}", remedy):
            entries = self.api.list_repo_tree(self.repo_id, recursive=True, revision=revision)
            return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def check_tag(self, name: str, head: str | None) -> None:
        """Refuses a name that no tag can have, or that another commit than that one has already."""
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", name, re.ASCII):
            raise HubError(f"{name!r} can be no tag: letters, digits, dots, hyphens and underscores. Nothing was sent.")
        with self.asking(f"for the tags of {self.repo_id}", "Nothing was sent."):
            tags = {each.name: each.target_commit for each in self.api.list_repo_refs(self.repo_id).tags}
        if name in tags and tags[name] != head:
            raise HubError(
                f"{self.repo_id} has a tag {name} at {tags[name][:7]}, and tags stay where they are. Choose another. "
                "Nothing was sent."
            )

    def tag(self, name: str | None, oid: str) -> None:
        """Gives a commit its tag."""
        if name is not None:
            with self.asking(f"to tag {oid[:7]} as {name}", f"{self.commit_url(oid)} is there; push again to tag it."):
                self.api.create_tag(self.repo_id, tag=name, revision=oid, exist_ok=True)

    def pull_requests(self) -> dict[str, str]:
        """Commit by ref (refs/pr/1), of all pull requests of the repository."""
        with self.asking(f"for the pull requests of {self.repo_id}", ""):
            refs = self.api.list_repo_refs(self.repo_id, include_pull_requests=True)
            return {ref.ref: ref.target_commit for ref in refs.pull_requests or ()}

    def proposed(self, ours: _Local) -> tuple[str, str] | None:
        """An open pull request of this user that holds our files already: its commit and its URL."""
        with self.asking(f"for your pull requests to {self.repo_id}", "Nothing was sent."):
            author = self.user["name"]
            found = self.api.get_repo_discussions(
                self.repo_id, author=author, discussion_type="pull_request", discussion_status="open"
            )
            numbers = [each.num for each in found]
        for number in numbers:
            held = self.files(f"refs/pr/{number}", "Nothing was sent.")
            if ours.same(held) and not ours.stale(held):
                return self.pull_requests()[f"refs/pr/{number}"], self.discussion_url(number)
        return None

    def discussion_url(self, number: int | str) -> str:
        return f"{self.api.endpoint}/{self.repo_id}/discussions/{number}"

    def commit_url(self, oid: str) -> str:
        return f"{self.api.endpoint}/{self.repo_id}/commit/{oid}"

    @contextmanager
    def asking(self, what: str, remedy: str) -> Iterator[None]:
        # huggingface_hub, its HTTP library and hf_xet raise types of their own, which share no base but this
        try:
            with _limited():
                yield
        except HubError:
            raise
        except Exception as error:
            told = f"Asking the hub {what} failed: {self.told(error)}. {remedy}"
            raise HubError(told.strip()) from self.cause(error)

    def cause(self, error: BaseException) -> BaseException | None:
        """The error to show below ours in a traceback: none if it, or one that it came from, shows the token."""
        below: BaseException | None = error
        while below is not None:
            if self.clean(str(below)) != str(below):
                return None
            below = below.__cause__ or below.__context__
        return error

    def told(self, error: Exception) -> str:
        """An error in a line, without token."""
        if isinstance(error, LocalTokenNotFoundError):
            return "there is no token"
        if isinstance(error, json.JSONDecodeError):
            return "the answer is no JSON, perhaps an error page"
        return self.clean(" ".join(str(error).split()) or type(error).__name__)[:400].rstrip(".")

    def clean(self, text: str) -> str:
        text = text.replace(self.token, "hf_…") if self.token else text
        return re.sub(r"(://)[^/@\s]+@", r"\1", re.sub(r"hf_[A-Za-z0-9]{20,}", "hf_…", text))


def _commit(
    remote: Remote, ours: _Local, stale: tuple[str, ...], head: str, create_pr: bool, message: str
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
            with _limited(), warnings.catch_warnings():  # parquet in a model repository is evidence here, and meant
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
    remote: Remote, ours: _Local, head: str, known: dict[str, str] | None, error: Exception
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


def _may_write(access: dict[str, Any], where: set[str]) -> bool:
    """False if this is a fine-grained token without the right to write to any of these owners and repositories."""
    scopes = access.get("fineGrained", {}).get("scoped") if access.get("role") == "fineGrained" else None
    if not isinstance(scopes, list):
        return True
    return any(s.get("entity", {}).get("name") in where and "repo.write" in s.get("permissions", ()) for s in scopes)


@contextmanager
def _limited() -> Iterator[None]:
    """Gives each request of huggingface_hub that has no limit of time ours, whatever the request passes itself."""

    def limit(request: Any) -> None:
        limits = request.extensions.get("timeout") or dict.fromkeys(("connect", "read", "write", "pool"))
        request.extensions["timeout"] = {name: SILENCE if value is None else value for name, value in limits.items()}

    session = get_session()
    before = session.event_hooks
    session.event_hooks = {**before, "request": [*before.get("request", ()), limit]}
    try:
        yield
    finally:
        session.event_hooks = before
