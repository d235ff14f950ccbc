"""Work in processes of its own, killed for real: the attempt is lost, never the worker, and no bit changes."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.training.worker.conftest import Site
from tests.training.worker.hostile_tokenizers import make_hostile

from luthier.errors import Cancelled, InvalidArgument
from luthier.errors.status import status_to_failure
from luthier.lm.made import GgufType
from luthier.lm.sources import DirectorySource
from luthier.training.executors.inline import InChild
from luthier.training.worker.making import make_in
from luthier.training.worker.order import MakeOrder, RegisterOrder
from luthier.training.worker.register import register_in
from luthier.v1 import model_pb2
from luthier.v1.event_pb2 import AttemptChange, Event
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob
from luthier.v1.model_service_pb2 import CancelModelRequest, MergeModelRequest, WatchModelRequest
from luthier.v1.training_service_pb2 import CancelFineTuningJobRequest
from luthier.work.child import NURSERY_NAME
from luthier.work.child_watch import Always, Patience
from luthier.work.children import Children, Program
from luthier.work.device import Setup

MODULE = "luthier.training.worker.child"
PATIENCE = Patience(still_seconds=4.0)
# As a worker has them, but for limits that a test can reach.
PROGRAM = f"""
import {MODULE} as child
from luthier.training.worker import tokenizers_apart
from luthier.work.limited_child import Limits

tokenizers_apart.LIMITS = Limits(cpu_seconds=2, memory_bytes=512 << 20)
child.main()
"""
EPOCHS = 10
"""Some 70 steps: time in which to kill what makes them."""


@dataclass
class Kills:
    """What the kernel is said to have ended for want of memory."""

    counted: int = 0


@dataclass
class Trained:
    """Children that train, and the kills that they are told of."""

    children: Children
    kills: Kills


@pytest.fixture(autouse=True)
def few_scored() -> None:
    """Score as many held-out tokens as children do."""


@pytest.fixture(scope="module")
def trained() -> Iterator[Trained]:
    """Shared by all tests: the spare child of one is the first of the next."""
    setup = Setup(device="cpu", num_threads=1, log_level="INFO")
    kills = Kills()
    program = Program(command=("-P", "-c", PROGRAM), setup=setup)
    with Children(program, PATIENCE, lambda: kills.counted) as children:
        yield Trained(children, kills)


def pids() -> list[int]:
    """Children of this process that train or wait for it, those that began first before the others."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "stat").read_text().rpartition(")")[2].split()
            is_ours = int(words[1]) == os.getpid() and words[0] != "Z"
            if (path / "comm").read_text().strip() == NURSERY_NAME:
                continue  # they are forked from it
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
async def working(site: Site, folder: Path, trained: Trained) -> AsyncIterator[None]:
    await asyncio.to_thread(trained.children.require_ready)
    async with site.worker(compute=InChild(trained.children)):
        site.data.tokenizer_digest = (await site.register(folder)).tokenizer_digest
        yield


async def disturbed(
    site: Site, name: str, disturb: Callable[[int], None]
) -> tuple[FineTuningJob, list[Event]]:
    """Make a job, do something to the process that trains it after its first checkpoint, and wait for the end."""
    (child,) = pids()
    job = await site.create(name, num_epochs=EPOCHS)
    events: list[Event] = []
    async for event in site.watch(job.name):
        events.append(event)
        if event.HasField("checkpoint") and not any(one.HasField("checkpoint") for one in events[:-1]):
            disturb(child)
    return await site.ended(job.name), events


def changes(events: list[Event]) -> list[tuple[AttemptChange.Kind.ValueType, str]]:
    found = [event.attempt_change for event in events if event.HasField("attempt_change")]
    return [(change.kind, change.reason) for change in found if change.kind != AttemptChange.KIND_STARTED]


def warnings(events: list[Event]) -> list[str]:
    return [event.log.text for event in events if event.log.severity == event.log.SEVERITY_WARNING]


