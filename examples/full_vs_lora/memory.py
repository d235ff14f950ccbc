"""The most memory that a process of the services holds while something runs, as the system counts it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_LOOK_SECONDS = 0.1


@dataclass(slots=True, kw_only=True)
class Memory:
    """`peak_bytes`: the most that was held at once, file-backed pages included; final once the block has ended."""

    peak_bytes: int = 0


@contextmanager
def watched(module: str, home: Path) -> Iterator[Memory]:
    """Watch the process that runs a module on a home, ten times a second, for the length of a block.

    Raises:
        RuntimeError: at its end, if no such process was there.
    """
    memory, ended = Memory(), threading.Event()

    def look() -> None:
        process: Path | None = None
        while not ended.wait(_LOOK_SECONDS):
            process = process or found(module, home)
            held = None if process is None else held_bytes(process)
            if held is None:
                process = None
            else:
                memory.peak_bytes = max(memory.peak_bytes, held)

    thread = threading.Thread(target=look, name="memory")
    thread.start()
    try:
        yield memory
    finally:
        ended.set()
        thread.join()
    if not memory.peak_bytes:
        raise RuntimeError(f"a process must run {module} on {home}, there was none")


def found(module: str, home: Path) -> Path | None:
    """Return the folder in /proc of the process that runs a module on a home; None: there is none."""
    home_setting = f"LUTHIER_HOME={home}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
            if words[-1] == module.encode() and home_setting in (process / "environ").read_bytes().split(
                b"\0"
            ):
                return process
        except OSError:  # it has ended, or is somebody else's
            continue
    return None


def held_bytes(process: Path) -> int | None:
    """Return what a process holds now; None: it has ended."""
    try:
        lines = (process / "status").read_text().splitlines()
    except OSError:
        return None
    sizes = [line.split()[1] for line in lines if line.startswith("VmRSS:")]
    return int(sizes[0]) * 1024 if sizes else None
