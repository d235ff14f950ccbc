"""Which paths a base model may be read from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from luthier.errors import FieldViolation, InvalidArgument, Reason
from luthier.lm.source_files import MAX_ENTRIES, has_control_characters

MAX_PATH = 4096
"""The longest path that Linux takes, in bytes."""


def resolve_allowed(path: str, roots: Sequence[Path], *, field: str, folder: bool) -> Path:
    """Return the real path of a model's folder or file below a root.

    Symbolic links are refused, below the root and in the folder; the root itself may be reached by one. The worker
    that reads the model looks at every file. Blocking.

    Raises:
        InvalidArgument: PATH_NOT_ALLOWED outside of the roots or through a link; otherwise the path is not
            absolute, has control characters, is not there or not to be read, or is no folder (no file).
    """
    if has_control_characters(path):
        raise _wrong(field, f"must have no control characters, got {path[:MAX_PATH]!r}")
    if not os.path.isabs(path):
        raise _wrong(field, f"must be an absolute path, got {path[:MAX_PATH]!r}")
    if len(os.fsencode(path)) > MAX_PATH:
        raise _wrong(field, f"must have at most {MAX_PATH} bytes, got {len(os.fsencode(path))}")
    # What lies outside is refused unseen, so that a caller cannot ask which files exist there.
    wanted = _below_root(Path(os.path.normpath(path)), roots)
    if wanted is None:
        raise _not_allowed(path, roots, field)
    try:
        real = wanted.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise _wrong(field, f"must exist on the worker's machine, got {path!r}: nothing is there") from error
    if real != wanted:
        raise _not_allowed(path, roots, field)
    if folder and not real.is_dir():
        raise _wrong(field, f"must be a folder in transformers' layout, got {path!r}, which is a file")
    if not folder and not real.is_file():
        raise _wrong(field, f"must be a GGUF file, got {path!r}, which is no regular file")
    link = _first_link(real, field) if folder else None
    if link is not None:
        raise _not_allowed(link, roots, field)
    return real


def _first_link(folder: Path, field: str) -> str | None:
    try:
        with os.scandir(folder) as entries:
            found = list(islice(entries, MAX_ENTRIES + 1))
    except OSError as error:
        raise _wrong(field, f"must be readable, got {str(folder)!r}: {error.strerror}") from error
    if len(found) > MAX_ENTRIES:
        raise _wrong(field, f"must hold at most {MAX_ENTRIES} names, {str(folder)!r} holds more")
    return min((entry.path for entry in found if entry.is_symlink()), default=None)


def _below_root(written: Path, roots: Sequence[Path]) -> Path | None:
    """Return a path with the root that it lies below made real; None when it lies below none."""
    for root in roots:
        real_root = root.resolve()
        for base in (root, real_root):
            if written.is_relative_to(base):
                return real_root / written.relative_to(base)
    return None


def _not_allowed(path: str, roots: Sequence[Path], field: str) -> InvalidArgument:
    allowed = ", ".join(str(root) for root in roots)
    return _wrong(
        field,
        f"must lie below an allowed root ({allowed}) and not be reached by a symbolic link, got {path!r}; "
        "LUTHIER_TRAINING_MODEL_ROOTS names the roots",
        reason=Reason.PATH_NOT_ALLOWED,
    )


def _wrong(field: str, description: str, reason: str = Reason.INVALID_FIELD) -> InvalidArgument:
    return InvalidArgument.of_fields(FieldViolation(field=field, description=description, reason=reason))
