"""What the test hub holds: repositories with their commits, users, the log of requests and the plan of faults."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from typing import Any

import yaml

TOKEN = "hf_" + "OwnerOfTheTestHubXyz".ljust(30, "0")
STRANGER = "hf_" + "StrangerOnTheTestHub".ljust(30, "1")
READER = "hf_" + "ReadOnlyOfTheTestHub".ljust(30, "2")


class RefusedError(Exception):
    """An answer that is no success: status, the hub's error code, what it says."""

    def __init__(self, status: int, message: str, code: str | None = None, body: Any = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers
        self.body = {"error": message} if body is None else body


KINDS = {
    "whoami": "GET /api/whoami",
    "create_repo": "POST /api/repos/create",
    "info": r"GET /api/models/[^/]+/[^/]+(/revision/[^/]+)?(\?|$)",
    "refs": "GET .*/refs",
    "discussions": "GET .*/discussions",
    "tree": "GET .*/tree/",
    "validate": "POST /api/validate-yaml",
    "preupload": "POST .*/preupload/",
    "batch": "POST .*/objects/batch",
    "upload": "PUT /lfs/",
    "verify": "POST /lfs/[^/]+/verify",
    "commit": "POST .*/commit/",
}
"""What a push asks of a hub, by kind; each is the `match` of a `Fault`."""


@dataclass
class Fault:
    """What happens to the next request whose `METHOD /path` matches, instead of or after what it asked for."""

    match: str
    status: int | None = 503
    """None: the connection is closed without a reply."""
    applied: bool = False
    """True: the request takes effect, and its reply is lost."""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b"<html>the server is busy</html>"
    seconds: float = 0.0
    skip: int = 0
    """How many matching requests are answered as usual first."""
    times: int = 1
    """How many requests meet it."""
    drip: float = 0.0
    """Above 0: the true answer comes in eight pieces, with so many seconds before each."""
    redirect: str = ""
    """The base of another server, to which the request's path is redirected, with `status`."""
    dies: bool = False
    """The hub is gone from this request on, until `Hub.dead` is False again."""

    def meets(self, line: str) -> bool:
        """Whether it is meant for the request `METHOD /path`."""
        return re.search(self.match, line) is not None


@dataclass(frozen=True)
class Request:
    """One request as it came over the wire."""

    method: str
    path: str
    headers: str
    body: bytes


@dataclass(frozen=True)
class Blob:
    """A file of a commit: its bytes, and whether git holds only a pointer to them."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        head = "version https://git-lfs.github.com/spec/v1\n"
        return f"{head}oid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @property
    def oid(self) -> str:
        """The hash that git has of it: of the pointer, for LFS."""
        data = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        found = {"type": "file", "path": path, "oid": self.oid, "size": len(self.data)}
        if self.lfs:
            found["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}
        return found


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    files: dict[str, Blob]


@dataclass
class Repo:
    kind: str
    id: str
    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    authors: dict[str, str] = field(default_factory=dict)
    """Who opened a pull request, by its ref."""
    commits: dict[str, Commit] = field(default_factory=dict)
    announced: dict[str, str] = field(default_factory=dict)
    """Upload mode by path, as told in preupload since the last commit."""

    def commit(self, ref: str, title: str, files: dict[str, Blob], parent: str | None) -> Commit:
        text = json.dumps([parent, title, len(self.commits), sorted((p, b.oid) for p, b in files.items())])
        commit = Commit(hashlib.sha1(text.encode()).hexdigest(), parent, title, files)
        self.commits[commit.oid], self.refs[ref] = commit, commit.oid
        return commit

    def at(self, revision: str) -> Commit:
        oid = self.refs.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]


class Hub:
    """All repositories, users and what was asked; `main(repo)` is what a test looks at."""

    token, stranger, reader = TOKEN, STRANGER, READER

    def __init__(self) -> None:
        self.url = ""
        self.users = {TOKEN: ("me", "write"), STRANGER: ("stranger", "write"), READER: ("me", "read")}
        self.orgs = {"me": ["team"]}
        self.roles: dict[str, str] = {}
        """Of everybody in an organisation; without an entry: admin."""
        self.grants: dict[str, list[str]] = {}
        """Permissions of all fine-grained tokens, by user, organisation or repository."""
        self.repos: dict[tuple[str, str], Repo] = {}
        self.stored: dict[str, bytes] = {}
        self.log: list[Request] = []
        self.plan: list[Fault] = []
        self.fired: list[str] = []
        """The `METHOD /path` of each request that met a fault."""
        self.dead = False
        self.storage = ""
        """The base of the host to which LFS files are sent, if it is another than the hub's."""
        self.lock = threading.RLock()

    def repo(self, id: str, kind: str = "models") -> Repo:
        return self.repos[kind, id]

    def history(self, id: str, revision: str = "main") -> list[Commit]:
        """Commits from the newest to the one that made the repository."""
        repo, found = self.repo(id), []
        oid: str | None = repo.at(revision).oid
        while oid is not None:
            found.append(repo.commits[oid])
            oid = found[-1].parent
        return found

    def files(self, id: str, revision: str = "main") -> dict[str, bytes]:
        """Bytes by path, without the .gitattributes that each repository starts with."""
        return {p: b.data for p, b in self.repo(id).at(revision).files.items() if p != ".gitattributes"}

    def asked(self, pattern: str) -> list[Request]:
        """The requests so far whose `METHOD /path` matches."""
        return [request for request in self.log if re.search(pattern, f"{request.method} {request.path}")]

    def received(self, text: str) -> bool:
        """Whether any request held that text, in a path, a header, a body, or base64 of it inside a body."""
        return any(text in r.path or text in r.headers or text.encode() in _decoded(r.body) for r in self.log)


def _decoded(body: bytes) -> bytes:
    encoded = re.findall(rb'"(?:content|sample)": ?"([A-Za-z0-9+/=]*)"', body)
    return b"\n".join([body, *map(base64.b64decode, encoded)])


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def card_errors(text: str) -> list[str]:
    """What the hub's check of a README's metadata finds wrong."""
    found = re.match(r"^\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.S)
    if not found:
        return []
    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return [f"YAML metadata is not valid: {error}"]
    if not isinstance(data, dict):
        return ["YAML metadata must be a mapping"]
    errors = [
        f'"{k}" must be a string'
        for k in ("license", "pipeline_tag", "library_name")
        if k in data and not isinstance(data[k], str)
    ]
    errors += [
        f'"{k}" must be a list of strings'
        for k in ("tags", "datasets", "base_model", "language", "metrics")
        if k in data and not isinstance(data[k], str) and not _texts(data[k])
    ]
    for model in data.get("model-index") or []:
        if not isinstance(model, dict) or not isinstance(model.get("name"), str):
            errors.append('"model-index[0].name" is required')
            continue
        for result in model.get("results") or []:
            dataset = result.get("dataset") or {}
            if not result.get("task", {}).get("type") or not dataset.get("type") or not result.get("metrics"):
                errors.append('"model-index[0].results" need task, dataset and metrics')
            if not isinstance(dataset.get("config", ""), str):
                errors.append('"model-index[0].results[0].dataset.config" must be a string')
    return errors
