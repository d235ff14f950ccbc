"""The process that runs untrusted templates on a version's records: a limited process.

The first request is `RecordSettings`, the answer `Teaching`; each after it is `{"record"}`, the answer
`RenderedRecord`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cattrs import Converter
from cattrs.preconf.json import make_converter

from luthier.data.worker.record_rendering import RecordRenderer, RecordSettings
from luthier.work.limited_child import Note, serve


def converter() -> Converter:
    """Return the converter between the messages and JSON values."""
    return make_converter()


class _Child:
    """Renders what it is asked for; holds no file open and writes none."""

    def __init__(self) -> None:
        self._converter = converter()
        self._renderer: RecordRenderer | None = None

    def handle(self, request: Mapping[str, Any], _: Note) -> dict[str, Any]:
        """Answer one request. Raises InvalidArgument for settings that no record can be rendered with."""
        if self._renderer is None:
            self._renderer = RecordRenderer(self._converter.structure(request, RecordSettings))
            teaching: dict[str, Any] = self._converter.unstructure(self._renderer.teaching())
            return teaching
        rendered: dict[str, Any] = self._converter.unstructure(self._renderer.render(request["record"]))
        return rendered


def main() -> None:
    """Render what the parent asks for."""
    serve(_Child().handle, writes_files=False)


if __name__ == "__main__":
    main()
