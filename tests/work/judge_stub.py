"""A judge as a process of its own: an endpoint of OpenAI's protocol that fails as its model's name says.

Models are written `MANNER` or `MANNER-half`: with `-half` every second call that comes fails, in one way after another.
"""

from __future__ import annotations

import itertools
import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_ANSWER = re.compile(r"^\[answer(| [AB]) (\w+)\]\n(.*?)\n\[end of answer\1 \2\]$", re.DOTALL | re.MULTILINE)
_FAILURES = ("503", "drop", "429", "half an answer", "500")
LOCK = threading.Lock()
CALLS = itertools.count()
SEEN: list[dict[str, Any]] = []
AWAKE: set[str] = set()
USAGE = {"prompt_tokens": 100, "completion_tokens": 3, "total_tokens": 103}


def answers_of(prompt: str) -> list[str]:
    """The answers that a prompt shows, in their order."""
    return [text for _, _, text in _ANSWER.findall(prompt)]


def judgement(manner: str, prompt: str) -> str:
    """What the stub says to a prompt."""
    answers = answers_of(prompt)
    if manner == "first":
        return "The first convinces.\nBetter: A"
    if manner == "slow":
        time.sleep(0.2)
    if manner in ("tie", "slow"):
        return "Better: tie"
    if manner == "babble":
        return "It depends." if sum(map(len, answers)) % 2 else longer(answers)
    if manner == "length":
        return f"Score: {min(len(answers[0]) // 10, 5)}"
    if manner == "eleven":
        return "**Score: 11**"
    return longer(answers)


def longer(answers: list[str]) -> str:
    """Prefer the longer answer; of one alone its place among texts of up to 400 characters."""
    first, second = map(len, answers)
    return "Reasons.\n\nBetter: " + ("A" if first > second else "B" if second > first else "tie")


class Handler(BaseHTTPRequestHandler):
    """One call."""

    def log_message(self, *_: Any) -> None:
        """Be quiet."""

    def do_GET(self) -> None:
        """Say what was seen; `/wake/MANNER` ends the sleep of `asleep` or of `dozing`."""
        if self.path.startswith("/wake/"):
            AWAKE.add(self.path.removeprefix("/wake/"))
        self.reply(200, json.dumps(SEEN).encode())

    def do_POST(self) -> None:
        """Judge, or fail."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with LOCK:
            number = next(CALLS)
            SEEN.append({"path": self.path, "authorization": self.headers.get("Authorization"), **body})
        manner, _, half = body["model"].partition("-")
        if half and number % 2:
            self.fail(_FAILURES[number // 2 % len(_FAILURES)])
            return
        if manner == "refuse":
            self.reply(401, f"no such key: {self.headers.get('Authorization')}".encode())
        elif manner == "moved":
            self.send_response(307)
            self.send_header("Location", f"http://localhost:{self.server.server_port}/elsewhere")  # type: ignore[attr-defined]
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif manner == "html":
            self.reply(200, b"<html>a portal</html>")
        elif manner in ("asleep", "dozing") and manner not in AWAKE:
            self.reply(503, b"later")
        elif manner == "drip":
            self.drip()
        else:
            text = judgement(manner, body["messages"][0]["content"])
            choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            usage = {"usage": USAGE} if manner == "tie" else {"usage": None} if manner == "first" else {}
            self.reply(200, json.dumps({"choices": [choice], **usage}).encode())

    def fail(self, how: str) -> None:
        """Fail in a way that may pass."""
        if how == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
        elif how == "half an answer":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self.reply(int(how), b'{"error": {"message": "later"}}')

    def drip(self) -> None:
        """Send a byte now and then, so that no wait for one is long and the whole never comes."""
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        try:
            while True:
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.05)
        except OSError:
            return

    def reply(self, status: int, data: bytes) -> None:
        """Answer."""
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Stub:
    """The process, from outside."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}/v1"

    def seen(self) -> list[dict[str, Any]]:
        """Return every call that came: its path, its authorization and its body's fields."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/seen") as answer:
            found: list[dict[str, Any]] = json.load(answer)
        return found

    def wake(self, manner: str = "asleep") -> None:
        """Have the model `asleep`, or `dozing`, answer from now on."""
        urllib.request.urlopen(f"http://127.0.0.1:{self.port}/wake/{manner}").close()


@contextmanager
def judge_stub() -> Iterator[Stub]:
    """Run a stub for the length of a block."""
    with subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield Stub(int(process.stdout.readline()))
        finally:
            process.kill()


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
