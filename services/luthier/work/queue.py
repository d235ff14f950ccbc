"""The queue: tasks leased under a fencing epoch; every change of a task is one transaction."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from sqlalchemy.ext.asyncio import AsyncConnection

from luthier.errors import Reason, ResourceExhausted, Unavailable
from luthier.storage.database import Database
from luthier.v1 import event_pb2, fine_tuning_job_pb2
from luthier.work.aside import Aside, Unclaimable, is_passing_error
from luthier.work.attempts import Attempts
from luthier.work.handlers import TaskHandler
from luthier.work.leases import Leases
from luthier.work.log import EventLog
from luthier.work.metrics import WorkMetrics
from luthier.work.promised_blobs import PromisedBlobs
from luthier.work.repository import Tasks
from luthier.work.requirements import Equipment
from luthier.work.results import check_checkpoint, check_result, check_rollouts
from luthier.work.stopping import Stopping
from luthier.work.tasks import NewTask, Outcome, Task, TaskKind, TaskState, Wanted
from luthier.work.workers import holder_parts
from luthier.worker.v1 import task_pb2, worker_service_pb2

FORGET_BATCH = 500
_logger = logging.getLogger(__name__)
_ROOM_SECONDS = 1.0


async def _nothing() -> None:
    """Require nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueSettings:
    """Limits of leases and attempts.

    Attributes:
        lease_seconds: a worker that is silent this long loses its task.
        max_losses: a task fails with WORKER_LOST once this many attempts were lost since it was queued or
            since its last checkpoint; with the reason that ended the last one where that is of `_WORKER_IS_WELL`. An
            attempt that a stopping worker gave back is not counted, nor one whose worker never spoke of it.
        retry_seconds: after two losses in a row a task waits so long before it is handed out again, four times as
            long after each further one, at most `attempts.LONGEST_RETRY_SECONDS`; after the first it does not wait.
    """

    lease_seconds: float = 30.0
    max_losses: int = 5
    retry_seconds: float = 2.0


