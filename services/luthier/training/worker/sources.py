"""Which paths of this machine a base model may be read from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from luthier.errors import FieldViolation, InvalidArgument, NotFound, Reason
from luthier.lm.source_files import MAX_ENTRIES
from luthier.runtime.config import read
from luthier.training.model_roots import ROOTS_SETTING, roots_of
from luthier.work.worker_config import WorkerConfig

SETTING = "LUTHIER_WORKER_MODEL_ROOTS"


@dataclass(frozen=True, slots=True, kw_only=True)
class _OfService:
    model_roots: tuple[str, ...] = ()


def allowed_roots(config: WorkerConfig) -> tuple[Path, ...]:
    """Return the folders below which a worker may read base models; what the home has for it is made if missing.

    Its own setting wins over that of the service, which a worker of the same machine sees as well.

    Raises InvalidArgument for a root that holds keys or state.
    """
    if config.model_roots:
        return roots_of(config.home, config.model_roots, variable=SETTING)
    service = read(_OfService, section="TRAINING", is_part=True)
    roots = roots_of(config.home, service.model_roots, variable=ROOTS_SETTING)
    if not service.model_roots:
        for root in roots:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
    return roots


def resolve_allowed(path: str, roots: Sequence[Path], *, field: str, folder: bool) -> Path:
    """Return the real path of a model's folder or file below a root.

    Symbolic links are refused, below the root and in the folder; the root itself may be reached by one. Whoever reads
    the model looks at every file. Blocking.

    Raises:
        InvalidArgument: PATH_NOT_ALLOWED outside of the roots or through a link; otherwise it is not to be read, or no
            folder (no file).
        NotFound: nothing is there.
    """
    # What lies outside is refused unseen, so that a caller cannot ask which files exist there.
    wanted = _below_root(Path(os.path.normpath(path)), roots)
    if wanted is None:
        raise _not_allowed(path, roots, field)
    try:
        real = wanted.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise NotFound(
            f"{field}: must exist on the worker's machine, got {path!r}: nothing is there"
        ) from error
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
        f"{SETTING} of the training worker names the roots",
        reason=Reason.PATH_NOT_ALLOWED,
    )


def _wrong(field: str, description: str, reason: str = Reason.INVALID_FIELD) -> InvalidArgument:
    return InvalidArgument.of_fields(FieldViolation(field=field, description=description, reason=reason))
