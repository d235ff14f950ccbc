"""Claims: each task to one worker, by turns; what cannot be handed out stands in nobody's way."""

from __future__ import annotations

import asyncio
import time
from contextvars import Context
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import update

from luthier.errors import Failure, NotFound, Reason, ResourceExhausted, Unavailable
from luthier.storage.disk import disk_full
from luthier.work.aside import MAX_DELAYS
from luthier.work.queue import Queue, QueueSettings
from luthier.work.repository import Tasks
from luthier.work.requirements import GIB, Equipment, Requirements
from luthier.work.schema import tasks
from luthier.work.tasks import Outcome, TaskKind

if TYPE_CHECKING:
    from tests.work.conftest import Bench


@pytest.mark.parametrize("where", ["jobs/poison", "specify jobs/poison"])
@pytest.mark.parametrize(
    ("error", "code", "reason", "said"),
    [
        (KeyError("gone"), "INTERNAL", "INTERNAL", "the task cannot be handed out: KeyError: 'gone'"),
        (NotFound("no such rendering"), "NOT_FOUND", "RESOURCE_NOT_FOUND", "no such rendering"),
    ],
)
async def test_a_task_whose_claim_fails_is_set_aside_and_the_next_takes_its_turn(
    bench: Bench, where: str, error: Exception, code: str, reason: str, said: str
) -> None:
    await bench.enqueue("jobs/poison")
    good = await bench.enqueue("jobs/good")
    bench.handler.refusals[where] = error
    task = await bench.claim()
    assert task is not None
    assert task.task_id == good.task_id
    (failure,) = bench.handler.failures
    assert (failure.code, failure.reason, failure.message) == (code, reason, said)
    assert await bench.claim() is None, "it is not handed out again"
    assert bench.registry.get_sample_value("luthier_task_set_aside_total", {"kind": "TRAIN"}) == 1


async def test_a_task_whose_resource_cannot_be_told_either_keeps_nobody_waiting(bench: Bench) -> None:
    await bench.enqueue("jobs/poison")
    await bench.enqueue("jobs/good")
    bench.handler.refusals = {"jobs/poison": KeyError("a"), "failed jobs/poison": KeyError("b")}
    assert await bench.claim() is not None
    assert await bench.claim() is None
    assert bench.handler.failures == []


async def test_a_refusal_that_may_pass_puts_a_task_off(bench: Bench) -> None:
    first = await bench.enqueue("jobs/first")
    second = await bench.enqueue("jobs/second")
    bench.handler.refusals["jobs/first"] = Unavailable("a peer is away")
    task = await bench.claim()
    assert task is not None
    assert task.task_id == second.task_id
    assert await bench.claim() is None, "not before its time"
    del bench.handler.refusals["jobs/first"]
    task = await bench.claim(wait_seconds=5.0)
    assert task is not None, "a waiting worker gets it as soon as its time has come"
    assert (task.task_id, task.attempt) == (first.task_id, 1)
    assert bench.handler.failures == []


async def test_a_task_is_put_off_a_bounded_number_of_times(bench: Bench) -> None:
    await bench.enqueue("jobs/a")
    bench.handler.refusals["jobs/a"] = ResourceExhausted("no room on the disk")
    for _ in range(MAX_DELAYS + 1):
        assert bench.handler.failures == []
        async with bench.database.transaction() as connection:
            await connection.execute(update(tasks).values(not_before_us=0))
        assert await bench.claim() is None
    assert bench.handler.failures[0].message == "no room on the disk"


async def test_a_claim_that_is_repeated_brings_the_same_lease(bench: Bench) -> None:
    await bench.enqueue("jobs/a")
    await bench.enqueue("jobs/b")
    claims = [await bench.queue.claim("w@1", [TaskKind.TRAIN], 0.0, "c1") for _ in range(2)]
    assert [claim is not None for claim in claims] == [True, True]
    first, again = (claim[0] for claim in claims if claim is not None)
    assert (first.task_id, first.epoch, first.attempt) == (again.task_id, again.epoch, again.attempt)
    assert claims[1] is not None
    assert claims[1][1].train.rendering_digest == "r"
    assert bench.handler.calls == [("started", 1)]
    other = await bench.queue.claim("w@1", [TaskKind.TRAIN], 0.0, "c2")
    assert other is not None
    assert other[0].task_id != first.task_id


async def test_a_claim_that_waits_twice_gets_one_task(bench: Bench) -> None:
    waiting = [
        asyncio.create_task(bench.queue.claim("w@1", [TaskKind.TRAIN], 0.5, "c1"), context=Context())
        for _ in range(2)
    ]
    await asyncio.sleep(0.05)
    await bench.enqueue("jobs/a")
    await bench.enqueue("jobs/b")
    claims = [claim[0].task_id for claim in await asyncio.gather(*waiting) if claim is not None]
    assert len(claims) == 2
    assert len(set(claims)) == 1