class Queue:
    """Tasks of one service. Exactly one live Queue owns a database at a time."""

    def __init__(
        self,
        database: Database,
        log: EventLog,
        metrics: WorkMetrics,
        settings: QueueSettings | None = None,
        leases: Leases | None = None,
    ) -> None:
        self.settings = settings or QueueSettings()
        self._database = database
        self._log = log
        self._handlers: dict[TaskKind, TaskHandler] = {}
        self.metrics = metrics
        self.promised = PromisedBlobs(database)
        self._tasks = Tasks()
        self._leases = leases or Leases(self.settings.lease_seconds)
        self._arrival = asyncio.Event()
        self._stopped = False
        self._aside = Aside(database, self._handlers, metrics, self._leases, self._announce_after)
        self._attempts = Attempts(
            database=database,
            log=log,
            handlers=self._handlers,
            metrics=metrics,
            leases=self._leases,
            max_losses=self.settings.max_losses,
            retry_seconds=self.settings.retry_seconds,
            announce_after=self._announce_after,
        )
        self._stopping = Stopping(database=database, attempts=self._attempts, announce=self._announce)

    def register(self, kind: TaskKind, handler: TaskHandler) -> None:
        """Say who follows the tasks of a kind. Every kind that is queued needs a handler."""
        self._handlers[kind] = handler

    async def recover(self) -> None:
        """Take over the leases that an earlier process granted, and the tasks that it put off."""
        async with self._database.reading() as connection:
            self._leases.adopt([task.task_id for task in await self._tasks.leased(connection)])
            for seconds in await self._tasks.put_off_for(connection):
                self._announce_after(seconds)

    async def enqueue(self, connection: AsyncConnection, new: NewTask) -> Task:
        """Queue a task in the caller's transaction; waiting workers hear of it after the commit."""
        task = await self._tasks.add(connection, new)
        self._database.after_commit(self._announce)
        return task

    async def request_cancel(self, connection: AsyncConnection, uid: str) -> bool:
        """Stop the tasks of a resource, as `Stopping.cancel` does."""
        return await self._stopping.cancel(connection, uid)

    async def request_pause(self, connection: AsyncConnection, uid: str) -> None:
        """Have the tasks of a resource given to nobody, as `Stopping.pause` does."""
        await self._stopping.pause(connection, uid)

    async def resume(self, connection: AsyncConnection, uid: str) -> bool:
        """Queue the paused tasks of a resource again, as `Stopping.resume` does."""
        return await self._stopping.resume(connection, uid)

    async def claim(
        self,
        worker: str,
        kinds: Sequence[TaskKind],
        wait_seconds: float,
        claim: str = "",
        equipment: Equipment | None = None,
    ) -> tuple[Task, task_pb2.Task] | None:
        """Lease the task whose turn it is of those that the worker can do; None: none came in `wait_seconds`.

        A claim with the id of an earlier one of this worker brings that one's task, as long as it is leased.
        A task that cannot be handed out is put off for a while, or fails by name; the next one takes its turn.
        While the disk has too little room no further task is handed out.

        Raises:
            Unavailable: SHUTTING_DOWN; the claim may have brought a task already, so it must be made again.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_seconds
        wanted = Wanted(worker=worker, kinds=kinds, claim=claim, equipment=equipment or Equipment())
        while not self._stopped:
            arrival = self._arrival
            has_room = self._database.disk.has_room()
            claimed = await self._claim_one(wanted if has_room else replace(wanted, kinds=()))
            remaining = deadline - loop.time()
            if claimed is not None or remaining <= 0:
                return claimed
            # Nothing announces that there is room again.
            pause = remaining if has_room else min(remaining, _ROOM_SECONDS)
            # One more look after the time: another call of this claim may have brought it a task.
            with suppress(TimeoutError):
                await asyncio.wait_for(arrival.wait(), pause)
        raise Unavailable("the service is stopping; claim again", reason=Reason.SHUTTING_DOWN)

    def stop(self) -> None:
        """Hand out no more tasks; claims that wait end at once, else they would hold up the service's end."""
        self._stopped = True
        self._announce()

    async def _claim_one(self, wanted: Wanted) -> tuple[Task, task_pb2.Task] | None:
        while True:
            try:
                # On a disk without room a transaction may fail though it writes nothing.
                opened = self._database.transaction() if wanted.kinds else self._database.reading()
                async with opened as connection:
                    return await self._handed_out(connection, wanted)
            except Unclaimable as unclaimable:
                await self._aside.put(unclaimable)

    async def _handed_out(
        self, connection: AsyncConnection, wanted: Wanted
    ) -> tuple[Task, task_pb2.Task] | None:
        held = await self._tasks.of_claim(connection, wanted.worker, wanted.claim) if wanted.claim else None
        if held is not None:
            return held, await self._specified(connection, held)
        taken = await self._tasks.take_next(connection, wanted)
        if taken is None:
            return None
        task = await self._attempts.begin(connection, taken[0])
        return task, await self._begun(connection, task, taken[1])

    async def _begun(self, connection: AsyncConnection, task: Task, waited_seconds: float) -> task_pb2.Task:
        self._database.after_commit(lambda: self._leases.grant(task.task_id))
        try:
            await self._handlers[task.kind].started(connection, task)
        except Exception as error:
            raise Unclaimable(task, error) from error
        spec = await self._specified(connection, task)
        self._database.after_commit(lambda: self.metrics.attempt_began(task, waited_seconds))
        return spec

    async def _specified(self, connection: AsyncConnection, task: Task) -> task_pb2.Task:
        try:
            return await self._handlers[task.kind].specify(connection, task)
        except Exception as error:
            raise Unclaimable(task, error) from error

    async def heartbeat(self, task_id: str, epoch: int) -> Task:
        """Renew a lease and return the task as it stands.

        Raises:
            FailedPrecondition: LEASE_LOST.
        """
        async with self._database.reading() as connection:
            task = await self._tasks.held(connection, task_id, epoch)
        if not task.heard:
            await self._note_heard(task)
        self._leases.grant(task_id)
        return task

    async def _note_heard(self, task: Task) -> None:
        try:
            async with self._database.transaction() as connection:
                await self._tasks.note_heard(connection, task.task_id, task.epoch)
        except ResourceExhausted as full:
            # The lease matters more than the note: without it a loss of this attempt is not counted.
            _logger.warning(
                "not noted that a task arrived", extra={"task": task.task_id, "detail": full.message}
            )

    async def report(
        self,
        task_id: str,
        epoch: int,
        numbered: Sequence[tuple[int, event_pb2.Event]],
        run_record: fine_tuning_job_pb2.RunRecord | None,
    ) -> int:
        """Record a worker's events, passing over numbers seen before; returns the highest number recorded.

        Raises:
            FailedPrecondition: LEASE_LOST.
        """
        async with self._database.transaction() as connection:
            task = await self._tasks.held(connection, task_id, epoch)
            fresh = [(number, event) for number, event in numbered if number > task.last_local_number]
            if fresh:
                task = await self._tasks.change(connection, task_id, last_local_number=fresh[-1][0])
            events = [event for _, event in fresh]
            await self._handlers[task.kind].reporting(connection, task, events)
            await self._log.append(connection, task.uid, events)
            if events or run_record is not None:
                await self._handlers[task.kind].reported(connection, task, events, run_record)
        return task.last_local_number

    async def commit_checkpoint(
        self,
        request: worker_service_pb2.CommitCheckpointRequest,
        require_blobs: Callable[[], Awaitable[None]] = _nothing,
    ) -> str:
        """Make a checkpoint the one to resume from; returns its resource name.

        Raises:
            InvalidArgument: it is beyond `CHECKPOINT_LIMITS`.
            FailedPrecondition: LEASE_LOST.
            LuthierError: what `require_blobs` raised, called where no blob can be swept away any more.
        """
        check_checkpoint(request)
        step, files, metrics = request.step, request.files, dict(request.metrics)
        async with self._database.transaction() as connection:
            task = await self._tasks.held(connection, request.task, request.epoch)
            await require_blobs()
            if task.losses:
                task = await self._tasks.change(connection, task.task_id, losses=0)
            name = await self._handlers[task.kind].checkpointed(connection, task, step, files, metrics)
            await self.promised.named(connection, task.task_id, request)
            return name

    async def commit_rollouts(
        self,
        request: worker_service_pb2.CommitRolloutsRequest,
        require_blobs: Callable[[], Awaitable[None]] = _nothing,
    ) -> None:
        """Keep what a step drew from its model, before the update that learns from it.

        Raises:
            InvalidArgument: it is beyond `ROLLOUTS_LIMITS`, or its file does not hold so many.
            FailedPrecondition: LEASE_LOST, ROLLOUTS_FINAL, or the task is of another kind or method.
            LuthierError: what `require_blobs` raised, called where no blob can be swept away any more.
        """
        check_rollouts(request)
        async with self._database.transaction() as connection:
            task = await self._tasks.held(connection, request.task, request.epoch)
            await require_blobs()
            await self._handlers[task.kind].rolled_out(connection, task, request)
            await self.promised.named(connection, task.task_id, request)

    async def finish(
        self,
        task_id: str,
        epoch: int,
        outcome: Outcome,
        require_blobs: Callable[[], Awaitable[None]] = _nothing,
    ) -> None:
        """End a lease with what the worker brought. The same worker may repeat the call.

        A failure with code UNAVAILABLE is a lost attempt, one with reason DISK_FULL an attempt given back: the
        task is queued again. One that pauses is given to nobody until it is resumed.

        Raises:
            InvalidArgument: its result is beyond the limits of its kind, or of another kind than the task.
            FailedPrecondition: LEASE_LOST.
            LuthierError: what `require_blobs` raised, called where no blob can be swept away any more.
        """
        # Before the transaction: a long result is looked at while others write.
        check_result(outcome, {kind: handler.result_limits for kind, handler in self._handlers.items()})
        async with self._database.transaction() as connection:
            task = await self._tasks.get(connection, task_id)
            if task is not None and self._attempts.has_ended(task, epoch, outcome):
                return
            task = await self._tasks.held(connection, task_id, epoch)
            await require_blobs()
            await self._attempts.conclude(connection, task, outcome)

    async def leases_of(self, worker_id: str) -> dict[str, float]:
        """Return by holder the seconds left of the leases that processes of a worker id hold."""
        async with self._database.reading() as connection:
            tasks = await self._tasks.leased(connection)
        return {
            task.worker: self._leases.remaining_seconds(task.task_id)
            for task in tasks
            if holder_parts(task.worker)[0] == worker_id
        }

    async def release_worker(self, worker_id: str, instance: str) -> None:
        """Queue again what a former process of this worker held."""
        async with self._database.reading() as connection:
            tasks = await self._tasks.leased(connection)
        for task in tasks:
            holder, _, held_by = holder_parts(task.worker)
            if holder == worker_id and held_by != instance:
                await self._lose_one(task, "the worker restarted")

    def begin_round(self) -> bool:
        """Note that leases are looked at now; True when this process was away, then each has a full period."""
        return self._leases.begin_round()

    async def expire(self) -> None:
        """Queue again, or fail, every task whose holder was silent for a full lease period."""
        overdue = self._leases.overdue()
        if not overdue:
            return
        async with self._database.reading() as connection:
            leased = {task.task_id: task for task in await self._tasks.leased(connection)}
        silence = f"the worker was silent for {self.settings.lease_seconds:g} s"
        for task_id in overdue:
            if task_id in leased:
                await self._lose_one(leased[task_id], silence, only_overdue=True)
            else:
                self._leases.end(task_id)

    async def _lose_one(self, task: Task, why: str, *, only_overdue: bool = False) -> None:
        """Lose one attempt in a transaction of its own: one whose handler fails keeps no other from going on."""
        try:
            async with self._database.transaction() as connection:
                await self._lose_still_held(connection, task, why, only_overdue=only_overdue)
        except Exception as error:
            if is_passing_error(error):
                _logger.warning("lost attempt not recorded yet", exc_info=error, extra={"task": task.task_id})
            else:
                await self._aside.put(Unclaimable(task, error))

    async def _lose_still_held(
        self, connection: AsyncConnection, task: Task, why: str, *, only_overdue: bool
    ) -> None:
        now = await self._tasks.get(connection, task.task_id)
        if now is None or (now.state, now.epoch) != (TaskState.LEASED, task.epoch):
            return
        if only_overdue:
            if not self._leases.is_overdue(task.task_id):
                return  # its worker spoke while this transaction was waited for
            self._database.after_commit(self.metrics.leases_expired.inc)
        # A holder that never spoke may not know that it is one: the answer to its claim was lost.
        await self._attempts.lose(connection, now, why, counts=now.heard)

    async def forget_finished(self, keep_seconds: float) -> None:
        """Delete tasks that ended longer ago, 0: none; a batch a transaction: others write in between.

        Their resources, events and checkpoints stay.
        """
        if keep_seconds == 0:
            return
        while True:
            async with self._database.transaction() as connection:
                number = await self._tasks.forget_finished(connection, keep_seconds, FORGET_BATCH)
            if number < FORGET_BATCH:
                return

    def _announce_after(self, seconds: float) -> None:
        if seconds > 0:
            asyncio.get_running_loop().call_later(seconds, self._announce)
        else:
            self._announce()

    def _announce(self) -> None:
        arrived, self._arrival = self._arrival, asyncio.Event()
        arrived.set()
