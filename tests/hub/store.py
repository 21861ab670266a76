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


_LICENCES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
    other
"""
LICENCES = frozenset(_LICENCES.split())
"""What the hub takes as `license`; it refuses any other text, in upper case too."""

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
    if isinstance(licence := data.get("license", "other"), str) and licence not in LICENCES:
        errors.append(f'"license" must be one of the hub\'s identifiers, not {licence!r}')
    if (relation := data.get("base_model_relation")) not in (None, "adapter", "finetune", "merge", "quantized"):
        errors.append(f'"base_model_relation" is {relation!r}')
    for key in ("base_model", "datasets"):
        for name in [data[key]] if isinstance(data.get(key), str) else data.get(key) or []:
            if isinstance(name, str) and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII):
                errors.append(f'"{key}" with value {name!r} is not valid. Use an id of the hub')
    for place, model in enumerate(data.get("model-index") or []):
        errors += _index_errors(f"model-index[{place}]", model)
    return errors


def _index_errors(where: str, model: Any) -> list[str]:
    """By the hub's page on the metadata of cards: what it calls required, and texts where it has texts."""
    if not isinstance(model, dict) or not isinstance(model.get("name"), str):
        return [f'"{where}.name" is required']
    if not isinstance(model.get("results"), list):
        return [f'"{where}.results" is required']
    errors = []
    for number, result in enumerate(model["results"]):
        here, result = f"{where}.results[{number}]", result if isinstance(result, dict) else {}
        task, dataset = (result.get(key) or {} for key in ("task", "dataset"))
        wanted = {
            "task.type": task.get("type"),
            "dataset.type": dataset.get("type"),
            "dataset.name": dataset.get("name"),
        }
        errors += [f'"{here}.{key}" is required' for key, value in wanted.items() if not isinstance(value, str)]
        for key in ("config", "split", "revision"):
            if not isinstance(dataset.get(key, ""), str):
                errors.append(f'"{here}.dataset.{key}" must be a string')
        if not result.get("metrics"):
            errors.append(f'"{here}.metrics" is required')
        for at, metric in enumerate(result.get("metrics") or []):
            if not isinstance(metric.get("type"), str) or metric.get("value") is None:
                errors.append(f'"{here}.metrics[{at}]" needs type and value')
            if not isinstance(metric.get("name", ""), str):
                errors.append(f'"{here}.metrics[{at}].name" must be a string')
    return errors
