"""Watching over breaks, and waiting for an end."""

import asyncio
import pickle
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2

from luthier.client import AsyncClient, Client, ClientConfig, JobFailed, RetryPolicy
from luthier.errors import DataLoss, DeadlineExceeded, NotFound, OutOfRange, Reason
from luthier.v1.event_pb2 import Event, Heartbeat, Progress, StateChange
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob

NAME = "projects/default/fineTuningJobs/j"


def _event(sequence: int) -> Event:
    return Event(sequence=sequence, progress=Progress(completed=sequence, total=6))


class BreakingLog:
    """A log of six events whose stream breaks off twice, each time in another way."""

    def __init__(self, services: Any) -> None:
        self.services = services
        self.starts: list[int] = []

    def watch(self, request: Any, context: grpc.ServicerContext) -> Iterator[Event]:
        self.starts.append(request.start_sequence)
        for sequence in range(request.start_sequence, 7):
            yield _event(sequence)
            yield Event(sequence=sequence, heartbeat=Heartbeat())
            if sequence == 2 and len(self.starts) == 1:
                self.services.refuse(context, grpc.StatusCode.UNAVAILABLE, "stopping", reason="SHUTTING_DOWN")
            if sequence == 4 and len(self.starts) == 2:
                self.services.refuse(
                    context, grpc.StatusCode.RESOURCE_EXHAUSTED, "too slow", reason="SLOW_READER"
                )


async def test_watch_yields_each_event_once_over_breaks(
    services: Any, client: Client, async_client: AsyncClient
) -> None:
    log = BreakingLog(services)
    services.answers["WatchFineTuningJob"] = log.watch
    assert [event.sequence for event in client.jobs.watch("j")] == [1, 2, 3, 4, 5, 6]
    assert log.starts == [1, 3, 5]
    log = BreakingLog(services)
    services.answers["WatchFineTuningJob"] = log.watch
    assert [event.sequence async for event in async_client.jobs.watch("j")] == [1, 2, 3, 4, 5, 6]
    assert log.starts == [1, 3, 5]


class ReplacedJob:
    """A log that breaks off once; the job is then another one of the same name."""

    def __init__(self, services: Any) -> None:
        self.services = services
        self.uid = "first"
        self.asked: list[tuple[int, str]] = []
        services.answers["GetFineTuningJob"] = self.get
        services.answers["WatchFineTuningJob"] = self.watch

    def get(self, request: Any, context: grpc.ServicerContext) -> FineTuningJob:
        return FineTuningJob(name=NAME, uid=self.uid, state=FineTuningJob.STATE_RUNNING)

    def watch(self, request: Any, context: grpc.ServicerContext) -> Iterator[Event]:
        self.asked.append((request.start_sequence, request.uid))
        if request.uid != self.uid:
            self.services.refuse(
                context, grpc.StatusCode.NOT_FOUND, "it has uid second", reason="RESOURCE_REPLACED"
            )
        yield _event(1)
        yield _event(2)
        self.uid = "second"
        self.services.refuse(context, grpc.StatusCode.UNAVAILABLE, "stopping", reason="SHUTTING_DOWN")


async def test_watch_never_goes_on_in_another_job_of_the_name(
    services: Any, client: Client, async_client: AsyncClient
) -> None:
    seen: list[Event] = []
    replaced = ReplacedJob(services)
    with pytest.raises(NotFound) as caught:
        seen.extend(client.jobs.watch("j"))
    assert caught.value.reason == Reason.RESOURCE_REPLACED
    assert replaced.asked == [(1, "first"), (3, "first")]
    replaced = ReplacedJob(services)
    with pytest.raises(NotFound) as caught:
        await async_client.jobs.wait("j", on_event=seen.append)
    assert caught.value.reason == Reason.RESOURCE_REPLACED
    assert replaced.asked == [(1, "first"), (3, "first")]
    assert [event.sequence for event in seen] == [1, 2, 1, 2], "what came before it was passed on"


def test_wait_does_not_take_another_job_of_the_name_for_its_own(services: Any, client: Client) -> None:
    uids = iter(["first", "second"])
    done = FineTuningJob.STATE_SUCCEEDED
    services.answers["GetFineTuningJob"] = lambda request, context: FineTuningJob(
        name=NAME, uid=next(uids), state=done
    )
    services.answers["WatchFineTuningJob"] = lambda request, context: iter([_event(1)])
    with pytest.raises(NotFound, match="has uid second, and had first when it was seen first") as caught:
        client.jobs.wait("j")
    assert caught.value.reason == Reason.RESOURCE_REPLACED


