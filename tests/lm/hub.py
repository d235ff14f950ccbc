"""A small Hugging Face hub on loopback: one repository, a branch and its commit, files for the real client."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REPOSITORY = "org/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NEXT_COMMIT = "89abcdef0123456789abcdef0123456789abcdef"


@dataclass
class Hub:
    """The repository's files. `moves_on`: the branch gets a new commit as soon as it was asked for."""

    folder: Path
    moves_on: bool = False
    endpoint: str = ""
    fetched: set[str] = field(default_factory=set)
    head: str = COMMIT


def _answer(hub: Hub, path: str) -> tuple[int, bytes, dict[str, str]]:
    names = sorted(file.name for file in hub.folder.iterdir() if file.is_file())
    if path in (f"/api/models/{REPOSITORY}/revision/main", f"/api/models/{REPOSITORY}/revision/{COMMIT}"):
        commit = hub.head if path.endswith("main") else COMMIT
        if hub.moves_on:
            hub.head = NEXT_COMMIT
        siblings = [{"rfilename": name} for name in names]
        return 200, json.dumps({"id": REPOSITORY, "sha": commit, "siblings": siblings}).encode(), {}
    if path.startswith(f"/api/models/{REPOSITORY}/tree/{COMMIT}"):
        tree = [
            {"type": "file", "path": name, "size": (hub.folder / name).stat().st_size, "oid": "0" * 40}
            for name in names
        ]
        return 200, json.dumps(tree).encode(), {}
    prefix = f"/{REPOSITORY}/resolve/{COMMIT}/"
    if path.startswith(prefix) and path.removeprefix(prefix) in names:
        name = path.removeprefix(prefix)
        hub.fetched.add(name)
        data = (hub.folder / name).read_bytes()
        return 200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
    code = "RevisionNotFound" if path.startswith(f"/api/models/{REPOSITORY}/") else "RepoNotFound"
    return 404, b"{}", {"X-Error-Code": code}


@contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    """Serve a folder for the length of a block."""
    hub = Hub(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body, headers = _answer(hub, self.path.partition("?")[0])
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815 - the name that http.server calls

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
