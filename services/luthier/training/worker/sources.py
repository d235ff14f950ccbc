"""Which paths of this machine a base model may be read from."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from luthier.errors import FieldViolation, InvalidArgument, LuthierError, NotFound, Reason, Unavailable
from luthier.lm.source_files import MAX_ENTRIES, PASSING
from luthier.runtime.config import read
from luthier.storage.blobs import MARK_NAME
from luthier.training.model_roots import ROOTS_SETTING, StateUrls, roots_of
from luthier.work.worker_config import WorkerConfig

SETTING = "LUTHIER_WORKER_MODEL_ROOTS"
_SERVICES = ("DATA", "TRAINING", "EVALUATION")
_NOTHING = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG})
# O_PATH needs no right to read, opens no FIFO and waits for nobody.
_REACH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True, kw_only=True)
class _OfService:
    model_roots: tuple[str, ...] = ()


def allowed_roots(config: WorkerConfig) -> tuple[Path, ...]:
    """Return the folders below which a worker may read base models; what the home has for it is made if missing.

    Its own setting wins over that of the service, which a worker of the same machine sees as well.

    Raises InvalidArgument for a root that holds keys or state, or lies among them.
    """
    # A worker of the same machine sees where all of its services keep their state.
    states = [read(StateUrls, section=section, is_part=True) for section in _SERVICES]
    if config.model_roots:
        return roots_of(config.home, config.model_roots, variable=SETTING, states=states)
    service = read(_OfService, section="TRAINING", is_part=True)
    roots = roots_of(config.home, service.model_roots, variable=ROOTS_SETTING, states=states)
    if not service.model_roots:
        for root in roots:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
    return roots


def resolve_allowed(path: str, roots: Sequence[Path], *, field: str, folder: bool) -> Path:
    """Return the real path of a model's folder or file below a root.

    Symbolic links are refused, below the root and in the folder, and never followed; the root itself may be reached by
    one. So is what lies among the blobs of a service. Whoever reads the model looks at every file. Blocking.

    Raises:
        InvalidArgument: PATH_NOT_ALLOWED outside of the roots, through a link or among blobs; otherwise it is not to be
            read, or no folder (no file).
        NotFound: nothing is there.
        Unavailable: its disk does not answer just now.
    """
    # What lies outside is refused unseen, so that a caller cannot ask which files exist there.
    found = _below_root(Path(os.path.normpath(path)), roots)
    if found is None:
        raise _not_allowed(path, roots, field)
    root, relative = found
    with ExitStack() as opened:
        try:
            descriptor = _reached(root, relative, opened)
            mode = os.fstat(descriptor).st_mode
            link = _first_link(descriptor, field, path) if folder and stat.S_ISDIR(mode) else ""
        except _Refused as error:
            raise _not_allowed(path, roots, field) from error
        except LuthierError:
            raise
        except ValueError as error:  # a zero byte
            raise _missing(field, path) from error
        except OSError as error:
            raise _failed(error, field, path) from error
    if folder and not stat.S_ISDIR(mode):
        raise _wrong(field, f"must be a folder in transformers' layout, got {path!r}, which is a file")
    if not folder and not stat.S_ISREG(mode):
        raise _wrong(field, f"must be a GGUF file, got {path!r}, which is no regular file")
    if link:
        raise _not_allowed(str(root / relative / link), roots, field)
    return root / relative


class _Refused(Exception):
    """A way leads through a link, or among the blobs of a service."""


def _reached(root: Path, relative: Path, opened: ExitStack) -> int:
    """Return a descriptor of what lies below a root that is real, passing through its folders one by one."""
    if any((above / MARK_NAME).is_file() for above in root.parents):
        raise _Refused
    reached = _open(root, None, opened)
    for part in relative.parts:
        if _is_marked(reached):
            raise _Refused
        reached = _open(Path(part), reached, opened)
    if stat.S_ISDIR(os.fstat(reached).st_mode) and _is_marked(reached):
        raise _Refused
    return reached


def _open(name: Path, folder: int | None, opened: ExitStack) -> int:
    descriptor = os.open(name, _REACH, dir_fd=folder)
    opened.callback(os.close, descriptor)
    # With O_PATH a link is opened itself.
    if stat.S_ISLNK(os.fstat(descriptor).st_mode):
        raise _Refused
    return descriptor


def _is_marked(folder: int) -> bool:
    try:
        return stat.S_ISREG(os.stat(MARK_NAME, dir_fd=folder, follow_symlinks=False).st_mode)
    except OSError as error:
        if error.errno in PASSING:
            raise
        return False


def _first_link(folder: int, field: str, path: str) -> str:
    """Return the name of a link in a folder; empty: there is none."""
    descriptor = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
    try:
        with os.scandir(descriptor) as entries:
            found = list(islice(entries, MAX_ENTRIES + 1))
            links = [entry.name for entry in found if entry.is_symlink()]
    finally:
        os.close(descriptor)
    if len(found) > MAX_ENTRIES:
        raise _wrong(field, f"must hold at most {MAX_ENTRIES} names, {path!r} holds more")
    return min(links, default="")


def _below_root(written: Path, roots: Sequence[Path]) -> tuple[Path, Path] | None:
    """Return the root that a path lies below, made real, and the way from there; None when it lies below none."""
    for root in roots:
        real_root = root.resolve()
        for base in (root, real_root):
            if written.is_relative_to(base):
                return real_root, written.relative_to(base)
    return None


def _failed(error: OSError, field: str, path: str) -> LuthierError:
    if error.errno in _NOTHING:
        return _missing(field, path)
    if error.errno in PASSING:
        return Unavailable(f"{field}: {path!r} cannot be looked at just now: {error.strerror}")
    return _wrong(field, f"must be readable by the worker, got {path!r}: {error.strerror}")


def _missing(field: str, path: str) -> NotFound:
    return NotFound(f"{field}: must exist on the worker's machine, got {path!r}: nothing is there")


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
