"""Files that grow piece by piece: held open, hashed and made durable on the way."""

import fcntl
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from luthier.storage.files import READ_BYTES, append, digest_of, is_at, open_locked, sync_directory

SYNC_BYTES = 16 << 20
"""Bytes that may be received and not yet on the disk; nobody is told that they are stored."""
_MAX_OPEN = 64


class StagedFile:
    """One file that grows. Threads and processes take turns; what another one wrote is seen.

    Its bytes outlive the process at once, and a power cut once `sync` has returned.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._turn = threading.Lock()
        self._file: IO[bytes] | None = None
        self._forget()

    def _forget(self) -> None:
        self._sha256 = hashlib.sha256()
        self._hashed_bytes = 0
        self._synced_bytes = 0
        self._is_named = False

    @contextmanager
    def held(self) -> Iterator[IO[bytes]]:
        """Hold the file, made when missing, against every other thread and process."""
        with self._turn:
            file = self._locked()
            try:
                yield file
            finally:
                if not file.closed:
                    fcntl.flock(file, fcntl.LOCK_UN)

    def _locked(self) -> IO[bytes]:
        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            if is_at(self._file, self._path):
                return self._file
            self.release()
        self._file = open_locked(self._path)
        self._forget()
        return self._file

    def append(self, file: IO[bytes], data: bytes) -> int:
        """Append to the held file and return its size. A write that fails leaves the file as it was."""
        size_bytes = os.fstat(file.fileno()).st_size
        try:
            append(file, data)
        except OSError:
            os.ftruncate(file.fileno(), size_bytes)
            raise
        if self._hashed_bytes == size_bytes:
            self._sha256.update(data)
            self._hashed_bytes += len(data)
        size_bytes += len(data)
        if size_bytes - self._synced_bytes >= SYNC_BYTES:
            self.sync(file)
        return size_bytes

    def sync(self, file: IO[bytes]) -> int:
        """Make the bytes of the held file durable, and its name, and return how many there are."""
        size_bytes = os.fstat(file.fileno()).st_size
        if self._synced_bytes != size_bytes or not self._is_named:
            os.fsync(file.fileno())
            self._synced_bytes = size_bytes
        if not self._is_named:
            sync_directory(self._path.parent)
            self._is_named = True
        return size_bytes

    def catch_up(self) -> None:
        """Hash what this process did not write itself, so that `digest` need not: others have the file meanwhile.

        What stands before the end of a file that is not written to just now is never written again.
        """
        with self.held() as file:
            sha256, begin, end = self._sha256.copy(), self._hashed_bytes, os.fstat(file.fileno()).st_size
            if begin == end:
                return
            reader = os.dup(file.fileno())
        try:
            for offset in range(begin, end, READ_BYTES):
                sha256.update(piece := os.pread(reader, READ_BYTES, offset)[: end - offset])
                if len(piece) < min(READ_BYTES, end - offset):
                    return  # somebody else cut it short: `digest` reads what is there then
            with self.held() as file:
                if os.path.sameopenfile(reader, file.fileno()) and self._hashed_bytes == begin:
                    self._sha256, self._hashed_bytes = sha256, end
        finally:
            os.close(reader)

    def digest(self, file: IO[bytes]) -> str:
        """Return the sha256 of the held file; it is read only where not all of it is hashed."""
        if self._hashed_bytes == os.fstat(file.fileno()).st_size:
            return self._sha256.hexdigest()
        return digest_of(file)

    def release(self) -> None:
        """Close the file while it is held, or while nobody can hold it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def release_if_idle(self) -> None:
        """Close the file unless somebody holds it just now."""
        if self._turn.acquire(blocking=False):
            try:
                self.release()
            finally:
                self._turn.release()

    def __del__(self) -> None:
        self.release()


class StagedFiles:
    """The files that grow, by path; those used last stay open."""

    def __init__(self) -> None:
        self._files: OrderedDict[Path, StagedFile] = OrderedDict()
        self._lock = threading.Lock()

    def at(self, path: Path) -> StagedFile:
        """Return the file at a path, which need not exist."""
        with self._lock:
            found = self._files.pop(path, None) or StagedFile(path)
            self._files[path] = found
            oldest = self._files.popitem(last=False)[1] if len(self._files) > _MAX_OPEN else None
        if oldest is not None:
            oldest.release_if_idle()
        return found

    def drop(self, path: Path) -> None:
        """Close and forget the file at a path."""
        with self._lock:
            found = self._files.pop(path, None)
        if found is not None:
            found.release_if_idle()
