"""A worker's files by digest, on its own disk, within a size limit."""

from __future__ import annotations

import hashlib
import os
import threading
import uuid
from collections.abc import Iterable
from pathlib import Path

from luthier.errors import DataLoss, Reason
from luthier.storage.files import append, open_locked, remove_unlocked


class BlobCache:
    """Files named by their sha256. Safe for several processes: a file appears whole or not at all.

    When an addition takes the cache over `limit_bytes`, the files used longest ago go first. A file that is
    hard-linked or open elsewhere stays readable there. What a killed process left half written goes at start.
    """

    def __init__(self, root: Path, limit_bytes: int) -> None:
        self._root = root
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._incoming = root / ".incoming"
        self._incoming.mkdir(parents=True, exist_ok=True)
        remove_unlocked(self._incoming)

    def find(self, sha256: str) -> Path | None:
        """Return the file with this digest and mark it used, or None."""
        path = self._root / sha256
        try:
            os.utime(path)
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
            file.flush()
            if hasher.hexdigest() != sha256:
                raise DataLoss(
                    reason=Reason.CHECKSUM_MISMATCH,
                    message=f"the bytes received have sha256 {hasher.hexdigest()}, expected {sha256}",
                    metadata={"sha256": sha256},
                )
            path = self._root / sha256
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
            file.close()
        self._shrink(keep=path)
        return path

    def _shrink(self, keep: Path) -> None:
        with self._lock:
            found = [path for path in self._root.iterdir() if not path.name.startswith(".")]
            used = [(path.stat(), path) for path in found if path.exists()]
            total_bytes = sum(status.st_size for status, _ in used)
            for status, path in sorted(used, key=lambda pair: pair[0].st_mtime):
                if total_bytes <= self._limit_bytes:
                    return
                if path != keep:
                    path.unlink(missing_ok=True)
                    total_bytes -= status.st_size
