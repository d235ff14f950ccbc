"""Which paths a base model may be read from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from luthier.errors import FieldViolation, InvalidArgument, Reason


def resolve_allowed(path: str, roots: Sequence[Path], *, field: str, folder: bool) -> Path:
    """Return the real path of a model's folder or file that lies, with all it contains, below a root.

    Symlinks are followed and must end below a root too. Blocking.

    Raises:
        InvalidArgument: PATH_NOT_ALLOWED outside of the roots; otherwise the path is not absolute, is not
            there, or is no folder (no file).
    """
    if not os.path.isabs(path):
        raise _wrong(field, f"must be an absolute path, got {path!r}")
    real_roots = [root.resolve() for root in roots]
    written = Path(os.path.normpath(path))
    # What lies outside is refused unseen, so that a caller cannot ask which files exist there.
    if not any(written.is_relative_to(root) for root in (*roots, *real_roots)):
        raise _not_allowed(path, roots, field)
    try:
        real = Path(path).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise _wrong(field, f"must exist on the worker's machine, got {path!r}: nothing is there") from error
    _require_below(real, path, roots, real_roots, field)
    if folder and not real.is_dir():
        raise _wrong(field, f"must be a folder in transformers' layout, got {path!r}, which is a file")
    if not folder and not real.is_file():
        raise _wrong(field, f"must be a GGUF file, got {path!r}, which is no regular file")
    for inner in sorted(real.iterdir()) if folder else ():
        _require_below(inner.resolve(), str(inner), roots, real_roots, field)
    return real


def _require_below(
    real: Path, path: str, roots: Sequence[Path], real_roots: Sequence[Path], field: str
) -> None:
    if not any(real.is_relative_to(root) for root in real_roots):
        raise _not_allowed(path, roots, field)


def _not_allowed(path: str, roots: Sequence[Path], field: str) -> InvalidArgument:
    allowed = ", ".join(str(root) for root in roots)
    return _wrong(
        field,
        f"must lie below an allowed root ({allowed}), symlinks followed, got {path!r}; "
        "LUTHIER_TRAINING_MODEL_ROOTS names the roots",
        reason=Reason.PATH_NOT_ALLOWED,
    )


def _wrong(field: str, description: str, reason: str = Reason.INVALID_FIELD) -> InvalidArgument:
    return InvalidArgument.of_fields(FieldViolation(field=field, description=description, reason=reason))
