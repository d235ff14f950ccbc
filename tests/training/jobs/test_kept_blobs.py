"""Bytes of models, jobs and checkpoints: there as long as one of them needs them, and given back then."""

from __future__ import annotations

import hashlib
from typing import Any

from tests.training.conftest import stored
from tests.work.checkpoints import checkpoint_of
from tests.work.collected import collect_later, purge_later

from luthier.training.assembly import PURGED
from luthier.training.jobs import repository
from luthier.work.tasks import Outcome


async def there(bench: Any, *digests: str) -> list[bool]:
    """Which blobs there are, once what nobody needs has gone."""
    await collect_later(bench.database, bench.blobs)
    return [await bench.blobs.has(digest) for digest in digests]


async def test_what_a_checkpoint_or_a_model_names_stays(bench: Any) -> None:
    model = await bench.add_model("projects/default/models/named")
    await bench.create("one")
    task, _ = await bench.claim()
    file = await stored(bench, "the state of step 1")
    await bench.queue.commit_checkpoint(checkpoint_of(task, 1, [file]))
    named = [file.sha256, *(file.sha256 for file in model.private.files)]
    assert await there(bench, *named) == [True, True, True]


async def test_what_a_job_begins_from_goes_once_it_has_ended(bench: Any) -> None:
    job = await bench.create("one")
    start = await stored(bench, "the weights of a checkpoint that is dropped")
    async with bench.database.transaction() as connection:
        found = await bench.jobs.family.get(connection, job.name)
        private = found.copy_private()
        private.start_files.append(start)
        await repository.jobs().update(connection, found, found.copy(), private)
    assert await there(bench, start.sha256) == [True]
    await bench.cancel(job.name)
    assert await there(bench, start.sha256) == [False]


async def test_a_dropped_checkpoint_gives_back_its_own_bytes_alone(bench: Any) -> None:
    """What older and newer checkpoints share stays."""
    await bench.create("one", max_checkpoints=1)
    task, _ = await bench.claim()
    shared = await stored(bench, "the same in all", "config")
    states = []
    for step in (1, 2, 3):
        states.append(await stored(bench, f"state {step}", "state"))
        await bench.queue.commit_checkpoint(checkpoint_of(task, step, [shared, states[-1]]))
    digests = [state.sha256 for state in states]
    assert await there(bench, *digests, shared.sha256) == [False, False, True, True]


async def test_the_same_step_again_leaves_nothing_behind(bench: Any) -> None:
    """A second attempt may bring another file for a step that is kept already."""
    await bench.create("one")
    task, _ = await bench.claim()
    first, again = await stored(bench, "first"), await stored(bench, "again")
    await bench.queue.promised.keep(task.task_id, task.epoch, [first.sha256, again.sha256])
    await bench.queue.commit_checkpoint(checkpoint_of(task, 1, [first]))
    await bench.queue.commit_checkpoint(checkpoint_of(task, 1, [again]))
    assert await there(bench, first.sha256, again.sha256) == [True, False]


async def test_a_deleted_job_gives_back_its_checkpoints_when_it_is_purged(bench: Any) -> None:
    job = await bench.create("one")
    task, _ = await bench.claim()
    file = await stored(bench, "state")
    await bench.queue.commit_checkpoint(checkpoint_of(task, 1, [file]))
    await bench.cancel(job.name)
    await bench.queue.finish(task.task_id, task.epoch, Outcome(cancelled=True))
    assert await there(bench, file.sha256) == [True]
    await bench.jobs.delete(job.name, "")
    assert await there(bench, file.sha256) == [True], "it may come back"
    await purge_later(bench.database, PURGED)
    assert await there(bench, file.sha256) == [False]


async def test_what_only_a_deleted_job_needs_is_there_when_it_comes_back(bench: Any) -> None:
    job = await bench.create("one")
    task, _ = await bench.claim()
    file = await stored(bench, "state")
    await bench.queue.commit_checkpoint(checkpoint_of(task, 1, [file]))
    await bench.cancel(job.name)
    await bench.queue.finish(task.task_id, task.epoch, Outcome(cancelled=True))
    await bench.jobs.delete(job.name, "")
    await collect_later(bench.database, bench.blobs)
    await bench.jobs.family.undeleting.undelete(job.name, "", "")
    await purge_later(bench.database, PURGED)
    assert await there(bench, file.sha256) == [True]
    name = f"{job.name}/checkpoints/step-1"
    assert (await bench.jobs.checkpoint(name)).name == name


async def test_a_template_stays_with_the_job_that_teaches_by_it(bench: Any) -> None:
    bench.add_rendering(chat_template="{{ messages }}")
    job = await bench.create("one")
    digest = hashlib.sha256(b"{{ messages }}").hexdigest()
    assert await there(bench, digest) == [True]
    await bench.cancel(job.name)
    await bench.jobs.delete(job.name, "")
    await purge_later(bench.database, PURGED)
    assert await there(bench, digest) == [False]
