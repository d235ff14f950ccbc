"""One task on a worker: its runner in a thread, watched for what it may take, and its outcome handed in."""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from google.rpc import status_pb2

from luthier.errors import Internal, LuthierError, Reason, ResourceExhausted, Unavailable
from luthier.errors.failure import Failure
from luthier.errors.status import failure_to_status, status_to_failure
from luthier.runtime import tracing
from luthier.runtime.logs import bind
from luthier.storage.disk import found_full
from luthier.work.cache import BlobCache
from luthier.work.context import TaskCancelled, TaskContext, TaskFailed, TaskPaused, TaskStopped
from luthier.work.faults import ATTEMPT_FAULTS, GIVEN_BACK, ONLY_TIME_MENDS
from luthier.work.limits import Limits, allowed_seconds, kind_of
from luthier.work.link import WorkerLink
from luthier.work.session import TaskSession
from luthier.work.tasks import TaskKind
from luthier.worker.v1 import task_pb2, worker_service_pb2

Runner = Callable[[TaskContext], task_pb2.TaskResult]
Outcome = worker_service_pb2.FinishTaskRequest
OVERTIME_GRACE_SECONDS = 120.0
"""A runner notices by itself that its time is up, in a unit of work; after this long it will not any more."""
_LONGEST_LOOK_SECONDS = 5.0
FULL_SECONDS = 15.0
"""What gave a task back for what only time mends takes none for so long."""
_IDLE_SHARE = 0.01
_WHERE_RECORDS_ARE = {"file": "filename", "line": "line"}
_logger = logging.getLogger(__name__)


