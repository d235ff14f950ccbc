"""Records that cannot be rendered: all counted, the first kept, and what becomes of the rendering."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.data.renderings.rules import MAX_ERRORS
from luthier.errors import Failure, InvalidArgument, Reason
from luthier.text.panics import TokenizerError
from luthier.text.rendering import RenderingError
from luthier.text.templates import TemplateError
from luthier.v1.dataset_pb2 import RecordError
from luthier.v1.rendering_pb2 import TEMPLATE_ERROR_POLICY_SKIP, TemplateErrorPolicy


class Refusals:
    """Collects refused records. Memory: the first `MAX_ERRORS`.

    Args:
        policy: what they mean for the rendering.
    """

    def __init__(self, policy: TemplateErrorPolicy.ValueType) -> None:
        self._policy = policy
        self._records: list[RecordError] = []
        self._fatal: tuple[RecordError, str] | None = None
        self.num_records = 0

    @property
    def records(self) -> tuple[RecordError, ...]:
        """The first ones."""
        return tuple(self._records)

    @property
    def is_fatal(self) -> bool:
        """Whether the rendering fails for what was refused so far."""
        return self._fatal is not None

    def add(self, row: Mapping[str, Any], error: TemplateError | TokenizerError | RenderingError) -> None:
        """Take in a refused record."""
        reason = Reason.TEMPLATE_INVALID if isinstance(error, TemplateError) else error.reason
        refused = RecordError(filename=row["filename"], line=row["line"], reason=reason, message=str(error))
        self.num_records += 1
        if len(self._records) < MAX_ERRORS:
            self._records.append(refused)
        # LengthPolicy.FAIL is asked for by itself: no policy for templates overrules it.
        fails = self._policy != TEMPLATE_ERROR_POLICY_SKIP or reason == Reason.SEQUENCE_TOO_LONG
        if fails and self._fatal is None:
            self._fatal = (refused, error.hint if isinstance(error, RenderingError) else "")

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
            parts.append(
                f"{self.num_records} of {num_records} records cannot be rendered, as listed by ListRenderingErrors"
            )
        place = {"filename": first.filename, "line": str(first.line)}
        return Failure.of(InvalidArgument("; ".join(parts), reason=first.reason, metadata=place))
