"""Models that are made from others: what is asked of a worker, what comes of it, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from tests.training import conftest
from tests.training.jobs.test_checkpoint_models import adapter_of, commit
from tests.training.jobs.test_starts import full_files

from luthier.errors import AlreadyExists, FailedPrecondition, Failure, InvalidArgument, NotFound, Reason
from luthier.errors.status import status_to_failure
from luthier.v1.base_precision_pb2 import BASE_PRECISION_NF4, BASE_PRECISION_UNSPECIFIED
from luthier.v1.fine_tuning_job_pb2 import FullConfig
from luthier.v1.model_pb2 import (
    EXPORT_FORMAT_GGUF_F16,
    EXPORT_FORMAT_GGUF_Q8_0,
    Model,
    WeightsCheck,
)
from luthier.v1.model_service_pb2 import ExportModelRequest, MergeModelRequest
from luthier.work.tasks import Outcome, TaskKind
from luthier.worker.v1 import task_pb2

ADAPTER = "projects/default/models/one"
JOB = "projects/default/fineTuningJobs/one"
NEW = "projects/default/models/new"
TEMPLATE = "{{ messages }} today"
CHECK = WeightsCheck(num_positions=99, difference=0.01, bound=0.05, effect=0.5, num_greedy_tokens=64)


async def tuned(bench: Any, **changes: Any) -> Model:
    """A job's model."""
    bench.add_rendering(effective_chat_template=TEMPLATE, stop_token_ids=[7])
    await bench.create("one", **changes)
    task, _ = await bench.claim()
    files = await full_files(bench) if "full" in changes else await adapter_of(bench, 3)
    result = task_pb2.TaskResult(train=task_pb2.TrainResult(files=files, step=3))
    await bench.queue.finish(task.task_id, task.epoch, Outcome(result=result))
    model: Model = await bench.model(ADAPTER)
    return model


async def merge(bench: Any, name: str = ADAPTER, **changes: Any) -> Model:
    request = MergeModelRequest(**{"name": name, "model_id": "new", **changes})
    model: Model = await bench.making.merge(request)
    return model


async def export(bench: Any, name: str = ADAPTER, **changes: Any) -> Model:
    wanted = {"name": name, "model_id": "new", "format": EXPORT_FORMAT_GGUF_Q8_0, **changes}
    model: Model = await bench.making.export(ExportModelRequest(**wanted))
    return model


async def finish(bench: Any, task: Any, **result: Any) -> Model:
    await bench.queue.finish(task.task_id, task.epoch, Outcome(result=task_pb2.TaskResult(**result)))
    model: Model = await bench.model(NEW)
    return model


async def merged_files(bench: Any) -> list[task_pb2.BlobFile]:
    return [
        await conftest.stored(bench, "sum", "model.safetensors"),
        await conftest.stored(bench, "config", "config.json"),
    ]


async def test_a_merge_is_a_model_with_all_its_weights_and_says_where_it_is_from(bench: Any) -> None:
    adapter = await tuned(bench)
    model = await merge(bench, display_name="Merged", labels={"team": "a"})
    assert (model.name, model.state, model.kind) == (NEW, Model.STATE_QUEUED, Model.KIND_WEIGHTS)
    assert (model.display_name, dict(model.labels)) == ("Merged", {"team": "a"})
    task, spec = await bench.claim(TaskKind.MERGE)
    base = await bench.models.ready(bench.MODEL)
    assert list(spec.merge.base_model_files) == list(base.private.files)
    assert [file.path for file in spec.merge.adapter_files] == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "generation_config.json",
    ]
    result = task_pb2.MergeResult(files=await merged_files(bench), check=CHECK, warnings=["little is left"])
    ready = await finish(bench, task, merge=result)
    assert (ready.state, ready.base_model, ready.start_from) == (Model.STATE_READY, "", ADAPTER)
    assert (ready.fine_tuning_job, ready.step, ready.taught) == (adapter.fine_tuning_job, 3, adapter.taught)
    assert (ready.architecture, ready.context_length) == ("LlamaForCausalLM", 64)
    assert (ready.check, list(ready.warnings)) == (CHECK, ["little is left"])
    named = {one.name: (one.uid, one.digest) for one in ready.references}
    assert named[ADAPTER] == (adapter.uid, adapter.digest)
    assert set(named) == {ADAPTER, *(one.name for one in adapter.references)}
    assert await bench.states(NEW) == ["QUEUED", "MAKING", "READY"]
    private = (await bench.models.ready(NEW)).private
    assert not private.source_files
    assert not private.adapter_files


