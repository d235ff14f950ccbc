"""Tuned models carry how their job's rendering taught."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from luthier.training.files import files_digest
from luthier.training.models.convert import model_to_proto
from luthier.training.teaching import Taught
from luthier.work.tasks import Outcome
from luthier.worker.v1 import task_pb2

TAUGHT = Taught(
    chat_template="{{ messages }}",
    template_date="2026-01-02",
    prefix_token_ids=(1,),
    stop_token_ids=(2, 3),
    tokenizer_digest="t" * 64,
    rendering="projects/default/renderings/songs",
    rendering_digest="r" * 64,
)


async def tuned(bench: Any, taught: Taught | None) -> Any:
    """Run a job on a rendering that teaches so; return its model."""
    bench.add_rendering(taught=taught)
    await bench.jobs.create(bench.PARENT, "one", bench.request())
    bench.add_rendering(taught=None)  # what comes after creation changes nothing
    task, _ = await bench.claim()
    blob = await bench.blobs.put_bytes(b"adapter")
    files = [task_pb2.BlobFile(path="adapter_model.safetensors", sha256=blob.digest, size_bytes=7)]
    result = task_pb2.TaskResult(train=task_pb2.TrainResult(files=files, step=1))
    await bench.queue.finish(task.task_id, task.epoch, Outcome(result=result))
    return await bench.models.get("projects/default/models/one")


async def test_a_tuned_model_carries_how_it_was_taught_and_the_files_to_ask_it(bench: Any) -> None:
    model = await tuned(bench, TAUGHT)
    assert model.taught == TAUGHT
    message = model_to_proto(model)
    assert (message.taught.chat_template, list(message.taught.stop_token_ids)) == ("{{ messages }}", [2, 3])
    assert message.has_chat_template
    assert [(file.path, file.tokenizer) for file in model.files] == [
        ("adapter_model.safetensors", False),
        ("chat_template.jinja", True),
        ("tokenizer.json", True),
    ]
    pieces = await bench.models.read_file(model.name, "chat_template.jinja", 0)
    assert b"".join([piece async for piece in pieces]) == b"{{ messages }}"
    assert model.digest == files_digest({file.path: file.sha256 for file in model.files})


async def test_a_tuned_model_without_a_template_keeps_its_bases_files(bench: Any) -> None:
    model = await tuned(bench, replace(TAUGHT, chat_template=""))
    assert [file.path for file in model.files] == ["adapter_model.safetensors", "tokenizer.json"]


async def test_a_job_from_before_this_was_kept_tunes_a_model_that_does_not_say(bench: Any) -> None:
    model = await tuned(bench, None)
    assert model.taught is None
    assert not model_to_proto(model).HasField("taught")
    assert [file.path for file in model.files] == ["adapter_model.safetensors"]
