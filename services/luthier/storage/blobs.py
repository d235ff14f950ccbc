"""The blob store port: bytes named by their sha256.

A blob never changes and is there as a whole or not at all. What comes piece by piece is staged first
(`storage.staging`).
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from luthier.errors import FailedPrecondition, FieldViolation, InvalidArgument, NotFound, OutOfRange, Reason

PIECE_BYTES = 1 << 20
"""Largest piece that `BlobStore.read` yields."""

MARK_NAME = "luthier-owner"
"""Name of the mark that says whose blobs are in a store."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_MARK = re.compile(r"([a-z][a-z0-9_-]*) ([0-9a-f]{32})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """A stored blob: `digest` is the sha256 of its bytes in lowercase hex."""

    digest: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedBlob:
    """A blob as `BlobStore.list` tells of it: when it was put last, in seconds since 1970."""

    digest: str
    size_bytes: int
    put_time: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Inbox:
    """Where copies may be left: beside the file `mark`, while `min_free_bytes` of its disk stay free."""

    mark: Path
    min_free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Whose blobs are in a store: those of a service with a database, by its id. None else may collect there."""

    service: str
    database_id: str

    @classmethod
    def read(cls, text: str, place: str) -> Owner:
        """Return the owner that a mark names. Raises FailedPrecondition for what is no mark."""
        found = _MARK.fullmatch(text.strip())
        if found is None:
            raise FailedPrecondition(
                f"{place} must say whose blobs are beside it, by a service and the id of its database, it has "
                f"{len(text)} characters of something else: restore it, or remove it where they are this service's",
                metadata={"path": place},
            )
        return cls(service=found[1], database_id=found[2])

    @property
    def mark(self) -> str:
        """What stands in its mark."""
        return f"{self.service} {self.database_id}"


class BlobReader(Protocol):
    """Blobs that are read. A digest that is not 64 lowercase hex digits raises InvalidArgument everywhere."""

    @property
    def place(self) -> str:
        """Where the store is, for messages; its owner's mark is called `MARK_NAME` there."""
        ...

    async def owner(self) -> Owner | None:
        """Return whose blobs are there, None: nobody has said so. Raises FailedPrecondition for what is no mark."""
        ...

    async def has(self, digest: str) -> bool:
        """Tell whether the blob is there."""
        ...

    async def size(self, digest: str) -> int:
        """Return the size in bytes. Raises NotFound."""
        ...

    async def list(self, after: str, limit: int) -> Sequence[ListedBlob]:
        """Return at most `limit` blobs in order of digests, from the first after one on; empty: from the first of all.

        Fewer than `limit`: there are no more.
        """
        ...

    def read(self, digest: str, *, offset: int = 0, limit: int | None = None) -> AsyncGenerator[bytes, None]:
        """Yield at most `limit` bytes from `offset` on, in pieces of at most `PIECE_BYTES`.

        Raises NotFound, and OutOfRange when the offset is negative or beyond the end (the end itself yields
        nothing).
        """
        ...

    async def read_bytes(self, digest: str) -> bytes:
        """Return a whole blob that fits in memory. Raises NotFound."""
        ...

    async def open(self, digest: str) -> BinaryIO:
        """Return a blob as a file that can be read from any place; whoever asked closes it.

        Its methods block, and need nothing but the thread that calls them. Raises NotFound.
        """
        ...


