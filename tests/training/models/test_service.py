"""Models: registration, files, and what failed."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.errors import (
    AlreadyExists,
    FailedPrecondition,
    Failure,
    InvalidArgument,
    NotFound,
    OutOfRange,
    Reason,
    ResourceExhausted,
)
from luthier.errors.status import status_to_failure
from luthier.runtime.digests import files_digest
from luthier.storage.disk import Disk
from luthier.v1 import model_pb2
from luthier.v1.model_pb2 import HubSource, Model
from luthier.work.tasks import Outcome, TaskKind
from luthier.worker.v1 import task_pb2

NEW = "projects/default/models/new"


def result(*, tokenizer_digest: str | None = None, **changes: Any) -> task_pb2.TaskResult:
    files = [
        model_pb2.ModelFile(path="tokenizer.json", sha256="2" * 64, size_bytes=2, tokenizer=True),
        model_pb2.ModelFile(path="model.safetensors", sha256="1" * 64, size_bytes=1),
    ]
    right = files_digest({"tokenizer.json": "2" * 64})
    registered = task_pb2.RegisterModelResult(
        files=files,
        architecture="LlamaForCausalLM",
        num_parameters=5,
        context_length=64,
        tokenizer_digest=right if tokenizer_digest is None else tokenizer_digest,
        **changes,
    )
    return task_pb2.TaskResult(register_model=registered)


@pytest.mark.parametrize("field", ["directory", "gguf_path"])
@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("", "must be an absolute path, got nothing"),
        ("models/m", "must be an absolute path, got 'models/m'"),
        ("~/models/m", "must be an absolute path, got '~/models/m'"),
        ("/models/../keys", "must have no part '..', got '/models/../keys'"),
        ("/models/..", "must have no part '..', got '/models/..'"),
        ("/models/m\0", "must have no control characters, got '/models/m\\x00'"),
        ("/models/\x1b[31m", "must have no control characters"),
        ("/" + "m" * 4096, "must be at most 4096 bytes, got 4097"),
    ],
)
async def test_a_path_that_is_none_on_any_machine_is_refused(
    bench: Any, field: str, path: str, said: str
) -> None:
    wanted = Model(directory=path) if field == "directory" else Model(gguf_path=path)
    with pytest.raises(InvalidArgument) as caught:
        await bench.register("new", wanted)
    (violation,) = caught.value.violations
    assert (violation.field, violation.reason) == (f"model.{field}", Reason.INVALID_FIELD)
    assert said in violation.description
    with pytest.raises(NotFound):
        await bench.model(NEW)


async def test_a_path_is_left_to_the_worker_as_it_was_written(bench: Any) -> None:
    """Nothing of the name is on this machine, and it may lie below no root here."""
    for number, path in enumerate(("/elsewhere/models/m", "/elsewhere/..m/m..", "/elsewhere//m/")):
        assert (await bench.register(f"m{number}", Model(directory=path))).directory == path
        task, spec = await bench.claim(TaskKind.REGISTER_MODEL)
        assert spec.register_model.directory == path
        await bench.queue.finish(task.task_id, task.epoch, Outcome(result=result()))


async def test_register_queues_a_folder_and_ends_ready(bench: Any) -> None:
    model = await bench.register("new", Model(directory="/models/m"))
    assert (model.name, model.state) == (NEW, Model.STATE_QUEUED)
    task, spec = await bench.claim(TaskKind.REGISTER_MODEL)
    assert spec.register_model.directory == "/models/m"
    await bench.queue.finish(task.task_id, task.epoch, Outcome(result=result()))
    ready = await bench.model(NEW)
    assert (ready.state, ready.num_parameters) == (Model.STATE_READY, 5)
    assert [file.path for file in (await bench.models.ready(NEW)).private.files] == [
        "model.safetensors",
        "tokenizer.json",
    ]
    digests = {"model.safetensors": "1" * 64, "tokenizer.json": "2" * 64}
    assert ready.digest == files_digest(digests)
    assert ready.tokenizer_digest == files_digest({"tokenizer.json": "2" * 64})
    assert await bench.states(NEW) == ["QUEUED", "REGISTERING", "READY"]


async def test_register_shows_the_commit_that_the_hub_gave(bench: Any) -> None:
    wanted = Model(hub=HubSource(repo_id="owner/model"))
    model = await bench.register("new", wanted)
    assert model.hub == HubSource(repo_id="owner/model", revision="main")
    task, spec = await bench.claim(TaskKind.REGISTER_MODEL)
    assert spec.register_model.hub.revision == "main"
    await bench.queue.finish(task.task_id, task.epoch, Outcome(result=result(hub_commit="abc")))
    assert (await bench.model(NEW)).hub == HubSource(repo_id="owner/model", revision="abc")


async def test_register_fails_a_model_whose_result_contradicts_itself(bench: Any) -> None:
    wanted = Model(hub=HubSource(repo_id="owner/model"))
    await bench.register("new", wanted)
    task, _ = await bench.claim(TaskKind.REGISTER_MODEL)
    await bench.queue.finish(task.task_id, task.epoch, Outcome(result=result(tokenizer_digest="3" * 64)))
    model = await bench.model(NEW)
    assert model.state == Model.STATE_FAILED
    assert status_to_failure(model.error).reason == Reason.MODEL_INVALID


@pytest.mark.parametrize(
    ("new", "reason", "message"),
    [
        (Model(), Reason.FIELD_REQUIRED, "must be one of hub, directory and gguf_path"),
        (
            Model(hub=HubSource(repo_id="a b")),
            Reason.INVALID_FIELD,
            "must be like HuggingFaceTB/SmolLM2-135M-Instruct, got 'a b'",
        ),
        (
            Model(hub=HubSource(repo_id="a/b", revision="x y")),
            Reason.INVALID_FIELD,
            "must be a commit, tag or branch, got 'x y'",
        ),
        (
            Model(hub=HubSource(repo_id="a/b"), labels={"A": "b"}),
            Reason.INVALID_FIELD,
            "a key must match",
        ),
        (
            Model(hub=HubSource(repo_id="a/b"), display_name="exe\u202egpj"),
            Reason.INVALID_FIELD,
            "model.display_name: must hold no control characters",
        ),
    ],
)
async def test_register_refuses_what_it_cannot_read(
    bench: Any, new: Model, reason: Reason, message: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await bench.register("new", new)
    assert caught.value.reason == reason
    assert message in str(caught.value)
    with pytest.raises(NotFound):
        await bench.model(NEW)


async def test_register_refuses_a_taken_or_malformed_id(bench: Any) -> None:
    wanted = Model(hub=HubSource(repo_id="a/b"))
    with pytest.raises(AlreadyExists):
        await bench.register("tiny", wanted)
    with pytest.raises(InvalidArgument, match="got 'Not-An-Id'"):
        await bench.register("Not-An-Id", wanted)


async def test_a_failed_registration_says_why_and_its_files_cannot_be_read(bench: Any) -> None:
    wanted = Model(hub=HubSource(repo_id="a/b"))
    await bench.register("new", wanted)
    task, _ = await bench.claim(TaskKind.REGISTER_MODEL)
    failure = Failure(code="FAILED_PRECONDITION", reason=Reason.BASE_MODEL_MISSING, message="no a/b")
    await bench.queue.finish(task.task_id, task.epoch, Outcome(failure=failure))
    with pytest.raises(FailedPrecondition, match="must be READY, it is FAILED: no a/b"):
        await bench.models.ready(NEW)
    assert await bench.states(NEW) == ["QUEUED", "REGISTERING", "FAILED"]


async def test_a_lost_registration_begins_anew(bench: Any) -> None:
    wanted = Model(hub=HubSource(repo_id="a/b"))
    await bench.register("new", wanted)
    await bench.claim(TaskKind.REGISTER_MODEL)
    await bench.queue.release_worker("worker", "2")
    await bench.claim(TaskKind.REGISTER_MODEL)
    assert await bench.states(NEW) == ["QUEUED", "REGISTERING", "QUEUED", "REGISTERING"]


async def test_read_file_streams_from_any_offset(bench: Any) -> None:
    stream = bench.models.read_file(await bench.models.ready(bench.MODEL), "tokenizer.json", 5)
    assert b"".join([piece async for piece in stream]) == b"izer"
    with pytest.raises(OutOfRange, match=r"start_offset must be in 0\.\.9, got 10"):
        bench.models.read_file(await bench.models.ready(bench.MODEL), "tokenizer.json", 10)
    with pytest.raises(NotFound, match=r"has no file 'weights'; it has model\.safetensors, tokenizer\.json"):
        bench.models.read_file(await bench.models.ready(bench.MODEL), "weights", 0)


async def test_register_below_the_floor_of_the_disk_is_refused(bench: Any) -> None:
    bench.database.disk = Disk(bench.folder, 1 << 60)
    with pytest.raises(ResourceExhausted, match="must stay free") as caught:
        await bench.register("new", Model(hub=HubSource(repo_id="a/b")))
    assert caught.value.reason == Reason.DISK_FULL