def told_of(events: list[Event], kind: AttemptChange.Kind.ValueType) -> str:
    (told,) = [one.attempt_change.message for one in events if one.attempt_change.kind == kind]
    return told


def assert_placed(message: str) -> None:
    """A failure names the step that it was at, rows of it, and their lines: that of row r is r + 1."""
    found = re.search(
        r"; it was at step (\d+), in a pass over rows ([\d, ]+?)(?: and \d+ more)?; the first of them are (.*)",
        message,
    )
    assert found is not None, message
    rows = [int(row) for row in found[2].split(", ")]
    assert int(found[1]) > 0
    assert found[3].split(", ") == [f"a.jsonl:{row + 1}" for row in rows[:3]]


async def assert_same(site: Site, left: str, right: str) -> None:
    assert await site.metrics(left) == await site.metrics(right)
    digests = [[(one.step, one.digest) for one in await site.checkpoints(name)] for name in (left, right)]
    assert digests[0] == digests[1] != []


async def test_a_child_trains_with_the_bits_of_this_process_and_is_gone_then(
    site: Site, model_folder: Path, trained: Trained
) -> None:
    async with site.worker():
        site.data.tokenizer_digest = (await site.register(model_folder)).tokenizer_digest
        here = await site.ended((await site.create("here")).name)
    await asyncio.to_thread(trained.children.require_ready)
    (child,) = pids()
    async with site.worker(compute=InChild(trained.children)):
        there = await site.ended((await site.create("there")).name)
    assert there.state == FineTuningJob.STATE_SUCCEEDED, there.error
    assert here.run_record == there.run_record
    await assert_same(site, here.name, there.name)
    await until(lambda: child not in pids())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
async def test_a_child_that_dies_loses_the_attempt_and_no_bit(
    site: Site, model_folder: Path, trained: Trained, number: signal.Signals
) -> None:
    async with working(site, model_folder, trained):
        whole = await site.ended((await site.create("whole", num_epochs=EPOCHS)).name)
        await asyncio.to_thread(trained.children.require_ready)
        again, events = await disturbed(site, "killed", lambda pid: os.kill(pid, number))
    assert (whole.num_attempts, again.num_attempts) == (1, 2)
    assert again.state == FineTuningJob.STATE_SUCCEEDED, again.error
    lost, succeeded = changes(events)
    assert lost == (AttemptChange.KIND_LOST, "CRASHED")
    assert succeeded == (AttemptChange.KIND_SUCCEEDED, "")
    assert_placed(told_of(events, AttemptChange.KIND_LOST))
    dumps = [text for text in warnings(events) if "crashed:\nFatal Python error: Segmentation fault" in text]
    assert len(dumps) == (number == signal.SIGSEGV)
    # A signal from outside may come while Python makes or drops its innermost call, and the dump then ends there; a
    # fault of C code comes within a call (`tests/work/test_children.py`).
    assert all("luthier/training" in text or text.endswith("\n  File") for text in dumps)
    await assert_same(site, whole.name, again.name)


async def test_a_child_that_hangs_loses_the_attempt(site: Site, model_folder: Path, trained: Trained) -> None:
    async with working(site, model_folder, trained):
        job, events = await disturbed(site, "hung", lambda pid: os.kill(pid, signal.SIGSTOP))
    assert job.state == FineTuningJob.STATE_SUCCEEDED, job.error
    assert changes(events)[0] == (AttemptChange.KIND_LOST, "STALLED")
    assert_placed(told_of(events, AttemptChange.KIND_LOST))
    assert any("hangs:" in text for text in warnings(events))


async def test_a_kill_for_want_of_memory_fails_the_job_and_says_what_takes_it(
    site: Site, model_folder: Path, trained: Trained
) -> None:
    def starve(pid: int) -> None:
        trained.kills.counted += 1
        os.kill(pid, signal.SIGKILL)

    async with working(site, model_folder, trained):
        job, events = await disturbed(site, "starved", starve)
    assert job.state == FineTuningJob.STATE_FAILED
    failure = status_to_failure(job.error)
    assert failure.reason == "OUT_OF_MEMORY"
    assert "with micro_batch_tokens 4096 it does not; make it smaller" in failure.message
    assert "ended by the kernel for want of memory" in failure.message
    assert_placed(failure.message)
    assert failure.metadata["places"].startswith("a.jsonl:")
    assert {"step", "rows", "num_rows", "micro_batch_tokens"} <= failure.metadata.keys()
    assert changes(events) == [(AttemptChange.KIND_FAILED, "OUT_OF_MEMORY")]


