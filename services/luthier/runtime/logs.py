"""Logs as JSON lines on standard error, with the fields of the call or task they belong to."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from luthier.errors import InvalidArgument

_fields: ContextVar[Mapping[str, str]] = ContextVar("luthier_log_fields", default={})  # noqa: B039 - never changed in place
_MAX_FIELD = 500
"""Characters of a field: what callers send is in some, and may be as long as a request."""
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


@contextmanager
def bind(**fields: str) -> Iterator[None]:
    """Add fields to every line that the block writes."""
    token = _fields.set({**_fields.get(), **fields})
    try:
        yield
    finally:
        _fields.reset(token)


def bound() -> Mapping[str, str]:
    """Return the fields that every line has here, for `bind` elsewhere."""
    return _fields.get()


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, bound fields, extra fields, trace."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, tz=UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **{name: value[:_MAX_FIELD] for name, value in _fields.get().items()},
        }
        line |= {name: _cut(value) for name, value in vars(record).items() if name not in _STANDARD}
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


def _cut(value: object) -> object:
    return value[:_MAX_FIELD] if isinstance(value, str) else value


def configure(level: str) -> None:
    """Send every log of the process to standard error, from `level` on. Raises InvalidArgument."""
    if level.upper() not in _LEVELS:
        raise InvalidArgument(f"LUTHIER_LOG_LEVEL must be one of {', '.join(_LEVELS)}, got {level!r}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
