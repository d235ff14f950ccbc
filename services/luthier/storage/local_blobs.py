"""Blobs in a directory of the local file system.

root/blobs/ab/<digest>      ab = the first two digits of the digest
root/luthier-owner          whose blobs they are, by service and database
root/incoming/<random>      on their way in: locked by their writer, swept when it is gone, at start and while files
                            are left; `<random>.mark` is locked by the store itself (`storage.inbox`)

When a blob was put last is its file's time of change; nothing else changes a file that is in place. The lock of
root/blobs is shared by who makes a blob young, and held alone by who collects one that is old.
"""

import errno
import fcntl
import hashlib
import logging
import os
import time
import uuid
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import IO, BinaryIO, ParamSpec, TypeVar

from luthier.errors import NotFound
from luthier.storage.blobs import (
    MARK_NAME,
    PIECE_BYTES,
    Blob,
    Inbox,
    ListedBlob,
    Owner,
    check_digest,
    check_match,
    missing,
)
from luthier.storage.disk import Disk, named_when_full
from luthier.storage.files import (
    append,
    digest_of,
    is_at,
    make_directory,
    open_locked,
    remove_unlocked,
    sync_directory,
    write_durably,
)
from luthier.storage.inbox import not_left, open_left
from luthier.storage.local_blob_reader import LocalBlobReader
from luthier.storage.threads import finished_in

_THREADS = 16
"""More than cores: most of them wait for the disk."""
_SWEEP_SECONDS = 60.0
"""Shortest time between two looks for what writers left that are gone."""
_NO_LINKS = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP})
_logger = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")


