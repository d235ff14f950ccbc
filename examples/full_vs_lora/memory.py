"""The most memory that a worker of the services, or a process that it started, holds while something runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_LOOK_SECONDS = 0.1


@dataclass(slots=True, kw_only=True)
class Memory:
    """`peak_bytes`: the most that one process held, file-backed pages included; final once the block has ended."""

    peak_bytes: int = 0


@contextmanager
def watched(module: str, home: Path) -> Iterator[Memory]:
    """Watch the process that runs a module on a home, and those that it starts, ten times a second, for a block.

    Raises:
        RuntimeError: at its end, if no such process was there.
    """
    memory, ended = Memory(), threading.Event()

    def look() -> None:
        process: Path | None = None
        while not ended.wait(_LOOK_SECONDS):
            process = process or found(module, home)
            family = [] if process is None else [process, *children(process)]
            held = [size for size in map(held_bytes, family) if size is not None]
            memory.peak_bytes = max([memory.peak_bytes, *held])
            process = process if held else None

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


def children(process: Path) -> list[Path]:
    """Return the folders in /proc of the processes that any thread of a process started and that have not ended."""
    found = []
    for thread in process.glob("task/*/children"):
        try:
            found += [process.parent / number for number in thread.read_text().split()]
        except OSError:  # the thread has ended
            continue
    return found


def held_bytes(process: Path) -> int | None:
    """Return what a process holds now; None: it has ended."""
    try:
        lines = (process / "status").read_text().splitlines()
    except OSError:
        return None
    sizes = [line.split()[1] for line in lines if line.startswith("VmRSS:")]
    return int(sizes[0]) * 1024 if sizes else None
