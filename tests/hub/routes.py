"""What the test hub answers: one function for each request that huggingface_hub 2.4 makes, with the real refusals."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, unquote

from .store import Blob, Hub, RefusedError, Repo, card_errors

LFS = re.compile(r"\.(safetensors|onnx|bin|parquet|model|npz|pt|png)$")
REGULAR_BYTES = 10 * 2**20
"""Larger files are LFS whatever their name."""
DATE = "2026-01-01T00:00:00.000Z"

Route = Callable[..., Any]
ROUTES: list[tuple[str, re.Pattern[str], Route]] = []


def route(method: str, pattern: str) -> Callable[[Route], Route]:
    """Registers a handler `(call, *groups)`; REPO stands for kind and id of a repository."""
    pattern = pattern.replace("REPO", r"(models|datasets|spaces)/([^/]+/[^/]+)")

    def add(function: Route) -> Route:
        ROUTES.append((method, re.compile(f"^{pattern}$"), function))
        return function

    return add


@dataclass
class Call:
    """One request being answered."""

    hub: Hub
    token: str | None
    query: dict[str, str]
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    @property
    def user(self) -> tuple[str, str] | None:
        if self.token is None:
            return None
        if self.token not in self.hub.users:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return self.hub.users[self.token]

    def owns(self, id: str) -> bool:
        name = self.user[0] if self.user else None
        return name is not None and id.split("/")[0] in [name, *self.hub.orgs.get(name, [])]

    def readable(self, kind: str, id: str) -> Repo:
        """The repository, as far as this user may know that it exists."""
        repo = self.hub.repos.get((kind, id))
        if repo is None or (repo.private and not self.owns(id)):
            raise RefusedError(404 if self.user else 401, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, kind: str, id: str, pull_request: bool = False) -> Repo:
        if self.user is None:
            raise RefusedError(401, "Invalid username or password.")
        repo = self.readable(kind, id)
        if self.user[1] != "write" or not (self.owns(id) or pull_request):
            raise RefusedError(403, f"you have no right to write to {id} with this token")
        return repo


@route("GET", "/api/whoami-v2")
def whoami(call: Call) -> Any:
    if call.user is None:
        raise RefusedError(401, "Invalid username or password.")
    name, role = call.user
    orgs = [
        {"type": "org", "name": org, "fullname": org, "roleInOrg": call.hub.roles.get(org, "admin")}
        for org in call.hub.orgs.get(name, [])
    ]
    access: dict[str, Any] = {"displayName": "test", "role": role}
    if role == "fineGrained":
        scoped = [{"entity": {"type": "user", "name": who}, "permissions": may} for who, may in call.hub.grants.items()]
        access["fineGrained"] = {"canReadGatedRepos": False, "global": [], "scoped": scoped}
    auth = {"type": "access_token", "accessToken": access}
    return {"type": "user", "name": name, "fullname": name, "email": f"{name}@hub.test", "orgs": orgs, "auth": auth}


def _named(call: Call) -> tuple[str, str]:
    body = call.json
    if call.user is None:
        raise RefusedError(401, "Invalid username or password.")
    id = f"{body.get('organization') or call.user[0]}/{body['name']}"
    if call.user[1] != "write" or not call.owns(id):
        raise RefusedError(403, f"you have no right to create or delete {id} with this token")
    return f"{body.get('type') or 'model'}s", id


@route("POST", "/api/repos/create")
def create(call: Call) -> Any:
    kind, id = _named(call)
    url = {"url": f"{call.hub.url}/{'' if kind == 'models' else kind + '/'}{id}"}
    if (kind, id) in call.hub.repos:
        raise RefusedError(409, "You already created this repo", body=url | {"error": "You already created this repo"})
    repo = call.hub.repos[kind, id] = Repo(kind, id, private=call.json.get("visibility") == "private")
    start = {".gitattributes": Blob(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", lfs=False)}
    repo.commit("main", "initial commit", start, None)
    return url


@route("DELETE", "/api/repos/delete")
def delete(call: Call) -> Any:
    key = _named(call)
    call.readable(*key)
    del call.hub.repos[key]
    return {}


@route("POST", "/api/validate-yaml")
def validate(call: Call) -> Any:
    if errors := card_errors(call.json["content"]):
        raise RefusedError(400, errors[0], body={"errors": [{"message": e} for e in errors], "warnings": []})
    return {"errors": [], "warnings": []}


@route("POST", "/api/REPO/preupload/([^/]+)")
def preupload(call: Call, kind: str, id: str, revision: str) -> Any:
    repo = call.writable(kind, id, "create_pr" in call.query)
    present, answer = repo.at(unquote(revision)).files, []
    for file in call.json["files"]:
        path, binary = file["path"], b"\0" in base64.b64decode(file["sample"])
        lfs = file["size"] > 0 and bool(binary or file["size"] > REGULAR_BYTES or LFS.search(path))
        repo.announced[path] = mode = "lfs" if lfs else "regular"
        found = {"path": path, "uploadMode": mode, "shouldIgnore": False}
        if blob := present.get(path):
            found["oid"] = blob.sha256 if blob.lfs else blob.oid
        answer.append(found)
    return {"files": answer}


@route("POST", r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch")
def batch(call: Call, kind: str | None, id: str) -> Any:
    call.writable(kind or "models", id, pull_request=True)
    objects = []
    for wanted in call.json["objects"]:
        found = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in call.hub.stored:
            upload, verify = (
                f"{base}/lfs/{wanted['oid']}" for base in (call.hub.storage or call.hub.url, call.hub.url)
            )
            found["actions"] = {"upload": {"href": upload}, "verify": {"href": f"{verify}/verify"}}
        objects.append(found)
    return {"transfer": "basic", "objects": objects}


@route("PUT", "/lfs/([0-9a-f]{64})")
def put(call: Call, oid: str) -> Any:
    if hashlib.sha256(call.body).hexdigest() != oid:
        raise RefusedError(400, "the bytes do not have the announced sha256")
    call.hub.stored[oid] = call.body
    return {}


@route("POST", "/lfs/([0-9a-f]{64})/verify")
def verify(call: Call, oid: str) -> Any:
    if len(call.hub.stored.get(oid, b"")) != call.json["size"]:
        raise RefusedError(404, "no such object of that size")
    return {}


@route("POST", "/api/REPO/commit/([^/]+)")
def commit(call: Call, kind: str, id: str, revision: str) -> Any:
    asks = "create_pr" in call.query
    repo, branch = call.writable(kind, id, asks), unquote(revision)
    head, *changes = map(json.loads, call.body.splitlines())
    parent = repo.at(branch)
    if head["value"].get("parentCommit", parent.oid) != parent.oid and not asks:
        raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
    if branch not in repo.refs and not asks:
        raise RefusedError(404, f"{branch} is no branch", "RevisionNotFound")
    files = dict(parent.files)
    for change in changes:
        _apply(call.hub, repo, files, change["key"], change["value"])
    if "README.md" in files and (errors := card_errors(files["README.md"].data.decode())):
        raise RefusedError(400, f"README.md: {errors[0]}")
    number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
    made = repo.commit(f"refs/pr/{number}" if asks else branch, head["value"]["summary"], files, parent.oid)
    repo.announced.clear()
    if asks:
        assert call.user is not None  # `writable` has seen to it
        repo.authors[f"refs/pr/{number}"] = call.user[0]
    answer = {"success": True, "commitOid": made.oid, "commitUrl": f"{call.hub.url}/{id}/commit/{made.oid}"}
    return answer | ({"pullRequestUrl": f"{call.hub.url}/{id}/discussions/{number}"} if asks else {})


def _apply(hub: Hub, repo: Repo, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
    path = value["path"]
    if key in ("deletedFile", "deletedFolder"):
        gone = [p for p in files if p == path or (key == "deletedFolder" and p.startswith(path.rstrip("/") + "/"))]
        if not gone:
            raise RefusedError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        for name in gone:
            del files[name]
        return
    mode = repo.announced.get(path)
    if mode is None:
        raise RefusedError(400, f"{path} was not announced in preupload")
    if mode != {"file": "regular", "lfsFile": "lfs"}.get(key):
        raise RefusedError(400, f"{path} must be sent as {mode}, not as {key}")
    if key == "lfsFile" and value["oid"] not in hub.stored:
        raise RefusedError(400, f"the LFS pointer {path} names bytes that were never uploaded: {value['oid']}")
    files[path] = Blob(
        hub.stored[value["oid"]] if key == "lfsFile" else base64.b64decode(value["content"]), key == "lfsFile"
    )


@route("GET", "/api/REPO(?:/revision/([^/]+))?")
def info(call: Call, kind: str, id: str, revision: str | None) -> Any:
    repo = call.readable(kind, id)
    at = repo.at(unquote(revision or "main"))
    siblings = [
        {"rfilename": path} | ({"size": len(b.data), "blobId": b.oid} if "blobs" in call.query else {})
        for path, b in at.files.items()
    ]
    found = {"id": id, "modelId": id, "sha": at.oid, "private": repo.private, "tags": [], "siblings": siblings}
    return found | {
        "author": id.split("/")[0],
        "lastModified": DATE,
        "createdAt": DATE,
        "gated": repo.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
    }


@route("GET", "/api/REPO/tree/([^/]+)(?:/(.+))?")
def tree(call: Call, kind: str, id: str, revision: str, folder: str | None) -> Any:
    files = call.readable(kind, id).at(unquote(revision)).files
    prefix = f"{unquote(folder)}/" if folder else ""
    below = {path: blob for path, blob in files.items() if path.startswith(prefix)}
    if prefix and not below:
        raise RefusedError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
    deep = call.query.get("recursive", "").lower() == "true"
    folders = {path[:i] for path in below for i, c in enumerate(path) if c == "/" and i >= len(prefix)}

    def shown(path: str) -> bool:
        return deep or "/" not in path[len(prefix) :]

    entries = [
        {"type": "directory", "path": f, "oid": hashlib.sha1(f.encode()).hexdigest(), "size": 0}
        for f in sorted(folders)
        if shown(f)
    ]
    return entries + [blob.entry(path) for path, blob in sorted(below.items()) if shown(path)]


@route("POST", "/api/REPO/paths-info/([^/]+)")
def paths_info(call: Call, kind: str, id: str, revision: str) -> Any:
    files = call.readable(kind, id).at(unquote(revision)).files
    wanted = call.json["paths"] if call.body.startswith(b"{") else parse_qs(call.body.decode())["paths"]
    return [files[path].entry(path) for path in wanted if path in files]


@route("GET", "/api/REPO/refs")
def refs(call: Call, kind: str, id: str) -> Any:
    repo = call.readable(kind, id)

    def entry(name: str, ref: str, oid: str) -> dict[str, str]:
        return {"name": name, "ref": ref, "targetCommit": oid}

    found: dict[str, Any] = {"converts": []}
    found["branches"] = [entry(n, f"refs/heads/{n}", o) for n, o in repo.refs.items() if not n.startswith("refs/")]
    found["tags"] = [entry(n, f"refs/tags/{n}", o) for n, o in repo.tags.items()]
    if "include_prs" in call.query:
        found["pullRequests"] = [entry(n[5:], n, o) for n, o in repo.refs.items() if n.startswith("refs/pr/")]
    return found


@route("GET", "/api/REPO/discussions")
def discussions(call: Call, kind: str, id: str) -> Any:
    repo, name = call.readable(kind, id), call.query.get("author")
    found = [
        {
            "num": int(ref.split("/")[-1]),
            "title": repo.commits[oid].title,
            "author": {"name": repo.authors[ref]},
            "createdAt": DATE,
            "status": "open",
            "isPullRequest": True,
            "repo": {"name": id, "type": kind[:-1]},
        }
        for ref, oid in repo.refs.items()
        if ref.startswith("refs/pr/") and name in (None, repo.authors[ref])
    ]
    return {"count": len(found), "start": 0, "discussions": found}


@route("POST", "/api/REPO/branch/([^/]+)")
def branch(call: Call, kind: str, id: str, name: str) -> Any:
    repo = call.writable(kind, id)
    if unquote(name) in repo.refs:
        raise RefusedError(409, f"Branch {name} already exists")
    repo.refs[unquote(name)] = repo.at(call.json.get("startingPoint", "main")).oid
    return {}


@route("POST", "/api/REPO/tag/([^/]+)")
def tag(call: Call, kind: str, id: str, revision: str) -> Any:
    repo = call.writable(kind, id)
    if call.json["tag"] in repo.tags:
        raise RefusedError(409, "Tag already exists")
    repo.tags[call.json["tag"]] = repo.at(unquote(revision)).oid
    return {}


@route("DELETE", "/api/REPO/(branch|tag)/([^/]+)")
def delete_ref(call: Call, kind: str, id: str, what: str, name: str) -> Any:
    repo = call.writable(kind, id)
    if (repo.refs if what == "branch" else repo.tags).pop(unquote(name), None) is None:
        raise RefusedError(404, f"no {what} {name}", "RevisionNotFound")
    return {}


@route("GET", "/api/REPO/commits/([^/]+)")
def commits(call: Call, kind: str, id: str, revision: str) -> Any:
    call.readable(kind, id)
    return [
        {"id": c.oid, "title": c.title, "message": "", "date": DATE, "authors": [{"user": "me"}]}
        for c in call.hub.history(id, unquote(revision))
    ]


@route("PUT", "/api/REPO/settings")
def settings(call: Call, kind: str, id: str) -> Any:
    call.writable(kind, id).private = call.json.get("visibility") == "private"
    return {}


@route("GET", r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
def resolve(call: Call, kind: str | None, id: str, revision: str, path: str) -> Any:
    at = call.readable(kind or "models", id).at(unquote(revision))
    blob = at.files.get(unquote(path))
    if blob is None:
        raise RefusedError(404, f"{path} does not exist", "EntryNotFound", **{"X-Repo-Commit": at.oid})
    headers = {"X-Repo-Commit": at.oid, "ETag": f'"{blob.sha256 if blob.lfs else blob.oid}"', "Accept-Ranges": "bytes"}
    if blob.lfs:
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
    if asked := re.match(r"bytes=(\d+)-(\d*)", call.headers.get("Range") or ""):
        first, last = int(asked[1]), min(int(asked[2] or len(blob.data)), len(blob.data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(blob.data)}"
        return 206, headers, blob.data[first : last + 1]
    return 200, headers, blob.data
