"""Records that cannot be rendered: all counted, the first kept, and what becomes of the rendering."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.data.result_limits import MAX_ERRORS
from luthier.data.worker.record_rendering import Refused
from luthier.errors import Failure, InvalidArgument, Reason
from luthier.v1.dataset_pb2 import RecordError
from luthier.v1.rendering_pb2 import TEMPLATE_ERROR_POLICY_SKIP, TemplateErrorPolicy

MAX_AT_LIMIT = 5
"""Records of a rendering that may take more than a limit allows, where those that are refused are left out. A small
rendering has five minutes in all."""
_NO_LOOPS = "pass a chat_template without unbounded loops"


class Refusals:
    """Collects refused records. Memory: the first `MAX_ERRORS`.

    Args:
        policy: what they mean for the rendering.
    """

    def __init__(self, policy: TemplateErrorPolicy.ValueType) -> None:
        self._policy = policy
        self._records: list[RecordError] = []
        self._fatal: tuple[RecordError, str] | None = None
        self._num_at_limit = 0
        self._first_at_limit: RecordError | None = None
        self.num_records = 0

    @property
    def records(self) -> tuple[RecordError, ...]:
        """The first ones."""
        return tuple(self._records)

    @property
    def is_fatal(self) -> bool:
        """Whether the rendering fails for what was refused so far."""
        return self._fatal is not None

    @property
    def is_over(self) -> bool:
        """Whether looking for more refused records would take too long: of those that take all their time."""
        return self.is_fatal and self._num_at_limit > 0

    def add(self, row: Mapping[str, Any], error: Refused) -> None:
        """Take in a refused record."""
        refused = _record(row, error)
        self.num_records += 1
        if len(self._records) < MAX_ERRORS:
            self._records.append(refused)
        # LengthPolicy.FAIL is asked for by itself: no policy for templates overrules it.
        fails = self._policy != TEMPLATE_ERROR_POLICY_SKIP or error.reason == Reason.SEQUENCE_TOO_LONG
        if fails and self._fatal is None:
            self._fatal = (refused, error.hint)

    def add_at_limit(self, row: Mapping[str, Any], limit: str) -> None:
        """Take in a record that took more than a limit allows, e.g. `8 s of CPU time`."""
        refused = Refused(
            reason=Reason.TEMPLATE_INVALID, message=f"rendering takes more than {limit}", hint=_NO_LOOPS
        )
        self.add(row, refused)
        self._num_at_limit += 1
        self._first_at_limit = self._first_at_limit or _record(row, refused)
        if self._num_at_limit > MAX_AT_LIMIT and self._fatal is None:
            hint = (
                f"{self._num_at_limit} records take more than a limit allows, at most {MAX_AT_LIMIT} are left out; "
                f"{_NO_LOOPS}"
            )
            self._fatal = (self._first_at_limit, hint)

    def failure(self, num_records: int) -> Failure | None:
        """Return why a rendering of so many records fails, None when it does not."""
        fatal = self._fatal
        if fatal is None and num_records and self.num_records == num_records:
            fatal = (self._records[0], "no record is left")
        if fatal is None:
            return None
        first, hint = fatal
        parts = [f"{first.filename}:{first.line}: {first.message}"]
        parts += [hint] if hint else []
        if self.num_records > 1:
            looked_at = f"the first {num_records}" if self.is_over else f"{num_records}"
            parts.append(
                f"{self.num_records} of {looked_at} records cannot be rendered, as listed by ListRenderingErrors"
            )
        details = {"filename": first.filename, "line": str(first.line)}
        details |= {"num_at_limit": str(self._num_at_limit)} if self._num_at_limit else {}
        return Failure.of(InvalidArgument("; ".join(parts), reason=first.reason, metadata=details))


def _record(row: Mapping[str, Any], error: Refused) -> RecordError:
    return RecordError(filename=row["filename"], line=row["line"], reason=error.reason, message=error.message)
