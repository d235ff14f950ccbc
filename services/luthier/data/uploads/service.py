"""What can be done with uploads."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from weakref import WeakValueDictionary

from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.data.uploads import repository
from luthier.data.uploads.domain import Chunk, Upload, UploadState, check_chunk, check_upload
from luthier.errors import FieldViolation, InvalidArgument, Reason
from luthier.runtime.names import new_id
from luthier.storage.blobs import Blob, BlobStore
from luthier.storage.database import Database
from luthier.storage.resources import require_etag


def _now() -> datetime:
    return datetime.now(UTC)


class Turn:
    """Keeps those who work on one upload apart.

    `receiving` is the upload as the last chunk left it, so that the next one need not ask the database: set only
    between chunks, by whoever held the lock last.
    """

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.receiving: Upload | None = None


class UploadService:
    """Use cases of uploads. One instance serves a database: it keeps writers of one upload apart."""

    def __init__(
        self,
        database: Database,
        blobs: BlobStore,
        max_bytes: int,
        clock: Callable[[], datetime] = _now,
    ) -> None:
        self._database = database
        self._blobs = blobs
        self._max_bytes = max_bytes
        self._clock = clock
        self._uploads = repository.uploads()
        self._staged = repository.StagedUploads()
        self._turns: WeakValueDictionary[str, Turn] = WeakValueDictionary()
        self._clearing: set[asyncio.Task[None]] = set()

    async def start(self, parent: str, filename: str, size_bytes: int, sha256: str) -> Upload:
        """Announce a file of a project. Raises InvalidArgument, ResourceExhausted DISK_FULL."""
        check_upload(filename, size_bytes, sha256, self._max_bytes)
        self._database.disk.require_room()
        now = self._clock()
        upload = Upload(
            name=f"{parent}/uploads/{new_id('upload')}",
            uid=str(uuid.uuid4()),
            state=UploadState.RECEIVING,
            labels={},
            create_time=now,
            update_time=now,
            revision=1,
            filename=filename,
            size_bytes=size_bytes,
            sha256=sha256,
        )
        async with self._database.transaction() as connection:
            await self._uploads.insert(connection, upload)
            await self._staged.add(connection, upload)
        return upload

    async def get(self, name: str) -> Upload:
        """Return an upload with its persisted size. Raises NotFound.

        An upload whose finishing a crash cut short is finished first.
        """
        turn = self.turn(name)
        async with turn.lock:
            turn.receiving = None
            return await self._reconciled(name)

    def turn(self, name: str) -> Turn:
        """Return what all who work on an upload share. Whoever writes chunk after chunk keeps it meanwhile."""
        return self._turns.setdefault(name, Turn())

    async def write(self, name: str, chunk: Chunk) -> Upload:
        """Append a chunk; with `finish` make the whole a blob.

        The bytes outlive the process when this returns; `persisted_size_bytes` of what it returns counts them.
        A power cut they outlive once `get` has counted them, or the upload is complete.
        Raises NotFound, FailedPrecondition WRONG_STATE, and InvalidArgument as `check_chunk` does: then
        nothing of the chunk is kept. When the whole has another sha256 than announced, it is
        CHECKSUM_MISMATCH, and the upload begins again at offset 0. ResourceExhausted DISK_FULL: there is too
        little room for the chunk; what came before it stays.
        """
        turn = self.turn(name)
        async with turn.lock:
            upload, turn.receiving = turn.receiving or await self._reconciled(name), None
            upload.require_receiving()
            received_bytes = upload.persisted_size_bytes
            check_chunk(upload, chunk, received_bytes, self._max_bytes)
            if chunk.data:
                self._database.disk.require_room()
            if chunk.data or received_bytes == 0:
                received_bytes = await self._blobs.stage(upload.uid, chunk.offset, chunk.data)
            if not chunk.finish:
                turn.receiving = replace(upload, persisted_size_bytes=received_bytes)
                return turn.receiving
            # Before the blob is committed: should the process end in between, `_reconciled` does the rest.
            async with self._database.transaction() as connection:
                await self._staged.set_finishing(connection, upload.uid, True)
            return await self._finish(upload)

    async def cancel(self, name: str, etag: str) -> Upload:
        """Give an upload up; a cancelled one is returned unchanged.

        Raises NotFound, FailedPrecondition WRONG_STATE when it is complete, Aborted ETAG_MISMATCH.
        """
        turn = self.turn(name)
        async with turn.lock, self._database.transaction(makes_room=True) as connection:
            turn.receiving = None
            upload = await self._uploads.get(connection, name)
            require_etag(upload, etag)
            if upload.state is UploadState.CANCELLED:
                return upload
            upload = await self._uploads.update(connection, upload.cancelled())
            self._database.after_commit(lambda: self._clear_later(upload))
        return upload

    async def completed(self, connection: AsyncConnection, name: str) -> Upload:
        """Return a complete upload. Raises NotFound, FailedPrecondition UPLOAD_INCOMPLETE."""
        return (await self._uploads.get(connection, name)).require_complete()

    async def recover(self) -> None:
        """Clear away what an earlier process left staged of uploads that are over."""
        async with self._database.reading() as connection:
            ended = await self._staged.ended(connection)
        for name, uid in ended:
            await self._clear(name, uid)

    async def _reconciled(self, name: str) -> Upload:
        async with self._database.reading() as connection:
            upload = await self._uploads.get(connection, name)
            finishing = await self._staged.is_finishing(connection, upload.uid)
        if upload.state is not UploadState.RECEIVING:
            return upload
        if finishing:
            return await self._finish(upload)
        return replace(upload, persisted_size_bytes=await self._blobs.staged_size(upload.uid))

    async def _finish(self, upload: Upload) -> Upload:
        blob = await self._committed(upload)
        async with self._database.transaction() as connection:
            done = await self._uploads.update(connection, upload.completed(blob.digest, blob.size_bytes))
            self._database.after_commit(lambda: self._clear_later(upload))
        return done

    async def _committed(self, upload: Upload) -> Blob:
        try:
            return await self._blobs.commit_staged(upload.uid, expected_digest=upload.sha256 or None)
        except InvalidArgument as error:
            await self._blobs.discard_staged(upload.uid)
            async with self._database.transaction() as connection:
                await self._staged.set_finishing(connection, upload.uid, False)
            actual = error.metadata["actual"]
            raise InvalidArgument(
                f"sha256 of {upload.filename} must be {upload.sha256}, as announced, got {actual}; "
                "the upload begins again at offset 0",
                reason=Reason.CHECKSUM_MISMATCH,
                metadata={"name": upload.name, "expected": upload.sha256, "actual": actual},
                violations=[
                    FieldViolation(
                        field="finish",
                        description=f"the whole must have sha256 {upload.sha256}, got {actual}",
                        reason=Reason.CHECKSUM_MISMATCH,
                    )
                ],
            ) from error

    def _clear_later(self, upload: Upload) -> None:
        task = asyncio.get_running_loop().create_task(self._clear(upload.name, upload.uid))
        self._clearing.add(task)
        task.add_done_callback(self._clearing.discard)

    async def _clear(self, name: str, uid: str) -> None:
        # Under the lock: a writer that still saw the upload RECEIVING has staged its chunk by then.
        async with self.turn(name).lock:
            await self._blobs.discard_staged(uid)
            async with self._database.transaction() as connection:
                await self._staged.remove(connection, uid)