def test_watch_takes_up_what_another_process_saw(services: Any, client: Client) -> None:
    replaced = ReplacedJob(services)
    with pytest.raises(NotFound):
        list(client.jobs.watch("j", start_sequence=2, uid="of before"))
    assert replaced.asked == [(2, "of before")]
    assert services.calls["GetFineTuningJob"] == 0


def test_watch_begins_where_it_is_told(services: Any, client: Client) -> None:
    log = BreakingLog(services)
    services.answers["WatchFineTuningJob"] = log.watch
    with client.jobs.watch("j", start_sequence=6) as events:
        assert [event.sequence for event in events] == [6]
    assert log.starts == [6]


def test_watch_drops_what_is_sent_again(services: Any, client: Client) -> None:
    services.answers["WatchFineTuningJob"] = lambda request, context: iter(
        [_event(1), _event(1), _event(2), _event(1), _event(3)]
    )
    assert [event.sequence for event in client.jobs.watch("j")] == [1, 2, 3]


def test_watch_asks_again_for_a_missing_event(services: Any, client: Client) -> None:
    def watch(request: Any, context: grpc.ServicerContext) -> Iterator[Event]:
        missing = services.calls["WatchFineTuningJob"] == 1
        sequences = [1, 3] if missing else range(request.start_sequence, 4)
        return iter([_event(sequence) for sequence in sequences])

    services.answers["WatchFineTuningJob"] = watch
    assert [event.sequence for event in client.jobs.watch("j")] == [1, 2, 3]


class TrimmedLog:
    """A log of eight events: those before number 7 are gone, or are going, each time up to the next of `firsts`."""

    def __init__(self, services: Any, *firsts: int) -> None:
        self.starts: list[int] = []
        self._services = services
        self._firsts = list(firsts or [7])

    def watch(self, request: Any, context: grpc.ServicerContext) -> Iterator[Event]:
        self.starts.append(request.start_sequence)
        first = self._firsts.pop(0) if len(self._firsts) > 1 else self._firsts[0]
        if request.start_sequence < first:
            self._services.refuse(
                context,
                grpc.StatusCode.OUT_OF_RANGE,
                f"it is gone; begin at {first}",
                reason="SEQUENCE_EXPIRED",
                metadata={"first_sequence": str(first)},
            )
        yield from (_event(sequence) for sequence in range(request.start_sequence, 9))


def test_watch_from_the_beginning_begins_where_the_log_does(services: Any, client: Client) -> None:
    log = TrimmedLog(services)
    services.answers["WatchFineTuningJob"] = log.watch
    assert [event.sequence for event in client.jobs.watch("j")] == [7, 8]
    assert log.starts == [1, 7]


def test_watch_from_the_beginning_begins_where_a_log_does_that_is_being_trimmed(
    services: Any, client: Client
) -> None:
    log = TrimmedLog(services, 3, 5, 7)
    services.answers["WatchFineTuningJob"] = log.watch
    assert [event.sequence for event in client.jobs.watch("j")] == [7, 8]
    assert log.starts == [1, 3, 5, 7]


def test_watch_from_a_number_that_is_gone_says_so(services: Any, client: Client) -> None:
    log = TrimmedLog(services)
    services.answers["WatchFineTuningJob"] = log.watch
    with pytest.raises(OutOfRange, match="begin at 7") as caught:
        list(client.jobs.watch("j", start_sequence=3))
    assert (caught.value.reason, log.starts) == (Reason.SEQUENCE_EXPIRED, [3])


def test_watch_that_has_begun_does_not_begin_again_later(services: Any, client: Client) -> None:
    log = TrimmedLog(services)

    def watch(request: Any, context: grpc.ServicerContext) -> Iterator[Event]:
        if request.start_sequence == 1:
            yield _event(1)
            context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")
        yield from log.watch(request, context)

    services.answers["WatchFineTuningJob"] = watch
    with pytest.raises(OutOfRange, match="begin at 7"):
        list(client.jobs.watch("j"))
    assert log.starts == [2]


