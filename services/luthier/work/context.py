"""What a runner sees of its task: blocking calls, made from the runner's own thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, TypeVar

from luthier.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    LuthierError,
    Reason,
    Unavailable,
)
from luthier.storage.files import path_below
from luthier.v1 import event_pb2, fine_tuning_job_pb2
from luthier.work.cache import BlobCache
from luthier.work.events import Severity, line
from luthier.work.limited import Check
from luthier.work.paced import Paced
from luthier.work.phase_spans import PhaseSpans
from luthier.work.retry import HEAR_SECONDS
from luthier.work.row_file import count_rows
from luthier.work.session import TaskSession
from luthier.worker.v1 import task_pb2, worker_service_pb2

T = TypeVar("T")
_PINNED = ".pinned"
_COMMIT_TRIES = 3
_LEAVE_SECONDS = 5.0
"""A checkpoint that is being stored when the work ends gets this long."""


class TaskCancelled(Cancelled):
    """The service asked to stop this task. Let it pass: the loop reports it."""


class TaskStopped(Exception):
    """A task stopped because it was asked to, and part of its result is known all the same."""

    def __init__(self, result: task_pb2.TaskResult) -> None:
        super().__init__("the task was asked to stop")
        self.result = result


class TaskPaused(Exception):
    """The service asked for the task back, to be gone on with later from its last checkpoint. Let it pass."""

    def __init__(self) -> None:
        super().__init__("the task was asked to pause")


class TaskFailed(Exception):
    """A task failed, and part of its result is known all the same."""

    def __init__(self, error: LuthierError, result: task_pb2.TaskResult) -> None:
        super().__init__(str(error))
        self.error = error
        self.result = result


class TaskContext:
    """A leased task, its files and its line to the service.

    Attributes:
        task: the task with its specification.
        scratch: an empty folder that is deleted when the task ends.
        cache: files by digest that outlive the task; `fetch` pins what the task uses.
    """

    def __init__(
        self,
        session: TaskSession,
        loop: asyncio.AbstractEventLoop,
        scratch: Path,
        cache: BlobCache,
        draining: threading.Event,
        allowed_seconds: float | None = None,
    ) -> None:
        self.task = session.task
        self.scratch = scratch
        self.cache = cache
        self._session = session
        self._loop = loop
        self._draining = draining
        self._allowed_seconds = allowed_seconds
        self._began = time.monotonic()
        self._activity = 0
        self._waited_seconds = 0.0
        self._waiting = threading.Lock()
        """Of the three that follow: several threads may wait, for ranks each."""
        self._num_waiting = 0
        self._waiting_since: float | None = None
        self._storing: Future[list[task_pb2.BlobFile]] | None = None
        self._pauses_itself = False
        self._phases = PhaseSpans()
        self._progress: event_pb2.Event | None = None

    @property
    def token(self) -> str:
        """A fresh credential for other services."""
        return self._session.token

    def cancelled(self) -> bool:
        """Tell whether the service asked to stop."""
        return self._session.cancel_requested

    def pausing(self) -> bool:
        """Tell whether the service asked to pause: leave a checkpoint then, and raise `TaskPaused`.

        From the first call on the runner pauses where it likes; before, `heed` ends its work for a pause.
        """
        self._pauses_itself = True
        return self._session.pause_requested

    @property
    def activity(self) -> int:
        """A number that grows with everything that the runner asks of this context."""
        return self._activity

    @property
    def is_waiting(self) -> bool:
        """Whether the runner waits for the service, which may be away for as long as it likes."""
        return self._waiting_since is not None

    @property
    def overtime_seconds(self) -> float:
        """Seconds beyond what the task may take, less the time that it waited for the service; not negative."""
        if self._allowed_seconds is None:
            return 0.0
        with self._waiting:
            now, since = time.monotonic(), self._waiting_since
            waited = self._waited_seconds + (now - since if since is not None else 0.0)
        return max(0.0, now - self._began - waited - self._allowed_seconds)

    def overtime_error(self) -> DeadlineExceeded:
        """Return why a task is ended that took longer than its work permits."""
        return DeadlineExceeded(
            reason=Reason.TASK_DEADLINE,
            message=f"{self.task.subject} took longer than the {self._allowed_seconds:.0f} s that its work permits; "
            "make the work smaller, or each record's cheaper",
            metadata={"allowed_seconds": f"{self._allowed_seconds:.0f}"},
        )

    def announce(self, seconds: float) -> None:
        """Add to what the task may take, if it has a limit: its work is known only now."""
        if self._allowed_seconds is not None:
            self._allowed_seconds += seconds

    def check(self) -> None:
        """Return if the work is still wanted. Call it between units of work; it counts as a sign of life.

        Raises:
            LuthierError: as `heed`.
        """
        self._activity += 1
        self.heed()

    def heed(self) -> None:
        """Return if the work is still wanted. Call it while somebody else works, who may have stopped to.

        Raises:
            TaskCancelled: the service asked to stop.
            TaskPaused: the service asked to pause, and the runner has never called `pausing`.
            FailedPrecondition: LEASE_LOST; another worker may have the task.
            Unavailable: this worker shuts down; the task is queued again.
            DeadlineExceeded: TASK_DEADLINE; it took longer than its announced work permits.
            LuthierError: a checkpoint that was begun cannot be stored.
        """
        storing = self._storing
        if storing is not None and storing.done():
            storing.result()
        if self._session.lost:
            raise FailedPrecondition(reason=Reason.LEASE_LOST, message="the lease of this task is lost")
        if self._session.cancel_requested:
            raise TaskCancelled(reason=Reason.CANCELLED_BY_USER, message="the task was asked to stop")
        if self._session.pause_requested and not self._pauses_itself:
            raise TaskPaused
        if self._draining.is_set():
            raise Unavailable(reason=Reason.SHUTTING_DOWN, message="the worker shuts down")
        if self.overtime_seconds > 0:
            raise self.overtime_error()

    def progress(
        self,
        phase: str,
        completed: int,
        total: int,
        unit: str,
        *,
        remaining_seconds: float = 0.0,
        step: int = 0,
    ) -> None:
        """Report progress; total 0 and remaining_seconds 0 mean not known."""
        self._phases.enter(phase)
        progress = event_pb2.Progress(
            phase=phase,
            completed=completed,
            total=total,
            unit=unit,
            remaining_seconds=remaining_seconds,
        )
        self._progress = event_pb2.Event(step=step, progress=progress)
        self._add(self._progress)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Report values measured at `step`."""
        self._add(event_pb2.Event(step=step, metrics=event_pb2.MetricValues(values=values)))

    def measured(self, figures: worker_service_pb2.TaskFigures) -> None:
        """Report what was measured of the attempt, with the next events: for operators, and not kept."""
        self._loop.call_soon_threadsafe(self._session.keep_figures, figures)

    def log(self, text: str, severity: Severity = "INFO", step: int = 0) -> None:
        """Report a line for people."""
        self._add(line(text, severity, step=step))

    def run_record(self, record: fine_tuning_job_pb2.RunRecord) -> None:
        """Keep with the job what exactly runs, after everything reported before; it is there when this returns.

        Raises:
            LuthierError: the service refused.
        """
        self._wait(self._session.keep_run_record(record))

    def fetch(self, file: task_pb2.BlobFile) -> Path:
        """Return a file of the task's own service, from the cache or over the wire; do not change it.

        It stays where it is until the task ends, whatever else the cache takes in.

        Raises:
            LuthierError: the service refused, or the bytes have another digest (DataLoss); what `check` raises.
        """
        target = path_below(self.scratch / _PINNED, file.sha256)
        return self.cache.take(file.sha256, target, lambda: self._download(file.sha256))

    def fetch_into(self, folder: Path, file: task_pb2.BlobFile) -> Path:
        """Put a file of the task's own service into a folder under its own path; do not change it there.

        Raises:
            LuthierError: the service refused, or the bytes have another digest (DataLoss).
            InvalidArgument: PATH_NOT_ALLOWED; the path leaves the folder.
        """
        target = path_below(folder, file.path)
        return self.cache.take(file.sha256, target, lambda: self._download(file.sha256))

    def _download(self, sha256: str) -> Iterator[bytes]:
        stream, paced = aiter(self._session.fetch(sha256)), Paced()
        while True:
            chunk = self._wait(anext(stream, None), self.check)
            if chunk is None:
                return
            self.check()
            # Nothing is done but for one more piece: who waits for word is told again what the task is at.
            if paced.due() and self._progress is not None:
                self._add(self._progress)
            yield chunk

    def store(self, path: Path, name: str) -> task_pb2.BlobFile:
        """Send a file to the task's own service unless it is there; `name` is its path within the result.

        Raises:
            LuthierError: the service refused.
        """
        return self._wait(self._session.store(path, name))

    def commit_checkpoint(
        self, step: int, files: Sequence[task_pb2.BlobFile], metrics: Mapping[str, float]
    ) -> str:
        """Make stored files the checkpoint to resume from; returns its resource name.

        Raises:
            LuthierError: the service refused.
        """
        return self._wait(self._session.commit_checkpoint(step, files, metrics))

    def begin_checkpoint(self, step: int, paths: Sequence[Path], metrics: Mapping[str, float]) -> None:
        """Begin to make files, under their names, the checkpoint to resume from; the work goes on meanwhile.

        One at a time: the files stay as they are until `checkpoint_stored`. What goes wrong is raised there, or by
        `heed` before.
        """
        assert self._storing is None, "a checkpoint is being stored"
        self._activity += 1
        named = {path.name: path for path in paths}
        began = time.monotonic()

        def commit(files: list[task_pb2.BlobFile]) -> Awaitable[str]:
            return self._session.commit_checkpoint(step, files, metrics, time.monotonic() - began)

        call = self._stored_named(named, commit)
        self._storing = asyncio.run_coroutine_threadsafe(call, self._loop)

    def checkpoint_stored(self, check: Check | None = None) -> list[task_pb2.BlobFile]:
        """Return the files of the checkpoint that was begun, once the service has it, as long as `check` wants it.

        Raises:
            LuthierError: the service refused; what `check` raised, `heed` where there is none. It is still being stored
                then.
        """
        storing = self._storing
        assert storing is not None, "no checkpoint is being stored"
        self._activity += 1
        files = self._waited(storing, check or self.heed)
        self._storing = None
        return files

    def end_phase(self) -> None:
        """Say that the work is over."""
        self._phases.end()

    def leave_checkpoint(self) -> None:
        """Let a checkpoint that is being stored when the work ends come to its end, or not: its files may go then."""
        storing, self._storing = self._storing, None
        if storing is not None:
            if not self._session.lost:
                wait((storing,), _LEAVE_SECONDS)
            storing.cancel()

    def commit_rollouts(self, step: int, path: Path) -> None:
        """Keep what a step drew from its model, a file of `work.row_file`, before the update that learns from it.

        Raises:
            DataLoss: it is no such file.
            LuthierError: the service refused.
        """
        num_rollouts = count_rows(path)
        self._wait(
            self._stored_named(
                {f"rollouts/step-{step}": path},
                lambda files: self._session.commit_rollouts(step, files[0], num_rollouts),
            )
        )

    async def _stored_named(
        self, paths: Mapping[str, Path], name: Callable[[list[task_pb2.BlobFile]], Awaitable[object]]
    ) -> list[task_pb2.BlobFile]:
        """Store files, by their paths within the result, and let `name` name them to the service; returns them.

        What the service had may be given back before it is named: it is then sent again, and named again.
        """
        for left in reversed(range(_COMMIT_TRIES)):
            files = [await self._session.store(path, place) for place, path in paths.items()]
            try:
                await name(files)
                break
            except FailedPrecondition as error:
                if error.reason != Reason.BLOB_MISSING or not left:
                    raise
        return files

    def _add(self, event: event_pb2.Event) -> None:
        self._activity += 1
        self._loop.call_soon_threadsafe(self._session.add_event, event)

    def _wait(self, call: Coroutine[Any, Any, T], check: Check = lambda: None) -> T:
        self._activity += 1
        waited_for = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            return self._waited(waited_for, check)
        except BaseException:
            waited_for.cancel()
            raise

    def _waited(self, waited_for: Future[T], check: Check) -> T:
        """Return what comes of something on the loop; what `check` raises leaves that as it is."""
        with self._waiting:
            if not self._num_waiting:
                self._waiting_since = time.monotonic()
            self._num_waiting += 1
        try:
            while not wait((waited_for,), HEAR_SECONDS).done:
                check()
            return waited_for.result()
        finally:
            with self._waiting:
                self._num_waiting -= 1
                if not self._num_waiting and self._waiting_since is not None:
                    self._waited_seconds += time.monotonic() - self._waiting_since
                    self._waiting_since = None
