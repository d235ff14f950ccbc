"""A limited process that does as it is told: to be started by tests of the limits."""

from __future__ import annotations

import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from luthier.errors import InvalidArgument, Reason
from luthier.work.limited_child import Note, serve


class Panic(BaseException):
    """Like a panic of Rust code, no Exception."""


def handle(request: Mapping[str, Any], note: Note) -> Mapping[str, Any]:
    """Do what the request says."""
    return _DOINGS[request["do"]](request, note)


def spin(request: Mapping[str, Any], note: Note) -> dict[str, Any]:
    """Never end."""
    while True:
        pass


def sleep(request: Mapping[str, Any], note: Note) -> dict[str, Any]:
    """Wait."""
    time.sleep(request["seconds"])
    return {}


def notes(request: Mapping[str, Any], note: Note) -> dict[str, Any]:
    """Send notes, and wait after each."""
    for number in range(request["count"]):
        note({"number": number})
        time.sleep(request["seconds"])
    return {}


def tell_limit(request: Mapping[str, Any], note: Note) -> dict[str, Any]:
    """Return the limit of CPU time before a note that says what was spent, and behind it, from what is used."""
    before = _left_seconds()
    note({}, request["spent_seconds"])
    return {"before": before, "behind": _left_seconds()}


def _left_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return resource.getrlimit(resource.RLIMIT_CPU)[0] - used.ru_utime - used.ru_stime


def refuse(request: Mapping[str, Any], note: Note) -> dict[str, Any]:
    """Raise an error of the tree."""
    raise InvalidArgument("not this", reason=Reason.TEMPLATE_INVALID, metadata={"line": "3"})


def panic(request: Mapping[str, Any], note: Note) -> dict[str, Any]:
    """Raise what is no Exception."""
    raise Panic("no entry found")


def leave(request: Mapping[str, Any], note: Note) -> dict[str, Any]:
    """End without a word."""
    os._exit(7)


def make_noise(request: Mapping[str, Any], note: Note) -> dict[str, Any]:
    """Print as libraries do."""
    print("noise" * 10_000)
    print("noise" * 10_000, file=sys.stderr)
    return {}


def write(request: Mapping[str, Any], note: Note) -> dict[str, Any]:
    """Write a file."""
    Path(request["path"]).write_text("here")
    return {}


def connect(request: Mapping[str, Any], note: Note) -> dict[str, Any]:
    """Reach a port of this machine."""
    with socket.create_connection(("127.0.0.1", request["port"]), timeout=2):
        return {"connected": True}


def fail_with(request: Mapping[str, Any], note: Note) -> dict[str, Any]:
    """Fail, with much memory in frames that the failure leads back to."""
    held = "x" * request["size_bytes"]
    try:
        raise InvalidArgument("full", reason=Reason.TEMPLATE_INVALID)
    except InvalidArgument as error:
        told = error
        assert held
        raise told from None


KEPT: list[str] = []


def keep(request: Mapping[str, Any], note: Note) -> dict[str, Any]:
    """Take memory and never give it back."""
    KEPT.append("x" * request["size_bytes"])
    return {"pid": os.getpid()}


_DOINGS: Mapping[str, Callable[[Mapping[str, Any], Note], Mapping[str, Any]]] = {
    "echo": lambda request, _: {"said": request["text"], "pid": os.getpid()},
    "spin": spin,
    "sleep": sleep,
    "notes": notes,
    "tell_limit": tell_limit,
    "allocate": lambda request, _: {"size": len("x" * request["size_bytes"])},
    "answer": lambda request, _: {"text": "x" * request["size_bytes"]},
    "fail_with": fail_with,
    "keep": keep,
    "refuse": refuse,
    "panic": panic,
    "exit": leave,
    "print": make_noise,
    "environment": lambda _, __: dict(os.environ),
    "write": write,
    "connect": connect,
}


def main() -> None:
    """Serve."""
    serve(handle, writes_files=False)


if __name__ == "__main__":
    main()
