"""Leases: a holder that is silent loses them, a pause of the granting process does not."""

from __future__ import annotations

from tests.work.conftest import Bench, Clock

from luthier.work.leases import Leases
from luthier.work.tasks import TaskKind


def rounds(leases: Leases, clock: Clock, seconds: int) -> list[bool]:
    """Let time pass as it does for a process that runs: a round a second."""
    told = []
    for _ in range(seconds):
        clock.now += 1.0
        told.append(leases.begin_round())
    return told


def test_a_silent_holder_is_overdue_after_a_period() -> None:
    clock = Clock()
    leases = Leases(10.0, clock)
    leases.grant("t")
    assert not any(rounds(leases, clock, 9))
    assert leases.overdue() == []
    assert not any(rounds(leases, clock, 2))
    assert leases.overdue() == ["t"]


def test_a_pause_of_the_granting_process_gives_every_lease_a_full_period() -> None:
    clock = Clock()
    leases = Leases(10.0, clock)
    leases.grant("t")
    rounds(leases, clock, 9)
    clock.now += 45.0  # SIGSTOP, a blocked loop, a suspended machine
    assert leases.begin_round()
    assert leases.overdue() == []
    assert leases.remaining_seconds("t") == 10.0
    assert not any(rounds(leases, clock, 9))
    assert leases.overdue() == []
    rounds(leases, clock, 2)
    assert leases.overdue() == ["t"], "a holder that stays silent is lost all the same"


async def test_a_pause_does_not_tell_that_a_holder_spoke(bench: Bench) -> None:
    await bench.enqueue()
    assert await bench.queue.claim("w@1", [TaskKind.TRAIN], 0.0) is not None
    bench.queue.begin_round()
    bench.clock.now += 45.0
    assert bench.queue.begin_round()
    bench.clock.now += 11.0
    await bench.queue.expire()
    claimed = await bench.queue.claim("w@1", [TaskKind.TRAIN], 0.0)
    assert claimed is not None
    assert claimed[0].losses == 0
    heard = await bench.queue.heartbeat(claimed[0].task_id, claimed[0].epoch)
    assert not heard.heard
    assert (await bench.queue.heartbeat(claimed[0].task_id, claimed[0].epoch)).heard


async def test_the_queue_expires_nothing_after_its_own_pause(bench: Bench) -> None:
    await bench.enqueue()
    assert await bench.claim() is not None
    bench.queue.begin_round()
    bench.clock.now += 45.0
    bench.queue.begin_round()
    await bench.queue.expire()
    assert ("lost", 1) not in bench.handler.calls
