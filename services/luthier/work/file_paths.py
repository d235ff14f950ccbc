"""Paths that the other side names: of files within a folder, and of nothing outside of it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from google.protobuf.message import Message

from luthier.errors import DataLoss, InvalidArgument, Reason

MAX_PATH = 512
"""The longest path of a file within what it belongs to, in bytes."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\\]")


def is_within(path: str) -> bool:
    """Tell whether a path names a file below a folder: relative, as written, without `..` and control characters."""
    pure = PurePosixPath(path)
    return (
        0 < len(path.encode()) <= MAX_PATH
        and not pure.is_absolute()
        and ".." not in pure.parts
        and bool(pure.parts)
        and str(pure) == path
        and _CONTROL.search(path) is None
    )


def within(folder: Path, path: str) -> Path:
    """Return the place of a file that a service names below `folder`.

    Raises:
        DataLoss: PATH_NOT_ALLOWED; it would lie elsewhere.
    """
    if not is_within(path):
        raise DataLoss(
            f"the service names a file outside of its folder: {path[:MAX_PATH]!r}",
            reason=Reason.PATH_NOT_ALLOWED,
        )
    return folder / path


def check_paths(message: Message) -> None:
    """Check every file that a worker's message names, however deep: a message with `path` and `sha256`.

    Raises:
        InvalidArgument: PATH_NOT_ALLOWED; a path leads elsewhere, or two files of one list have the same.
    """
    if _is_file(message):
        path: str = getattr(message, "path")  # noqa: B009 - a message of any type
        if path and not is_within(path):
            raise InvalidArgument(
                f"a file's path must be relative, plain and at most {MAX_PATH} bytes, got {path[:MAX_PATH]!r}",
                reason=Reason.PATH_NOT_ALLOWED,
                metadata={"path": path[:MAX_PATH]},
            )
        return
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        parts = list(value) if field.is_repeated else [value]
        for part in parts:
            check_paths(part)
        _require_distinct(field.name, [getattr(part, "path") for part in parts if _is_file(part)])  # noqa: B009


def _is_file(message: Message) -> bool:
    fields = message.DESCRIPTOR.fields_by_name
    return "path" in fields and "sha256" in fields


def _require_distinct(field: str, paths: Iterable[str]) -> None:
    seen: set[str] = set()
    for path in filter(None, paths):
        if path in seen:
            raise InvalidArgument(
                f"{field} must name each file once, got {path!r} twice", reason=Reason.PATH_NOT_ALLOWED
            )
        seen.add(path)
