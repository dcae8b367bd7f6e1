"""A local server that speaks the hub's API: repository info, file heads, whole files and ranges."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import unquote

if TYPE_CHECKING:
    from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What the server serves and what it was asked. `cut_after`: bytes until a download breaks."""

    def __init__(self, repos: dict[str, Path]) -> None:
        self.repos = repos
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, range
        self.sent: dict[str, int] = {}  # bytes of each file, by its name
        self.cut_after: int | None = None
        self.endpoint = ""

    def files(self, repo: str) -> dict[str, Path]:
        root = self.repos[repo]
        return {str(p.relative_to(root)): p for p in sorted(root.rglob("*")) if p.is_file()}


@contextmanager
def serve(repos: dict[str, Path]):
    hub = Hub(repos)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, *, body):
        path = unquote(self.path.partition("?")[0])
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/(.+))?", path):
            self.info(found[1], found[3])
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(/.*)?", path):
            self.tree(found[1])
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.file(found[1], found[3], body=body)
        else:
            self.missing("EntryNotFound")

    def missing(self, code):
        self.send(404, {"error": code}, {"X-Error-Code": code})

    def send(self, status, content, headers=()):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def info(self, repo, revision):
        if repo not in self.hub.repos:
            self.missing("RepoNotFound")
        elif revision not in (None, "main", COMMIT):
            self.missing("RevisionNotFound")
        else:
            names = [{"rfilename": name} for name in self.hub.files(repo)]
            self.send(200, {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": names})

    def tree(self, repo):
        rows = [
            {"type": "file", "path": name, "size": path.stat().st_size, "oid": etag(path)}
            for name, path in self.hub.files(repo).items()
        ]
        self.send(200, rows)

    def file(self, repo, name, *, body):
        path = self.hub.files(repo).get(name) if repo in self.hub.repos else None
        if path is None:
            self.missing("EntryNotFound")
            return
        data = path.read_bytes()
        start, stop = 0, len(data)
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if found:
            start, stop = int(found[1]), min(stop, int(found[2] or stop) + 1)
        self.send_response(206 if found else 200)
        if found:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{etag(path)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if not body:
            return
        if self.hub.cut_after is not None and len(data) > self.hub.cut_after:
            self.wfile.write(data[start : start + self.hub.cut_after])
            self.close_connection = True
            self.hub.cut_after = None
        else:
            self.hub.sent[name] = self.hub.sent.get(name, 0) + stop - start
            self.wfile.write(data[start:stop])


def etag(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()
