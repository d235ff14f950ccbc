"""Reward models that graders name: what is refused and why, what holds them, what the worker is told."""

from __future__ import annotations

from typing import Any

import pytest
from tests.training.conftest import adapter_files, stored
from tests.training.jobs.rollouts import GRADER, create, reinforcement

from luthier.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound, Reason
from luthier.v1.fine_tuning_job_pb2 import FineTuningJob, FullConfig, RewardModelConfig
from luthier.v1.grader_pb2 import Grader, MultiGrader, RewardModelGrader
from luthier.v1.model_pb2 import Model
from luthier.v1.rendering_pb2 import RENDERING_KIND_PREFERENCE, RENDERING_KIND_PROMPT
from luthier.work.tasks import Outcome
from luthier.worker.v1 import task_pb2

MODELS = "projects/default/models"
JUDGE = f"{MODELS}/judge"
FIELD = "fine_tuning_job.reinforcement.grader"


def asking(*names: str) -> Grader:
    """A grader that asks reward models: one of them alone, several in a multi grader."""
    graders = {
        f"g{number}": Grader(reward_model=RewardModelGrader(model=name)) for number, name in enumerate(names)
    }
    if len(names) == 1:
        return graders["g0"]
    return Grader(multi=MultiGrader(graders=graders, calculate_output="+".join(graders)))


async def full_files(bench: Any) -> list[task_pb2.BlobFile]:
    return [await stored(bench, "{}", "config.json"), await stored(bench, "all", "model.safetensors")]


async def trained(bench: Any, job_id: str, **changes: Any) -> Model:
    """Create a job of another method, let a worker bring its files, and return its model."""
    files = await (full_files(bench) if "full" in changes else adapter_files(bench))
    job = await bench.create(job_id, **changes)
    task, _ = await bench.claim()
    result = task_pb2.TaskResult(train=task_pb2.TrainResult(files=files, step=5))
    await bench.queue.finish(task.task_id, task.epoch, Outcome(result=result))
    model: Model = await bench.model((await bench.job(job.name)).tuned_model)
    return model


async def judge(bench: Any, job_id: str = "judge", **changes: Any) -> Model:
    bench.add_rendering(kind=RENDERING_KIND_PREFERENCE, **changes.pop("rendering_changes", {}))
    return await trained(bench, job_id, reward_model=RewardModelConfig(), **changes)


async def ended(bench: Any) -> None:
    """Let the job that is claimed next end."""
    task, _ = await bench.claim()
    result = task_pb2.TaskResult(train=task_pb2.TrainResult(files=await adapter_files(bench), step=5))
    await bench.queue.finish(task.task_id, task.epoch, Outcome(result=result))


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "all weights"])
async def test_the_worker_is_told_of_each_reward_model_once(bench: Any, full: bool) -> None:
    changes: dict[str, Any] = {"full": FullConfig()} if full else {}
    model = await judge(bench, rendering_changes={"stop_token_ids": [7]}, **changes)
    assert model.kind == Model.KIND_REWARD
    job = await create(bench, reinforcement=reinforcement(grader=asking(JUDGE, JUDGE)))
    _, task = await bench.claim()
    (told,) = task.train.reward_models
    assert told.model == JUDGE
    assert told.taught == model.taught
    assert list(told.taught.stop_token_ids) == [7]
    paths = [one.path for one in told.files]
    base = await bench.models.ready(bench.MODEL)
    if full:
        assert paths == ["config.json", "model.safetensors"]
        assert (list(told.base_model_files), told.base_model_digest) == ([], "")
    else:
        assert paths == ["adapter_config.json", "adapter_model.safetensors"]
        assert list(told.base_model_files) == list(base.private.files)
        assert told.base_model_digest == base.message.digest == task.train.base_model_digest
    assert [(one.name, one.uid, one.digest) for one in job.references][-1] == (JUDGE, model.uid, model.digest)
    assert [one.name for one in job.references] == [bench.MODEL, bench.RENDERING, JUDGE]


async def test_a_job_without_one_tells_of_none(bench: Any) -> None:
    await judge(bench)
    job = await create(bench)
    _, task = await bench.claim()
    assert list(task.train.reward_models) == []
    assert [one.name for one in job.references] == [bench.MODEL, bench.RENDERING]


async def test_a_reward_model_stays_until_the_job_has_ended_and_is_in_the_lineage(bench: Any) -> None:
    model = await judge(bench)
    job = await create(bench, reinforcement=reinforcement(grader=asking(JUDGE)))
    with pytest.raises(FailedPrecondition, match=f"is needed by {job.name}, until") as caught:
        await bench.models.family.delete(JUDGE, "")
    assert caught.value.reason == Reason.RESOURCE_IN_USE
    await ended(bench)
    done = await bench.job(job.name)
    assert done.state == FineTuningJob.STATE_SUCCEEDED
    tuned = await bench.model(done.tuned_model)
    assert [(one.name, one.uid) for one in tuned.references][-1] == (JUDGE, model.uid)
    assert (await bench.models.family.delete(JUDGE, "")).HasField("delete_time")


async def test_a_job_that_is_cancelled_needs_it_no_longer(bench: Any) -> None:
    await judge(bench)
    job = await create(bench, reinforcement=reinforcement(grader=asking(JUDGE)))
    await bench.cancel(job.name)
    assert (await bench.models.family.delete(JUDGE, "")).HasField("delete_time")


