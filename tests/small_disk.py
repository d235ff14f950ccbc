"""A file system of 16 MiB to fill."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from tests import stores

SIZE_MIB = 16


@contextmanager
def mounted(folder: Path, size_mib: int = SIZE_MIB) -> Iterator[Path]:
    """Mount a small file system in memory; the test is skipped where this process may not."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m,mode=700", "tmpfs", str(folder)]
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"needs to mount a tmpfs, which is refused here: {tried.stderr.strip()}")
    try:
        # What is on it has its stores on it, wherever those of other tests are.
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(stores.Chosen, "templates", stores.Templates())
            yield folder
    finally:
        # Lazily: a worker's thread may still hold a file.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, leave_bytes: int = 0) -> Path:
    """Fill the file system of a folder and return the file that does; removing it makes room."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            pass
        if leave_bytes:
            os.ftruncate(file.fileno(), max(0, os.fstat(file.fileno()).st_size - leave_bytes))
    return filler


def fill_again(folder: Path) -> None:
    """Take at once what somebody made room for."""
    with (folder / "filler-2").open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 12))


_TAKING = """import os, sys
file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
piece = bytes(4096)
is_told = False
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(1000):
        try:
            os.write(file, piece)
        except OSError:
            is_told = is_told or os.write(1, b"full")
"""


@contextmanager
def taken(folder: Path) -> Iterator[None]:
    """Have another process take every byte that is free, or becomes so, for the length of a block."""
    command = [sys.executable, "-S", "-c", _TAKING, str(folder / "taken")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as taking:
        try:
            assert taking.stdout is not None
            assert taking.stdout.read(4) == b"full"
            yield
        finally:
            taking.kill()
