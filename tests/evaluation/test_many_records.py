"""An evaluation of 50,000 records is handed in: the service goes on answering, reading and writing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from luthier.v1 import chat_pb2, evaluation_pb2
from luthier.work.context import TaskContext
from luthier.work.row_file import write_rows
from luthier.work.tasks import TaskKind
from luthier.work.worker import WorkerSettings, work_until
from luthier.worker.v1 import task_pb2

RECORDS = 50_000
MOST_LAG_SECONDS = 0.25
"""Parsing the records takes seconds; what two busy cores do to a loop that does not is below this."""


def prediction(row: int) -> bytes:
    scores = {f"field_match.field.{name}": 1.0 for name in ("colour", "number", "size")}
    answers = [
        evaluation_pb2.ArmPrediction(
            arm_id=arm,
            text='{"colour": "red"}' * 4,
            finish_reason=evaluation_pb2.FINISH_REASON_STOP,
            scores=scores,
        )
        for arm in ("zero", "tuned")
    ]
    message = evaluation_pb2.Prediction(
        row=row,
        record_id=f"{row:064x}",
        prompt=[chat_pb2.ChatMessage(role="user", content=f"what colour has thing {row}?")],
        reference='{"colour": "red"}' * 4,
        answers=answers,
    )
    return message.SerializeToString(deterministic=True)


@asynccontextmanager
async def measured_lag(lags: list[float]) -> AsyncIterator[None]:
    """Note how late the event loop is, a hundred times a second, for the length of a block."""

    async def watch() -> None:
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.01)
            lags.append(time.monotonic() - began - 0.01)

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()


async def test_handing_in_many_records_holds_neither_the_loop_nor_the_writers_up(
    site: Any, tmp_path: Path
) -> None:
    path = tmp_path / "predictions"
    write_rows(path, map(prediction, range(RECORDS)))

    def run(context: TaskContext) -> task_pb2.TaskResult:
        arm = evaluation_pb2.ArmResult(
            arm_id="zero",
            template_source=evaluation_pb2.TEMPLATE_SOURCE_BASE,
            template_date="2026-11-28",
        )
        predictions = context.store(path, "predictions")
        outcome = task_pb2.EvaluateResult(arm_results=[arm], num_records=RECORDS, predictions=predictions)
        return task_pb2.TaskResult(evaluate=outcome)

    settings = WorkerSettings(
        service_address=site.address,
        worker_id="evaluation",
        credential=site.keys.worker_key,
        work_folder=site.home / "work",
        cache_folder=site.home / "cache",
        cache_bytes=1 << 30,
    )
    stopping = asyncio.Event()
    made = await site.evaluate()
    lags: list[float] = []
    waits: list[float] = []
    work = asyncio.create_task(work_until(settings, {TaskKind.EVALUATE: run}, stopping))
    async with measured_lag(lags):
        while (now := await site.get(made.name)).state != evaluation_pb2.Evaluation.STATE_SUCCEEDED:
            assert now.state != evaluation_pb2.Evaluation.STATE_FAILED, now.error.message
            began = time.monotonic()
            await site.evaluate(labels={"number": str(len(waits))})
            waits.append(time.monotonic() - began)
        page = await site.predictions(made.name)
    stopping.set()
    await asyncio.wait_for(work, 20)
    assert [one.row for one in page] == list(range(1000))
    assert page[7].answers[1].scores["field_match.field.size"] == 1.0
    assert max(lags) < MOST_LAG_SECONDS
    assert max(waits) < 4 * MOST_LAG_SECONDS
