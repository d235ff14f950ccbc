"""Blobs in memory, for tests and for stores that need not outlive the process."""

import asyncio
import hashlib
import io
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from luthier.storage.blobs import (
    PIECE_BYTES,
    Blob,
    BlobStore,
    Inbox,
    ListedBlob,
    Owner,
    check_digest,
    check_match,
    check_offset,
    check_range,
    closed,
    missing,
    nothing_staged,
)
from luthier.storage.inbox import not_left


class MemoryBlobStore:
    """A `BlobStore` that forgets. Memory: every blob."""

    def __init__(self) -> None:
        self._blobs: dict[str, bytes] = {}
        self._put_times: dict[str, float] = {}
        self._owner: Owner | None = None

    @property
    def place(self) -> str:
        """Where the store is, for messages."""
        return "memory"

    async def owner(self) -> Owner | None:
        """Return whose blobs are there."""
        return self._owner

    async def own(self, owner: Owner) -> Owner:
        """Make the store an owner's unless it is somebody's; return whose it is."""
        self._owner = self._owner or owner
        return self._owner

    async def has(self, digest: str) -> bool:
        """Tell whether the blob is there."""
        return check_digest(digest) in self._blobs

    async def size(self, digest: str) -> int:
        """Return the size in bytes. Raises NotFound."""
        return len(self._get(digest))

    async def put(self, chunks: AsyncIterator[bytes], *, expected_digest: str | None = None) -> Blob:
        """Store a blob. Raises InvalidArgument CHECKSUM_MISMATCH."""
        pieces = [chunk async for chunk in chunks]
        return self._keep(b"".join(pieces), expected_digest)

    async def put_bytes(self, data: bytes) -> Blob:
        """Store a blob."""
        return self._keep(data, None)

    async def put_file(self, path: Path, digest: str) -> Blob:
        """Store a whole file that has this digest; raise NotFound when it is gone and there is no such blob."""
        check_digest(digest)
        with suppress(FileNotFoundError):
            return self._keep(await asyncio.to_thread(path.read_bytes), digest)
        size_bytes = len(self._get(digest))
        self._put_times[digest] = time.time()
        return Blob(digest=digest, size_bytes=size_bytes)

    async def inbox(self) -> Inbox | None:
        """Return None: no file is taken."""
        return None

    async def take(self, name: str, *, expected_digest: str) -> Blob:
        """Return a blob that is there already; raise NotFound for any other, as nothing is left here."""
        if await self.has(expected_digest):
            self._put_times[expected_digest] = time.time()
            return Blob(digest=expected_digest, size_bytes=await self.size(expected_digest))
        raise not_left(name)

    async def list(self, after: str, limit: int) -> Sequence[ListedBlob]:
        """Return blobs in order of digests."""
        found = sorted(digest for digest in self._blobs if digest > after)[:limit]
        return [
            ListedBlob(digest=digest, size_bytes=len(self._blobs[digest]), put_time=self._put_times[digest])
            for digest in found
        ]

    async def collect(self, digest: str, put_before: float) -> int:
        """Delete a blob that was put last before a time; return its size."""
        if self._put_times.get(check_digest(digest), put_before) >= put_before:
            return 0
        del self._put_times[digest]
        return len(self._blobs.pop(digest))

    async def read(
        self, digest: str, *, offset: int = 0, limit: int | None = None
    ) -> AsyncGenerator[bytes, None]:
        """Yield at most `limit` bytes from `offset` on. Raises NotFound, OutOfRange."""
        data = self._get(digest)
        end = check_range(offset, limit, len(data))
        for start in range(offset, end, PIECE_BYTES):
            yield data[start : min(end, start + PIECE_BYTES)]

    async def read_bytes(self, digest: str) -> bytes:
        """Return a whole blob. Raises NotFound."""
        return self._get(digest)

    async def open(self, digest: str) -> BinaryIO:
        """Return a blob as a file. Raises NotFound."""
        return io.BytesIO(self._get(digest))

    def _get(self, digest: str) -> bytes:
        data = self._blobs.get(check_digest(digest))
        if data is None:
            raise missing(digest)
        return data

    def _keep(self, data: bytes, expected_digest: str | None) -> Blob:
        digest = hashlib.sha256(data).hexdigest()
        check_match(digest, expected_digest)
        self._blobs.setdefault(digest, bytes(data))
        self._put_times[digest] = time.time()
        return Blob(digest=digest, size_bytes=len(data))


class MemoryStaging:
    """A `Staging` that forgets. Memory: every staged byte, until it is discarded."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs
        self._staged: dict[str, bytes] = {}
        self._committed: dict[str, str] = {}

    async def size(self, key: str) -> int:
        """Return how many bytes are staged under a key."""
        return len(self._staged.get(key, b""))

    async def append(self, key: str, offset: int, data: bytes) -> int:
        """Append to the bytes staged under a key. Raises OutOfRange OFFSET_MISMATCH, FailedPrecondition."""
        if key in self._committed:
            raise closed(key)
        staged = self._staged.get(key, b"")
        check_offset(offset, len(staged))
        self._staged[key] = staged + data
        return len(staged) + len(data)

    async def commit(self, key: str, *, expected_digest: str | None = None) -> Blob:
        """Make a blob of the staged bytes. Raises NotFound, InvalidArgument CHECKSUM_MISMATCH."""
        if key not in self._staged:
            raise nothing_staged(key)
        data = self._staged[key]
        check_match(hashlib.sha256(data).hexdigest(), expected_digest)
        blob = await self._blobs.put_bytes(data)
        self._committed[key] = blob.digest
        return blob

    async def discard(self, key: str) -> None:
        """Forget a key."""
        self._staged.pop(key, None)
        self._committed.pop(key, None)
