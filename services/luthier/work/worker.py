"""The worker's loop: register, claim, run, report, again."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from google.rpc import status_pb2

from luthier.errors import FailedPrecondition, Internal, LuthierError, Reason, ResourceExhausted
from luthier.errors.failure import Failure
from luthier.storage.disk import found_full
from luthier.work.cache import BlobCache
from luthier.work.context import TaskCancelled, TaskContext, TaskFailed
from luthier.work.convert import failure_to_status, status_to_failure
from luthier.work.link import WorkerLink
from luthier.work.peers import aio_channel
from luthier.work.session import TaskSession
from luthier.work.tasks import TaskKind
from luthier.worker.v1 import task_pb2, worker_service_pb2

Runner = Callable[[TaskContext], task_pb2.TaskResult]
T = TypeVar("T")
Companion = Callable[[WorkerLink, BlobCache], Awaitable[None]]
_CLAIM_WAIT_SECONDS = 20.0
FULL_SECONDS = 15.0
"""A worker that gave a task back for want of room takes none for so long."""
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPlan:
    """How to run one worker process.

    Attributes:
        service_address: host:port of the service it works for.
        worker_id: stable id; two live workers must not share one.
        credential: the worker key.
        work_folder: scratch folders are made below it.
        cache_folder: files by digest.
        cache_bytes: size limit of the cache.
        drain_seconds: time that a task gets to stop after SIGTERM before the process ends all the same.
        companions: further duties of this worker, run beside the claim loop; one that fails ends the worker.
    """

    service_address: str
    worker_id: str
    credential: str
    work_folder: Path
    cache_folder: Path
    cache_bytes: int
    drain_seconds: float = 20.0
    companions: Sequence[Companion] = field(default_factory=tuple)


async def run_worker(plan: WorkerPlan, runners: Mapping[TaskKind, Runner]) -> None:
    """Work until SIGTERM or SIGINT; a task in hand is then given back to the queue."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        with suppress(ValueError, RuntimeError):  # signals belong to the main thread
            loop.add_signal_handler(number, stopping.set)
    await work_until(plan, runners, stopping)


async def work_until(plan: WorkerPlan, runners: Mapping[TaskKind, Runner], stopping: asyncio.Event) -> None:
    """Work until `stopping` is set; a task in hand is then given back to the queue."""
    cache = BlobCache(plan.cache_folder, plan.cache_bytes)
    shutil.rmtree(plan.work_folder, ignore_errors=True)
    plan.work_folder.mkdir(parents=True)
    async with aio_channel(plan.service_address) as channel:
        link = WorkerLink(channel, plan.worker_id, plan.credential, tuple(runners))
        await _unless(stopping, link.register())
        companions = [asyncio.ensure_future(run(link, cache)) for run in plan.companions]
        for companion in companions:
            # Without its companion a worker would look alive and leave a duty undone; a new process may do it.
            companion.add_done_callback(lambda _: stopping.set())
        try:
            await _claim_and_run(plan, link, cache, runners, stopping)
        finally:
            for companion in companions:
                companion.cancel()
            ends = await asyncio.gather(*companions, return_exceptions=True)
    for end in ends:
        if isinstance(end, Exception):
            raise end


async def _claim_and_run(
    plan: WorkerPlan,
    link: WorkerLink,
    cache: BlobCache,
    runners: Mapping[TaskKind, Runner],
    stopping: asyncio.Event,
) -> None:
    draining = threading.Event()
    while not stopping.is_set():
        task = await _unless(stopping, link.claim(_CLAIM_WAIT_SECONDS))
        if task is not None:
            run = _run_task(plan, link, cache, task, runners, draining)
            await _drained(run, stopping, draining, plan.drain_seconds)


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


async def _drained(
    run: Awaitable[None], stopping: asyncio.Event, draining: threading.Event, drain_seconds: float
) -> None:
    """Run a task to its end; after `stopping` it gets `drain_seconds` to notice, then the process ends."""
    work = asyncio.ensure_future(run)
    stop = asyncio.ensure_future(stopping.wait())
    await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if not work.done():
        draining.set()
        await asyncio.wait({work}, timeout=drain_seconds)
    if not work.done():
        # The runner's thread cannot be stopped from outside; the lease runs out and the task is queued again.
        _logger.error("task did not stop in time", extra={"drain_seconds": drain_seconds})
        os._exit(1)
    work.result()


