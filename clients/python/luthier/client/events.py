"""Watching a resource's numbered events, and waiting for its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeAlias, TypeVar

from luthier.client.failures import (
    EvaluationFailed,
    JobFailed,
    ModelFailed,
    RenderingFailed,
    VersionFailed,
)
from luthier.client.flows import (
    Q,
    ResumedStream,
    Scope,
    StreamFlow,
    StreamPick,
    UnaryPick,
    call,
    replaced,
)
from luthier.errors import DataLoss, DeadlineExceeded, Failure, LuthierError, NotFound, OutOfRange, Reason
from luthier.errors.status import status_to_failure
from luthier.v1.dataset_pb2 import DatasetVersion
from luthier.v1.evaluation_pb2 import Evaluation
from luthier.v1.event_pb2 import Event
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob
from luthier.v1.model_pb2 import Model
from luthier.v1.rendering_pb2 import Rendering
from luthier.v1.upload_pb2 import Upload

if TYPE_CHECKING:
    from google.protobuf.message import Message

Watched = TypeVar("Watched", DatasetVersion, Evaluation, FineTuningJob, Model, Rendering)
AnyWatched: TypeAlias = DatasetVersion | Evaluation | FineTuningJob | Model | Rendering
G = TypeVar("G", bound="Message")

_GOOD_STATES = frozenset({"READY", "SUCCEEDED"})
_BAD_STATES = frozenset({"FAILED", "CANCELLED"})
_POLL_SECONDS = 0.5


def state_of(resource: AnyWatched | Upload) -> str:
    """Return the state of a resource as events name it, e.g. RUNNING."""
    states = resource.DESCRIPTOR.enum_types_by_name["State"].values_by_number
    return states[resource.state].name.removeprefix("STATE_")


class EventReader(Generic[Q]):
    """Reads a log from `start_sequence` on (0: from the beginning), each event once, in order, over any breaks.

    What ended long ago may have its last events alone: then those are the beginning.
    `request` says whose log it is: with the uid, so that it never goes on in the log of another resource of that name.
    """

    def __init__(
        self,
        scope: Scope,
        pick: StreamPick[Q, Event],
        request: Q,
        *,
        start_sequence: int = 0,
        timeout_seconds: Callable[[], float | None] = lambda: None,
    ) -> None:
        self._last = max(0, start_sequence - 1)
        self._begins_anywhere = start_sequence <= 0
        self._missed_after: int | None = None
        self._stream = ResumedStream(
            scope,
            pick,
            lambda: replaced(request, start_sequence=self._last + 1),
            timeout_seconds=timeout_seconds,
        )

    async def next(self) -> Event | None:
        """Return the next event of the log, or None after the last one. Heartbeats are left out.

        Raises:
            DataLoss: The service skips numbers, also when asked again.
            OutOfRange: SEQUENCE_EXPIRED; the first event that was asked for is gone.
        """
        while True:
            try:
                event = await self._stream.receive()
            except OutOfRange as error:
                self._begin_later(error)
                continue
            if event is None:
                return None
            is_heartbeat = event.WhichOneof("payload") == "heartbeat"
            if event.sequence > self._last + (0 if is_heartbeat else 1):
                self._ask_again(event.sequence)
            elif event.sequence == self._last + 1:
                self._last += 1
                self._begins_anywhere = False
                return event

    def close(self) -> None:
        """End the running call."""
        self._stream.close()

    def _begin_later(self, error: OutOfRange) -> None:
        """Begin where the log does, if it is wanted from its beginning, wherever that is; else raise the error."""
        first = error.metadata.get("first_sequence", "")
        if not (self._begins_anywhere and first.isdecimal() and int(first) > self._last + 1):
            raise error
        self._last = int(first) - 1

    def _ask_again(self, got: int) -> None:
        self._stream.close()
        if self._missed_after == self._last:
            raise DataLoss(
                f"the stream skips events: expected number {self._last + 1}, got {got}, also when asked again"
            )
        self._missed_after = self._last


@dataclass(frozen=True, slots=True, kw_only=True)
class Since:
    """Where to begin: at an event's number (0: at the beginning), of the resource of a uid (empty: the one of now)."""

    start_sequence: int = 0
    uid: str = ""


