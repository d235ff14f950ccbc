"""Tuned models carry how their job's rendering taught."""

from __future__ import annotations

import json
from typing import Any

from tests.training.conftest import adapter_files

from luthier.runtime.digests import files_digest
from luthier.stored.v1.training_pb2 import FineTuningJobPrivate
from luthier.training.jobs import repository
from luthier.v1.model_pb2 import Taught
from luthier.work.tasks import Outcome
from luthier.worker.v1 import task_pb2

TEMPLATE = "{{ messages }}"
TEACHING: dict[str, Any] = {
    "effective_chat_template": TEMPLATE,
    "template_date": "2026-01-02",
    "prefix_token_ids": [1],
    "stop_token_ids": [2, 3],
}
TAUGHT = Taught(
    chat_template=TEMPLATE,
    template_date="2026-01-02",
    prefix_token_ids=[1],
    stop_token_ids=[2, 3],
    tokenizer_digest="t" * 64,
    rendering="projects/default/renderings/songs",
    rendering_digest="r" * 64,
)


async def forget(bench: Any, name: str) -> None:
    """Leave a job as one of before it was kept how its rendering teaches."""
    async with bench.database.transaction() as connection:
        job = await bench.jobs.family.get(connection, name)
        private = FineTuningJobPrivate(rendering_digest=job.private.rendering_digest)
        await repository.jobs().update(connection, job, job.copy(), private)


async def tuned(bench: Any, *, is_kept: bool = True, **teaching: Any) -> Any:
    """Run a job on a rendering that teaches so; return its model."""
    bench.add_rendering(**teaching)
    job = await bench.create("one")
    if not is_kept:
        await forget(bench, job.name)
    bench.add_rendering(chat_template="another")  # what comes after creation changes nothing
    task, _ = await bench.claim()
    result = task_pb2.TaskResult(train=task_pb2.TrainResult(files=await adapter_files(bench), step=1))
    await bench.queue.finish(task.task_id, task.epoch, Outcome(result=result))
    return await bench.model("projects/default/models/one")


async def read(bench: Any, name: str, path: str) -> bytes:
    pieces = bench.models.read_file(await bench.models.ready(name), path, 0)
    return b"".join([piece async for piece in pieces])


async def test_a_tuned_model_carries_how_it_was_taught_and_the_files_to_ask_it(bench: Any) -> None:
    model = await tuned(bench, **TEACHING)
    assert model.taught == TAUGHT
    assert model.has_chat_template
    files = (await bench.models.ready(model.name)).private.files
    assert [(file.path, file.tokenizer) for file in files] == [
        ("adapter_config.json", False),
        ("adapter_model.safetensors", False),
        ("chat_template.jinja", True),
        ("generation_config.json", False),
        ("tokenizer.json", True),
    ]
    assert json.loads(await read(bench, model.name, "generation_config.json")) == {"eos_token_id": [2, 3]}
    assert await read(bench, model.name, "chat_template.jinja") == b"{{ messages }}"
    assert model.digest == files_digest({file.path: file.sha256 for file in files})


async def test_a_tuned_model_without_a_template_keeps_its_bases_files(bench: Any) -> None:
    model = await tuned(bench)
    assert not model.has_chat_template
    files = (await bench.models.ready(model.name)).private.files
    assert [file.path for file in files] == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
    ]


async def test_a_rendering_of_before_it_kept_its_template_says_what_it_was_given(bench: Any) -> None:
    model = await tuned(bench, chat_template=TEMPLATE)
    assert model.taught.chat_template == TEMPLATE


async def test_a_job_from_before_this_was_kept_tunes_a_model_that_does_not_say(bench: Any) -> None:
    model = await tuned(bench, is_kept=False, **TEACHING)
    assert not model.HasField("taught")
    files = (await bench.models.ready(model.name)).private.files
    assert [file.path for file in files] == ["adapter_config.json", "adapter_model.safetensors"]
