"""Prometheus metrics of data that is prepared: how much, how fast, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry

from luthier.runtime.catalogue import work_done
from luthier.runtime.metric import reason_label
from luthier.v1.dataset_pb2 import RecordError
from luthier.v1.event_pb2 import Event
from luthier.work.tasks import Outcome, Task, TaskKind
from luthier.worker.v1.worker_service_pb2 import CommitCheckpointRequest, TaskFigures

_STAGES = {TaskKind.BUILD_VERSION: "version", TaskKind.RENDER: "rendering"}
RECORD_REASONS = frozenset(
    {
        "ARGUMENTS_NOT_OBJECT",
        "AMBIGUOUS_PROMPT",
        "EMPTY_FIELD",
        "EQUAL_SIDES",
        "INVALID_JSON",
        "INVALID_TEXT",
        "MISSING_FIELD",
        "NOT_TEXT",
        "PRETTY_PRINTED_JSON",
        "RECORD_TOO_LONG",
        "UNKNOWN_FIELD",
        "UNKNOWN_ROLE",
        "WRONG_ROLE",
        "WRONG_ROLE_ORDER",
        "WRONG_TYPE",
        "WRONG_VALUE",
    }
)
"""What is wrong with a record, in words of `luthier.text`, beside the reasons of errors."""


class RowSeries:
    """Counts records and bytes as workers report them: an observer of tasks."""

    def __init__(self, registry: CollectorRegistry) -> None:
        rows = work_done.ROWS.counter(registry)
        self._rows = {kind: rows.labels(stage) for kind, stage in _STAGES.items()}
        self._bytes = work_done.SOURCE_BYTES.counter(registry)
        self._bad = work_done.BAD_RECORDS.counter(registry)
        self._completed: dict[str, int] = {}

    def began(self, task: Task) -> None:
        """Nothing is to be noted."""

    def reported(self, task: Task, events: Sequence[Event], figures: TaskFigures | None) -> None:
        """Count what was done since the report before: bytes of a version's files, records of a rendering."""
        for event in events:
            if not event.HasField("progress"):
                continue
            done = event.progress.completed
            more = done - self._completed.get(task.uid, 0)
            if more <= 0:
                continue
            self._completed[task.uid] = done
            counter = self._bytes if event.progress.unit == "bytes" else self._rows[task.kind]
            counter.inc(more)

    def checkpointed(self, task: Task, request: CommitCheckpointRequest) -> None:
        """Nothing is to be noted."""

    def ended(self, task: Task, outcome: Outcome | None) -> None:
        """Count what only the outcome says: a version's records, and those that were bad."""
        self._completed.pop(task.uid, None)
        if outcome is None or outcome.result is None:
            return
        built, rendered = outcome.result.build_version, outcome.result.render
        self._rows[TaskKind.BUILD_VERSION].inc(built.statistics.num_records)
        self._count_bad("version", built.errors)
        self._count_bad("rendering", rendered.errors)

    def _count_bad(self, stage: str, errors: Iterable[RecordError]) -> None:
        for error in errors:
            known = error.reason in RECORD_REASONS
            self._bad.labels(stage, error.reason if known else reason_label(error.reason)).inc()