async def test_a_child_that_does_not_listen_is_cancelled_within_ten_seconds(
    site: Site, model_folder: Path, trained: Trained
) -> None:
    trained.children.require_ready()
    async with site.worker(compute=InChild(trained.children)):
        site.data.tokenizer_digest = (await site.register(model_folder)).tokenizer_digest
        (child,) = pids()
        job = await site.create("one", num_epochs=5000)
        async for event in site.watch(job.name):
            if event.HasField("metrics"):
                break
        os.kill(child, signal.SIGSTOP)
        began = time.monotonic()
        await site.jobs.CancelFineTuningJob(CancelFineTuningJobRequest(name=job.name), metadata=site.metadata)
        ended = await site.ended(job.name)
        assert time.monotonic() - began < 10.0
        assert child not in pids()
    assert ended.state == FineTuningJob.STATE_CANCELLED


async def test_a_registration_whose_process_dies_is_made_again(
    site: Site, model_folder: Path, trained: Trained
) -> None:
    """It is stopped before it gets its order, so that it cannot be done before it is killed."""
    async with site.worker():
        here = await site.register(model_folder, "here")
    await asyncio.to_thread(trained.children.require_ready)
    (child,) = pids()
    os.kill(child, signal.SIGSTOP)
    async with site.worker(register=register_in(trained.children)):
        registration = asyncio.create_task(site.register(model_folder, "there"))
        await until(lambda: trained.children.num_running)
        os.kill(child, signal.SIGKILL)
        there = await registration
    assert there.state == model_pb2.Model.STATE_READY, there.error
    assert there.digest == here.digest
    request = WatchModelRequest(name=there.name)
    events = [event async for event in site.models.WatchModel(request, metadata=site.metadata)]
    assert changes(events) == [(AttemptChange.KIND_LOST, "CRASHED"), (AttemptChange.KIND_SUCCEEDED, "")]


async def test_a_source_that_cannot_be_read_is_named_by_another_process_too(
    site: Site, model_folder: Path, trained: Trained
) -> None:
    (model_folder / "config.json").unlink()
    async with site.worker(register=register_in(trained.children)):
        model = await site.register(model_folder)
    assert model.state == model_pb2.Model.STATE_FAILED
    assert "must hold config.json" in model.error.message
    assert status_to_failure(model.error).reason == "BASE_MODEL_MISSING"


@pytest.mark.parametrize(
    ("name", "said"), [("memory", "512 MiB of memory"), ("processor", "2 s of CPU time")]
)
async def test_a_registration_of_a_tokenizer_that_takes_too_much_is_refused_by_name(
    site: Site, model_folder: Path, trained: Trained, name: str, said: str
) -> None:
    make_hostile(model_folder, name)
    async with site.worker(register=register_in(trained.children)):
        model = await site.register(model_folder)
    assert model.state == model_pb2.Model.STATE_FAILED
    assert status_to_failure(model.error).reason == "MODEL_INVALID"
    assert model.error.message == f"the model's tokenizer takes more than {said}"


@pytest.mark.parametrize("form", [None, "F16"])
def test_a_merge_or_an_export_with_such_a_tokenizer_is_refused_by_name(
    model_folder: Path, trained: Trained, tmp_path: Path, form: GgufType | None
) -> None:
    make_hostile(model_folder, "memory")
    order = MakeOrder(
        model=model_folder,
        adapter=tmp_path,
        form=form,
        title="",
        directory=tmp_path / "made",
        scratch=tmp_path,
    )
    with pytest.raises(InvalidArgument, match="tokenizer takes more than 512 MiB of memory") as caught:
        trained.children.run(order, {}, Always())
    assert caught.value.reason == "MODEL_INVALID"
    assert not (tmp_path / "made").exists()