async def test_a_worker_is_told_what_the_base_was_held_in_while_the_adapter_was_trained(bench: Any) -> None:
    adapter = await tuned(bench, base_precision=BASE_PRECISION_NF4)
    assert adapter.base_precision == BASE_PRECISION_NF4
    merged = await merge(bench)
    _, spec = await bench.claim(TaskKind.MERGE)
    assert spec.merge.base_precision == BASE_PRECISION_NF4
    assert merged.base_precision == BASE_PRECISION_UNSPECIFIED, "it has all its weights"
    await export(bench, model_id="file")
    _, spec = await bench.claim(TaskKind.EXPORT)
    assert spec.export.base_precision == BASE_PRECISION_NF4


async def test_a_merge_has_the_tokenizer_of_its_base_where_the_template_is_the_bases_own(bench: Any) -> None:
    """So renderings for the base are for it, too."""
    await tuned(bench)
    await merge(bench)
    task, _ = await bench.claim(TaskKind.MERGE)
    result = task_pb2.MergeResult(files=await merged_files(bench), check=CHECK)
    await finish(bench, task, merge=result)
    files = {file.path for file in (await bench.models.ready(NEW)).private.files if file.tokenizer}
    assert files == {"tokenizer.json"}


async def test_a_merge_has_the_template_that_its_adapter_was_taught_by(bench: Any) -> None:
    bench.add_rendering(effective_chat_template=TEMPLATE, chat_template=TEMPLATE)
    await bench.create("one")
    task, _ = await bench.claim()
    result = task_pb2.TaskResult(train=task_pb2.TrainResult(files=await adapter_of(bench, 3), step=3))
    await bench.queue.finish(task.task_id, task.epoch, Outcome(result=result))
    await merge(bench)
    task, _ = await bench.claim(TaskKind.MERGE)
    ready = await finish(
        bench, task, merge=task_pb2.MergeResult(files=await merged_files(bench), check=CHECK)
    )
    assert ready.has_chat_template
    model = await bench.models.ready(NEW)
    stream = bench.models.read_file(model, "chat_template.jinja", 0)
    assert b"".join([piece async for piece in stream]).decode() == TEMPLATE


async def test_a_merge_stands_by_itself_once_it_is_ready_and_holds_its_sources_until_then(bench: Any) -> None:
    await tuned(bench)
    await merge(bench)
    for name in (ADAPTER, bench.MODEL):
        with pytest.raises(FailedPrecondition, match=rf"{name} is needed by .*{NEW}") as caught:
            await bench.models.family.delete(name, "")
        assert caught.value.reason == Reason.RESOURCE_IN_USE
    task, _ = await bench.claim(TaskKind.MERGE)
    with pytest.raises(FailedPrecondition, match="it is MAKING; cancel it, or wait for it"):
        await bench.models.family.delete(NEW, "")
    await finish(bench, task, merge=task_pb2.MergeResult(files=await merged_files(bench), check=CHECK))
    await bench.models.family.delete(ADAPTER, "")
    await bench.models.family.delete(bench.MODEL, "")
    assert (await bench.model(NEW)).state == Model.STATE_READY


async def test_a_checkpoint_is_merged_while_its_job_goes_on_and_is_held_meanwhile(bench: Any) -> None:
    bench.add_rendering(effective_chat_template=TEMPLATE)
    await bench.create("one", max_checkpoints=1)
    task, _ = await bench.claim()
    await commit(bench, task, 3, await adapter_of(bench, 3))
    name = f"{JOB}/checkpoints/step-3"
    await merge(bench, name)
    await commit(bench, task, 6, await adapter_of(bench, 6))
    assert (await bench.jobs.checkpoint(name)).step == 3, "the policy passes over what is held"
    merging, spec = await bench.claim(TaskKind.MERGE)
    assert [file.path for file in spec.merge.adapter_files] == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    ready = await finish(
        bench, merging, merge=task_pb2.MergeResult(files=await merged_files(bench), check=CHECK)
    )
    assert (ready.start_from, ready.fine_tuning_job, ready.step) == (name, JOB, 3)


