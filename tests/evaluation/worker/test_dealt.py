"""An evaluation that is dealt to several workers is the same one, whoever of them is killed."""

from __future__ import annotations

import asyncio
import itertools
import signal
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from typing import Any

import pytest
from tests.evaluation.conftest import Site
from tests.evaluation.worker.test_resume import (
    ROWS,
    WANTED,
    committed,
    counted,
    process,
    until_answered,
)
from tests.evaluation.worker.undisturbed import assert_same, texts, undisturbed

from luthier.errors import Reason
from luthier.errors.status import status_to_failure
from luthier.evaluation import shares
from luthier.evaluation.worker.engine import EngineClient
from luthier.lm.generate import GenerationEvent, GenerationRequest
from luthier.v1 import evaluation_pb2, evaluation_service_pb2
from luthier.v1.event_pb2 import AttemptChange, Event

State = evaluation_pb2.Evaluation.State
EVERY = {(one, row) for one, _, _ in WANTED["arms"] for row in range(12)}


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "ROWS_A_BATCH", ROWS)


async def events_of(site: Any, name: str) -> list[Event]:
    request = evaluation_service_pb2.WatchEvaluationRequest(name=name)
    return [event async for event in site.stream("WatchEvaluation", request)]


def began(events: list[Event]) -> list[tuple[int, str]]:
    """Share and worker of each attempt that began."""
    return [
        (event.share, event.attempt_change.worker)
        for event in events
        if event.attempt_change.kind == AttemptChange.KIND_STARTED
    ]


@pytest.mark.parametrize("num_workers", [1, 2])
async def test_a_dealt_evaluation_is_the_same_as_that_of_one_worker(
    site: Any, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    by_one = await undisturbed(site, **WANTED)
    with counted(monkeypatch) as asked:
        async with AsyncExitStack() as stack:
            for number in range(num_workers):
                await stack.enter_async_context(site.worker(name=f"-{number}"))
            made = await site.evaluate(**WANTED, max_workers=3)
            done = await site.ended(made.name)
    await assert_same(site, by_one, done)
    assert len(asked) == len(EVERY)
    assert set(asked) == EVERY
    events = await events_of(site, made.name)
    assert sorted(share for share, _ in began(events)) == [0, 1, 2, 3]
    workers = {worker for share, worker in began(events) if share}
    assert len(workers) >= min(num_workers, 2), "several workers answer"
    counts = [event.progress.completed for event in events if event.share and event.HasField("progress")]
    assert counts == sorted(counts)
    assert counts[-1] == 36
    assert {event.progress.total for event in events if event.share and event.HasField("progress")} == {36}
    assert committed(site) == 0, "what the attempts kept goes with the end"


async def test_the_number_of_shares_changes_nothing(site: Any) -> None:
    by_one = await undisturbed(site, **WANTED)
    async with site.worker():
        for most in (2, 64):
            done = await site.ended((await site.evaluate(**WANTED, max_workers=most)).name)
            await assert_same(site, by_one, done)


async def test_shares_that_fail_stop_the_others_and_answers_are_kept(site: Any) -> None:
    """The adapter of the last arm is another one by now: the worker of its share fails, with nothing answered."""
    by_one = await undisturbed(site, **WANTED)
    async with site.worker(name="-0"):
        made = await site.evaluate(**WANTED, max_workers=3)
        await until_answered(site, made.name, 6)
        site.models.folders = {**site.models.folders, "tuned": site.models.folders["tuned-more"]}
        async with site.worker(name="-1"):
            done = await site.ended(made.name)
    assert done.state == State.STATE_FAILED
    assert status_to_failure(done.error).reason == Reason.CHECKSUM_MISMATCH
    known = await texts(site, made.name)
    assert 6 <= len(known) < len(by_one.texts)
    assert known.items() <= by_one.texts.items()


async def test_answers_of_all_shares_before_a_cancel_are_kept(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_one = await undisturbed(site, **WANTED)
    numbers, generate = itertools.count(), EngineClient.generate

    def held(client: EngineClient, request: GenerationRequest, check: Any) -> Iterator[GenerationEvent]:
        """Answer seven batches, and no other one for as long as it is wanted."""
        if next(numbers) < 7:
            yield from generate(client, request, check)
            return
        while True:
            check()
            time.sleep(0.05)

    monkeypatch.setattr(EngineClient, "generate", held)
    async with site.worker(name="-0"), site.worker(name="-1"):
        made = await site.evaluate(**WANTED, max_workers=2)
        await until_answered(site, made.name, 13)
        await site.call("CancelEvaluation", evaluation_service_pb2.CancelEvaluationRequest(name=made.name))
        done = await site.ended(made.name)
    assert done.state == State.STATE_CANCELLED
    assert not done.arm_results
    known = await texts(site, made.name)
    assert 6 <= len(known) < len(by_one.texts)
    assert known.items() <= by_one.texts.items()
    assert done.num_records == len(await site.predictions(made.name))


@pytest.fixture
def _short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is soon noticed that a worker is gone."""
    monkeypatch.setattr(Site, "LEASE_SECONDS", 10.0)


@pytest.mark.long
@pytest.mark.e2e
@pytest.mark.usefixtures("_short_leases")
async def test_the_share_of_a_killed_worker_is_taken_by_another_without_asking_again(site: Site) -> None:
    by_one = await undisturbed(site, **WANTED)
    with process(site, "a") as killed, process(site, "b"):
        made = await site.evaluate(**WANTED, max_workers=2)
        await until_answered_by(site, made.name, "evaluation-a", 7)
        killed.send_signal(signal.SIGKILL)
        await asyncio.to_thread(killed.wait)
        mine = next(share for share, one in began(await so_far(site, made.name)) if one == "evaluation-a")
        kept = committed(site, mine)
        done = await site.ended(made.name)
    await assert_same(site, by_one, done)
    assert 6 <= kept < 18
    events = await events_of(site, made.name)
    lost = [event for event in events if event.attempt_change.kind == AttemptChange.KIND_LOST]
    assert [(one.share, one.attempt, one.attempt_change.worker) for one in lost] == [
        (mine, 1, "evaluation-a")
    ]
    assert [one for share, one in began(events) if share == mine] == ["evaluation-a", "evaluation-b"]
    again = [
        event
        for event in events
        if event.attempt == 2 and event.share == mine and ": arm " in event.progress.phase
    ]
    assert len(again) == 18 - kept, "each answer that was not kept is asked once, no other is"


async def so_far(site: Site, name: str) -> list[Event]:
    """The events that have come within a moment."""
    request = evaluation_service_pb2.WatchEvaluationRequest(name=name)
    found: list[Event] = []
    with suppress(TimeoutError):
        async with asyncio.timeout(0.5):
            async for event in site.stream("WatchEvaluation", request):
                found.append(event)
    return found


async def until_answered_by(site: Site, name: str, worker: str, count: int) -> None:
    """Wait until a worker has given so many answers."""
    request = evaluation_service_pb2.WatchEvaluationRequest(name=name)
    mine, answers = 0, 0
    async for event in site.stream("WatchEvaluation", request):
        if event.attempt_change.worker == worker:
            mine = event.share
        answers += event.share == mine > 0 and ": arm " in event.progress.phase
        if answers >= count:
            return
    raise AssertionError(f"{name} ended before {worker} gave {count} answers")