async def watch(
    scope: Scope,
    watching: tuple[StreamPick[Q, Event], Q],
    reading: tuple[UnaryPick[G, Watched], G],
    since: Since,
) -> StreamFlow[Event]:
    """Yield the events of a resource until its final state.

    Raises NotFound RESOURCE_REPLACED when the name becomes another resource's while the stream is broken off.
    """
    pick, request = watching
    uid = since.uid or (await call(scope, *reading)).uid
    reader = EventReader(scope, pick, replaced(request, uid=uid), start_sequence=since.start_sequence)
    try:
        while (event := (await reader.next())) is not None:
            yield event
    finally:
        reader.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitOptions:
    """How to wait.

    `on_event` sees every event from the beginning of the log; None as timeout waits for ever.
    """

    timeout_seconds: float | None = None
    on_event: Callable[[Event], None] | None = None


async def wait(
    scope: Scope,
    watching: tuple[StreamPick[Q, Event], Q],
    reading: tuple[UnaryPick[G, Watched], G],
    options: WaitOptions,
) -> Watched:
    """Return the resource once it is READY or SUCCEEDED.

    Raises:
        ResourceFailed: It FAILED or was CANCELLED.
        DeadlineExceeded: It was in no final state in time.
        NotFound: RESOURCE_REPLACED; it was deleted meanwhile, and its name is another resource's.
    """
    end = None if options.timeout_seconds is None else scope.clock() + options.timeout_seconds
    pick, request = watching
    uid = (await call(scope, *reading)).uid
    reader = EventReader(
        scope,
        pick,
        replaced(request, uid=uid),
        timeout_seconds=lambda: None if end is None else max(0.001, end - scope.clock()),
    )
    try:
        while True:
            timed_out = await _pass_events_on(reader, options, end, scope)
            resource = await call(scope, *reading)
            require_same(resource.name, uid, resource.uid)
            state = state_of(resource)
            if state in _GOOD_STATES:
                return resource
            if state in _BAD_STATES:
                raise _failed(resource, state)
            if timed_out:
                raise DeadlineExceeded(
                    f"{resource.name} is still {state} after {options.timeout_seconds:g} s"
                )
            # The stream ended although the resource goes on, e.g. because the service is being stopped.
            await scope.driver.sleep(_POLL_SECONDS)
    finally:
        reader.close()


def require_same(name: str, seen: str, found: str) -> None:
    """Raise NotFound RESOURCE_REPLACED unless a resource still has the uid that was seen first."""
    if seen != found:
        raise NotFound(
            f"{name} has uid {found}, and had {seen} when it was seen first: it was deleted and its name used again",
            reason=Reason.RESOURCE_REPLACED,
            metadata={"name": name, "uid": found},
        )


async def _pass_events_on(
    reader: EventReader[Q], options: WaitOptions, end: float | None, scope: Scope
) -> bool:
    """Read to the end of the stream. Returns whether time ran out first."""
    while end is None or scope.clock() < end:
        try:
            event = await reader.next()
        except DeadlineExceeded:
            if end is None:
                raise
            # It is somebody else's deadline where time is left, e.g. a proxy's.
            await scope.driver.sleep(max(0.0, min(_POLL_SECONDS, end - scope.clock())))
            continue
        except OutOfRange as error:
            # What is gone is of a resource that has ended. Who asked for no events asks for it alone.
            if options.on_event is not None or "first_sequence" not in error.metadata:
                raise
            return False
        if event is None:
            return False
        if options.on_event is not None:
            options.on_event(event)
    return True


def _failed(resource: AnyWatched, state: str) -> LuthierError:
    if resource.HasField("error"):
        failure = status_to_failure(resource.error)
    else:
        failure = Failure(code="CANCELLED", reason=Reason.CANCELLED_BY_USER, message="it was cancelled")
    return _FAILURES[type(resource)](resource, state=state, failure=failure)


_FAILURES: Mapping[type, Callable[..., LuthierError]] = {
    DatasetVersion: VersionFailed,
    Evaluation: EvaluationFailed,
    FineTuningJob: JobFailed,
    Model: ModelFailed,
    Rendering: RenderingFailed,
}
