"""The home of all state: its owner's alone, whatever umask and whatever modes a process finds."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from luthier.errors import FailedPrecondition

_FOLDERS = ("data", "training", "evaluation", "cache", "work", "logs")
_OTHERS = 0o077


def keep_private() -> None:
    """Make what this process creates its owner's alone: files 0600, folders 0700. Call it first in a process."""
    os.umask(_OTHERS)


def secure_home(home: Path) -> list[str]:
    """Make the home, or take from others what they may do in one that is there; return what was changed.

    Its folders and databases are looked at one by one, blobs not: nobody else gets to them.

    A user's whole home directory keeps its mode: it is not Luthier's to change. Raises FailedPrecondition for one that
    cannot be made, for a folder of another user, and for one where everybody may write, as /tmp is.
    """
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise FailedPrecondition(
            f"the home must be a folder that user {os.geteuid()} may make, got {home}: {error.strerror}; "
            "set LUTHIER_HOME to another folder",
            metadata={"home": str(home)},
        ) from error
    require_own(home)
    return [said for path in _state(home) if (said := _tightened(path))]


def require_own(home: Path) -> None:
    """Raise FailedPrecondition for a home of another user, and for one where everybody may write."""
    status = home.stat()
    problem = ""
    if status.st_uid != os.geteuid():
        problem = f"it belongs to user {status.st_uid}, not to {os.geteuid()}"
    elif status.st_mode & (stat.S_ISVTX | stat.S_IWOTH):
        problem = f"everybody may write there (mode {stat.S_IMODE(status.st_mode):04o})"
    if problem:
        raise FailedPrecondition(
            f"the home must be a folder of its own for Luthier's state, got {home}: {problem}; "
            "set LUTHIER_HOME to another folder",
            metadata={"home": str(home)},
        )


def _state(home: Path) -> Iterator[Path]:
    if home.resolve() != Path.home().resolve():
        yield home
    for name in _FOLDERS:
        folder = home / name
        if folder.is_dir() and not folder.is_symlink():
            yield folder
            yield from (path for path in sorted(folder.glob("*.db*")) if path.is_file())
            yield from (path for path in sorted(folder.glob("*.log")) if path.is_file())


def _tightened(path: Path) -> str:
    """Take every right of others from a file or folder of this user; say what was done, nothing if nothing was."""
    try:
        status = path.lstat()
        mode = stat.S_IMODE(status.st_mode)
        if not mode & _OTHERS or stat.S_ISLNK(status.st_mode):
            return ""
        path.chmod(mode & ~_OTHERS)
    except FileNotFoundError:  # a database's log may go at any time
        return ""
    except PermissionError as error:
        raise FailedPrecondition(
            f"{path} must be its owner's alone, got mode {mode:04o}, and it belongs to user {status.st_uid}",
            metadata={"path": str(path)},
        ) from error
    return f"{path} had mode {mode:04o}, others could get at it: now {mode & ~_OTHERS:04o}"
