"""Which paths a base model may be read from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from luthier.errors import FieldViolation, InvalidArgument, Reason


def resolve_allowed(path: str, roots: Sequence[Path], *, field: str, folder: bool) -> Path:
    """Return the real path of a model's folder or file below a root.

    Symbolic links are refused, below the root and in the folder; the root itself may be reached by one. Blocking.

    Raises:
        InvalidArgument: PATH_NOT_ALLOWED outside of the roots or through a link; otherwise the path is not
            absolute, is not there, or is no folder (no file).
    """
    if not os.path.isabs(path):
        raise _wrong(field, f"must be an absolute path, got {path!r}")
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
    for inner in sorted(real.iterdir()) if folder else ():
        if inner.is_symlink():
            raise _not_allowed(str(inner), roots, field)
    return real


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
