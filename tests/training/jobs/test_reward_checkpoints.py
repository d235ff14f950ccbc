"""Checkpoints of jobs that make reward models, named by graders as the models that they would be."""

from __future__ import annotations

from typing import Any

import pytest
from tests.training.conftest import adapter_files
from tests.training.jobs.rollouts import create, reinforcement
from tests.training.jobs.test_reward_models import asking, full_files
from tests.work.checkpoints import checkpoint_of

from luthier.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound, Reason
from luthier.v1.fine_tuning_job_pb2 import FullConfig, RewardModelConfig
from luthier.v1.rendering_pb2 import RENDERING_KIND_PREFERENCE
from luthier.work.tasks import Outcome, Task
from luthier.worker.v1 import task_pb2

JOB = "projects/default/fineTuningJobs/judge"
JUDGE = f"{JOB}/checkpoints/step-3"


async def commit(bench: Any, task: Task, step: int, *, full: bool = False) -> None:
    files = await (full_files(bench) if full else adapter_files(bench))
    await bench.queue.commit_checkpoint(checkpoint_of(task, step, files, {}))


async def judging(bench: Any, *, full: bool = False, **changes: Any) -> Task:
    """Begin to train a reward model; return its task, which has the checkpoint JUDGE."""
    bench.add_rendering(kind=RENDERING_KIND_PREFERENCE, stop_token_ids=[7])
    adaptation: dict[str, Any] = {"full": FullConfig()} if full else {}
    await bench.create("judge", reward_model=RewardModelConfig(), **adaptation, **changes)
    task: Task
    task, _ = await bench.claim()
    await commit(bench, task, 3, full=full)
    return task


async def ended(bench: Any, task: Task) -> None:
    result = task_pb2.TaskResult(train=task_pb2.TrainResult(files=await adapter_files(bench), step=5))
    await bench.queue.finish(task.task_id, task.epoch, Outcome(result=result))


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "all weights"])
async def test_the_worker_is_told_of_a_checkpoint_as_of_its_model(bench: Any, full: bool) -> None:
    await judging(bench, full=full)
    job = await create(bench, reinforcement=reinforcement(grader=asking(JUDGE)))
    _, task = await bench.claim()
    (told,) = task.train.reward_models
    assert told.model == JUDGE
    assert list(told.taught.stop_token_ids) == [7]
    base = await bench.models.ready(bench.MODEL)
    paths = [one.path for one in told.files]
    if full:
        assert paths == ["config.json", "model.safetensors"]
        assert (list(told.base_model_files), told.base_model_digest) == ([], "")
    else:
        assert paths == ["adapter_config.json", "adapter_model.safetensors"]
        assert list(told.base_model_files) == list(base.private.files)
        assert told.base_model_digest == base.message.digest
    checkpoint = await bench.jobs.checkpoint(JUDGE)
    reference = job.references[-1]
    seen = await bench.checkpoints.read(JUDGE)
    assert (reference.name, reference.uid) == (JUDGE, checkpoint.uid)
    assert reference.digest == seen.message.digest


async def test_it_is_kept_with_its_job_until_the_one_that_names_it_has_ended(bench: Any) -> None:
    first = await judging(bench, max_checkpoints=1)
    job = await create(bench, reinforcement=reinforcement(grader=asking(JUDGE)))
    second, _ = await bench.claim()
    await commit(bench, first, 4)
    await ended(bench, first)
    assert (await bench.jobs.checkpoint(JUDGE)).step == 3
    with pytest.raises(FailedPrecondition, match=f"is needed by {job.name}, until") as caught:
        await bench.jobs.delete(JOB, "")
    assert caught.value.reason == Reason.RESOURCE_IN_USE
    await ended(bench, second)
    tuned = await bench.model((await bench.job(job.name)).tuned_model)
    assert tuned.references[-1].name == JUDGE
    await bench.jobs.delete(JOB, "")


async def test_its_base_model_is_kept_as_long_too(bench: Any) -> None:
    """A checkpoint of an adapter holds nothing below it, and the job's own base model may be another one."""
    other = "projects/default/models/other"
    await bench.add_model(other)
    await ended(bench, await judging(bench, base_model=other))
    await bench.models.family.delete("projects/default/models/judge", "")
    job = await create(bench, reinforcement=reinforcement(grader=asking(JUDGE)))
    with pytest.raises(FailedPrecondition, match=f"is needed by {job.name}, until"):
        await bench.models.family.delete(other, "")
    await bench.cancel(job.name)
    await bench.models.family.delete(other, "")


async def test_one_that_is_dropped_while_the_job_is_made_is_not_needed_by_it(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = await judging(bench, max_checkpoints=1)
    keep_template = bench.models.keep_template

    async def dropping(taught: Any) -> None:
        await keep_template(taught)
        await commit(bench, task, 4)

    monkeypatch.setattr(bench.models, "keep_template", dropping)
    with pytest.raises(Aborted, match=f"{JUDGE} was deleted meanwhile; call again"):
        await create(bench, reinforcement=reinforcement(grader=asking(JUDGE)))


async def test_a_checkpoint_that_is_not_there_is_not_found(bench: Any) -> None:
    await judging(bench)
    for name in (f"{JOB}/checkpoints/step-4", "projects/default/fineTuningJobs/none/checkpoints/step-3"):
        with pytest.raises(NotFound, match=f"{name} does not exist"):
            await create(bench, reinforcement=reinforcement(grader=asking(name)))


async def test_a_checkpoint_of_another_method_is_refused_with_what_would_be_right(bench: Any) -> None:
    await bench.create("sft")
    task, _ = await bench.claim()
    await commit(bench, task, 3)
    name = "projects/default/fineTuningJobs/sft/checkpoints/step-3"
    with pytest.raises(InvalidArgument) as caught:
        await create(bench, reinforcement=reinforcement(grader=asking(name)))
    (violation,) = caught.value.violations
    assert caught.value.reason == violation.reason == Reason.REWARD_MODEL_EXPECTED
    assert violation.description == (
        f"must be a reward model (kind REWARD) or a checkpoint of one, got {name!r}, of kind ADAPTER; a job of method "
        "reward_model makes one"
    )


async def test_what_it_can_value_is_what_its_base_model_says(bench: Any) -> None:
    other = "projects/default/models/other"
    await bench.add_model(other, context_length=20)
    await judging(bench, base_model=other)
    await create(bench, "fits", reinforcement=reinforcement(grader=asking(JUDGE), max_new_tokens=10))
    with pytest.raises(FailedPrecondition, match=f"at most the 20 tokens of the reward model {JUDGE}"):
        await create(bench, reinforcement=reinforcement(grader=asking(JUDGE), max_new_tokens=11))