def test_watch_reports_an_event_that_stays_missing(services: Any, client: Client) -> None:
    services.answers["WatchFineTuningJob"] = lambda request, context: iter([_event(1), _event(3)])
    with pytest.raises(DataLoss, match="expected number 2, got 3"):
        list(client.jobs.watch("j"))


def test_watch_passes_other_errors_on(services: Any, client: Client) -> None:
    def watch(request: Any, context: grpc.ServicerContext) -> Iterator[Event]:
        services.refuse(context, grpc.StatusCode.NOT_FOUND, "no job j", reason="RESOURCE_NOT_FOUND")
        yield _event(1)

    services.answers["WatchFineTuningJob"] = watch
    with pytest.raises(NotFound, match="no job j"):
        list(client.jobs.watch("j"))
    assert services.calls["WatchFineTuningJob"] == 1


async def test_closing_a_watch_ends_the_call_at_the_service(
    services: Any, client: Client, async_client: AsyncClient, wait_until: Any
) -> None:
    ended = threading.Semaphore(0)

    def watch(request: Any, context: grpc.ServicerContext) -> Iterator[Event]:
        context.add_callback(ended.release)
        yield _event(1)
        threading.Event().wait(1)

    services.answers["WatchFineTuningJob"] = watch
    with client.jobs.watch("j") as events:
        assert next(events).sequence == 1
    wait_until(lambda: ended.acquire(blocking=False))
    async with async_client.jobs.watch("j") as async_events:
        assert (await anext(async_events)).sequence == 1
    await asyncio.to_thread(wait_until, lambda: ended.acquire(blocking=False))


def _ending(services: Any, job: FineTuningJob, state: str) -> None:
    final = Event(sequence=2, state_change=StateChange(state=state))
    services.answers["WatchFineTuningJob"] = lambda request, context: iter([_event(1), final])
    services.answers["GetFineTuningJob"] = lambda request, context: job


async def test_wait_returns_the_resource_that_succeeded(
    services: Any, client: Client, async_client: AsyncClient
) -> None:
    _ending(services, FineTuningJob(name=NAME, state=FineTuningJob.STATE_SUCCEEDED), "SUCCEEDED")
    seen: list[Event] = []
    assert client.jobs.wait("j", on_event=seen.append).name == NAME
    assert [event.sequence for event in seen] == [1, 2]
    assert (await async_client.jobs.wait("j")).name == NAME


async def test_wait_for_what_ended_and_whose_events_went_meanwhile_needs_none(
    services: Any, client: Client, async_client: AsyncClient
) -> None:
    states = [FineTuningJob.STATE_RUNNING, FineTuningJob.STATE_SUCCEEDED]
    log = TrimmedLog(services)

    def watch(request: Any, context: grpc.ServicerContext) -> Iterator[Event]:
        if request.start_sequence == 1:
            yield _event(1)
            context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")
        yield from log.watch(request, context)

    services.answers["WatchFineTuningJob"] = watch
    asked = iter(states * 3)
    services.answers["GetFineTuningJob"] = lambda request, context: FineTuningJob(
        name=NAME, state=next(asked)
    )
    assert client.jobs.wait("j").state == FineTuningJob.STATE_SUCCEEDED
    assert (await async_client.jobs.wait("j")).state == FineTuningJob.STATE_SUCCEEDED
    with pytest.raises(OutOfRange, match="begin at 7"):
        client.jobs.wait("j", on_event=lambda event: None)


async def test_wait_raises_the_reason_of_a_failure(
    services: Any, client: Client, async_client: AsyncClient
) -> None:
    status = status_pb2.Status(code=9, message="no row has a supervised token")
    detail = status.details.add()
    detail.type_url = "type.googleapis.com/google.rpc.ErrorInfo"
    detail.value = b"\n\x14NO_SUPERVISED_TOKENS\x12\x07luthier"
    job = FineTuningJob(name=NAME, state=FineTuningJob.STATE_FAILED, error=status)
    _ending(services, job, "FAILED")
    with pytest.raises(JobFailed) as of_sync:
        client.jobs.wait("j")
    with pytest.raises(JobFailed) as of_async:
        await async_client.jobs.wait("j")
    for error in (of_sync.value, of_async.value, pickle.loads(pickle.dumps(of_sync.value))):
        assert error.reason == "NO_SUPERVISED_TOKENS"
        assert error.failure.code == "FAILED_PRECONDITION"
        assert error.state == "FAILED"
        assert error.resource == job
        assert str(error) == f"{NAME} is FAILED: no row has a supervised token"


