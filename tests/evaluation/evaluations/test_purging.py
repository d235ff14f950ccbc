"""Whatever an evaluation leaves when its work is given up goes with its purge: answers, shares, predictions, bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import func, insert, select, update
from tests.evaluation.evaluations.conftest import Bench
from tests.evaluation.evaluations.test_dealing import SHARE, TWO, part
from tests.work.collected import collect_later, purge_later

from luthier.evaluation.purged import PURGED
from luthier.evaluation.schema import OF_EVALUATIONS, answer_files, predictions, shares
from luthier.storage.blob_refs import blob_refs
from luthier.v1.evaluation_pb2 import Evaluation
from luthier.work import schema
from luthier.work.tasks import Outcome, TaskState
from luthier.worker.v1 import task_pb2, worker_service_pb2


async def num_rows(bench: Bench) -> dict[str, int]:
    found = {}
    for table in (*OF_EVALUATIONS, blob_refs):
        rows = await bench.database.rows(select(func.count().label("number")).select_from(table))
        found[table.name] = rows[0]["number"]
    return found


@pytest.fixture
async def given_up(bench: Bench, tmp_path: Path) -> list[str]:
    """An evaluation whose service gave up its work: what was brought is left. Returns the digests of its blobs."""
    made = await bench.create(**TWO)
    first, _ = await bench.claim(SHARE)
    second, _ = await bench.claim(SHARE, "v@1")
    answers = await bench.blobs.put_bytes(b"answers of the second")
    file = task_pb2.BlobFile(path="answers", sha256=answers.digest, size_bytes=answers.size_bytes)
    await bench.queue.commit_checkpoint(
        worker_service_pb2.CommitCheckpointRequest(
            task=second.task_id, epoch=second.epoch, step=1, files=[file]
        )
    )
    result = await part(bench, tmp_path, "zero")
    await bench.queue.finish(first.task_id, first.epoch, Outcome(result=result))
    async with bench.database.transaction() as connection:
        # As a task is left that cannot be handed out while its resource cannot be told.
        await connection.execute(update(schema.tasks).values(state=TaskState.DONE))
        former = {"owner": made.uid, "row": 0, "prediction": b"as before predictions were files"}
        await connection.execute(insert(predictions), [former])
    assert (await bench.cancel(made.name)).state == Evaluation.STATE_CANCELLED
    return [answers.digest, result.answer_share.predictions.sha256]


async def test_what_is_left_of_an_evaluation_stays_while_it_may_come_back_and_goes_with_its_purge(
    bench: Bench, given_up: list[str]
) -> None:
    name = "projects/default/evaluations/e"
    had = await num_rows(bench)
    assert min(had[table.name] for table in (answer_files, shares, predictions)) > 0
    await bench.service.family.delete(name, "")
    await collect_later(bench.database, bench.blobs)
    assert await num_rows(bench) == had
    assert [await bench.blobs.has(one) for one in given_up] == [True, True], "it may come back"
    await purge_later(bench.database, PURGED)
    assert await num_rows(bench) == dict.fromkeys(had, 0)
    await collect_later(bench.database, bench.blobs)
    assert [await bench.blobs.has(one) for one in given_up] == [False, False]
