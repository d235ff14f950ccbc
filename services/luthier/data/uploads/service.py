"""What can be done with uploads."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from weakref import WeakValueDictionary

from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.data.uploads import repository, rules
from luthier.data.uploads.rules import State
from luthier.errors import FailedPrecondition, FieldViolation, InvalidArgument, LuthierError, Reason
from luthier.runtime.names import new_id
from luthier.runtime.paging import PageTokens
from luthier.storage.blobs import Blob
from luthier.storage.database import Database
from luthier.storage.staging import Staging
from luthier.storage.stored import Stored, require_etag
from luthier.stored.v1.data_pb2 import UploadPrivate
from luthier.v1.data_service_pb2 import StartUploadRequest, WriteUploadRequest
from luthier.v1.upload_pb2 import Upload
from luthier.work.keeping import Keeping
from luthier.work.lifecycle import Lifecycle
from luthier.work.listing import ListRequest, list_page
from luthier.work.undeleting import Undeleting

FINISH_SECONDS = 300.0
"""What could not be finished, for want of room say, is tried again after so long."""
_logger = logging.getLogger(__name__)
StoredUpload = Stored[Upload, UploadPrivate]


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """An upload and how many of its bytes are here: while it is RECEIVING the staged bytes tell that, not its row."""

    upload: StoredUpload
    size_bytes: int

    def message(self) -> Upload:
        """Return the upload as callers see it."""
        message = self.upload.copy()
        message.persisted_size_bytes = self.size_bytes
        return message


class Turn:
    """Keeps those who work on one upload apart.

    `receiving` is the upload as the last chunk left it, so that the next one need not ask the database: set only
    between chunks, by whoever held the lock last.
    """

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.receiving: Received | None = None


class UploadService:
    """Use cases of uploads. One instance serves a database: it keeps writers of one upload apart."""

    def __init__(self, database: Database, staging: Staging, max_bytes: int, keeping: Keeping) -> None:
        self._database = database
        self._staging = staging
        self._max_bytes = max_bytes
        self._uploads = repository.uploads()
        self.undeleting = Undeleting(self._uploads, database, keeping)
        self._staged = repository.StagedUploads()
        self._lifecycle = Lifecycle(Upload.State.DESCRIPTOR, rules.TRANSITIONS)
        self._turns: WeakValueDictionary[str, Turn] = WeakValueDictionary()
        self._clearing: set[asyncio.Task[None]] = set()

    async def start(self, request: StartUploadRequest) -> Upload:
        """Announce a file of a project. Raises InvalidArgument, ResourceExhausted DISK_FULL."""
        rules.check_upload(request.upload, self._max_bytes)
        self._database.disk.require_room()
        upload = Upload()
        upload.CopyFrom(request.upload)
        upload.name = f"{request.parent}/uploads/{new_id('upload')}"
        upload.state = State.STATE_RECEIVING
        async with self._database.transaction() as connection:
            stored = await self._uploads.insert(connection, upload, UploadPrivate())
            await self._staged.add(connection, stored.uid)
        return stored.message

    async def get(self, name: str) -> Upload:
        """Return an upload with its persisted size. Raises NotFound.

        An upload whose finishing a crash cut short is finished first.
        """
        turn = self.turn(name)
        async with turn.lock:
            turn.receiving = None
            return (await self._reconciled(name)).message()

    async def list_page(self, request: ListRequest, tokens: PageTokens) -> tuple[tuple[Upload, ...], str]:
        """Return a page of a project's uploads, with their persisted sizes, and the next page's token.

        Raises InvalidArgument.
        """
        found, token = await list_page(self._database, self._uploads, tokens, request, filters=("state",))
        return tuple([await self._sized(upload) for upload in found]), token

    async def _sized(self, upload: Upload) -> Upload:
        if upload.state != State.STATE_RECEIVING:
            return upload
        sized = Upload()
        sized.CopyFrom(upload)
        sized.persisted_size_bytes = await self._staging.size(upload.uid)
        return sized

    def turn(self, name: str) -> Turn:
        """Return what all who work on an upload share. Whoever writes chunk after chunk keeps it meanwhile."""
        return self._turns.setdefault(name, Turn())

    async def write(self, name: str, chunk: WriteUploadRequest) -> Upload:
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
            received, turn.receiving = turn.receiving or await self._reconciled(name), None
            upload, size_bytes = received.upload, received.size_bytes
            self._lifecycle.require(name, upload.message.state, State.STATE_COMPLETE)
            rules.check_chunk(upload.message, chunk, size_bytes, self._max_bytes)
            if chunk.data:
                self._database.disk.require_room()
            if chunk.data or size_bytes == 0:
                size_bytes = await self._staging.append(upload.uid, chunk.offset, chunk.data)
            if not chunk.finish:
                turn.receiving = Received(upload=upload, size_bytes=size_bytes)
                return turn.receiving.message()
            # Before the blob is committed: should the process end in between, `_reconciled` does the rest.
            async with self._database.transaction() as connection:
                await self._staged.set_finishing(connection, upload.uid, True)
            return (await self._finish(upload)).message

    async def cancel(self, name: str, etag: str) -> Upload:
        """Give an upload up; a cancelled one is returned unchanged.

        Raises NotFound, FailedPrecondition WRONG_STATE when it is complete, Aborted ETAG_MISMATCH.
        """
        turn = self.turn(name)
        async with turn.lock, self._database.transaction(makes_room=True) as connection:
            turn.receiving = None
            upload = await self._uploads.get(connection, name)
            require_etag(upload, etag)
            if upload.message.state == State.STATE_CANCELLED:
                return upload.message
            self._lifecycle.require(name, upload.message.state, State.STATE_CANCELLED)
            changed = upload.copy()
            changed.state = State.STATE_CANCELLED
            upload = await self._uploads.update(connection, upload, changed)
            self._database.after_commit(lambda: self._clear_later(upload))
        return upload.message

    async def delete(self, name: str, etag: str) -> Upload:
        """Delete an upload that is over. Raises NotFound, FailedPrecondition WRONG_STATE, RESOURCE_IN_USE, Aborted."""
        turn = self.turn(name)
        async with turn.lock, self._database.transaction(makes_room=True) as connection:
            turn.receiving = None
            upload = await self._uploads.get(connection, name)
            require_etag(upload, etag)
            if upload.message.state == State.STATE_RECEIVING:
                raise FailedPrecondition(
                    f"{name} is being received; cancel it before it is deleted",
                    metadata={"name": name, "state": "RECEIVING"},
                )
            return (await self.undeleting.delete(connection, upload)).message

    async def completed(self, connection: AsyncConnection, name: str) -> StoredUpload:
        """Return a complete upload. Raises NotFound, FailedPrecondition UPLOAD_INCOMPLETE."""
        upload = await self._uploads.get(connection, name)
        if upload.message.state == State.STATE_COMPLETE:
            return upload
        now = self._lifecycle.name(upload.message.state)
        raise FailedPrecondition(
            f"{name} must be COMPLETE, it is {now}; finish it with WriteUpload",
            reason=Reason.UPLOAD_INCOMPLETE,
            metadata={"name": name, "state": now},
        )

    async def finish_left(self) -> None:
        """Finish what an earlier process was finishing, and clear away what it left staged of uploads that are over.

        Beside calls, as every byte of the former is read: what is in progress in this process waits for its turn.
        """
        async with self._database.reading() as connection:
            finishing = await self._staged.finishing(connection)
        for name in finishing:
            try:
                await self.get(name)
            except LuthierError as error:  # whoever asks for it next is told, and nothing is lost until then
                _logger.warning(
                    "an upload is not finished yet", extra={"upload": name, "detail": error.message}
                )
        async with self._database.reading() as connection:
            ended = await self._staged.ended(connection)
        for name, uid in ended:
            await self._clear(name, uid)

    async def _reconciled(self, name: str) -> Received:
        async with self._database.reading() as connection:
            upload = await self._uploads.get(connection, name)
            finishing = await self._staged.is_finishing(connection, upload.uid)
        if upload.message.state == State.STATE_RECEIVING and finishing:
            upload = await self._finish(upload)
        if upload.message.state == State.STATE_RECEIVING:
            return Received(upload=upload, size_bytes=await self._staging.size(upload.uid))
        return Received(upload=upload, size_bytes=upload.message.persisted_size_bytes)

    async def _finish(self, upload: StoredUpload) -> StoredUpload:
        blob = await self._committed(upload)
        changed = upload.copy()
        changed.state = State.STATE_COMPLETE
        changed.persisted_size_bytes = blob.size_bytes
        async with self._database.transaction() as connection:
            private = upload.copy_private()
            private.sha256 = blob.digest
            done = await self._uploads.update(connection, upload, changed, private)
            self._database.after_commit(lambda: self._clear_later(upload))
        return done

    async def _committed(self, upload: StoredUpload) -> Blob:
        announced = upload.message.sha256
        try:
            return await self._staging.commit(upload.uid, expected_digest=announced or None)
        except InvalidArgument as error:
            await self._staging.discard(upload.uid)
            async with self._database.transaction() as connection:
                await self._staged.set_finishing(connection, upload.uid, False)
            actual = error.metadata["actual"]
            raise InvalidArgument(
                f"sha256 of {upload.message.filename} must be {announced}, as announced, got {actual}; "
                "the upload begins again at offset 0",
                reason=Reason.CHECKSUM_MISMATCH,
                metadata={"name": upload.message.name, "expected": announced, "actual": actual},
                violations=[
                    FieldViolation(
                        field="finish",
                        description=f"the whole must have sha256 {announced}, got {actual}",
                        reason=Reason.CHECKSUM_MISMATCH,
                    )
                ],
            ) from error

    def _clear_later(self, upload: StoredUpload) -> None:
        task = asyncio.get_running_loop().create_task(self._clear(upload.message.name, upload.uid))
        self._clearing.add(task)
        task.add_done_callback(self._clearing.discard)

    async def _clear(self, name: str, uid: str) -> None:
        # Under the lock: a writer that still saw the upload RECEIVING has staged its chunk by then.
        async with self.turn(name).lock:
            await self._staging.discard(uid)
            async with self._database.transaction(makes_room=True) as connection:
                await self._staged.remove(connection, uid)
