"""A control group of memory of this very kernel, made for a test, of version 1 or 2; skipped where none can be made."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from luthier.work.control_groups import number_in

_MOUNT = Path("/sys/fs/cgroup")
_END_SECONDS = 10.0


@dataclass(frozen=True)
class MemoryGroup:
    """A group in which processes can be started, and limited."""

    folder: Path

    @property
    def _is_first(self) -> bool:
        return (self.folder / "memory.limit_in_bytes").exists()

    def command(self, *words: str) -> list[str]:
        """Return a command that runs another one in the group."""
        return ["sh", "-c", 'echo $$ > "$0"/cgroup.procs && exec "$@"', str(self.folder), *words]

    def held_bytes(self) -> int:
        """Return what its processes hold, files included."""
        name = "memory.usage_in_bytes" if self._is_first else "memory.current"
        return int((self.folder / name).read_text())

    def limit(self, size_bytes: int) -> None:
        """Let its processes hold so much together, and nothing of it on a disk."""
        if self._is_first:
            (self.folder / "memory.limit_in_bytes").write_text(str(size_bytes))
            with suppress(OSError):  # a kernel that does not count what is on a disk
                (self.folder / "memory.memsw.limit_in_bytes").write_text(str(size_bytes))
            return
        with suppress(OSError):
            (self.folder / "memory.swap.max").write_text("0")
        (self.folder / "memory.max").write_text(str(size_bytes))

    def free(self) -> None:
        """Limit it no longer."""
        if self._is_first:
            with suppress(OSError):
                (self.folder / "memory.memsw.limit_in_bytes").write_text("-1")
            (self.folder / "memory.limit_in_bytes").write_text("-1")
        else:
            (self.folder / "memory.max").write_text("max")

    def kills(self) -> int:
        """Return how many of its processes the kernel has ended for want of memory."""
        name = "memory.oom_control" if self._is_first else "memory.events"
        return number_in(self.folder / name, r"^oom_kill (\d+)$") or 0


@contextmanager
def memory_group() -> Iterator[MemoryGroup]:
    """Make a group for the length of a block; what runs in it must have ended by then. Skips where none can be made."""
    tried = []
    for parent in (_MOUNT / "memory", _MOUNT):
        folder = parent / f"luthier-test-{uuid.uuid4().hex}"
        try:
            folder.mkdir()
        except OSError as error:
            tried.append(f"{parent}: {error.strerror}")
            continue
        try:
            if not any((folder / name).exists() for name in ("memory.limit_in_bytes", "memory.max")):
                tried.append(f"{parent}: memory is not controlled there")
                continue
            yield MemoryGroup(folder)
            return
        finally:
            _remove(folder)
    pytest.skip(f"no control group of memory can be made here: {'; '.join(tried)}")


def _remove(folder: Path) -> None:
    deadline = time.monotonic() + _END_SECONDS
    while True:
        try:
            folder.rmdir()
            return
        except OSError:  # what was in it is ending
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