async def test_a_model_of_another_kind_is_refused_with_what_would_be_right(bench: Any) -> None:
    await trained(bench, "sft")
    await trained(bench, "whole", full=FullConfig())
    for name, kind in ((bench.MODEL, "BASE"), (f"{MODELS}/sft", "ADAPTER"), (f"{MODELS}/whole", "WEIGHTS")):
        with pytest.raises(InvalidArgument) as caught:
            await create(bench, reinforcement=reinforcement(grader=asking(name)))
        (violation,) = caught.value.violations
        assert caught.value.reason == violation.reason == Reason.REWARD_MODEL_EXPECTED
        assert violation.field == f"{FIELD}.reward_model.model"
        assert violation.description == (
            f"must be a reward model (kind REWARD) or a checkpoint of one, got {name!r}, of kind {kind}; a job of "
            "method reward_model makes one"
        )


@pytest.mark.parametrize(
    ("named", "kind", "reason", "message"),
    [
        ("", InvalidArgument, Reason.FIELD_REQUIRED, "must name a reward model, got nothing"),
        (
            "judge",
            InvalidArgument,
            Reason.INVALID_FIELD,
            "must be projects/{project}/models/{model}, each id",
        ),
        (
            "projects/default/fineTuningJobs/judge/checkpoints/Step",
            InvalidArgument,
            Reason.INVALID_FIELD,
            "must be projects/{project}/fineTuningJobs/{fine_tuning_job}/checkpoints/{checkpoint}, each id",
        ),
    ],
)
async def test_what_is_no_name_of_a_model_is_refused_by_field(
    bench: Any, named: str, kind: type[InvalidArgument], reason: Reason, message: str
) -> None:
    await judge(bench)
    with pytest.raises(kind) as caught:
        await create(bench, reinforcement=reinforcement(grader=asking(JUDGE, named)))
    (violation,) = caught.value.violations
    assert violation.field == f"{FIELD}.multi.graders['g1'].reward_model.model"
    assert caught.value.reason == reason
    assert violation.description.startswith(message)


async def test_one_that_is_not_there_is_not_found(bench: Any) -> None:
    await judge(bench)
    await bench.models.family.delete(JUDGE, "")
    for name in (JUDGE, f"{MODELS}/never"):
        with pytest.raises(NotFound, match=f"{name} does not exist"):
            await create(bench, reinforcement=reinforcement(grader=asking(name)))


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "all weights"])
async def test_a_reward_model_of_another_tokenizer_is_refused_by_both_digests(bench: Any, full: bool) -> None:
    second = f"{MODELS}/second"
    await bench.add_model(second, tokenizer_digest="s" * 64)
    changes: dict[str, Any] = {"full": FullConfig()} if full else {}
    await judge(bench, rendering_changes={"tokenizer_digest": "s" * 64}, base_model=second, **changes)
    with pytest.raises(FailedPrecondition) as caught:
        await create(bench, reinforcement=reinforcement(grader=asking(JUDGE)))
    assert caught.value.reason == Reason.TOKENIZER_MISMATCH
    assert caught.value.message == (
        f"{JUDGE} must have been taught with the tokenizer of {bench.MODEL} (digest {'t' * 64}), whose tokens it is to "
        f"value, it was taught with digest {'s' * 64}; train a reward model on a rendering for this model"
    )
    assert caught.value.metadata["tokenizer_digest"] == "s" * 64
    assert caught.value.metadata["expected"] == "t" * 64


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "all weights"])
async def test_the_longest_prompt_and_its_answer_fit_the_reward_model(bench: Any, full: bool) -> None:
    second = f"{MODELS}/second"
    await bench.add_model(second, context_length=20)
    changes: dict[str, Any] = {"full": FullConfig()} if full else {}
    await judge(bench, base_model=second, **changes)
    await create(bench, "fits", reinforcement=reinforcement(grader=asking(JUDGE), max_new_tokens=10))
    with pytest.raises(FailedPrecondition) as caught:
        await create(bench, reinforcement=reinforcement(grader=asking(JUDGE), max_new_tokens=11))
    assert caught.value.reason == Reason.SEQUENCE_TOO_LONG
    assert caught.value.message == (
        f"prompts and their answers must have at most the 20 tokens of the reward model {JUDGE}, the longest prompt "
        "has 10 and its answer may have 11; set a smaller max_new_tokens, or create the rendering with a smaller "
        "max_tokens"
    )


async def test_a_plan_tells_of_a_template_that_the_reward_model_has_not_seen(bench: Any) -> None:
    await judge(bench, rendering_changes={"effective_chat_template": "{{ old }}"})
    wanted = {"reinforcement": reinforcement(grader=asking(JUDGE))}
    for template, is_told in (("{{ old }}", False), ("{{ new }}", True)):
        bench.add_rendering(kind=RENDERING_KIND_PROMPT, effective_chat_template=template)
        told = [text for text in (await bench.plan(**wanted)).warnings if "reward model" in text]
        assert told == (
            [
                f"the reward model {JUDGE} was taught by another chat template, or other dates in it, than wrote the "
                f"prompts of {bench.RENDERING}: it values conversations as it has not seen them written"
            ]
            if is_told
            else []
        )


async def test_one_that_is_deleted_while_the_job_is_made_is_not_needed_by_it(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await judge(bench)
    keep_template = bench.models.keep_template

    async def deleting(taught: Any) -> None:
        await keep_template(taught)
        await bench.models.family.delete(JUDGE, "")

    monkeypatch.setattr(bench.models, "keep_template", deleting)
    with pytest.raises(Aborted, match=f"{JUDGE} was deleted meanwhile; call again"):
        await create(bench, reinforcement=reinforcement(grader=asking(JUDGE)))
    with pytest.raises(NotFound):
        await bench.job("projects/default/fineTuningJobs/one")


async def test_a_grader_of_another_kind_needs_none(bench: Any) -> None:
    assert (await create(bench)).reinforcement.grader == GRADER
