"""A model hub on a loopback port: an open repository, a gated one and others; it remembers what was fetched."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
#: token -> user. Only grace has accepted the terms of the gated repository.
TOKENS = {"hf_known": "ada", "hf_accepted": "grace"}
ACCEPTED = {"grace"}

Answer = tuple[int, dict[str, str], bytes]


class FakeHub:
    """Serves `files` as the repository tiny/open at branch main, and as tiny/gated to those who accepted its terms.

    tiny/pickled has no safetensors, tiny/busy asks to come back later, and any other is unknown.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.fetched: list[str] = []
        #: Bytes of file contents that were sent.
        self.sent = 0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(body=True)

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def answer(self, *, body: bool) -> None:
                path = self.path.partition("?")[0]
                token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
                status, headers, content = hub.respond(path, token)
                if status == 200 and (wanted := self.headers.get("Range")):
                    status, headers, content = part_of(wanted, headers, content)
                if body and status < 300 and "/resolve/" in path:
                    hub.fetched.append(name_in(path))
                    hub.sent += len(content)
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

    def respond(self, path: str, token: str | None) -> Answer:
        user = TOKENS.get(token or "")
        if token and user is None:
            return 401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b"{}"
        if path == "/api/whoami-v2":
            who = {"type": "user", "name": user, "auth": {"accessToken": {"displayName": f"{user}-laptop"}}}
            return (200, {"Content-Type": "application/json"}, json.dumps(who).encode()) if user else (401, {}, b"{}")
        repo = "/".join(path.removeprefix("/api/models").lstrip("/").split("/")[:2])
        if repo == "tiny/busy":
            return 429, {}, b"{}"
        if repo not in ("tiny/open", "tiny/gated", "tiny/pickled"):
            return 404 if user else 401, {"X-Error-Code": "RepoNotFound"}, b"{}"
        # Everybody may know that it exists; the files are what the terms are about.
        if repo == "tiny/gated" and "/resolve/" in path and user not in ACCEPTED:
            return 403 if user else 401, {"X-Error-Code": "GatedRepo"}, b"{}"
        if repo == "tiny/pickled":
            return self.serve(repo, path, {"config.json": b"{}", "pytorch_model.bin": b"x", "training.pt": b"x"})
        return self.serve(repo, path, self.files)

    def serve(self, repo: str, path: str, files: dict[str, bytes]) -> Answer:
        kind = {"Content-Type": "application/json"}
        if "/revision/" in path or path == f"/api/models/{repo}":
            if "/revision/" in path and path.rpartition("/")[2] not in ("main", COMMIT):
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            siblings = [{"rfilename": name} for name in files]
            return 200, kind, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode()
        if "/tree/" in path:
            listing = [{"type": "file", "path": n, "size": len(c), "oid": _etag(c)} for n, c in files.items()]
            return 200, kind, json.dumps(listing).encode()
        content = files.get(name_in(path))
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"
        return 200, {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": COMMIT}, content


def name_in(path: str) -> str:
    """The file's name in its repository: /owner/name/resolve/revision/folder/file -> folder/file."""
    return path.partition("/resolve/")[2].partition("/")[2]


def part_of(wanted: str, headers: dict[str, str], content: bytes) -> Answer:
    """The answer to `Range: bytes=first-last`."""
    first, _, last = wanted.removeprefix("bytes=").partition("-")
    part = content[int(first) : int(last) + 1 if last else None]
    span = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
    return 206, {**headers, "Content-Range": span}, part


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
