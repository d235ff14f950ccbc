"""Whether the records of prompts have what a grader reads of them, looked at before anything is drawn."""

from __future__ import annotations

from typing import Any

from luthier.errors import InvalidArgument
from luthier.grading.item_fields import ItemFields
from luthier.grading.outcomes import GradingError
from luthier.v1.grader_pb2 import Grader
from luthier.work.limited import Check

_ROWS_A_CHECK = 1000


class ItemCheck:
    """Looks at the records of a rendering as they come."""

    def __init__(self, grader: Grader, check: Check) -> None:
        self._fields = ItemFields(grader)
        self._check = check
        self._num_rows = 0
        self._num_missing = 0
        self._first: InvalidArgument | None = None

    def add(self, batch: Any) -> None:
        """Look at a record batch, which has the column `record`. Raises what `check` raises."""
        if not self._fields:
            return
        names = ("record", "filename", "line", "row")
        columns = [
            batch.column(name).to_pylist() if name in batch.schema.names else [None] * batch.num_rows
            for name in names
        ]
        for record, filename, line, row in zip(*columns, strict=True):
            if self._num_rows % _ROWS_A_CHECK == 0:
                self._check()
            self._num_rows += 1
            try:
                self._fields.require(record)
            except GradingError as error:
                self._num_missing += 1
                place = f"{filename} line {line}" if filename else f"row {row}"
                self._first = self._first or InvalidArgument(
                    f"the first is {place}: {error.message}",
                    reason=error.reason,
                    metadata={"filename": filename or "", "line": str(line or 0), "row": str(row)},
                )

    def require(self) -> None:
        """Return if every record had all that is read of it.

        Raises:
            InvalidArgument: TEMPLATE_FIELD_MISSING; it names the first that has not, by file and line, and how many.
        """
        if self._first is not None:
            raise InvalidArgument(
                f"records must have what the grader reads of them, those of {self._num_missing} of {self._num_rows} "
                f"prompts have not; {self._first.message}",
                reason=self._first.reason,
                metadata=self._first.metadata,
            )
