"""Files that survive a crash: locked while written, durable when in place."""

import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from luthier.errors import InvalidArgument, Reason

READ_BYTES = 1 << 20
MAX_PATH_BYTES = 512
_NO_NAME = re.compile(r"[\x00-\x1f\x7f-\x9f\\]")


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable: a rename or a new file is lost in a power cut without it."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(directory: Path) -> None:
    """Create a directory below an existing one, durably. Already there: nothing happens."""
    try:
        directory.mkdir()
    except FileExistsError:
        return
    sync_directory(directory.parent)


def open_locked(path: Path) -> IO[bytes]:
    """Open a file for reading and appending, created when missing, under an exclusive lock that ends with it.

    The lock is the kernel's (`flock`): it goes when the process dies, whichever way.
    """
    while True:
        # Without a buffer: what a full disk refuses would be tried again when the file is closed.
        file = path.open("a+b", buffering=0)
        fcntl.flock(file, fcntl.LOCK_EX)
        # Whoever held the lock may have renamed or removed the file that was opened here.
        if is_at(file, path):
            return file
        file.close()


def try_lock(path: Path) -> IO[bytes] | None:
    """Open a file as `open_locked` does, or return None at once when another holds its lock."""
    while True:
        file = path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        if is_at(file, path):
            return file
        file.close()


def relative_path_problem(relative: str) -> str:
    """Say why a path from elsewhere may not be joined to a folder; empty if it may."""
    parts = relative.split("/")
    if not 0 < len(relative.encode()) <= MAX_PATH_BYTES or _NO_NAME.search(relative):
        return (
            f"must be a relative path of 1 to {MAX_PATH_BYTES} bytes without control characters and backslash, "
            f"got {relative[:MAX_PATH_BYTES]!r}"
        )
    if relative.startswith("/") or any(part in ("", ".", "..") for part in parts):
        return f"must be a path below its folder, without empty parts, '.' and '..', got {relative!r}"
    return ""


def path_below(folder: Path, relative: str) -> Path:
    """Join a folder and a path that came from elsewhere.

    Raises InvalidArgument PATH_NOT_ALLOWED for a path that is absolute, leaves the folder by its text or by a
    symbolic link on the way, or is no path.
    """
    problem = relative_path_problem(relative)
    joined = folder / relative
    if not problem and not joined.parent.resolve().is_relative_to(folder.resolve()):
        problem = f"must stay below its folder, {relative!r} leaves it by a symbolic link"
    if problem:
        raise InvalidArgument(f"path {problem}", reason=Reason.PATH_NOT_ALLOWED, metadata={"path": relative})
    return joined


def remove_unlocked(directory: Path) -> int:
    """Remove the files of a directory that no living writer holds; return how many."""
    removed = 0
    for path in directory.iterdir():
        try:
            file = path.open("rb")
        except FileNotFoundError:
            continue  # its writer is done with it, or another process was here first
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            path.unlink(missing_ok=True)
            removed += 1
    return removed


def move_into_place(file: IO[bytes], source: Path, target: Path) -> None:
    """Make an open file's bytes durable, then give it its final name in an existing directory, durably."""
    file.flush()
    os.fsync(file.fileno())
    source.rename(target)
    sync_directory(target.parent)


def write_durably(path: Path, data: bytes) -> None:
    """Write a small file so that it is there with all its bytes or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("wb") as file:
        file.write(data)
        move_into_place(file, aside, path)


def digest_of(file: IO[bytes]) -> str:
    """Return the sha256 of a whole open file in lowercase hex. Memory: 1 MiB."""
    file.seek(0)
    sha256 = hashlib.sha256()
    while piece := file.read(READ_BYTES):
        sha256.update(piece)
    return sha256.hexdigest()


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a lock file for the length of a `with` block; other processes and threads wait."""
    with open_locked(path):
        yield


def append(file: IO[bytes], data: bytes) -> None:
    """Write all of `data` at the end of a file without a buffer."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def is_at(file: IO[bytes], path: Path) -> bool:
    """Tell whether an open file is the one that has this name now."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    mine = os.fstat(file.fileno())
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)