def test_wait_raises_for_a_cancelled_job(services: Any, client: Client) -> None:
    _ending(services, FineTuningJob(name=NAME, state=FineTuningJob.STATE_CANCELLED), "CANCELLED")
    with pytest.raises(JobFailed) as caught:
        client.jobs.wait("j")
    assert caught.value.reason == "CANCELLED_BY_USER"


async def test_wait_ends_when_its_time_is_over(
    services: Any, client: Client, async_client: AsyncClient
) -> None:
    def watch(request: Any, context: grpc.ServicerContext) -> Iterator[Event]:
        over = threading.Event()
        context.add_callback(over.set)
        yield _event(1)
        over.wait(5)

    services.answers["WatchFineTuningJob"] = watch
    running = FineTuningJob(name=NAME, state=FineTuningJob.STATE_RUNNING)
    services.answers["GetFineTuningJob"] = lambda request, context: running
    with pytest.raises(DeadlineExceeded, match=r"still RUNNING after 0\.2 s"):
        client.jobs.wait("j", timeout_seconds=0.2)
    with pytest.raises(DeadlineExceeded, match=r"still RUNNING after 0\.2 s"):
        await async_client.jobs.wait("j", timeout_seconds=0.2)


def _impatient(services: Any, events: int) -> None:
    """Answer with a log whose call somebody between ends after each event, as a proxy does, with its own deadline."""

    def watch(request: Any, context: grpc.ServicerContext) -> Iterator[Event]:
        if request.start_sequence <= events:
            yield _event(request.start_sequence)
            services.refuse(context, grpc.StatusCode.DEADLINE_EXCEEDED, "too late")

    services.answers["WatchFineTuningJob"] = watch


async def test_the_deadline_of_somebody_between_is_a_break(
    services: Any, client: Client, async_client: AsyncClient
) -> None:
    _ending(services, FineTuningJob(name=NAME, state=FineTuningJob.STATE_SUCCEEDED), "SUCCEEDED")
    _impatient(services, 2)
    assert [event.sequence for event in client.jobs.watch("j")] == [1, 2]
    for timeout in (None, 30.0):
        seen: list[Event] = []
        client.jobs.wait("j", timeout_seconds=timeout, on_event=seen.append)
        assert [event.sequence for event in seen] == [1, 2]
        await async_client.jobs.wait("j", timeout_seconds=timeout)


def test_wait_ends_where_nothing_but_deadlines_comes_and_asks_with_pauses(
    services: Any, config: ClientConfig
) -> None:
    def refuse(request: Any, context: grpc.ServicerContext) -> Iterator[Event]:
        services.refuse(context, grpc.StatusCode.DEADLINE_EXCEEDED, "too late")
        yield _event(1)

    services.answers["WatchFineTuningJob"] = refuse
    policy = RetryPolicy(initial_seconds=0.05, max_seconds=0.1, deadline_seconds=0.4)
    with Client(replace(config, retry=policy)) as client:
        with pytest.raises(DeadlineExceeded, match="too late"):
            client.jobs.wait("j")
        assert services.calls["WatchFineTuningJob"] < 20
        services.calls["WatchFineTuningJob"] = 0
        with pytest.raises(DeadlineExceeded, match=r"after 0\.7 s"):
            client.jobs.wait("j", timeout_seconds=0.7)
        assert services.calls["WatchFineTuningJob"] <= 3


def test_wait_watches_on_when_the_stream_ends_early(services: Any, client: Client) -> None:
    starts: list[int] = []

    def watch(request: Any, context: grpc.ServicerContext) -> Iterator[Event]:
        starts.append(request.start_sequence)
        return iter([_event(request.start_sequence)])

    def get(request: Any, context: grpc.ServicerContext) -> FineTuningJob:
        done = len(starts) == 2
        state = FineTuningJob.STATE_SUCCEEDED if done else FineTuningJob.STATE_RUNNING
        return FineTuningJob(name=NAME, state=state)

    services.answers["WatchFineTuningJob"] = watch
    services.answers["GetFineTuningJob"] = get
    client.jobs.wait("j")
    assert starts == [1, 2]
