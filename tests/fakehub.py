"""A model hub on a loopback port with three repositories: open, gated and missing; it remembers what was fetched."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Serves `files` as the repository tiny/open at branch main; tiny/gated asks for a login; any other is unknown."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.fetched: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(body=True)

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def answer(self, *, body: bool) -> None:
                path = self.path.partition("?")[0]
                status, headers, content = hub.respond(path, files)
                if body and "/resolve/" in path:
                    hub.fetched.append(Path(path).name)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if body:
                    self.wfile.write(content)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self) -> FakeHub:
        self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def respond(self, path: str, files: dict[str, bytes]) -> tuple[int, dict[str, str], bytes]:
        repo = "/".join(path.removeprefix("/api/models").lstrip("/").split("/")[:2])
        if repo == "tiny/gated":
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        if repo != "tiny/open":
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if "/revision/" in path:
            if path.rpartition("/")[2] not in ("main", COMMIT):
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            return 200, {"Content-Type": "application/json"}, json.dumps({"id": repo, "sha": COMMIT}).encode()
        if "/tree/" in path:
            listing = [{"type": "file", "path": n, "size": len(c), "oid": _etag(c)} for n, c in files.items()]
            return 200, {"Content-Type": "application/json"}, json.dumps(listing).encode()
        content = files[path.rpartition("/")[2]]
        return 200, {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": COMMIT}, content


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
