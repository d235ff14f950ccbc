"""Base models in processes of their own, killed for real: attempts are lost, never the worker, and no answer."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from tests.evaluation.here import NO_ROOM, Here
from tests.evaluation.tiny_models import write_base
from tests.evaluation.worker.test_answers import begun, request
from tests.evaluation.worker.test_resume import (
    ROWS,
    WANTED,
    process,
    progress,
    until_answered,
)
from tests.evaluation.worker.undisturbed import assert_same, undisturbed

from luthier.errors import LuthierError, Reason, Unavailable
from luthier.errors.status import status_to_failure
from luthier.evaluation import shares
from luthier.evaluation.worker import evaluate
from luthier.evaluation.worker.engine import Place, in_children
from luthier.evaluation.worker.order import LoadOrder
from luthier.evaluation.worker.room import Room
from luthier.v1 import evaluation_pb2, evaluation_service_pb2
from luthier.v1.event_pb2 import AttemptChange, Event
from luthier.work.child_watch import Patience
from luthier.work.children import Children, Program
from luthier.work.device import Setup
from luthier.work.peers import error_of

MODULE = "luthier.evaluation.worker.child"
PATIENCE = Patience(still_seconds=4.0)
LONG: dict[str, Any] = {"arms": [(f"arm-{number}", "base", 0) for number in range(16)], "max_new_tokens": 900}


@dataclass
class Engines:
    """Processes that hold models, the kills that they are told of, and how many models were loaded."""

    children: Children
    counted: int = 0
    loads: list[Path] = field(default_factory=list)

    def start(self, order: LoadOrder) -> Place:
        self.loads.append(order.folder)
        return in_children(self.children)(order)


@pytest.fixture(scope="module")
def shared() -> Iterator[Engines]:
    """Shared by all tests: the spare process of one is the first of the next."""
    setup = Setup(device="cpu", num_threads=1, log_level="INFO")
    program = Program(command=("-P", "-m", MODULE), setup=setup)
    with Children(program, PATIENCE, lambda: found.counted) as children:
        found = Engines(children)
        yield found


@pytest.fixture
def engines(shared: Engines) -> Engines:
    shared.loads.clear()
    return shared


def pids() -> list[int]:
    """Children of this process that hold a model or wait for one, those that began first before the others."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "stat").read_text().rpartition(")")[2].split()
            is_ours = int(words[1]) == os.getpid() and words[0] != "Z"
            is_ours = is_ours and (path / "comm").read_text().strip() == "luthier-child"
            if is_ours and MODULE.encode() in (path / "cmdline").read_bytes():
                found.append((int(words[19]), int(path.name)))
        except OSError:
            continue
    return [pid for _, pid in sorted(found)]


async def until(done: Callable[[], object], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not done():  # noqa: ASYNC110 - the kernel brings it about
            await asyncio.sleep(0.05)


@asynccontextmanager
async def working(site: Any, engines: Engines, room: Room = NO_ROOM) -> AsyncIterator[int]:
    """Work in a process that has prepared; yields its id."""
    await asyncio.to_thread(engines.children.require_ready)
    async with site.worker(engines.start, room):
        yield pids()[0]


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "ROWS_A_BATCH", ROWS)
    monkeypatch.setattr(
        "tests.evaluation.conftest.Evaluator", partial(evaluate.Evaluator, commit_seconds=0.0)
    )


async def events(site: Any, name: str) -> list[Event]:
    watched = evaluation_service_pb2.WatchEvaluationRequest(name=name)
    return [event async for event in site.stream("WatchEvaluation", watched)]


def changes(seen: list[Event]) -> list[tuple[AttemptChange.Kind.ValueType, str]]:
    found = [event.attempt_change for event in seen if event.HasField("attempt_change")]
    return [(change.kind, change.reason) for change in found if change.kind != AttemptChange.KIND_STARTED]


def warnings(seen: list[Event]) -> list[str]:
    return [event.log.text for event in seen if event.log.severity == event.log.SEVERITY_WARNING]


async def cut_off(call: Any) -> LuthierError:
    """What ends a generation that has begun."""
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return error_of(error)
    raise AssertionError("it came to its end")


def assert_retriable(error: LuthierError, reason: str) -> None:
    assert isinstance(error, Unavailable)
    assert error.reason == reason
    assert error.retry_after_seconds == 1.0


