"""Where answers of a tuned model end, as the files say that are taken away."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.training import conftest
from tests.training.jobs.test_checkpoint_models import adapter_of, commit
from tests.training.models.test_making import ADAPTER, JOB, NEW, finish, merge, merged_files, tuned
from tests.training.models.test_making import CHECK as CLOSE

from luthier.errors import InvalidArgument, Reason
from luthier.lm.made import GENERATION_CONFIG
from luthier.training.jobs import repository as job_repository
from luthier.training.models import repository
from luthier.training.models.ends import generation_config
from luthier.v1.fine_tuning_job_pb2 import FullConfig
from luthier.v1.model_pb2 import Model, ModelFile, Taught
from luthier.work.tasks import Outcome, TaskKind
from luthier.worker.v1 import task_pb2

SETTINGS = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "temperature": 0.5}
BASE = Model(name="projects/default/models/base", eos_token_ids=[2, 5])


async def with_settings(bench: Any, settings: dict[str, Any] = SETTINGS, eos: tuple[int, ...] = (2,)) -> None:
    """Give the base of the bench a generation config, and the ends that its registration found."""
    blob = await conftest.stored(bench, json.dumps(settings), GENERATION_CONFIG)
    async with bench.database.transaction() as connection:
        stored = await bench.models.family.get(connection, bench.MODEL)
        private, changed = stored.copy_private(), stored.copy()
        private.files.append(ModelFile(path=blob.path, sha256=blob.sha256, size_bytes=blob.size_bytes))
        changed.eos_token_ids.extend(eos)
        await repository.models().update(connection, stored, changed, private)


async def settings_of(bench: Any, model: Any) -> dict[str, Any]:
    stream = bench.models.read_file(model, GENERATION_CONFIG, 0)
    read: dict[str, Any] = json.loads(b"".join([piece async for piece in stream]))
    return read


@pytest.mark.parametrize(
    ("own", "expected"), [(2, [2, 5, 7]), ([7], [7, 2, 5]), ([9, 2], [9, 2, 5, 7]), (None, [2, 5, 7])]
)
def test_every_end_is_named_and_all_else_stays(own: Any, expected: list[int]) -> None:
    settings = json.dumps(SETTINGS | {"eos_token_id": own}).encode()
    made = json.loads(generation_config(BASE, Taught(stop_token_ids=[7]), settings))
    assert made == SETTINGS | {"eos_token_id": expected}


def test_a_file_that_names_every_end_stays_as_it_is() -> None:
    settings = json.dumps(SETTINGS | {"eos_token_id": [5, 2]}).encode()
    assert generation_config(BASE, Taught(stop_token_ids=[2]), settings) == settings


def test_without_a_file_of_the_base_there_is_one_where_somebody_names_an_end() -> None:
    assert json.loads(generation_config(BASE, Taught(), b"")) == {"eos_token_id": [2, 5]}
    assert generation_config(Model(), Taught(), b"") == b""


@pytest.mark.parametrize(
    ("settings", "config", "expected"),
    [(b"{}", 2, [2, 7]), (b"", 2, [2, 7]), (b'{"eos_token_id": 3}', [2, 3], [3, 2, 7]), (b"{}", None, [7])],
)
def test_a_base_that_never_said_its_ends_is_asked_for_them_in_both_files(
    settings: bytes, config: Any, expected: list[int]
) -> None:
    """What is named in the one file hides what is named in the other, for all who read them."""
    made = generation_config(
        Model(), Taught(stop_token_ids=[7]), settings, json.dumps({"eos_token_id": config}).encode()
    )
    assert json.loads(made) == {"eos_token_id": expected}


def test_a_base_that_says_its_ends_is_not_asked_for_them_in_its_config() -> None:
    assert json.loads(generation_config(BASE, Taught(), b"", b'{"eos_token_id": 9}')) == {
        "eos_token_id": [2, 5]
    }


def test_a_config_that_cannot_be_read_is_named() -> None:
    with pytest.raises(InvalidArgument, match=r"config\.json of m must be JSON"):
        generation_config(Model(name="m"), Taught(), b"", b"{")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (b"{", "must be JSON"),
        (b"\xff", "must be JSON"),
        (b"[]", "must be an object, got list"),
        (b'{"eos_token_id": "</s>"}', "must have token ids in eos_token_id, got '</s>'"),
        (b'{"eos_token_id": [true]}', "must have token ids in eos_token_id, got True"),
    ],
)
def test_a_base_whose_file_cannot_be_read_is_named(settings: bytes, message: str) -> None:
    with pytest.raises(InvalidArgument, match=f"generation_config.json of {BASE.name} {message}") as caught:
        generation_config(BASE, Taught(), settings)
    assert caught.value.reason == Reason.MODEL_INVALID


@pytest.mark.parametrize("changes", [{}, {"full": FullConfig()}])
async def test_a_tuned_model_ends_at_its_bases_tokens_and_at_those_that_it_was_taught(
    bench: Any, changes: dict[str, Any]
) -> None:
    await with_settings(bench)
    model = await tuned(bench, **changes)
    assert await settings_of(bench, await bench.models.ready(ADAPTER)) == SETTINGS | {"eos_token_id": [2, 7]}
    assert list(model.eos_token_ids) == ([2, 7] if changes else [])


async def test_all_weights_of_a_base_that_never_said_its_ends_leave_them_to_their_files(bench: Any) -> None:
    """Who asks them reads the files where a model names none."""
    await with_settings(bench, eos=())
    model = await tuned(bench, full=FullConfig())
    assert list(model.eos_token_ids) == []
    assert await settings_of(bench, await bench.models.ready(ADAPTER)) == SETTINGS | {"eos_token_id": [2, 7]}


async def test_an_end_that_only_the_config_of_an_old_base_names_is_not_lost(bench: Any) -> None:
    await with_settings(bench, {"temperature": 0.5}, eos=())
    blob = await conftest.stored(bench, json.dumps({"eos_token_id": 2}), "config.json")
    async with bench.database.transaction() as connection:
        stored = await bench.models.family.get(connection, bench.MODEL)
        private, changed = stored.copy_private(), stored.copy()
        kept = [file for file in private.files if file.path != "config.json"]
        del private.files[:]
        private.files.extend(kept)
        private.files.append(ModelFile(path=blob.path, sha256=blob.sha256, size_bytes=blob.size_bytes))
        changed.display_name = "old"
        await repository.models().update(connection, stored, changed, private)
    await tuned(bench)
    settings = await settings_of(bench, await bench.models.ready(ADAPTER))
    assert settings == {"temperature": 0.5, "eos_token_id": [2, 7]}


async def test_a_checkpoint_and_what_is_merged_of_it_end_there_too(bench: Any) -> None:
    await with_settings(bench)
    bench.add_rendering(effective_chat_template="{{ messages }}", stop_token_ids=[7])
    await bench.create("one")
    task, _ = await bench.claim()
    await commit(bench, task, 3, await adapter_of(bench, 3))
    name = f"{JOB}/checkpoints/step-3"
    seen = await bench.checkpoints.read(name)
    assert await settings_of(bench, seen) == SETTINGS | {"eos_token_id": [2, 7]}
    await merge(bench, name)
    merging, _ = await bench.claim(TaskKind.MERGE)
    result = task_pb2.MergeResult(files=await merged_files(bench), check=CLOSE)
    merged = await finish(bench, merging, merge=result)
    assert list(merged.eos_token_ids) == [2, 7]
    assert await settings_of(bench, await bench.models.ready(NEW)) == SETTINGS | {"eos_token_id": [2, 7]}


async def test_an_adapter_of_before_this_was_kept_is_merged_into_a_model_that_ends_as_it_was_taught(
    bench: Any,
) -> None:
    await with_settings(bench)
    await tuned(bench)
    async with bench.database.transaction() as connection:
        stored = await bench.models.family.get(connection, ADAPTER)
        private, changed = stored.copy_private(), stored.copy()
        kept = [file for file in private.files if file.path != GENERATION_CONFIG]
        del private.files[:]
        private.files.extend(kept)
        changed.display_name = "old"
        await repository.models().update(connection, stored, changed, private)
    await merge(bench)
    task, _ = await bench.claim(TaskKind.MERGE)
    result = task_pb2.MergeResult(files=await merged_files(bench), check=CLOSE)
    await finish(bench, task, merge=result)
    assert await settings_of(bench, await bench.models.ready(NEW)) == SETTINGS | {"eos_token_id": [2, 7]}


async def test_a_job_of_before_this_was_kept_makes_what_it_would_have_made(bench: Any) -> None:
    await with_settings(bench)
    bench.add_rendering(effective_chat_template="{{ messages }}", stop_token_ids=[7])
    job = await bench.create("one")
    async with bench.database.transaction() as connection:
        stored = await bench.jobs.family.get(connection, job.name)
        private, changed = stored.copy_private(), stored.copy()
        private.ClearField("generation_config")
        changed.display_name = "old"
        await job_repository.jobs().update(connection, stored, changed, private)
    task, _ = await bench.claim()
    result = task_pb2.TaskResult(train=task_pb2.TrainResult(files=await adapter_of(bench, 3), step=3))
    await bench.queue.finish(task.task_id, task.epoch, Outcome(result=result))
    files = (await bench.models.ready(ADAPTER)).private.files
    assert GENERATION_CONFIG not in [file.path for file in files]


async def test_a_job_on_a_base_whose_file_cannot_be_read_is_refused(bench: Any) -> None:
    await with_settings(bench, {"eos_token_id": "</s>"})
    with pytest.raises(InvalidArgument, match="must have token ids in eos_token_id"):
        await bench.create("one")