def test_a_registration_that_is_stopped_ends_with_what_reads_its_tokenizer(
    model_folder: Path, trained: Trained, tmp_path: Path
) -> None:
    make_hostile(model_folder, "processor")
    trained.children.require_ready()
    (child,) = pids()
    forks: list[str] = []

    class Stopping(Always):
        def heed(self) -> None:
            forks.extend(Path(f"/proc/{child}/task/{child}/children").read_text().split())
            if forks:
                raise Cancelled("stopped")

    source = DirectorySource(path=model_folder)
    order = RegisterOrder(source=source, directory=tmp_path / "made", scratch=tmp_path)
    with pytest.raises(Cancelled, match="stopped"):
        trained.children.run(order, {}, Stopping())
    began = time.monotonic()
    while any(Path(f"/proc/{fork}").exists() for fork in forks):
        assert time.monotonic() - began < 1.0
        time.sleep(0.01)


async def adapter(site: Site, folder: Path) -> str:
    """Train one in this process, and return its name."""
    site.data.tokenizer_digest = (await site.register(folder)).tokenizer_digest
    return (await site.ended((await site.create("one")).name)).tuned_model


async def test_a_merge_whose_process_dies_is_made_again(
    site: Site, model_folder: Path, trained: Trained
) -> None:
    async with site.worker():
        name = await adapter(site, model_folder)
        here = await site.merge(name, "here")
    await asyncio.to_thread(trained.children.require_ready)
    (child,) = pids()
    os.kill(child, signal.SIGSTOP)
    async with site.worker(make=make_in(trained.children)):
        merging = asyncio.create_task(site.merge(name, "there"))
        await until(lambda: trained.children.num_running)
        os.kill(child, signal.SIGKILL)
        there = await merging
    assert there.state == model_pb2.Model.STATE_READY, there.error
    assert (there.digest, there.check) == (here.digest, here.check)
    request = WatchModelRequest(name=there.name)
    events = [event async for event in site.models.WatchModel(request, metadata=site.metadata)]
    assert changes(events) == [(AttemptChange.KIND_LOST, "CRASHED"), (AttemptChange.KIND_SUCCEEDED, "")]


async def test_a_merge_is_cancelled_with_the_process_that_computes(
    site: Site, model_folder: Path, trained: Trained
) -> None:
    async with site.worker():
        name = await adapter(site, model_folder)
    await asyncio.to_thread(trained.children.require_ready)
    (child,) = pids()
    os.kill(child, signal.SIGSTOP)
    async with site.worker(make=make_in(trained.children)):
        made = await site.models.MergeModel(MergeModelRequest(name=name), metadata=site.metadata)
        await until(lambda: trained.children.num_running)
        await site.models.CancelModel(CancelModelRequest(name=made.name), metadata=site.metadata)
        async with asyncio.timeout(10.0):
            model = await site.made(made.name)
    assert model.state == model_pb2.Model.STATE_CANCELLED
    await until(lambda: child not in pids())


async def test_a_merge_that_does_not_fit_into_memory_says_what_it_takes(
    site: Site, model_folder: Path, trained: Trained
) -> None:
    async with site.worker():
        name = await adapter(site, model_folder)
    await asyncio.to_thread(trained.children.require_ready)
    (child,) = pids()
    os.kill(child, signal.SIGSTOP)
    async with site.worker(make=make_in(trained.children)):
        merging = asyncio.create_task(site.merge(name, "there"))
        await until(lambda: trained.children.num_running)
        trained.kills.counted += 1
        os.kill(child, signal.SIGKILL)
        model = await merging
    assert model.state == model_pb2.Model.STATE_FAILED
    failure = status_to_failure(model.error)
    assert failure.reason == "OUT_OF_MEMORY"
    assert "models/there must fit in the worker's memory: files of " in failure.message
