"""The port of uploads in progress: bytes that come piece by piece, on the service's own disk, until they are a blob.

A store of blobs may be far away and take whole objects only; what was staged outlives the process at once, and what
`size` told outlives a power cut: an upload goes on where it was told to.
"""

from __future__ import annotations

from typing import Protocol

from luthier.storage.blobs import Blob


class Staging(Protocol):
    """Where bytes are staged by keys. `tests/storage/test_staging.py` is the contract that every adapter passes."""

    async def size(self, key: str) -> int:
        """Return how many bytes are staged under a key: 0 when none, the blob's size once committed.

        They are durable when this returns.
        """
        ...

    async def append(self, key: str, offset: int, data: bytes) -> int:
        """Append to the bytes staged under a key and return their new size.

        They outlive this process from now on, and a power cut once `size` or `commit` returned.
        Raises OutOfRange OFFSET_MISMATCH when `offset` is not the staged size; FailedPrecondition WRONG_STATE
        when the key is committed, ResourceExhausted DISK_FULL: then nothing of it is kept. Appending no bytes at
        offset 0 makes an empty file that can be committed.
        """
        ...

    async def commit(self, key: str, *, expected_digest: str | None = None) -> Blob:
        """Make a blob of the staged bytes; the same call gives the same blob until `discard`, and makes it young.

        They stay staged until then: should the blob be collected before anything refers to it, the same call
        stores it anew. Raises NotFound when nothing is staged, InvalidArgument CHECKSUM_MISMATCH when the bytes have
        another digest. Call `discard` once the outcome is recorded.
        """
        ...

    async def discard(self, key: str) -> None:
        """Forget what is staged or committed under a key. Blobs stay. No such key: nothing happens."""
        ...
