"""What reinforcement jobs drew from their models: kept before it is learnt from, read by people and by resumed jobs."""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf.message import DecodeError
from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import DataLoss, FailedPrecondition, Reason
from luthier.storage.blobs import BlobStore
from luthier.storage.database import Database
from luthier.training.jobs import repository
from luthier.training.jobs.repository import StoredRollouts
from luthier.v1.rollout_pb2 import Rollout
from luthier.work.row_file import found_rows, read_rows
from luthier.worker.v1 import task_pb2, worker_service_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A rollout among those of a job: its step, and its place among the step's."""

    step: int = 0
    index: int = 0


class KeptRollouts:
    """The rollouts of jobs: a row of the database and a blob for each step.

    Those of a step stay what they are once a checkpoint holds the step. Until then a later attempt that drew others
    replaces them, and drops those of later steps, which were drawn from a model that learnt from what is gone.
    """

    def __init__(self, database: Database, blobs: BlobStore) -> None:
        self._database = database
        self._blobs = blobs
        self._rows = repository.Rollouts()
        self._checkpoints = repository.Checkpoints()

    async def commit(
        self,
        connection: AsyncConnection,
        job_uid: str,
        attempt: int,
        request: worker_service_pb2.CommitRolloutsRequest,
    ) -> None:
        """Keep what a step drew. The same again changes nothing but whose it is.

        Raises:
            NotFound: its blob is not here, seen by the same transaction.
            InvalidArgument: its blob does not hold so many rollouts.
            FailedPrecondition: ROLLOUTS_FINAL, a checkpoint or this very attempt has learnt from other ones.
        """
        step = request.step
        file = await found_rows(self._blobs, request.file.sha256, request.num_rollouts, "file")
        known = next(iter(await self._rows.since(connection, job_uid, step, 1)), None)
        if known is not None and known.step == step and known.file == file:
            # From now on this attempt has learnt from them, too, and may bring no others.
            await self._rows.put(connection, job_uid, StoredRollouts(step=step, attempt=attempt, file=file))
            return
        latest = await self._checkpoints.latest(connection, job_uid)
        if latest is not None and step <= latest.message.step:
            raise _final(step, f"the checkpoint of step {latest.message.step} holds what it learnt")
        if known is not None and known.step == step and known.attempt == attempt:
            raise _final(step, f"attempt {attempt} has committed others")
        await self._rows.drop(connection, job_uid, step)
        await self._rows.put(connection, job_uid, StoredRollouts(step=step, attempt=attempt, file=file))

    async def after(
        self, connection: AsyncConnection, job_uid: str, step: int
    ) -> list[task_pb2.StepRollouts]:
        """Return what was drawn at the steps after one, as a worker is told of it."""
        return [
            task_pb2.StepRollouts(
                step=one.step,
                file=task_pb2.BlobFile(
                    path=f"rollouts/step-{one.step}",
                    sha256=one.file.sha256,
                    size_bytes=one.file.size_bytes,
                ),
                num_rollouts=one.file.num_rows,
            )
            for one in await self._rows.since(connection, job_uid, step + 1)
        ]

    async def page(
        self, job_uid: str, first: Place, step: int, limit: int, limit_bytes: int
    ) -> tuple[list[Rollout], Place | None]:
        """Return rollouts from a place on, and the place of the next; None after the last.

        Args:
            job_uid: of the job.
            first: where to begin.
            step: those of this step alone; 0: of all.
            limit: how many at most.
            limit_bytes: how many bytes they may have in all, but one comes at least.

        Raises:
            DataLoss: they are not what was stored.
        """
        async with self._database.reading() as connection:
            # Every file holds one at least, but the first may hold fewer by now than where to begin in it.
            steps = await self._rows.since(connection, job_uid, max(first.step, step), limit + 2)
        found: list[Rollout] = []
        for one in steps:
            if step and one.step != step:
                break
            begin = first.index if one.step == first.step else 0
            if len(found) == limit:
                return found, Place(step=one.step, index=begin)
            rows = await read_rows(self._blobs, one.file, begin, limit - len(found), limit_bytes)
            if found and rows and len(rows[0]) > limit_bytes:
                return found, Place(step=one.step, index=begin)
            found += map(_rollout, rows)
            limit_bytes -= sum(map(len, rows))
            if begin + len(rows) < one.file.num_rows:
                return found, Place(step=one.step, index=begin + len(rows))
        return found, None


def _rollout(row: bytes) -> Rollout:
    try:
        return Rollout.FromString(row)
    except DecodeError as error:
        raise DataLoss(f"a stored rollout of {len(row)} bytes cannot be read: {error}") from error


def _final(step: int, why: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"the rollouts of step {step} must stay what they are: {why}",
        reason=Reason.ROLLOUTS_FINAL,
        metadata={"step": str(step)},
    )
