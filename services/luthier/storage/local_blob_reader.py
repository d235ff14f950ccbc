"""Blobs in a directory of the local file system, read: nothing is made, swept or changed there."""

from __future__ import annotations

import logging
import os
import re
import stat
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import BinaryIO

from luthier.storage.blobs import (
    MARK_NAME,
    PIECE_BYTES,
    ListedBlob,
    Owner,
    check_digest,
    check_range,
    is_digest,
    missing,
)
from luthier.storage.threads import finished_in

_FOLDER = re.compile(r"[0-9a-f]{2}")
_logger = logging.getLogger(__name__)


class LocalBlobReader:
    """A `BlobReader` of what `LocalBlobStore` keeps below the same root. Blocking work runs in `threads`."""

    def __init__(self, root: Path, threads: Executor | None = None) -> None:
        self._root = root
        self._blobs = root / "blobs"
        self._threads = threads

    @property
    def place(self) -> str:
        """Where the store is, for messages."""
        return str(self._root)

    async def owner(self) -> Owner | None:
        """Return whose blobs are there. Raises FailedPrecondition for what is no mark."""
        return await finished_in(self._threads, self.owner_here)

    def owner_here(self) -> Owner | None:
        """Return whose blobs are there, as `owner` does: in the caller's thread."""
        mark = self._root / MARK_NAME
        try:
            return Owner.read(mark.read_text(errors="replace"), str(mark))
        except FileNotFoundError:
            return None

    async def has(self, digest: str) -> bool:
        """Tell whether the blob is there."""
        return await finished_in(self._threads, self.path_of(digest).is_file)

    async def size(self, digest: str) -> int:
        """Return the size in bytes. Raises NotFound."""
        return await finished_in(self._threads, self.size_of, digest)

    async def list(self, after: str, limit: int) -> Sequence[ListedBlob]:
        """Return at most `limit` blobs in order of digests, from the first one after a digest on."""
        return await finished_in(self._threads, self._list, after, limit)

    async def read(
        self, digest: str, *, offset: int = 0, limit: int | None = None
    ) -> AsyncGenerator[bytes, None]:
        """Yield at most `limit` bytes from `offset` on. Raises NotFound, OutOfRange."""
        file = await self.open(digest)
        try:
            end = check_range(offset, limit, os.fstat(file.fileno()).st_size)
            for start in range(offset, end, PIECE_BYTES):
                yield await finished_in(self._threads, _read_at, file, start, min(end - start, PIECE_BYTES))
        finally:
            file.close()

    async def read_bytes(self, digest: str) -> bytes:
        """Return a whole blob that fits in memory. Raises NotFound."""
        return b"".join([piece async for piece in self.read(digest)])

    async def open(self, digest: str) -> BinaryIO:
        """Return a blob as a file. Raises NotFound."""
        return await finished_in(self._threads, self._open, digest)

    def path_of(self, digest: str) -> Path:
        """Return where a blob is, if it is there."""
        return self._blobs / check_digest(digest)[:2] / digest

    def size_of(self, digest: str) -> int:
        """Return the size in bytes, as `size` does: in the caller's thread."""
        try:
            return self.path_of(digest).stat().st_size
        except FileNotFoundError:
            raise missing(digest) from None

    def _open(self, digest: str) -> BinaryIO:
        try:
            return self.path_of(digest).open("rb")
        except FileNotFoundError:
            raise missing(digest) from None

    def _list(self, after: str, limit: int) -> Sequence[ListedBlob]:
        found: list[ListedBlob] = []
        for folder in sorted(name for name in os.listdir(self._blobs) if _FOLDER.fullmatch(name)):
            if folder < after[: len(folder)]:
                continue
            for digest in self._digests_in(folder, after):
                if listed := _listed(self._blobs / folder / digest):
                    found.append(listed)
                if len(found) == limit:
                    return found
        return found

    def _digests_in(self, folder: str, after: str) -> Sequence[str]:
        """Return what are blobs in a folder, in order: other programs leave files of other names."""
        try:
            names = os.listdir(self._blobs / folder)
        except OSError as error:
            _logger.error("a folder of blobs cannot be listed", extra={"detail": str(error)})
            return ()
        return sorted(name for name in names if name > after and name[:2] == folder and is_digest(name))


def _listed(path: Path) -> ListedBlob | None:
    try:
        found = path.stat()
    except OSError:  # collected meanwhile, or what cannot be read either
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return ListedBlob(digest=path.name, size_bytes=found.st_size, put_time=found.st_mtime)


def _read_at(file: BinaryIO, offset: int, size_bytes: int) -> bytes:
    file.seek(offset)
    return file.read(size_bytes)