class LocalBlobStore:
    """A `BlobStore` below `root`, safe for several processes on one machine. Blocking work runs in threads.

    Bytes are refused with ResourceExhausted DISK_FULL where fewer than `min_free_bytes` would stay free, or none are.
    """

    def __init__(self, root: Path, *, min_free_bytes: int = 0) -> None:
        self._disk = Disk(root, min_free_bytes)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="blobs")
        # Who collects holds the lock of all writers of a database: never behind what hashes, copies or unlinks.
        self._aside_thread = ThreadPoolExecutor(1, thread_name_prefix="blobs-aside")
        self._remover = ThreadPoolExecutor(1, thread_name_prefix="blobs-remove")
        self._reader = LocalBlobReader(root, self._threads)
        self._blobs = root / "blobs"
        self._incoming = root / "incoming"
        self._mark: Path | None = None
        self._marking = Lock()
        root.mkdir(parents=True, exist_ok=True)
        for directory in (self._blobs, self._incoming):
            make_directory(directory)
        remove_unlocked(self._incoming)
        self._swept_at = time.monotonic()

    @property
    def place(self) -> str:
        """Where the store is, for messages."""
        return self._reader.place

    async def owner(self) -> Owner | None:
        """Return whose blobs are there. Raises FailedPrecondition for what is no mark."""
        return await self._reader.owner()

    async def own(self, owner: Owner) -> Owner:
        """Mark the store as an owner's unless it is somebody's; return whose it is."""
        return await self._run(self._own, owner)

    async def has(self, digest: str) -> bool:
        """Tell whether the blob is there."""
        return await self._reader.has(digest)

    async def size(self, digest: str) -> int:
        """Return the size in bytes. Raises NotFound."""
        return await self._reader.size(digest)

    async def put(self, chunks: AsyncIterator[bytes], *, expected_digest: str | None = None) -> Blob:
        """Store a blob. Raises InvalidArgument CHECKSUM_MISMATCH. Memory: one chunk."""
        aside = self._incoming / uuid.uuid4().hex
        file = await self._run(open_locked, aside)
        try:
            sha256 = hashlib.sha256()
            async for chunk in chunks:
                self._disk.require_room()
                await self._run(_append, file, sha256.update, chunk)
            check_match(sha256.hexdigest(), expected_digest)
            return await self._run(self._keep, file, aside, sha256.hexdigest())
        finally:
            aside.unlink(missing_ok=True)
            file.close()

    async def put_bytes(self, data: bytes) -> Blob:
        """Store a blob that fits in memory."""

        async def pieces() -> AsyncIterator[bytes]:
            yield data

        return await self.put(pieces())

    async def put_file(self, path: Path, digest: str) -> Blob:
        """Store a whole file that has this digest: by another name for the same bytes, where that can be."""
        return await self._run(self._put_file, path, check_digest(digest))

    async def inbox(self) -> Inbox | None:
        """Return where copies may be left; None where the floor is reached."""
        return await self._run(self._inbox)

    async def take(self, name: str, *, expected_digest: str) -> Blob:
        """Make a blob of the copy that was left under a name, as often as asked. Raises InvalidArgument, NotFound."""
        self._disk.require_room()
        return await self._run(self._take, name, expected_digest)

    async def list(self, after: str, limit: int) -> Sequence[ListedBlob]:
        """Return at most `limit` blobs in order of digests, from the first one after a digest on."""
        return await self._reader.list(after, limit)

    async def collect(self, digest: str, put_before: float) -> int:
        """Delete a blob that was put last before a time, and return its size; a read that has begun goes on."""
        size_bytes, aside = await finished_in(self._aside_thread, self._set_aside, digest, put_before)
        if aside is not None:
            # A large file takes a while to go, and nobody waits for that. What is killed meanwhile is swept.
            self._remover.submit(_remove, aside)
        return size_bytes

    def read(self, digest: str, *, offset: int = 0, limit: int | None = None) -> AsyncGenerator[bytes, None]:
        """Yield at most `limit` bytes from `offset` on. Raises NotFound, OutOfRange."""
        return self._reader.read(digest, offset=offset, limit=limit)

    async def read_bytes(self, digest: str) -> bytes:
        """Return a whole blob that fits in memory. Raises NotFound."""
        return await self._reader.read_bytes(digest)

    async def open(self, digest: str) -> BinaryIO:
        """Return a blob as a file. Raises NotFound."""
        return await self._reader.open(digest)

    async def _run(self, function: Callable[P, R], *arguments: P.args, **named: P.kwargs) -> R:
        with named_when_full():
            return await finished_in(self._threads, function, *arguments, **named)

    def _own(self, owner: Owner) -> Owner:
        with self._ages(fcntl.LOCK_EX):
            found = self._reader.owner_here()
            if found is None:
                write_durably(self._blobs.parent / MARK_NAME, f"{owner.mark}\n".encode())
            return found or owner

    def _inbox(self) -> Inbox | None:
        # First: what was left may be why there is no room.
        self._sweep()
        if not self._disk.has_room():
            return None
        return Inbox(mark=self._marked(), min_free_bytes=self._disk.min_free_bytes)

    def _sweep(self) -> None:
        """Remove what killed workers left: the service may outlive many."""
        with self._marking:
            if time.monotonic() - self._swept_at < _SWEEP_SECONDS:
                return
            self._swept_at = time.monotonic()
        try:
            remove_unlocked(self._incoming)
        except OSError as error:
            _logger.warning("what writers left could not be swept", extra={"detail": str(error)})

    def _marked(self) -> Path:
        with self._marking:
            if self._mark is None:
                path = self._incoming / f"{uuid.uuid4().hex}.mark"
                weakref.finalize(self, open_locked(path).close)
                self._mark = path
            return self._mark

    def _take(self, name: str, expected_digest: str) -> Blob:
        target = self._reader.path_of(expected_digest)
        try:
            return self._taken(name, expected_digest)
        except NotFound:
            # Of a call that is made again the first may have taken it.
            if not self._refreshed(target):
                raise
            return Blob(digest=expected_digest, size_bytes=self._reader.size_of(expected_digest))

    def _taken(self, name: str, expected_digest: str) -> Blob:
        path = self._incoming / name
        with open_left(self._incoming, name) as file:
            digest = digest_of(file)
            check_match(digest, expected_digest)
            if not is_at(file, path):
                raise not_left(name)
            try:
                blob = self._keep(file, path, digest)
            except FileNotFoundError as error:  # taken by another call, or swept, after the look above
                raise not_left(name) from error
            path.unlink(missing_ok=True)
            return blob

    def _keep(self, file: IO[bytes], source: Path, digest: str) -> Blob:
        target = self._reader.path_of(digest)
        size_bytes = file.seek(0, os.SEEK_END)
        if not self._refreshed(target):
            make_directory(target.parent)
            os.fsync(file.fileno())
            with self._ages(fcntl.LOCK_SH):
                # It may have been written long ago: an upload has the time of its last piece.
                os.utime(source)
                source.rename(target)
            sync_directory(target.parent)
        return Blob(digest=digest, size_bytes=size_bytes)

    def _put_file(self, path: Path, digest: str) -> Blob:
        target = self._reader.path_of(digest)
        try:
            file = path.open("rb")
        except FileNotFoundError:
            if not self._refreshed(target):
                raise missing(digest) from None
            return Blob(digest=digest, size_bytes=self._reader.size_of(digest))
        with file:
            if not self._refreshed(target) and not self._linked(file, path, target):
                self._copy(file, digest)
            return Blob(digest=digest, size_bytes=os.fstat(file.fileno()).st_size)

    def _copy(self, file: IO[bytes], digest: str) -> None:
        aside = self._incoming / uuid.uuid4().hex
        try:
            with open_locked(aside) as copy:
                while piece := file.read(PIECE_BYTES):
                    append(copy, piece)
                self._keep(copy, aside, digest)
        finally:
            aside.unlink(missing_ok=True)

    def _linked(self, file: IO[bytes], path: Path, target: Path) -> bool:
        """Give a file that is durable a second name; False: it is on another file system, or this one has no such."""
        os.fsync(file.fileno())
        make_directory(target.parent)
        with self._ages(fcntl.LOCK_SH):
            try:
                os.utime(path)
                os.link(path, target)
            except FileExistsError:  # another call was first, and has made it young, or it cannot be made so
                return _made_young(target)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                return False
        sync_directory(target.parent)
        return True

    def _refreshed(self, target: Path) -> bool:
        """Make a blob young; False: it is not there, or belongs to another user: it is to be stored anew."""
        with self._ages(fcntl.LOCK_SH):
            return _made_young(target)

    @contextmanager
    def _ages(self, operation: int) -> Iterator[None]:
        descriptor = os.open(self._blobs, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, operation)
            yield
        finally:
            os.close(descriptor)

    def _set_aside(self, digest: str, put_before: float) -> tuple[int, Path | None]:
        """Take an old blob out of its place; returns its size and where it is now."""
        target, aside = self._reader.path_of(digest), self._incoming / uuid.uuid4().hex
        with self._ages(fcntl.LOCK_EX):
            try:
                found = target.stat()
            except FileNotFoundError:
                return 0, None
            if found.st_mtime >= put_before:
                return 0, None
            target.rename(aside)
        return found.st_size, aside


def _made_young(target: Path) -> bool:
    try:
        os.utime(target)
    except (FileNotFoundError, PermissionError):
        return False
    return True


def _remove(aside: Path) -> None:
    try:
        aside.unlink(missing_ok=True)
    except OSError as error:
        _logger.warning("a collected blob is still on the disk", extra={"detail": str(error)})


def _append(file: IO[bytes], update: Callable[[bytes], object], chunk: bytes) -> None:
    update(chunk)
    append(file, chunk)
