"""A blob store that is measured: how long it takes, how much goes through, and what it could not do."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

from prometheus_client import CollectorRegistry

from luthier.errors import LuthierError, Reason
from luthier.runtime import tracing
from luthier.runtime.catalogue import stores
from luthier.runtime.metric import reason_label
from luthier.storage.blobs import Blob, BlobStore, Inbox, ListedBlob, Owner
from luthier.storage.staging import Staging

Operation = Literal["read", "write", "append", "commit", "delete", "look"]
_CALLERS_FAULT = frozenset({"INVALID_ARGUMENT", "NOT_FOUND", "OUT_OF_RANGE", "FAILED_PRECONDITION"})


class BlobMetrics:
    """Series of what a blob store does, by operation."""

    def __init__(self, registry: CollectorRegistry) -> None:
        seconds = stores.BLOB_SECONDS.histogram(registry)
        passed = stores.BLOB_BYTES.counter(registry)
        self._failures = stores.BLOB_FAILURES.counter(registry)
        self._seconds = {operation: seconds.labels(operation) for operation in stores.OPERATIONS}
        self._bytes = {operation: passed.labels(operation) for operation in ("read", "write", "append")}
        for operation in stores.OPERATIONS:
            # Whoever asks by how much they rise must have seen them at 0.
            for reason in (Reason.DISK_FULL, Reason.INTERNAL):
                self._failures.labels(operation, str(reason))

    @contextmanager
    def timed(self, operation: Operation) -> Iterator[None]:
        """Time a block, and count what it raises that is the store's fault."""
        began = time.perf_counter()
        with self.failing(operation):
            yield
        self.took(operation, time.perf_counter() - began)

    @contextmanager
    def failing(self, operation: Operation) -> Iterator[None]:
        """Count what a block raises that is the store's fault."""
        try:
            yield
        except Exception as error:
            self.failed(operation, error)
            raise

    def failed(self, operation: Operation, error: Exception) -> None:
        """Count an error, unless it says that the caller was wrong."""
        if not isinstance(error, LuthierError):
            self._failures.labels(operation, str(Reason.INTERNAL)).inc()
        elif error.code not in _CALLERS_FAULT:
            self._failures.labels(operation, reason_label(error.reason)).inc()

    def took(self, operation: Operation, seconds: float) -> None:
        """Note how long an operation took."""
        self._seconds[operation].observe(seconds)
        tracing.past(f"blob {operation}", seconds)

    def passed(self, operation: Operation, size_bytes: int) -> None:
        """Count bytes that were read or written."""
        self._bytes[operation].inc(size_bytes)


class _Coming:
    """Bytes on their way into a store: how long was waited for them, and whether they broke off."""

    def __init__(self, chunks: AsyncIterator[bytes], metrics: BlobMetrics) -> None:
        self._chunks = chunks
        self._metrics = metrics
        self.seconds = 0.0
        self.error: Exception | None = None

    async def pieces(self) -> AsyncIterator[bytes]:
        while (chunk := await self._next()) is not None:
            self._metrics.passed("write", len(chunk))
            yield chunk

    async def _next(self) -> bytes | None:
        asked = time.perf_counter()
        try:
            return await anext(self._chunks, None)
        except Exception as error:
            self.error = error
            raise
        finally:
            self.seconds += time.perf_counter() - asked


