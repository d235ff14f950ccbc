"""A job's metrics as a whole: by step, and as tables of Arrow and pandas."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, overload

from luthier.client.notebooks import rows_html
from luthier.errors import FailedPrecondition
from luthier.v1.fine_tuning_job_pb2 import MetricPoint

if TYPE_CHECKING:
    import pandas
    import pyarrow

_SHOWN = 10


class MetricTable(Sequence[MetricPoint]):
    """The metrics of a job by step, as they were when it was read; notebooks show its last steps."""

    def __init__(self, points: Iterable[MetricPoint]) -> None:
        self._points = tuple(points)
        self.names: tuple[str, ...] = tuple(sorted({name for point in self._points for name in point.values}))
        """Of the metrics, in alphabetical order."""

    @overload
    def __getitem__(self, index: int) -> MetricPoint: ...
    @overload
    def __getitem__(self, index: slice) -> MetricTable: ...
    def __getitem__(self, index: int | slice) -> MetricPoint | MetricTable:
        """Return the metrics of one step, by place, or a part of the table."""
        return MetricTable(self._points[index]) if isinstance(index, slice) else self._points[index]

    def __len__(self) -> int:
        return len(self._points)

    def __iter__(self) -> Iterator[MetricPoint]:
        return iter(self._points)

    def __repr__(self) -> str:
        last = f", the last is {self._points[-1].step}" if self._points else ""
        return f"<MetricTable of {len(self)} steps{last}: {', '.join(self.names)}>"

    def column(self, name: str) -> list[float | None]:
        """Return a metric by step; None where a step does not have it. Raises KeyError when no step has it."""
        if name not in self.names:
            raise KeyError(f"no metric {name!r}; there are {', '.join(self.names) or 'none'}")
        return [point.values.get(name, None) for point in self._points]

    def steps(self) -> list[int]:
        """Return the steps."""
        return [point.step for point in self._points]

    def to_arrow(self) -> pyarrow.Table:
        """Return a table with `step` and a column for each metric, null where a step does not have it.

        Raises FailedPrecondition when pyarrow is not installed.
        """
        try:
            import pyarrow
        except ImportError as error:
            raise FailedPrecondition(
                "tables of Arrow need pyarrow: pip install 'luthier-client[arrow]'"
            ) from error
        columns = {name: pyarrow.array(self.column(name), pyarrow.float64()) for name in self.names}
        return pyarrow.table({"step": pyarrow.array(self.steps(), pyarrow.int64()), **columns})

    def to_pandas(self) -> pandas.DataFrame:
        """Return a frame with the steps as index and a column for each metric, NaN where a step does not have it.

        Raises FailedPrecondition when pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise FailedPrecondition("frames need pandas: pip install pandas") from error
        columns = {name: self.column(name) for name in self.names}
        return pandas.DataFrame(columns, index=pandas.Index(self.steps(), name="step"), dtype="float64")

    def _repr_html_(self) -> str:
        last = self._points[-_SHOWN:]
        rows = [
            [
                str(point.step),
                *(f"{point.values[name]:.5g}" if name in point.values else "" for name in self.names),
            ]
            for point in last
        ]
        return rows_html(["step", *self.names], rows, f"the last {len(last)} of {len(self)} steps")
