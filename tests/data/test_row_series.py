"""What /metrics says of data that is prepared: how much, and what is wrong with it, in few series."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

from prometheus_client import CollectorRegistry
from tests.training.jobs.test_series import TASK

import luthier.text.fields
from luthier.data.row_series import RECORD_REASONS, RowSeries
from luthier.errors import Failure
from luthier.runtime.metric import OTHER
from luthier.v1.dataset_pb2 import DatasetStatistics, RecordError
from luthier.v1.event_pb2 import Event, Progress
from luthier.work.tasks import Outcome, TaskKind
from luthier.worker.v1.task_pb2 import BuildVersionResult, RenderResult, TaskResult

BUILD = replace(TASK, kind=TaskKind.BUILD_VERSION)
RENDER = replace(TASK, kind=TaskKind.RENDER)


def progress(completed: int, unit: str) -> Event:
    return Event(progress=Progress(phase="p", completed=completed, total=100, unit=unit))


class Board:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.rows = RowSeries(self.registry)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)

    def bad(self) -> dict[tuple[str, str], float]:
        return {
            (sample.labels["stage"], sample.labels["reason"]): sample.value
            for family in self.registry.collect()
            for sample in family.samples
            if sample.name == "luthier_data_bad_records_total"
        }


def test_progress_is_counted_as_it_comes_and_no_part_twice() -> None:
    board = Board()
    board.rows.reported(RENDER, [progress(10, "records"), progress(25, "records")], None)
    board.rows.reported(RENDER, [progress(25, "records"), progress(40, "records")], None)
    assert board.value("luthier_data_rows_total", stage="rendering") == 40.0
    board.rows.ended(RENDER, None)  # lost: the next attempt does the work again
    board.rows.reported(RENDER, [progress(5, "records")], None)
    assert board.value("luthier_data_rows_total", stage="rendering") == 45.0
    board.rows.reported(BUILD, [progress(70, "bytes")], None)
    assert board.value("luthier_data_source_bytes_total") == 65.0, "one task, one uid"


def test_a_versions_records_are_known_at_its_end() -> None:
    board = Board()
    built = BuildVersionResult(
        statistics=DatasetStatistics(num_records=90), errors=[RecordError(reason="MISSING_FIELD")]
    )
    board.rows.ended(BUILD, Outcome(result=TaskResult(build_version=built)))
    assert board.value("luthier_data_rows_total", stage="version") == 90.0
    assert board.bad() == {("version", "MISSING_FIELD"): 1.0}


def test_bad_records_of_what_failed_count_too_and_a_flood_of_reasons_is_one() -> None:
    board = Board()
    failure = Failure(code="INVALID_ARGUMENT", reason="INVALID_RECORDS", message="m")
    rendered = RenderResult(errors=[RecordError(reason=f"MADE_UP_{number}") for number in range(500)])
    board.rows.ended(RENDER, Outcome(failure=failure, result=TaskResult(render=rendered)))
    assert board.bad() == {("rendering", OTHER): 500.0}


def test_every_reason_that_readers_give_has_a_series() -> None:
    """Also those that are added tomorrow."""
    given = set()
    folder = Path(luthier.text.fields.__file__).parent
    for node in (node for path in folder.glob("*.py") for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("RecordError", "Line"):
            words = [*node.args[1:2], *(one.value for one in node.keywords if one.arg == "reason")]
            given |= {
                one.value for one in words if isinstance(one, ast.Constant) and isinstance(one.value, str)
            }
    assert len(given) > 10
    assert given <= RECORD_REASONS
