"""Checkpoints seen as the models that they would be, held while others need them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.training import conftest
from tests.training.jobs.test_pages import TOKENS
from tests.training.jobs.test_starts import CONFIG, full_files
from tests.work.checkpoints import checkpoint_of

from luthier.errors import FailedPrecondition, InvalidArgument, NotFound, OutOfRange
from luthier.runtime.digests import files_digest
from luthier.training.models.servicer import ModelServicer
from luthier.v1.fine_tuning_job_pb2 import FullConfig
from luthier.v1.model_pb2 import Model
from luthier.v1.model_service_pb2 import DownloadModelFileRequest, GetModelRequest, ListModelFilesRequest
from luthier.work.hold_servicer import Holdable
from luthier.work.holds import Holds
from luthier.work.tasks import Outcome
from luthier.worker.v1 import task_pb2

JOB = "projects/default/fineTuningJobs/one"
CONTEXT: Any = None


@pytest.fixture
def models(bench: Any) -> ModelServicer:
    return ModelServicer(bench.models, bench.making, bench.checkpoints, TOKENS)


async def commit(bench: Any, task: Any, step: int, files: list[task_pb2.BlobFile], **metrics: float) -> None:
    state = await conftest.stored(bench, f"state {step}", "trainer_state.json")
    await bench.queue.commit_checkpoint(checkpoint_of(task, step, [*files, state], metrics))


async def adapter_of(bench: Any, step: int) -> list[task_pb2.BlobFile]:
    return [
        await conftest.stored(bench, json.dumps(CONFIG), "adapter_config.json"),
        await conftest.stored(bench, f"factors {step}", "adapter_model.safetensors"),
    ]


async def test_a_checkpoint_of_a_running_job_is_read_and_downloaded_as_its_model(
    bench: Any, models: ModelServicer
) -> None:
    bench.add_rendering(effective_chat_template="{{ messages }}", stop_token_ids=[7])
    job = await bench.create("one")
    task, _ = await bench.claim()
    await commit(bench, task, 3, await adapter_of(bench, 3))
    name = f"{JOB}/checkpoints/step-3"
    model = await models.GetModel(GetModelRequest(name=name), CONTEXT)
    assert (model.name, model.kind, model.state) == (name, Model.KIND_ADAPTER, Model.STATE_READY)
    assert model.uid == (await bench.jobs.checkpoint(name)).uid
    assert (model.base_model, model.fine_tuning_job, model.step) == (bench.MODEL, JOB, 3)
    assert (model.taught.chat_template, list(model.taught.stop_token_ids)) == ("{{ messages }}", [7])
    files = (await models.ListModelFiles(ListModelFilesRequest(parent=name), CONTEXT)).files
    assert [file.path for file in files] == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
    ], "not what only a resume needs"
    assert model.digest == files_digest({file.path: file.sha256 for file in files})
    request = DownloadModelFileRequest(name=name, path="adapter_model.safetensors", start_offset=8)
    assert [part.data async for part in models.DownloadModelFile(request, CONTEXT)] == [b"3"]
    # The job's own model is the same but for its name and uid.
    result = task_pb2.TaskResult(train=task_pb2.TrainResult(files=await adapter_of(bench, 3), step=3))
    await bench.queue.finish(task.task_id, task.epoch, Outcome(result=result))
    tuned = await bench.model((await bench.job(job.name)).tuned_model)
    for told in ("name", "uid", "create_time", "update_time", "etag"):
        tuned.ClearField(told)
        model.ClearField(told)
    assert model == tuned


async def test_a_checkpoint_of_all_weights_is_a_model_with_all_its_weights(
    bench: Any, models: ModelServicer
) -> None:
    await bench.create("one", full=FullConfig())
    task, _ = await bench.claim()
    masters = await conftest.stored(bench, "masters", "masters.safetensors")
    await commit(bench, task, 3, [*await full_files(bench), masters])
    name = f"{JOB}/checkpoints/step-3"
    model = await models.GetModel(GetModelRequest(name=name), CONTEXT)
    assert (model.kind, model.base_model, model.architecture) == (
        Model.KIND_WEIGHTS,
        "",
        "LlamaForCausalLM",
    )
    files = (await models.ListModelFiles(ListModelFilesRequest(parent=name), CONTEXT)).files
    assert [file.path for file in files] == ["config.json", "model.safetensors", "tokenizer.json"]


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        (f"{JOB}/checkpoints/step-4", NotFound, "step-4 does not exist"),
        ("projects/default/fineTuningJobs/none/checkpoints/step-3", NotFound, "step-3 does not exist"),
        (f"{JOB}/checkpoints/Step", InvalidArgument, r"fineTuningJobs/\{fine_tuning_job\}/checkpoints/"),
        (JOB, InvalidArgument, r"must be projects/\{project\}/models/\{model\}"),
    ],
)
async def test_what_is_no_checkpoint_is_refused(
    bench: Any, models: ModelServicer, name: str, kind: type[Exception], message: str
) -> None:
    await bench.create("one")
    task, _ = await bench.claim()
    await commit(bench, task, 3, await adapter_of(bench, 3))
    with pytest.raises(kind, match=message):
        await models.GetModel(GetModelRequest(name=name), CONTEXT)
    with pytest.raises(kind, match=message):
        await models.ListModelFiles(ListModelFilesRequest(parent=name), CONTEXT)


async def test_a_part_that_a_checkpoint_lacks_is_refused(bench: Any, models: ModelServicer) -> None:
    await bench.create("one")
    task, _ = await bench.claim()
    await commit(bench, task, 3, await adapter_of(bench, 3))
    name = f"{JOB}/checkpoints/step-3"
    with pytest.raises(NotFound, match=r"has no file 'trainer_state\.json'"):
        await anext(
            models.DownloadModelFile(DownloadModelFileRequest(name=name, path="trainer_state.json"), CONTEXT)
        )
    request = DownloadModelFileRequest(name=name, path="adapter_model.safetensors", start_offset=10)
    with pytest.raises(OutOfRange, match=r"must be in 0\.\.9, got 10"):
        await anext(models.DownloadModelFile(request, CONTEXT))


async def test_a_held_checkpoint_is_kept_while_its_job_goes_on_and_holds_its_job(bench: Any) -> None:
    """As long as an evaluation at another service asks it."""
    await bench.create("one", max_checkpoints=1)
    task, _ = await bench.claim()
    await commit(bench, task, 1, await adapter_of(bench, 1))
    keeper: Holdable = bench.checkpoints
    holds = Holds()
    async with bench.database.transaction() as connection:
        found = await keeper.find(connection, f"{JOB}/checkpoints/step-1")
        assert found is not None
        assert await keeper.find(connection, f"{JOB}/checkpoints/step-2") is None
        await holds.set(connection, found.uid, "h", "projects/default/evaluations/e", 60.0)

    async def steps() -> list[int]:
        uid = (await bench.jobs.family.read(JOB)).uid
        return [point.step for point in await bench.jobs.checkpoints(uid, 0, 10)]

    await commit(bench, task, 2, await adapter_of(bench, 2))
    assert await steps() == [1, 2]
    await bench.cancel(JOB)
    await bench.queue.finish(task.task_id, task.epoch, Outcome(cancelled=True))
    with pytest.raises(FailedPrecondition, match="is needed by projects/default/evaluations/e"):
        await bench.jobs.delete(JOB, "")
    async with bench.database.transaction() as connection:
        await holds.release(connection, "h")
    await bench.jobs.delete(JOB, "")


async def test_a_checkpoint_is_dropped_once_nobody_holds_it(bench: Any) -> None:
    await bench.create("one", max_checkpoints=1)
    task, _ = await bench.claim()
    await commit(bench, task, 1, await adapter_of(bench, 1))
    second = await bench.create("two", base_model="", start_from=f"{JOB}/checkpoints/step-1")
    await commit(bench, task, 2, await adapter_of(bench, 2))
    assert (await bench.jobs.checkpoint(f"{JOB}/checkpoints/step-1")).step == 1
    await bench.cancel(second.name)
    await commit(bench, task, 3, await adapter_of(bench, 3))
    with pytest.raises(NotFound):
        await bench.jobs.checkpoint(f"{JOB}/checkpoints/step-1")
