"""An attempt is an error in its trace where the service is at fault, and its lines quote no records."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import StatusCode
from tests.kept_spans import id_of, kept_spans, trace_of
from tests.work.conftest import Bench
from tests.work.hosted import serve

from luthier.errors import InvalidArgument, LuthierError, Reason, Unavailable
from luthier.runtime import tracing
from luthier.runtime.logs import JsonFormatter
from luthier.work.context import TaskContext
from luthier.worker.v1.task_pb2 import TaskResult, TrainResult

DONE = TaskResult(train=TrainResult(step=1))
RECORD = "my secret record"


@contextmanager
def lines_of_tasks() -> Iterator[list[dict[str, object]]]:
    """Lines that workers write of tasks, as they are in the journal."""
    lines: list[dict[str, object]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(json.loads(JsonFormatter().format(record)))

    logger, keep = logging.getLogger("luthier.work.running"), Keep()
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(keep)
    try:
        yield lines
    finally:
        logger.removeHandler(keep)
        logger.setLevel(before)


async def first_attempt(home: Path, error: LuthierError, last: str) -> ReadableSpan:
    """The span of an attempt that ends so; its task goes on until `last`."""

    def runner(context: TaskContext) -> TaskResult:
        if context.task.attempt == 1:
            raise error
        return DONE

    with kept_spans() as kept:
        async with serve(home) as site:
            with tracing.span("call", parent=""):
                await site.enqueue()
            async with site.worker(runner):
                await site.until(lambda: last in site.states)
        return kept.named("attempt TRAIN")[0]


async def test_an_attempt_given_back_is_no_error(tmp_path: Path) -> None:
    with lines_of_tasks() as lines:
        span = await first_attempt(
            tmp_path / "home", Unavailable("it stops", reason=Reason.SHUTTING_DOWN), "SUCCEEDED"
        )
    assert span.status.is_unset
    assert dict(span.attributes or {})["luthier.reason"] == "SHUTTING_DOWN"
    told = [(line["message"], line["level"]) for line in lines if "reason" in line]
    assert told == [("the task is given back", "INFO")]


async def test_a_callers_fault_is_no_error_and_its_records_are_in_no_line(tmp_path: Path) -> None:
    refused = InvalidArgument(
        f"a.jsonl:3: {RECORD}",
        reason=Reason.INVALID_RECORDS,
        metadata={"filename": "a.jsonl", "line": "3", "path": RECORD},
    )
    with lines_of_tasks() as lines:
        span = await first_attempt(tmp_path / "home", refused, "FAILED")
    assert span.status.is_unset
    assert dict(span.attributes or {})["luthier.reason"] == "INVALID_RECORDS"
    (line,) = (line for line in lines if line["message"] == "task failed")
    assert (line["reason"], line["file"], line["line"]) == ("INVALID_RECORDS", "a.jsonl", "3")
    assert RECORD not in json.dumps(lines)


async def test_a_fault_of_the_service_is_an_error_with_its_words(tmp_path: Path) -> None:
    with lines_of_tasks() as lines:
        span = await first_attempt(
            tmp_path / "home", Unavailable("signal 11", reason=Reason.CRASHED), "SUCCEEDED"
        )
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "CRASHED")
    (line,) = (line for line in lines if line["message"] == "task failed")
    assert line["detail"] == "signal 11"


async def test_an_attempt_whose_worker_is_gone_leaves_a_failed_span(bench: Bench) -> None:
    with kept_spans() as kept:
        with tracing.span("call", parent=""):
            await bench.enqueue()
        assert await bench.claim("w@1") is not None
        await bench.queue.release_worker("w", "2")
        lost, handed = kept.one("lost TRAIN"), kept.one("hand out TRAIN")
    assert (lost.status.status_code, lost.status.description) == (StatusCode.ERROR, "WORKER_LOST")
    assert lost.parent is not None
    assert (trace_of(lost), lost.parent.span_id) == (trace_of(handed), id_of(handed))
    assert dict(lost.attributes or {}) == {
        "luthier.subject": "jobs/a",
        "luthier.attempt": 1,
        "luthier.worker": "w",
    }


async def test_an_attempt_that_nobody_traces_is_no_part_of_the_one_before(bench: Bench) -> None:
    with kept_spans() as kept:
        with tracing.span("call", parent=""):
            await bench.enqueue()
        first = await bench.claim("w@1")
    assert first is not None
    assert first.attempt_traceparent.split("-")[2] == f"{id_of(kept.one('hand out TRAIN')):016x}"
    await bench.queue.release_worker("w", "2")
    second = await bench.claim("w@2")
    assert second is not None
    assert (second.attempt, second.attempt_traceparent) == (2, "")
