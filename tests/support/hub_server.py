"""A stand-in for the Hub: the few endpoints that huggingface_hub uses to push and pull, over plain HTTP in a thread.

It keeps commits as whole trees, like git, so that a revision stays what it was. Files of at most SMALL bytes travel
inside the commit, larger ones through the LFS batch endpoint, as on the Hub.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

WRITER, READER = "hf_writer", "hf_reader"
SMALL = 1000


@dataclass
class Repository:
    """One repository: its commits as whole trees, and what branches point to."""

    private: bool = False
    card: dict[str, Any] = field(default_factory=dict)
    trees: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, tree: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{len(self.trees)} {branch} {sorted(tree)}".encode()).hexdigest()
        self.trees[sha], self.branches[branch] = tree, sha
        return sha

    def resolve(self, revision: str) -> str | None:
        sha = self.branches.get(revision, revision)
        return sha if sha in self.trees else None

    @property
    def files(self) -> dict[str, bytes]:
        return self.trees[self.branches["main"]]


class Hub:
    """The state of the server: repositories, uploaded objects, and every request that came."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.broken: bytes | None = None  # what every request is answered with instead
        self.refused_card = ""  # what is wrong with every card
        self.before_commit: Any = None  # called with the repository, to let somebody else be faster
        self.url = ""

    def add(self, name: str, files: dict[str, bytes] | None = None, **fields: Any) -> Repository:
        repository = self.repositories[name] = Repository(**fields)
        repository.commit("main", files or {})
        return repository


@contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {self.path}")
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if self.hub.broken is not None:
            self._send(200, self.hub.broken)
            return
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        for method, pattern, action in ROUTES:
            match = re.fullmatch(pattern, parts.path)
            if match and self.command in method:
                action(self, *map(unquote, match.groups()))
                return
        self._send(404, {"error": f"no endpoint {self.path}"})

    def _send(self, status: int, body: Any = None, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _repository(self, name: str, writes: bool = False) -> Repository | None:
        """The repository, unless it is hidden from this token or the token may not write; then an answer was sent."""
        repository = self.hub.repositories.get(name)
        if self.token not in ("", WRITER, READER):
            message = "Invalid credentials in Authorization header"
            self._send(401, {"error": message}, X_Error_Message=message)
        elif repository is None or (repository.private and not self.token):
            known = {"X_Error_Code": "RepoNotFound"} if self.token else {}
            self._send(404 if self.token else 401, {"error": "Repository not found"}, **known)
        elif writes and self.token != WRITER:
            self._send(403, {"error": "Forbidden"}, X_Error_Message="You don't have the rights")
        else:
            return repository
        return None

    def whoami(self) -> None:
        known = self.token in (WRITER, READER)
        self._send(200 if known else 401, {"name": "user", "type": "user"} if known else {"error": "Invalid username"})

    def info(self, name: str, revision: str = "main") -> None:
        if (repository := self._repository(name)) is None:
            return
        if (sha := repository.resolve(revision)) is None:
            self._send(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
            return
        siblings = [{"rfilename": path} for path in repository.trees[sha]]
        content = {"id": name, "sha": sha, "private": repository.private, "siblings": siblings, "tags": []}
        self._send(200, {**content, "cardData": repository.card})

    def tree(self, name: str, revision: str) -> None:
        """Every file of a commit, as snapshot_download asks for them."""
        if (repository := self._repository(name)) is None:
            return
        files = repository.trees[repository.resolve(revision) or ""]
        self._send(
            200,
            [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in files.items()
            ],
        )

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if self.token != WRITER:
            self._send(403, {"error": "Forbidden"}, X_Error_Message="You don't have the rights")
        elif name in self.hub.repositories:
            self._send(409, {"error": "exists", "url": f"{self.hub.url}/{name}"})
        else:
            self.hub.add(name, {".gitattributes": b""}, private=asked.get("visibility") == "private")
            self._send(200, {"url": f"{self.hub.url}/{name}"})

    def branch(self, name: str, branch: str) -> None:
        if (repository := self._repository(name, writes=True)) is not None:
            repository.branches[branch] = repository.branches["main"]
            self._send(200, {})

    def validate_yaml(self) -> None:
        errors = [{"message": self.hub.refused_card}] if self.hub.refused_card else []
        self._send(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        if (repository := self._repository(name, writes=not self.query.get("create_pr"))) is None:
            return
        if repository.resolve(revision) is None:
            self._send(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
            return
        files = [
            {"path": f["path"], "uploadMode": "lfs" if f["size"] > SMALL else "regular", "shouldIgnore": False}
            for f in json.loads(self.body)["files"]
        ]
        self._send(200, {"files": files})

    def lfs_batch(self, name: str) -> None:
        if self._repository(name) is not None:
            objects = [
                {**asked, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}", "header": {}}}}
                for asked in json.loads(self.body)["objects"]
            ]
            self._send(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        self.hub.objects[oid] = self.body
        self._send(200 if hashlib.sha256(self.body).hexdigest() == oid else 400, {})

    def commit(self, name: str, revision: str) -> None:
        as_pr = bool(self.query.get("create_pr"))
        if (repository := self._repository(name, writes=not as_pr)) is None:
            return
        if self.hub.before_commit is not None:
            self.hub.before_commit(repository)
        lines = [json.loads(line) for line in self.body.splitlines()]
        parent = lines[0]["value"].get("parentCommit")
        if parent is not None and repository.resolve(revision) != parent:
            self._send(412, {"error": "A commit has happened since. Please refresh and try again."})
            return
        tree = dict(repository.trees[repository.branches[revision]])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                tree[value["path"]] = self.hub.objects[value["oid"]]
            else:
                del tree[value["path"]]
        target = "refs/pr/1" if as_pr else revision
        sha = repository.commit(target, tree)
        urls = {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha}
        self._send(200, {**urls, "pullRequestUrl": f"{self.hub.url}/{name}/discussions/1" if as_pr else None})

    def resolve(self, name: str, revision: str, path: str) -> None:
        if (repository := self._repository(name)) is None:
            return
        sha = repository.resolve(revision)
        tree = repository.trees.get(sha or "", {})
        if path not in tree:
            self._send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=str(sha))
            return
        digest = hashlib.sha256(tree[path]).hexdigest()
        self._send(200, tree[path], ETag=f'"{digest}"', X_Repo_Commit=str(sha))


NAME, REST = r"([^/]+/[^/]+)", r"([^/]+)"
ROUTES: list[tuple[str, str, Any]] = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("GET", f"/api/models/{NAME}", _Handler.info),
    ("GET", f"/api/models/{NAME}/revision/{REST}", _Handler.info),
    ("GET", f"/api/models/{NAME}/tree/{REST}", _Handler.tree),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", f"/api/models/{NAME}/branch/{REST}", _Handler.branch),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", f"/api/models/{NAME}/preupload/{REST}", _Handler.preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", f"/lfs/{REST}", _Handler.lfs_put),
    ("POST", f"/api/models/{NAME}/commit/{REST}", _Handler.commit),
    ("GET HEAD", rf"/{NAME}/resolve/{REST}/(.+)", _Handler.resolve),
]
