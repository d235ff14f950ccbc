"""Rollouts of jobs: kept before they are learnt from, given to who resumes, read by pages, gone with their job."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.training.conftest import stored
from tests.training.jobs.rollouts import commit, committed, create, drawn
from tests.work.checkpoints import checkpoint_of
from tests.work.collected import collect_later, purge_later

from luthier.errors import FailedPrecondition, Failure, InvalidArgument, NotFound, Reason
from luthier.runtime.paging import PageTokens
from luthier.training.assembly import PURGED
from luthier.training.jobs import servicer as jobs_servicer
from luthier.training.jobs.servicer import TrainingServicer
from luthier.v1.rollout_pb2 import Rollout
from luthier.v1.training_service_pb2 import ListRolloutsRequest, ListRolloutsResponse
from luthier.work.tasks import Outcome, Task

JOB = "projects/default/fineTuningJobs/one"
TOKENS = PageTokens(b"k" * 16)


async def listed(bench: Any, **changes: Any) -> ListRolloutsResponse:
    servicer = TrainingServicer(bench.jobs, TOKENS)
    request = ListRolloutsRequest(**{"parent": JOB, **changes})
    return await servicer.ListRollouts(request, None)  # type: ignore[arg-type]


async def all_of(bench: Any, **changes: Any) -> list[Rollout]:
    found: list[Rollout] = []
    token = ""
    while True:
        page = await listed(bench, page_token=token, **changes)
        assert page.rollouts or not page.next_page_token
        found += page.rollouts
        token = page.next_page_token
        if not token:
            return found


async def lost(bench: Any, task: Task) -> Task:
    """Have a worker lose a task, and the next one take it."""
    failure = Failure(code="UNAVAILABLE", reason=Reason.WORKER_LOST, message="gone")
    await bench.queue.finish(task.task_id, task.epoch, Outcome(failure=failure))
    async with asyncio.timeout(10):
        claimed = await bench.queue.claim("worker@2", [task.kind], 8.0)
    assert claimed is not None
    again: Task = claimed[0]
    return again


async def told(bench: Any, task: Task) -> list[tuple[int, str, int]]:
    """What a worker that has the task is told of rollouts."""
    handler = bench.queue._handlers[task.kind]
    async with bench.database.reading() as connection:
        spec = (await handler.specify(connection, task)).train
    return [(one.step, one.file.sha256, one.num_rollouts) for one in spec.rollouts]


async def checkpoint(bench: Any, task: Task, step: int) -> None:
    file = await stored(bench, f"state of {step}")
    await bench.queue.commit_checkpoint(checkpoint_of(task, step, [file]))


async def test_what_was_drawn_is_listed_in_order_whatever_the_pages(bench: Any) -> None:
    await create(bench)
    task, _ = await bench.claim()
    wanted = [rollout for step in (1, 2, 3) for rollout in drawn(step, count=5)]
    for step in (1, 2, 3):
        await commit(bench, task, step, drawn(step, count=5))
    assert await all_of(bench) == wanted
    for page_size in (1, 2, 4, 5, 7, 15, 16):
        assert await all_of(bench, page_size=page_size) == wanted
    assert await all_of(bench, step=2) == drawn(2, count=5)
    assert await all_of(bench, step=2, page_size=2) == drawn(2, count=5)
    assert await all_of(bench, step=4) == []


async def test_a_page_ends_before_it_is_too_large_for_a_message(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await create(bench)
    task, _ = await bench.claim()
    for step in (1, 2):
        await commit(bench, task, step)
    wanted = [*drawn(1), *drawn(2)]
    size_bytes = max(one.ByteSize() for one in wanted)
    for most in (1, size_bytes, 3 * size_bytes, 5 * size_bytes):
        monkeypatch.setattr(jobs_servicer, "PAGE_BYTES", most)
        page = await listed(bench)
        assert len(page.rollouts) == 1 or sum(one.ByteSize() for one in page.rollouts) <= most
        assert await all_of(bench) == wanted


async def test_a_job_without_rollouts_lists_none(bench: Any) -> None:
    await bench.create("one")
    assert await listed(bench) == ListRolloutsResponse()


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"step": -1}, InvalidArgument, "step: must be in 0..10000000, got -1"),
        ({"page_size": -1}, InvalidArgument, "page_size: must not be negative"),
        ({"page_token": "x"}, InvalidArgument, "page_token: must be the next_page_token"),
        ({"parent": "projects/default/fineTuningJobs/none"}, NotFound, "does not exist"),
        ({"parent": "projects/default/models/tiny"}, InvalidArgument, "parent"),
    ],
)
async def test_a_bad_list_call_is_refused_by_name(
    bench: Any, changes: dict[str, Any], error: type[Exception], said: str
) -> None:
    await create(bench)
    with pytest.raises(error, match=said):
        await listed(bench, **changes)


async def test_a_token_of_another_step_or_job_is_refused(bench: Any) -> None:
    await create(bench)
    task, _ = await bench.claim()
    await commit(bench, task, 1)
    token = (await listed(bench, page_size=1)).next_page_token
    with pytest.raises(InvalidArgument) as caught:
        await listed(bench, page_token=token, step=1)
    assert caught.value.reason == Reason.PAGE_TOKEN_INVALID
    await bench.cancel(JOB)
    await bench.queue.finish(task.task_id, task.epoch, Outcome(cancelled=True))
    assert await all_of(bench) == drawn(1), "they stay when the job has ended"
    await bench.jobs.delete(JOB, "")
    await create(bench)
    assert await all_of(bench) == [], "those of a job that is deleted are nobody's"
    with pytest.raises(InvalidArgument) as caught:
        await listed(bench, page_token=token)
    assert caught.value.reason == Reason.PAGE_TOKEN_INVALID


async def test_who_resumes_gets_what_was_drawn_after_the_checkpoint(bench: Any) -> None:
    await create(bench)
    task, spec = await bench.claim()
    assert not spec.train.rollouts
    digests = {step: await commit(bench, task, step) for step in (1, 2)}
    await checkpoint(bench, task, 2)
    digests |= {step: await commit(bench, task, step) for step in (3, 4)}
    again = await lost(bench, task)
    assert await told(bench, again) == [(step, digests[step], 4) for step in (3, 4)]


async def test_the_same_again_changes_nothing(bench: Any) -> None:
    await create(bench)
    task, _ = await bench.claim()
    first = await commit(bench, task, 1)
    assert await commit(bench, task, 1) == first
    await checkpoint(bench, task, 1)
    assert await commit(bench, task, 1) == first
    again = await lost(bench, task)
    assert await commit(bench, again, 1) == first
    assert await all_of(bench) == drawn(1)


async def test_a_later_attempt_replaces_what_it_drew_otherwise_and_drops_what_followed(bench: Any) -> None:
    await create(bench)
    task, _ = await bench.claim()
    await commit(bench, task, 1)
    await checkpoint(bench, task, 1)
    gone = [await commit(bench, task, step) for step in (2, 3)]
    again = await lost(bench, task)
    other = await commit(bench, again, 2, drawn(2, "otherwise"))
    assert await told(bench, again) == [(2, other, 4)], (
        "step 3 was drawn from a model that learnt from what is gone"
    )
    assert await all_of(bench) == [*drawn(1), *drawn(2, "otherwise")]
    await collect_later(bench.database, bench.blobs)
    assert [await bench.blobs.has(digest) for digest in (*gone, other)] == [False, False, True]


async def test_what_a_checkpoint_has_learnt_from_never_changes(bench: Any) -> None:
    await create(bench)
    task, _ = await bench.claim()
    for step in (1, 2):
        await commit(bench, task, step)
    await checkpoint(bench, task, 2)
    again = await lost(bench, task)
    for step in (1, 2):
        with pytest.raises(
            FailedPrecondition, match=f"rollouts of step {step} must stay what they are"
        ) as caught:
            await commit(bench, again, step, drawn(step, "otherwise"))
        assert caught.value.reason == Reason.ROLLOUTS_FINAL
        assert "the checkpoint of step 2" in caught.value.message
    assert await all_of(bench) == [*drawn(1), *drawn(2)]


async def test_an_attempt_draws_for_a_step_once(bench: Any) -> None:
    await create(bench)
    task, _ = await bench.claim()
    await commit(bench, task, 1)
    with pytest.raises(FailedPrecondition, match="attempt 1 has committed others") as caught:
        await commit(bench, task, 1, drawn(1, "otherwise"))
    assert caught.value.reason == Reason.ROLLOUTS_FINAL
    assert await all_of(bench) == drawn(1)


async def test_who_commits_what_another_attempt_drew_has_drawn_it_too(bench: Any) -> None:
    await create(bench)
    task, _ = await bench.claim()
    first = await commit(bench, task, 1)
    later = await commit(bench, task, 2)
    again = await lost(bench, task)
    assert await commit(bench, again, 1) == first
    with pytest.raises(FailedPrecondition, match="attempt 2 has committed others"):
        await commit(bench, again, 1, drawn(1, "otherwise"))
    assert [digest for _, digest, _ in await told(bench, again)] == [first, later]


async def test_who_lost_the_lease_commits_nothing(bench: Any) -> None:
    await create(bench)
    task, _ = await bench.claim()
    await lost(bench, task)
    with pytest.raises(FailedPrecondition) as caught:
        await commit(bench, task, 1)
    assert caught.value.reason == Reason.LEASE_LOST
    assert await all_of(bench) == []


async def test_a_file_that_is_not_here_or_holds_another_number_is_refused(bench: Any) -> None:
    await create(bench)
    task, _ = await bench.claim()
    request = await committed(bench, task, 1, drawn(1))
    request.num_rollouts = 3
    with pytest.raises(InvalidArgument, match="file must be a file of 3 rows that ends with their offsets"):
        await bench.queue.commit_rollouts(request)
    request.file.sha256 = "0" * 64
    with pytest.raises(NotFound):
        await bench.queue.commit_rollouts(request)
    assert await all_of(bench) == []


async def test_a_job_of_another_method_has_no_rollouts(bench: Any) -> None:
    await bench.create("one")
    task, _ = await bench.claim()
    with pytest.raises(FailedPrecondition, match=f"{JOB} must be of method reinforcement") as caught:
        await commit(bench, task, 1)
    assert caught.value.reason == Reason.WRONG_STATE


async def test_bytes_stay_while_the_job_is_there_and_go_with_it(bench: Any) -> None:
    await create(bench)
    task, _ = await bench.claim()
    digest = await commit(bench, task, 1)
    await collect_later(bench.database, bench.blobs)
    assert await bench.blobs.has(digest), "the job holds them"
    await bench.cancel(JOB)
    await bench.queue.finish(task.task_id, task.epoch, Outcome(cancelled=True))
    await bench.jobs.delete(JOB, "")
    await collect_later(bench.database, bench.blobs)
    assert await bench.blobs.has(digest), "the job may come back"
    await purge_later(bench.database, PURGED)
    assert await bench.blobs.has(digest), "who reads them still does for a while"
    await collect_later(bench.database, bench.blobs)
    assert not await bench.blobs.has(digest)


async def test_a_job_that_is_not_deleted_keeps_them(bench: Any) -> None:
    await create(bench)
    task, _ = await bench.claim()
    await commit(bench, task, 1)
    with pytest.raises(FailedPrecondition, match="must have ended before it is deleted"):
        await bench.jobs.delete(JOB, "")
    assert await all_of(bench) == drawn(1)
