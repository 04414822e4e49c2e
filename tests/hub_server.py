"""A Hub on loopback: repositories of files, served to the real `huggingface_hub` by the parts of its protocol in use.

`GET /api/models/REPO[/revision/REV]` lists a commit with sizes and, of large files, SHA-256;
`/REPO/resolve/COMMIT/FILE` gives a file. Repositories can be told to misbehave. Every request is recorded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """Files by name, and the faults that its server has with them."""

    files: dict[str, bytes]
    revisions: tuple[str, ...] = ("main",)
    fault: str | None = None
    """`gated`, `private`, `failing`: answers of that kind; `cut`, `long`, `altered`, `endless`: of file bodies."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Sizes that are listed instead of the true ones."""

    @property
    def commit(self) -> str:
        digest = hashlib.sha1(usedforsecurity=False)
        for name in sorted(self.files):
            digest.update(name.encode() + self.files[name])
        return digest.hexdigest()

    def listing(self) -> dict[str, object]:
        siblings = []
        for name, data in self.files.items():
            size = self.sizes.get(name, len(data))
            entry: dict[str, object] = {"rfilename": name, "size": size, "blobId": "0" * 40}
            if name.endswith((".safetensors", ".pt", ".bin")):
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": size, "pointerSize": 130}
            siblings.append(entry)
        return {"id": "x", "sha": self.commit, "siblings": siblings}


class Hub:
    """The repositories of a server, and what was asked of it."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.endpoint = ""

    def fetched(self) -> list[str]:
        """Names of the files whose contents were asked for, in order."""
        return [line.split("/", 5)[5] for line in self.requests if line.startswith("GET /") and "/resolve/" in line]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        parts = parts[2:] if api else parts
        repository = self.hub.repositories.get("/".join(parts[:2]))
        if repository is None:
            return self._refuse(404 if len(parts) >= 2 else 400, "RepoNotFound")
        if repository.fault == "gated":
            return self._refuse(403, "GatedRepo")
        if repository.fault == "private":
            return self._refuse(401, "RepoNotFound")
        if repository.fault == "failing":
            return self._refuse(500, "")
        if len(parts) > 2 and parts[3] not in (*repository.revisions, repository.commit):
            return self._refuse(404, "RevisionNotFound")
        if api:
            return self._send(json.dumps(repository.listing()).encode(), {"Content-Type": "application/json"})
        name = "/".join(parts[4:])
        if name not in repository.files:
            return self._refuse(404, "EntryNotFound")
        return self._file(repository, name)

    def _file(self, repository: Repository, name: str) -> None:
        data = repository.files[name]
        headers = {"X-Repo-Commit": repository.commit, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        if name.endswith("model.safetensors"):
            if repository.fault == "altered":
                data = data[:-1] + bytes([data[-1] ^ 1])
            if repository.fault == "long":
                data += bytes(2**16)
            if repository.fault == "endless":  # no length, no end
                return self._send(data, headers, endless=True)
            if repository.fault == "cut" and self.command == "GET":
                return self._send(data, headers, cut=len(data) // 2)
        return self._send(data, headers)

    def _refuse(self, status: int, code: str) -> None:
        self._send(b"{}", {"X-Error-Code": code} if code else {}, status)

    def _send(
        self,
        data: bytes,
        headers: dict[str, str],
        status: int = 200,
        cut: int | None = None,
        endless: bool = False,
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if not endless:
            self.send_header("Content-Length", str(len(data)))
        if endless or cut is not None:
            self.close_connection = True
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "HEAD":
            return
        with contextlib.suppress(ConnectionError):
            self.wfile.write(data if cut is None else data[:cut])
            while endless:
                self.wfile.write(data)


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
