"""A receiver of webhooks in a process of its own: what it answers is chosen by the path, what it got stands in a file.

python receiver.py PORT FILE PATH [CERTIFICATE KEY]
"""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

STATUS = {"/ok": 204, "/fail": 500, "/gone": 410, "/busy": 429, "/redirect": 302}


class Handler(BaseHTTPRequestHandler):
    """Notes each POST, then answers."""

    server: Any

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        # Names of headers have no case: verifiers look for lower-case ones.
        headers = {name.lower(): value for name, value in self.headers.items()}
        told = {"path": self.path, "headers": headers, "body": body.decode(), "at": time.time()}
        with self.server.log.open("a") as file:
            file.write(json.dumps(told) + "\n")
            file.flush()
            os.fsync(file.fileno())
        path = self.server.always or self.path.partition("?")[0]
        match path:
            case "/slow":
                time.sleep(60)
            case "/trickle":
                for byte in b"HTTP/1.1 200 OK\r\nx: " + b"x" * 600:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.1)
            case "/garbage":
                self.wfile.write(b"SSH-2.0-none of your business\r\n")
            case "/silent":
                pass
            case "/informed":
                self.wfile.write(
                    b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
                )
            case _:
                self.send_response(STATUS[path])
                if path == "/redirect":
                    self.send_header("Location", "/ok")
                if path == "/busy":
                    self.send_header("Retry-After", "1200")
                self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its caller's name
        """Say nothing."""


@dataclass(kw_only=True)
class Receiver:
    """A receiver that can be started and killed."""

    folder: Path
    port: int = 0
    is_secure: bool = False
    name: str = "receiver"
    always: str = ""
    """The path as which all are taken."""
    process: subprocess.Popen[bytes] | None = None
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.log = self.folder / f"{self.name}.jsonl"

    @property
    def origin(self) -> str:
        return f"{'https' if self.is_secure else 'http'}://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, __file__, str(self.port), str(self.log), self.always]
        if self.is_secure:
            command += [str(self.folder / "receiver.pem"), str(self.folder / "receiver.key")]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        with self.process.stdout as said:
            self.port = int(said.readline())

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def received(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def await_received(self, number: int, seconds: float = 30.0) -> list[dict[str, Any]]:
        deadline = time.monotonic() + seconds
        while len(found := self.received()) < number:
            if time.monotonic() > deadline:
                raise AssertionError(f"{len(found)} of {number} webhooks came: {found}")
            time.sleep(0.02)
        return found


@contextmanager
def receiving(folder: Path, **settings: Any) -> Iterator[Receiver]:
    """Receive for the length of a block."""
    receiver = Receiver(folder=folder, **settings)
    receiver.start()
    try:
        yield receiver
    finally:
        receiver.kill()


def make_certificate(folder: Path, address: str = "127.0.0.1") -> Path:
    """Make a certificate of an address that signs itself; returns its file."""
    certificate = folder / "receiver.pem"
    subprocess.run(
        [
            *(
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
                "-nodes",
            ),
            *("-keyout", str(folder / "receiver.key"), "-out", str(certificate), "-days", "2"),
            *("-subj", "/CN=receiver", "-addext", f"subjectAltName=IP:{address}"),
        ],
        check=True,
        capture_output=True,
    )
    return certificate


def headers_of(told: Mapping[str, Any]) -> dict[str, str]:
    """Return the headers of a webhook that came, as the scheme's library takes them."""
    found: dict[str, str] = told["headers"]
    return found


def main(port: str, log: str, always: str, *tls: str) -> None:
    server: Any = ThreadingHTTPServer(("127.0.0.1", int(port)), Handler)
    server.log, server.always = Path(log), always
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*tls)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