class BlobStore(BlobReader, Protocol):
    """Where blobs live. `tests/storage/test_blobs.py` is the contract that every adapter passes.

    Whoever puts or takes a blob makes it young, also one that was there before: `collect` leaves it alone for a while.
    """

    async def own(self, owner: Owner) -> Owner:
        """Mark the store as an owner's unless it is somebody's; return whose it is from now on.

        Of several who ask at once one gets it. Raises FailedPrecondition for what is no mark.
        """
        ...

    async def put(self, chunks: AsyncIterator[bytes], *, expected_digest: str | None = None) -> Blob:
        """Store a blob; a blob that is there already stays as it is.

        Raises InvalidArgument CHECKSUM_MISMATCH when the bytes have another digest than `expected_digest`;
        then, as when `chunks` raises, nothing is left. Memory: one chunk.
        """
        ...

    async def put_bytes(self, data: bytes) -> Blob:
        """Store a blob that fits in memory."""
        ...

    async def put_file(self, path: Path, digest: str) -> Blob:
        """Store a whole file that has this digest, as its caller knows; it stays, and may share bytes with the blob.

        Where the file is gone, a blob of that digest that is there is returned. Raises NotFound when there is neither.
        """
        ...

    async def inbox(self) -> Inbox | None:
        """Return where copies may be left for `take`; None: there is no such place, or no room.

        See `storage.inbox`.
        """
        ...

    async def take(self, name: str, *, expected_digest: str) -> Blob:
        """Make a blob of the copy that was left under a name, which is gone then; a blob that is there stays.

        Where nothing was left, a blob of that digest that is there is returned: the call may be made again.
        Raises InvalidArgument CHECKSUM_MISMATCH, or for what is no such name; NotFound when there is neither.
        """
        ...

    async def collect(self, digest: str, put_before: float) -> int:
        """Delete a blob that was put last before a time, in seconds since 1970; return how many bytes that frees.

        0: it was put since, or is not there. A read that has begun may go on or raise NotFound.
        """
        ...


def is_digest(text: str) -> bool:
    """Tell whether a text is a well-formed digest."""
    return _DIGEST.fullmatch(text) is not None


def check_digest(digest: str) -> str:
    """Return a well-formed digest; raise InvalidArgument for any other, which might name another path."""
    if not is_digest(digest):
        raise InvalidArgument.of_fields(
            FieldViolation(field="digest", description=f"must be 64 lowercase hex digits, got {digest!r}")
        )
    return digest


def check_match(digest: str, expected_digest: str | None) -> None:
    """Raise InvalidArgument CHECKSUM_MISMATCH unless the digest is the expected one (None: any is)."""
    if expected_digest is not None and digest != check_digest(expected_digest):
        raise InvalidArgument(
            f"sha256 of the bytes must be {expected_digest}, got {digest}",
            reason=Reason.CHECKSUM_MISMATCH,
            metadata={"expected": expected_digest, "actual": digest},
        )


def check_offset(offset: int, staged_bytes: int) -> None:
    """Raise OutOfRange OFFSET_MISMATCH unless a piece continues the staged bytes."""
    if offset != staged_bytes:
        raise OutOfRange(
            f"offset must be the staged size {staged_bytes}, got {offset}",
            reason=Reason.OFFSET_MISMATCH,
            metadata={"expected": str(staged_bytes), "actual": str(offset)},
        )


def check_range(offset: int, limit: int | None, size_bytes: int) -> int:
    """Return where a read from `offset` ends; raise OutOfRange unless 0 <= offset <= size and limit >= 0."""
    if not 0 <= offset <= size_bytes:
        raise OutOfRange(f"offset must be in 0..{size_bytes}, got {offset}", metadata={"offset": str(offset)})
    if limit is not None and limit < 0:
        raise OutOfRange(f"limit must not be negative, got {limit}", metadata={"limit": str(limit)})
    return size_bytes if limit is None else min(size_bytes, offset + limit)


def missing(digest: str) -> NotFound:
    """Return the error for a blob that is not there."""
    return NotFound(f"blob {digest} does not exist", metadata={"digest": digest})


def nothing_staged(key: str) -> NotFound:
    """Return the error for a key under which no byte was ever staged."""
    return NotFound(f"nothing is staged under {key!r}", metadata={"key": key})


def closed(key: str) -> FailedPrecondition:
    """Return the error for more bytes under a key that is committed."""
    return FailedPrecondition(f"{key!r} is committed: no more bytes", metadata={"key": key})