async def _run_task(
    plan: WorkerPlan,
    link: WorkerLink,
    cache: BlobCache,
    task: task_pb2.Task,
    runners: Mapping[TaskKind, Runner],
    draining: threading.Event,
) -> None:
    session = TaskSession(link, task)
    scratch = Path(tempfile.mkdtemp(dir=plan.work_folder))
    loop = asyncio.get_running_loop()
    context = TaskContext(session, loop, scratch, cache, draining)
    name = task.WhichOneof("spec")
    assert name is not None, "the service specifies every task"
    runner = runners[TaskKind(name.upper())]
    extra = {"task": task.task, "subject": task.subject, "attempt": task.attempt}
    _logger.info("task begins", extra=extra)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="runner") as threads:
        try:
            async with session.alive():
                outcome = await loop.run_in_executor(threads, _outcome, runner, context)
                no_room = _cleared_when_full(outcome, scratch)
                await _hand_in(session, outcome)
            if no_room:
                await _pause(draining)
        except FailedPrecondition as error:
            if error.reason != Reason.LEASE_LOST:
                raise
            _logger.warning("task dropped, its lease is lost", extra=extra)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    _logger.info("task ends", extra=extra)


def _cleared_when_full(outcome: worker_service_pb2.FinishTaskRequest, scratch: Path) -> bool:
    """Tell whether a task found no room; then its files go at once: the service may need it for the outcome."""
    no_room = status_to_failure(outcome.error).reason == Reason.DISK_FULL
    if no_room:
        _logger.warning("a disk is full, the task is given back", extra={"detail": outcome.error.message})
        shutil.rmtree(scratch, ignore_errors=True)
    return no_room


async def _pause(draining: threading.Event) -> None:
    """Let others make room before the next task, unless the worker stops."""
    deadline = time.monotonic() + FULL_SECONDS
    while time.monotonic() < deadline and not draining.is_set():  # noqa: ASYNC110 - a thread's event
        await asyncio.sleep(0.1)


async def _hand_in(session: TaskSession, outcome: worker_service_pb2.FinishTaskRequest) -> None:
    """Tell the service how a task ended. An outcome that it refuses fails the task, not the worker."""
    try:
        await session.finish(outcome)
    except LuthierError as error:
        if error.reason == Reason.LEASE_LOST:
            raise
        _logger.error("outcome refused", extra={"task": session.task.task, "detail": error.message})
        refused = Internal(f"the service refused the outcome of the task: {error.message}")
        await session.finish(worker_service_pb2.FinishTaskRequest(error=_status(refused)))


def _outcome(runner: Runner, context: TaskContext) -> worker_service_pb2.FinishTaskRequest:
    """Run a task in the runner's thread and say how it ended."""
    try:
        return worker_service_pb2.FinishTaskRequest(result=runner(context))
    except TaskCancelled:
        return worker_service_pb2.FinishTaskRequest(cancelled=True)
    except TaskFailed as failed:
        return worker_service_pb2.FinishTaskRequest(error=_status(failed.error), result=failed.result)
    except LuthierError as error:
        full = found_full(error, context.scratch)
        return worker_service_pb2.FinishTaskRequest(error=_status(full or error))
    except MemoryError as error:
        _logger.exception("task ran out of memory")
        exhausted = ResourceExhausted(
            reason=Reason.OUT_OF_MEMORY, message=f"the worker ran out of memory: {error}"
        )
        return worker_service_pb2.FinishTaskRequest(error=_status(exhausted))
    except Exception as error:  # what a runner did not foresee fails its task, not the worker
        _logger.exception("task failed unexpectedly")
        if (full := found_full(error, context.scratch)) is not None:
            return worker_service_pb2.FinishTaskRequest(error=_status(full))
        internal = Internal(reason=Reason.INTERNAL, message=f"{type(error).__name__}: {error}")
        return worker_service_pb2.FinishTaskRequest(error=_status(internal))


def _status(error: LuthierError) -> status_pb2.Status:
    return failure_to_status(Failure.of(error))
