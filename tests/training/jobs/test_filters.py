"""Filters that name a resource find what was made from the one that has the name now."""

from __future__ import annotations

from typing import Any

import pytest
from tests.training.conftest import stored

from luthier.errors import InvalidArgument, NotFound, Reason, Unavailable
from luthier.runtime.paging import PageTokens
from luthier.v1.model_service_pb2 import ListModelsRequest
from luthier.v1.training_service_pb2 import ListFineTuningJobsRequest
from luthier.work.tasks import Outcome
from luthier.worker.v1.task_pb2 import TaskResult, TrainResult

TOKENS = PageTokens(b"0123456789abcdef")
JOB = "projects/default/fineTuningJobs/one"


async def trained(bench: Any, job_id: str, **changes: Any) -> Any:
    """A job that SUCCEEDED; its model is called as it is, or otherwise where that name is taken."""
    await bench.create(job_id, **changes)
    task, _ = await bench.claim()
    files = [
        await stored(bench, "{}", "adapter_config.json"),
        await stored(bench, f"weights of {job_id}", "adapter_model.safetensors"),
    ]
    result = TaskResult(train=TrainResult(step=1, files=files))
    await bench.queue.finish(task.task_id, task.epoch, Outcome(result=result))
    return await bench.job(f"projects/default/fineTuningJobs/{job_id}")


async def models(bench: Any, **fields: Any) -> list[str]:
    page, _ = await bench.models.list_page(ListModelsRequest(parent=bench.PARENT, **fields), TOKENS)
    return [one.name.rpartition("/")[2] for one in page]


async def jobs(bench: Any, **fields: Any) -> list[str]:
    page, _ = await bench.jobs.list_page(ListFineTuningJobsRequest(parent=bench.PARENT, **fields), TOKENS)
    return [one.name.rpartition("/")[2] for one in page]


async def test_models_of_a_deleted_job_are_not_those_of_the_new_one_of_its_name(bench: Any) -> None:
    wanted = {"filter": f"fine_tuning_job = {JOB}"}
    await trained(bench, "one", tuned_model_id="old")
    assert await models(bench, **wanted) == ["old"]
    await bench.jobs.family.delete(JOB, "")
    assert await models(bench, **wanted) == ["old"], "while none has the name, any that had it is meant"
    await bench.create("one", tuned_model_id="new")
    assert await models(bench, **wanted) == [], "the job of now has tuned nothing yet"
    await bench.cancel(JOB)
    await bench.jobs.family.delete(JOB, "")
    await trained(bench, "one", tuned_model_id="new")
    assert await models(bench, **wanted) == ["new"]
    assert await models(bench, filter=f"fine_tuning_job = {JOB} AND state = READY") == ["new"]


async def test_what_stands_on_a_deleted_model_does_not_stand_on_the_new_one_of_its_name(bench: Any) -> None:
    wanted = {"filter": f"base_model = {bench.MODEL}"}
    await trained(bench, "one", tuned_model_id="old")
    assert (await models(bench, **wanted), await jobs(bench, **wanted)) == (["old"], ["one"])
    await bench.models.family.delete("projects/default/models/old", "")
    await bench.models.family.delete(bench.MODEL, "")
    assert (await models(bench, **wanted), await jobs(bench, **wanted)) == ([], ["one"])
    await bench.add_model(digest="e" * 64)
    assert await jobs(bench, **wanted) == []
    await trained(bench, "two", tuned_model_id="new")
    assert (await models(bench, **wanted), await jobs(bench, **wanted)) == (["new"], ["two"])


async def test_jobs_of_a_deleted_rendering_are_not_those_of_the_new_one_of_its_name(bench: Any) -> None:
    wanted = {"filter": f"rendering = {bench.RENDERING}"}
    bench.add_rendering(uid="first")
    await bench.create("one")
    assert await jobs(bench, **wanted) == ["one"]
    bench.add_rendering(uid="second", digest="s" * 64)
    assert await jobs(bench, **wanted) == []
    await bench.create("two")
    assert await jobs(bench, **wanted) == ["two"]
    del bench.renderings.views[bench.RENDERING]
    assert await jobs(bench, **wanted) == ["two", "one"]


async def test_jobs_of_before_uids_were_kept_are_found_by_what_was_rendered(bench: Any) -> None:
    wanted = {"filter": f"rendering = {bench.RENDERING}"}
    await bench.create("one")  # of a rendering without a uid, as the migration left them
    bench.add_rendering(uid="first")
    assert await jobs(bench, **wanted) == ["one"]
    bench.add_rendering(uid="second", digest="s" * 64)
    assert await jobs(bench, **wanted) == []


async def test_a_token_does_not_lead_from_what_a_name_meant_to_what_it_means(bench: Any) -> None:
    request = ListFineTuningJobsRequest(
        parent=bench.PARENT, filter=f"rendering = {bench.RENDERING}", page_size=1
    )
    bench.add_rendering(uid="first")
    for job_id in ("one", "two"):
        await bench.create(job_id)
    _, request.page_token = await bench.jobs.list_page(request, TOKENS)
    page, _ = await bench.jobs.list_page(request, TOKENS)
    assert [one.name for one in page] == [JOB]
    bench.add_rendering(uid="second", digest="s" * 64)
    with pytest.raises(InvalidArgument) as caught:
        await bench.jobs.list_page(request, TOKENS)
    assert caught.value.reason == Reason.PAGE_TOKEN_INVALID


async def test_a_rendering_that_cannot_be_asked_for_is_not_passed_over(bench: Any) -> None:
    async def away(name: str) -> Any:
        raise Unavailable("the Data service is away")

    bench.renderings.get = away
    with pytest.raises(Unavailable):
        await jobs(bench, filter=f"rendering = {bench.RENDERING}")
    with pytest.raises(InvalidArgument, match="filter: must be projects/"):
        await jobs(bench, filter="rendering = projects/default/models/m")
    assert await jobs(bench, filter="rendering = projects/other/renderings/r") == [], (
        "nothing is of elsewhere"
    )


async def test_nobody_is_asked_about_names_of_other_projects(bench: Any) -> None:
    asked: list[str] = []

    async def get(name: str) -> Any:
        asked.append(name)
        raise NotFound("none")

    bench.renderings.get = get
    await jobs(bench, filter="rendering = projects/other/renderings/r")
    assert asked == []
    await jobs(bench, filter=f"rendering = {bench.RENDERING}")
    assert asked == [bench.RENDERING]
