"""Uploads in progress in a directory of the local file system.

root/<sha256(key)>         the staged bytes
root/<sha256(key)>.digest  beside them once they are committed: the digest of the blob that they became
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import ParamSpec, TypeVar

from luthier.errors import NotFound
from luthier.storage.blobs import Blob, BlobStore, check_match, check_offset, closed, nothing_staged
from luthier.storage.disk import Disk, named_when_full
from luthier.storage.files import sync_directory, write_durably
from luthier.storage.staged_files import StagedFiles
from luthier.storage.threads import finished_in

_THREADS = 16
"""More than cores: most of them wait for the disk."""
P = ParamSpec("P")
R = TypeVar("R")


class LocalStaging:
    """A `Staging` below `root`, safe for several processes on one machine. Blocking work runs in threads.

    Needs a file system that updates a file's size only after its data (ext4 in its default mode, XFS, ZFS): after a
    power cut the size of a staged file is what tells how many of its bytes are there. Bytes are refused with
    ResourceExhausted DISK_FULL where fewer than `min_free_bytes` would stay free, or none are.
    """

    def __init__(self, root: Path, blobs: BlobStore, *, min_free_bytes: int = 0) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self._root = root
        self._blobs = blobs
        self._disk = Disk(root, min_free_bytes)
        self._files = StagedFiles()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="staging")

    async def size(self, key: str) -> int:
        """Return how many bytes are staged under a key, all of them durable: 0 when none."""
        size_bytes = await self._run(self._size, key)
        if size_bytes is not None:
            return size_bytes
        with suppress(FileNotFoundError, NotFound):
            return await self._blobs.size(await self._run(self._paths(key)[1].read_text))
        return 0

    async def append(self, key: str, offset: int, data: bytes) -> int:
        """Append to the bytes staged under a key. Raises OutOfRange OFFSET_MISMATCH, FailedPrecondition."""
        self._disk.require_room()
        return await self._run(self._append, key, offset, data)

    async def commit(self, key: str, *, expected_digest: str | None = None) -> Blob:
        """Make a blob of the staged bytes. Raises NotFound, InvalidArgument CHECKSUM_MISMATCH."""
        digest = await self._run(self._close, key, expected_digest)
        return await self._blobs.put_file(self._paths(key)[0], digest)

    async def discard(self, key: str) -> None:
        """Forget a key."""
        await self._run(self._discard, key)

    async def _run(self, function: Callable[P, R], *arguments: P.args, **named: P.kwargs) -> R:
        with named_when_full():
            return await finished_in(self._threads, function, *arguments, **named)

    def _paths(self, key: str) -> tuple[Path, Path]:
        # Hashed, so that a key may hold any character and never names another path.
        name = hashlib.sha256(key.encode()).hexdigest()
        return self._root / name, self._root / f"{name}.digest"

    def _size(self, key: str) -> int | None:
        staged, _ = self._paths(key)
        if not staged.exists():
            return None
        growing = self._files.at(staged)
        with growing.held() as file:
            return growing.sync(file)

    def _append(self, key: str, offset: int, data: bytes) -> int:
        staged, committed = self._paths(key)
        if committed.exists():
            raise closed(key)
        if offset > 0 and not staged.exists():
            check_offset(offset, 0)
        growing = self._files.at(staged)
        with growing.held() as file:
            if committed.exists():
                raise closed(key)
            check_offset(offset, os.fstat(file.fileno()).st_size)
            return growing.append(file, data)

    def _close(self, key: str, expected_digest: str | None) -> str:
        """Let no more bytes come, and return the digest of those that did."""
        staged, committed = self._paths(key)
        with suppress(FileNotFoundError):
            digest = committed.read_text()
            check_match(digest, expected_digest)
            return digest
        if not staged.exists():
            raise nothing_staged(key)
        growing = self._files.at(staged)
        # First without the lock: of a large file that another process received its size shall be told meanwhile.
        growing.catch_up()
        with growing.held() as file:
            digest = growing.digest(file)
            check_match(digest, expected_digest)
            growing.sync(file)
            # Before it becomes a blob: a crash in between leaves both, and the same call finishes the work.
            write_durably(committed, digest.encode())
        self._files.drop(staged)
        return digest

    def _discard(self, key: str) -> None:
        staged, committed = self._paths(key)
        # A kill while a digest is written leaves that aside.
        for path in (staged, committed, *self._root.glob(f".{committed.name}.*")):
            path.unlink(missing_ok=True)
            self._files.drop(path)
        sync_directory(self._root)
