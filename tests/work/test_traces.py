"""A trace goes on through a task: to its attempts, which are linked, its worker, its child, and what they store."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

from prometheus_client import CollectorRegistry
from sqlalchemy import text
from tests.kept_spans import Kept, id_of, kept_spans, trace_of
from tests.stores import open_database
from tests.work.hosted import Site, serve

from luthier.errors import Reason, Unavailable
from luthier.runtime import tracing
from luthier.runtime.logs import JsonFormatter, bind, bound
from luthier.work.child_watch import Always
from luthier.work.children import Children, Program
from luthier.work.context import TaskContext
from luthier.work.phase_spans import PhaseSpans
from luthier.work.store_metrics import DatabaseMetrics
from luthier.worker.v1.task_pb2 import TaskResult, TrainResult

# Answers with the fields that its own lines have.
CHILD = """
from luthier.runtime.logs import bound
from luthier.work.child import serve

serve(lambda setup: lambda line, order: dict(bound()))
"""
SECRET = 1_234_567_890_123
DONE = TaskResult(train=TrainResult(step=1))


async def asked(site: Site) -> str:
    """Queue a task in a call of a trace; returns that."""
    with tracing.span("call", parent="") as span:
        await site.enqueue()
    return span.trace_id


async def test_attempts_are_of_the_trace_that_asked_and_linked(tmp_path: Path) -> None:
    def runner(context: TaskContext) -> TaskResult:
        context.progress("loading", 0, 0, "files")
        if context.task.attempt == 1:
            raise Unavailable("gone", reason=Reason.CRASHED)
        context.progress("training", 1, 2, "steps")
        context.progress("training", 2, 2, "steps")
        path = context.scratch / "x"
        path.write_bytes(b"weights")
        context.commit_checkpoint(1, [context.store(path, "x")], {})
        return DONE

    with kept_spans() as kept:
        async with serve(tmp_path / "home") as site:
            trace_id = await asked(site)
            async with site.worker(runner):
                await site.until(lambda: "SUCCEEDED" in site.states)
    first, second = kept.named("hand out TRAIN")
    assert {trace_of(first), trace_of(second)} == {trace_id}
    assert (first.links, [link.context.span_id for link in second.links]) == ((), [id_of(first)])
    lost, done = kept.named("attempt TRAIN")
    assert [span.parent and span.parent.span_id for span in (lost, done)] == [id_of(first), id_of(second)]
    assert lost.status.description == "CRASHED"
    assert done.status.is_unset
    told = dict(done.attributes or {})
    assert (told["luthier.subject"], told["luthier.attempt"]) == ("jobs/a", 2)
    parts = kept.below(done)
    assert parts.count("loading") == parts.count("training") == 1, "each phase once, however often it is told"
    service = "luthier.worker.v1.WorkerService"
    assert {f"{service}/{method}" for method in ("PutBlob", "CommitCheckpoint", "FinishTask")} <= set(parts)
    assert not kept.named(f"{service}/Heartbeat"), "they would hide all else"
    commit = kept.one(f"{service}/CommitCheckpoint")
    assert {"UPDATE tasks", "COMMIT"} <= set(kept.below(commit))
    assert "blob write" in kept.below(kept.one(f"{service}/PutBlob"))


async def test_a_task_of_no_trace_keeps_none(tmp_path: Path) -> None:
    with kept_spans() as kept:
        async with serve(tmp_path / "home") as site:
            await site.enqueue()
            async with site.worker(lambda _: DONE):
                await site.until(lambda: "SUCCEEDED" in site.states)
    assert not [span.name for span in kept.all if "attempt" in span.name or "hand out" in span.name]


async def test_statements_are_of_the_call_that_makes_them(tmp_path: Path) -> None:
    database = open_database(tmp_path / "test")
    database.observe(DatabaseMetrics(CollectorRegistry()))
    with kept_spans() as kept:
        async with database.transaction() as connection:
            await connection.execute(text("CREATE TABLE t (x INTEGER)"))
        assert [span.name for span in kept.all] == [], "of no call"

        async def call(name: str) -> None:
            with tracing.span(name, parent=""):
                async with database.transaction() as connection:
                    await connection.execute(text("INSERT INTO t VALUES (:x)"), {"x": SECRET})
                await database.rows(text("SELECT x FROM t"))

        await asyncio.gather(call("a"), call("b"))
    await database.close()
    for name in ("a", "b"):
        parts = sorted(kept.below(kept.one(name)))
        assert parts == ["BEGIN", "BEGIN", "COMMIT", "INSERT t", "SELECT t", "wait for other writers"]
    shown = [str(dict(one.attributes or {})) for one in kept.all]
    assert any("INSERT INTO t VALUES" in one for one in shown)
    assert not any(str(SECRET) in one for one in shown), "values may be secrets"


def test_a_child_is_a_part_and_its_lines_have_the_fields_of_the_attempt(tmp_path: Path) -> None:
    program = tmp_path / "child.py"
    program.write_text(CHILD)
    with (
        Children(Program(command=("-P", str(program)))) as children,
        kept_spans() as kept,
        tracing.span("attempt", parent=""),
        bind(subject="jobs/a", attempt="3"),
    ):
        fields = children.run(None, {}, Always())
    assert fields == {"subject": "jobs/a", "attempt": "3"}
    child = kept.one("child")
    assert int(dict(child.attributes or {})["process.pid"]) > 0  # type: ignore[arg-type]
    assert kept.below(kept.one("attempt")) == ["child"]


async def test_lines_of_a_worker_say_of_which_attempt_they_are(tmp_path: Path) -> None:
    lines: list[dict[str, object]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(json.loads(JsonFormatter().format(record)))

    logger = logging.getLogger("luthier.test")
    keep = Keep()
    logger.addHandler(keep)

    def runner(context: TaskContext) -> TaskResult:
        logger.warning("in the runner's thread")
        return DONE

    with kept_spans():
        async with serve(tmp_path / "home") as site:
            trace_id = await asked(site)
            async with site.worker(runner):
                await site.until(lambda: "SUCCEEDED" in site.states)
    logger.removeHandler(keep)
    (line,) = lines
    assert (line["subject"], line["attempt"], line["trace_id"]) == ("jobs/a", "1", trace_id)
    assert bound() == {}


def test_phases_follow_one_another() -> None:
    now = [0.0]
    phases = PhaseSpans(lambda: now[0])
    with kept_spans() as kept, tracing.span("attempt", parent=""):
        for at, phase in ((0.0, "loading"), (2.0, "training"), (3.0, "training")):
            now[0] = at
            phases.enter(phase)
        now[0] = 7.0
        phases.end()
        phases.end()
    lengths = {span.name: _seconds(kept, span.name) for span in kept.all if span.name != "attempt"}
    assert lengths == {"loading": 2.0, "training": 5.0}


def _seconds(kept: Kept, name: str) -> float:
    span = kept.one(name)
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e9
