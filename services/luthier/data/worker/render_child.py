"""The process that runs untrusted templates on a whole version: a limited process with one request.

The request is a `RenderPlan`; a note tells of each record that begins: `{"done", "filename", "line"}`.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cattrs import Converter
from cattrs.preconf.json import make_converter
from google.protobuf.message import Message

from luthier.data.worker.rendering import RenderPlan, render_plan
from luthier.storage.disk import disk_full, is_full
from luthier.work.limited_child import Note, serve


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """A record that begins: how many are done before it, and where it stands."""

    done: int = 0
    filename: str = ""
    line: int = 0

    @property
    def metadata(self) -> dict[str, str]:
        """Its place, as errors carry it."""
        return {"filename": self.filename, "line": str(self.line)}


def _is_message(type_: Any) -> bool:
    return isinstance(type_, type) and issubclass(type_, Message)


def converter() -> Converter:
    """Return the converter between the messages and JSON values."""
    made = make_converter()
    # Messages travel as text of their bytes: JSON has no bytes.
    made.register_unstructure_hook_func(
        _is_message, lambda value: base64.b64encode(value.SerializeToString()).decode()
    )
    made.register_structure_hook_func(
        _is_message, lambda value, type_: type_.FromString(base64.b64decode(value))
    )
    made.register_unstructure_hook(Path, str)
    made.register_structure_hook(Path, lambda value, _: Path(value))
    return made


def render(request: Mapping[str, Any], note: Note) -> dict[str, Any]:
    """Render what a request plans.

    Raises InvalidArgument that names file and line of the record at fault, and ResourceExhausted DISK_FULL.
    """

    def begin(done: int, row: Mapping[str, Any]) -> None:
        note(dataclasses.asdict(Begun(done=done, filename=row["filename"], line=row["line"])))

    try:
        rendered = render_plan(converter().structure(request, RenderPlan), begin)
    except OSError as error:
        if not is_full(error):
            raise
        raise disk_full(str(error)) from error
    result: dict[str, Any] = converter().unstructure(rendered)
    return result


def main() -> None:
    """Render what the parent asks for."""
    serve(render, writes_files=True)


if __name__ == "__main__":
    main()
