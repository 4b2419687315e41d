"""A small local server that speaks as much of the hub's HTTP API as a snapshot download uses.

It can ask for a token, gate a model, cut a file in the middle and refuse what follows, and it remembers each request.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType


@dataclass
class Repo:
    files: dict[str, bytes | Sparse]
    revisions: dict[str, str] = field(default_factory=dict)
    """Branch or tag -> commit. `main` is made if it is not there."""
    token: str | None = None
    """Needed to see the model at all."""
    gated: bool = False
    card: dict[str, object] | None = None
    """The metadata of its README."""


class Sparse:
    """A file of `size` bytes that begins with `start` and goes on with zeros, made as it is sent."""

    def __init__(self, start: bytes, size: int) -> None:
        self.start, self.size = start, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> bytes:
        first, last, _ = part.indices(self.size)
        return self.start[first:last] + bytes(last - max(first, min(last, len(self.start))))


def _digest(data: bytes | Sparse) -> str:
    return hashlib.sha1(data if isinstance(data, bytes) else data.start).hexdigest()


@dataclass(frozen=True)
class Seen:
    method: str
    path: str
    range: str | None


class HubServer:
    """`with HubServer() as hub:` serves until the block ends; `hub.repos` may be changed while it does."""

    def __init__(self) -> None:
        self.sent_bytes = 0
        """Of all bodies so far."""
        self.ignore_ranges = False
        """Answer a request for a part with the whole file, as a plain server does."""
        self.repos: dict[str, Repo] = {}
        self.seen: list[Seen] = []
        self.cut_after: dict[str, int] = {}
        """File -> bytes sent before the connection breaks; only the first request for it is cut."""
        self.hang_up = 0
        """So many requests for a part of a file get no answer: the connection ends."""
        self.refuse_ranges = False
        """Answer 503 to every request that wants the rest of a file."""
        self.before_the_first: Callable[[], None] | None = None
        """Runs before the first request is answered."""
        server = self

        class Handler(_Handler):
            hub = server

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def add(self, name: str, files: dict[str, bytes | Sparse], **options: object) -> Repo:
        repo = Repo(files, **options)  # type: ignore[arg-type]
        repo.revisions.setdefault("main", commit_of(name, "main"))
        self.repos[name] = repo
        return repo

    def requests_for(self, file: str) -> list[Seen]:
        return [seen for seen in self.seen if seen.method == "GET" and seen.path.endswith("/" + file)]

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()


def commit_of(name: str, revision: str) -> str:
    """A commit id that a test can predict."""
    return hashlib.sha1(f"{name}@{revision}".encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Stay quiet."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        if self.headers.get("Range") and self.hub.hang_up:
            self.hub.hang_up -= 1
            self.close_connection = True
            return
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        if self.hub.before_the_first and not self.hub.seen:
            self.hub.before_the_first()
        self.hub.seen.append(Seen(self.command, path, self.headers.get("Range")))
        parts = path.strip("/").split("/")
        parts = parts[1:] if parts[0] == "datasets" else parts
        if parts[:2] in (["api", "models"], ["api", "datasets"]) and len(parts) >= 4:
            name, rest = "/".join(parts[2:4]), parts[4:]
        elif len(parts) >= 5 and parts[2] == "resolve":
            name, rest = "/".join(parts[:2]), parts[2:]
        else:
            self._fail(404, "", "no such page")
            return
        repo = self._visible(name)
        if repo is None:
            return
        if not rest:
            self._json(self._info(name, repo, repo.revisions["main"]))
            return
        commit = self._commit(repo, rest[1])
        if commit is None:
            self._fail(404, "RevisionNotFound", f"Invalid rev id: {rest[1]}")
        elif rest[0] == "revision":
            self._json(self._info(name, repo, commit))
        elif rest[0] == "tree":
            self._json([self._entry(file, data) for file, data in repo.files.items()])
        elif repo.gated:
            self._fail(403, "GatedRepo", f"Access to model {name} is restricted")
        elif (file := "/".join(rest[2:])) in repo.files:
            self._file(file, repo.files[file], commit)
        else:
            self._fail(404, "EntryNotFound", "Entry not found")

    def _visible(self, name: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        authorization = self.headers.get("Authorization")
        if repo is None:
            self._fail(404, "RepoNotFound", "Repository not found")
        elif repo.token is not None and authorization != f"Bearer {repo.token}":
            self._fail(401, "RepoNotFound" if authorization is None else "", "Invalid username or password.")
            return None
        return repo

    @staticmethod
    def _commit(repo: Repo, revision: str) -> str | None:
        return revision if revision in repo.revisions.values() else repo.revisions.get(revision)

    @staticmethod
    def _entry(file: str, data: bytes | Sparse) -> dict[str, object]:
        return {"type": "file", "path": file, "size": len(data), "oid": _digest(data)}

    @staticmethod
    def _info(name: str, repo: Repo, commit: str) -> dict[str, object]:
        siblings = [{"rfilename": f, "size": len(data), "blobId": _digest(data)} for f, data in repo.files.items()]
        return {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "cardData": repo.card}

    def _json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _file(self, file: str, data: bytes | Sparse, commit: str) -> None:
        headers = {"ETag": f'"{_digest(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        status, start, end = 200, 0, len(data)
        wanted = self.headers.get("Range")
        if self.command == "GET" and wanted:
            if self.hub.refuse_ranges:
                self._fail(503, "", "over capacity")
                return
            if not self.hub.ignore_ranges:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                start, end = int(first), min(len(data), int(last) + 1 if last else len(data))
                status = 206
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        keep = self.hub.cut_after.pop(file, None) if self.command == "GET" else None
        body = data[start:end] if self.command == "GET" and end - start < 100_000_000 else b""
        self._send(status, body, headers, keep=keep, length=end - start)

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], *, keep: int | None = None, length: int = -1
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length < 0 else length))
        self.end_headers()
        if self.command == "GET":
            self.hub.sent_bytes += len(body)
            with contextlib.suppress(ConnectionError):  # the client had seen enough
                self.wfile.write(body if keep is None else body[:keep])
        if keep is not None or (self.command == "GET" and length > len(body)):
            self.wfile.flush()
            self.close_connection = True