async def test_a_model_that_a_job_still_trains_is_refused_with_what_would_be_right(bench: Any) -> None:
    await bench.create("one", tuned_model_id="later")
    with pytest.raises(
        FailedPrecondition, match=f"later must be READY, {JOB} still trains it; wait"
    ) as caught:
        await merge(bench, "projects/default/models/later")
    assert caught.value.reason == Reason.WRONG_STATE
    await bench.cancel(JOB)
    with pytest.raises(NotFound, match="models/later does not exist"):
        await merge(bench, "projects/default/models/later")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "projects/default/models/tiny"}, "of kind BASE: it has all its weights"),
        ({"labels": {"A": "b"}}, "labels: a key must match"),
        ({"display_name": "exe\u202egpj"}, "display_name: must hold no control characters"),
        ({"model_id": "Not-An-Id"}, "got 'Not-An-Id'"),
    ],
)
async def test_merging_refuses_what_is_wrong(bench: Any, changes: dict[str, Any], message: str) -> None:
    await tuned(bench)
    with pytest.raises(InvalidArgument, match=message):
        await merge(bench, **changes)
    with pytest.raises(NotFound):
        await bench.model(NEW)


@pytest.mark.parametrize(("kind", "word"), [(Model.KIND_REWARD, "REWARD"), (Model.KIND_EXPORT, "EXPORT")])
async def test_merging_refuses_other_kinds(bench: Any, kind: Any, word: str) -> None:
    await bench.add_model("projects/default/models/other", kind=kind)
    with pytest.raises(
        InvalidArgument, match=f"must be an adapter of a model of words, got .*, of kind {word}"
    ):
        await merge(bench, "projects/default/models/other")


async def test_a_taken_id_is_refused(bench: Any) -> None:
    await tuned(bench)
    with pytest.raises(AlreadyExists):
        await merge(bench, model_id="tiny")


async def test_a_merge_that_differs_fails_and_says_by_how_much(bench: Any) -> None:
    await tuned(bench)
    await merge(bench)
    task, _ = await bench.claim(TaskKind.MERGE)
    failure = Failure(code="FAILED_PRECONDITION", reason=Reason.WEIGHTS_DIFFER, message="by 0.4")
    await bench.queue.finish(task.task_id, task.epoch, Outcome(failure=failure))
    model = await bench.model(NEW)
    assert (model.state, status_to_failure(model.error).reason) == (Model.STATE_FAILED, Reason.WEIGHTS_DIFFER)
    await bench.models.family.delete(ADAPTER, "")


async def test_a_result_that_is_no_model_fails_the_merge(bench: Any) -> None:
    await tuned(bench)
    await merge(bench)
    task, _ = await bench.claim(TaskKind.MERGE)
    result = task_pb2.MergeResult(files=[await conftest.stored(bench, "x", "config.json")], check=CHECK)
    model = await finish(bench, task, merge=result)
    assert model.state == Model.STATE_FAILED
    assert "the result must have model.safetensors, got config.json" in model.error.message


async def test_a_lost_merge_begins_anew_and_a_cancelled_one_ends(bench: Any) -> None:
    await tuned(bench)
    await merge(bench)
    await bench.claim(TaskKind.MERGE)
    await bench.queue.release_worker("worker", "2")
    task, _ = await bench.claim(TaskKind.MERGE)
    assert (await bench.models.family.cancel(NEW, "")).state == Model.STATE_CANCELLING
    await bench.queue.finish(task.task_id, task.epoch, Outcome(cancelled=True))
    assert await bench.states(NEW) == ["QUEUED", "MAKING", "QUEUED", "MAKING", "CANCELLING", "CANCELLED"]
    await bench.models.family.delete(ADAPTER, "")