async def test_another_process_says_what_this_one_does_and_its_memory_is_gone_with_the_next_base(
    site: Any, engines: Engines
) -> None:
    here = await undisturbed(site, **WANTED)
    async with site.worker(Here):
        said = [await site.said(name, "what", max_new_tokens=8) for name in ("base", "tuned")]
    async with working(site, engines) as child:
        there = await site.ended((await site.evaluate(**WANTED)).name)
        assert [await site.said(name, "what", max_new_tokens=8) for name in ("base", "tuned")] == said
        assert len(engines.loads) == 1
        assert child in pids()
        await site.said("other", "what", max_new_tokens=2)
        assert child not in pids()
    await assert_same(site, here, there)


async def test_an_evaluation_and_calls_share_one_process_and_one_load(site: Any, engines: Engines) -> None:
    async with working(site, engines) as child:
        made = await site.evaluate(**LONG)
        await site.until_running(made.name)
        async with asyncio.timeout(20):
            both = [site.said(name, "what colour", max_new_tokens=4) for name in ("base", "tuned")]
            await asyncio.gather(*both)
        assert (await site.get(made.name)).state == evaluation_pb2.Evaluation.STATE_RUNNING
        assert pids() == [child]
        assert len(engines.loads) == 1


async def test_bases_that_fit_stay_and_the_longest_unused_leaves_when_memory_asks(
    site: Any, engines: Engines
) -> None:
    most = [2]

    def fits(needed_bytes: int, held_bytes: int) -> bool:
        assert needed_bytes > 0
        return held_bytes < most[0] * needed_bytes

    folder = site.home / "third"
    folder.mkdir()
    write_base(folder, 7)
    site.models.folders = {**site.models.folders, "third": folder}
    async with working(site, engines, Room(fits=fits)) as first:
        assert await site.said("base", "what", max_new_tokens=2) is not None
        await site.said("other", "what", max_new_tokens=2)
        second = pids()[-1]
        await site.said("base", "what", max_new_tokens=2)
        assert len(engines.loads) == 2
        await site.said("third", "what", max_new_tokens=2)
        assert second not in pids(), "it was used longest ago"
        assert first in pids()
        most[0] = 1
        await site.said("other", "what", max_new_tokens=2)
        assert first not in pids()
        assert len(engines.loads) == 4


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
async def test_a_process_that_dies_loses_the_attempt_and_no_answer(
    site: Any, engines: Engines, number: signal.Signals
) -> None:
    wanted = {**WANTED, "max_new_tokens": 64}
    alone = await undisturbed(site, **wanted)
    async with working(site, engines) as child:
        made = await site.evaluate(**wanted)
        await until_answered(site, made.name, 13)
        call = await begun(site, request(site, prompt="what", max_new_tokens=900, temperature=2.0))
        os.kill(child, number)
        assert_retriable(await cut_off(call), "CRASHED")
        await site.said("base", "what", max_new_tokens=2)
        done = await site.ended(made.name)
    await assert_same(site, alone, done)
    seen = await events(site, made.name)
    assert changes(seen) == [(AttemptChange.KIND_LOST, "CRASHED"), (AttemptChange.KIND_SUCCEEDED, "")]
    dumps = [text for text in warnings(seen) if "crashed:\nFatal Python error: Segmentation fault" in text]
    assert len(dumps) == (number == signal.SIGSEGV)
    # Cut off where the signal came between two calls, see that of a job in `tests/training/worker/test_in_child.py`.
    assert all("luthier/evaluation/worker" in text or text.endswith("\n  File") for text in dumps)
    told = await progress(site, made.name)
    first, second = ([done for attempt, done in told if attempt == number] for number in (1, 2))
    kept = second[0] - 1
    assert second == list(range(kept + 1, 37)), "each answer that was not kept is asked once, no other is"
    assert kept % ROWS == 0
    assert 0 <= max(first) - kept <= ROWS, "at most the batch that was cut off is asked again"


async def test_a_process_that_hangs_loses_the_attempt_and_cuts_off_the_calls(
    site: Any, engines: Engines
) -> None:
    async with working(site, engines) as child:
        made = await site.evaluate(
            arms=[(f"arm-{number}", "base", 0) for number in range(4)], max_new_tokens=300
        )
        await site.until_running(made.name)
        call = await begun(site, request(site, prompt="what", max_new_tokens=1000, temperature=2.0))
        os.kill(child, signal.SIGSTOP)
        assert_retriable(await cut_off(call), "STALLED")
        assert child not in pids()
        done = await site.ended(made.name)
    assert done.state == evaluation_pb2.Evaluation.STATE_SUCCEEDED, done.error
    seen = await events(site, made.name)
    assert changes(seen)[0] == (AttemptChange.KIND_LOST, "STALLED")
    assert any("hangs:" in text for text in warnings(seen))


