"""The process that runs untrusted templates on a version's records: a limited process.

The first request is `RecordSettings`, the answer `Teaching`; each after it is `{"record", "other"}`, the answer
`RenderedRecord`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from luthier.data.worker.record_rendering import RecordRenderer, RecordSettings
from luthier.work.limited_child import Note, serve


class _Child:
    """Renders what it is asked for; holds no file open and writes none."""

    def __init__(self) -> None:
        self._renderer: RecordRenderer | None = None

    def handle(self, request: Mapping[str, Any], _: Note) -> dict[str, Any]:
        """Answer one request. Raises InvalidArgument for settings that no record can be rendered with."""
        if self._renderer is None:
            self._renderer = RecordRenderer(msgspec.convert(request, RecordSettings))
            teaching: dict[str, Any] = msgspec.to_builtins(self._renderer.teaching())
            return teaching
        rendered: dict[str, Any] = msgspec.to_builtins(
            self._renderer.render(request["record"], request["other"])
        )
        return rendered


def main() -> None:
    """Render what the parent asks for."""
    serve(_Child().handle, writes_files=False)


if __name__ == "__main__":
    main()