async def test_an_export_is_a_file_that_is_downloaded(bench: Any) -> None:
    adapter = await tuned(bench)
    model = await export(bench, format=EXPORT_FORMAT_GGUF_F16)
    assert (model.kind, model.export_format) == (Model.KIND_EXPORT, EXPORT_FORMAT_GGUF_F16)
    task, spec = await bench.claim(TaskKind.EXPORT)
    base = await bench.models.ready(bench.MODEL)
    assert list(spec.export.model_files) == list(base.private.files)
    assert [file.path for file in spec.export.adapter_files] == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "generation_config.json",
    ]
    assert (spec.export.format, spec.export.title) == (EXPORT_FORMAT_GGUF_F16, "one")
    assert list(spec.export.stop_token_ids) == [7]
    result = task_pb2.ExportResult(
        files=[await conftest.stored(bench, "gguf", "model-f16.gguf")], check=CHECK
    )
    ready = await finish(bench, task, export=result)
    assert (ready.state, ready.start_from, ready.check) == (Model.STATE_READY, ADAPTER, CHECK)
    assert (ready.architecture, ready.has_chat_template) == ("LlamaForCausalLM", True)
    assert ready.digest
    assert {one.name for one in ready.references} == {ADAPTER, *(one.name for one in adapter.references)}
    files = (await bench.models.ready(NEW)).private.files
    assert [(file.path, file.tokenizer) for file in files] == [("model-f16.gguf", False)]
    await bench.models.family.delete(ADAPTER, "")


@pytest.mark.parametrize("name", ["projects/default/models/tiny", ADAPTER])
async def test_a_model_with_all_its_weights_is_exported_without_an_adapter(bench: Any, name: str) -> None:
    await tuned(bench, full=FullConfig())
    await export(bench, name)
    _, spec = await bench.claim(TaskKind.EXPORT)
    source = await bench.models.ready(name)
    assert list(spec.export.model_files) == list(source.private.files)
    assert not spec.export.adapter_files
    assert list(spec.export.stop_token_ids) == ([7] if name == ADAPTER else [])


@pytest.mark.parametrize(
    ("changes", "message", "reason"),
    [
        ({"format": 0}, "format: must be one of GGUF_F16, GGUF_Q8_0, got nothing", Reason.FIELD_REQUIRED),
        (
            {"name": "projects/default/models/gemma"},
            "must be a model of architecture LlamaForCausalLM, .* for a GGUF file, got .*, of GemmaForCausalLM",
            Reason.EXPORT_NOT_POSSIBLE,
        ),
        ({"name": "projects/default/models/judge"}, "a reward model", Reason.INVALID_FIELD),
        (
            {"name": "projects/default/models/written"},
            "must be no export, got .*, which is a file for other programs; it was made from projects/default/models/m",
            Reason.INVALID_FIELD,
        ),
    ],
)
async def test_exporting_refuses_what_has_no_such_form(
    bench: Any, changes: dict[str, Any], message: str, reason: Reason
) -> None:
    await tuned(bench)
    await bench.add_model("projects/default/models/gemma", architecture="GemmaForCausalLM")
    await bench.add_model("projects/default/models/judge", kind=Model.KIND_REWARD)
    written = {"kind": Model.KIND_EXPORT, "start_from": "projects/default/models/m"}
    await bench.add_model("projects/default/models/written", **written)
    with pytest.raises(InvalidArgument, match=message) as caught:
        await export(bench, **changes)
    assert caught.value.reason == reason


async def test_an_export_is_no_base_of_jobs_nor_their_beginning(bench: Any) -> None:
    written = {"kind": Model.KIND_EXPORT, "start_from": bench.MODEL}
    await bench.add_model("projects/default/models/written", **written)
    for field in ("base_model", "start_from"):
        changes = {"base_model": "", field: "projects/default/models/written"}
        with pytest.raises(
            InvalidArgument, match=rf"{field}: must be .*written', .*a file for other programs"
        ):
            await bench.create("two", **changes)


async def test_an_adapter_of_before_templates_were_kept_is_merged_with_the_one_that_it_was_taught_by(
    bench: Any,
) -> None:
    """Then its private row does not say whose template it is."""
    await tuned(bench)
    stored = await bench.models.ready(ADAPTER)
    private = stored.copy_private()
    private.has_own_template = False
    async with bench.database.transaction() as connection:
        changed = stored.copy()
        changed.display_name = "old"
        await bench.models._models.update(connection, stored, changed, private)
    await merge(bench)
    task, _ = await bench.claim(TaskKind.MERGE)
    await finish(bench, task, merge=task_pb2.MergeResult(files=await merged_files(bench), check=CHECK))
    files = {file.path for file in (await bench.models.ready(NEW)).private.files if file.tokenizer}
    assert files == {"tokenizer.json", "chat_template.jinja"}
