"""The process that runs untrusted templates on a version's records: a limited process.

The first request is `RecordSettings`, the answer `Teaching`; each after it is `{"record", "other"}`, the answer
`RenderedRecord`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from time import process_time
from typing import Any

import msgspec

from luthier.data.worker.record_rendering import RecordRenderer, RecordSettings
from luthier.work.limited_child import Note, serve

_NOTE_SECONDS = 0.25
"""Of CPU time, passed or spent, from one note to the next: one behind every part took a seventh of a rendering."""


class _Child:
    """Renders what it is asked for; holds no file open and writes none.

    A record may take for each of its parts what asking for a row may take: a note goes out between them.
    """

    def __init__(self) -> None:
        self._renderer: RecordRenderer | None = None
        self._noted_at = self._spent_seconds = 0.0

    def handle(self, request: Mapping[str, Any], note: Note) -> dict[str, Any]:
        """Answer one request. Raises InvalidArgument for settings that no record can be rendered with."""
        self._noted_at, self._spent_seconds = process_time(), 0.0
        if self._renderer is None:
            settings = msgspec.convert(request, RecordSettings)
            # All notes of a process go the same way.
            self._renderer = RecordRenderer(settings, partial(self._between, note))
            teaching: dict[str, Any] = msgspec.to_builtins(self._renderer.teaching())
            return teaching
        rendered: dict[str, Any] = msgspec.to_builtins(
            self._renderer.render(request["record"], request["other"])
        )
        return rendered

    def _between(self, note: Note, spent_seconds: float) -> None:
        now = process_time()
        if max(now - self._noted_at, abs(spent_seconds - self._spent_seconds)) >= _NOTE_SECONDS:
            note({}, spent_seconds)
            self._noted_at, self._spent_seconds = now, spent_seconds


def main() -> None:
    """Render what the parent asks for."""
    serve(_Child().handle, writes_files=False)


if __name__ == "__main__":
    main()