async def test_a_kill_for_want_of_memory_fails_the_evaluation_and_says_what_takes_it(
    site: Any, engines: Engines
) -> None:
    async with working(site, engines) as child:
        made = await site.evaluate(**LONG)
        await site.until_running(made.name)
        call = await begun(site, request(site, prompt="what", max_new_tokens=1000, temperature=2.0))
        engines.counted += 1
        os.kill(child, signal.SIGKILL)
        assert_retriable(await cut_off(call), "OUT_OF_MEMORY")
        done = await site.ended(made.name)
    assert done.state == evaluation_pb2.Evaluation.STATE_FAILED
    failure = status_to_failure(done.error)
    assert (failure.reason, failure.metadata["max_new_tokens"]) == (Reason.OUT_OF_MEMORY, "900")
    assert "with max_new_tokens 900 and num_shots 0 they do not; make these smaller" in failure.message
    assert "ended by the kernel for want of memory" in failure.message
    assert changes(await events(site, made.name)) == [(AttemptChange.KIND_FAILED, "OUT_OF_MEMORY")]


async def test_a_process_that_does_not_listen_is_cancelled_and_ended_within_ten_seconds(
    site: Any,
) -> None:
    """Whoever watches it would be patient for two minutes."""
    patient = Program(
        command=("-P", "-m", MODULE), setup=Setup(device="cpu", num_threads=1, log_level="INFO")
    )
    others = set(pids())
    with Children(patient) as children:
        async with working(site, Engines(children)):
            (child,) = set(pids()) - others
            made = await site.evaluate(**LONG)
            await site.until_running(made.name)
            os.kill(child, signal.SIGSTOP)
            began = time.monotonic()
            await site.call(
                "CancelEvaluation", evaluation_service_pb2.CancelEvaluationRequest(name=made.name)
            )
            done = await site.ended(made.name)
            assert time.monotonic() - began < 5.0, "the task does not wait for it"
            await until(lambda: child not in pids(), 10.0 - (time.monotonic() - began))
            async with asyncio.timeout(60):
                await answered(site)
    assert done.state == evaluation_pb2.Evaluation.STATE_CANCELLED


async def test_a_base_whose_process_dies_while_it_loads_is_loaded_by_the_next(
    site: Any, engines: Engines
) -> None:
    async with working(site, engines) as child:
        os.kill(child, signal.SIGSTOP)
        calling = asyncio.create_task(site.said("base", "what", max_new_tokens=2))
        await until(lambda: engines.children.num_running)
        os.kill(child, signal.SIGKILL)
        with pytest.raises(Unavailable) as caught:
            await calling
        assert_retriable(caught.value, "CRASHED")
        assert await site.said("base", "what", max_new_tokens=2) is not None
        assert list((site.home / "laid-out").iterdir()) == []


@pytest.mark.e2e
async def test_no_process_outlives_a_worker_that_is_killed(site: Any) -> None:
    with process(site) as worker:
        await until(lambda: children_of(worker.pid))
        async with asyncio.timeout(60):
            await answered(site)
        children = children_of(worker.pid)
        call = await begun(site, request(site, prompt="what", max_new_tokens=1000, temperature=2.0))
        worker.send_signal(signal.SIGKILL)
        killed_at = time.monotonic()
        await until(lambda: not any(map(is_there, children)), 1.0 - (time.monotonic() - killed_at))
        call.cancel()


async def answered(site: Any) -> None:
    """Wait for a worker and a model that answer."""
    while True:
        try:
            await site.said("base", "what", max_new_tokens=2)
        except Unavailable:
            await asyncio.sleep(0.2)
        else:
            return


def children_of(worker: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "stat").read_text().rpartition(")")[2].split()
            if int(words[1]) == worker and MODULE.encode() in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except OSError:
            continue
    return found


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


DRIVER = "import sys; import luthier.evaluation.worker.__main__; print('torch' in sys.modules)"
CONNECTS = ("luthier.work.peers", "luthier.work.link", "luthier.work.retry", "grpc")
CHILD = f"""
import sys
import {MODULE}
import luthier.evaluation.worker.computing
print([name for name in {CONNECTS} if name in sys.modules])
"""


@pytest.mark.parametrize(("code", "said"), [(DRIVER, "False"), (CHILD, "[]")], ids=["driver", "child"])
def test_a_driver_has_no_torch_and_a_child_nothing_that_connects(code: str, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == said
