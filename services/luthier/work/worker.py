"""The worker's loop: register, claim, run, report, again."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from luthier.errors import LuthierError
from luthier.runtime.tracing import traced
from luthier.work.cache import BlobCache
from luthier.work.limits import LIMITS, SLOTS, Limits, kind_of, kinds_with_room
from luthier.work.link import WorkerLink
from luthier.work.peers import aio_channel
from luthier.work.place import taken_place
from luthier.work.requirements import Equipment
from luthier.work.running import Runner, RunnerStuck, Workshop, run_task
from luthier.work.tasks import TaskKind
from luthier.work.worker_figures import ChildCounts, Measured
from luthier.worker.v1 import task_pb2

T = TypeVar("T")
Companion = Callable[[WorkerLink, BlobCache], Awaitable[None]]
_CLAIM_WAIT_SECONDS = 20.0
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """How to run one worker process.

    Attributes:
        service_address: host:port of the service it works for.
        worker_id: stable id; two live workers must not share one.
        credential: the worker key.
        work_folder: scratch folders are made below it; the lock beside it keeps other processes of this id out.
        cache_folder: files by digest.
        cache_bytes: size limit of the cache.
        drain_seconds: time that a task gets to stop after SIGTERM before the process ends all the same.
        companions: further duties of this worker, run beside the claim loop; one that fails ends the worker.
        slots: tasks of a kind that it runs at a time.
        limits: how long tasks of a kind may take and stand still.
        equipment: what it computes with, told to the service.
        counts: of its children.
    """

    service_address: str
    worker_id: str
    credential: str
    work_folder: Path
    cache_folder: Path
    cache_bytes: int
    drain_seconds: float = 20.0
    companions: Sequence[Companion] = field(default_factory=tuple)
    slots: Mapping[TaskKind, int] = field(default_factory=lambda: SLOTS)
    limits: Mapping[TaskKind, Limits] = field(default_factory=lambda: LIMITS)
    equipment: Equipment = field(default_factory=Equipment)
    counts: ChildCounts = field(default_factory=ChildCounts)


async def run_worker(settings: WorkerSettings, runners: Mapping[TaskKind, Runner]) -> None:
    """Work until SIGTERM or SIGINT; tasks in hand are then given back to the queue.

    Ends the process when it may not work here, with the reason, and when a runner cannot be ended.
    """
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        with suppress(ValueError, RuntimeError):  # signals belong to the main thread
            loop.add_signal_handler(number, stopping.set)
    try:
        with traced(f"{settings.worker_id}-worker", str(os.getpid())):
            await work_until(settings, runners, stopping)
    except RunnerStuck as stuck:
        # The interpreter would wait for the thread; the supervisor starts a new process.
        _logger.error("worker ends", extra={"detail": str(stuck)})
        os._exit(1)
    except LuthierError as error:
        raise SystemExit(f"error: {error.message}") from error


async def work_until(
    settings: WorkerSettings, runners: Mapping[TaskKind, Runner], stopping: asyncio.Event
) -> None:
    """Work until `stopping` is set; tasks in hand are then given back to the queue.

    Raises:
        FailedPrecondition, AlreadyExists: WORKER_ID_TAKEN; another process of this id works.
        RunnerStuck: a runner will not end: the process must, for a new one to take its place.
    """
    async with AsyncExitStack() as stack:
        place = await _unless(
            stopping, asyncio.to_thread(stack.enter_context, taken_place(settings.work_folder))
        )
        if place is None:
            return
        cache = BlobCache(settings.cache_folder, settings.cache_bytes)
        channel = await stack.enter_async_context(aio_channel(settings.service_address))
        link = WorkerLink(
            channel,
            settings.worker_id,
            settings.credential,
            tuple(runners),
            place.lock,
            settings.equipment,
        )
        link.figures = Measured(settings.counts)
        await _unless(stopping, link.register())
        companions = [asyncio.ensure_future(run(link, cache)) for run in settings.companions]
        for companion in companions:
            # Without its companion a worker would look alive and leave a duty undone; a new process may do it.
            companion.add_done_callback(lambda _: stopping.set())
        workshop = Workshop(
            link=link,
            cache=cache,
            folder=place.folder,
            limits=settings.limits,
            draining=threading.Event(),
        )
        try:
            await _Bench(settings, workshop, runners).work(stopping)
        finally:
            await _end_companions(companions, settings.drain_seconds)


async def _end_companions(companions: Sequence[asyncio.Future[None]], drain_seconds: float) -> None:
    """Stop the duties beside the tasks.

    Raises:
        Exception: why one of them had ended by itself.
        RunnerStuck: one does not end, since a thread of its own does not.
    """
    for companion in companions:
        companion.cancel()
    if not companions:
        return
    ended, pending = await asyncio.wait(companions, timeout=drain_seconds)
    if pending:
        raise RunnerStuck(f"a duty beside the tasks did not stop within {drain_seconds:g} s")
    for companion in ended:
        if not companion.cancelled() and (error := companion.exception()) is not None:
            raise error


class _Bench:
    """Claims tasks of the kinds that have a free slot, and runs them beside one another."""

    def __init__(
        self, settings: WorkerSettings, workshop: Workshop, runners: Mapping[TaskKind, Runner]
    ) -> None:
        self._settings = settings
        self._workshop = workshop
        self._runners = runners
        self._running: dict[asyncio.Task[None], TaskKind] = {}
        self._claim: asyncio.Task[task_pb2.Task | None] | None = None
        self._claimed_kinds: tuple[TaskKind, ...] = ()
        self._claim_id = ""

    async def work(self, stopping: asyncio.Event) -> None:
        """Work until `stopping` is set or a runner is stuck, then give back what runs."""
        stop = asyncio.ensure_future(stopping.wait())
        try:
            while not stop.done():
                await self._claim_again()
                waited = {stop, *self._running, *([self._claim] if self._claim is not None else [])}
                await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                self._reap()
                self._begin()
        finally:
            stop.cancel()
            await self._end_claim()
            await self._drain()

    async def _claim_again(self) -> None:
        """Wait for the kinds that have a free slot; a claim that waits for fewer goes on under the same id."""
        free = kinds_with_room(self._runners, self._running.values(), self._settings.slots)
        if self._claim is not None:
            if free == self._claimed_kinds:
                return
            await self._end_claim()
        else:
            self._claim_id = uuid.uuid4().hex
        if free:
            self._claimed_kinds = free
            link = self._workshop.link
            # A worker that only waits must be heard of within each lease period too.
            wait_seconds = min(_CLAIM_WAIT_SECONDS, link.lease_seconds / 2)
            claim = link.claim_patiently(wait_seconds, self._claim_id, free)
            self._claim = asyncio.ensure_future(claim)

    async def _end_claim(self) -> None:
        claim, self._claim = self._claim, None
        if claim is not None:
            claim.cancel()
            await asyncio.gather(claim, return_exceptions=True)

    def _begin(self) -> None:
        if self._claim is None or not self._claim.done():
            return
        claim, self._claim = self._claim, None
        task = claim.result()
        if task is not None:
            kind = kind_of(task)
            run = run_task(self._workshop, task, self._runners[kind])
            self._running[asyncio.ensure_future(run)] = kind

    def _reap(self) -> None:
        for run in [run for run in self._running if run.done()]:
            del self._running[run]
            run.result()

    async def _drain(self) -> None:
        """Give tasks `drain_seconds` to notice that the worker stops.

        Raises:
            RunnerStuck: one of them did not; its lease runs out and it is queued again.
        """
        if not self._running:
            return
        self._workshop.draining.set()
        _, pending = await asyncio.wait(self._running, timeout=self._settings.drain_seconds)
        if pending:
            for run in pending:
                run.cancel()
            await asyncio.wait(pending)
            raise RunnerStuck(f"{len(pending)} tasks did not stop within {self._settings.drain_seconds:g} s")
        self._reap()


async def _unless(stopping: asyncio.Event, call: Awaitable[T]) -> T | None:
    """Return what `call` returns, or None when `stopping` is set first."""
    work = asyncio.ensure_future(call)
    stop = asyncio.ensure_future(stopping.wait())
    await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if not work.done():
        work.cancel()
        with suppress(asyncio.CancelledError):
            await work
        return None
    return work.result()