class MeasuredBlobs:
    """The `BlobStore` within, measured."""

    def __init__(self, blobs: BlobStore, metrics: BlobMetrics) -> None:
        self._blobs = blobs
        self._metrics = metrics

    @property
    def place(self) -> str:
        """Where the store is, for messages."""
        return self._blobs.place

    async def owner(self) -> Owner | None:
        """Return whose blobs are there."""
        with self._metrics.timed("look"):
            return await self._blobs.owner()

    async def own(self, owner: Owner) -> Owner:
        """Mark the store as an owner's unless it is somebody's; return whose it is."""
        with self._metrics.timed("write"):
            return await self._blobs.own(owner)

    async def has(self, digest: str) -> bool:
        """Tell whether the blob is there."""
        with self._metrics.timed("look"):
            return await self._blobs.has(digest)

    async def size(self, digest: str) -> int:
        """Return the size in bytes. Raises NotFound."""
        with self._metrics.timed("look"):
            return await self._blobs.size(digest)

    async def put(self, chunks: AsyncIterator[bytes], *, expected_digest: str | None = None) -> Blob:
        """Store a blob. The time that its bytes take to come, and what goes wrong with them, is not the store's."""
        coming = _Coming(chunks, self._metrics)
        began = time.perf_counter()
        try:
            blob = await self._blobs.put(coming.pieces(), expected_digest=expected_digest)
        except Exception as error:
            if error is not coming.error:
                self._metrics.failed("write", error)
            raise
        self._metrics.took("write", time.perf_counter() - began - coming.seconds)
        return blob

    async def put_bytes(self, data: bytes) -> Blob:
        """Store a blob that fits in memory."""
        with self._metrics.timed("write"):
            blob = await self._blobs.put_bytes(data)
        self._metrics.passed("write", len(data))
        return blob

    async def put_file(self, path: Path, digest: str) -> Blob:
        """Store a whole file that has this digest. Raises NotFound."""
        with self._metrics.timed("write"):
            blob = await self._blobs.put_file(path, digest)
        self._metrics.passed("write", blob.size_bytes)
        return blob

    async def inbox(self) -> Inbox | None:
        """Return where copies may be left."""
        with self._metrics.timed("look"):
            return await self._blobs.inbox()

    async def take(self, name: str, *, expected_digest: str) -> Blob:
        """Make a blob of a copy that was left. Raises InvalidArgument, NotFound."""
        with self._metrics.timed("write"):
            blob = await self._blobs.take(name, expected_digest=expected_digest)
        self._metrics.passed("write", blob.size_bytes)
        return blob

    async def list(self, after: str, limit: int) -> Sequence[ListedBlob]:
        """Return blobs in order of digests."""
        with self._metrics.timed("look"):
            return await self._blobs.list(after, limit)

    async def collect(self, digest: str, put_before: float) -> int:
        """Delete a blob that was put last before a time; return its size."""
        with self._metrics.timed("delete"):
            return await self._blobs.collect(digest, put_before)

    async def read(
        self, digest: str, *, offset: int = 0, limit: int | None = None
    ) -> AsyncGenerator[bytes, None]:
        """Yield bytes. Raises NotFound, OutOfRange. The time that they take to be sent on is not the store's."""
        seconds = 0.0
        # Closed at once, not by the garbage collector, when the reader goes away: it holds a file.
        async with aclosing(self._blobs.read(digest, offset=offset, limit=limit)) as pieces:
            while True:
                asked = time.perf_counter()
                with self._metrics.failing("read"):
                    piece = await anext(pieces, None)
                seconds += time.perf_counter() - asked
                if piece is None:
                    break
                self._metrics.passed("read", len(piece))
                yield piece
        self._metrics.took("read", seconds)

    async def read_bytes(self, digest: str) -> bytes:
        """Return a whole blob that fits in memory. Raises NotFound."""
        with self._metrics.timed("read"):
            data = await self._blobs.read_bytes(digest)
        self._metrics.passed("read", len(data))
        return data

    async def open(self, digest: str) -> BinaryIO:
        """Return a blob as a file. Raises NotFound."""
        with self._metrics.timed("look"):
            return await self._blobs.open(digest)


class MeasuredStaging:
    """The `Staging` within, measured."""

    def __init__(self, staging: Staging, metrics: BlobMetrics) -> None:
        self._staging = staging
        self._metrics = metrics

    async def size(self, key: str) -> int:
        """Return how many bytes are staged under a key."""
        with self._metrics.timed("look"):
            return await self._staging.size(key)

    async def append(self, key: str, offset: int, data: bytes) -> int:
        """Append to the bytes staged under a key. Raises OutOfRange OFFSET_MISMATCH, FailedPrecondition."""
        with self._metrics.timed("append"):
            size_bytes = await self._staging.append(key, offset, data)
        self._metrics.passed("append", len(data))
        return size_bytes

    async def commit(self, key: str, *, expected_digest: str | None = None) -> Blob:
        """Make a blob of the staged bytes. Raises NotFound, InvalidArgument CHECKSUM_MISMATCH."""
        with self._metrics.timed("commit"):
            return await self._staging.commit(key, expected_digest=expected_digest)

    async def discard(self, key: str) -> None:
        """Forget a key."""
        with self._metrics.timed("delete"):
            await self._staging.discard(key)
