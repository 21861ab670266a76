"""One repository at one revision, as its owner's client sees it. Every failure is a HubError that shows no token."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.hf_api import ModelInfo, RepoFile
from huggingface_hub.utils import get_session, validate_repo_id  # type: ignore[attr-defined]

from . import files
from .errors import HubError

if TYPE_CHECKING:
    from .hub import Local

SILENCE = 300.0
"""Seconds without a byte from the hub after which a request is given up; huggingface_hub would wait for ever."""


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

    def proposed(self, ours: Local) -> tuple[str, str] | None:
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
            with limited():
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


def _may_write(access: dict[str, Any], where: set[str]) -> bool:
    """False if this is a fine-grained token without the right to write to any of these owners and repositories."""
    scopes = access.get("fineGrained", {}).get("scoped") if access.get("role") == "fineGrained" else None
    if not isinstance(scopes, list):
        return True
    return any(s.get("entity", {}).get("name") in where and "repo.write" in s.get("permissions", ()) for s in scopes)


@contextmanager
def limited() -> Iterator[None]:
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
