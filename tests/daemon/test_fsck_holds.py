"""`luthierd fsck` finds what is worked for and not held, and holds of what is gone."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete
from sqlalchemy.ext.asyncio import AsyncConnection
from tests.daemon.test_fsck import State, opened

from luthier.daemon.fsck import Found, line_of
from luthier.data.datasets import repository as datasets
from luthier.data.renderings import repository as renderings
from luthier.storage.stored import Stored
from luthier.stored.v1.data_pb2 import DatasetPrivate, DatasetVersionPrivate, RenderingPrivate
from luthier.stored.v1.training_pb2 import ModelPrivate
from luthier.training.models import repository as models
from luthier.v1.dataset_pb2 import Dataset, DatasetVersion
from luthier.v1.model_pb2 import Model
from luthier.v1.reference_pb2 import Reference
from luthier.v1.rendering_pb2 import Rendering
from luthier.work import elsewhere
from luthier.work.blob_check import Fault
from luthier.work.elsewhere import Hold
from luthier.work.holds import Holds
from luthier.work.repository import Tasks
from luthier.work.tasks import NewTask, Task, TaskKind

DATASET = "projects/p/datasets/d"
VERSION, RENDERING = f"{DATASET}/versions/v", "projects/p/renderings/r"
MODEL = "projects/p/models/m"


@dataclass(frozen=True, slots=True, kw_only=True)
class AtWork:
    """What a worker is at, its task, and what it is made from."""

    stored: Stored[Any, Any]
    task: Task
    needed: Sequence[str]


async def queue(connection: AsyncConnection, kind: TaskKind, stored: Stored[Any, Any]) -> Task:
    name = stored.message.name
    return await Tasks().add(
        connection, NewTask(kind=kind, uid=stored.uid, subject=name, project="p", resources=())
    )


@pytest.fixture
async def data(tmp_path: Path) -> AsyncIterator[State]:
    state = await opened(tmp_path, "data")
    yield state
    await state.database.close()


@pytest.fixture
async def version(data: State) -> AtWork:
    """A version that is being built, of a dataset; nothing is held yet."""

    async def add(connection: AsyncConnection) -> AtWork:
        dataset = await datasets.datasets().insert(connection, Dataset(name=DATASET), DatasetPrivate())
        message = DatasetVersion(
            name=VERSION,
            state=DatasetVersion.STATE_QUEUED,
            references=[Reference(name=DATASET, uid=dataset.uid)],
        )
        stored = await datasets.versions().insert(connection, message, DatasetVersionPrivate())
        task = await queue(connection, TaskKind.BUILD_VERSION, stored)
        return AtWork(stored=stored, task=task, needed=[dataset.uid])

    made: AtWork = await data.write(add)
    return made


async def hold(data: State, version: AtWork, *, lasting: bool) -> None:
    await data.write(
        lambda connection: Holds().add(connection, version.needed, version.stored, lasting=lasting)
    )


async def test_what_is_worked_for_must_hold_what_it_is_made_from(data: State, version: AtWork) -> None:
    assert await data.faults() == [("unheld", "", VERSION)]
    await hold(data, version, lasting=True)
    assert await data.faults() == []
    await data.write(lambda connection: Tasks().end(connection, version.task.task_id))
    assert await data.faults() == [], "a lasting hold outlives the work"


async def test_a_hold_of_what_has_ended_is_found(data: State, version: AtWork) -> None:
    await hold(data, version, lasting=False)
    assert await data.faults() == []
    await data.write(lambda connection: Tasks().end(connection, version.task.task_id))
    assert await data.faults() == [("ownerless", "", VERSION)]
    await data.write(lambda connection: Holds().end(connection, version.stored.uid))
    assert await data.faults() == []


async def test_a_hold_of_what_is_gone_is_found_and_those_of_other_services_are_theirs(
    data: State, version: AtWork
) -> None:
    await hold(data, version, lasting=True)
    await data.write(
        lambda connection: Holds().set(connection, version.needed[0], "an id of theirs", "jobs/a", 60.0)
    )
    assert await data.faults() == []
    await data.write(lambda connection: Tasks().end(connection, version.task.task_id))
    await data.write(lambda connection: connection.execute(delete(datasets.versions().table)))
    assert await data.faults() == [("ownerless", "", VERSION)]


async def test_what_is_needed_at_another_service_is_written_down_here(data: State, version: AtWork) -> None:
    await hold(data, version, lasting=True)
    taken = Hold(hold="h", name=MODEL, uid="u", holder=RENDERING)

    async def add(connection: AsyncConnection) -> str:
        references = [Reference(name=VERSION, uid=version.stored.uid), Reference(name=MODEL, uid="u")]
        message = Rendering(name=RENDERING, state=Rendering.STATE_QUEUED, references=references)
        stored = await renderings.renderings().insert(connection, message, RenderingPrivate())
        await queue(connection, TaskKind.RENDER, stored)
        await Holds().add(connection, [version.stored.uid], stored)
        await elsewhere.record(connection, [taken], stored)
        return stored.uid

    uid = await data.write(add)
    assert await data.faults() == []
    await data.write(lambda connection: elsewhere.release_all(connection, uid))
    assert await data.faults() == [("unheld", "", RENDERING)]


async def test_what_is_merged_must_hold_its_base_and_not_what_that_learnt_from(tmp_path: Path) -> None:
    training = await opened(tmp_path, "training")

    async def add(connection: AsyncConnection) -> Stored[Any, Any]:
        message = Model(
            name=MODEL, state=Model.STATE_MAKING, references=[Reference(name=RENDERING, uid="of long ago")]
        )
        stored = await models.models().insert(connection, message, ModelPrivate(source_uid="base"))
        await queue(connection, TaskKind.MERGE, stored)
        return stored

    stored = await training.write(add)
    assert await training.faults() == [("unheld", "", MODEL)]
    await training.write(lambda connection: Holds().add(connection, ["base"], stored))
    assert await training.faults() == []
    await training.database.close()


def test_a_fault_without_a_blob_reads_well() -> None:
    fault = Fault(kind="unheld", digest="", who=VERSION, text="why")
    assert line_of(Found(service="data", fault=fault)) == f"data       unheld     {VERSION}: why"
