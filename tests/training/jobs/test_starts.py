"""What jobs begin from, and all weights in place of an adapter: what is refused, what is taken over."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.training import conftest
from tests.work.checkpoints import checkpoint_of

from luthier.errors import FailedPrecondition, InvalidArgument, LuthierError, NotFound, Reason
from luthier.v1.fine_tuning_job_pb2 import (
    SHARDING_FSDP2,
    FineTuningJob,
    FullConfig,
    Hyperparameters,
    LoraConfig,
    RewardModelConfig,
)
from luthier.v1.model_pb2 import Model, Taught
from luthier.work.tasks import Outcome
from luthier.worker.v1 import task_pb2

CONFIG = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
    "use_rslora": True,
    "lora_dropout": 0.25,
    "rank_pattern": {"v_proj": 2},
    "alpha_pattern": {"q_proj": 16},
    "modules_to_save": ["embed_tokens", "lm_head"],
    "peft_type": "LORA",
}
LORA = LoraConfig(
    rank=4,
    alpha=8,
    target_modules=["q_proj", "v_proj"],
    use_rslora=True,
    rank_pattern={"v_proj": 2},
    alpha_pattern={"q_proj": 16},
    trained_modules=["embed_tokens", "lm_head"],
)
ADAPTER = "projects/default/models/adapter"
WEIGHTS = "projects/default/models/weights"
ONE = "projects/default/fineTuningJobs/one"


async def adapter_files(bench: Any) -> list[task_pb2.BlobFile]:
    return await conftest.adapter_files(bench, json.dumps(CONFIG))


async def full_files(bench: Any) -> list[task_pb2.BlobFile]:
    return [
        await conftest.stored(bench, "{}", "config.json"),
        await conftest.stored(bench, "tuned", "model.safetensors"),
    ]


async def run(bench: Any, job_id: str, files: list[task_pb2.BlobFile], **changes: Any) -> FineTuningJob:
    """Create a job and let a worker bring its files, as a checkpoint and as its result."""
    job = await bench.create(job_id, **changes)
    task, _ = await bench.claim()
    await bench.queue.commit_checkpoint(checkpoint_of(task, 5, files, {}))
    result = task_pb2.TaskResult(train=task_pb2.TrainResult(files=files, step=5))
    await bench.queue.finish(task.task_id, task.epoch, Outcome(result=result))
    ended: FineTuningJob = await bench.job(job.name)
    assert ended.state == FineTuningJob.STATE_SUCCEEDED, ended.error
    return ended


async def test_all_weights_are_a_model_of_their_own(bench: Any) -> None:
    bench.add_rendering(
        chat_template="{{ messages }}", effective_chat_template="{{ messages }}", stop_token_ids=[7]
    )
    job = await run(bench, "one", await full_files(bench), full=FullConfig(), tuned_model_id="weights")
    assert job.hyperparameters.learning_rate == 2e-5
    assert job.WhichOneof("adaptation") == "full"
    stored_model = await bench.models.ready(WEIGHTS)
    model = stored_model.message
    assert (model.kind, model.base_model, model.start_from) == (Model.KIND_WEIGHTS, "", bench.MODEL)
    assert (model.fine_tuning_job, model.step) == (ONE, 5)
    assert (model.architecture, model.context_length) == ("LlamaForCausalLM", 64)
    assert model.taught.chat_template == "{{ messages }}"
    assert [one.path for one in stored_model.private.files] == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    base = await bench.models.ready(bench.MODEL)
    weights = {one.path: one.sha256 for one in stored_model.private.files}["model.safetensors"]
    assert weights not in {one.sha256 for one in base.private.files}
    assert [one.name for one in model.references] == [bench.MODEL, ONE, bench.RENDERING]
    # It needs its base no longer, as an adapter would; the checkpoints of its job do.
    with pytest.raises(FailedPrecondition, match=f"is needed by {ONE}, until"):
        await bench.models.family.delete(bench.MODEL, "")
    await bench.jobs.delete(ONE, "")
    deleted = await bench.models.family.delete(bench.MODEL, "")
    assert deleted.HasField("delete_time")


async def test_tuned_weights_keep_a_template_of_their_base_whose_dates_were_written_in(bench: Any) -> None:
    """With another file in its place no rendering of the base would fit them."""
    bench.add_rendering(effective_chat_template="Today is 28 Nov 2026. {{ messages }}")
    await run(bench, "one", await full_files(bench), full=FullConfig(), tuned_model_id="weights")
    found = await bench.models.ready(WEIGHTS)
    base = await bench.models.ready(bench.MODEL)
    assert found.message.taught.chat_template.startswith("Today is")
    tokenizer = [(one.path, one.sha256) for one in found.private.files if one.tokenizer]
    assert tokenizer == [(one.path, one.sha256) for one in base.private.files if one.tokenizer]


async def test_a_job_builds_on_tuned_weights_as_on_a_base_model(bench: Any) -> None:
    await run(bench, "one", await full_files(bench), full=FullConfig(), tuned_model_id="weights")
    model = await bench.model(WEIGHTS)
    bench.add_rendering(tokenizer_digest=model.tokenizer_digest)
    for changes in ({"base_model": WEIGHTS}, {"base_model": "", "start_from": WEIGHTS}):
        job = (await bench.plan(**changes)).resolved_job
        assert (job.base_model, job.WhichOneof("adaptation"), job.lora.rank) == (WEIGHTS, "lora", 16)
    tuned = await run(bench, "two", await adapter_files(bench), base_model="", start_from=WEIGHTS)
    assert tuned.base_model == WEIGHTS
    assert [one.name for one in tuned.references][:2] == [WEIGHTS, bench.RENDERING]


@pytest.mark.parametrize(
    "lora",
    [None, LORA, LoraConfig(), LoraConfig(rank=4), LoraConfig(target_modules=["v_proj", "q_proj"])],
)
async def test_an_adapter_is_gone_on_with_as_it_is(bench: Any, lora: LoraConfig | None) -> None:
    await run(bench, "one", await adapter_files(bench), tuned_model_id="adapter")
    job = await bench.create("two", base_model="", start_from=ADAPTER, lora=lora)
    assert (job.base_model, job.start_from, job.lora) == (bench.MODEL, ADAPTER, LORA)
    assert [one.name for one in job.references] == [bench.MODEL, ADAPTER, bench.RENDERING]
    _, spec = await bench.claim()
    assert [one.path for one in spec.train.start_files] == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    with pytest.raises(FailedPrecondition, match="is needed by projects/default/fineTuningJobs/two"):
        await bench.models.family.delete(ADAPTER, "")


async def test_an_adapter_is_gone_on_with_by_a_dropout_of_the_job(bench: Any) -> None:
    """It says how an adapter is trained, not what it is: what its own job dropped is not taken over."""
    await run(bench, "one", await adapter_files(bench), tuned_model_id="adapter")
    job = await bench.create("two", base_model="", start_from=ADAPTER, lora=LoraConfig(dropout=0.1))
    assert (job.lora.dropout, job.lora.rank) == (0.1, 4)
    plain = await bench.create("three", base_model="", start_from=ADAPTER)
    assert plain.lora.dropout == 0


async def test_the_models_of_a_row_of_jobs_say_what_they_began_from(bench: Any) -> None:
    await run(bench, "one", await adapter_files(bench), tuned_model_id="adapter")
    second = await run(bench, "two", await adapter_files(bench), base_model="", start_from=ADAPTER)
    model = await bench.model(second.tuned_model)
    assert (model.base_model, model.start_from) == (bench.MODEL, ADAPTER)
    assert [one.name for one in model.references] == [
        bench.MODEL,
        ADAPTER,
        "projects/default/fineTuningJobs/two",
        bench.RENDERING,
    ]
    private = (await bench.jobs.family.read(second.name)).private
    assert not private.start_files, "who has ended needs no bytes"
    deleted = await bench.models.family.delete(ADAPTER, "")
    assert deleted.HasField("delete_time")


async def test_a_checkpoint_is_gone_on_with_and_its_job_stays_meanwhile(bench: Any) -> None:
    await run(bench, "one", await adapter_files(bench))
    start = f"{ONE}/checkpoints/step-5"
    job = await bench.create("two", base_model="", start_from=start)
    assert (job.base_model, job.lora) == (bench.MODEL, LORA)
    with pytest.raises(FailedPrecondition, match="is needed by projects/default/fineTuningJobs/two"):
        await bench.jobs.delete(ONE, "")
    await bench.cancel(job.name)
    await bench.jobs.delete(ONE, "")


async def test_a_checkpoint_of_all_weights_is_gone_on_with_by_all_weights(bench: Any) -> None:
    await run(bench, "one", await full_files(bench), full=FullConfig())
    start = f"{ONE}/checkpoints/step-5"
    job = await bench.create("two", base_model="", start_from=start)
    assert (job.WhichOneof("adaptation"), job.hyperparameters.learning_rate) == ("full", 2e-5)
    _, spec = await bench.claim()
    assert [one.path for one in spec.train.start_files] == ["config.json", "model.safetensors"]
    with pytest.raises(InvalidArgument, match=r"lora: must be unset: .*/step-5 holds all weights") as caught:
        await bench.create("three", base_model="", start_from=start, lora=LoraConfig(rank=4))
    assert caught.value.reason == Reason.INVALID_FIELD


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"start_from": "projects/default/models/none"}, NotFound, "models/none does not exist"),
        ({"start_from": f"{ONE}/checkpoints/step-7"}, NotFound, "step-7 does not exist"),
        ({"start_from": "adapter"}, InvalidArgument, r"start_from: must be projects/\{project\}/models"),
        (
            {"start_from": ADAPTER, "base_model": "projects/default/models/second"},
            InvalidArgument,
            r"base_model: must be projects/default/models/tiny, the base model of .*/adapter, or unset; got",
        ),
        (
            {"start_from": ADAPTER, "full": FullConfig()},
            InvalidArgument,
            "full: must be unset: .* is an adapter",
        ),
        (
            {"start_from": ADAPTER, "lora": LoraConfig(rank=8)},
            InvalidArgument,
            r"lora\.rank: must be unset or what the adapter has that is gone on with, 4; got 8",
        ),
        (
            {"start_from": ADAPTER, "lora": LoraConfig(alpha=1, target_modules=["q_proj"])},
            InvalidArgument,
            r"lora\.alpha: .*, 8\.0; got 1\.0; .*lora\.target_modules: .*, \['q_proj', 'v_proj'\]; got \['q_proj'\]",
        ),
        (
            {"start_from": ADAPTER, "lora": LoraConfig(rank_pattern={"v_proj": 2, "q_proj": 2})},
            InvalidArgument,
            r"lora\.rank_pattern: .*, \{'v_proj': 2\}; got \{'q_proj': 2, 'v_proj': 2\}",
        ),
        (
            {"start_from": ADAPTER, "lora": LoraConfig(trained_modules=["lm_head"])},
            InvalidArgument,
            r"lora\.trained_modules: .*, \['embed_tokens', 'lm_head'\]; got \['lm_head'\]",
        ),
        (
            {"start_from": ADAPTER, "reward_model": RewardModelConfig()},
            InvalidArgument,
            "start_from: must be an adapter that trains no lm_head: a reward model has none, and .*/adapter brings one",
        ),
        (
            {"start_from": ADAPTER, "sharding": SHARDING_FSDP2},
            InvalidArgument,
            "must be an adapter that trains no module whole with sharding SHARDING_FSDP2, .*/adapter trains",
        ),
        ({"base_model": "", "start_from": ""}, InvalidArgument, "must name a base model, or start_from"),
        (
            {"base_model": ADAPTER},
            InvalidArgument,
            "must be a model with all its weights.*start_from goes on",
        ),
    ],
)
async def test_what_cannot_be_begun_from_is_refused_by_name(
    bench: Any, change: dict[str, Any], kind: type[LuthierError], message: str
) -> None:
    await run(bench, "one", await adapter_files(bench), tuned_model_id="adapter")
    await bench.add_model("projects/default/models/second")
    with pytest.raises(kind, match=message):
        await bench.create("two", **{"base_model": "", **change})


async def test_a_base_model_of_the_same_name_is_not_the_one_that_was_tuned(bench: Any) -> None:
    await run(bench, "one", await adapter_files(bench))
    await bench.models.family.delete((await bench.job(ONE)).tuned_model, "")
    await bench.models.family.delete(bench.MODEL, "")
    await bench.add_model()
    with pytest.raises(FailedPrecondition, match=r"was made on another model of the name .*/tiny"):
        await bench.create("two", base_model="", start_from=f"{ONE}/checkpoints/step-5")


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"full": FullConfig()}, "config.json, model.safetensors"),
        ({}, "adapter_config.json, adapter_model.safetensors"),
    ],
)
async def test_a_result_of_another_kind_is_refused(bench: Any, changes: dict[str, Any], missing: str) -> None:
    await bench.create("one", **changes)
    task, _ = await bench.claim()
    files = await (adapter_files(bench) if changes else full_files(bench))
    result = task_pb2.TaskResult(train=task_pb2.TrainResult(files=files, step=5))
    with pytest.raises(InvalidArgument, match=f"the result must have {missing}, got ") as caught:
        await bench.queue.finish(task.task_id, task.epoch, Outcome(result=result))
    assert caught.value.reason == Reason.MODEL_INVALID


async def test_a_job_of_all_weights_keeps_a_chosen_rate(bench: Any) -> None:
    chosen = Hyperparameters(learning_rate=1e-3)
    job = (await bench.plan(full=FullConfig(), hyperparameters=chosen)).resolved_job
    assert job.hyperparameters.learning_rate == 1e-3


async def test_tuned_weights_whose_rendering_did_not_say_how_are_asked_as_their_base(bench: Any) -> None:
    """The tokenizer comes from the base model in any case: without it nobody could use the weights."""
    await run(bench, "one", await full_files(bench), full=FullConfig(), tuned_model_id="weights")
    found = await bench.models.ready(WEIGHTS)
    assert found.message.taught == Taught(
        tokenizer_digest="t" * 64, rendering=bench.RENDERING, rendering_digest="r" * 64
    )
    assert [one.path for one in found.private.files if one.tokenizer] == ["tokenizer.json"]
