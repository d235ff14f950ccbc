"""A worker's files by digest, on its own disk, within a size limit."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

from luthier.errors import DataLoss, Reason
from luthier.storage.files import append, digest_of, move_into_place, open_locked, remove_unlocked

_TRIES = 3
_Identity = tuple[int, int, int]
_logger = logging.getLogger(__name__)


class BlobCache:
    """Files named by their sha256. Safe for several processes: a file appears whole and durable or not at all.

    When an addition takes the cache over `limit_bytes`, the files used longest ago go first. A file that was
    taken out with `take` stays there whatever happens in the cache. What a killed process left half written goes
    at start.

    A file is hashed once in each process before its first use, and again when its size, time or inode changed:
    one that is not what its name says is removed, which is logged, and fetched anew.
    """

    def __init__(self, root: Path, limit_bytes: int) -> None:
        self._root = root
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._incoming = root / ".incoming"
        self._incoming.mkdir(parents=True, exist_ok=True)
        self._verified: dict[str, _Identity] = {}
        remove_unlocked(self._incoming)

    def take(self, sha256: str, target: Path, download: Callable[[], Iterable[bytes]]) -> Path:
        """Make the file with this digest appear at `target`, whose folder is made; do not change it there.

        `download` brings the bytes when the cache does not have them. No copy is made where the file system
        has hard links.

        Raises:
            DataLoss: the bytes have another digest.
            OSError: no room, or `target` cannot be written.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(_TRIES):
            cached = self.find(sha256) or self.add(sha256, download())
            try:
                _place(cached, target)
            except FileNotFoundError:
                continue  # it was evicted in between
            return target
        raise DataLoss(
            reason=Reason.DATA_CORRUPTED,
            message=f"blob {sha256} went from the cache {_TRIES} times before it was used; raise its size limit",
            metadata={"sha256": sha256},
        )

    def find(self, sha256: str) -> Path | None:
        """Return the file with this digest and mark it used, or None. It may be evicted at any time."""
        path = self._root / sha256
        try:
            status = path.stat()
            if not self._is_sound(sha256, path, status):
                return None
            os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))
        except FileNotFoundError:
            return None
        return path

    def add(self, sha256: str, chunks: Iterable[bytes]) -> Path:
        """Store a file.

        Raises:
            DataLoss: the bytes have another digest; nothing is kept.
        """
        hasher = hashlib.sha256()
        aside = self._incoming / uuid.uuid4().hex
        file = open_locked(aside)
        try:
            for chunk in chunks:
                hasher.update(chunk)
                append(file, chunk)
            if hasher.hexdigest() != sha256:
                raise DataLoss(
                    reason=Reason.CHECKSUM_MISMATCH,
                    message=f"the bytes received have sha256 {hasher.hexdigest()}, expected {sha256}",
                    metadata={"sha256": sha256},
                )
            path = self._root / sha256
            move_into_place(file, aside, path)
            self._verified[sha256] = _identity(os.fstat(file.fileno()))
        finally:
            aside.unlink(missing_ok=True)
            file.close()
        self._shrink(keep=path)
        return path

    def _is_sound(self, sha256: str, path: Path, status: os.stat_result) -> bool:
        if self._verified.get(sha256) == _identity(status):
            return True
        with path.open("rb") as file:
            found = digest_of(file)
            hashed = _identity(os.fstat(file.fileno()))
        if found != sha256:
            _logger.error(
                "cached file damaged, it is fetched again", extra={"expected": sha256, "actual": found}
            )
            path.unlink(missing_ok=True)
            return False
        self._verified[sha256] = hashed
        return True

    def _shrink(self, keep: Path) -> None:
        with self._lock:
            found = [path for path in self._root.iterdir() if not path.name.startswith(".")]
            used = [(status, path) for path in found if (status := _status(path)) is not None]
            total_bytes = sum(status.st_size for status, _ in used)
            for status, path in sorted(used, key=lambda pair: pair[0].st_atime_ns):
                if total_bytes <= self._limit_bytes:
                    return
                if path != keep:
                    path.unlink(missing_ok=True)
                    total_bytes -= status.st_size


def _place(source: Path, target: Path) -> None:
    """Link or copy a file to a path where it may be already."""
    try:
        os.link(source, target)
    except FileExistsError:
        return
    except FileNotFoundError:
        raise
    except OSError:
        aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        shutil.copyfile(source, aside)
        aside.replace(target)


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None  # another process was here first


def _identity(status: os.stat_result) -> _Identity:
    return status.st_size, status.st_mtime_ns, status.st_ino
