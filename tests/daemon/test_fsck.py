"""`luthierd fsck` finds what is missing, unneeded, not kept or changed, and says so to people and programs."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete
from sqlalchemy.ext.asyncio import AsyncConnection
from tests import stores
from tests.daemon.copies import Copies
from tests.daemon.test_luthierd import environment
from tests.storage.test_reading import state_of
from tests.work.conftest import new_task

from luthier.daemon.fsck import check
from luthier.data import schema as data_schema
from luthier.data.datasets import repository as datasets
from luthier.errors import FailedPrecondition
from luthier.evaluation import schema as evaluation_schema
from luthier.evaluation.evaluations import repository as evaluations
from luthier.storage import blob_refs
from luthier.storage.blobs import Owner
from luthier.storage.database import Database
from luthier.storage.deleted import DeletedRows
from luthier.storage.local_blobs import LocalBlobStore
from luthier.storage.migrations import upgrade
from luthier.stored.v1.data_pb2 import DatasetVersionPrivate
from luthier.stored.v1.evaluation_pb2 import EvaluationPrivate, PredictionFile, ShareRow
from luthier.stored.v1.training_pb2 import CheckpointPrivate, FineTuningJobPrivate
from luthier.training import schema as training_schema
from luthier.training.jobs import repository as jobs
from luthier.v1.dataset_pb2 import DatasetVersion
from luthier.v1.evaluation_pb2 import Evaluation
from luthier.v1.fine_tuning_job_pb2 import Checkpoint, FineTuningJob
from luthier.work import schema as work_schema
from luthier.work.blob_check import SLACK_SECONDS
from luthier.work.collecting import GRACE_SECONDS, LOOK_SECONDS
from luthier.work.repository import Tasks
from luthier.work.requirements import Equipment
from luthier.work.row_file import RowFile
from luthier.work.tasks import TaskKind, Wanted
from luthier.worker.v1.task_pb2 import BlobFile, Shard

VERSION = "projects/p/datasets/d/versions/v"
JOB = "projects/p/fineTuningJobs/j"
EVALUATION = "projects/p/evaluations/e"
MIGRATIONS = {
    "data": data_schema.MIGRATIONS,
    "training": training_schema.MIGRATIONS,
    "evaluation": evaluation_schema.MIGRATIONS,
}
GONE = "0" * 64


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """The state of one service of a home."""

    home: Path
    service: str
    database: Database
    blobs: LocalBlobStore

    async def write(self, work: Callable[[AsyncConnection], Awaitable[Any]]) -> Any:
        async with self.database.transaction() as connection:
            return await work(connection)

    async def put(self, text: str, path: str = "a") -> BlobFile:
        blob = await self.blobs.put_bytes(text.encode())
        return BlobFile(path=path, sha256=blob.digest, size_bytes=blob.size_bytes)

    def path(self, digest: str) -> Path:
        return self.home / self.service / "blobs" / "blobs" / digest[:2] / digest

    async def faults(self, *, reads: bool = True) -> list[tuple[str, str, str]]:
        found = [one.fault async for one in check(self.home, [self.service], reads=reads)]
        return [(fault.kind, fault.digest, fault.who) for fault in found if fault is not None]


async def opened(home: Path, service: str) -> State:
    url = f"sqlite+aiosqlite:///{home / service / f'{service}.db'}"
    await asyncio.to_thread(upgrade, url, [work_schema.MIGRATIONS, MIGRATIONS[service]])
    blobs = LocalBlobStore(home / service / "blobs")
    return State(home=home, service=service, database=Database(url), blobs=blobs)


@pytest.fixture
async def data(tmp_path: Path) -> Any:
    state = await opened(tmp_path, "data")
    yield state
    await state.database.close()


async def add_version(data: State, *files: BlobFile) -> str:
    private = DatasetVersionPrivate(source_files=files[:1], shards=[Shard(file=file) for file in files[1:]])
    message = DatasetVersion(name=VERSION, state=DatasetVersion.STATE_READY)
    stored = await data.write(lambda connection: datasets.versions().insert(connection, message, private))
    return str(stored.uid)


async def test_what_is_as_it_should_be_has_no_faults_and_is_counted(data: State) -> None:
    await add_version(data, await data.put("source"), await data.put("rows"))
    await data.put("on its way to be needed")
    found = [one async for one in check(data.home, ["data"], reads=True)]
    assert [one.fault for one in found] == [None]
    checked = found[0].checked
    assert checked is not None
    assert (checked.num_needs, checked.num_blobs, checked.num_bytes) == (
        2,
        3,
        10 + len("on its way to be needed"),
    )
    assert (checked.num_loose, checked.loose_bytes) == (1, len("on its way to be needed"))


async def test_blobs_of_another_are_not_held_against_the_database(data: State) -> None:
    await data.blobs.own(Owner(service="training", database_id="b" * 32))
    with pytest.raises(FailedPrecondition, match="are those of the training service with database bbbb"):
        await data.faults()


async def test_a_blob_that_is_gone_is_missed_by_who_needs_it(data: State) -> None:
    source, rows = await data.put("source"), await data.put("rows")
    await add_version(data, source, rows)
    data.path(rows.sha256).unlink()
    assert await data.faults() == [("missing", rows.sha256, VERSION)]


async def test_what_no_row_keeps_is_found_before_it_is_collected(data: State) -> None:
    source = await data.put("source")
    uid = await add_version(data, source)
    await data.write(lambda connection: connection.execute(delete(blob_refs.blob_refs)))
    assert await data.faults() == [("unrecorded", source.sha256, VERSION)]
    await data.write(lambda connection: blob_refs.refer(connection, uid, [source.sha256]))
    assert await data.faults() == []


async def test_what_may_come_back_needs_its_bytes_and_what_is_purged_does_not(data: State) -> None:
    source, rows = await data.put("source"), await data.put("rows")
    uid = await add_version(data, source, rows)
    versions = datasets.versions()

    async def remove(connection: AsyncConnection) -> None:
        await versions.delete(connection, await versions.of_uid(connection, uid), 60.0)

    await data.write(remove)
    assert await data.faults() == []
    data.path(rows.sha256).unlink()
    assert await data.faults() == [("missing", rows.sha256, VERSION)]
    await data.write(lambda connection: DeletedRows(versions).give_up(connection, uid))
    for _ in (source, rows):
        # As it stands between any two transactions of a purge.
        assert await data.faults() == []
        await data.write(lambda connection: blob_refs.drop_whole(connection, uid, 1))
    assert await data.faults() == []
    await data.write(lambda connection: DeletedRows(versions).purge(connection, uid))
    assert await data.faults() == []


async def test_parts_of_what_is_deleted_need_their_bytes_until_it_is_purged(tmp_path: Path) -> None:
    training = await opened(tmp_path, "training")
    rows = jobs.jobs()

    async def add_and_delete(connection: AsyncConnection) -> str:
        message = FineTuningJob(name=JOB, state=FineTuningJob.STATE_FAILED)
        job = await rows.insert(connection, message, FineTuningJobPrivate())
        files = CheckpointPrivate(files=[BlobFile(path="c", sha256="1" * 64)])
        checkpoint = jobs.StoredCheckpoint(message=Checkpoint(step=5), private=files)
        await jobs.Checkpoints().add(connection, job.uid, checkpoint)
        await rows.delete(connection, job, 60.0)
        return job.uid

    uid = await training.write(add_and_delete)
    assert await training.faults() == [("missing", "1" * 64, f"{JOB}/checkpoints/step-5")]
    await training.write(lambda connection: DeletedRows(rows).give_up(connection, uid))
    await training.write(lambda connection: blob_refs.drop_whole(connection, uid, 1))
    assert await training.faults() == []
    await training.database.close()


async def test_a_row_of_nobody_is_found(data: State) -> None:
    blob = await data.put("kept for ever")
    await data.write(lambda connection: blob_refs.refer(connection, "nobody", [blob.sha256]))
    await data.write(lambda connection: blob_refs.refer(connection, "tasks/ended", [blob.sha256]))
    owners = ("nobody", "tasks/ended")
    assert await data.faults() == [("ownerless", blob.sha256, owner) for owner in owners]


async def test_what_a_worker_is_about_to_send_is_no_fault(data: State) -> None:
    async def lease(connection: AsyncConnection) -> str:
        task = await Tasks().add(connection, new_task("versions/v", TaskKind.BUILD_VERSION))
        wanted = Wanted(worker="w@1", kinds=[TaskKind.BUILD_VERSION], claim="", equipment=Equipment())
        assert await Tasks().take_next(connection, wanted) is not None
        await blob_refs.refer(connection, blob_refs.task_owner(task.task_id), [GONE])
        return task.task_id

    task_id = await data.write(lease)
    assert await data.faults() == []
    await data.write(lambda connection: Tasks().end(connection, task_id))
    assert await data.faults() == [], "what a task was promised goes with its end"


async def test_old_bytes_that_nothing_needs_are_found_unless_they_wait_to_be_collected(data: State) -> None:
    left, loose = await data.put("left by a crash"), await data.put("let go just now")
    for file in (left, loose):
        os.utime(data.path(file.sha256), (0, 0))
    await data.write(lambda connection: blob_refs.note_loose(connection, [loose.sha256]))
    assert await data.faults() == [("unneeded", left.sha256, "")]


@pytest.mark.parametrize(("seconds", "is_overdue"), [(-60.0, False), (10.0, True)])
@pytest.mark.parametrize("is_noted", [True, False])
async def test_what_is_to_be_collected_is_a_fault_once_it_is_overdue(
    data: State, seconds: float, is_overdue: bool, is_noted: bool
) -> None:
    """Between two looks of a service all is well."""
    blob = await data.put("let go")
    begin = time.time() - (GRACE_SECONDS + LOOK_SECONDS + SLACK_SECONDS) - seconds
    if is_noted:
        os.utime(data.path(blob.sha256), (0, 0))
        since_us = round(begin * 1e6)
        await data.write(lambda connection: blob_refs.note_strays(connection, [blob.sha256], since_us))
    else:
        os.utime(data.path(blob.sha256), (begin, begin))
    assert await data.faults() == ([("unneeded", blob.sha256, "")] if is_overdue else [])


async def test_what_is_put_again_while_it_is_checked_is_no_fault(
    data: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = await data.put("put again")
    os.utime(data.path(blob.sha256), (0, 0))
    loose_since = blob_refs.loose_since

    async def put_again(connection: AsyncConnection, digests: Sequence[str]) -> dict[str, int]:
        await data.put("put again")
        return await loose_since(connection, digests)

    monkeypatch.setattr(blob_refs, "loose_since", put_again)
    assert await data.faults() == []


async def test_bytes_that_changed_are_found_when_they_are_read(data: State) -> None:
    source = await data.put("source")
    await add_version(data, source)
    data.path(source.sha256).write_bytes(b"sourcE")
    assert await data.faults() == [("corrupt", source.sha256, VERSION)]
    assert await data.faults(reads=False) == []


async def test_parts_of_jobs_and_evaluations_are_asked_too(tmp_path: Path) -> None:
    training = await opened(tmp_path, "training")

    async def add_job(connection: AsyncConnection) -> None:
        message = FineTuningJob(name=JOB, state=FineTuningJob.STATE_RUNNING)
        private = FineTuningJobPrivate(start_files=[BlobFile(path="s", sha256=GONE)])
        job = await jobs.jobs().insert(connection, message, private)
        files = CheckpointPrivate(files=[BlobFile(path="c", sha256="1" * 64)])
        checkpoint = jobs.StoredCheckpoint(message=Checkpoint(step=5), private=files)
        await jobs.Checkpoints().add(connection, job.uid, checkpoint)
        drawn = RowFile(sha256="2" * 64, size_bytes=1, num_rows=1)
        await jobs.Rollouts().put(connection, job.uid, jobs.StoredRollouts(step=7, attempt=1, file=drawn))

    await training.write(add_job)
    assert await training.faults() == [
        ("missing", GONE, JOB),
        ("missing", "1" * 64, f"{JOB}/checkpoints/step-5"),
        ("missing", "2" * 64, f"rollouts of step 7 of {JOB}"),
    ]
    await training.database.close()
    evaluation = await opened(tmp_path, "evaluation")

    async def add_evaluation(connection: AsyncConnection) -> str:
        message = Evaluation(name=EVALUATION, state=Evaluation.STATE_RUNNING)
        private = EvaluationPrivate(predictions=PredictionFile(sha256=GONE))
        one = await evaluations.evaluations().insert(connection, message, private)
        file = BlobFile(path="answers", sha256="1" * 64)
        await evaluations.AnswerFiles().add(connection, one.uid, 1, 1, [file])
        await evaluations.AnswerFiles().add(
            connection, one.uid, 1, 1, [BlobFile(path="answers", sha256="3" * 64)]
        )
        row = ShareRow(predictions=PredictionFile(sha256="2" * 64))
        await evaluations.Shares().put(connection, one.uid, row)
        return one.uid

    uid = await evaluation.write(add_evaluation)
    assert await evaluation.faults() == [
        ("missing", GONE, EVALUATION),
        ("missing", "1" * 64, f"answers of {EVALUATION}"),
        ("missing", "2" * 64, f"a share of {EVALUATION}"),
    ]

    async def forget(connection: AsyncConnection) -> None:
        await evaluations.AnswerFiles().forget(connection, uid)
        await evaluations.Shares().forget(connection, uid)

    await evaluation.write(forget)
    assert await evaluation.faults() == [("missing", GONE, EVALUATION)]
    await evaluation.database.close()


Fsck = Callable[..., subprocess.CompletedProcess[str]]
"""Runs the command on a home, with options."""


@pytest.fixture
def fsck(programs: Copies) -> Fsck:
    def run(home: Path, *options: str) -> subprocess.CompletedProcess[str]:
        # Where a home's stores are by themselves, whatever those of this run are.
        chosen = stores.environment(home)
        by_itself = {name: value for name, value in environment(home).items() if name not in chosen}
        return programs.run("luthier.daemon", "fsck", *options, environment=by_itself)

    return run


async def test_the_command_tells_people_and_programs_and_ends_with_a_status(data: State, fsck: Fsck) -> None:
    rows = await data.put("rows")
    await add_version(data, rows)
    fine = fsck(data.home, "--service", "data")
    assert (fine.returncode, fine.stderr) == (0, "")
    assert fine.stdout == (
        "data       checked    1 references, 1 blobs of 4 bytes; 0 of 0 bytes wait to be collected\n"
    )
    data.path(rows.sha256).unlink()
    faulty = fsck(data.home, "--service", "data", "--json", "--no-digests")
    assert faulty.returncode == 1
    fault, checked = map(json.loads, faulty.stdout.splitlines())
    assert fault.pop("text").startswith("its bytes are not there")
    assert fault == {
        "service": "data",
        "what": "fault",
        "kind": "missing",
        "digest": rows.sha256,
        "who": VERSION,
    }
    assert (checked["what"], checked["num_needs"], checked["num_blobs"]) == ("checked", 1, 0)


@pytest.mark.parametrize("is_running", [True, False])
async def test_the_command_changes_no_file_no_folder_and_no_time(
    data: State, fsck: Fsck, is_running: bool
) -> None:
    await add_version(data, await data.put("rows"))
    (data.home / "data" / "blobs" / "incoming" / "left").write_bytes(b"what a start would sweep")
    if not is_running:
        await data.database.close()
    before = state_of(data.home)
    assert fsck(data.home, "--service", "data").returncode == 0
    assert state_of(data.home) == before


def test_a_home_where_a_service_never_ran_cannot_be_checked(tmp_path: Path, fsck: Fsck) -> None:
    done = fsck(tmp_path)
    assert done.returncode == 2
    assert f"error: {tmp_path}/data/data.db must be the data service's database, there is none" in done.stderr


def test_a_database_of_another_version_cannot_be_checked(tmp_path: Path, fsck: Fsck) -> None:
    path = tmp_path / "data" / "data.db"
    upgrade(f"sqlite+aiosqlite:///{path}", [work_schema.MIGRATIONS])
    before = path.read_bytes()
    done = fsck(tmp_path, "--service", "data")
    assert done.returncode == 2
    assert re.search(
        r"must be of this version, it holds revision work_\d{4}; start its service with", done.stderr
    )
    assert path.read_bytes() == before, "nothing was changed"
