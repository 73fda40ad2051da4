"""A small Hub for tests: an HTTP server with the endpoints that huggingface_hub, transformers and datasets call.

It keeps repositories with commits in memory, and answers as the Hub does to a missing, wrong or weak token. HF_ENDPOINT points
the real clients to it. It speaks LFS, not Xet: set HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".parquet")
Files = dict[str, bytes]


@dataclass
class Repository:
    """One repository with all of its commits."""

    private: bool = False
    gated_for: tuple[str, ...] | None = None
    """Users who have access to a gated repository; None if it is not gated."""
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Files, branch: str = "main") -> str:
        oid = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[oid] = files
        self.refs[branch] = oid
        return oid

    def at(self, revision: str) -> tuple[str, Files] | None:
        oid = self.refs.get(revision, revision)
        return (oid, self.commits[oid]) if oid in self.commits else None


class Failure(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(status, code, message)


def account(name: str, role: str = "write", orgs: Mapping[str, str] | None = None, **token: Any) -> dict[str, Any]:
    """What whoami says of a token: its user, the user's role in organizations, and the token's role."""
    members = [{"name": org, "roleInOrg": of_user} for org, of_user in (orgs or {}).items()]
    return {"type": "user", "name": name, "orgs": members, "auth": {"accessToken": {"role": role, **token}}}


@dataclass
class Hub:
    """The state of the server, which a test fills and reads."""

    endpoint: str = ""
    tokens: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Token -> answer of whoami."""
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    fails_after: int | None = None
    """Answer 507 to every upload after this many."""
    redirects: str | None = None
    """Where files lie, if not here."""

    def add(self, kind: str, name: str, files: Files, **options: Any) -> Repository:
        repository = self.repositories[kind, name] = Repository(**options)
        repository.commit(files)
        return repository

    def user(self, token: str | None) -> str | None:
        return None if token is None else str(self.tokens[token]["name"])

    def readable(self, kind: str, name: str, token: str | None, *, content: bool) -> Repository:
        """A repository that the token may read. Raises Failure as the Hub answers otherwise."""
        if token is not None and token not in self.tokens:
            raise Failure(401, "", "Invalid credentials in Authorization header")
        repository, user = self.repositories.get((kind, name)), self.user(token)
        if repository is None or (repository.private and user != name.split("/")[0]):
            raise Failure(401 if token is None else 404, "RepoNotFound", "Repository not found")
        if content and repository.gated_for is not None and user not in repository.gated_for:
            raise Failure(401 if token is None else 403, "GatedRepo", f"Access to {name} is restricted")
        return repository

    def writable(self, name: str, token: str | None) -> None:
        """Raises Failure unless the token may write to the owner of a repository."""
        if token not in self.tokens:
            raise Failure(401, "", "Invalid credentials in Authorization header")
        known = self.tokens[str(token)]
        owners = [known["name"], *(org["name"] for org in known["orgs"] if org["roleInOrg"] != "read")]
        if name.split("/")[0] not in owners or known["auth"]["accessToken"]["role"] == "read":
            raise Failure(403, "", f"You don't have the rights to write to {name}")


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        self.hub.requests.append(f"{self.command} {path}")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        try:
            self._route(path, query, body, token)
        except Failure as failure:
            status, code, message = failure.args
            headers = {"X-Error-Code": code} if code else {}
            self._send(status, json.dumps({"error": message}).encode(), headers | {"X-Error-Message": message})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _chunks(self) -> bytes:
        parts = b""
        while size := int(self.rfile.readline(), 16):
            parts += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return parts

    def _send(self, status: int, content: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _route(self, path: str, query: dict[str, list[str]], body: bytes, token: str | None) -> None:
        hub = self.hub
        if path == "/api/whoami-v2":
            if token not in hub.tokens:
                raise Failure(401, "", "Invalid credentials in Authorization header")
            self._json(hub.tokens[token])
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(json.loads(body), token)
        elif match := re.fullmatch(r"/lfs/(\w+)", path):
            self._store(match[1], body)
        elif match := re.fullmatch(r"/(.+?)\.git/info/lfs/objects/batch", path):
            hub.writable(match[1], token)
            objects = [self._lfs_object(item) for item in json.loads(body)["objects"]]
            self._json({"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/(datasets/)?([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            self._resolve("dataset" if match[1] else "model", match[2], match[3], match[4], token)
        elif match := re.fullmatch(
            r"/api/(model|dataset)s/([\w.-]+/[\w.-]+)(?:/([a-z-]+)(?:/([^/]+)(?:/(.*))?)?)?", path
        ):
            self._repository(match[1], match[2], match[3] or "", match[4] or "main", match[5] or "", query, body, token)
        else:
            raise Failure(404, "", f"no {path}")

    def _create(self, asked: dict[str, Any], token: str | None) -> None:
        name = f"{asked.get('organization') or self.hub.user(token)}/{asked['name']}"
        self.hub.writable(name, token)
        if ("model", name) in self.hub.repositories:
            content = {"error": "You already created this model repo", "url": f"{self.hub.endpoint}/{name}"}
            self._send(409, json.dumps(content).encode())
            return
        self.hub.add(
            "model",
            name,
            {".gitattributes": b""},
            private=bool(asked.get("private") or asked.get("visibility") == "private"),
        )
        self._json({"url": f"{self.hub.endpoint}/{name}", "name": name})

    def _store(self, oid: str, body: bytes) -> None:
        if self.hub.fails_after is not None and len(self.hub.lfs) >= self.hub.fails_after:
            raise Failure(507, "", "out of storage")
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.lfs[oid] = body
        self._send(200, b"")

    def _lfs_object(self, item: dict[str, Any]) -> dict[str, Any]:
        found = {"oid": item["oid"], "size": item["size"]}
        upload = {"upload": {"href": f"{self.hub.endpoint}/lfs/{item['oid']}"}}
        return found if item["oid"] in self.hub.lfs else {**found, "actions": upload}

    def _resolve(self, kind: str, name: str, revision: str, file: str, token: str | None) -> None:
        found = self.hub.readable(kind, name, token, content=True).at(revision)
        if found is None:
            raise Failure(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        oid, files = found
        if file not in files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": oid}
            self._send(404, b"", headers)
        elif self.hub.redirects:
            self._send(302, b"", {"Location": self.hub.redirects})
        else:
            self._send_file(files[file], oid)

    def _send_file(self, content: bytes, oid: str) -> None:
        headers = {"X-Repo-Commit": oid, "ETag": f'"{_blob_id(content)}"', "Accept-Ranges": "bytes"}
        status = 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            end = int(match[2]) + 1 if match[2] else len(content)
            headers["Content-Range"] = f"bytes {match[1]}-{end - 1}/{len(content)}"
            content, status = content[int(match[1]) : end], 206
        self._send(status, content, headers)

    def _repository(
        self,
        kind: str,
        name: str,
        action: str,
        revision: str,
        rest: str,
        query: dict[str, list[str]],
        body: bytes,
        token: str | None,
    ) -> None:
        if action in ("preupload", "commit", "branch", "tag"):
            self.hub.writable(name, token)
            repository = self.hub.repositories[kind, name]
            getattr(self, f"_{action}")(repository, revision, body)
            return
        repository = self.hub.readable(kind, name, token, content=action in ("tree", "paths-info"))
        found = repository.at(revision)
        if found is None:
            raise Failure(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        oid, files = found
        if action == "tree":
            self._json(_tree(files, rest, "recursive" in query and query["recursive"][0].lower() == "true"))
        elif action == "paths-info":
            paths = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode()).get("paths", [])
            self._json([item for path in paths for item in _info(files, path)])
        elif action == "refs":
            branches = [
                {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": at} for ref, at in repository.refs.items()
            ]
            self._json({"branches": branches, "tags": [], "converts": []})
        else:
            siblings = [
                {"rfilename": path, "size": len(content), "blobId": _blob_id(content)}
                for path, content in files.items()
            ]
            gated = "manual" if repository.gated_for is not None else False
            self._json(
                {
                    "id": name,
                    "modelId": name,
                    "sha": oid,
                    "private": repository.private,
                    "gated": gated,
                    "siblings": siblings,
                }
            )

    def _preupload(self, repository: Repository, revision: str, body: bytes) -> None:
        files = [
            {
                "path": item["path"],
                "uploadMode": "lfs" if item["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
            }
            for item in json.loads(body)["files"]
        ]
        self._json({"files": files})

    def _commit(self, repository: Repository, revision: str, body: bytes) -> None:
        found = repository.at(revision)
        assert found
        files = dict(found[1])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = repository.commit(files, revision)
        self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/owner/name/commit/{oid}"})

    def _branch(self, repository: Repository, branch: str, body: bytes) -> None:
        if branch in repository.refs:
            raise Failure(409, "", f"Reference already exists: {branch}")
        repository.refs[branch] = repository.refs["main"]
        self._json({})

    def _tag(self, repository: Repository, revision: str, body: bytes) -> None:
        self._branch(repository, json.loads(body)["tag"], body)
        repository.refs[json.loads(body)["tag"]] = revision


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _info(files: Files, path: str) -> Iterator[dict[str, Any]]:
    if path in files:
        yield {"type": "file", "path": path, "size": len(files[path]), "oid": _blob_id(files[path])}
    elif any(name.startswith(f"{path}/") for name in files):
        yield {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}


def _tree(files: Files, folder: str, recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{folder}/" if folder else ""
    inside = [path for path in files if path.startswith(prefix)]
    folders = {prefix + path.removeprefix(prefix).split("/")[0] for path in inside if "/" in path.removeprefix(prefix)}
    shown = [path for path in inside if recursive or "/" not in path.removeprefix(prefix)]
    return [item for path in [*sorted(folders), *shown] for item in _info(files, path)]


@contextmanager
def serve() -> Iterator[Hub]:
    """Start a Hub on a free port of this machine, and stop it afterwards."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