async def test_a_claim_that_waits_ends_when_the_service_does(bench: Bench) -> None:
    waiting = asyncio.create_task(bench.claim(wait_seconds=30.0))
    await asyncio.sleep(0.05)
    bench.queue.stop()
    # Not None: that would end the claim, which may have brought a task in a call whose answer was lost.
    with pytest.raises(Unavailable, match="claim again"):
        await asyncio.wait_for(waiting, 2.0)
    await bench.enqueue()
    with pytest.raises(Unavailable):
        await bench.claim()
    assert bench.handler.calls == [], "nobody would hear of the lease"


async def test_a_claim_is_answered_again_while_the_disk_has_no_room(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.enqueue("jobs/a")
    await bench.enqueue("jobs/b")
    first = await bench.queue.claim("w@1", [TaskKind.TRAIN], 0.0, "c1")
    monkeypatch.setattr(bench.database.disk, "min_free_bytes", 1 << 62)
    again = await bench.queue.claim("w@1", [TaskKind.TRAIN], 0.0, "c1")
    assert first is not None
    assert again is not None, "its worker would begin another claim, and the lease run out"
    assert (again[0].task_id, again[0].epoch) == (first[0].task_id, first[0].epoch)
    assert await bench.queue.claim("w@1", [TaskKind.TRAIN], 0.0, "c2") is None


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_lease_whose_holder_never_spoke_is_no_loss(bench: Bench, restarted: bool) -> None:
    """The answer to its claim was lost: nobody works on it."""
    await bench.enqueue()
    queue = bench.queue
    for _ in range(5):
        assert await queue.claim("w@1", [TaskKind.TRAIN], 0.0) is not None
        if restarted:
            queue = bench.successor()
            await queue.recover()
        bench.clock.now += 9.0
        await queue.expire()
        assert await queue.claim("v@1", [TaskKind.TRAIN], 0.0) is None, "a full period, after a restart too"
        bench.clock.now += 2.0
        await queue.expire()
    assert bench.handler.failures == []
    claimed = await queue.claim("w@1", [TaskKind.TRAIN], 0.0)
    assert claimed is not None
    assert claimed[0].losses == 0


async def test_a_holder_that_spoke_before_a_restart_is_a_loss_after_it(bench: Bench) -> None:
    """A task that takes the service down with its worker must not go round for ever."""
    await bench.enqueue()
    assert await bench.claim() is not None
    successor = bench.successor()
    await successor.recover()
    bench.clock.now += 11.0
    await successor.expire()
    claimed = await successor.claim("w@1", [TaskKind.TRAIN], 0.0)
    assert claimed is not None
    assert claimed[0].losses == 1


async def test_a_lease_is_renewed_on_a_disk_that_takes_no_note_of_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.enqueue()
    claimed = await bench.queue.claim("w@1", [TaskKind.TRAIN], 0.0)
    assert claimed is not None

    def full() -> None:
        raise disk_full("No space left on device")

    monkeypatch.setattr(bench.database, "transaction", full)
    bench.clock.now += 9.0
    await bench.queue.heartbeat(claimed[0].task_id, claimed[0].epoch)
    bench.clock.now += 9.0
    await bench.queue.expire()
    monkeypatch.undo()
    assert (await bench.queue.heartbeat(claimed[0].task_id, claimed[0].epoch)).epoch == 1


async def test_projects_take_turns(bench: Bench) -> None:
    for number in range(4):
        await bench.enqueue(f"jobs/many-{number}", project="many")
    await bench.enqueue("jobs/one", project="one")
    order = []
    for _ in range(3):
        task = await bench.claim()
        assert task is not None
        order.append(task.subject)
    assert order == ["jobs/many-0", "jobs/one", "jobs/many-1"]


CPU = Equipment(device="CPU", memory_bytes=16 * GIB)
CUDA = Equipment(device="CUDA", memory_bytes=80 * GIB)


async def subjects(bench: Bench, equipment: Equipment, number: int = 9) -> list[str]:
    """What a worker with this equipment is given, one task after the other."""
    found = []
    for place in range(number):
        holder = f"{equipment.device or 'old'}@1"
        claimed = await bench.queue.claim(holder, [TaskKind.TRAIN], 0.0, f"c{place}", equipment)
        if claimed is None:
            break
        found.append(claimed[0].subject)
    return found


async def test_a_worker_is_given_what_it_has_the_device_and_the_memory_for(bench: Bench) -> None:
    await bench.enqueue("jobs/gpu", required=Requirements(device="CUDA"))
    await bench.enqueue("jobs/large", required=Requirements(memory_bytes=17 * GIB))
    await bench.enqueue("jobs/either", required=Requirements(device="GPU"))
    await bench.enqueue("jobs/any")
    await bench.enqueue("jobs/cpu", required=Requirements(device="CPU", memory_bytes=16 * GIB))
    assert await subjects(bench, CPU) == ["jobs/any", "jobs/cpu"]
    assert await subjects(bench, CUDA) == ["jobs/gpu", "jobs/large", "jobs/either"]


async def test_a_worker_that_does_not_say_what_it_has_is_given_what_requires_nothing(bench: Bench) -> None:
    await bench.enqueue("jobs/gpu", required=Requirements(device="GPU"))
    await bench.enqueue("jobs/memory", required=Requirements(memory_bytes=1))
    await bench.enqueue("jobs/any")
    assert await subjects(bench, Equipment()) == ["jobs/any"]


async def test_the_task_at_the_head_that_a_worker_cannot_do_holds_up_nobody(bench: Bench) -> None:
    """Neither its own project's tasks nor the turns of others: it takes nobody's place."""
    await bench.enqueue("jobs/head", project="a", required=Requirements(device="CUDA"))
    await bench.enqueue("jobs/a", project="a")
    await bench.enqueue("jobs/b", project="b")
    assert await subjects(bench, CPU) == ["jobs/a", "jobs/b"]
    assert await subjects(bench, CUDA) == ["jobs/head"]


async def test_a_claim_that_waits_is_not_ended_by_what_it_cannot_do(bench: Bench) -> None:
    waiting = asyncio.create_task(
        bench.queue.claim("w@1", [TaskKind.TRAIN], 5.0, "c", CPU), context=Context()
    )
    await asyncio.sleep(0.05)
    await bench.enqueue("jobs/gpu", required=Requirements(device="CUDA"))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await bench.enqueue("jobs/any")
    claimed = await waiting
    assert claimed is not None
    assert claimed[0].subject == "jobs/any"


async def lost(queue: Queue, wait_seconds: float = 0.0) -> bool:
    """Claim as a worker does that dies at once; False when there was nothing to claim."""
    claimed = await queue.claim("w@1", [TaskKind.TRAIN], wait_seconds)
    if claimed is None:
        return False
    died = Failure(code="UNAVAILABLE", reason=Reason.WORKER_LOST, message="killed")
    await queue.finish(claimed[0].task_id, claimed[0].epoch, Outcome(failure=died))
    return True


async def put_off_seconds(bench: Bench) -> float:
    async with bench.database.reading() as connection:
        return max(await Tasks().put_off_for(connection), default=0.0)


async def test_a_task_that_loses_worker_after_worker_waits_longer_each_time(bench: Bench) -> None:
    queue = bench.successor(QueueSettings(lease_seconds=10.0, max_losses=7))
    await bench.enqueue()
    waits = []
    for _ in range(6):
        assert await lost(queue)
        waits.append(await put_off_seconds(bench))
        async with bench.database.transaction() as connection:
            await connection.execute(update(tasks).values(not_before_us=0, losses=len(waits)))
    assert waits[0] == 0.0, "another worker takes over at once"
    assert waits[1:] == pytest.approx([2.0, 8.0, 32.0, 60.0, 60.0], abs=1.0)


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_task_that_was_put_off_is_taken_as_soon_as_its_time_has_come(
    bench: Bench, restarted: bool
) -> None:
    settings = QueueSettings(lease_seconds=10.0, max_losses=7, retry_seconds=0.5)
    queue = bench.successor(settings)
    await bench.enqueue()
    assert await lost(queue)
    assert await lost(queue), "the first retry comes at once"
    assert not await lost(queue), "the second does not"
    if restarted:
        queue = bench.successor(settings)
        await queue.recover()
    began = time.monotonic()
    assert await lost(queue, wait_seconds=20.0)
    assert time.monotonic() - began < 5.0


async def test_an_attempt_that_was_given_back_is_made_again_at_once(bench: Bench) -> None:
    queue = bench.successor(QueueSettings(lease_seconds=10.0))
    await bench.enqueue()
    stopping = Failure(code="UNAVAILABLE", reason=Reason.SHUTTING_DOWN, message="the worker shuts down")
    for _ in range(6):
        claimed = await queue.claim("w@1", [TaskKind.TRAIN], 0.0)
        assert claimed is not None
        await queue.finish(claimed[0].task_id, claimed[0].epoch, Outcome(failure=stopping))