class RunnerStuck(Exception):
    """A runner's thread will not end, and cannot be ended: the process has to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workshop:
    """What all tasks of a worker share: line, files, limits, and whether the worker is about to stop."""

    link: WorkerLink
    cache: BlobCache
    folder: Path
    limits: Mapping[TaskKind, Limits]
    draining: threading.Event


async def run_task(workshop: Workshop, task: task_pb2.Task, runner: Runner) -> None:
    """Run a task to its end and tell the service; what its attempt does is part of the trace that asked for it.

    Raises:
        RunnerStuck: the runner neither goes on nor ends; the service was told, and the process must end.
    """
    kind = kind_of(task)
    told: tracing.Attributes = {
        "luthier.subject": task.subject,
        "luthier.attempt": task.attempt,
        "luthier.task": task.task,
    }
    begins = tracing.span(f"attempt {kind}", parent=task.traceparent or None, attributes=told)
    fields = {"task": task.task, "subject": task.subject, "attempt": str(task.attempt)}
    with begins as span, bind(**fields, **({"trace_id": span.trace_id} if span.trace_id else {})):
        await _run(workshop, task, runner, span)


async def _run(workshop: Workshop, task: task_pb2.Task, runner: Runner, span: tracing.Span) -> None:
    session = TaskSession(workshop.link, task)
    scratch = Path(tempfile.mkdtemp(dir=workshop.folder))
    limits = workshop.limits[kind_of(task)]
    loop = asyncio.get_running_loop()
    context = TaskContext(
        session, loop, scratch, workshop.cache, workshop.draining, allowed_seconds(task, limits)
    )
    _logger.info("task begins")
    thread: _RunnerThread | None = None
    try:
        async with session.alive():
            thread = _RunnerThread(runner, context)
            outcome = await thread.outcome_within(limits)
            _note_outcome(span, outcome)
            waits = _cleared_when_full(outcome, scratch)
            await _hand_in(session, outcome)
        if waits:
            await _pause(workshop.draining)
    except LuthierError as error:  # a lease that is lost, in nearly every case
        _logger.warning("task dropped", extra={"reason": error.reason, "detail": error.message})
        _note_reason(span, error.reason, fails=error.reason not in GIVEN_BACK)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if thread is not None and thread.is_alive():
        raise RunnerStuck(f"the runner of {task.subject} neither goes on nor ends")
    _logger.info("task ends")


def _note_outcome(span: tracing.Span, outcome: Outcome) -> None:
    """Say in trace and log how an attempt ended: an error in a trace is a fault of the service."""
    if outcome.HasField("error"):
        failure = status_to_failure(outcome.error)
        _note_reason(span, failure.reason, fails=failure.reason in ATTEMPT_FAULTS)
        extra = {"reason": failure.reason, **_printable(failure)}
        if failure.reason not in GIVEN_BACK:
            _logger.warning("task failed", extra=extra)
        elif failure.reason in ONLY_TIME_MENDS:
            _logger.warning("the task is given back", extra=extra)
        else:
            _logger.info("the task is given back", extra=extra)
    elif outcome.cancelled:
        span.note({"luthier.cancelled": "true"})
    elif outcome.paused:
        span.note({"luthier.paused": "true"})


def _note_reason(span: tracing.Span, reason: str, *, fails: bool) -> None:
    span.note({"luthier.reason": str(reason)})
    if fails:
        span.failed(reason)


def _printable(failure: Failure) -> Mapping[str, str]:
    """Return what a log may hold of a failure: its words, but of records only where the first bad one is."""
    if failure.reason != Reason.INVALID_RECORDS:
        return {"detail": failure.message}
    known = failure.metadata
    return {name: known[key] for name, key in _WHERE_RECORDS_ARE.items() if key in known}


class _RunnerThread:
    """A runner in a thread that does not keep the process from ending."""

    def __init__(self, runner: Runner, context: TaskContext) -> None:
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._outcome: asyncio.Future[Outcome] = self._loop.create_future()
        # In the context of who made it: its span, and the fields of its lines.
        run = partial(copy_context().run, self._run, runner)
        self._thread = threading.Thread(target=run, name="runner", daemon=True)
        self._thread.start()

    def is_alive(self) -> bool:
        return not self._outcome.done()

    def _run(self, runner: Runner) -> None:
        outcome = _outcome(runner, self._context)
        self._context.end_phase()
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._deliver, outcome)

    def _deliver(self, outcome: Outcome) -> None:
        if not self._outcome.done():
            self._outcome.set_result(outcome)

    async def outcome_within(self, limits: Limits) -> Outcome:
        """Return how the runner ended, or why it is given up: it stands still, or its time is long up."""
        look_seconds = min(limits.stall_seconds / 10, _LONGEST_LOOK_SECONDS)
        last, active_at = self._signs(), time.monotonic()
        while True:
            await asyncio.wait({self._outcome}, timeout=look_seconds)
            if self._outcome.done():
                return self._outcome.result()
            now, signs = time.monotonic(), self._signs()
            computed = signs[1] - last[1] > _IDLE_SHARE * look_seconds
            if self._context.is_waiting or signs[0] != last[0] or computed:
                active_at = now
            last = signs
            if self._context.overtime_seconds > OVERTIME_GRACE_SECONDS:
                return Outcome(error=_status(self._context.overtime_error()))
            if now - active_at > limits.stall_seconds:
                return Outcome(error=_status(_stalled(limits)))

    def _signs(self) -> tuple[int, float]:
        """Return what the runner asked of its context, and the CPU seconds that its thread took."""
        return self._context.activity, _cpu_seconds(self._thread.native_id)


def _cpu_seconds(native_id: int | None) -> float:
    """Return the CPU time of a thread of this process; 0 where the system does not tell."""
    try:
        return int(Path(f"/proc/self/task/{native_id}/schedstat").read_text().split()[0]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


def _stalled(limits: Limits) -> Unavailable:
    return Unavailable(
        reason=Reason.STALLED,
        message=f"the worker's step stood still for {limits.stall_seconds:g} s and cannot be ended; "
        "the worker's process starts anew",
    )


def _cleared_when_full(outcome: Outcome, scratch: Path) -> bool:
    """Tell whether a task is given back for what only time mends: no room, an overload, a peer that refuses us.

    When a disk is full its files go at once: the service may need the room for the outcome.
    """
    reason = status_to_failure(outcome.error).reason
    if reason == Reason.DISK_FULL:
        shutil.rmtree(scratch, ignore_errors=True)
    return reason in ONLY_TIME_MENDS


async def _pause(draining: threading.Event) -> None:
    """Let others make room before the next task, unless the worker stops."""
    deadline = time.monotonic() + FULL_SECONDS
    while time.monotonic() < deadline and not draining.is_set():  # noqa: ASYNC110 - a thread's event
        await asyncio.sleep(0.1)


async def _hand_in(session: TaskSession, outcome: Outcome) -> None:
    """Tell the service how a task ended. An outcome that it refuses fails the task, not the worker.

    Where it misses bytes that it had, nobody is at fault: the attempt counts as lost, and another sends them anew.
    If it refuses to hear even of that, the lease runs out: the attempt counts as lost.
    """
    extra = {"task": session.task.task}
    try:
        await session.finish(outcome)
    except LuthierError as error:
        if error.reason == Reason.LEASE_LOST:
            raise
        _logger.error("outcome refused", extra={**extra, "detail": error.message})
        try:
            await session.finish(Outcome(error=_status(_refused(error))))
        except LuthierError as again:
            if again.reason == Reason.LEASE_LOST:
                raise
            _logger.error("failure refused, the lease runs out", extra={**extra, "detail": again.message})


def _refused(error: LuthierError) -> LuthierError:
    message = f"the service refused the outcome of the task: {error.message}"
    if error.reason == Reason.BLOB_MISSING:
        return Unavailable(reason=Reason.SERVICE_UNAVAILABLE, message=message)
    return Internal(message)


def _outcome(runner: Runner, context: TaskContext) -> Outcome:
    """Run a task in the runner's thread and say how it ended."""
    try:
        return Outcome(result=runner(context))
    except TaskCancelled:
        return Outcome(cancelled=True)
    except TaskStopped as stopped:
        return Outcome(cancelled=True, result=stopped.result)
    except TaskPaused:
        return Outcome(paused=True)
    except TaskFailed as failed:
        full = found_full(failed.error, context.scratch)  # another attempt brings the whole result
        return Outcome(error=_status(full or failed.error), result=None if full else failed.result)
    except LuthierError as error:
        return Outcome(error=_status(found_full(error, context.scratch) or error))
    except MemoryError as error:
        _logger.exception("task ran out of memory")
        exhausted = ResourceExhausted(
            reason=Reason.OUT_OF_MEMORY, message=f"the worker ran out of memory: {error}"
        )
        return Outcome(error=_status(exhausted))
    except Exception as error:  # what a runner did not foresee fails its task, not the worker
        _logger.exception("task failed unexpectedly")
        internal = Internal(reason=Reason.INTERNAL, message=f"{type(error).__name__}: {error}")
        return Outcome(error=_status(found_full(error, context.scratch) or internal))


def _status(error: LuthierError) -> status_pb2.Status:
    return failure_to_status(Failure.of(error))
